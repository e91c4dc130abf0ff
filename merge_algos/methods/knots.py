"""KnOTS: bring all adapters into one shared left basis by an SVD of their concatenation, merge entries there."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from merge_algos.blocks import seed_of
from merge_algos.entries import check_choice, check_finite_number, check_fraction, combine, drop
from merge_algos.lowrank import LowRankDelta, numerical_rank, present, signs_of, thin_qr
from merge_algos.magnitudes import trim
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class Knots(MergeMethod):
    """KnOTS (Stoica et al. 2024, arXiv:2410.19735): `[delta_1 ..] = U S [V_1 ..]`, TIES or DARE on `S V_i`, then `U` back.

    combine: `ties` (trim to `density`, elect, average), `dare` (drop to `density`, rescale, add) or `sum` (which is task
    arithmetic).  density: in (0, 1].
    lam: factor of the result.  Never dense: `S V_i` is (R, d_in), and the result has rank R at most.
    Differs from the authors' code, which leaves alpha / r out: a delta carries its scaling.
    """

    name = "knots"
    paper = "arXiv:2410.19735"
    breaks = MappingProxyType(
        {
            "single adapter": "small entries of `S V` are trimmed away",
            "two copies": "small entries of `S V` are trimmed away",
            "weight scale": "the agreeing mean divides by the weights, so only their ratios count; lam is the scale",
            "linear": "the election of a sign is not linear",
        }
    )

    density: float = 0.2
    combine: Literal["ties", "dare", "sum"] = "ties"
    lam: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("density", self.density)
        check_choice("combine", self.combine, ("ties", "dare", "sum"))
        check_finite_number("lam", self.lam)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        here = present(deltas, weights)
        U, shares = shared_left_basis([deltas[n] for n in here])
        seeds = [seed_of(context.seed, context.module, n) for n in here]
        stack = [self._thinned(share, seed) for share, seed in zip(shares, seeds, strict=True)]
        merged = combine(stack, [weights[n] for n in here], "ties" if self.combine == "ties" else "sum")
        return Merged(LowRankDelta(U, self.lam * merged))

    def _thinned(self, share: Tensor, seed: int) -> Tensor:
        if self.combine == "sum":
            return share
        return trim(share, self.density) if self.combine == "ties" else drop(share, self.density, seed)


def shared_left_basis(deltas: Sequence[LowRankDelta]) -> tuple[Tensor, list[Tensor]]:
    """U (d_out, k) of the concatenation side by side, and `S V_i = U^T delta_i` (k, d_in) per adapter; in the deltas' dtype.

    `sum_i delta_i delta_i^T = QB (sum_i R_i A_i A_i^T R_i^T) QB^T` with `[B_1 .. B_n] = QB [R_1 .. R_n]`, so U comes from a
    small symmetric matrix.
    """
    QB, RB = thin_qr(torch.cat([d.B.double() for d in deltas], 1))
    blocks = torch.split(RB, [d.rank for d in deltas], 1)  # (p, r_i)
    factors = [R @ thin_qr(d.A.double().mT)[1].mT for R, d in zip(blocks, deltas, strict=True)]
    left, S, _ = torch.linalg.svd(torch.cat(factors, 1), full_matrices=False)
    left = left[:, : numerical_rank(S)]
    U = QB.within(left * signs_of(QB.times(left)))
    shares = [U.coordinates(d.B.double()).to(d.A.dtype) @ d.A for d in deltas]
    return U.columns.to(deltas[0].B.dtype), shares
