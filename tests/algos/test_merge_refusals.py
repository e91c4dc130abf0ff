"""What `merge` refuses, for every method and by name: ranks, weights, counts, parameters, numbers that are not finite."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from cases import MODULE, SAMPLE, Case, in_full, merged, one_module, only, random_delta, value
from merge_algos import Adapter, LowRankDelta, RankRule, merge
from merge_algos.errors import (
    BaseModelMismatch,
    InvalidParams,
    InvalidRank,
    InvalidWeights,
    NonFiniteResult,
    ShapeMismatch,
    UnknownMethod,
    WrongCount,
)
from merge_algos.merge import build, build_post
from merge_algos.methods import registry
from merge_algos.post import registry as post_registry

every_method = pytest.mark.parametrize("method", registry())

# --- parameters

NOT_NUMBERS = (math.nan, math.inf, -math.inf, "0.5", None, True, [0.5])
FRACTION = (0.0, -0.1, 1.0001, *NOT_NUMBERS)
FINITE = NOT_NUMBERS
FINITE_OR_NULL = tuple(bad for bad in NOT_NUMBERS if bad is not None)
NOT_NEGATIVE = (-0.1, *NOT_NUMBERS)
CHOICE = ("no_such", "", None, 1)
BAD: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "breadcrumbs": {"beta": FRACTION, "gamma": (1.0, *NOT_NEGATIVE)},
    "coefficients": {"table": (None, 1, "ties", [1.0], [{"m": math.nan}], [{"m": "1"}], [{"m": [0.5, math.inf]}], [{"m": None}])},
    "core_space": {"inner": CHOICE, "density": FRACTION, "lam": FINITE},
    "ctm": {"iterations": (-1, 2.5, *NOT_NUMBERS)},
    "dare": {"density": FRACTION, "combine": CHOICE},
    "della": {"density": FRACTION, "window": (1.0, 1.1, *NOT_NEGATIVE), "combine": CHOICE, "lam": FINITE},
    "iso_c": {"alpha": FINITE_OR_NULL},
    "iso_cts": {"common": FRACTION, "alpha": FINITE_OR_NULL},
    "knots": {"density": FRACTION, "combine": CHOICE, "lam": FINITE},
    "lego": {"canonical": CHOICE},
    "magnitude_prune": {"density": FRACTION},
    "np_lora": {"mu": NOT_NEGATIVE},
    "peft_linear": {},
    "pico": {"base": CHOICE, "restore": CHOICE, "scale": FINITE, "density": FRACTION, "canonicalise": ("yes", 1, None)},
    "spectral": {"power": NOT_NEGATIVE, "scale": FINITE},
    "task_arithmetic": {},
    "ties": {"density": FRACTION, "lam": FINITE, "trim": CHOICE},
    "tsv": {"alpha": FINITE_OR_NULL},
}
BAD_POST: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "restore_norm": {"scale": FINITE},
    "svc": {"alpha": (0.0, *(bad for bad in NOT_NEGATIVE if bad is not None))},
}


def each(table: Mapping[str, Mapping[str, Sequence[Any]]]) -> list[tuple[str, str, Any]]:
    return [(name, field, value) for name, fields in table.items() for field, values in fields.items() for value in values]


@every_method
def test_every_parameter_is_in_the_table(method: str) -> None:
    assert list(BAD[method]) == list(registry()[method].__dataclass_fields__)


@pytest.mark.parametrize("step", post_registry())
def test_every_parameter_of_a_post_step_is_in_the_table(step: str) -> None:
    assert list(BAD_POST[step]) == list(post_registry()[step].__dataclass_fields__)


@pytest.mark.parametrize(("method", "field", "bad"), each(BAD), ids=repr)
def test_a_parameter_out_of_range_is_refused_by_name(method: str, field: str, bad: Any) -> None:
    with pytest.raises(InvalidParams) as caught:
        build(method, {field: bad})
    assert caught.value.field == f"parameters.{field}"


@pytest.mark.parametrize(("step", "field", "bad"), each(BAD_POST), ids=repr)
def test_a_parameter_of_a_post_step_out_of_range_is_refused_by_name(step: str, field: str, bad: Any) -> None:
    with pytest.raises(InvalidParams) as caught:
        build_post(step, {field: bad})
    assert caught.value.field == f"parameters.{field}"


@every_method
def test_an_unknown_parameter_is_refused_by_name(method: str) -> None:
    with pytest.raises(InvalidParams, match=r"parameters\.no_such"):
        build(method, {"no_such": 1})


def test_a_refusal_does_not_repeat_all_that_it_was_given() -> None:
    with pytest.raises(InvalidParams) as caught:
        build("ties", {"density": "x" * 10_000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("density", "window"), [(0.5, 1.0), (0.9, 0.4), (0.1, 0.4)])
def test_a_window_that_leaves_the_probabilities_is_refused(density: float, window: float) -> None:
    with pytest.raises(InvalidParams, match=r"parameters\.window"):
        build("della", {"density": density, "window": window})


# --- methods and counts


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownMethod, match=r"no_such.*task_arithmetic"):
        merge(SAMPLE.adapters, method="no_such")


def test_an_unknown_post_step_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownMethod, match=r"no_such.*svc"):
        build_post("no_such", {})


@every_method
def test_no_adapters_are_too_few(method: str) -> None:
    with pytest.raises(WrongCount, match=method):
        merge([], method=method)


@pytest.mark.parametrize("count", [1, 3])
def test_np_lora_merges_two(count: int) -> None:
    with pytest.raises(WrongCount, match=f"np_lora merges 2 adapters, got {count}"):
        merge(SAMPLE.adapters[:count], method="np_lora")


def test_peft_linear_refuses_unequal_ranks_naming_the_module() -> None:
    with pytest.raises(InvalidParams, match=MODULE):
        merge(SAMPLE.adapters, method="peft_linear")


# --- weights


@every_method
def test_weights_default_to_what_the_method_says_or_1_over_n(method: str) -> None:
    fitted = SAMPLE.fit(method)
    default = registry()[method].default_weight
    equal = fitted.with_weights([1 / len(fitted.deltas) if default is None else default] * len(fitted.deltas))
    unasked = merge(fitted.adapters, method=method, rank=in_full(method, fitted), dtype=torch.float64)
    assert torch.equal(only(unasked)[0], value(method, equal))


@pytest.mark.parametrize("weights", [[], [1.0], [1.0] * 4])
def test_a_wrong_number_of_weights_is_refused(weights: list[float]) -> None:
    with pytest.raises(InvalidWeights, match=f"{len(weights)} weights for 3"):
        merge(SAMPLE.adapters, weights=weights)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(weight: float) -> None:
    with pytest.raises(InvalidWeights, match="finite"):
        merge(SAMPLE.adapters, weights=[1.0, weight, 1.0])


# --- ranks

FULL = [name for name, chosen in registry().items() if chosen.memory == "dense"]


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_1_is_refused(rank: int) -> None:
    with pytest.raises(InvalidRank, match=f"rank {rank}"):
        merge(SAMPLE.adapters, rank=rank)


@pytest.mark.parametrize(("method", "parameters"), [*((name, {}) for name in FULL), ("pico", {"base": "ties"})], ids=str)
def test_a_method_of_full_rank_refuses_to_be_exact(method: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidRank, match="needs a rank or an energy"):
        merge(SAMPLE.adapters, method=method, parameters=parameters)


@pytest.mark.parametrize("base", ["task_arithmetic", "tsv"])
def test_pico_on_factors_may_be_exact(base: str) -> None:
    assert merge(SAMPLE.adapters, method="pico", parameters={"base": base}).reports[0].exact


@every_method
def test_a_rank_beyond_what_is_possible_costs_nothing(method: str) -> None:
    delta = merged(method, SAMPLE.fit(method), rank=1000).adapter.deltas[MODULE]
    assert delta.rank <= min(SAMPLE.shape)


@pytest.mark.parametrize("method", FULL)
@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_a_method_of_full_rank_keeps_the_energy_asked_for(method: str, energy: float) -> None:
    assert merged(method, SAMPLE, rank=RankRule(energy=energy)).reports[0].retained_energy >= energy - 1e-9


# --- adapters that do not belong together


def test_different_base_models_are_refused_by_name() -> None:
    with pytest.raises(BaseModelMismatch, match=r"org/one.*org/two"):
        merge([Adapter("org/one", {MODULE: SAMPLE.deltas[0]}), Adapter("org/two", {MODULE: SAMPLE.deltas[1]})])


def test_one_module_with_two_shapes_is_refused_by_name() -> None:
    with pytest.raises(ShapeMismatch, match=MODULE):
        merge([one_module(random_delta(0, (6, 5), 2)), one_module(random_delta(0, (6, 4), 2))])


# --- numbers

NARROW = Case(SAMPLE.shape, tuple(d.to(torch.float32) for d in SAMPLE.deltas), (1.0, 1.0, 1.0))
OVERFLOWS = {"float32": 1e300, "float16": 1e14, "bfloat16": 1e80}  # balanced factors carry its root
GROWING = [name for name, chosen in registry().items() if "weight scale" not in chosen.breaks]
every_cut = pytest.mark.parametrize("rank", [None, 1, RankRule(energy=0.9)], ids=str)


@pytest.mark.parametrize("method", GROWING)
@every_cut
@pytest.mark.parametrize("dtype", OVERFLOWS)
def test_an_overflow_is_refused_naming_the_module(method: str, dtype: str, rank: int | RankRule | None) -> None:
    case = NARROW.with_weights([OVERFLOWS[dtype]] * 3).fit(method)
    with pytest.raises(NonFiniteResult, match=MODULE):
        merged(method, case, dtype=getattr(torch, dtype), rank=rank)


@every_method
@every_cut
def test_weights_as_large_as_they_can_be_give_something_finite_or_a_refusal(method: str, rank: int | RankRule | None) -> None:
    try:
        delta = merged(method, NARROW.with_weights([1e308, -1e308, 1e300]).fit(method), rank=rank).adapter.deltas[MODULE]
    except NonFiniteResult as refusal:
        assert MODULE in str(refusal)
    else:
        assert bool(delta.B.isfinite().all() and delta.A.isfinite().all())


FACTORS = {  # a parameter that multiplies the result
    **dict.fromkeys(["core_space", "della", "knots", "ties"], "lam"),
    **dict.fromkeys(["iso_c", "iso_cts", "tsv"], "alpha"),
    **dict.fromkeys(["pico", "spectral"], "scale"),
}


@pytest.mark.parametrize("method", FACTORS)
@pytest.mark.parametrize("rank", [None, 1])
def test_a_factor_that_overflows_the_result_is_refused_naming_the_module(method: str, rank: int | None) -> None:
    with pytest.raises(NonFiniteResult, match=MODULE):
        merged(method, NARROW, rank=rank, dtype=torch.float32, parameters={FACTORS[method]: 1e100})


@every_method
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["B", "A"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_factors_that_are_not_finite_are_refused_naming_the_module(
    method: str, bad: float, rank: int | None, factor: str, dtype: torch.dtype, weight: float
) -> None:
    good = LowRankDelta(torch.zeros(6, 2), torch.zeros(2, 5)).to(dtype)  # in which an infinity would be without effect
    spoilt = replace(good, **{factor: getattr(good, factor).index_fill(1, torch.tensor(1), bad)})
    with pytest.raises(NonFiniteResult, match=MODULE):
        merged(method, Case((6, 5), (good, spoilt), (0.5, weight)), rank=rank)


@every_method
def test_large_factors_whose_sum_overflows_but_not_they_are_finite(method: str) -> None:
    big = LowRankDelta(torch.full((64, 1), 3e37), torch.full((1, 32), 1e-37))  # sum(B) is infinite in float32
    assert bool(value(method, Case((64, 32), (big, big), (0.5, 0.5))).isfinite().all())
