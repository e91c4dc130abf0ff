"""Page and plot of what `reversible.py` measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

GOALS = {"0.5": 0.995, "0.25": 0.985, "0.125": 0.97}  # budget -> mean score on the zoo
COLOURS = {
    "auto": "#bbbbbb",
    "truncate": "#2a6f97",
    "tucker2": "#6a994e",
    "hybrid": "#bc4749",
    "rmm": "#f4a261",
    "rmm_aligned": "#9c6644",
    "truncate bf16": "#2a6f97",
    "truncate int8": "#61a5c2",
    "rmm bf16": "#f4a261",
    "rmm, p models": "#e76f51",
}
PUBLISHED = ("rmm bf16", "rmm, p models")  # by p, not by budget


@dataclass(frozen=True)
class Score:
    """One reconstructed adapter on its own task, row by row against the original's.

    accuracy, original: fractions right.  error: one standard error of `relative` from the rows on which the two differ.
    """

    accuracy: float
    original: float
    error: float

    @classmethod
    def of(cls, original: str, kept: str) -> "Score":
        """original, kept: a 1 for every row that is right."""
        change = [int(b) - int(a) for a, b in zip(original, kept, strict=True)]
        rows, mean = len(change), sum(change) / len(change)
        before = original.count("1") / rows
        spread = sum((c - mean) ** 2 for c in change) / rows
        return cls(before + mean, before, math.sqrt(spread / rows) / before)

    @property
    def relative(self) -> float:
        return self.accuracy / self.original


@dataclass(frozen=True)
class Row:
    """One codec at one budget. size: of the inputs' bytes as bf16.  errors: relative, per task.  chosen: codec -> modules."""

    regime: str
    label: str
    at: str
    size: float
    errors: tuple[float, ...]
    chosen: Mapping[str, int]
    scores: Mapping[str, Score]
    seconds: float

    @property
    def rms(self) -> float:
        """What allocation makes small."""
        return math.sqrt(sum(error**2 for error in self.errors) / len(self.errors))

    @property
    def score(self) -> float:
        return sum(score.relative for score in self.scores.values()) / len(self.scores)

    @property
    def score_error(self) -> float:
        return math.sqrt(sum(score.error**2 for score in self.scores.values())) / len(self.scores)


def tables(rows: Sequence[Row]) -> str:
    """All numbers, a section for each regime."""
    return "\n\n".join(section([row for row in rows if row.regime == name]) for name in dict.fromkeys(row.regime for row in rows))


def section(rows: Sequence[Row], about: str = "") -> str:
    """Of one regime."""
    scored = [row for row in rows if row.scores]
    parts = [f"## {rows[0].regime}", about, errors_table(rows), *(published(rows, label) for label in PUBLISHED)]
    if scored:
        parts += ["### Accuracy", scores_table(scored), "### Accuracy by task, codec auto", tasks_table(scored)]
    return "\n\n".join(part for part in parts if part)


def errors_table(rows: Sequence[Row]) -> str:
    found = {(row.label, row.at): row for row in rows if row.label not in PUBLISHED}
    budgets = list(dict.fromkeys(at for _, at in found))
    lines = [["relative error at", *budgets]]
    for label in dict.fromkeys(label for label, _ in found):
        lines.append([label, *(fraction(found[label, at].rms) for at in budgets)])
    lines.append(["chosen by auto", *(choice(found["auto", at].chosen) for at in budgets)])
    return table(lines)


def choice(chosen: Mapping[str, int]) -> str:
    if len(chosen) == 1:
        return next(iter(chosen))
    return ", ".join(f"{codec} {count}" for codec, count in sorted(chosen.items()))


def published(rows: Sequence[Row], label: str) -> str:
    own = [row for row in rows if row.label == label]
    if not own:
        return ""
    sizes, errors = [f"{row.size:.3f}" for row in own], [fraction(row.rms) for row in own]
    return table([[f"published {label}", *(row.at for row in own)], ["size", *sizes], ["relative error", *errors]])


def scores_table(rows: Sequence[Row]) -> str:
    lines = [["codec", "budget", "size", "relative error", "score", "±", "worst task"]]
    for row in sorted(rows, key=lambda row: list(COLOURS).index(row.label)):
        worst = min(row.scores, key=lambda task: row.scores[task].relative)
        score = [f"**{row.score:.4f}**", f"{row.score_error:.4f}", f"{worst} {row.scores[worst].relative:.3f}"]
        lines.append([row.label, row.at, f"{row.size:.3f}", fraction(row.rms), *score])
    return table(lines)


def tasks_table(rows: Sequence[Row]) -> str:
    """Of auto, at the budgets that have a goal."""
    rows = [row for row in rows if row.label == "auto" and row.at in GOALS]
    lines = [["accuracy", "original", *(f"at {row.at}" for row in rows), *(f"score at {row.at}" for row in rows)]]
    for task, score in rows[0].scores.items():
        accuracies = [f"{row.scores[task].accuracy:.4f}" for row in rows]
        relative = [f"{row.scores[task].relative:.3f} ± {row.scores[task].error:.3f}" for row in rows]
        lines.append([task, f"{score.original:.4f}", *accuracies, *relative])
    return table(lines)


def goals_table(rows: Sequence[Row]) -> str:
    lines = [["budget", "size", "goal", "score", "±", "", "relative error"]]
    for row in rows:
        if row.regime == "zoo" and row.label == "auto" and row.at in GOALS:
            goal = GOALS[row.at]
            verdict = f"{'reached' if row.score >= goal else 'missed'} by {abs(row.score - goal):.4f}"
            score = [f"**{row.score:.4f}**", f"{row.score_error:.4f}", verdict, fraction(row.rms)]
            lines.append([row.at, f"{row.size:.3f}", f"{goal:.3f}", *score])
    return table(lines)


def table(lines: Sequence[Sequence[str]]) -> str:
    first, *rest = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([first, "|" + "---|" * len(lines[0]), *rest])


def fraction(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.4f}" if value >= 0.001 else f"{value:.5f}"


def page(rows: Sequence[Row], about: Mapping[str, str]) -> str:
    """about: regime -> what it is."""
    surveys = {row.at: row.seconds for row in rows if row.regime == "zoo" and row.label == "auto"}
    sections = "\n\n".join(section([row for row in rows if row.regime == name], text) for name, text in about.items())
    return f"""# What a reversible basis loses

One basis of eight adapters, from which each comes back: how far off in weight space, and how accurate on its own task.

Budgets and sizes are fractions of the inputs' bytes as bf16; sizes are payload, without the layout and file headers. Relative
error is `||decoded - adapter|| / ||adapter||` over all modules, root mean square over the adapters. Score is the accuracy of
the reconstructed adapter on its own task's test split over that of the original on the same rows, mean over the tasks.
± is one standard error, from the rows on which only one of the two is right: what another sample of rows would change. It is
smaller than the .009 of QUALITY.md because both answer the same 600 rows of each task, and it says nothing of other adapters.
Where ± is 0, no answer became right or wrong: of 4800 rows that bounds the loss to .001 with 95 % confidence.

`python benchmarks/reversible.py --zoo DIR` repeats it. Surveying every codec for one budget took
{min(surveys.values()):.0f} to {max(surveys.values()):.0f} s on the zoo's {sum(rows[0].chosen.values())} modules,
on one core of a machine with other work; one codec alone takes its share of that.

## What was to be reached, and what was

Codec `auto`, on the zoo:

{goals_table(rows)}

![error and score against size](reversible.svg)

Rows named after a codec alone are in the encoding `auto`, the default; `truncate bf16` and `truncate int8` are plain truncation
in one fixed encoding, the strongest terms over all adapters of a module (at a budget of 0.5 and in bf16 half of them), and
`rmm bf16` is the published method (arXiv:2510.14163) with p directions per position, unquantised; `rmm, p models` is the other
reading of its outline, p whole models of which every adapter is a combination, likewise unquantised.

{sections}
"""


def plot(rows: Sequence[Row], path: Path) -> None:
    """Error against size for every regime, and on the zoo the score."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "braid"  # the same file for the same numbers
    from matplotlib import pyplot as plt

    regimes = list(dict.fromkeys(row.regime for row in rows))
    figure, grid = plt.subplots(2, 3, figsize=(13, 8))
    score, *panels = [grid[0, 1], grid[0, 0], grid[0, 2], *grid[1]]
    for axes, name in zip(panels, regimes, strict=True):
        curves(axes, [row for row in rows if row.regime == name], lambda row: row.rms)
        axes.set_yscale("log")
        axes.set_title(f"{name}: relative error", fontsize=10)
    scored = [row for row in rows if row.scores]
    curves(score, scored, lambda row: row.score)
    auto = [row for row in scored if row.label == "auto"]
    score.errorbar(
        [r.size for r in auto], [r.score for r in auto], [r.score_error for r in auto], fmt="none", ecolor="#333333", lw=0.8
    )
    score.plot([float(at) for at in GOALS], list(GOALS.values()), "_", color="black", ms=14, mew=1.5, label="goal")
    score.set_title("zoo: score", fontsize=10)
    for axes in grid.flat:
        axes.set_xlim(0, 1.15)
        axes.set_xlabel("bytes, as a fraction of the inputs' in bf16", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    named = {label: line for axes in (*panels, score) for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="lower center", ncols=len(named), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, metadata={"Date": None})


def curves(axes: Any, rows: Sequence[Row], value: Callable[[Row], float]) -> None:
    """A line per codec; auto is broad, beneath the one that it follows."""
    for label, colour in COLOURS.items():
        points = sorted((row.size, value(row)) for row in rows if row.label == label)
        broad = {"lw": 7, "solid_capstyle": "round"} if label == "auto" else {"lw": 1.4, "marker": "o", "ms": 3}
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=colour, ls="--" if " " in label else "-", label=label, **broad)
