"""DARE: drop entries at random, rescale the rest so that nothing changes on average, then add or elect."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from merge_algos.blocks import BlockMatrix, dense_rows, entries_shared_by, seed_of
from merge_algos.entries import Combine, check_choice, check_fraction, combine, drop
from merge_algos.lowrank import LowRankDelta, present
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class Dare(MergeMethod):
    """DARE (Yu et al. 2023, arXiv:2311.03099): each entry is kept with probability `density` and divided by it.

    combine: `sum` (weighted) or `ties` (elect a sign, average what agrees).  The mask of an adapter is drawn from
    (seed, module, position, row block) on the CPU, so neither device nor schedule changes it.
    """

    name = "dare"
    version = 2  # 2: blocks, which masks are drawn by, are smaller where more than 8 adapters share them
    paper = "arXiv:2311.03099"
    memory = "dense"
    breaks = MappingProxyType(
        {
            "single adapter": "entries are dropped at random; only on average does it come back",
            "two copies": "entries are dropped at random; only on average are they the adapter",
            "opposites": "each copy has a mask of its own",
            "permutation": "the mask belongs to the position, so that a recipe always draws the same",
        }
    )

    density: float = 0.5
    combine: Combine = "sum"

    def __post_init__(self) -> None:
        check_fraction("density", self.density)
        check_choice("combine", self.combine, ("sum", "ties"))

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        here = present(deltas, weights)

        def dropped(n: int, start: int, stop: int) -> torch.Tensor:
            seed = seed_of(context.seed, context.module, n, start)
            return drop(dense_rows(deltas[n], start, stop), self.density, seed)

        def rows(start: int, stop: int) -> torch.Tensor:
            stack = [dropped(n, start, stop) for n in here]
            return combine(stack, [weights[n] for n in here], self.combine)

        return Merged(BlockMatrix(deltas[0].shape, rows, entries_shared_by(len(here))))
