"""Training in the child process: some steps of it at a time, each time ending in a checkpoint that the store keeps."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from app import base_models, data
from app.adapters import OpenAdapter, read_json
from app.engine.bench import Workbench
from app.engine.messages import LearnTask
from app.errors import BadData, OutOfMemory
from app.learning import rows as reading
from app.learning.model import classes_of, forward_of, load_base, pad_token, read_head, take_off_head
from app.learning.problem import Head, ModelProblem
from app.learning.rows import Limits, Rows
from app.recipe import Recipe, RecipeTask, module_weights
from app.services import Services
from merge_algos import catalogue
from merge_algos.errors import TrainingDiverged
from merge_algos.formats.together import agreed_shapes
from merge_algos.learn.attach import check_modules
from merge_algos.learn.layout import lay_out
from merge_algos.learn.method import Learned
from merge_algos.learn.problem import Problem, Task
from merge_algos.learn.training import State, held_out_accuracies
from merge_algos.lowrank import LowRankDelta, concat
from storage.blobs import BlobStore
from storage.digest import Descriptor, Digest
from storage.manifest import MEDIA_JSON, canonical_json

_ROUND_S = 2.0  # of training between two checkpoints: what a crash can cost
_MOST_HELD_OUT = 256  # rows of each task
_ROWS_PER_PASS = {"cpu": 16}
_ROWS_PER_PASS_ELSEWHERE = 64


def advance(task: LearnTask, bench: Workbench) -> Descriptor:
    """Train on from the checkpoint, or begin: answers with the next checkpoint.

    The model stays loaded between two calls for the same recipe, and is let go when the training is done.
    """
    recipe = Recipe.from_json(task.recipe)
    method = cast(Learned, catalogue.build(recipe.method, recipe.parameters))
    torch.set_num_threads(bench.threads)
    try:
        problem = _kept(task, recipe, method, bench)
        state = _trained(problem, method, recipe, _read(bench.services.blobs, task.checkpoint))
        checkpoint = _checkpoint(problem, method, recipe, state)
    except BaseException:
        bench.kept.clear()  # this training does not go on here, and a model is too large to be forgotten
        raise
    finally:
        torch.set_num_threads(1)
    if state.done:
        bench.kept.clear()
    return bench.services.blobs.put([canonical_json(checkpoint)], media_type=MEDIA_JSON)


def _trained(problem: ModelProblem, method: Learned, recipe: Recipe, begun: State | None) -> State:
    """The state after some seconds of training. Raises OutOfMemory; TrainingDiverged, once what was good is in a checkpoint."""
    state = begun or fitting(problem, method, None, seed=recipe.seed)
    ends_at = time.monotonic() + _ROUND_S
    try:
        while not state.done and time.monotonic() < ends_at:
            state = fitting(problem, method, state, seed=recipe.seed)
    except TrainingDiverged:
        if state is begun:
            raise
    return state


def fitting(problem: Problem, method: Learned, state: State | None, *, seed: int) -> State:
    """One step, or the state to begin with. A batch that does not fit is tried once more in halves. Raises OutOfMemory."""
    try:
        return _next(problem, method, state, seed)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        if state is None or state.pieces > method.accumulate:
            raise OutOfMemory(str(problem.device)) from error
    return fitting(problem, method, replace(state, pieces=2 * state.pieces), seed=seed)


def _next(problem: Problem, method: Learned, state: State | None, seed: int) -> State:
    if state is None:
        return method.begin(problem, seed=seed)
    return method.advance(problem, state, seed=seed, steps=1)


def _read(blobs: BlobStore, checkpoint: Digest | None) -> State | None:
    if checkpoint is None:
        return None
    return State.from_json(read_json(blobs, checkpoint)["state"])


def _checkpoint(problem: ModelProblem, method: Learned, recipe: Recipe, state: State) -> dict[str, Any]:
    """The state to go on from; the best coefficients so far as a table; and what a reader wants to know of the training."""
    steps = method.plan(problem, recipe.seed).steps
    coefficients = method.coefficients(problem.layout, torch.tensor(state.best))
    state_json = state.to_json()
    return {
        "schema": 1,
        "state": state_json,
        "table": problem.layout.table(coefficients),
        "training": {
            "step": state.step,
            "steps": steps,
            "done": state.done,
            "best_step": state.best_step,
            "pieces": state.pieces,
            "coefficients": problem.layout.size,
            "tasks": [{"name": t.name, "rows": t.rows, "held_out": t.held_out} for t in problem.tasks],
            "accuracy": _accuracies(problem, method, coefficients) if state.done else None,
            "curve": state_json["curve"],
        },
    }


def _accuracies(problem: ModelProblem, method: Learned, coefficients: torch.Tensor) -> dict[str, float] | None:
    """Of the held-out rows, with the best coefficients."""
    if not method.labelled:
        return None
    names = [task.name for task in problem.tasks]
    at_once = method.plan(problem, seed=0).at_once
    return dict(zip(names, held_out_accuracies(problem, coefficients, at_once=at_once), strict=True))


def _kept(task: LearnTask, recipe: Recipe, method: Learned, bench: Workbench) -> ModelProblem:
    if bench.kept.get("recipe") != recipe.digest:
        bench.kept.clear()
        bench.kept["problem"] = open_problem(task, recipe, method, bench)
        bench.kept["recipe"] = recipe.digest
    return cast(ModelProblem, bench.kept["problem"])


def open_problem(task: LearnTask, recipe: Recipe, method: Learned, bench: Workbench) -> ModelProblem:
    """Load the base, attach the adapters, read the rows. Raises what any of them cannot be used for."""
    device = torch.device(bench.device)
    adapters = [bench.open_adapter(digest) for digest in task.inputs]
    shapes = agreed_shapes([adapter.spec for adapter in adapters])
    model, tokenizer = load_base(base_models.folder(bench.services, task.base), method.task_type, device)
    found = check_modules(model, shapes)
    dtype = next(model.parameters()).dtype
    weights = module_weights(recipe.adapters, tuple(shapes))
    deltas = {name: _stacked(adapters, module, shapes[module], device, dtype, weights[module]) for module, name in found.items()}
    ranks = {module: [_rank(adapter, module) for adapter in adapters] for module in shapes}
    heads = _heads(model, recipe, method, bench.services, device, dtype)
    known = [classes for _, classes in heads]
    whole = [_rows(bench.services, *pair, method=method, tokenizer=tokenizer) for pair in zip(recipe.tasks, known, strict=True)]
    parts = [
        reading.split(len(rows), method.held_out, _MOST_HELD_OUT, seed=recipe.seed, task=each.name)
        for rows, each in zip(whole, recipe.tasks, strict=True)
    ]
    return ModelProblem(
        model=model,
        layout=lay_out(ranks, method.granularity),
        deltas=deltas,
        modules={name: module for module, name in found.items()},
        tasks=tuple(
            Task(each.name, each.weight, len(own), len(held), each.forget)
            for each, (own, held) in zip(recipe.tasks, parts, strict=True)
        ),
        train=tuple(rows.at(own) for rows, (own, _) in zip(whole, parts, strict=True)),
        held=tuple(rows.at(held) for rows, (_, held) in zip(whole, parts, strict=True)),
        heads=tuple(head for head, _ in heads),
        forward=forward_of(model, method.task_type, method.pooling),
        pad_token=pad_token(tokenizer),
        per_pass=_ROWS_PER_PASS.get(device.type, _ROWS_PER_PASS_ELSEWHERE),
        device=device,
    )


def _rank(adapter: OpenAdapter, module: str) -> int:
    return adapter.modules[module].r if module in adapter.modules else 0


def _stacked(
    adapters: Sequence[OpenAdapter],
    module: str,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    weights: Sequence[float],
) -> LowRankDelta:
    """All adapters of one module, weighed, rank after rank."""
    deltas = [adapter.delta(module, shape, str(device)) for adapter in adapters]
    return concat([delta.scale(weight).to(dtype) for delta, weight in zip(deltas, weights, strict=True)])


def _heads(
    model: Any, recipe: Recipe, method: Learned, services: Services, device: torch.device, dtype: torch.dtype
) -> list[tuple[Head, Mapping[str, int] | int]]:
    """Of each task its head, and the classes it knows; the model's own where a task brings none."""
    if method.task_type != "causal_lm" and any(task.head for task in recipe.tasks):
        if method.task_type == "sequence_classification":
            take_off_head(model)
        return [read_head(services.blobs, t.name, Digest.parse(t.head), device, dtype) for t in recipe.tasks if t.head]
    own = classes_of(model) if method.task_type == "sequence_classification" else 0
    return [(_as_it_is, own) for _ in recipe.tasks]


def _as_it_is(features: torch.Tensor) -> torch.Tensor:
    return features


def _rows(services: Services, task: RecipeTask, classes: Mapping[str, int] | int, *, method: Learned, tokenizer: Any) -> Rows:
    limits = Limits(min(method.max_length, tokenizer.model_max_length), method.truncate)
    label = task.label if method.labelled and method.task_type != "causal_lm" else None
    wanted = [name for name in (task.text, task.prompt, label) if name]
    parts = [data.read_columns(services, Digest.parse(part), wanted) for part in task.data]
    found = {name: [value for part in parts for value in part[name]] for name in wanted}
    texts = found[task.text]
    if len(texts) < 2:
        raise BadData(task.name, f"{len(texts)} rows are too few: some are trained on, some held out")
    if method.task_type == "causal_lm":
        return reading.continued(task.name, tokenizer, found[task.prompt] if task.prompt else None, texts, limits)
    labels = found[label] if label else None
    return reading.classified(task.name, tokenizer, texts, labels, classes, limits)
