"""Singular value calibration: shrink the directions that several adapters have been adding to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merge_algos.entries import check_finite_number
from merge_algos.lowrank import SVD, LowRankDelta, from_svd, present
from merge_algos.protocol import Merged, PostStep


@dataclass(frozen=True)
class Svc(PostStep):
    """SVC (Li et al. 2026, arXiv:2602.05536) on what is shipped: singular vectors stay, singular value j becomes gamma_j sigma_j.

    For the j-th left vector u, adapter i answers `a_i = u^T delta_i`, the merge `a = sigma_j v_j`, and
    `s_i = <a, a_i> / <a_i, a_i>` says how often i's part has been counted; `gamma_j = n / sum_i max(alpha, s_i)`. In the sum
    of n copies s_i is n, in that of adapters orthogonal to each other 1; a merge of either with other weights is brought
    to the same size, so weights choose directions here and not sizes.
    alpha: floor of s_i, above 0, None for 1/n as in the paper: a direction grows at most by 1 / alpha. 1 only shrinks.
    Differs from the paper: an adapter without any answer in a direction does not count there, since its s_i is 0/0.
    After a merge whose singular values are equal (Iso-C) the directions, and so this step, depend on how factors are written.
    """

    name = "svc"
    paper = "arXiv:2602.05536"

    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_finite_number("alpha", self.alpha, least=1e-6)

    def apply(self, merged: LowRankDelta, deltas: Sequence[LowRankDelta], weights: Sequence[float]) -> Merged:
        here = present(deltas, weights)
        floor = 1.0 / max(len(here), 1) if self.alpha is None else self.alpha
        svd = merged.svd()
        a = svd.S[:, None] * svd.Vh  # (k, d_in)
        counted = torch.zeros_like(svd.S)
        voters = torch.zeros_like(svd.S)
        for delta in (deltas[n] for n in here):
            answer = (svd.U.mT @ delta.B.double()) @ delta.A.double()  # (k, d_in)
            own = answer.square().sum(1)
            heard = own > 1e-12 * delta.inner(delta)
            s = (a * answer).sum(1) / own.where(heard, 1)
            counted += s.clamp(min=floor).where(heard, 0)
            voters += heard
        gamma = (voters / counted).where(voters > 0, 1)
        calibrated = from_svd(SVD(svd.U, svd.S * gamma, svd.Vh), len(svd.S))
        return Merged(calibrated, {"gamma_min": float(gamma.min()) if len(gamma) else 1.0})
