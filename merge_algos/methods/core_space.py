"""Core space merging: any merge of small matrices, in bases that all adapters share exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from merge_algos.core import Core, present_cores
from merge_algos.entries import check_choice, check_finite_number, check_fraction, elect_and_merge, weighted
from merge_algos.lowrank import SVD, LowRankDelta, size_of
from merge_algos.magnitudes import trim
from merge_algos.methods.iso_c import isotropic
from merge_algos.methods.tsv import orthogonalised
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class CoreSpace(MergeMethod):
    """Core space (Panariello et al. 2025, arXiv:2509.17786): `delta_i = U M_i V^T` exactly, merge the M_i, lift the result.

    inner: `ties` (trim to `density`, elect, average), `tsv` or `iso` on the cores.  lam: factor of the result.
    Adapters are canonicalised first, or the entry-wise inner merge would depend on how their factors happen to be
    written. Rank at most R.
    """

    name = "core_space"
    version = 2  # 2: a cut takes (of iso) equal singular values in the order they had, not as rounding has it
    paper = "arXiv:2509.17786"
    breaks = MappingProxyType(
        {
            "single adapter": "entries of the core are trimmed away",
            "two copies": "entries of the core are trimmed away",
            "weight scale": "the agreeing mean divides by the weights, so only their ratios count; lam is the scale",
            "linear": "the election of a sign is not linear",
        }
    )

    inner: Literal["ties", "tsv", "iso"] = "ties"
    density: float = 0.2
    lam: float = 1.0

    def __post_init__(self) -> None:
        check_choice("inner", self.inner, ("ties", "tsv", "iso"))
        check_fraction("density", self.density)
        check_finite_number("lam", self.lam)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        core, here = present_cores(deltas, weights)
        merged = self._merge_cores(core, here, size_of(deltas, weights))
        return Merged(core.lift(merged).scale(self.lam), {"core": [len(half) for half in core.halves[0]]})

    def _merge_cores(self, core: Core, weights: Sequence[float], size: float) -> Tensor | SVD:
        if self.inner == "ties":
            return elect_and_merge([trim(M, self.density) for M in core.M], weights)
        if self.inner == "iso":
            return isotropic(weighted(list(core.M), weights), size)
        return orthogonalised(core, weights)
