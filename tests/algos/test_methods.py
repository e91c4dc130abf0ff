"""The laws of every merge method, whoever wrote it: each is tested on every registered method, and so is every exception.

A new method needs an entry in `oracles.ORACLES` and nothing here.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases import (
    DTYPES,
    FEW,
    MODULE,
    SAMPLE,
    SMALL,
    Case,
    cases,
    close,
    dense,
    in_full,
    merged,
    one_module,
    only,
    random_delta,
    value,
)
from laws import LAWS, deviation
from merge_algos import Adapter, LowRankDelta, RankRule, formats, merge
from merge_algos.errors import InvalidRank
from merge_algos.formats.spec import ModuleSpec
from merge_algos.lowrank import CoreSVD, distance, from_svd
from merge_algos.merge import build, reduce
from merge_algos.methods import registry
from merge_algos.protocol import ModuleContext

every_method = pytest.mark.parametrize("method", registry())
every_rank = pytest.mark.parametrize("rank", [None, 2])
OBEYED = [(law, method) for method, chosen in registry().items() for law in LAWS if law not in chosen.breaks]
BROKEN = [(law, method) for method, chosen in registry().items() for law in chosen.breaks]

# --- the laws


@pytest.mark.parametrize(("law", "method"), OBEYED)
@FEW
@given(case=cases())
def test_a_law_is_obeyed(law: str, method: str, case: Case) -> None:
    assert deviation(law, method, case) < 1e-8


@pytest.mark.parametrize(("law", "method"), BROKEN)
def test_a_law_that_a_method_says_it_breaks_is_broken(law: str, method: str) -> None:
    assert max(deviation(law, method, sample) for sample in (SAMPLE, SMALL)) > 5e-3


@every_method
def test_a_method_gives_a_reason_for_every_law_it_breaks(method: str) -> None:
    assert all(len(reason.split()) > 3 for reason in registry()[method].breaks.values())


@every_method
@FEW
@given(case=cases(), scaling=st.floats(0.01, 100))
def test_a_configured_scaling_is_the_same_as_a_larger_B(method: str, case: Case, scaling: float) -> None:
    fitted = case.fit(method)
    folded = Case(case.shape, tuple(loaded(d, scaling) for d in fitted.deltas), fitted.weights)
    plain = Case(case.shape, tuple(loaded(d.scale(scaling), 1.0) for d in fitted.deltas), fitted.weights)
    assert close(value(method, folded), value(method, plain), fitted.scale * scaling, tolerance=1e-4)


@every_method
def test_the_registry_knows_a_method_by_its_own_name(method: str) -> None:
    assert registry()[method].name == method


def test_the_registry_is_sorted() -> None:
    assert list(registry()) == sorted(registry())


# --- what no method may stumble over

ONES = LowRankDelta(torch.ones(6, 2, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64))
ZERO = LowRankDelta(torch.zeros(6, 2, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64))
ABSENT = LowRankDelta.zero(6, 5, like=ONES.B)
SOME = random_delta(3, (6, 5), 2)
ODD = {
    "all weights zero": Case((6, 5), (SOME, ONES), (0.0, 0.0)),
    "one weight zero": Case((6, 5), (SOME, ONES), (0.0, 0.5)),
    "one adapter zero": Case((6, 5), (SOME, ZERO), (0.5, 0.5)),
    "every adapter zero": Case((6, 5), (ZERO, ZERO), (0.5, 0.5)),
    "one adapter absent": Case((6, 5), (ABSENT, SOME), (0.5, 0.5)),
    "the only one present has no weight": Case((6, 5), (ABSENT, SOME), (0.5, 0.0)),
    "two copies": Case((6, 5), (SOME, SOME), (0.5, 0.5)),
    "two copies that cancel": Case((6, 5), (SOME, SOME), (1.0, -1.0)),
    "equal entries": Case((6, 5), (ONES, ONES.scale(-1.0)), (0.5, 0.25)),
    "rank 1": Case((6, 5), (random_delta(1, (6, 5), 1), random_delta(5, (6, 5), 1)), (0.5, 0.5)),
    "one row": Case((1, 5), (random_delta(1, (1, 5), 2), random_delta(5, (1, 5), 2)), (0.5, 0.5)),
    "one column": Case((5, 1), (random_delta(1, (5, 1), 2), random_delta(5, (5, 1), 2)), (0.5, 0.5)),
    "one entry": Case((1, 1), (random_delta(1, (1, 1), 1), random_delta(5, (1, 1), 1)), (0.5, -0.5)),
    "R beyond the shape": Case((3, 4), (random_delta(1, (3, 4), 6), random_delta(5, (3, 4), 6)), (0.5, 0.5)),
}
every_oddity = pytest.mark.parametrize("oddity", ODD)


@every_method
@every_oddity
def test_what_is_odd_is_merged_to_something_finite_whose_diagnostics_are_json(method: str, oddity: str) -> None:
    for rank in (None, 1):
        shipped, report = only(merged(method, ODD[oddity].fit(method), rank=rank))
        assert bool(shipped.isfinite().all())
        assert json.loads(json.dumps(report.diagnostics, allow_nan=False)) == report.diagnostics


NOTHING = ("all weights zero", "every adapter zero", "the only one present has no weight")


@every_method
@pytest.mark.parametrize("oddity", NOTHING)
def test_of_nothing_comes_nothing(method: str, oddity: str) -> None:
    assert not value(method, ODD[oddity].fit(method)).any()


@every_method
def test_disjoint_target_modules_each_come_out_as_if_alone(method: str) -> None:
    first, second = random_delta(0, (6, 5), 2), random_delta(2, (7, 4), 3)
    rank = in_full(method, SAMPLE)
    both = merge(
        [one_module(first, "a"), one_module(second, "b")], method=method, weights=[0.5, 2.0], dtype=torch.float64, rank=rank
    ).adapter.deltas
    alone = merge(
        [Adapter("org/base", {}), one_module(second, "b")], method=method, weights=[0.5, 2.0], dtype=torch.float64, rank=rank
    ).adapter.deltas
    assert list(both) == ["a", "b"] and torch.equal(dense(both["b"]), dense(alone["b"]))


@every_method
def test_inputs_of_two_dtypes_are_merged_in_the_wider(method: str) -> None:
    fitted = SAMPLE.fit(method)
    mixed = Case(fitted.shape, (fitted.deltas[0].to(torch.float32), *fitted.deltas[1:]), fitted.weights)
    wide = Case(fitted.shape, (mixed.deltas[0].to(torch.float64), *fitted.deltas[1:]), fitted.weights)
    assert torch.equal(value(method, mixed), value(method, wide))


@every_method
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_inputs_are_merged_in_float32(method: str, dtype: torch.dtype) -> None:
    fitted = SAMPLE.fit(method)
    narrow = Case(fitted.shape, tuple(d.to(dtype) for d in fitted.deltas), fitted.weights)
    wide = Case(fitted.shape, tuple(d.to(torch.float64) for d in narrow.deltas), fitted.weights)
    assert close(value(method, narrow, dtype=torch.float32), value(method, wide), fitted.scale, tolerance=1e-5)


# --- purity


@every_method
@every_rank
def test_the_inputs_are_not_changed(method: str, rank: int | None) -> None:
    fitted = SAMPLE.fit(method)
    before = [(d.B.clone(), d.A.clone()) for d in fitted.deltas]
    merged(method, fitted, rank=rank)
    pairs = zip(fitted.deltas, before, strict=True)
    assert all(torch.equal(d.B, B) and torch.equal(d.A, A) for d, (B, A) in pairs)


@every_method
@every_rank
def test_the_same_seed_gives_the_same_bytes(method: str, rank: int | None) -> None:
    first, second = (merged(method, SAMPLE.fit(method), rank=rank, seed=7).adapter.deltas[MODULE] for _ in range(2))
    assert torch.equal(first.B, second.B) and torch.equal(first.A, second.A)


@every_method
def test_the_global_generator_is_neither_read_nor_moved(method: str) -> None:
    state = torch.get_rng_state()
    merged(method, SAMPLE.fit(method), rank=2)
    assert torch.equal(torch.get_rng_state(), state)


# --- rank and shape


@every_method
@FEW
@given(case=cases(), rank=st.integers(1, 12))
def test_the_result_has_the_modules_shape_and_at_most_the_rank_asked_for(method: str, case: Case, rank: int) -> None:
    delta = merged(method, case.fit(method), rank=rank).adapter.deltas[MODULE]
    assert delta.shape == case.shape and delta.rank <= min(rank, *case.shape)


@every_method
@pytest.mark.parametrize("dtype", DTYPES)
@every_rank
def test_both_factors_have_the_dtype_asked_for(method: str, dtype: torch.dtype, rank: int | None) -> None:
    delta = merged(method, SAMPLE.fit(method), rank=rank, dtype=dtype).adapter.deltas[MODULE]
    assert (delta.B.dtype, delta.A.dtype) == (dtype, dtype)


def produced(method: str, case: Case, rule: RankRule, parameters: dict[str, Any] | None = None) -> Any:
    """What the method hands over before any cut, given the rule that it may look at."""
    context = ModuleContext(MODULE, 0, rule)
    return build(method, parameters or {}).merge(case.deltas, case.weights, context)


def uncut_matrix(method: str, case: Case, rule: RankRule) -> Tensor:
    delta = produced(method, case, rule).delta
    factors = from_svd(delta, len(delta.S)) if isinstance(delta, CoreSVD) else delta
    return factors.to_dense()


@every_method
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_what_is_shipped_is_the_best_approximation_of_what_the_method_produced(method: str, rank: int) -> None:
    fitted = SAMPLE.fit(method)
    uncut = uncut_matrix(method, fitted, RankRule(max=rank))
    shipped, report = only(merged(method, fitted, rank=rank))
    error = (uncut - shipped / report.diagnostics.get("gamma", 1.0)).norm()
    assert float(error) == pytest.approx(float(torch.linalg.svdvals(uncut)[rank:].norm()), abs=1e-9 * fitted.scale)


@every_method
@pytest.mark.parametrize("rule", [RankRule(max=1), RankRule(max=2), RankRule(energy=0.8), RankRule(energy=0.99, max=4)], ids=str)
def test_the_reported_loss_is_the_measured_one(method: str, rule: RankRule) -> None:
    fitted = SAMPLE.fit(method)
    uncut = uncut_matrix(method, fitted, rule)
    shipped, report = only(merged(method, fitted, rank=rule))
    measured = float((uncut - shipped / report.diagnostics.get("gamma", 1.0)).norm() / uncut.norm())
    assert report.relative_error == pytest.approx(measured, abs=1e-7)
    assert report.retained_energy == pytest.approx(1 - measured**2, abs=1e-9)
    assert report.norm == pytest.approx(float(uncut.norm()), rel=1e-6)


@every_method
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reported_rounding_error_is_the_measured_one(method: str, dtype: torch.dtype) -> None:
    unrounded = value(method, SAMPLE.fit(method), rank=2)
    shipped, report = only(merged(method, SAMPLE.fit(method), rank=2, dtype=dtype))
    assert report.rounding_error == pytest.approx(float((shipped - unrounded).norm() / unrounded.norm()), rel=1e-6)


STORED = [(torch.bfloat16,), (torch.float16,), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16, torch.float64)]


@pytest.mark.parametrize("method", [name for name, chosen in registry().items() if chosen.concatenates])
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rank", [None, 2])
def test_what_is_passed_on_as_it_is_stored_is_what_it_means(
    method: str, stored: Sequence[torch.dtype], dtype: torch.dtype, rank: int | None
) -> None:
    types = itertools.islice(itertools.cycle(stored), len(SAMPLE.deltas))
    case = replace(SAMPLE, deltas=tuple(d.to(own) for d, own in zip(SAMPLE.deltas, types, strict=True)))
    meant = replace(SAMPLE, deltas=tuple(d.to(torch.float64) for d in case.deltas))
    expected, _ = only(merged(method, meant, rank=rank))
    shipped, report = only(merged(method, case, rank=rank, dtype=dtype))
    assert float((shipped - expected).norm() / expected.norm()) == pytest.approx(report.rounding_error, rel=1e-3, abs=1e-6)


@every_method
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_the_reported_rank_is_the_one_shipped(method: str, rank: int | None) -> None:
    result = merged(method, SAMPLE.fit(method), rank=rank)
    assert result.reports[0].rank_out == result.adapter.deltas[MODULE].rank


@every_method
def test_the_truncation_error_does_not_depend_on_the_dtype_shipped(method: str) -> None:
    errors = {only(merged(method, SAMPLE.fit(method), rank=2, dtype=dtype))[1].relative_error for dtype in DTYPES}
    assert len(errors) == 1


@every_method
def test_modules_are_reported_in_natural_order(method: str) -> None:
    adapter = Adapter("org/base", {name: random_delta(0, (6, 5), 2) for name in ("layers.10.q", "layers.2.q", "layers.2.k")})
    assert [r.module for r in merge([adapter, adapter], method=method, rank=2).reports] == [
        "layers.2.k",
        "layers.2.q",
        "layers.10.q",
    ]


@every_method
def test_an_uncut_result_is_reported_exact_and_without_loss(method: str) -> None:
    report = only(merged(method, SAMPLE.fit(method)))[1]
    assert (report.exact, report.relative_error, report.retained_energy) == (True, 0.0, 1.0)


@every_method
def test_a_method_without_a_rank_is_either_exact_or_says_that_it_needs_one(method: str) -> None:
    fitted = SAMPLE.fit(method)
    if registry()[method]().full_rank:
        with pytest.raises(InvalidRank, match="needs a rank or an energy"):
            merge(fitted.adapters, method=method, weights=fitted.weights)
    else:
        assert merge(fitted.adapters, method=method, weights=fitted.weights).reports[0].exact


def test_a_context_keeps_a_block_matrix_whole_where_no_rule_cuts_it() -> None:
    delta = produced("ties", SAMPLE, RankRule()).delta
    kept = reduce(delta, ModuleContext(MODULE, 0, RankRule()))
    assert distance(kept.delta, kept.delta) == 0.0 and close(dense(kept.delta), delta.to_dense(), SAMPLE.scale)


def loaded(delta: LowRankDelta, scaling: float) -> LowRankDelta:
    """The delta as a file with this alpha / r gives it; an absent one as it is."""
    if delta.rank == 0:
        return delta
    tensors = {"lora_A": delta.A, "lora_B": delta.B}
    spec = ModuleSpec(MODULE, delta.shape, delta.rank, "LoRA", {role: role for role in tensors}, scaling)
    return formats.load(spec, tensors)
