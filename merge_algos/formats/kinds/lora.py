"""LoRA: a pair of low-rank factors, and everything that is one on disk (rsLoRA, LoRA-FA, LoRA+, EVA)."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, incomplete
from merge_algos.formats.spec import ModuleSpec
from merge_algos.lowrank import LowRankDelta

# the others (pissa, olora, corda, loftq, lora_ga ..) rewrite the base weights: B A is then relative to a base nobody else has
_INITS_KEEPING_THE_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})


class LoRA(Kind):
    """`scaling * B A`, scaling = alpha/r or, for rsLoRA, alpha/sqrt(r). lora_A: (r, d_in), lora_B: (d_out, r).

    Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732.
    """

    name = "LoRA"
    peft_types = ("LORA",)
    suffixes = MappingProxyType({"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"})
    # how training went or where layers were found: none of it changes B A, whose modules the tensors name themselves
    flags = frozenset(
        "alpha_pattern corda_config eva_config init_lora_weights loftq_config lora_alpha lora_dropout lora_ga_config "
        "megatron_config megatron_core qalora_group_size r rank_pattern runtime_config use_rslora".split()
    )
    reasons = MappingProxyType(
        {
            "use_dora": "DoRA rescales the whole weight, so its delta needs the base weights",
            "lora_bias": "a bias on lora_B is an update outside B A",
            "layer_replication": "its modules exist only in a base model with repeated layers",
            "target_parameters": "factors of bare parameters are laid out differently",
            "alora_invocation_tokens": "an activated LoRA applies to some tokens only, so it is not one delta",
            "arrow_config": "a router over several adapters is not one delta",
            "lora_magnitude_vector": "DoRA magnitudes rescale the whole weight, so the delta needs the base weights",
            "lora_embedding": "an embedding factor is laid out differently",
            ".lora_B.bias": "a bias on lora_B is an update outside B A",
        }
    )

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        _check_initialisation(config)
        r = fields.by_pattern(config, "r", "rank_pattern", modules)
        alpha = fields.by_pattern(config, "lora_alpha", "alpha_pattern", modules)
        rslora = fields.flag(config, "use_rslora")
        return {module: Settings(r[module], alpha[module], rslora) for module in modules}

    def recognises(self, roles: frozenset[str]) -> bool:
        return roles >= {"lora_A", "lora_B"}

    def describe(self, parts: Parts, settings: Settings) -> ModuleSpec:
        for role, shape in parts.shapes.items():
            _check_dimensions(parts.names[role], shape)
        if len(parts.shapes) == 1:
            raise incomplete(parts.module, tuple(parts.shapes))
        (rank, d_in), (d_out, inner) = parts.shapes["lora_A"], parts.shapes["lora_B"]
        if inner != rank:
            raise ShapeMismatch(parts.module, (d_out, rank), (d_out, inner))
        if settings.r is not None and rank != settings.r:
            # PEFT scales by the configured rank and refuses other shapes, so a file that disagrees has no one meaning
            raise ShapeMismatch(parts.module, (int(settings.r), d_in), (rank, d_in))
        if min(rank, d_out, d_in) < 1:
            raise ShapeMismatch(parts.module, (1, 1), (d_out, d_in))
        return ModuleSpec(parts.module, (d_out, d_in), rank, self.name, parts.names, scaling(settings, rank))

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        return LowRankDelta(tensors["lora_B"].float() * spec.scaling, tensors["lora_A"])


def scaling(settings: Settings, r: int) -> float:
    """What the factors are multiplied by; 1 where no config says it."""
    if settings.alpha is None:
        return 1.0
    return settings.alpha / (math.sqrt(r) if settings.rslora else r)


def _check_initialisation(config: Mapping[str, Any]) -> None:
    initial = config.get("init_lora_weights")
    if not isinstance(initial, bool | None) and str(initial).lower() not in _INITS_KEEPING_THE_BASE:
        raise UnsupportedAdapter(
            f"init_lora_weights {str(initial)[:100]!r}",
            "this initialisation is unknown, or also changes the base weights",
            "save it converted to plain LoRA (path_initial_model_for_weight_conversion)",
        )


def _check_dimensions(tensor: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 2:
        reason = f"a factor must have 2 dimensions (shape {shape})"
        raise UnsupportedAdapter(f"tensor {tensor[:200]}", reason, "export the adapter as plain LoRA of linear layers")
