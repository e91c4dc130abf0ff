"""PEFT's `linear`: the factors are added, not the deltas. Here for people who need its numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from merge_algos.errors import InvalidParams
from merge_algos.lowrank import LowRankDelta, present
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class PeftLinear(MergeMethod):
    """`(sum_i sqrt|w_i| B_i) (sum_i sign(w_i) sqrt|w_i| A_i)`, as PEFT (Mangrulkar et al. 2022)
    computes it for `add_weighted_adapter(combination_type="linear")`.

    It has cross terms `B_i A_j`, so its error against the sum of the deltas is about as large as the sum, and it changes
    when an adapter's factors are written differently. Equal to PEFT where the adapters' scalings are equal, which PEFT
    spreads over both factors; ranks must be equal, as there. Use `task_arithmetic` unless you need these very numbers.
    """

    name = "peft_linear"
    paper = "PEFT (Mangrulkar et al. 2022)"
    breaks = MappingProxyType(
        {
            "gauge": "factors are added, so it matters how each delta is factored",
            "two copies": "the cross terms double it: sqrt(1/2) twice in each factor",
            "linear": "cross terms carry sqrt(w_i w_j)",
        }
    )

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        here = present(deltas, weights)
        if len({deltas[n].rank for n in here}) > 1:
            raise InvalidParams("adapters", f"peft_linear adds factors, so all ranks must be equal in {context.module}")
        roots = torch.tensor([abs(weights[n]) ** 0.5 for n in here], dtype=deltas[0].B.dtype, device=deltas[0].B.device)
        signs = torch.tensor([-1.0 if weights[n] < 0 else 1.0 for n in here]).to(roots)
        B = torch.tensordot(roots, torch.stack([deltas[n].B for n in here]), 1)
        A = torch.tensordot(signs * roots, torch.stack([deltas[n].A for n in here]), 1)
        return Merged(LowRankDelta(B, A))
