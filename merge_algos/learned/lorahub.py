"""LoraHub: one weight per adapter, found without gradients."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from merge_algos.entries import check_finite_number
from merge_algos.learn.layout import Granularity
from merge_algos.learn.method import Learned
from merge_algos.learn.problem import Problem
from merge_algos.learn.search import search, start
from merge_algos.learn.training import State


@dataclass(frozen=True)
class LoraHub(Learned):
    """LoraHub (Huang et al. 2023, arXiv:2307.13269): weights in [-bound, bound] of least loss on a few rows, by CMA-ES.

    steps: generations.  penalty: of the weights' mean size.
    Differs from the paper: the deltas are summed, not the factors, so there are no cross terms; CMA-ES instead of Shiwa.
    """

    name = "lorahub"
    paper = "arXiv:2307.13269"
    optimiser: ClassVar[Literal["gradient", "search"]] = "search"

    granularity: Granularity = "global"
    init: float | Literal["tuned"] = 0.0
    steps: int | None = 40
    evaluate_every: int = 1
    bound: float = 1.5
    penalty: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bound", "penalty"):
            check_finite_number(name, getattr(self, name), least=0.0)

    def begin(self, problem: Problem, *, seed: int) -> State:
        init = torch.full((problem.layout.size,), 0.0 if self.init == "tuned" else float(self.init))
        return start(problem, self.plan(problem, seed), init)

    def advance(self, problem: Problem, state: State, *, seed: int, steps: int) -> State:
        plan = self.plan(problem, seed)
        return search(problem, plan, state, steps=steps, bound=self.bound, penalty=self.penalty)
