"""PEFT's LoRA layout: `base_model.model.<module>.lora_{A,B}.weight` beside an `adapter_config.json`.

Reading is exact or refused: a flag or tensor that changes what the adapter means, and is not a plain LoRA factor, is an
UnsupportedAdapter naming it. What is written has one scaling that every loader agrees on: alpha = r, no rsLoRA.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merge_algos.errors import InvalidParams, NonFiniteTensor, ShapeMismatch, UnsupportedAdapter
from merge_algos.lowrank import LowRankDelta
from merge_algos.patterns import matching_each

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")

# how training went or where layers were found: none of it changes B A, whose modules the tensors name themselves
_HARMLESS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path corda_config eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_config "
    "megatron_core peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type "
    "use_rslora".split()
)
_NOT_SET: tuple[Any, ...] = (None, False, "none", {}, [])

_FLAG_REASONS = {
    "use_dora": "DoRA rescales the whole weight, so its delta needs the base weights",
    "lora_bias": "a bias on lora_B is an update outside B A",
    "bias": "trained biases are an update outside B A",
    "modules_to_save": "whole trained modules are saved beside the LoRA factors",
    "trainable_token_indices": "trained token embeddings are an update outside B A",
    "layer_replication": "its modules exist only in a base model with repeated layers",
    "target_parameters": "factors of bare parameters are laid out differently",
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only, so it is not one delta",
    "arrow_config": "a router over several adapters is not one delta",
}
_TENSOR_REASONS = {
    "lora_magnitude_vector": "DoRA magnitudes rescale the whole weight, so the delta needs the base weights",
    "lora_embedding": "an embedding factor is laid out differently",
    ".lora_B.bias": "a bias on lora_B is an update outside B A",
}
# the others (pissa, olora, corda, loftq, lora_ga ..) rewrite the base weights: B A is then relative to a base nobody else has
_INITS_KEEPING_THE_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """Where one module's factors are, and how they scale. lora_A: (r, d_in), lora_B: (d_out, r), as tensor names."""

    name: str
    d_out: int
    d_in: int
    r: int
    scaling: float
    lora_A: str
    lora_B: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.d_out, self.d_in


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter as its config and header describe it, before any tensor is read. Modules in the file's order."""

    base_model: str
    revision: str | None
    task_type: str | None
    fan_in_fan_out: bool
    modules: tuple[ModuleSpec, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {module.name: module.shape for module in self.modules}

    @property
    def rank(self) -> int:
        return max((module.r for module in self.modules), default=0)


def describe(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> AdapterSpec:
    """The meaning of `adapter_config.json` over tensors of these shapes.

    Raises UnsupportedAdapter naming the flag or tensor that is not plain LoRA, ShapeMismatch naming the module whose
    factors or configured rank disagree, BadPattern for a hostile pattern, InvalidParams for a value of the wrong type.
    """
    _refuse_flags(config)
    factors = _pair(shapes)
    r = _by_pattern(config, "r", "rank_pattern", tuple(factors))
    alpha = _by_pattern(config, "lora_alpha", "alpha_pattern", tuple(factors))
    rslora = _flag(config, "use_rslora")
    modules = tuple(_module(name, shapes, r[name], alpha[name], rslora=rslora) for name in factors)
    return AdapterSpec(
        base_model=_text(config, "base_model_name_or_path") or "",
        revision=_text(config, "revision"),
        task_type=_text(config, "task_type"),
        fan_in_fan_out=_flag(config, "fan_in_fan_out"),
        modules=modules,
    )


def load(module: ModuleSpec, lora_A: Tensor, lora_B: Tensor) -> LowRankDelta:
    """The delta with its scaling folded into B. Raises NonFiniteTensor naming the tensor."""
    check_finite(module.lora_A, lora_A)
    check_finite(module.lora_B, lora_B)
    return LowRankDelta(lora_B.float() * module.scaling, lora_A)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises NonFiniteTensor. The sum is finite only if every entry is, and costs no mask; overflow falls back to the mask."""
    if not bool(tensor.float().sum().isfinite()) and not bool(tensor.isfinite().all()):
        raise NonFiniteTensor(name)


def factor_names(module: str) -> tuple[str, str]:
    """Tensor names of lora_A and lora_B."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def is_lora_A(tensor: str) -> bool:
    return tensor.endswith(".lora_A.weight")


def config_for(
    *,
    base_model: str,
    revision: str | None,
    task_type: str | None,
    fan_in_fan_out: bool,
    ranks: Mapping[str, int],
) -> dict[str, Any]:
    """`adapter_config.json` for modules of these ranks: alpha = r throughout, full module names as targets.

    One rank everywhere gives empty patterns, which is what every server reads; different ranks need both patterns.
    """
    r = max(ranks.values())
    other = {_only(name, ranks): rank for name, rank in ranks.items() if rank != r}
    return {
        "alpha_pattern": other,
        "base_model_name_or_path": base_model or None,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": other,
        "revision": revision,
        "target_modules": list(ranks),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def _only(name: str, modules: Iterable[str]) -> str:
    """A pattern for this module alone: its name, anchored where that is also the dotted tail of another module's."""
    is_tail = any(other.endswith(f".{name}") for other in modules)
    return f"^{re.escape(name)}" if is_tail else name


def _refuse_flags(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapter(
            f"peft_type {str(config.get('peft_type'))[:100]!r}",
            "only LORA is a pair of low-rank factors",
            "convert it to LoRA first",
        )
    initial = config.get("init_lora_weights")
    if not isinstance(initial, bool | None) and str(initial).lower() not in _INITS_KEEPING_THE_BASE:
        raise UnsupportedAdapter(
            f"init_lora_weights {str(initial)[:100]!r}",
            "this initialisation is unknown, or also changes the base weights",
            "save it converted to plain LoRA (path_initial_model_for_weight_conversion)",
        )
    for flag, value in config.items():
        if flag not in _HARMLESS and value not in _NOT_SET:
            reason = _FLAG_REASONS.get(flag, "this flag is unknown and may change what the adapter means")
            raise UnsupportedAdapter(f"adapter_config.json: {flag[:100]}", reason, "train or export the adapter without it")


def _pair(shapes: Mapping[str, Sequence[int]]) -> dict[str, set[str]]:
    """Module -> halves present, in the order met. Every tensor must be a factor and every factor must have its other half."""
    halves: dict[str, set[str]] = {}
    for tensor, shape in shapes.items():
        match = _FACTOR.fullmatch(tensor)
        if match is None or len(shape) != 2:
            raise UnsupportedAdapter(
                f"tensor {tensor[:200]}", _why_not(tensor, shape), "export the adapter as plain LoRA of linear layers"
            )
        halves.setdefault(match["module"], set()).add(match["half"])
    if not halves:
        raise UnsupportedAdapter("adapter_model.safetensors", "it holds no tensors", "check how the adapter was saved")
    for module, present in halves.items():
        if len(present) == 1:
            raise UnsupportedAdapter(
                f"module {module[:200]}", f"only lora_{present.pop()} is there", "check how the adapter was saved"
            )
    return halves


def _why_not(tensor: str, shape: Sequence[int]) -> str:
    known = (reason for part, reason in _TENSOR_REASONS.items() if part in tensor)
    fallback = "a factor must have 2 dimensions" if _FACTOR.fullmatch(tensor) else "it is not a LoRA factor of a linear layer"
    return next(known, f"{fallback} (shape {tuple(shape)})")


def _module(name: str, shapes: Mapping[str, Sequence[int]], r: float, alpha: float, *, rslora: bool) -> ModuleSpec:
    lora_A, lora_B = factor_names(name)
    (rank, d_in), (d_out, inner) = shapes[lora_A], shapes[lora_B]
    if inner != rank:
        raise ShapeMismatch(name, (d_out, rank), (d_out, inner))
    if rank != r:
        # PEFT scales by the configured rank and refuses other shapes, so a file that disagrees has no one meaning
        raise ShapeMismatch(name, (int(r), d_in), (rank, d_in))
    if min(rank, d_out, d_in) < 1:
        raise ShapeMismatch(name, (1, 1), (d_out, d_in))
    return ModuleSpec(name, d_out, d_in, rank, alpha / (math.sqrt(rank) if rslora else rank), lora_A, lora_B)


def _by_pattern(config: Mapping[str, Any], default: str, pattern: str, modules: Sequence[str]) -> dict[str, float]:
    """Value per module: the first pattern that is the module's name or its dotted tail, else the default (PEFT's rule)."""
    values = dict.fromkeys(modules, _number(default, config.get(default, 8)))
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, Mapping):
        raise InvalidParams(f"adapter_config.json: {pattern}", "must be an object")
    matched = matching_each(tuple(patterns), modules, anchored=True)
    for key, value in reversed(list(patterns.items())):  # reversed, so that the first pattern that matches has the last word
        values.update(dict.fromkeys(matched[key], _number(pattern, value)))
    return values


def _number(field: str, value: Any) -> float:
    # compared, not converted: JSON has integers beyond any float
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InvalidParams(f"adapter_config.json: {field}", f"must be a finite number, not {str(value)[:100]}")
    return value


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise InvalidParams(f"adapter_config.json: {field}", "must be true, false or null")
    return bool(value)


def _text(config: Mapping[str, Any], field: str) -> str | None:
    value = config.get(field)
    # JSON can write half a character, which no file can hold
    if value is not None and not (isinstance(value, str) and value == value.encode(errors="ignore").decode()):
        raise InvalidParams(f"adapter_config.json: {field}", "must be text or null")
    return value
