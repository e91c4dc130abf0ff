"""OFT: the inputs of the base weight in blocks, each block rotated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_algos.errors import InvalidParams, ShapeMismatch
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, dimensions, roles_of
from merge_algos.formats.spec import EMBEDDING, FLAT, ModuleSpec, Shape

_MAX_TERMS = 100  # of which each is a product of every block


class OFT(Kind):
    """`W R^T - W`, of an embedding `R^T W - W`; R block-diagonal, each block the Cayley transform of a skew-symmetric matrix.

    Qiu et al. 2023, arXiv:2306.07280. R: (blocks, b (b - 1) / 2), what is above the diagonals.  use_cayley_neumann: a truncated
    series in its place, so that R is orthogonal only nearly.  coft: no block is further from the identity than eps.
    block_share: one block for all.
    """

    name = "OFT"
    paper = "arXiv:2306.07280"
    meaning = "the base weight with blocks of its inputs rotated, of an embedding its outputs, less itself"
    rank = "min(d_out, d_in)"
    peft_types = ("OFT",)
    suffixes = MappingProxyType({"oft_R.weight": "R", "oft_embedding_R.weight": "embedding_R"})
    flags = frozenset(
        "block_share coft eps init_weights module_dropout num_cayley_neumann_terms oft_block_size r use_cayley_neumann".split()
    )

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        terms = fields.positive("num_cayley_neumann_terms", config.get("num_cayley_neumann_terms", 5))
        if terms > _MAX_TERMS:
            raise InvalidParams("adapter_config.json: num_cayley_neumann_terms", f"must be {_MAX_TERMS} at most")
        has_series = fields.flag(config, "use_cayley_neumann") if "use_cayley_neumann" in config else True
        farthest = fields.number("eps", config.get("eps", 6e-5)) if fields.flag(config, "coft") else None
        shared = fields.flag(config, "block_share")
        constants = {"terms": int(terms) if has_series else None, "eps": farthest, "block_share": shared}
        return dict.fromkeys(modules, Settings(constants=constants))

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        (role,) = roles_of(parts, frozenset({"R"}), frozenset({"embedding_R"}))
        blocks, above = dimensions(parts, role, 2)
        side = (1 + math.isqrt(1 + 8 * above)) // 2
        if side * (side - 1) // 2 != above:
            raise ShapeMismatch(parts.module, (blocks, side * (side - 1) // 2), (blocks, above))
        constants = {**settings.constants, "side": side, "blocks": blocks}
        layer = FLAT if role == "R" else EMBEDDING
        # the rank is the layer's, which only its shape says
        spec = ModuleSpec(parts.module, None, blocks * side, self.name, parts.names, layer=layer, constants=constants)
        return (replace(spec, needs_base=True),)

    def complete(self, spec: ModuleSpec, shape: Shape) -> ModuleSpec:
        side, blocks, shared = (spec.constants[key] for key in ("side", "blocks", "block_share"))
        width = shape[0] if spec.layer == EMBEDDING else shape[1]
        fits = width % side == 0 and blocks == 1 if shared else width == side * blocks
        if not fits:
            expected = (side * blocks, shape[1]) if spec.layer == EMBEDDING else (shape[0], side * blocks)
            raise ShapeMismatch(spec.name, expected, shape)
        return replace(spec, shape=shape, r=min(shape))

    def ground(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> Tensor:
        (above,) = tensors.values()
        Q = skew(above.double(), spec.constants["side"])
        if spec.constants["eps"] is not None:
            Q = _near(Q, spec.constants["eps"] / math.sqrt(len(Q)))
        moved = _rotation(Q, spec.constants["terms"]) - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        if spec.layer == EMBEDDING:
            return rotated(W.mT.double(), moved.mT).mT.float()
        return rotated(W.double(), moved).float()


def skew(above: Tensor, side: int) -> Tensor:
    """(n, side, side), skew-symmetric. above: (n, side (side - 1) / 2), row by row."""
    rows, columns = torch.triu_indices(side, side, 1)
    Q = above.new_zeros(len(above), side, side)
    Q[:, rows, columns] = above
    return Q - Q.mT


def cayley(Q: Tensor) -> Tensor:
    """`(I - Q) (I + Q)^-1` of each skew-symmetric Q (n, side, side): a rotation."""
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    R: Tensor = torch.linalg.solve(identity + Q, identity - Q, left=False)
    return R


def rotated(W: Tensor, blocks: Tensor) -> Tensor:
    """`W M^T`, M the block-diagonal matrix of `blocks` (n, side, side), or of as many copies of the only one as fit."""
    d_out, d_in = W.shape
    side = blocks.shape[-1]
    parts = W.reshape(d_out, d_in // side, side)
    return torch.einsum("onk,nck->onc", parts, blocks.expand(d_in // side, side, side)).reshape(d_out, d_in)


def _near(Q: Tensor, farthest: float) -> Tensor:
    norms = torch.linalg.matrix_norm(Q, keepdim=True)
    return Q * torch.where(norms <= farthest, 1.0, farthest / norms.clamp(min=torch.finfo(Q.dtype).tiny))


def _rotation(Q: Tensor, terms: int | None) -> Tensor:
    """terms: None for the transform itself, else of its series `I + 2 Q + 2 Q^2 ..`, whose last term PEFT counts once.

    PEFT takes 3 and 4 terms for the same series, which ends in Q^3.
    """
    if terms is None:
        return cayley(Q)
    total = power = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    for _ in range(min(terms - 1, 2) + max(terms - 4, 0)):
        power = power @ Q
        total = total + 2 * power
    return total + power @ Q if terms > 2 else total
