"""The training loop: what it improves, when it stops, and that an interruption changes nothing."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from learning_case import SmallProblem, adapters
from merge_algos import learned
from merge_algos.errors import InvalidParams, TrainingDiverged
from merge_algos.learn.method import Learned
from merge_algos.learn.objectives import (
    IGNORED,
    Output,
    accuracy,
    calibrated,
    cross_entropy,
    entropy,
    most_confident,
    pseudo_labels,
)
from merge_algos.learn.problem import Picked
from merge_algos.learn.training import State, held_out_accuracies, losses_of

METHODS = learned.registry()
every_method = pytest.mark.parametrize("name", METHODS)
SHORT = {"task_type": "feature_classification", "steps": 24, "batch_size": 8, "evaluate_every": 4, "lr": 0.1}


def method(name: str = "atlas", **parameters: object) -> Learned:
    return METHODS[name](**{**SHORT, **parameters})


def run(chosen: Learned, problem: SmallProblem, *, at_once: int = 1000, seed: int = 0) -> State:
    """Through JSON between rounds, as a service does."""
    state = chosen.begin(problem, seed=seed)
    while not state.done:
        state = State.from_json(json.loads(json.dumps(state.to_json())))
        state = chosen.advance(problem, state, seed=seed, steps=at_once)
    return state


def best(chosen: Learned, problem: SmallProblem, state: State) -> Tensor:
    return chosen.coefficients(problem.layout, torch.tensor(state.best))


@every_method
def test_held_out_rows_are_served_better_than_at_the_start(name: str) -> None:
    state = run(method(name), SmallProblem())
    assert state.best_score > state.curve[0].score
    assert state.best_step > 0


@pytest.mark.parametrize("granularity", ["matrix", "rank", "module_type", "global"])
def test_every_granularity_learns(granularity: str) -> None:
    state = run(method(granularity=granularity, init=0.0), SmallProblem(granularity=granularity))
    assert state.best_score > state.curve[0].score


def test_one_task_is_found_among_three_adapters() -> None:
    """Of the adapters only the first solves the task: its coefficients grow, those of the others do not."""
    problem = SmallProblem(weights=(1.0,), rows=200, granularity="global")
    chosen = method(init=0.0, steps=150)
    found = best(chosen, problem, run(chosen, problem))
    assert found[0] > 0.5
    assert found[1:].abs().max() < found[0] / 2


@every_method
def test_where_it_is_interrupted_means_nothing(name: str) -> None:
    through = run(method(name), SmallProblem())
    assert [run(method(name), SmallProblem(), at_once=n) for n in (1, 3)] == [through] * 2


def test_another_seed_is_another_run() -> None:
    assert run(method(), SmallProblem(), seed=1) != run(method(), SmallProblem())


def test_a_batch_in_pieces_has_the_gradient_of_the_whole() -> None:
    problem, chosen = SmallProblem(), method()
    state = chosen.begin(problem, seed=0)
    whole = chosen.advance(problem, state, seed=0, steps=1)
    pieces = chosen.advance(problem, replace(state, pieces=2), seed=0, steps=1)
    assert torch.allclose(torch.tensor(whole.first), torch.tensor(pieces.first), rtol=1e-4, atol=1e-7)
    assert math.isclose(whole.summed, pieces.summed, rel_tol=1e-5)


@pytest.mark.parametrize("objective", ["cross_entropy", "entropy"])
def test_accumulating_is_the_same_training(objective: str) -> None:
    """But for rounding: parts of unequal size too, since 8 rows make three."""
    whole, parts = (run(method(objective=objective, init=0.3, accumulate=n, steps=4), SmallProblem()) for n in (1, 3))
    assert (whole.pieces, parts.pieces) == (1, 3)
    assert torch.allclose(torch.tensor(whole.theta), torch.tensor(parts.theta), atol=1e-4)


def test_scoring_takes_no_more_rows_at_once_than_training() -> None:
    problem = SmallProblem()
    run(method(batch_size=8, accumulate=2), problem)
    assert {len(rows) for picked in (*problem.scored, *problem.trained_on) for rows in picked.values()} == {4}


def test_a_training_that_only_harms_keeps_its_start() -> None:
    problem, chosen = SmallProblem(), method(lr=100.0, evaluate_every=1)
    state = run(chosen, problem)
    assert state.best_step == 0
    assert state.best == state.start


def test_it_stops_when_nothing_gets_better() -> None:
    state = run(method(lr=100.0, evaluate_every=1, patience=5, steps=1000), SmallProblem())
    assert state.step == 5


def test_no_steps_are_the_start() -> None:
    state = run(method(steps=0, init=0.25), SmallProblem())
    assert set(state.best) == {0.25}


def test_tuned_is_the_best_of_one_number_for_all() -> None:
    problem, chosen = SmallProblem(), method(steps=0)
    (value,) = set(run(chosen, problem).best)
    picked = {n: range(problem.rows) for n in range(3)}
    loss = lambda v: sum(losses_of(problem, "cross_entropy", torch.full((problem.layout.size,), v), picked, at_once=8))  # noqa: E731
    assert loss(value) <= min(loss(other) for other in (0.0, 0.1, 0.3, 0.7, 1.0))


def test_every_row_is_seen_once_in_an_epoch() -> None:
    problem = SmallProblem(rows=40)
    run(method(steps=5, evaluate_every=100, init=0.0), problem)
    assert sorted(row for picked in problem.trained_on for row in picked[1]) == list(range(40))


def test_rows_of_a_task_smaller_than_a_batch_are_all_used() -> None:
    problem = SmallProblem(rows=3)
    run(method(steps=2, evaluate_every=100, init=0.0), problem)
    assert [len(picked[0]) for picked in problem.trained_on] == [3, 3]


def test_a_heavy_task_is_served_at_the_cost_of_the_others() -> None:
    chosen = method(init=0.0, steps=60)
    even, heavy = (SmallProblem(weights=(w, 1.0, 1.0), granularity="global") for w in (1.0, 50.0))
    losses = [run(chosen, p).curve[-1].tasks["task0"] for p in (even, heavy)]
    assert losses[1] < losses[0]


def test_weight_decay_pulls_to_the_start() -> None:
    problem = SmallProblem()
    free, held = (run(method(weight_decay=w, init=0.3, patience=100), problem) for w in (0.0, 5.0))
    distance = lambda state: (torch.tensor(state.theta) - 0.3).norm()  # noqa: E731
    assert distance(held) < distance(free)


# Objectives


def test_entropy_needs_no_labels() -> None:
    state = run(method(objective="entropy", init=0.3), SmallProblem(labelled=False))
    assert state.best_score > state.curve[0].score


def test_ufm_needs_no_labels_and_makes_predictions_certain() -> None:
    problem = SmallProblem(labelled=False)
    state = run(method(objective="ufm", init=0.3, trusted=2), problem)
    assert state.best_score > state.curve[0].score


def test_ufm_without_a_row_to_trust_moves_nothing() -> None:
    state = run(method(objective="ufm", init=0.0, threshold=1.0, steps=3), SmallProblem(labelled=False))
    assert set(state.theta) == {0.0}


def test_negation_forgets_one_task_and_keeps_the_others() -> None:
    first, *others = adapters()  # the first is the largest, so that there is a skill to forget
    smaller = [{module: delta.scale(0.3) for module, delta in own.items()} for own in others]
    problem = SmallProblem([first, *smaller], forget=(0,), rows=200, held_out=200)
    chosen = method(objective="negation", init=1.0, steps=100)
    state = run(chosen, problem)
    begun = torch.full((problem.layout.size,), 1.0)
    before, after = (held_out_accuracies(problem, c, at_once=8) for c in (begun, best(chosen, problem, state)))
    assert after[0] < before[0] - 0.2
    assert sum(after[1:]) >= sum(before[1:]) - 0.1


def test_cross_entropy_is_1_for_guessing() -> None:
    assert math.isclose(float(cross_entropy(torch.zeros(4, 30), torch.arange(4))), 1.0, rel_tol=1e-6)


@pytest.mark.parametrize("sureness", [0.3, 1.0, 3.5])
def test_the_calibrated_loss_does_not_depend_on_how_sure_the_logits_are(sureness: float) -> None:
    """Against the least over a fine grid, at any scale of the logits that the temperatures reach."""
    drawn = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (400,), generator=drawn)
    logits = torch.nn.functional.one_hot(labels, 5) + torch.randn(400, 5, generator=drawn)
    best = min(float(cross_entropy(logits * scale, labels)) for scale in torch.linspace(0.2, 4, 200))
    assert best - 1e-4 < float(calibrated(logits * sureness, labels).min()) < best + 0.01


def test_tokens_that_nothing_is_asked_of_do_not_count() -> None:
    logits = torch.randn(4, 7)
    labels = torch.tensor([1, IGNORED, 3, IGNORED])
    assert torch.equal(cross_entropy(logits, labels), cross_entropy(logits[[0, 2]], labels[[0, 2]]))
    assert accuracy(Output(torch.eye(3), torch.tensor([0, IGNORED, 1]))) == 0.5


def test_entropy_of_certainty_and_of_guessing() -> None:
    assert float(entropy(torch.tensor([[100.0, 0.0, 0.0]]))) < 1e-6
    assert math.isclose(float(entropy(torch.zeros(2, 9))), 1.0, rel_tol=1e-6)


def test_pseudo_labels_are_the_confident_ones() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.1, 0.0], [0.0, 5.0]])
    assert pseudo_labels(logits, 0.9).tolist() == [0, IGNORED, 1]


def test_the_most_confident_of_every_class_are_trusted() -> None:
    logits = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert most_confident(logits, 2).tolist() == [0, IGNORED, 0, 1]


# Siblings


def test_shares_of_lora_soups_sum_to_1() -> None:
    problem, chosen = SmallProblem(), method("lora_soups")
    shares = best(chosen, problem, run(chosen, problem))
    sums = torch.zeros(int(problem.layout.group.max()) + 1).index_add(0, problem.layout.group, shares)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    assert shares.min() > 0


def test_lora_soups_begins_at_equal_shares() -> None:
    problem, chosen = SmallProblem(), method("lora_soups")
    groups = problem.layout.group
    assert torch.allclose(chosen.coefficients(problem.layout, torch.zeros(problem.layout.size)), 1 / groups.bincount()[groups])


def test_lorahub_stays_within_its_bound() -> None:
    problem = SmallProblem(granularity="global")
    state = run(method("lorahub", bound=0.2, steps=10), problem)
    assert max(map(abs, state.best)) <= 0.2 + 1e-6


def test_lorahub_asks_for_no_gradient() -> None:
    problem = SmallProblem(granularity="global")
    state = method("lorahub", steps=3).begin(problem, seed=0)
    with torch.no_grad():
        assert method("lorahub", steps=3).advance(problem, state, seed=0, steps=3).step == 3


def test_a_loss_that_is_no_number_ends_it_with_the_step() -> None:
    class Broken(SmallProblem):
        def outputs(self, coefficients: Tensor, picked: Picked, **how: Any) -> list[Output]:
            found = super().outputs(coefficients, picked, **how)
            if coefficients.requires_grad and len(self.trained_on) > 8:
                return [Output(o.logits * math.nan, o.labels) for o in found]
            return found

    chosen, problem = method(init=0.0, evaluate_every=100), Broken()
    state = chosen.begin(problem, seed=0)
    with pytest.raises(TrainingDiverged, match="step") as raised:
        chosen.advance(problem, state, seed=0, steps=24)
    assert raised.value.step > 1


@every_method
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task_type", "vision"), ("objective", "mse"), ("granularity", "layer"), ("pooling", "max"), ("init", math.nan),
        ("steps", -1), ("steps", 1.5), ("batch_size", 0), ("accumulate", 0), ("evaluate_every", 0), ("patience", 0),
        ("max_length", 1),
        ("trusted", -1), ("epochs", math.inf), ("lr", -0.1), ("weight_decay", math.nan), ("held_out", 0.0), ("held_out", 1.5),
        ("threshold", 2.0), ("truncate", 1),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused_by_name(name: str, field: str, value: object) -> None:
    with pytest.raises(InvalidParams, match=rf"^parameters\.{field}: "):
        METHODS[name](**{field: value})


def test_tuning_needs_labels() -> None:
    with pytest.raises(InvalidParams, match="init"):
        METHODS["atlas"](objective="entropy", init="tuned")


@every_method
def test_methods_that_learn_say_so(name: str) -> None:
    assert METHODS[name].needs == "data"
    assert METHODS[name].__module__ == f"merge_algos.learned.{name}"
