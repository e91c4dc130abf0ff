"""VB-LoRA: LoRA factors put together from a bank of vectors that all layers share."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, bounded, check_equal, check_rank, dimensions, needed, roles_of
from merge_algos.formats.spec import ModuleSpec
from merge_algos.lowrank import LowRankDelta

_HALVES = ("A", "B")
_LOGITS = frozenset({"logits_A", "logits_B", "bank"})
_TOP = frozenset({"indices_A", "indices_B", "weights_A", "weights_B", "bank"})


class VBLoRA(Kind):
    """`B A`, each stretch of a row of A (column of B) a mixture of `topk` vectors of the bank. arXiv:2405.15179.

    bank: (vectors, length). Either logits_A: (r, stretches, vectors), logits_B: (stretches, r, vectors), of which the largest
    `topk` are taken through a softmax; or their indices and all weights but the last, which makes 1 of the sum.
    """

    name = "VB-LoRA"
    paper = "arXiv:2405.15179"
    meaning = "B A with factors put together from the saved vector bank, by logits or by saved top-k weights"
    rank = "r"
    peft_types = ("VBLORA",)
    suffixes = MappingProxyType(
        {f"vblora_logits_{half}": f"logits_{half}" for half in _HALVES}
        | {f"vblora_logits_{half}_topk_{what}": f"{what}_{half}" for half in _HALVES for what in ("indices", "weights")}
    )
    shared = MappingProxyType({"base_model.vblora_vector_bank": "bank"})
    indices = frozenset({"indices_A", "indices_B"})
    flags = frozenset(
        "init_logits_std init_vector_bank_bound num_vectors r save_only_topk_weights topk vblora_dropout vector_length".split()
    )

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        r, topk = (fields.positive(name, config.get(name, default)) for name, default in (("r", 4), ("topk", 2)))
        return dict.fromkeys(modules, Settings(r, constants={"topk": int(topk)}))

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        needed(parts, frozenset({"bank"}), "the vector bank is not in the file", "check how the adapter was saved")
        by_logits = roles_of(parts, _LOGITS, _TOP) == _LOGITS
        vectors, length = dimensions(parts, "bank", 2)
        topk = settings.constants["topk"]
        found = [dimensions(parts, f"{'logits' if by_logits else 'indices'}_{half}", 3) for half in _HALVES]
        (r, across, last_A), (down, inner, last_B) = found
        last = vectors if by_logits else topk
        check_equal(parts, (r, last, last), (inner, last_A, last_B))
        check_equal(parts, (min(topk, vectors),), (topk,))
        check_rank(parts, settings, "logits_A" if by_logits else "indices_A", r)
        for half in () if by_logits else _HALVES:
            check_equal(parts, (*parts.shapes[f"indices_{half}"][:2], topk - 1), parts.shapes[f"weights_{half}"])
        shape = down * length, across * length
        return (bounded(ModuleSpec(parts.module, shape, r, self.name, parts.names, constants={"topk": topk})),)

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        A = _mixed(spec, tensors, "A").flatten(1)
        B = _mixed(spec, tensors, "B").mT.flatten(0, 1)  # (stretches, length, r) -> (d_out, r)
        return LowRankDelta(B, A)


def _mixed(spec: ModuleSpec, tensors: Mapping[str, Tensor], half: str) -> Tensor:
    """(n, m, length): of every stretch the mixture of its vectors, one of the `topk` at a time."""
    bank = tensors["bank"].float()
    if f"logits_{half}" in tensors:
        top, indices = tensors[f"logits_{half}"].float().topk(spec.constants["topk"], dim=-1)
        weights = torch.softmax(top, dim=-1)
    else:
        indices, most = tensors[f"indices_{half}"].long(), tensors[f"weights_{half}"].float()
        weights = torch.cat([most, 1.0 - most.sum(-1, keepdim=True)], dim=-1)
        check_indices(spec.tensors[f"indices_{half}"], indices, len(bank))
    mixed = torch.zeros(*indices.shape[:2], bank.shape[1], device=bank.device)
    for n in range(indices.shape[-1]):
        mixed = mixed + weights[:, :, n, None] * bank[indices[:, :, n]]
    return mixed


def check_indices(name: str, indices: Tensor, count: int) -> None:
    """Raises UnsupportedAdapter if an index is not one of `count`."""
    if bool((indices < 0).any()) or bool((indices >= count).any()):
        reason = f"it points at something that is not one of {count}"
        raise UnsupportedAdapter(f"tensor {name[:200]}", reason, "check how the adapter was saved")
