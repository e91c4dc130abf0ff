"""MiSS, once called Bone: one small block added to every stretch of the input."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, bounded, check_equal, check_rank, dimensions, roles_of
from merge_algos.formats.spec import ModuleSpec, Shape
from merge_algos.lowrank import LowRankDelta

_ROLES = frozenset({"block"})


class MiSS(Kind):
    """`block^T [I I I ..]`, cut to d_in columns; block: (r, d_out), in `mini` (r, mini_r) side by side. arXiv:2409.15371.

    The file does not say d_in, in `mini` neither d_out. In `bat` there is a block (r, r) for every r outputs, block: (d_out / r,
    r, r), and the base weight cut into squares W_jk (r, r) gets `W_jk block_j + block_j`.
    """

    name = "MiSS"
    paper = "arXiv:2409.15371"
    meaning = "the block of the default and the mini variant on every stretch of r inputs; shapes come from another adapter"
    rank = "r"
    peft_types = ("MISS", "BONE")
    suffixes = MappingProxyType({"miss_block": "block", "bone_block": "block"})
    flags = frozenset("init_weights mini_r miss_dropout r".split())

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        variant = config.get("init_weights")
        if variant not in ("mini", "bat") and not isinstance(variant, bool | None):
            subject = f"adapter_config.json: init_weights {str(variant)[:100]!r}"
            raise UnsupportedAdapter(subject, "this variant is unknown", "convert it to LoRA first (peft.convert_to_lora)")
        r = fields.positive("r", config.get("r", 64))
        return dict.fromkeys(modules, Settings(r, constants={"variant": variant}))

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        roles_of(parts, _ROLES)
        squares = settings.constants["variant"] == "bat"
        *count, r, width = dimensions(parts, "block", 3 if squares else 2)
        check_rank(parts, settings, "block", r)
        if squares:
            check_equal(parts, (*count, r, r), (*count, r, width))
        constants = {"width": math.prod(count) * width, **settings.constants}
        return (ModuleSpec(parts.module, None, r, self.name, parts.names, constants=constants, needs_base=squares),)

    def complete(self, spec: ModuleSpec, shape: Shape) -> ModuleSpec:
        d_out, d_in = shape
        width, variant = spec.constants["width"], spec.constants["variant"]
        fits = d_out % width == 0 if variant == "mini" else d_out == width
        if not fits or spec.r > d_in or (variant == "bat" and d_in % spec.r):
            raise ShapeMismatch(spec.name, shape, (width, spec.r))
        if variant == "bat":
            return replace(spec, shape=shape, r=min(shape))
        return bounded(replace(spec, shape=shape))

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        assert spec.shape is not None
        d_out, d_in = spec.shape
        block = tensors["block"].float()
        stretches = torch.eye(spec.r, device=block.device).repeat(1, -(-d_in // spec.r))[:, :d_in]
        return LowRankDelta(block.repeat(1, d_out // block.shape[1]).mT, stretches)

    def ground(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> Tensor:
        block = tensors["block"].double()
        rows, side = block.shape[:2]
        squares = W.double().reshape(rows, side, -1, side).transpose(1, 2)  # (d_out / r, d_in / r, r, r)
        moved = squares @ block[:, None] + block[:, None]
        return moved.transpose(1, 2).reshape(W.shape).float()
