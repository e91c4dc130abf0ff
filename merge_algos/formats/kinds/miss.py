"""MiSS: one small block added to every stretch of the input."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, bounded, check_rank, dimensions, roles_of
from merge_algos.formats.spec import ModuleSpec, Shape
from merge_algos.lowrank import LowRankDelta

_ROLES = frozenset({"block"})


class MiSS(Kind):
    """`block^T [I I I ..]`, cut to d_in columns; block: (r, d_out), in `mini` (r, mini_r) side by side. arXiv:2409.15371.

    The file does not say d_in, in `mini` neither d_out. The `bat` variant multiplies by the base weights.
    """

    name = "MiSS"
    paper = "arXiv:2409.15371"
    meaning = "the block of the default and the mini variant on every stretch of r inputs; shapes come from another adapter"
    rank = "r"
    peft_types = ("MISS",)
    suffixes = MappingProxyType({"miss_block": "block"})
    flags = frozenset("init_weights mini_r miss_dropout r".split())

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        variant = config.get("init_weights")
        if variant != "mini" and not isinstance(variant, bool | None):
            reason = "this variant multiplies its blocks by the base weights" if variant == "bat" else "this variant is unknown"
            subject = f"adapter_config.json: init_weights {str(variant)[:100]!r}"
            raise UnsupportedAdapter(subject, reason, "convert it to LoRA first (peft.convert_to_lora)")
        r = fields.positive("r", config.get("r", 64))
        return dict.fromkeys(modules, Settings(r, constants={"mini": variant == "mini"}))

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        roles_of(parts, _ROLES)
        r, width = dimensions(parts, "block", 2)
        check_rank(parts, settings, "block", r)
        constants = {"width": width, **settings.constants}
        return (ModuleSpec(parts.module, None, r, self.name, parts.names, constants=constants),)

    def complete(self, spec: ModuleSpec, shape: Shape) -> ModuleSpec:
        d_out, d_in = shape
        width = spec.constants["width"]
        fits = d_out % width == 0 if spec.constants["mini"] else d_out == width
        if not fits or spec.r > d_in:
            raise ShapeMismatch(spec.name, shape, (width, spec.r))
        return bounded(ModuleSpec(spec.name, shape, spec.r, spec.kind, spec.tensors, constants=spec.constants))

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        assert spec.shape is not None
        d_out, d_in = spec.shape
        block = tensors["block"].float()
        stretches = torch.eye(spec.r, device=block.device).repeat(1, -(-d_in // spec.r))[:, :d_in]
        return LowRankDelta(block.repeat(1, d_out // block.shape[1]).mT, stretches)
