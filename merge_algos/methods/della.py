"""DELLA: drop entries at random, small ones more often, and rescale each by its own chance of being kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from merge_algos.blocks import BlockMatrix, dense_rows, entries_shared_by, seed_of
from merge_algos.entries import Combine, check_choice, check_finite_number, check_fraction, combine, drop
from merge_algos.errors import InvalidParams
from merge_algos.lowrank import LowRankDelta, present
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class Della(MergeMethod):
    """DELLA's MagPrune (Deep et al. 2024, arXiv:2406.11617), then `combine`, by default TIES' election as in the paper.

    Within each row the entry of the lowest magnitude is kept with probability density - window/2, that of the highest with
    density + window/2, linear in rank between; what is kept is divided by its own probability, so E[della] is unbiased
    before the election.  density: mean probability of being kept.  window: width; all probabilities must lie in (0, 1].
    lam: factor of the result.
    """

    name = "della"
    version = 2  # 2: blocks, which masks are drawn by, are smaller where more than 8 adapters share them
    paper = "arXiv:2406.11617"
    memory = "dense"
    breaks = MappingProxyType(
        {
            "single adapter": "entries are dropped at random; only on average does it come back",
            "two copies": "entries are dropped at random; only on average are they the adapter",
            "opposites": "each copy has a mask of its own",
            "permutation": "the mask belongs to the position, so that a recipe always draws the same",
            "weight scale": "the agreeing mean divides by the weights, so only their ratios count; lam is the scale",
            "linear": "the election of a sign is not linear",
        }
    )

    density: float = 0.5
    window: float = 0.4
    combine: Combine = "ties"
    lam: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("density", self.density)
        check_choice("combine", self.combine, ("sum", "ties"))
        check_finite_number("lam", self.lam)
        check_finite_number("window", self.window, least=0.0)
        if self.density - self.window / 2 <= 0 or self.density + self.window / 2 > 1:
            raise InvalidParams("parameters.window", f"{self.window} around a density of {self.density} leaves (0, 1]")

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        here = present(deltas, weights)

        def dropped(n: int, start: int, stop: int) -> Tensor:
            block = dense_rows(deltas[n], start, stop)
            return drop(block, self.chances(block), seed_of(context.seed, context.module, n, start))

        def rows(start: int, stop: int) -> Tensor:
            stack = [dropped(n, start, stop) for n in here]
            return self.lam * combine(stack, [weights[n] for n in here], self.combine)

        return Merged(BlockMatrix(deltas[0].shape, rows, entries_shared_by(len(here))))

    def chances(self, block: Tensor) -> Tensor:
        """Probability of being kept, per entry of (rows, cols), from its rank by magnitude in its row."""
        order = block.abs().argsort(dim=1, stable=True)
        columns = block.shape[1]
        ladder = torch.linspace(-0.5, 0.5, columns) if columns > 1 else torch.zeros(1)
        rungs = (self.density + self.window * ladder).to(block)
        return torch.empty_like(block).scatter_(1, order, rungs.expand_as(block).contiguous())
