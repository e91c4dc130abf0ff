"""LoHa: the Hadamard product of two low-rank matrices, itself of low rank."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import (
    Kind,
    Parts,
    Settings,
    bounded,
    check_equal,
    check_rank,
    dimensions,
    in_full,
    roles_of,
    scalar,
    scaling,
)
from merge_algos.formats.spec import FLAT, Layer, ModuleSpec
from merge_algos.lowrank import LowRankDelta

_FACTORS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_CORES = _FACTORS | {"hada_t1", "hada_t2"}


class LoHa(Kind):
    """`scaling * (w1_a w1_b) o (w2_a w2_b)`; w_a: (d_out, r), w_b: (r, d_in). Hyeon-Woo et al. 2021, arXiv:2108.06098.

    Exact at rank r^2: columns `w1_a[:, i] o w2_a[:, j]`, rows `w1_b[i] o w2_b[j]` (Khatri-Rao); as the matrix itself and an
    identity where that is fewer numbers. With Tucker cores t: (r, r, kh, kw) the factors are w_a: (r, out), w_b: (r, in), and
    the core is first taken into w_b.
    """

    name = "LoHa"
    paper = "arXiv:2108.06098"
    meaning = "the Hadamard product of two low-rank matrices as a Khatri-Rao product, Tucker cores of convolutions included"
    rank = "min(r^2, d_out, d_in)"
    peft_types = ("LOHA",)
    suffixes = MappingProxyType(dict(zip(*[sorted(_CORES)] * 2, strict=True)))
    flags = frozenset("alpha alpha_pattern init_weights module_dropout r rank_dropout rank_pattern use_effective_conv2d".split())

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        r = fields.by_pattern(config, "r", "rank_pattern", modules)
        alpha = fields.by_pattern(config, "alpha", "alpha_pattern", modules)
        return {module: Settings(fields.positive("r", r[module]), alpha[module]) for module in modules}

    def recognises(self, roles: frozenset[str]) -> bool:
        return roles >= _FACTORS

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        cored = roles_of(parts, _FACTORS, _CORES, optional=frozenset({"alpha"})) == _CORES
        a, b = dimensions(parts, "hada_w1_a", 2), dimensions(parts, "hada_w1_b", 2)
        (d_out, r), width = (a[::-1] if cored else a), b[1]
        for number in "12":
            check_equal(parts, (r, d_out) if cored else (d_out, r), dimensions(parts, f"hada_w{number}_a", 2))
            check_equal(parts, (r, width), dimensions(parts, f"hada_w{number}_b", 2))
        check_rank(parts, settings, "hada_w1_b", r)
        layer = core_layer(parts, ("hada_t1", "hada_t2"), r) if cored else FLAT
        scalar(parts, "alpha")
        d_in = width * layer.size
        rank = min(r * r, d_out, d_in)
        spec = ModuleSpec(parts.module, (d_out, d_in), rank, self.name, parts.names, scaling(settings, r), layer)
        return (bounded(spec),)

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        assert spec.shape is not None
        wide = {role: tensor.float() for role, tensor in tensors.items()}
        (left1, right1), (left2, right2) = (_pair(wide, number) for number in "12")
        r = len(right1)
        left1 = left1 * spec.scaling * by_tensor(wide, r)
        if r * r > min(spec.shape):
            return in_full((left1 @ right1) * (left2 @ right2))
        return LowRankDelta(khatri_rao(left1.mT, left2.mT).mT, khatri_rao(right1, right2))


def khatri_rao(X: Tensor, Y: Tensor) -> Tensor:
    """(p q, n): the products of every row of X (p, n) with every row of Y (q, n), the rows of Y innermost."""
    return (X[:, None] * Y[None]).flatten(0, 1)


def by_tensor(tensors: Mapping[str, Tensor], r: int) -> float:
    """alpha / r where the file holds alpha, else 1."""
    return float(tensors["alpha"].item()) / r if "alpha" in tensors else 1.0


def core_layer(parts: Parts, cores: Sequence[str], r: int) -> Layer:
    """The convolution that Tucker cores of (r, r, kh, kw) are for. Raises UnsupportedAdapter where that is two."""
    kernel = dimensions(parts, cores[0], 4)[2:]
    for core in cores:
        check_equal(parts, (r, r, *kernel), dimensions(parts, core, 4))
    if kernel[1] == 1:
        reason = "its core is that of a Conv1d as well as of a Conv2d, and the file does not say which"
        raise UnsupportedAdapter(f"module {parts.module[:200]}", reason, "train it without use_effective_conv2d")
    return Layer("conv", kernel)


def _pair(tensors: Mapping[str, Tensor], number: str) -> tuple[Tensor, Tensor]:
    """(d_out, r) and (r, d_in), a core taken into the right one."""
    left, right = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
    if f"hada_t{number}" not in tensors:
        return left, right
    return left.mT, torch.einsum("ijkl,js->iskl", tensors[f"hada_t{number}"], right).flatten(1)
