"""Spectral merging: the sum of the adapters with its spectrum flattened by a power, at the size of one adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from merge_algos.entries import check_finite_number
from merge_algos.lowrank import LowRankDelta, mean_norm, numerical_rank, size_of, weighted_sum
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class Spectral(MergeMethod):
    """`U S^power V^T` of the weighted sum, with Frobenius norm `scale` times the mean norm of the adapters (ours).

    Braid, between arXiv:2212.04089 and arXiv:2502.04959.

    power: 1 keeps the spectrum of task arithmetic, 0 flattens it to Iso-C in the core.  scale: how large the result is
    beside one adapter, whatever the weights add up to.
    """

    name = "spectral"
    version = 2  # 2: a cut takes (of power 0) equal singular values in the order they had, not as rounding has it
    paper = "Braid, between arXiv:2212.04089 and arXiv:2502.04959"
    breaks = MappingProxyType(
        {
            "single adapter": "its spectrum is flattened too",
            "two copies": "their spectrum is flattened too",
            "weight scale": "the norm is that of the adapters; scale is the scale",
            "linear": "a power and a norm are not linear",
        }
    )

    power: float = 0.25
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite_number("power", self.power, least=0.0)
        check_finite_number("scale", self.scale)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        svd = weighted_sum(deltas, weights).core_svd()
        k = numerical_rank(svd.S, size_of(deltas, weights))
        ratios = svd.S / svd.S[:1]  # powers of ratios, so that the units of the deltas are kept
        flattened = replace(svd, U=svd.U[:, :k], S=svd.S[:1] * ratios[:k] ** self.power, Vh=svd.Vh[:k])
        return Merged(flattened, norm=self.scale * mean_norm(deltas, weights))
