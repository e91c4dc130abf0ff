"""HiRA: a low-rank matrix that multiplies the base weight entry by entry."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, check_equal, check_rank, dimensions, roles_of
from merge_algos.formats.spec import EMBEDDING, LINEAR, Layer, ModuleSpec
from merge_algos.lowrank import LowRankDelta

_PLAIN, _EMBEDDING = frozenset({"A", "B"}), frozenset({"embedding_A", "embedding_B"})


class HiRA(Kind):
    """`W * (B A)`, entry by entry; A: (r, d_in) or (r, in, *kernel), B: (d_out, r, *ones). Huang et al. 2025, ICLR."""

    name = "HiRA"
    paper = "OpenReview TwJrTz9cRS"
    meaning = "the entrywise product of the base weight and B A, of linear, convolution and embedding layers"
    rank = "min(d_out, d_in)"
    peft_types = ("HIRA",)
    suffixes = MappingProxyType(
        {"hira_A": "A", "hira_B": "B", "hira_embedding_A": "embedding_A", "hira_embedding_B": "embedding_B"}
    )
    flags = frozenset("hira_dropout init_weights r rank_pattern runtime_config".split())

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        r = fields.by_pattern(config, "r", "rank_pattern", modules, otherwise=32)
        return {module: Settings(r[module]) for module in modules}

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        is_embedding = roles_of(parts, _PLAIN, _EMBEDDING) == _EMBEDDING
        of_A, of_B = _roles(EMBEDDING if is_embedding else LINEAR)
        (r, *inputs), (d_out, inner, *ones) = dimensions(parts, of_A, 2, 3, 4, 5), dimensions(parts, of_B, 2, 3, 4, 5)
        kernel = tuple(inputs[1:])
        check_equal(parts, (r, *(1 for _ in kernel)), (inner, *ones))
        check_rank(parts, settings, of_A, r)
        shape = (d_out, math.prod(inputs))
        layer = EMBEDDING if is_embedding else Layer("conv", kernel) if kernel else LINEAR
        return (ModuleSpec(parts.module, shape, min(shape), self.name, parts.names, layer=layer, needs_base=True),)

    def ground(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> Tensor:
        A, B = (tensors[role].flatten(1).float() for role in (_roles(spec.layer)))
        return W * LowRankDelta(B, A).to_dense()


def _roles(layer: Layer) -> tuple[str, str]:
    return ("embedding_A", "embedding_B") if layer == EMBEDDING else ("A", "B")
