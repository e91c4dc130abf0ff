"""Coefficients without gradients: CMA-ES on the loss of a few rows, for as few numbers as there are adapters."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from merge_algos.learn.problem import Problem
from merge_algos.learn.training import Plan, State, begin, losses_of, observed, weighted

_SPREAD = 0.3  # of the first generation
_ROWS = 64  # of each task


def search(problem: Problem, plan: Plan, state: State, *, steps: int, bound: float, penalty: float) -> State:
    """At most so many generations more. The optimiser is rebuilt from the losses it was told, so a state is only numbers.

    bound: of every coefficient's size.  penalty: of the mean size.
    """
    optimiser = _replayed(plan, state, bound)
    for _ in range(steps):
        if state.done:
            break
        candidates = optimiser.ask()
        losses = tuple(_loss(problem, plan, candidate, penalty) for candidate in candidates)
        optimiser.tell(candidates, losses)
        mean = torch.tensor(optimiser.mean, dtype=torch.float32).clamp(-bound, bound)
        moved = replace(
            state,
            step=state.step + 1,
            theta=tuple(mean.double().tolist()),
            summed=state.summed + min(losses),
            told=(*state.told, losses),
        )
        state = observed(problem, plan, moved, mean)
    return state


def start(problem: Problem, plan: Plan, init: torch.Tensor) -> State:
    return begin(problem, plan, init, lambda _, theta: theta)


def _replayed(plan: Plan, state: State, bound: float) -> Any:
    import cma  # type: ignore[import-untyped]  # slow to import, and only searches need it

    generator = np.random.default_rng(plan.seed)
    options = {"bounds": [-bound, bound], "randn": lambda *shape: generator.standard_normal(shape), "seed": np.nan, "verbose": -9}
    optimiser = cma.CMAEvolutionStrategy(list(state.start), _SPREAD, options)
    for losses in state.told:
        optimiser.tell(optimiser.ask(), losses)
    return optimiser


def _loss(problem: Problem, plan: Plan, candidate: Any, penalty: float) -> float:
    coefficients = torch.tensor(np.asarray(candidate), dtype=torch.float32)
    picked = {n: list(range(min(task.rows, _ROWS))) for n, task in enumerate(problem.tasks)}
    losses = losses_of(problem, plan.objective, coefficients, picked, at_once=plan.at_once)
    return weighted(problem, losses) + penalty * float(coefficients.abs().mean())
