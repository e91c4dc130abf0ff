"""DeLoRA: normalised rank-one terms whose strength is one number per layer."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, check_equal, check_rank, dimensions, roles_of
from merge_algos.formats.spec import ModuleSpec
from merge_algos.lowrank import LowRankDelta

_ROLES = frozenset({"A", "B", "lambda", "w_norm"})
_LEAST = 1e-4  # what PEFT takes a smaller norm for


class DeLoRA(Kind):
    """`lambda/r * sum_k b_k a_k^T / (||b_k|| ||a_k||) diag(w_norm)`; w_norm: (d_in). Bini et al. 2025, arXiv:2503.18225.

    w_norm are the norms of the base weight's columns when training began, which PEFT saves.
    """

    name = "DeLoRA"
    paper = "arXiv:2503.18225"
    meaning = "normalised rank-one terms times the saved column norms of the base weight"
    rank = "r"
    peft_types = ("DELORA",)
    suffixes = MappingProxyType({"delora_A": "A", "delora_B": "B", "delora_lambda": "lambda", "delora_w_norm": "w_norm"})
    flags = frozenset("delora_lambda init_weights lambda_pattern module_dropout r rank_pattern".split())

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        r = fields.by_pattern(config, "r", "rank_pattern", modules)
        return {module: Settings(r[module]) for module in modules}

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        roles_of(parts, _ROLES)
        (r, d_in), (d_out, inner) = dimensions(parts, "A", 2), dimensions(parts, "B", 2)
        check_equal(parts, (r, 1, d_in), (inner, *dimensions(parts, "lambda", 1), *dimensions(parts, "w_norm", 1)))
        check_rank(parts, settings, "A", r)
        return (ModuleSpec(parts.module, (d_out, d_in), r, self.name, parts.names),)

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        A, B = tensors["A"].float(), tensors["B"].float()
        norms = A.norm(dim=1).clamp(min=_LEAST) * B.norm(dim=0).clamp(min=_LEAST)
        return LowRankDelta(B * (tensors["lambda"].float() / spec.r / norms), A * tensors["w_norm"].float())
