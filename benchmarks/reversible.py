"""What a reversible basis loses at a given size: every codec, on eight real adapters and on four kinds of synthetic ones.

    python benchmarks/reversible.py --zoo DIR                       # everything: about half an hour on one core
    python benchmarks/reversible.py --only independent,shared       # synthetic ones alone need no zoo: a minute each
    python benchmarks/reversible.py --zoo DIR --only zoo --split val

DIR is as for quality.py. Errors are those of decoded weights; on the zoo also the accuracy of every reconstructed adapter on its
own task, over that of the adapter it was made from. The whole of it, on the test split, is written to REVERSIBLE.md and
reversible.svg beside this file; a part is only printed. What is measured is appended to the state file at once, and what stands
there is not measured again: an interrupted run goes on where it was, and changed code needs a new file.
"""

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the matrices are too small for threads to help

import torch
from quality import TASKS, Zoo, load, read
from reversible_page import Row, Score, page, plot, tables
from rich.console import Console
from rich.progress import track
from torch import Tensor

from merge_algos import LowRankDelta, codecs
from merge_algos.lowrank import distance
from merge_algos.reversible import Candidate, Options, Survey, allocate, decode_task, encode, survey

HERE = Path(__file__).parent
BUDGETS = (0.1, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
SCORED = (0.1, 0.125, 0.25, 0.5, 1.0)  # budgets at which auto's adapters are run; other codecs' at the middle three
MODELS = (2, 3, 4)  # of the basis that the paper's outline may also mean: whole models, not directions per position
MODULES, ADAPTERS, SIZE, RANK = 4, 8, 256, 8  # of a synthetic regime
Module = Sequence[LowRankDelta]  # of every adapter its delta


@dataclass(frozen=True)
class Case:
    """One point of a curve. surveyed: the options of the survey that holds its candidates; scored: also run on the zoo."""

    label: str
    options: Options
    surveyed: Options
    scored: bool

    @property
    def at(self) -> str:
        return f"p={self.options.p}" if self.options.p is not None else f"{self.options.budget:g}"


@dataclass(frozen=True)
class State:
    """What has been measured, a line of JSON each."""

    path: Path
    found: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "State":
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may have been cut off
        if len(whole) < len(lines):
            path.write_text("".join(lines[: len(whole)]))
        return cls(path, {each["key"]: each["value"] for each in whole})

    def measure(self, key: str, body: Callable[[], Any]) -> None:
        if key in self.found:
            return
        started = time.perf_counter()
        self.found[key] = {"result": body(), "seconds": time.perf_counter() - started}
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "value": self.found[key]}) + "\n")

    def __getitem__(self, key: str) -> Any:
        return self.found[key]["result"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, help="needed unless --only leaves the zoo out")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--only", default="", help=f"comma-separated, of {', '.join(('zoo', *REGIMES))}")
    parser.add_argument("--state", type=Path, default=Path("reversible-state.jsonl"))
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else ["zoo", *REGIMES]
    if unknown := set(wanted) - {"zoo", *REGIMES}:
        parser.error(f"--only knows no {', '.join(sorted(unknown))}")
    if "zoo" in wanted and args.zoo is None:
        parser.error("--zoo is needed for the zoo")
    state = State.read(args.state)
    regimes = {name: adapters_of(args.zoo) if name == "zoo" else synthetic(name) for name in wanted}
    zoo = load(args.zoo, args.split) if "zoo" in wanted else None
    steps = [step for name in wanted for step in steps_of(name, regimes[name], zoo if name == "zoo" else None, state)]
    for key, measure in track(steps, "measuring", console=Console(stderr=True)):
        state.measure(key, measure)
    rows = [row(name, case, regimes[name], state, args.split) for name in wanted for case in cases()]
    if zoo is not None:
        rows += [models_row(regimes["zoo"], p, state, args.split) for p in MODELS]
    print(tables(rows))
    if args.split == "test" and not args.only:
        (HERE / "REVERSIBLE.md").write_text(page(rows, ABOUT))
        plot(rows, HERE / "reversible.svg")


def cases() -> list[Case]:
    """Every codec at every budget, then for comparison fixed encodings and the published basis."""
    found = []
    for budget in BUDGETS:
        for codec in ("auto", *codecs.registry()):
            scored, options = budget in (SCORED if codec == "auto" else SCORED[1:4]), Options(codec=codec, budget=budget)
            # a survey of all codecs leaves out what another one beats everywhere, which the published basis may be
            found.append(Case(codec, options, options if codec.startswith("rmm") else Options(budget=budget), scored))
        for quantize, marks in (("none", (0.25, 0.5)), ("int8", (0.125, 0.25, 0.5))):
            options = Options(codec="truncate", quantize=quantize, budget=budget)
            found.append(Case(f"truncate {'bf16' if quantize == 'none' else quantize}", options, options, budget in marks))
    for p in (1, 2, 3, 4):
        options = Options(codec="rmm", quantize="none", p=p)
        found.append(Case("rmm bf16", options, options, p > 1))
    return found


def adapters_of(root: Path) -> dict[str, Module]:
    adapters = [read(root / "adapters" / task) for task in TASKS]
    return {module: [adapter.deltas[module] for adapter in adapters] for module in adapters[0].deltas}


# What is measured


def steps_of(name: str, modules: Mapping[str, Module], zoo: Zoo | None, state: State) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What to measure under which key: so little each that little is lost when interrupted. A zoo: also score."""
    if zoo is not None:
        yield score_key(zoo.split, None), lambda: scores(zoo, by_task(modules))
        for p in MODELS:
            yield models_key(zoo.split, p), lambda p=p: scores(zoo, whole_models(modules, p))
    weights = importance(modules)
    for surveyed in dict.fromkeys(case.surveyed for case in cases()):
        for module in modules:
            yield survey_key(name, surveyed, module), lambda o=surveyed, m=module: surveyed_module(modules[m], o, m, weights)
        for case in cases():
            if zoo is not None and case.scored and case.surveyed == surveyed:
                yield score_key(zoo.split, case), lambda c=case: scores(zoo, decoded(name, c, modules, state))


def survey_key(name: str, options: Options, module: str) -> str:
    at = f"{options.budget:g}" if options.p is None else f"p={options.p}"
    return f"survey/{name}/{options.codec} {options.quantize}/{at}/{module}"


def score_key(split: str, case: Case | None) -> str:
    """None: the adapters as they are."""
    return f"score/{split}/{case.label}/{case.at}" if case else f"score/{split}/original"


def models_key(split: str, p: int) -> str:
    return f"score/{split}/rmm, p models/{p}"


def whole_models(modules: Mapping[str, Module], p: int) -> list[dict[str, LowRankDelta]]:
    """RMM read as a basis of p whole models: of each factor, n tasks as n long vectors, the best p directions among them."""
    rebuilt = {}
    for module, deltas in modules.items():
        B, A = (best_directions(torch.stack(factors), p) for factors in zip(*((d.B, d.A) for d in deltas), strict=True))
        rebuilt[module] = [LowRankDelta(*pair) for pair in zip(B, A, strict=True)]
    return by_task(rebuilt)


def best_directions(X: Tensor, p: int) -> Tensor:
    """X: (n, ..)."""
    U, S, Vh = torch.linalg.svd(X.flatten(1).double(), full_matrices=False)
    return ((U[:, :p] * S[:p]) @ Vh[:p]).reshape(X.shape).float()


def importance(modules: Mapping[str, Module]) -> list[float]:
    """As `build_basis` has it: one over the squared norm of the whole adapter."""
    return [1.0 / sum(delta.norm() ** 2 for delta in adapter.values()) for adapter in by_task(modules)]


def by_task(modules: Mapping[str, Module]) -> list[dict[str, LowRankDelta]]:
    """One adapter each: module -> delta."""
    return [dict(zip(modules, deltas, strict=True)) for deltas in zip(*modules.values(), strict=True)]


def surveyed_module(deltas: Module, options: Options, module: str, weights: Sequence[float]) -> dict[str, Any]:
    return survey(deltas, options, module=module, seed=options.seed, importance=weights).to_json()


def choose(name: str, case: Case, modules: Mapping[str, Module], state: State) -> tuple[dict[str, Survey], dict[str, Candidate]]:
    """The surveys and what is chosen of them; a survey with every codec holds the candidates of each one alone."""
    surveys = {module: Survey.from_json(state[survey_key(name, case.surveyed, module)]) for module in modules}
    return surveys, allocate(surveys, case.options)


def decoded(name: str, case: Case, modules: Mapping[str, Module], state: State) -> list[dict[str, LowRankDelta]]:
    """Every adapter as it comes back from the encoded bytes."""
    _, choices = choose(name, case, modules, state)
    encoded = {m: encode(deltas, choices[m], module=m, seed=case.options.seed)[0] for m, deltas in modules.items()}
    return by_task(
        {module: [decode_task(each, task) for task in range(len(modules[module]))] for module, each in encoded.items()}
    )


def scores(zoo: Zoo, adapters: Sequence[Mapping[str, LowRankDelta]]) -> dict[str, str]:
    """Of each task's adapter on its own task: a 1 for every row that is right."""
    found = {}
    for task, adapter in zip(TASKS, adapters, strict=True):
        with zoo.merged({module: delta.to_dense() for module, delta in adapter.items()}):
            found[task] = "".join("1" if right else "0" for right in zoo.correct(task))
    return found


def row(name: str, case: Case, modules: Mapping[str, Module], state: State, split: str) -> Row:
    surveys, choices = choose(name, case, modules, state)
    lost = [sum(column) for column in zip(*(choice.errors for choice in choices.values()), strict=True)]
    norms = [sum(column) for column in zip(*(each.norms for each in surveys.values()), strict=True)]
    given = name == "zoo" and score_key(split, case) in state.found
    original, kept = (state[score_key(split, each)] for each in (None, case)) if given else ({}, {})
    return Row(
        regime=name,
        label=case.label,
        at=case.at,
        size=sum(choice.size_bytes for choice in choices.values()) / sum(each.input_bytes for each in surveys.values()),
        errors=tuple((error / norm) ** 0.5 for error, norm in zip(lost, norms, strict=True)),
        chosen=dict(Counter(choice.codec for choice in choices.values())),
        scores={task: Score.of(original[task], kept[task]) for task in kept},
        seconds=sum(state.found[survey_key(name, case.surveyed, module)]["seconds"] for module in modules),
    )


def models_row(modules: Mapping[str, Module], p: int, state: State, split: str) -> Row:
    original, kept = state[score_key(split, None)], state[models_key(split, p)]
    given, rebuilt = by_task(modules), whole_models(modules, p)
    lost = [math.hypot(*(distance(d, back[m]) for m, d in own.items())) for own, back in zip(given, rebuilt, strict=True)]
    norms = [math.hypot(*(delta.norm() for delta in own.values())) for own in given]
    return Row(
        regime="zoo",
        label="rmm, p models",
        at=f"p={p}",
        size=p / len(given),
        errors=tuple(error / norm for error, norm in zip(lost, norms, strict=True)),
        chosen={"rmm, p models": len(modules)},
        scores={task: Score.of(original[task], kept[task]) for task in kept},
        seconds=0.0,
    )


# Synthetic regimes


def synthetic(name: str) -> dict[str, Module]:
    return {f"module {n}": REGIMES[name](torch.Generator().manual_seed(n)) for n in range(MODULES)}


def independent(generator: torch.Generator) -> Module:
    """Nothing in common, a flat spectrum: nothing to gain but precision."""
    return [LowRankDelta(normal(generator, SIZE, RANK), normal(generator, RANK, SIZE)) for _ in range(ADAPTERS)]


def decaying(generator: torch.Generator) -> Module:
    """Nothing in common; of each delta every further singular value is 0.6 of the one before."""
    scale = 0.6 ** (torch.arange(RANK) / 2)
    return [
        LowRankDelta(orthonormal(generator, SIZE, RANK) * scale, (orthonormal(generator, SIZE, RANK) * scale).mT)
        for _ in range(ADAPTERS)
    ]


def shared(generator: torch.Generator) -> Module:
    """All factors in the same 16 columns and 16 rows, but for a tenth of their norm."""
    U, V = orthonormal(generator, SIZE, 2 * RANK), orthonormal(generator, SIZE, 2 * RANK)

    def factor(space: Tensor) -> Tensor:
        common = space @ normal(generator, 2 * RANK, RANK)
        own = normal(generator, SIZE, RANK)
        return common + 0.1 * own * common.norm() / own.norm()

    return [LowRankDelta(factor(U), factor(V).mT) for _ in range(ADAPTERS)]


def correlated(generator: torch.Generator) -> Module:
    """One adapter with factors varied by 0.3 of their size, each then factored in a rotation of its own."""
    column, row = normal(generator, SIZE, RANK), normal(generator, RANK, SIZE)

    def one() -> LowRankDelta:
        left, right = (each + 0.3 * normal(generator, *each.shape) for each in (column, row))
        rotation = orthonormal(generator, RANK, RANK)
        return LowRankDelta(left @ rotation, rotation.mT @ right)

    return [one() for _ in range(ADAPTERS)]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def orthonormal(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(normal(generator, rows, columns)).Q


REGIMES: Mapping[str, Callable[[torch.Generator], Module]] = {
    "independent": independent,
    "decaying": decaying,
    "shared": shared,
    "correlated": correlated,
}
ABOUT = {"zoo": "Eight trained adapters of rank 8 of one MiniLM, nearly orthogonal to each other."} | {
    name: f"{make.__doc__} {MODULES} modules of {SIZE} x {SIZE}, {ADAPTERS} adapters of rank {RANK}."
    for name, make in REGIMES.items()
}

if __name__ == "__main__":
    main()
