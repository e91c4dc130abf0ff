"""NP-LoRA: the second adapter gives way where it reads the same input directions as the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from merge_algos.entries import check_finite_number
from merge_algos.lowrank import LowRankDelta, numerical_rank, present, thin_qr, weighted_sum
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class NpLora(MergeMethod):
    """NP-LoRA (Chen et al. 2025, arXiv:2511.11051), for two adapters in order: `w_1 delta_1 + w_2 delta_2 (I - c V V^T)`.

    V: orthonormal basis of the first adapter's row space.  c = mu / (1 + mu).  mu: strength of the projection, 0 for plain
    task arithmetic, large for a full null-space projection. Rank r_1 + r_2. Weight 0 gives no precedence.
    """

    name = "np_lora"
    paper = "arXiv:2511.11051"
    min_adapters = 2
    max_adapters = 2
    breaks = MappingProxyType(
        {
            "two copies": "the second copy gives way to the first",
            "opposites": "the second copy gives way to the first",
            "permutation": "the first adapter has precedence",
        }
    )

    mu: float = 0.5

    def __post_init__(self) -> None:
        check_finite_number("mu", self.mu, least=0.0)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        if len(present(deltas, weights)) < 2:
            return Merged(weighted_sum(deltas, weights))
        first, second = deltas
        _, S, Vh = torch.linalg.svd(_row_space(first), full_matrices=False)
        Vh = Vh[: numerical_rank(S)]
        A = second.A.double()
        softened = A - self.mu / (1 + self.mu) * (A @ Vh.mT) @ Vh
        return Merged(weighted_sum([first, LowRankDelta(second.B, softened.to(second.A.dtype))], weights))


def _row_space(delta: LowRankDelta) -> torch.Tensor:
    """(rank, d_in) with the row space of `B A`: of A alone only where B has full rank, so R_B A."""
    _, R = thin_qr(delta.B.double())
    return R @ delta.A.double()
