"""LoRA-LEGO: what clustering units must give where the answer is known, and what it reports."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from cases import FEW, MODULE, NONZERO, SAMPLE, Case, cases, close, dense, merged, only, only_one, random_delta, regauged, value
from merge_algos import LowRankDelta
from merge_algos.blocks import seed_of
from merge_algos.methods.lego import cluster
from oracles import Given, lego_merge, lego_units

MODES = ("svd", "balanced", "raw")
every_mode = pytest.mark.parametrize("canonical", MODES)
SHAPE = (12, 9)


def lego(case: Case, canonical: str = "svd", **options: object) -> torch.Tensor:
    return value("lego", case, parameters={"canonical": canonical}, **options)


def units_of(case: Case, canonical: str = "svd") -> list[torch.Tensor]:
    given_ = [Given(n, d.B, d.A, w) for n, (d, w) in enumerate(zip(case.deltas, case.weights, strict=True)) if d.rank and w]
    return lego_units(given_, canonical)


# --- where the answer is known


@every_mode
@FEW
@given(seed=st.integers(0, 2**32), r=st.integers(1, 8))
def test_one_adapter_in_as_many_clusters_as_units_is_itself(canonical: str, seed: int, r: int) -> None:
    delta = random_delta(seed, SHAPE, r)
    assert close(lego(only_one(delta), canonical, rank=r), dense(delta), float(dense(delta).norm()))


@every_mode
@pytest.mark.parametrize("n", [2, 3, 5])
def test_copies_are_the_adapter_not_their_sum(canonical: str, n: int) -> None:
    delta = random_delta(0, SHAPE, 4)
    copies = Case(SHAPE, (delta,) * n, (1.0,) * n)
    assert close(lego(copies, canonical, rank=4), dense(delta), float(dense(delta).norm()))


@every_mode
@FEW
@given(seed=st.integers(0, 2**32), weights=st.lists(NONZERO, min_size=2, max_size=4))
def test_a_cluster_for_every_unit_is_the_exact_sum(canonical: str, seed: int, weights: list[float]) -> None:
    # k = R, and the reference rank is R too once the output reweighting sqrt(r / R) of equal ranks r is taken off
    r, n = 2, len(weights)
    case = Case(SHAPE, tuple(random_delta(seed + 2 * i, SHAPE, r) for i in range(n)), tuple(weights))
    assert close(lego(case, canonical, rank=r * n) * n**0.5, value("task_arithmetic", case), case.scale)


@every_mode
def test_an_adapter_and_its_opposite_at_one_cluster_each_cancel(canonical: str) -> None:
    case = Case(SHAPE, (SAMPLE.deltas[0],) * 2, (1.0, -1.0))
    assert float(lego(case, canonical, rank=6).norm()) < 1e-9 * case.scale


@every_mode
def test_positive_weights_are_the_same_as_larger_adapters(canonical: str) -> None:
    weights = (0.7, 0.4, 1.1)
    larger = Case(SHAPE, tuple(root_scaled(d, w) for d, w in zip(SAMPLE.deltas, weights, strict=True)), (1.0,) * 3)
    assert close(lego(SAMPLE.with_weights(weights), canonical), lego(larger, canonical), SAMPLE.scale)


def root_scaled(delta: LowRankDelta, weight: float) -> LowRankDelta:
    """`w B A` with the root of w in both factors."""
    return LowRankDelta(delta.B * weight**0.5, delta.A * weight**0.5)


def test_zero_units_are_dropped_and_count_for_no_rank() -> None:
    delta = random_delta(0, SHAPE, 3)
    padded = LowRankDelta(torch.cat([delta.B, torch.zeros(12, 2)], 1), torch.cat([delta.A, torch.ones(2, 9)]))
    assert close(lego(only_one(padded)), dense(delta), float(dense(delta).norm()))


# --- gauges


@FEW
@given(case=cases(NONZERO), rank=st.integers(1, 6))
def test_another_gauge_changes_nothing_in_svd_mode(case: Case, rank: int) -> None:
    turned = Case(case.shape, tuple(regauged(d, n) for n, d in enumerate(case.deltas)), case.weights)
    assert close(lego(turned, rank=rank), lego(case, rank=rank), case.scale, tolerance=1e-8)


@pytest.mark.parametrize("canonical", ["balanced", "raw"])
def test_a_rotation_changes_something_without_canonicalising(canonical: str) -> None:
    turned = Case(SHAPE, tuple(regauged(d, n) for n, d in enumerate(SAMPLE.deltas)), SAMPLE.weights)
    assert not close(lego(turned, canonical, rank=3), lego(SAMPLE, canonical, rank=3), SAMPLE.scale, tolerance=1e-3)


def stretched(delta: LowRankDelta) -> LowRankDelta:
    """The same units, each with another balance of its halves and another sign of both."""
    factors = torch.tensor([(-1.0) ** j * 2.0 ** (j - 1) for j in range(delta.rank)], dtype=torch.float64)
    return LowRankDelta(delta.B * factors, delta.A / factors[:, None])


@pytest.mark.parametrize(("canonical", "same"), [("balanced", True), ("raw", False)])
def test_balancing_removes_norms_and_signs_of_single_units(canonical: str, same: bool) -> None:
    turned = Case(SHAPE, tuple(stretched(d) for d in SAMPLE.deltas), SAMPLE.weights)
    assert close(lego(turned, canonical, rank=3), lego(SAMPLE, canonical, rank=3), SAMPLE.scale, tolerance=1e-6) == same


# --- clustering


@FEW
@given(seed=st.integers(0, 2**32), count=st.integers(2, 30), data=st.data())
def test_clusters_in_gram_coordinates_are_those_of_the_units_themselves(seed: int, count: int, data: st.DataObject) -> None:
    units = random_delta(seed, (count, 40), 40).to_dense()
    units = units[units.norm(dim=1).argsort(descending=True)]
    k = data.draw(st.integers(1, count))
    own = KMeans(k, n_init=10, tol=0.0, random_state=7).fit_predict(units.numpy())
    ours = cluster(units @ units.mT, k, 7)
    assert len(set(zip(own.tolist(), ours.tolist(), strict=True))) == k  # one to one


def test_the_update_is_made_of_the_centroids_of_the_partition_it_reports() -> None:
    shipped, report = only(merged("lego", SAMPLE, rank=3))
    labels = [label for _, label in report.diagnostics["assignment"]]
    assert close(shipped, lego_merge(units_of(SAMPLE), labels, 3, 9), SAMPLE.scale)


@FEW
@given(case=cases(NONZERO), rank=st.integers(1, 12))
def test_no_cluster_is_empty(case: Case, rank: int) -> None:
    sizes = only(merged("lego", case, rank=rank))[1].diagnostics["cluster_sizes"]
    assert min(sizes) >= 1 and sum(sizes) == len(units_of(case)) and len(sizes) == min(rank, len(units_of(case)))


def test_fewer_distinct_units_than_clusters_give_fewer_clusters_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    copies = Case(SHAPE, (random_delta(0, SHAPE, 2),) * 3, (1.0,) * 3)
    assert only(merged("lego", copies, rank=5))[1].diagnostics["cluster_sizes"] == [3, 3] and not recwarn.list


def test_the_seed_decides_between_partitions() -> None:
    units = random_delta(0, (60, 5), 5).to_dense()
    drawn = {tuple(np.sort(np.bincount(cluster(units @ units.mT, 20, seed).numpy()))) for seed in range(5)}
    assert len(drawn) > 1


def test_every_module_has_a_seed_of_its_own() -> None:
    assert seed_of(0, MODULE) != seed_of(0, "layers.1.q_proj") != seed_of(1, "layers.1.q_proj")


# --- the report


@pytest.fixture
def report() -> dict[str, object]:
    return dict(only(merged("lego", SAMPLE, rank=4))[1].diagnostics)


def test_the_report_says_whose_each_unit_was(report: dict[str, list[list[int]]]) -> None:
    assert [owner for owner, _ in report["assignment"]] == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_the_reported_sizes_are_those_of_the_assignment(report: dict[str, list[list[int]]]) -> None:
    assert report["cluster_sizes"] == np.bincount([label for _, label in report["assignment"]]).tolist()


def clusters(report: dict[str, list[list[int]]]) -> list[torch.Tensor]:
    units, labels = torch.stack(units_of(SAMPLE)), torch.tensor([label for _, label in report["assignment"]])
    return [units[labels == label] for label in range(4)]


def test_the_reported_inertia_is_the_squared_distance_to_the_means(report: dict[str, list[list[int]]]) -> None:
    expected = sum(float((members - members.mean(0)).square().sum()) for members in clusters(report))
    assert report["inertia"] == pytest.approx(expected)


def test_the_reported_cosine_is_the_mean_to_the_means(report: dict[str, list[list[int]]]) -> None:
    each = [torch.cosine_similarity(members, members.mean(0)[None], dim=1) for members in clusters(report)]
    assert report["within_cluster_cosine"] == pytest.approx(float(torch.cat(each).mean()))
