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
    """`s (W R_1^T .. R_m^T) - W`, R_i block-diagonal with Cayley blocks between a permutation and its inverse.

    Liu et al. 2023, arXiv:2311.06243. R: (m, blocks, b, b), s: (d_out, 1), of a convolution (1, d_out). The i-th permutation puts
    the even half-blocks of every 2^i blocks before the odd ones, so that a factor mixes what the one before kept apart.
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
        if factors > 1 and (side % 2 or blocks % 2 ** (factors - 1)):
            reason = f"{blocks} blocks of {side} have no {factors} butterfly factors"
            raise UnsupportedAdapter(f"tensor {parts.names['R'][:200]}", reason, "check how the adapter was saved")
        shape = d_out, blocks * side
        return (ModuleSpec(parts.module, shape, min(shape), self.name, parts.names, layer=FLAT, needs_base=True),)

    def ground(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> Tensor:
        R, s, W = tensors["R"].double(), tensors["s"].double().reshape(-1, 1), W.double()
        added = rotated(W, _moved(R[0]))  # the first factor permutes nothing
        for factor, own in enumerate(R[1:], 1):
            order = _permuted(len(own), own.shape[-1], factor).to(W.device)
            added = added + rotated((W + added)[:, order.argsort()], _moved(own))[:, order]
        return (s * added + (s - 1) * W).float()


def _moved(blocks: Tensor) -> Tensor:
    """What the rotations of blocks (n, side, side) differ from the identity by."""
    return cayley((blocks - blocks.mT) / 2) - torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)


def _permuted(blocks: int, side: int, factor: int) -> Tensor:
    """(blocks * side,): of every input where it comes from."""
    halves = torch.arange(blocks * side).reshape(blocks >> factor, -1, 2, side // 2)
    return halves.transpose(1, 2).flatten()
