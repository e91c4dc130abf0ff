"""GraLoRA: a grid of low-rank blocks, perhaps with a LoRA over the whole."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_algos.errors import ShapeMismatch
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, bounded, check_equal, check_rank, dimensions, roles_of
from merge_algos.formats.spec import ModuleSpec
from merge_algos.lowrank import LowRankDelta, concat

_BLOCKS = frozenset({"A", "B"})
_HYBRID = _BLOCKS | {"general_A", "general_B"}


class GraLoRA(Kind):
    """Block (j, n) of k x k is `alpha/(r + hybrid_r) * sum_s B[j, n q + s] A[n, :, j q + s]^T`, q = r/k. arXiv:2505.20355.

    A: (k, d_in/k, r), B: (k, r, d_out/k), general_A: (hybrid_r, d_in), general_B: (d_out, hybrid_r). Exact at
    rank k r + hybrid_r: the k^2 q rank-one terms of all blocks.
    """

    name = "GraLoRA"
    paper = "arXiv:2505.20355"
    meaning = "a grid of k x k low-rank blocks, with the hybrid's LoRA over the whole"
    rank = "k * r + hybrid_r"
    peft_types = ("GRALORA",)
    suffixes = MappingProxyType(
        {
            "gralora_A": "A",
            "gralora_B": "B",
            "gralora_A_general.weight": "general_A",
            "gralora_B_general.weight": "general_B",
        }
    )
    flags = frozenset("alpha gralora_dropout gralora_k hybrid_r init_weights r".split())

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        r = fields.positive("r", config.get("r", 32))
        k = fields.positive("gralora_k", config.get("gralora_k", 2))
        hybrid = fields.number("hybrid_r", config.get("hybrid_r", 0))
        alpha = fields.number("alpha", config.get("alpha", 64))
        return dict.fromkeys(modules, Settings(r, alpha, constants={"k": k, "hybrid": hybrid}))

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        hybrid = roles_of(parts, _BLOCKS, _HYBRID) == _HYBRID
        (k, wide, r), (count, inner, tall) = dimensions(parts, "A", 3), dimensions(parts, "B", 3)
        check_equal(parts, (k, r), (count, inner))
        check_rank(parts, settings, "A", r)
        d_out, d_in = k * tall, k * wide
        extra = dimensions(parts, "general_A", 2)[0] if hybrid else 0
        if k != settings.constants["k"] or extra != settings.constants["hybrid"] or r % k:
            raise ShapeMismatch(parts.module, (int(settings.constants["k"]), wide, r), (k, wide, r))
        for role, expected in (("general_A", (extra, d_in)), ("general_B", (d_out, extra))) if hybrid else ():
            check_equal(parts, expected, dimensions(parts, role, 2))
        scaling = (settings.alpha or 0.0) / (r + extra)
        spec = ModuleSpec(parts.module, (d_out, d_in), k * r + extra, self.name, parts.names, scaling)
        return (bounded(spec),)

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        assert spec.shape is not None
        d_out, d_in = spec.shape
        A, B = tensors["A"].float(), tensors["B"].float() * spec.scaling
        k, wide, r = A.shape
        each = torch.eye(k, device=A.device)
        # a term is (j, n, s): rows of A are zero outside of input block n, columns of B outside of output block j
        rows = torch.einsum("nijs,nm->jnsmi", A.reshape(k, wide, k, r // k), each).reshape(k * r, d_in)
        columns = torch.einsum("jnso,jm->mojns", B.reshape(k, k, r // k, d_out // k), each).reshape(d_out, k * r)
        blocks = LowRankDelta(columns, rows)
        if "general_A" not in tensors:
            return blocks
        return concat([blocks, LowRankDelta(tensors["general_B"].float() * spec.scaling, tensors["general_A"].float())])
