"""LoKr: a Kronecker product, whose low-rank factors are the Kronecker products of the factors of its two sides."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from merge_algos.formats.kind import (
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
from merge_algos.formats.kinds.loha import LoHa, by_tensor, core_layer
from merge_algos.formats.spec import FLAT, Layer, ModuleSpec
from merge_algos.lowrank import LowRankDelta

_WHOLE1, _FACTORED1 = frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"})
_WHOLE2, _FACTORED2 = frozenset({"lokr_w2"}), frozenset({"lokr_w2_a", "lokr_w2_b"})
_CORED2 = _FACTORED2 | {"lokr_t2"}
_SETS = tuple(one | two for one in (_WHOLE1, _FACTORED1) for two in (_WHOLE2, _FACTORED2, _CORED2))


class LoKr(LoHa):
    """`scaling * w1 (x) w2`; w1: (a, c), w2: (b, d) or (b, d, *kernel), d_out = a b, d_in = c d. arXiv:2309.14859.

    Either side may be the product of two factors, the second with a Tucker core. Exact at rank w1 * rank w2, where a whole side
    counts with its smaller dimension: `P1 Q1 (x) P2 Q2 = (P1 (x) P2) (Q1 (x) Q2)`; in full where that is fewer numbers.
    """

    name = "LoKr"
    paper = "arXiv:2309.14859"
    meaning = "the Kronecker product of two matrices, each whole or factored, Tucker cores of convolutions included"
    rank = "min(rank w1 * rank w2, d_out, d_in)"
    peft_types = ("LOKR",)
    suffixes = MappingProxyType(dict(zip(*[sorted(_WHOLE1 | _WHOLE2 | _FACTORED1 | _CORED2)] * 2, strict=True)))
    flags = LoHa.flags | {"decompose_both", "decompose_factor", "rank_dropout_scale"}

    def recognises(self, roles: frozenset[str]) -> bool:
        return any(roles >= complete for complete in _SETS)

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        roles_of(parts, *_SETS, optional=frozenset({"alpha"}))
        scalar(parts, "alpha")
        a, c, rank1 = _first(parts, settings)
        b, width, rank2, layer = _second(parts, settings)
        shape = a * b, c * width
        r = min(rank1 * rank2, *shape)
        scale = 1.0 if settings.r is None else scaling(settings, settings.r)
        return (bounded(ModuleSpec(parts.module, shape, r, self.name, parts.names, scale, layer)),)

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        assert spec.shape is not None
        d_out, d_in = spec.shape
        wide = {role: tensor.float() for role, tensor in tensors.items()}
        P1, Q1 = _halves(wide, "1")  # (a, i), (i, c)
        P2, Q2 = _halves(wide, "2")  # (b, j), (j, d, size of the kernel)
        P1 = P1 * (spec.scaling * by_tensor(wide, next((len(Q) for Q in _inner(wide)), 1)))
        # PEFT's Kronecker product of a Conv1d has the dimensions of the second side outermost
        turned = wide.get("lokr_w2", P1).ndim == 3
        if P1.shape[1] * P2.shape[1] > min(spec.shape):
            whole = (P1 @ Q1, torch.einsum("bj,jdk->bdk", P2, Q2))
            return in_full(torch.einsum("ac,bdk->badck" if turned else "ac,bdk->abcdk", *whole).reshape(d_out, d_in))
        left = torch.einsum("ai,bj->baij" if turned else "ai,bj->abij", P1, P2).reshape(d_out, -1)
        right = torch.einsum("ic,jdk->ijdck" if turned else "ic,jdk->ijcdk", Q1, Q2).reshape(-1, d_in)
        return LowRankDelta(left, right)


def _first(parts: Parts, settings: Settings) -> tuple[int, int, int]:
    """(a, c, rank)."""
    if "lokr_w1" in parts.shapes:
        a, c = dimensions(parts, "lokr_w1", 2)
        return a, c, min(a, c)
    (a, r), (inner, c) = dimensions(parts, "lokr_w1_a", 2), dimensions(parts, "lokr_w1_b", 2)
    check_equal(parts, (r, c), (inner, c))
    check_rank(parts, settings, "lokr_w1_b", r)
    return a, c, r


def _second(parts: Parts, settings: Settings) -> tuple[int, int, int, Layer]:
    """(b, d times the size of the kernel, rank, layer)."""
    if "lokr_w2" in parts.shapes:
        b, d, *kernel = dimensions(parts, "lokr_w2", 2, 3, 4)
        width = d * math.prod(kernel)
        return b, width, min(b, width), Layer("conv", tuple(kernel)) if kernel else FLAT
    left, right = dimensions(parts, "lokr_w2_a", 2), dimensions(parts, "lokr_w2_b", 2)
    r, width = right
    b = left[1] if "lokr_t2" in parts.shapes else left[0]
    check_equal(parts, (r, b) if "lokr_t2" in parts.shapes else (b, r), left)
    check_rank(parts, settings, "lokr_w2_b", r)
    layer = core_layer(parts, ("lokr_t2",), r) if "lokr_t2" in parts.shapes else FLAT
    return b, width * layer.size, r, layer


def _halves(tensors: Mapping[str, Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Two factors of one side: (rows, rank) and, of the first, (rank, columns), of the second (rank, d, size of the kernel)."""
    if f"lokr_w{side}" in tensors:
        W = tensors[f"lokr_w{side}"]
        flat = W.flatten(1)
        whole = in_full(flat)
        left, right = whole.B, whole.A
        return left, right if side == "1" else right.reshape(len(right), W.shape[1], -1)
    left, right = tensors[f"lokr_w{side}_a"], tensors[f"lokr_w{side}_b"]
    if f"lokr_t{side}" in tensors:
        return left.mT, torch.einsum("ijkl,js->iskl", tensors[f"lokr_t{side}"], right).flatten(2)
    return left, right if side == "1" else right[:, :, None]


def _inner(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The factors whose rows are as many as the rank."""
    return [tensors[role] for role in ("lokr_w1_b", "lokr_w2_b") if role in tensors]
