"""The loop that trains coefficients: AdamW with a cosine, early stopping on held-out rows, and a state to go on from.

Pure in what counts: the state after a step depends on the state before it, the problem and the plan, never on where the loop
was interrupted, so on one machine a resumed run ends in the same bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from merge_algos.blocks import seed_of
from merge_algos.errors import TrainingDiverged
from merge_algos.learn.layout import Layout
from merge_algos.learn.objectives import (
    Objective,
    Output,
    accuracy,
    calibrated,
    cross_entropy,
    entropy,
    most_confident,
    pseudo_labels,
)
from merge_algos.learn.problem import Picked, Problem

_CLIP = 1.0  # of the gradient's norm
_LAST_THRESHOLD = 0.999
_TUNED = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_TUNED_ON = 64  # rows of each task

Coefficients = Callable[[Layout, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train. steps: of the optimiser.  batch_size: rows of each task in a step.  lr: at the start of the cosine.

    weight_decay: decoupled, towards the start.  evaluate_every: steps between two looks at the held-out rows.
    patience: looks without a better score before it stops.  trusted: rows per predicted class that `ufm` trusts from the start.
    accumulate: parts that a batch is computed in, one after the other, their gradients added up.
    """

    objective: Objective
    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    evaluate_every: int
    patience: int
    seed: int
    threshold: float = 0.9
    trusted: int = 0
    accumulate: int = 1

    @property
    def at_once(self) -> int:
        """Rows of each task that are scored together: as many as are trained on, so that scoring needs no more memory."""
        return max(1, self.batch_size // self.accumulate)


@dataclass(frozen=True, slots=True)
class Point:
    """One line of the curve. loss: mean over the steps since the last one; None at the start."""

    step: int
    loss: float | None
    score: float
    tasks: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class State:
    """Where a training is. first, second: AdamW's moments.  best: the parameters of best score so far.

    pieces: what a batch is cut into to fit the memory.  summed: losses since the last point.  told: of a search, the losses
    of every generation.
    """

    step: int
    theta: tuple[float, ...]
    start: tuple[float, ...]
    first: tuple[float, ...]
    second: tuple[float, ...]
    best: tuple[float, ...]
    best_step: int
    curve: tuple[Point, ...]
    summed: float = 0.0
    pieces: int = 1
    done: bool = False
    told: tuple[tuple[float, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        vectors = {name: tuple(data[name]) for name in ("theta", "start", "first", "second", "best")}
        told = tuple(tuple(losses) for losses in data["told"])
        return cls(**{**data, **vectors, "curve": tuple(Point(**point) for point in data["curve"]), "told": told})

    @property
    def best_score(self) -> float:
        return next(point.score for point in self.curve if point.step == self.best_step)


@torch.no_grad()
def tuned(problem: Problem, plan: Plan) -> Tensor:
    """(size,): the one number for all coefficients that is best on some training rows: task arithmetic, tuned."""
    picked = {n: list(range(min(task.rows, _TUNED_ON))) for n, task in enumerate(problem.tasks)}
    candidates = sorted({*_TUNED, 1 / len(problem.layout.blocks)})
    starts = [torch.full((problem.layout.size,), value) for value in candidates]
    losses = [weighted(problem, losses_of(problem, plan.objective, start, picked, at_once=plan.at_once)) for start in starts]
    return starts[losses.index(min(losses))]


def begin(problem: Problem, plan: Plan, start: Tensor, coefficients: Coefficients) -> State:
    """The state before the first step, scored: training only ever replaces it by something better."""
    theta = tuple(start.double().tolist())
    zeros = (0.0,) * len(theta)
    point = _point(problem, plan, coefficients(problem.layout, start), 0, None)
    return State(0, theta, theta, zeros, zeros, theta, 0, (point,), pieces=plan.accumulate, done=plan.steps == 0)


def advance(problem: Problem, plan: Plan, state: State, coefficients: Coefficients, *, steps: int) -> State:
    """At most so many steps more. Raises TrainingDiverged, and torch.OutOfMemoryError for the caller to cut the batch."""
    theta = torch.tensor(state.theta, dtype=torch.float32, requires_grad=True)
    optimizer = _optimizer(theta, state, plan)
    for _ in range(steps):
        if state.done:
            break
        state = _step(problem, plan, state, coefficients, theta, optimizer)
    return state


def _step(
    problem: Problem, plan: Plan, state: State, coefficients: Coefficients, theta: Tensor, optimizer: torch.optim.AdamW
) -> State:
    optimizer.zero_grad()
    loss = _backward(problem, plan, state, coefficients, theta)
    if not math.isfinite(loss):
        raise TrainingDiverged(state.step + 1)
    if not torch.nn.utils.clip_grad_norm_([theta], _CLIP).isfinite():  # it would clip to nothing, and nothing be learned
        raise TrainingDiverged(state.step + 1)
    rate = plan.lr * 0.5 * (1 + math.cos(math.pi * state.step / plan.steps))
    optimizer.param_groups[0]["lr"] = rate
    with torch.no_grad():  # decoupled decay, not to zero but to where it began: zero would undo a merge that was good
        theta += rate * plan.weight_decay * (torch.tensor(state.start) - theta)
    optimizer.step()
    moments = optimizer.state[theta]
    moved = replace(
        state,
        step=state.step + 1,
        theta=tuple(theta.tolist()),
        first=tuple(moments["exp_avg"].tolist()),
        second=tuple(moments["exp_avg_sq"].tolist()),
        summed=state.summed + loss,
    )
    ends = moved.step == plan.steps
    if not ends and moved.step % plan.evaluate_every:
        return moved
    return observed(problem, plan, moved, coefficients(problem.layout, theta.detach()))


def observed(problem: Problem, plan: Plan, state: State, coefficients: Tensor) -> State:
    """The state with one point more on its curve; done if that was the last, or nothing has got better for long."""
    since = state.step - state.curve[-1].step
    latest = _point(problem, plan, coefficients, state.step, state.summed / since)
    better = latest.score > state.best_score
    best, best_step = (state.theta, state.step) if better else (state.best, state.best_step)
    stale = state.step - best_step >= plan.patience * plan.evaluate_every
    done = state.step == plan.steps or stale
    return replace(state, curve=(*state.curve, latest), summed=0.0, best=best, best_step=best_step, done=done)


def _optimizer(theta: Tensor, state: State, plan: Plan) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW([theta], lr=plan.lr, weight_decay=0.0)
    if state.step:
        optimizer.state[theta] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": torch.tensor(state.first),
            "exp_avg_sq": torch.tensor(state.second),
        }
    return optimizer


def _backward(problem: Problem, plan: Plan, state: State, coefficients: Coefficients, theta: Tensor) -> float:
    """The loss of this step's batch, its gradient added up piece by piece."""
    total, picked = 0.0, _batch(problem, plan, state.step)
    whole = _counts(problem, picked)
    for piece in range(state.pieces):
        rows = {task: own[piece :: state.pieces] for task, own in picked.items()}
        rows = {task: own for task, own in rows.items() if own}
        # by what the mean is over: parts of a text have unequal numbers of tokens
        shares = {task: count / whole[task] for task, count in _counts(problem, rows).items()}
        loss = _loss(problem, plan, coefficients(problem.layout, theta), rows, shares, state.step)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _counts(problem: Problem, picked: Picked, *, held_out: bool = False) -> dict[int, int]:
    return dict(zip(picked, problem.asked(picked, held_out=held_out), strict=True))


def _loss(problem: Problem, plan: Plan, coefficients: Tensor, picked: Picked, shares: Mapping[int, float], step: int) -> Tensor:
    """The weighted mean over tasks; of a task to forget, its loss negated, up to that of guessing."""
    noise = seed_of(plan.seed, "noise", step) if plan.objective == "ufm" else None
    outputs = problem.outputs(coefficients, picked, noise=noise)
    targets = _targets(problem, plan, coefficients, picked, step) if plan.objective == "ufm" else [None] * len(outputs)
    weights = sum(task.weight for task in problem.tasks)
    total = coefficients.new_zeros(())
    for task, output, target in zip(picked, outputs, targets, strict=True):
        own = _task_loss(plan.objective, output, target)
        signed = -own.clamp(max=1.0) if problem.tasks[task].forget else own
        total = total + problem.tasks[task].weight / weights * shares[task] * signed
    return total


def _task_loss(objective: Objective, output: Output, target: Tensor | None) -> Tensor:
    if objective == "entropy":
        return entropy(output.logits)
    if target is None:
        assert output.labels is not None
        return cross_entropy(output.logits, output.labels)
    trusted = (target >= 0).float().mean()  # FixMatch's mean is over all rows, and those not trusted count 0
    return cross_entropy(output.logits, target) * trusted if trusted else output.logits.sum() * 0.0


def _targets(problem: Problem, plan: Plan, coefficients: Tensor, picked: Picked, step: int) -> list[Tensor | None]:
    """What the undisturbed rows are taken to be: trusted from the start, or confident enough now; the threshold rises to 1."""
    threshold = plan.threshold + (_LAST_THRESHOLD - plan.threshold) * step / plan.steps
    with torch.no_grad():
        outputs = problem.outputs(coefficients.detach(), picked)
    found = []
    for output in outputs:
        labels = pseudo_labels(output.logits, threshold)
        trusted = most_confident(output.logits, plan.trusted) if plan.trusted else torch.full_like(labels, -100)
        found.append(labels.where(labels >= 0, trusted))
    return list(found)


def _batch(problem: Problem, plan: Plan, step: int) -> dict[int, list[int]]:
    """Rows of every task, without replacement within an epoch of that task; a function of seed and step alone."""
    return {n: _rows(task.rows, plan.batch_size, plan.seed, n, step) for n, task in enumerate(problem.tasks)}


def _rows(rows: int, size: int, seed: int, task: int, step: int) -> list[int]:
    size = min(size, rows)
    per_epoch = rows // size
    epoch, position = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed_of(seed, "rows", task, epoch))
    order = torch.randperm(rows, generator=generator)
    return order[position * size : (position + 1) * size].tolist()


def _point(problem: Problem, plan: Plan, coefficients: Tensor, step: int, loss: float | None) -> Point:
    losses = held_out_losses(problem, plan, coefficients)
    if not all(map(math.isfinite, losses)):
        raise TrainingDiverged(step)
    return Point(step, loss, -weighted(problem, losses), dict(zip([t.name for t in problem.tasks], losses, strict=True)))


def weighted(problem: Problem, losses: Sequence[float]) -> float:
    signed = [-min(loss, 1.0) if task.forget else loss for task, loss in zip(problem.tasks, losses, strict=True)]
    weights = [task.weight for task in problem.tasks]
    return sum(w * loss for w, loss in zip(weights, signed, strict=True)) / sum(weights)


def held_out_losses(problem: Problem, plan: Plan, coefficients: Tensor) -> list[float]:
    """Of each task on its held-out rows, by the objective; of `ufm`, which has no labels, the entropy."""
    own: Objective = "entropy" if plan.objective == "ufm" else plan.objective
    return losses_of(problem, own, coefficients, _held_out(problem), at_once=plan.at_once, held_out=True)


def losses_of(
    problem: Problem, objective: Objective, coefficients: Tensor, picked: Picked, *, at_once: int, held_out: bool = False
) -> list[float]:
    """The mean loss of each task picked, over all of these rows, with labels at the temperature that suits it best.

    at_once: rows of each task in one pass.
    """
    found = _means(problem, partial(_scores, objective), coefficients, picked, at_once=at_once, held_out=held_out)
    return [float(losses.min()) for losses in found]


def held_out_accuracies(problem: Problem, coefficients: Tensor, *, at_once: int) -> list[float]:
    """Of each labelled task, at its held-out rows."""
    score = lambda output: torch.tensor(accuracy(output))  # noqa: E731
    return [float(a) for a in _means(problem, score, coefficients, _held_out(problem), at_once=at_once, held_out=True)]


def _scores(objective: Objective, output: Output) -> Tensor:
    if objective == "entropy":
        return entropy(output.logits)
    assert output.labels is not None
    return calibrated(output.logits, output.labels)


@torch.no_grad()
def _means(
    problem: Problem,
    score: Callable[[Output], Tensor],
    coefficients: Tensor,
    picked: Picked,
    *,
    at_once: int,
    held_out: bool,
) -> list[Tensor]:
    """Scores that are means, over more rows than are computed at once."""
    sums = {n: torch.zeros((), dtype=torch.float64) for n in picked}
    for start in range(0, max(map(len, picked.values())), at_once):
        part = {n: rows[start : start + at_once] for n, rows in picked.items() if start < len(rows)}
        counts = _counts(problem, part, held_out=held_out)
        for n, output in zip(part, problem.outputs(coefficients, part, held_out=held_out), strict=True):
            sums[n] = sums[n] + score(output).double().cpu() * counts[n]
    return [total / count for total, count in zip(sums.values(), problem.asked(picked, held_out=held_out), strict=True)]


def _held_out(problem: Problem) -> Picked:
    return {n: range(task.held_out) for n, task in enumerate(problem.tasks)}
