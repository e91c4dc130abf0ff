"""Ranks by heavy tails: the estimator against its formula, and what the allocation promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_algos.heavy_tail import heavy_tail_ranks, hill_alpha, tail_of


def power_law(alpha: float, count: int = 33) -> torch.Tensor:
    """Singular values whose eigenvalues are the quantiles of a power law of this exponent."""
    return (torch.arange(1, count + 1).double() ** (-1 / (alpha - 1))).sqrt()


def test_the_estimator_is_the_mean_log_ratio_to_the_last_eigenvalue() -> None:
    S = torch.tensor([4.0, 2.0, 1.0])
    assert hill_alpha(S) == pytest.approx(1 + 2 / (math.log(16) + math.log(4)))


@pytest.mark.parametrize("alpha", [1.5, 2.5, 4.0])
def test_the_estimator_finds_the_exponent_of_a_power_law(alpha: float) -> None:
    assert hill_alpha(power_law(alpha, 20_000)) == pytest.approx(alpha, rel=0.01)


def test_the_size_of_a_spectrum_does_not_matter() -> None:
    assert hill_alpha(1e-3 * power_law(3.0)) == pytest.approx(hill_alpha(power_law(3.0)))


@pytest.mark.parametrize("S", [torch.ones(9), torch.ones(1)], ids=["flat", "single"])
def test_a_spectrum_without_a_tail_has_the_largest_alpha(S: torch.Tensor) -> None:
    assert hill_alpha(S) == 10.0


def test_what_rounding_leaves_is_no_tail_and_no_use() -> None:
    low_rank = torch.tensor([3.0, 2.0, 1.0, 1e-9, 1e-10])
    assert tail_of(low_rank, 40) == (hill_alpha(low_rank[:3]), 3)


def test_a_spectrum_that_goes_on_has_room_for_every_rank() -> None:
    assert tail_of(power_law(3.0), 40) == (hill_alpha(power_law(3.0)), 40)


modules = st.lists(st.tuples(st.sampled_from([1.2, 2.0, 2.5, 3.7, 10.0]), st.integers(1, 64)), min_size=1, max_size=20)


def spread(given_modules: list[tuple[float, int]], mean: int) -> list[int]:
    alphas = {f"m{n}": alpha for n, (alpha, _) in enumerate(given_modules)}
    ranks = heavy_tail_ranks(alphas, {f"m{n}": most for n, (_, most) in enumerate(given_modules)}, mean)
    return [ranks[f"m{n}"] for n in range(len(given_modules))]


@given(modules, st.integers(1, 32))
def test_ranks_stay_within_their_limits_and_the_mean(given_modules: list[tuple[float, int]], mean: int) -> None:
    ranks = spread(given_modules, mean)
    assert all(1 <= rank <= most for rank, (_, most) in zip(ranks, given_modules, strict=True))
    assert sum(ranks) <= mean * len(ranks)


@given(st.lists(st.floats(1.05, 10.0), min_size=2, max_size=20, unique=True), st.integers(1, 32))
def test_where_no_limit_binds_the_mean_is_kept(alphas: list[float], mean: int) -> None:
    ranks = spread([(alpha, 10**9) for alpha in alphas], mean)
    tied = max(alphas.count(alpha) for alpha in alphas)
    # two shares a rounding apart cross a whole number together, as if they were equal
    assert mean * len(ranks) - sum(ranks) <= tied + sum(abs(a / b - 1) < 1e-9 for a in alphas for b in alphas if a is not b)


@given(modules, st.integers(1, 32))
def test_a_lighter_tail_never_gets_fewer_ranks(given_modules: list[tuple[float, int]], mean: int) -> None:
    unlimited = sorted((alpha, 10**9) for alpha, _ in given_modules)
    ranks = spread(unlimited, mean)
    assert ranks == sorted(ranks)


@given(st.floats(1.05, 10.0), st.integers(1, 20), st.integers(1, 32))
def test_equal_spectra_get_the_mean(alpha: float, count: int, mean: int) -> None:
    assert spread([(alpha, 64)] * count, mean) == [mean] * count


def test_ranks_are_in_proportion_to_the_paper_s_power_of_alpha() -> None:
    light, heavy = spread([(4.0, 10**9), (2.0, 10**9)], 1000)
    assert light / heavy == pytest.approx(2**2.5, rel=0.01)
