"""How many singular values a rule keeps: by the naive definition, and never outside what it allows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_algos.errors import InvalidRank
from merge_algos.rank import RankRule


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_energy_picks_the_smallest_rank_that_keeps_it(values: list[float], energy: float) -> None:
    S = torch.tensor(sorted([*values, 1.0], reverse=True), dtype=torch.float64)
    total = float(S.square().sum())
    enough = [
        k for k in range(1, len(S) + 1) if float(S[:k].square().sum()) >= energy * total * (1 - 1e-12)
    ]  # the slack that pick has
    assert RankRule(energy=energy).pick(S) == enough[0]


@pytest.mark.parametrize(("energy", "k"), [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_an_energy_met_exactly_costs_no_further_rank(energy: float, k: int) -> None:
    assert RankRule(energy=energy).pick(torch.ones(4)) == k


@pytest.mark.parametrize(("total", "k"), [(4.0, 2), (5.0, 3), (100.0, 4)])
def test_the_energy_is_of_the_whole_where_only_the_leading_values_are_known(total: float, k: int) -> None:
    assert RankRule(energy=0.5).pick(torch.ones(4), total) == k


def test_the_limit_caps_the_energy() -> None:
    assert RankRule(max=2, energy=1.0).pick(torch.ones(4)) == 2


def test_a_limit_beyond_the_singular_values_keeps_all() -> None:
    assert RankRule(max=9).pick(torch.ones(4)) == 4


@pytest.mark.parametrize("rule", [RankRule(), RankRule(max=2), RankRule(energy=0.5)])
def test_no_singular_values_give_rank_0(rule: RankRule) -> None:
    assert rule.pick(torch.ones(0)) == 0


@pytest.mark.parametrize("rank", [0, -1, -100])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(InvalidRank, match=str(rank)):
        RankRule(max=rank)


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.0001, math.nan, math.inf])
def test_an_energy_outside_its_range_is_refused(energy: float) -> None:
    with pytest.raises(InvalidRank, match="fraction"):
        RankRule(energy=energy)
