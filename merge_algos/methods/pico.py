"""Pico: adapters crowd into few output directions, so damp those directions before merging, then restore the size."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from merge_algos.blocks import BlockMatrix
from merge_algos.entries import check_choice, check_finite_number, check_flag, check_fraction
from merge_algos.lowrank import CoreSVD, LowRankDelta, canonical, mean_norm, present, thin_qr
from merge_algos.methods.task_arithmetic import TaskArithmetic
from merge_algos.methods.ties import Ties
from merge_algos.methods.tsv import Tsv
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class Pico(MergeMethod):
    """Calibration in B-space ("Crowded in B-Space", arXiv:2604.16826), per module over the T adapters present.

    `B_all = [B_1 .. B_T] = U S V^T`, `s_j = S_j^2 / sum S^2`, `a_j = 1 / (1 + (T-1) s_j)`, `B~_t = (I + U diag(a-1) U^T) B_t`;
    the calibrated deltas are merged by `base`, and the result gets the mean norm of the original deltas times `scale`.
    Computed as `B~_all = B_all (I + kappa G)^-1` with `G = B_all^T B_all`, `kappa = (T-1) / tr G`: no SVD of B_all.

    base: `task_arithmetic`, `ties` (trimmed to `density`) or `tsv`.  restore: `merged` rescales the result after the rank
    cut (the paper), `per_adapter` every calibrated delta to its own norm (the official command line), `none` neither.
    canonicalise: factor every adapter by its balanced SVD first, without which G depends on how its factors are written.
    """

    name = "pico"
    paper = "arXiv:2604.16826"
    breaks = MappingProxyType(
        {
            "two copies": "their strongest directions are damped most",
            "weight scale": "the norm is that of the adapters; scale is the scale",
            "linear": "the norm is restored",
        }
    )

    base: Literal["task_arithmetic", "ties", "tsv"] = "task_arithmetic"
    restore: Literal["merged", "per_adapter", "none"] = "merged"
    scale: float = 1.0
    density: float = 0.2
    canonicalise: bool = True

    def __post_init__(self) -> None:
        check_choice("base", self.base, tuple(_BASES))
        check_choice("restore", self.restore, ("merged", "per_adapter", "none"))
        check_finite_number("scale", self.scale)
        check_fraction("density", self.density)
        check_flag("canonicalise", self.canonicalise)

    @property
    def full_rank(self) -> bool:
        return self.base == "ties"

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        here = present(deltas, weights)
        originals = [canonical(deltas[n]) if self.canonicalise else deltas[n] for n in here]
        if not any(delta.rank for delta in originals):
            return Merged(originals[0])
        calibrated, G = calibrate(originals)
        if self.restore == "per_adapter":
            calibrated = [_at_norm(c, o.norm()) for c, o in zip(calibrated, originals, strict=True)]
        base = Ties(density=self.density) if self.base == "ties" else _BASES[self.base]()
        merged = base.merge(calibrated, [weights[n] for n in here], context)
        diagnostics = _diagnostics(G, originals)
        if self.restore == "merged":
            return Merged(merged.delta, diagnostics, norm=self.scale * mean_norm(deltas, weights))
        return Merged(_scaled(merged.delta, self.scale), diagnostics)


_BASES: dict[str, type[MergeMethod]] = {"task_arithmetic": TaskArithmetic, "ties": Ties, "tsv": Tsv}


def calibrate(deltas: Sequence[LowRankDelta]) -> tuple[list[LowRankDelta], Tensor]:
    """The calibrated deltas, A untouched, and the Gram matrix G (R, R) of all B, float64."""
    B = torch.cat([d.B.double() for d in deltas], 1)  # (d_out, R)
    G = B.mT @ B
    kappa = (len(deltas) - 1) / G.trace().clamp(min=torch.finfo(torch.float64).tiny)
    damped = torch.linalg.solve(torch.eye(len(G), dtype=G.dtype, device=G.device) + kappa * G, B, left=False)
    blocks = torch.split(damped, [d.rank for d in deltas], 1)
    return [LowRankDelta(b.to(d.B.dtype), d.A) for b, d in zip(blocks, deltas, strict=True)], G


def _diagnostics(G: Tensor, deltas: Sequence[LowRankDelta]) -> dict[str, Any]:
    """s_max, a_min, the effective rank exp(entropy of s), and how much column spaces overlap beyond chance r / d_out."""
    s = torch.linalg.eigvalsh(G).clamp(min=0)
    s = s / s.sum().clamp(min=torch.finfo(torch.float64).tiny)
    entropy = -(s * s.clamp(min=1e-300).log()).sum()
    s_max = float(s.max()) if len(s) else 0.0
    return {
        "s_max": s_max,
        "a_min": 1 / (1 + (len(deltas) - 1) * s_max),
        "effective_rank": float(entropy.exp()),
        "overlap_beyond_chance": _overlap(deltas),
    }


def _overlap(deltas: Sequence[LowRankDelta]) -> float:
    """Mean over pairs of `||U_i^T U_j||^2 / min(r_i, r_j)` minus what random subspaces have, max(r_i, r_j) / d_out."""
    bases = [thin_qr(d.B.double())[0].columns for d in deltas if d.rank]
    d_out = deltas[0].shape[0]
    pairs = [(U, W) for n, U in enumerate(bases) for W in bases[:n]]
    beyond = [
        float((U.mT @ W).square().sum()) / min(U.shape[1], W.shape[1]) - max(U.shape[1], W.shape[1]) / d_out for U, W in pairs
    ]
    return sum(beyond) / len(beyond) if beyond else 0.0


def _at_norm(delta: LowRankDelta, norm: float) -> LowRankDelta:
    own = delta.norm()
    return delta.scale(norm / own) if own else delta


def _scaled(delta: LowRankDelta | CoreSVD | BlockMatrix, factor: float) -> LowRankDelta | CoreSVD | BlockMatrix:
    if isinstance(delta, BlockMatrix):
        return dataclasses.replace(delta, rows=lambda start, stop: factor * delta.rows(start, stop))
    return delta.scale(factor)
