"""Steps after any merge: singular value calibration and restored norms, and merges of adapters that share A."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given

from cases import FEW, MODULE, SAMPLE, Case, cases, close, dense, merged, only, randn, random_delta, value
from merge_algos import LowRankDelta, RankRule
from merge_algos.merge import build_post
from merge_algos.methods import registry as methods
from merge_algos.post import registry
from merge_algos.post.restore_norm import RestoreNorm
from merge_algos.post.svc import Svc
from merge_algos.protocol import PostStep
from oracles import POST_ORACLES, Given, mean_norm

STEPS: list[PostStep] = [Svc(), Svc(alpha=1.0), Svc(alpha=0.1), RestoreNorm(), RestoreNorm(scale=-0.5)]
every_step = pytest.mark.parametrize("step", STEPS, ids=repr)
every_method = pytest.mark.parametrize("method", methods())


def present(case: Case) -> list[Given]:
    numbered = enumerate(zip(case.deltas, case.weights, strict=True))
    return [Given(n, d.B, d.A, w) for n, (d, w) in numbered if d.rank and w]


def arithmetic(case: Case, *steps: PostStep, **options: object) -> torch.Tensor:
    return value("task_arithmetic", case, post_steps=steps, **options)


def test_every_step_has_an_oracle() -> None:
    assert set(POST_ORACLES) == set(registry())


@pytest.mark.parametrize("name", registry())
def test_the_registry_knows_a_step_by_its_own_name(name: str) -> None:
    assert build_post(name, {}).name == name


@every_step
@FEW
@given(case=cases())
def test_a_step_is_its_oracle_after_task_arithmetic(step: PostStep, case: Case) -> None:
    assume(arithmetic(case).norm() > 1e-3)
    expected = POST_ORACLES[step.name](arithmetic(case), present(case), **vars(step))
    assert close(arithmetic(case, step), expected, case.scale, tolerance=1e-6)


FLAT = ("iso_c", "iso_cts")  # equal singular values have no singular vectors of their own, so SVC has none to judge
FOLLOWED = [(method, step) for method in methods() for step in STEPS if method not in FLAT or step.name != "svc"]


@pytest.mark.parametrize(("method", "step"), FOLLOWED, ids=repr)
@pytest.mark.parametrize("rank", [2, 5])
def test_a_step_is_its_oracle_after_what_any_method_ships(method: str, step: PostStep, rank: int) -> None:
    fitted = SAMPLE.fit(method)
    expected = POST_ORACLES[step.name](value(method, fitted, rank=rank), present(fitted), **vars(step))
    assert close(value(method, fitted, rank=rank, post_steps=[step]), expected, fitted.scale, tolerance=1e-6)


@every_step
def test_a_step_adds_no_rank(step: PostStep) -> None:
    assert merged("task_arithmetic", SAMPLE, rank=3, post_steps=[step]).adapter.deltas[MODULE].rank == 3


@every_step
def test_a_step_leaves_what_is_nothing_nothing(step: PostStep) -> None:
    assert not arithmetic(SAMPLE.with_weights([0.0, 0.0, 0.0]), step).any()


@every_step
def test_a_step_does_not_blow_up_what_cancels(step: PostStep) -> None:
    delta = random_delta(0, (9, 7), 3)
    assert float(arithmetic(Case((9, 7), (delta, delta), (1.0, -1.0)), step).norm()) < 1e-6 * float(dense(delta).norm())


@every_step
def test_a_step_reports_what_it_did(step: PostStep) -> None:
    assert only(merged("task_arithmetic", SAMPLE, post_steps=[step]))[1].diagnostics[step.name]


def test_steps_are_applied_in_their_order() -> None:
    norm = float(arithmetic(SAMPLE, Svc(), RestoreNorm()).norm())
    assert (
        norm == pytest.approx(mean_norm(present(SAMPLE))) != pytest.approx(float(arithmetic(SAMPLE, RestoreNorm(), Svc()).norm()))
    )


# --- svc


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_svc_counts_copies_once_whatever_their_weights(n: int, weight: float) -> None:
    delta = random_delta(0, (9, 7), 3)
    assert close(arithmetic(Case((9, 7), (delta,) * n, (weight,) * n), Svc(alpha=0.01)), dense(delta), float(dense(delta).norm()))


def orthogonal(weights: Sequence[float]) -> Case:
    """Adapters that share neither a left nor a right direction, with singular values all different."""
    n = len(weights)
    U, V = torch.linalg.qr(randn(0, 12, 2 * n)).Q, torch.linalg.qr(randn(1, 9, 2 * n)).Q
    S = torch.arange(2 * n, 0, -1).double()
    parts = [slice(2 * i, 2 * i + 2) for i in range(n)]
    return Case((12, 9), tuple(LowRankDelta(U[:, p] * S[p], V[:, p].mT) for p in parts), tuple(weights))


def test_svc_changes_nothing_where_nothing_is_shared() -> None:
    assert close(arithmetic(orthogonal([1.0, 1.0, 1.0]), Svc()), arithmetic(orthogonal([1.0, 1.0, 1.0])), 10.0)


def test_svc_with_alpha_1_only_shrinks() -> None:
    before, after = (torch.linalg.svdvals(arithmetic(SAMPLE, *steps)) for steps in ((), (Svc(alpha=1.0),)))
    assert bool((after <= before * (1 + 1e-9)).all())


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_svc_grows_a_direction_by_one_over_alpha_at_most(alpha: float) -> None:
    before, after = (torch.linalg.svdvals(arithmetic(orthogonal([0.1, 0.1]), *steps)) for steps in ((), (Svc(alpha=alpha),)))
    assert torch.allclose(after[:4], before[:4] / alpha)


def test_the_floor_of_svc_is_one_over_the_number_of_adapters_present() -> None:
    case = Case(SAMPLE.shape, (*SAMPLE.deltas, LowRankDelta.zero(12, 9, like=SAMPLE.deltas[0].B)), (*SAMPLE.weights, 1.0))
    assert torch.equal(arithmetic(case, Svc()), arithmetic(SAMPLE, Svc(alpha=1 / 3)))


# --- restored norms


@every_method
@pytest.mark.parametrize("rank", [1, 4])
def test_restored_is_the_mean_norm_of_the_adapters_present(method: str, rank: int) -> None:
    fitted = SAMPLE.fit(method)
    norm = float(value(method, fitted, rank=rank, post_steps=[RestoreNorm(scale=0.7)]).norm())
    assert norm == pytest.approx(0.7 * mean_norm(present(fitted)), rel=1e-9)


# --- one A for all (LoRA-FA, VeRA)


def sharing(weights: Sequence[float] = (0.7, -0.4, 1.1), dtype: torch.dtype = torch.float32) -> Case:
    A = randn(0, 4, 30).to(dtype)
    return Case((40, 30), tuple(LowRankDelta(randn(n, 40, 4).to(dtype), A.clone()) for n in range(len(weights))), tuple(weights))


STEPS_THAT_KEEP_RANK: list[tuple[PostStep, ...]] = [(), (RestoreNorm(),), (Svc(),), (Svc(), RestoreNorm(scale=2.0))]


@pytest.mark.parametrize("steps", STEPS_THAT_KEEP_RANK, ids=repr)
def test_a_shared_A_keeps_the_rank(steps: tuple[PostStep, ...]) -> None:
    result = merged("task_arithmetic", sharing(), post_steps=steps)
    assert result.adapter.deltas[MODULE].rank == 4 and result.reports[0].exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_sum_with_a_shared_A_is_the_exact_one(dtype: torch.dtype) -> None:
    case = sharing(dtype=dtype)
    expected = sum(w * dense(d) for w, d in zip(case.weights, case.deltas, strict=True))
    assert close(value("task_arithmetic", case), expected, case.scale, tolerance=1e-7)


def test_a_shared_A_is_shipped_byte_for_byte() -> None:
    case = sharing()
    shipped = merged("task_arithmetic", case, dtype=torch.float32).adapter.deltas[MODULE]
    assert torch.equal(shipped.A.view(torch.int32), case.deltas[0].A.view(torch.int32))


def flipped(A: torch.Tensor) -> torch.Tensor:
    """The last bit of one entry."""
    bits = A.clone().view(torch.int32)
    bits[2, 17] ^= 1
    return bits.view(torch.float32)


def test_one_other_bit_in_one_A_costs_the_whole_rank() -> None:
    first, *rest = sharing().deltas
    other = Case((40, 30), (LowRankDelta(first.B, flipped(first.A)), *rest), (1.0,) * 3)
    assert merged("task_arithmetic", other).reports[0].rank_out == 12


@pytest.mark.parametrize("left_out", [0.0, None])
def test_an_adapter_that_does_not_count_may_have_another_A(left_out: float | None) -> None:
    case = sharing()
    other = random_delta(9, (40, 30), 3 if left_out == 0.0 else 0).to(torch.float32)
    more = Case((40, 30), (*case.deltas, other), (*case.weights, left_out or 0.0))
    assert merged("task_arithmetic", more).adapter.deltas[MODULE].rank == 4


def test_a_shared_A_may_still_be_cut() -> None:
    assert merged("task_arithmetic", sharing(), rank=RankRule(max=2)).adapter.deltas[MODULE].rank == 2
