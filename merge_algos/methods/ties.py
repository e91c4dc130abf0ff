"""TIES-Merging: trim each task vector to its largest entries, elect a sign per entry, average what agrees."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

from merge_algos.blocks import BlockMatrix, dense_rows, entries_shared_by
from merge_algos.entries import at_least, check_choice, check_finite_number, check_fraction, elect_and_merge, kept
from merge_algos.lowrank import LowRankDelta, present
from merge_algos.magnitudes import (
    is_found,
    magnitude_threshold,
    model_threshold,
    pooled_counts,
    settled_counts,
    survey_counts,
)
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class Ties(MergeMethod):
    """TIES (Yadav et al. 2023, arXiv:2306.01708) on the entries of the deltas, never on their factors.

    density: fraction of entries kept per adapter, in (0, 1].  lam: factor of the result.
    trim: `module` keeps that fraction in every module, `model` of the adapter as a whole (the paper), which takes two passes
    over all modules before the first is merged: modules
    of large entries then keep more than modules of small ones.
    Differs from the paper: weights vote and average (divide by the sum of |w| that agree). Adapters absent from a module, or
    of weight 0 in it, neither vote nor count.
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
    trim: Literal["module", "model"] = "module"

    def __post_init__(self) -> None:
        check_fraction("density", self.density)
        check_finite_number("lam", self.lam)
        check_choice("trim", self.trim, ("module", "model"))

    def unsettled(self, known: Any) -> bool:
        return self.trim == "model" and not is_found(known)

    def survey(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Any:
        return survey_counts(deltas, present(deltas, weights), context.known)

    def pool(self, left: Any, right: Any) -> Any:
        return pooled_counts(left, right)

    def settle(self, findings: Any, known: Any) -> Any:
        return settled_counts(findings, known, self.density)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        here = present(deltas, weights)
        thresholds = [self._threshold(deltas[n], n, context) for n in here]

        def rows(start: int, stop: int) -> torch.Tensor:
            stack = [at_least(dense_rows(deltas[n], start, stop), t) for n, t in zip(here, thresholds, strict=True)]
            return self.lam * elect_and_merge(stack, [weights[n] for n in here])

        return Merged(BlockMatrix(deltas[0].shape, rows, entries_shared_by(len(here))), {"thresholds": thresholds})

    def _threshold(self, delta: LowRankDelta, n: int, context: ModuleContext) -> float:
        if self.trim == "model":
            return model_threshold(context.known, n)
        return magnitude_threshold(delta, kept(delta.shape[0] * delta.shape[1], self.density))
