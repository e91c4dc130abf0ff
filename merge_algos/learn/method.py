"""What methods that learn their coefficients share: parameters, the way from a table to a merge, and the training itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from merge_algos.entries import check_choice, check_finite_number, check_flag, check_fraction, check_whole_number
from merge_algos.errors import InvalidParams
from merge_algos.learn.layout import Granularity, Layout, scales_of
from merge_algos.learn.objectives import Objective
from merge_algos.learn.problem import Problem
from merge_algos.learn.training import Plan, State, advance, begin, tuned
from merge_algos.lowrank import LowRankDelta, weighted_sum
from merge_algos.protocol import Merged, MergeMethod, ModuleContext

_LEAST_STEPS = 100  # a few rows are worth many passes: held-out rows end what goes too far

TaskType = Literal["causal_lm", "sequence_classification", "feature_classification"]
Pooling = Literal["mean", "first", "last"]


@dataclass(frozen=True)
class Learned(MergeMethod):
    """Parameters of every method that is trained.

    task_type: what the base model is loaded for. `feature_classification`: the bare model, its last hidden states pooled as
    `pooling` says, and a head given with each task.  steps: null for as many as make `epochs` passes over the largest task,
    but 100 at least.
    batch_size: rows of each task in a step.  accumulate: parts that a batch is computed in, one after the other: less memory,
    the same gradient.  held_out: fraction of each task's rows for early stopping, at most 256 of them;
    a look every `evaluate_every` steps, and `patience` looks without gain end the training. The best coefficients are kept.
    max_length: tokens of a row; longer ones are refused unless `truncate`.
    """

    version = 2  # 2: held-out losses are calibrated, means are over what is asked, few rows get more steps
    needs = "data"
    default_weight = 1.0
    optimiser: ClassVar[Literal["gradient", "search"]] = "gradient"

    task_type: TaskType = "causal_lm"
    objective: Objective = "cross_entropy"
    granularity: Granularity = "matrix"
    init: float | Literal["tuned"] = "tuned"
    steps: int | None = None
    epochs: float = 2.0
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 0.02
    weight_decay: float = 0.1
    held_out: float = 0.2
    evaluate_every: int = 10
    patience: int = 20
    max_length: int = 256
    truncate: bool = False
    pooling: Pooling = "mean"
    threshold: float = 0.9
    trusted: int = 0

    def __post_init__(self) -> None:
        check_choice("task_type", self.task_type, ("causal_lm", "sequence_classification", "feature_classification"))
        check_choice("objective", self.objective, ("cross_entropy", "entropy", "ufm", "negation"))
        check_choice("granularity", self.granularity, ("matrix", "rank", "module_type", "global"))
        check_choice("pooling", self.pooling, ("mean", "first", "last"))
        if self.init != "tuned":
            check_finite_number("init", self.init)
        if self.steps is not None:
            check_whole_number("steps", self.steps, least=0)
        for name in ("batch_size", "accumulate", "evaluate_every", "patience"):
            check_whole_number(name, getattr(self, name), least=1)
        check_whole_number("max_length", self.max_length, least=2)
        check_whole_number("trusted", self.trusted, least=0)
        for name in ("epochs", "lr", "weight_decay"):
            check_finite_number(name, getattr(self, name), least=0.0)
        for name in ("held_out", "threshold"):
            check_fraction(name, getattr(self, name))
        check_flag("truncate", self.truncate)
        if self.init == "tuned" and not self.labelled:
            raise InvalidParams("parameters.init", f"cannot be tuned without labels, which {self.objective} does not use")

    @property
    def labelled(self) -> bool:
        """Whether the tasks' rows need labels."""
        return self.objective in ("cross_entropy", "negation")

    def coefficients(self, layout: Layout, theta: Tensor) -> Tensor:
        """(size,): what scales the adapters, of what is trained. Differentiable."""
        return theta

    def begin(self, problem: Problem, *, seed: int) -> State:
        """The state before the first step."""
        init, plan = self.init, self.plan(problem, seed)
        start = tuned(problem, plan) if init == "tuned" else torch.full((problem.layout.size,), float(init))
        return begin(problem, plan, start, self.coefficients)

    def advance(self, problem: Problem, state: State, *, seed: int, steps: int) -> State:
        """At most so many steps more. Raises TrainingDiverged and torch.OutOfMemoryError."""
        return advance(problem, self.plan(problem, seed), state, self.coefficients, steps=steps)

    def plan(self, problem: Problem, seed: int) -> Plan:
        most = max(task.rows for task in problem.tasks)
        size = min(self.batch_size, most)
        return Plan(
            objective=self.objective,
            steps=max(_LEAST_STEPS, math.ceil(self.epochs * most / size)) if self.steps is None else self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            evaluate_every=self.evaluate_every,
            patience=self.patience,
            seed=seed,
            threshold=self.threshold,
            trusted=self.trusted,
            accumulate=self.accumulate,
        )

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        if context.known is None:
            raise InvalidParams("method", f"{self.name} learns from data first; `coefficients` merges with a table at hand")
        return scaled_sum(deltas, weights, context, context.known["table"])


def scaled_sum(deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext, table: Any) -> Merged:
    """`sum_i w_i B_i diag(lambda_i) A_i`, exact as a concatenation; terms whose coefficient is 0 are left out.

    The diagnostics hold each adapter's mean coefficient in this module.
    """
    terms, means = [], []
    for delta, own in zip(deltas, table, strict=True):
        scales = torch.tensor(scales_of(own, context.module, delta.rank) if delta.rank else [], dtype=torch.float64)
        used = scales != 0
        terms.append(LowRankDelta(delta.B[:, used] * scales[used].to(delta.B), delta.A[used]))
        means.append(float(scales.mean()) if delta.rank else 0.0)
    return Merged(weighted_sum(terms, weights), {"coefficients": means})
