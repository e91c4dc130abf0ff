"""What `merge` refuses, for every method: each error names the parameter, weight, rank or module that is wrong."""

import math

import pytest
import torch

from laws import MODULE, SAMPLE, every_method, obeying, one_module, random_delta
from merge_algos import Adapter, LowRankDelta, RankRule, merge
from merge_algos.errors import (
    BaseModelMismatch,
    InvalidParams,
    InvalidRank,
    InvalidWeights,
    NonFiniteResult,
    ShapeMismatch,
    TooFewAdapters,
    UnknownMethod,
)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownMethod, match=r"no_such.*task_arithmetic"):
        merge(SAMPLE.adapters, method="no_such")


@every_method
def test_an_unknown_parameter_is_refused_by_name(method: str) -> None:
    with pytest.raises(InvalidParams, match=r"parameters\.no_such"):
        merge(SAMPLE.adapters, method=method, parameters={"no_such": 1})


@pytest.mark.parametrize("weights", [[], [1.0], [1.0] * 4])
def test_a_wrong_number_of_weights_is_refused(weights: list[float]) -> None:
    with pytest.raises(InvalidWeights, match=f"{len(weights)} weights for 3"):
        merge(SAMPLE.adapters, weights=weights)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(weight: float) -> None:
    with pytest.raises(InvalidWeights, match="finite"):
        merge(SAMPLE.adapters, weights=[1.0, weight, 1.0])


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_1_is_refused(rank: int) -> None:
    with pytest.raises(InvalidRank, match=f"rank {rank}"):
        merge(SAMPLE.adapters, rank=rank)


@every_method
def test_no_adapters_are_too_few(method: str) -> None:
    with pytest.raises(TooFewAdapters, match=method):
        merge([], method=method)


def test_different_base_models_are_refused_by_name() -> None:
    with pytest.raises(BaseModelMismatch, match=r"org/one.*org/two"):
        merge([Adapter("org/one", {MODULE: SAMPLE.deltas[0]}), Adapter("org/two", {MODULE: SAMPLE.deltas[1]})])


def test_one_module_with_two_shapes_is_refused_by_name() -> None:
    with pytest.raises(ShapeMismatch, match=MODULE):
        merge([one_module(random_delta(0, (6, 5), 2)), one_module(random_delta(0, (6, 4), 2))])


OVERFLOWS = {"float32": 1e300, "float16": 1e14, "bfloat16": 1e39}


@obeying("growth")
@pytest.mark.parametrize("rank", [None, 1, RankRule(energy=0.9)])
@pytest.mark.parametrize("dtype", OVERFLOWS)
def test_an_overflow_is_refused_naming_the_module(method: str, dtype: str, rank: int | RankRule | None) -> None:
    narrow = [one_module(d.to(torch.float32)) for d in SAMPLE.deltas]
    with pytest.raises(NonFiniteResult, match=MODULE):
        merge(narrow, method=method, weights=[OVERFLOWS[dtype]] * 3, dtype=getattr(torch, dtype), rank=rank)


@every_method
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_factors_that_are_not_finite_are_refused_naming_the_module(method: str, bad: float, rank: int | None) -> None:
    delta = LowRankDelta(torch.full((6, 2), bad), torch.ones(2, 5))
    with pytest.raises(NonFiniteResult, match=MODULE):
        merge([one_module(delta)] * 2, method=method, rank=rank)
