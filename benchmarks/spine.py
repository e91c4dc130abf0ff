"""What the spine costs: 8 adapters of rank 16 on a 7B-like set of modules, merged exactly and at rank 16.

    python benchmarks/spine.py [--layers 32] [--adapters 8] [--dtype bfloat16] [--json FILE]

Real files in, real files out, through the worker's own child process: fetch, merge, assemble, publish. Prints wall time,
the child's peak resident memory above what it takes after its imports, the bytes it read and wrote, and, measured in the
same run, the time of merely copying the bytes of the inputs and of the result: by turns, the best of three on both sides.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Self

import torch
from rich.console import Console
from rich.table import Table

from app.adapters import put_tensors, read_manifest
from app.console import progress_bar
from app.engine.local import LocalExecutor, open_pool
from app.engine.messages import FetchTask
from app.engine.workflow import Run, run_all
from app.ingest import import_upload
from app.recipe import Recipe, RecipeInput
from app.services import Services
from app.settings import Settings
from merge_algos.formats.written import factor_names
from merge_algos.rank import RankRule
from storage.digest import Digest
from storage.tensor_writer import TensorSpec

SHAPES = {"self_attn.q_proj": (4096, 4096), "mlp.up_proj": (11008, 4096)}
SPELLING = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
MIB = 1024 * 1024
ROUNDS = 3  # at most, of a merge and a copy
ENOUGH_S = 10.0  # of merging, after which a round more tells nothing


@dataclass(frozen=True)
class Row:
    case: str
    wall_s: float
    copy_s: float
    peak_rss_mib: float
    above_import_mib: float
    input_mib: float
    reread_mib: float
    written_mib: float
    result_mib: float


@dataclass(frozen=True)
class Spawned:
    """A child without a supervisor, which has nothing in memory but its own imports."""

    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]

    @classmethod
    def start(cls, settings: Settings, module: str, arguments: Sequence[str]) -> Self:
        command = [sys.executable, "-m", "app.supervisor", module, *arguments]
        pipe, environment = subprocess.PIPE, settings.to_environment()
        process = subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, env=environment)
        assert process.stdin is not None
        assert process.stdout is not None
        return cls(process, process.stdin, process.stdout)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=sorted(SPELLING), default="bfloat16")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as folder:
        services = Services.open(Settings(data_dir=Path(folder), devices="cpu", log_level="WARNING"))
        inputs = tuple(
            make_adapter(services, seed, SHAPES, args.layers, args.rank, args.dtype, console) for seed in range(args.adapters)
        )
        rows = [measure(services, inputs, "task_arithmetic", rule, console) for rule in (RankRule(), RankRule(max=16))]
    Console(width=150).print(as_table(rows, args))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


Shapes = Mapping[str, tuple[int, int]]


def make_adapter(
    services: Services, seed: int, layer_shapes: Shapes, layers: int, rank: int, dtype: str, console: Console
) -> Digest:
    """One synthetic adapter, in the store."""
    console.print(f"making adapter {seed + 1}", style="dim")
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    for layer in range(layers):
        for name, (d_out, d_in) in layer_shapes.items():
            lora_A, lora_B = factor_names(f"model.layers.{layer}.{name}")
            shapes |= {lora_A: (rank, d_in), lora_B: (d_out, rank)}
    specs = [TensorSpec(name, SPELLING[dtype], shape) for name, shape in shapes.items()]
    make = lambda name: (torch.randn(shapes[name], generator=generator) * 0.02).to(getattr(torch, dtype))  # noqa: E731
    stored = put_tensors(services.blobs, specs, make)
    config = {"peft_type": "LORA", "base_model_name_or_path": "bench/7b-like", "r": rank, "lora_alpha": 2 * rank}
    weights = services.blobs.path(stored.digest)
    return import_upload(services, [json.dumps(config).encode()], chunks(weights)).id


def measure(services: Services, inputs: tuple[Digest, ...], method: str, rule: RankRule, console: Console) -> Row:
    recipe = Recipe(
        method=method,
        method_version=1,
        parameters={},
        rank=rule,
        dtype="auto",
        seed=0,
        profile="portable",
        allow_base_mismatch=False,
        adapters=tuple(RecipeInput(str(digest), f"a{n}", 1 / len(inputs)) for n, digest in enumerate(inputs)),
    )
    pool = open_pool(services.settings, ["cpu"], partial(Spawned.start, services.settings))
    with pool.lease() as executor, progress_bar(console) as report:
        pid = warm(executor)
        imported_kib, written_before = peak_kib(pid), io(pid)["wchar"]
        rounds: list[Round] = []
        while len(rounds) < ROUNDS and sum(done.wall_s for done in rounds) < ENOUGH_S:
            rounds.append(measure_round(Run(services, recipe, executor, report, stop=lambda: False)))
        peak, written = peak_kib(pid), (io(pid)["wchar"] - written_before) // len(rounds)
    pool.children[0].kill()
    return Row(
        case="exact" if rule.max is None else f"rank {rule.max}",
        wall_s=min(done.wall_s for done in rounds),
        copy_s=min(done.copy_s for done in rounds),
        peak_rss_mib=peak / 1024,
        above_import_mib=(peak - imported_kib) / 1024,
        input_mib=rounds[0].input_bytes / MIB,
        reread_mib=(written - rounds[0].result_bytes) / MIB,
        written_mib=written / MIB,
        result_mib=rounds[0].result_bytes / MIB,
    )


@dataclass(frozen=True)
class Round:
    wall_s: float
    copy_s: float
    input_bytes: int
    result_bytes: int


def measure_round(run: Run) -> Round:
    """One merge, and a copy of its bytes. What it stored is deleted, so that the next one finds what it found.

    By turns, since both write to a disk that has slow phases, and into memory that the first one has to ask for.
    """
    blobs = run.services.blobs
    there = set(blobs.digests())
    started = time.perf_counter()
    adapter = run_all(run)
    wall_s = time.perf_counter() - started
    inputs = [Digest.parse(given.source) for given in run.recipe.adapters]
    weights = [read_manifest(blobs, digest).weights for digest in (*inputs, adapter)]
    copy_s = copying(run.services, [w.digest for w in weights])
    for digest in set(blobs.digests()) - there:
        blobs.delete(digest)
    return Round(wall_s, copy_s, sum(w.size_bytes for w in weights[:-1]), weights[-1].size_bytes)


def warm(executor: LocalExecutor) -> int:
    """Wait until the child has imported everything, by letting it answer one task; its process id."""
    list(executor.child.answers([FetchTask("sha256:" + "0" * 64)], stop=lambda: False))
    process = executor.child.start()
    assert isinstance(process, Spawned)
    return process.process.pid


def copying(services: Services, digests: list[Digest]) -> float:
    """Seconds to read these blobs and write their bytes to a file that is then synced."""
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=services.settings.data_dir) as target:
        for digest in digests:
            for chunk in chunks(services.blobs.path(digest)):
                target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    return time.perf_counter() - started


def chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(MIB):
            yield chunk


def peak_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def io(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def as_table(rows: list[Row], args: argparse.Namespace) -> Table:
    made = f"{args.adapters} adapters of rank {args.rank}, {args.dtype}"
    title = f"{made}, {args.layers} layers x {{4096², 4096x11008}}, {os.cpu_count()} cores"
    table = Table(title=title, caption="copy: reading inputs and result and writing their bytes once; by turns, best of three")
    for heading in (
        "case",
        "wall",
        "copy",
        "wall/copy",
        "peak RSS",
        "over import",
        "inputs read",
        "shards re-read",
        "written",
        "result",
    ):
        table.add_column(heading, justify="right")
    for r in rows:
        sizes = (r.peak_rss_mib, r.above_import_mib, r.input_mib, r.reread_mib, r.written_mib, r.result_mib)
        table.add_row(
            r.case, f"{r.wall_s:.1f} s", f"{r.copy_s:.1f} s", f"{r.wall_s / r.copy_s:.1f}", *(f"{s:.0f} MiB" for s in sizes)
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
