"""LoCon with a core: a convolution's factors with a small convolution between them (LyCORIS' `use_tucker`)."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_algos.formats.kind import Kind, Parts, Settings, check_equal, dimensions, roles_of
from merge_algos.formats.spec import Layer, ModuleSpec
from merge_algos.lowrank import LowRankDelta

_ROLES = frozenset({"lora_A", "lora_B", "lora_mid"})


class LoCon(Kind):
    """`lora_B core lora_A`. lora_A: (r, in, 1, 1), lora_mid: (r, r, h, w), lora_B: (out, r, 1, 1), so the delta has rank r.

    Yeh et al. 2023, arXiv:2309.14859, section 3: CP and Tucker forms of a convolution's update.
    """

    name = "LoCon"
    paper = "arXiv:2309.14859"
    meaning = "`s B core A` of a convolution, core a convolution from r to r channels"
    rank = "r"
    peft_types = ()
    suffixes = MappingProxyType({"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "lora_mid.weight": "lora_mid"})
    flags = frozenset()

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        raise AssertionError("no adapter_config.json names this kind")

    def recognises(self, roles: frozenset[str]) -> bool:
        return roles == _ROLES

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        roles_of(parts, _ROLES)
        r, d_in, *ones_A = dimensions(parts, "lora_A", 4)
        d_out, inner, *ones_B = dimensions(parts, "lora_B", 4)
        check_equal(parts, (r, 1, 1, 1, 1), (inner, *ones_A, *ones_B))
        out_r, in_r, *kernel = dimensions(parts, "lora_mid", 4)
        check_equal(parts, (r, r), (out_r, in_r))
        size = kernel[0] * kernel[1]
        return (ModuleSpec(parts.module, (d_out, d_in * size), r, self.name, parts.names, layer=Layer("conv", tuple(kernel))),)

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        down, core = tensors["lora_A"].flatten(1).float(), tensors["lora_mid"].float()
        A = torch.einsum("abhw,bi->aihw", core, down)
        return LowRankDelta(tensors["lora_B"].flatten(1).float(), A.flatten(1))
