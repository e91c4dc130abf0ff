"""BOFT: OFT with the blocks of a butterfly, and a factor for every output."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats.kind import Kind, Parts, Settings, check_equal, dimensions, roles_of
from merge_algos.formats.kinds.oft import cayley, rotated
from merge_algos.formats.spec import FLAT, ModuleSpec


class BOFT(Kind):
    """`s (W R^T) - W`, R block-diagonal with Cayley blocks; R: (1, blocks, b, b), s: (d_out, 1), of a convolution (1, d_out).

    Liu et al. 2023, arXiv:2311.06243. Of more than one butterfly factor the blocks are permuted in between, by an extension that
    only runs on CUDA: refused.
    """

    name = "BOFT"
    paper = "arXiv:2311.06243"
    meaning = "the base weight of a linear or 2d convolution layer, inputs rotated in blocks and outputs scaled, less itself"
    rank = "min(d_out, d_in)"
    peft_types = ("BOFT",)
    suffixes = MappingProxyType({"boft_R": "R", "boft_s": "s"})
    flags = frozenset("boft_block_num boft_block_size boft_dropout boft_n_butterfly_factor init_weights".split())

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        return dict.fromkeys(modules, Settings())

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        roles_of(parts, frozenset({"R", "s"}))
        (factors, blocks, side, across), of_s = dimensions(parts, "R", 4), dimensions(parts, "s", 2)
        d_out = max(of_s)
        check_equal(parts, (side, d_out), (across, math.prod(of_s)))
        if factors > 1:
            reason = f"its rotation has {factors} butterfly factors, whose permutations only PEFT's CUDA extension knows"
            raise UnsupportedAdapter(
                f"module {parts.module[:200]}", reason, "merge it into its base and take a LoRA out of the difference"
            )
        shape = d_out, blocks * side
        return (ModuleSpec(parts.module, shape, min(shape), self.name, parts.names, layer=FLAT, needs_base=True),)

    def ground(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> Tensor:
        R, s, W = tensors["R"][0].double(), tensors["s"].double().reshape(-1, 1), W.double()
        moved = cayley((R - R.mT) / 2) - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
        return (s * rotated(W, moved) + (s - 1) * W).float()
