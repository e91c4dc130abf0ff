"""What every codec owes, whoever wrote it: its budget, its measured error, the same bytes twice, each task from its own bytes."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import SEEDS, dense, randn, random_delta, regauged
from merge_algos import LowRankDelta
from merge_algos.codec import QUANTIZE, Encoded, measured
from merge_algos.codecs import find, registry
from merge_algos.errors import InvalidParams, NonFiniteTensor, ShapeMismatch, WrongCount
from merge_algos.survey import Candidate, decode, decode_all, decode_task, encode

FEW = settings(max_examples=5)
every_codec = pytest.mark.parametrize("codec", registry())
every_encoding = pytest.mark.parametrize(("codec", "quantize"), [(c, q) for c in registry() for q in QUANTIZE])
SHAPE = (20, 14)


@st.composite
def modules(draw: st.DrawFn) -> list[LowRankDelta]:
    """One to five deltas of one module: unequal ranks, some beyond the shape, absent, zero, equal or rank-deficient ones."""
    shape, seed = (draw(st.integers(1, 40)), draw(st.integers(1, 40))), draw(SEEDS)
    deltas = [random_delta(seed, shape, draw(st.integers(1, 6)))]
    for n in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["other", "other", "absent", "zero", "equal", "deficient"]))
        rank = draw(st.integers(1, 6))
        other = random_delta(seed + 2 * n + 2, shape, rank)
        deltas.append(
            {
                "other": other,
                "absent": LowRankDelta.zero(*shape, like=other.B),
                "zero": LowRankDelta(torch.zeros_like(other.B), other.A),
                "equal": regauged(deltas[0], seed),
                "deficient": LowRankDelta(other.B[:, :1].expand(-1, rank).clone(), other.A),
            }[kind]
        )
    return deltas


def fit(codec: str, deltas: Sequence[LowRankDelta], budget_bytes: int, **parameters: Any) -> Encoded:
    return find(codec)(**parameters).fit(deltas, budget_bytes)


def input_bytes(deltas: Sequence[LowRankDelta]) -> int:
    return sum(2 * delta.rank * sum(delta.shape) for delta in deltas)


def some(count: int = 4, rank: int = 3, shape: tuple[int, int] = SHAPE) -> list[LowRankDelta]:
    return [random_delta(2 * n, shape, rank) for n in range(count)]


def relative(delta: LowRankDelta, decoded: LowRankDelta) -> float:
    return float((dense(delta) - dense(decoded)).norm() / dense(delta).norm())


# --- the contract


@every_encoding
@FEW
@given(deltas=modules(), fraction=st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0, 3.0]))
def test_the_budget_holds_and_the_error_is_the_dense_one(
    codec: str, quantize: str, deltas: list[LowRankDelta], fraction: float
) -> None:
    budget = int(fraction * input_bytes(deltas))
    choice = Candidate(codec, {"quantize": quantize}, budget, 0, ())
    encoded, errors = encode(deltas, choice, module="m", seed=0)
    assert encoded.size_bytes <= budget
    assert sum(error**2 for error in errors) <= sum(bool(dense(delta).any()) for delta in deltas) + 1e-9  # no worse than nothing
    for n, (delta, error) in enumerate(zip(deltas, errors, strict=True)):
        decoded = decode_task(encoded, n)
        assert decoded.shape == delta.shape and decoded.B.dtype == torch.float32 == decoded.A.dtype
        lost, norm = float((dense(delta) - dense(decoded)).norm()), float(dense(delta).norm())
        assert math.isclose(error * norm, lost, rel_tol=1e-6, abs_tol=1e-9 * norm)


@every_codec
@FEW
@given(deltas=modules())
def test_a_task_needs_the_shared_bytes_and_its_own_part_only(codec: str, deltas: list[LowRankDelta]) -> None:
    encoded = fit(codec, deltas, input_bytes(deltas) // 2)
    layout = json.loads(json.dumps(encoded.layout))
    for task, (own, whole) in enumerate(zip(encoded.tasks, decode_all(encoded), strict=True)):
        alone = decode(codec, layout, encoded.shape, encoded.shared.clone(), own.clone(), task)
        assert torch.equal(alone.B, whole.B) and torch.equal(alone.A, whole.A)


@every_codec
@FEW
@given(deltas=modules(), seed=st.integers(0, 9))
def test_the_same_deltas_give_the_same_bytes(codec: str, deltas: list[LowRankDelta], seed: int) -> None:
    first, second = (find(codec)().fit(deltas, input_bytes(deltas) // 3, seed) for _ in range(2))
    assert torch.equal(first.shared, second.shared) and first.layout == second.layout
    assert all(torch.equal(a, b) for a, b in zip(first.parts, second.parts, strict=True))


@every_codec
def test_the_order_of_the_adapters_means_nothing(codec: str) -> None:
    deltas = some()
    forwards, backwards = (fit(codec, row, input_bytes(deltas) // 2) for row in (deltas, deltas[::-1]))
    for n, delta in enumerate(deltas):
        one, other = decode_task(forwards, n), decode_task(backwards, len(deltas) - 1 - n)
        assert abs(relative(delta, one) - relative(delta, other)) < 0.05
    assert abs(forwards.size_bytes - backwards.size_bytes) <= 0.02 * forwards.size_bytes


@every_codec
def test_a_larger_budget_loses_less(codec: str) -> None:
    deltas = some(4, 4, (300, 280))
    losses = [
        sum(measured(d, x) for d, x in zip(deltas, decode_all(fit(codec, deltas, int(f * input_bytes(deltas)))), strict=True))
        for f in (0.0, 0.15, 0.3, 0.5, 0.8)
    ]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.2 * losses[0]


@every_codec
def test_inputs_are_left_alone(codec: str) -> None:
    deltas, again = some(), some()
    fit(codec, deltas, input_bytes(deltas) // 2)
    assert all(torch.equal(d.B, a.B) and torch.equal(d.A, a.A) for d, a in zip(deltas, again, strict=True))


@every_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_coded_like_wide_ones(codec: str, dtype: torch.dtype) -> None:
    narrow = [delta.to(dtype) for delta in some()]
    wide = [delta.to(torch.float64) for delta in narrow]
    one, other = (fit(codec, row, input_bytes(wide) // 2) for row in (narrow, wide))
    assert torch.equal(one.shared, other.shared)


@every_codec
def test_zero_budget_stores_nothing_and_gives_zero(codec: str) -> None:
    encoded = fit(codec, some(), 0)
    assert encoded.size_bytes == 0 and all(not dense(delta).any() for delta in decode_all(encoded))


@every_codec
def test_absent_and_zero_deltas_cost_nothing(codec: str) -> None:
    deltas = some()
    nothing = [LowRankDelta.zero(*SHAPE, like=deltas[0].B), LowRankDelta(torch.zeros(SHAPE[0], 2).double(), deltas[0].A[:2])]
    alone, padded = fit(codec, deltas, 500), fit(codec, [nothing[0], *deltas, nothing[1]], 500)
    assert alone.size_bytes == padded.size_bytes and padded.part_of == (-1, 0, 1, 2, 3, -1)


@every_codec
def test_duplicates_cost_nothing_however_they_are_factored(codec: str) -> None:
    deltas = some(3)
    alone, doubled = fit(codec, deltas, 600), fit(codec, [*deltas, regauged(deltas[1], 5), deltas[0]], 600)
    assert doubled.part_of == (0, 1, 2, 1, 0) and len(doubled.parts) == len(alone.parts)
    decoded = decode_all(doubled)
    assert torch.equal(dense(decoded[1]), dense(decoded[3])) and torch.equal(dense(decoded[0]), dense(decoded[4]))


@every_codec
def test_one_adapter_is_an_adapter_made_smaller(codec: str) -> None:
    (delta,) = deltas = some(1, 4, (300, 280))
    encoded = fit(codec, deltas, int(0.6 * input_bytes(deltas)))
    assert relative(delta, decode_task(encoded, 0)) < 0.02


@every_codec
def test_sixty_four_adapters_are_not_too_many(codec: str) -> None:
    deltas = [random_delta(2 * n, (24, 20), 1) for n in range(64)]
    encoded = fit(codec, deltas, input_bytes(deltas) // 2)
    assert encoded.size_bytes <= input_bytes(deltas) // 2 and len(encoded.tasks) == 64


@pytest.mark.parametrize("codec", ["truncate", "tucker2", "hybrid"])
def test_what_matters_more_is_kept_better(codec: str) -> None:
    deltas = some(3, 4, (60, 50))
    budget = input_bytes(deltas) // 4
    plain = find(codec)().fit(deltas, budget)
    favoured = find(codec)().fit(
        deltas, budget, importance=[50 / d.norm() ** 2 if n == 1 else 1 / d.norm() ** 2 for n, d in enumerate(deltas)]
    )
    assert relative(deltas[1], decode_task(favoured, 1)) < relative(deltas[1], decode_task(plain, 1))


@pytest.mark.parametrize("codec", ["rmm_aligned", "truncate", "tucker2", "hybrid"])
def test_it_does_not_matter_how_an_adapter_is_factored(codec: str) -> None:
    deltas = some()
    turned = [regauged(delta, n) for n, delta in enumerate(deltas)]
    for one, other in zip(decode_all(fit(codec, deltas, 900)), decode_all(fit(codec, turned, 900)), strict=True):
        assert float((dense(one) - dense(other)).norm() / dense(one).norm()) < 1e-2


@every_codec
@pytest.mark.parametrize("shape", [(20, 14), (300, 260)])
def test_auto_loses_no_more_than_any_one_encoding(codec: str, shape: tuple[int, int]) -> None:
    deltas = some(3, 3, shape)
    for fraction in (0.1, 0.4, 1.0):
        budget = int(fraction * input_bytes(deltas))
        losses = [
            sum(
                measured(d, x) / d.norm() ** 2
                for d, x in zip(deltas, decode_all(fit(codec, deltas, budget, quantize=q)), strict=True)
            )
            for q in QUANTIZE
        ]
        assert losses[QUANTIZE.index("auto")] <= min(losses) + 1e-12


def test_shared_spaces_are_stored_once() -> None:
    A = randn(1, 4, 280)
    deltas = [LowRankDelta(randn(2 + n, 300, 4), A) for n in range(6)]
    losses = {
        codec: max(relative(d, x) for d, x in zip(deltas, decode_all(fit(codec, deltas, input_bytes(deltas) // 4)), strict=True))
        for codec in ("truncate", "tucker2", "hybrid")
    }
    assert max(losses["tucker2"], losses["hybrid"]) < losses["truncate"] / 2


def test_a_small_error_is_measured_without_cancellation() -> None:
    delta = random_delta(0, SHAPE, 3)
    nearly = LowRankDelta(delta.B + 1e-9 * randn(9, 20, 3), delta.A)
    expected = float(((delta.B - nearly.B) @ delta.A).square().sum())
    assert math.isclose(measured(delta, nearly), expected, rel_tol=1e-4)


# --- the registry and what is refused


@every_codec
def test_a_codec_is_a_frozen_dataclass_that_declares_itself(codec: str) -> None:
    chosen = find(codec)
    assert chosen.name == codec and chosen.__module__ == f"merge_algos.codecs.{codec}"
    assert dataclasses.is_dataclass(chosen) and dataclasses.fields(chosen)[0].name == "quantize"
    assert any(part in (chosen.__doc__ or "") for part in (chosen.paper, *chosen.paper.replace(",", " ").split()[:1]))
    assert chosen.version >= 1 and 1.0 in chosen.grid


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidParams, match=r"parameters\.codec.*no_such.*truncate"):
        find("no_such")


@every_codec
def test_an_unknown_encoding_is_refused(codec: str) -> None:
    with pytest.raises(InvalidParams, match=r"parameters\.quantize"):
        find(codec)(quantize="int5")


@every_codec
@pytest.mark.parametrize("count", [0, 65])
def test_too_few_and_too_many_adapters_are_refused(codec: str, count: int) -> None:
    with pytest.raises(WrongCount):
        fit(codec, some(count, 1), 100)


@every_codec
def test_two_shapes_are_refused(codec: str) -> None:
    with pytest.raises(ShapeMismatch):
        fit(codec, [*some(), random_delta(1, (3, 4), 2)], 100)


@every_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(codec: str, bad: float) -> None:
    deltas = some()
    deltas[1].A[0, 0] = bad
    with pytest.raises(NonFiniteTensor, match="adapter 1"):
        fit(codec, deltas, 100)


@pytest.mark.parametrize("importance", [[1.0], [1.0, -1.0, 1.0, 1.0], [1.0, math.nan, 1.0, 1.0]])
def test_an_importance_that_cannot_be_one_is_refused(importance: list[float]) -> None:
    with pytest.raises(InvalidParams, match="importance"):
        find("truncate")().fit(some(), 100, importance=importance)
