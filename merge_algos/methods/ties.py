"""TIES-Merging: trim each task vector to its largest entries, elect a sign per entry, average what agrees."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from merge_algos.blocks import BlockMatrix, dense_rows, magnitude_threshold
from merge_algos.entries import at_least, check_finite_number, check_fraction, elect_and_merge, kept
from merge_algos.lowrank import LowRankDelta, present
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class Ties(MergeMethod):
    """TIES (Yadav et al. 2023, arXiv:2306.01708) on the entries of the deltas, never on their factors.

    density: fraction of entries kept per adapter and module, in (0, 1].  lam: factor of the result.
    Differs from the paper: weights vote and average (divide by the sum of |w| that agree), and the threshold is that of
    the module. Adapters absent from a module neither vote nor count.
    Raises InvalidParams for a density outside its range.
    """

    name = "ties"
    paper = "arXiv:2306.01708"
    memory = "dense"
    breaks = MappingProxyType(
        {
            "single adapter": "its smaller entries are trimmed away",
            "two copies": "their smaller entries are trimmed away",
            "weight scale": "the agreeing mean divides by the weights, so only their ratios count; lam is the scale",
            "linear": "the election of a sign is not linear",
        }
    )

    density: float = 0.2
    lam: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("density", self.density)
        check_finite_number("lam", self.lam)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        here = present(deltas, weights)
        keep = kept(deltas[0].shape[0] * deltas[0].shape[1], self.density)
        thresholds = [magnitude_threshold(deltas[n], keep) for n in here]

        def rows(start: int, stop: int) -> torch.Tensor:
            stack = [at_least(dense_rows(deltas[n], start, stop), t) for n, t in zip(here, thresholds, strict=True)]
            return self.lam * elect_and_merge(stack, [weights[n] for n in here])

        return Merged(BlockMatrix(deltas[0].shape, rows), {"thresholds": thresholds})
