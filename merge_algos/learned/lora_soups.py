"""LoRA Soups: per matrix the adapters are averaged, with learned shares."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merge_algos.learn.layout import Layout
from merge_algos.learn.method import Learned


@dataclass(frozen=True)
class LoraSoups(Learned):
    """Learned concatenation (Prabhakar et al. 2024, arXiv:2410.13025): in every block the shares are a softmax, so they sum to 1.

    Begins at equal shares. `weight` of an adapter multiplies its share: a weight of n for all adapters makes them sum to n.
    """

    name = "lora_soups"
    paper = "arXiv:2410.13025"

    init: float | Literal["tuned"] = 0.0

    def coefficients(self, layout: Layout, theta: Tensor) -> Tensor:
        peak = torch.full((int(layout.group.max()) + 1,), -torch.inf).scatter_reduce(0, layout.group, theta.detach(), "amax")
        powers = (theta - peak[layout.group]).exp()
        sums = torch.zeros_like(peak).index_add(0, layout.group, powers)
        return powers / sums[layout.group]
