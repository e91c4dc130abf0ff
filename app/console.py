"""What people see in a terminal: progress, the certificate as a table, and how to go on."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

_MOST_ROWS = 40
_SPARKS = 60
_BLOCKS = "▁▂▃▄▅▆▇█"
_STAGES = {
    "queued": "waiting for a worker",
    "fetch": "fetching inputs",
    "learn": "learning coefficients",
    "ground": "grounding modules in the base model",
    "survey": "surveying modules",
    "merge": "computing modules",
    "assemble": "writing the result",
}


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[..., None]]:
    """Gives `report(stage, done, total)`, which moves the bar; with `loss`, of held-out rows, if that is known."""
    columns = (SpinnerColumn(), TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=None)

        def report(stage: str, done: int, total: int, loss: float | None = None) -> None:
            shown = _STAGES.get(stage, stage) + (f", loss {loss:.4g}" if loss is not None else "")
            progress.update(bar, description=shown, completed=done, total=total or None)

        yield report


def certificate_table(report: Mapping[str, Any]) -> Table:
    """The certificate, worst modules first where there are too many to show."""
    modules = list(report["modules"])
    shown = modules if len(modules) <= _MOST_ROWS else sorted(modules, key=lambda m: -m["relative_error"])[:_MOST_ROWS]
    left_out = len(modules) - len(shown)
    table = Table(
        title="Certificate: what was lost",
        caption="kept: of the energy; error: relative, from cutting the rank; rounding: relative, from the stored type"
        + (f"; {left_out} better modules not shown" if left_out else ""),
    )
    table.add_column("module", overflow="fold", min_width=24)
    for heading in ("rank", "kept", "error", "rounding"):
        table.add_column(heading, justify="right", no_wrap=True)
    for module in shown:
        table.add_row(module["module"], f"{module['rank_in']} → {module['rank_out']}", *_losses(module))
    totals = report["totals"]
    table.add_section()
    whole = f" and {totals['left_out']} tensors left out" if totals.get("left_out") else ""
    table.add_row(f"all {totals['modules']} modules{whole}", str(totals["rank"]), *_losses(totals), style="bold")
    return table


def grounded_table(grounded: Sequence[Mapping[str, Any]]) -> Table:
    """What inputs that depend on the base model's weights lost before the merge."""
    table = Table(title="Cut before the merge", caption="depending on the base model's weights; error: relative, measured")
    table.add_column("adapter", overflow="fold", min_width=16)
    for heading in ("rank", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("base model", overflow="fold")
    for each in grounded:
        table.add_row(escape(each["name"]), str(each["rank"]), _error(each["relative_error"]), escape(each["base"]))
    return table


def left_out_table(left_out: Sequence[Mapping[str, Any]]) -> Table:
    """What has changed between two models and is in no module of the adapter, most of it first."""
    table = Table(title="Changed, but in no module of the adapter: counted as lost")
    table.add_column("tensor", overflow="fold", min_width=24)
    table.add_column("why", no_wrap=True)
    for heading in ("norm", "of the base's"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in sorted(left_out, key=lambda own: -own["norm"])[:_MOST_ROWS]:
        relative = each["relative_norm"]
        shown = "" if relative is None else f"{relative:.2e}"
        table.add_row(escape(each["tensor"]), each["reason"], f"{each['norm']:.4g}", shown)
    more = len(left_out) - table.row_count
    table.caption = f"{more} with less not shown" if more > 0 else None
    return table


def training_table(training: Mapping[str, Any]) -> Table:
    """What learning brought each task on its held-out rows."""
    curve, best_step = training["curve"], training["best_step"]
    best = next(point for point in curve if point["step"] == best_step)
    table = Table(
        title="Learned coefficients",
        caption=f"{training['coefficients']} of them; the best of {training['step']} steps: {best_step}; "
        "loss: on held-out rows, 1 is guessing\n" + _sparkline([point["score"] for point in curve]),
    )
    table.add_column("task", overflow="fold", min_width=16)
    for heading in ("rows", "held out", "loss before", "after", "accuracy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task in training["tasks"]:
        name = task["name"]
        accuracy = f"{training['accuracy'][name]:.1%}" if training["accuracy"] else ""
        losses = (f"{curve[0]['tasks'][name]:.4f}", f"{best['tasks'][name]:.4f}")
        table.add_row(name, str(task["rows"]), str(task["held_out"]), *losses, accuracy)
    return table


def _sparkline(scores: Sequence[float]) -> str:
    """The held-out score over the training, as a line of blocks."""
    low, high = min(scores), max(scores)
    shown = [scores[n * len(scores) // _SPARKS] for n in range(_SPARKS)] if len(scores) > _SPARKS else list(scores)
    height = (high - low) or 1.0
    return "held-out score " + "".join(_BLOCKS[int((len(_BLOCKS) - 1) * (score - low) / height)] for score in shown)


def basis_table(report: Mapping[str, Any]) -> Table:
    """The tasks of a basis and what each lost. report: the certificate of the basis."""
    totals = report["totals"]
    shares = f"{totals['size_bytes']:,} bytes for {totals['input_bytes']:,} as bf16 ({totals['fraction']:.1%})"
    table = Table(title="Basis: what each task lost", caption=shares + f"; {_codecs(report)}; error: relative, measured")
    table.add_column("task", overflow="fold", min_width=16)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("bytes as bf16", justify="right", no_wrap=True)
    table.add_column("from", overflow="fold")
    for task in report["tasks"]:
        table.add_row(task["name"], _error(task["relative_error"]), f"{task['input_bytes']:,}", task["input"])
    table.add_section()
    table.add_row("mean", _error(totals["mean_error"]), f"{totals['input_bytes']:,}", "", style="bold")
    return table


def data_table(files: Iterable[Mapping[str, Any]]) -> Table:
    """Data files as GET /data shows them, one row each."""
    table = Table(title="Data files")
    table.add_column("id", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for heading in ("rows", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("columns", overflow="fold")
    for file in files:
        columns = escape(", ".join(file["columns"]))
        table.add_row(file["id"], file["kind"], f"{file['rows']:,}", f"{file['size_bytes']:,}", columns)
    return table


def _codecs(report: Mapping[str, Any]) -> str:
    counted = Counter(module["codec"] for module in report["modules"])
    return ", ".join(f"{codec} in {count} modules" for codec, count in counted.items()) or "lossless"


def _error(error: float) -> str:
    return "none" if error == 0.0 else f"{error:.2%}"


def how_to_load(directory: Path, base_model: str, task_type: str | None) -> str:
    loader = "AutoModelForCausalLM" if task_type == "CAUSAL_LM" else "AutoModel"
    return (
        "from peft import PeftModel\n"
        f"from transformers import {loader}\n\n"
        f'model = PeftModel.from_pretrained({loader}.from_pretrained("{base_model}"), "{directory}")'
    )


def _losses(row: Mapping[str, Any]) -> tuple[str, str, str]:
    error = "exact" if row["exact"] else f"{row['relative_error']:.4f}"
    return f"{row['retained_energy']:.2%}", error, f"{row['rounding_error']:.1e}"
