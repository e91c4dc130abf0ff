"""LoRA: a pair of low-rank factors, and everything that is one on disk (rsLoRA, LoRA-FA, LoRA+, EVA, LoRI, LoRA-XS)."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from merge_algos.errors import InvalidParams, ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, check_equal, check_rank, dimensions, roles_of
from merge_algos.formats.spec import EMBEDDING, LINEAR, Layer, ModuleSpec
from merge_algos.lowrank import LowRankDelta

# the others (pissa, olora, corda, loftq, lora_ga ..) rewrite the base weights: B A is then relative to a base nobody else has
_INITS_KEEPING_THE_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})

_PLAIN = frozenset({"lora_A", "lora_B"})
_EMBEDDING = frozenset({"lora_embedding_A", "lora_embedding_B"})
_LATENT = _PLAIN | {"latent"}
_WRAPPED = ".base_layer"  # PEFT wraps a module once for each of its parameters
_MAX_PARAMETERS = 16
_MAX_EXPERTS = 4096


class LoRA(Kind):
    """`scaling * B A`, scaling = alpha/r or, for rsLoRA, alpha/sqrt(r). lora_A: (r, d_in), lora_B: (d_out, r).

    Of a convolution (r, in, kh, kw) and (out, r, 1, 1); of a bare parameter with E experts (E r, d_in) with the experts one
    after another and (d_out, r E) with the experts innermost. Hu et al. 2021, arXiv:2106.09685. LoRA-XS (Bałazy et al. 2024,
    arXiv:2405.17604) keeps A and B as they began and trains a latent (r, r) between them: `scaling * B R A`.
    """

    name = "LoRA"
    paper = "arXiv:2106.09685"
    meaning = "scaling * B A of linear, convolution and embedding layers, fused projections and experts; B R A of LoRA-XS"
    rank = "r"
    peft_types = ("LORA",)
    suffixes = MappingProxyType(
        {
            "lora_A.weight": "lora_A",
            "lora_B.weight": "lora_B",
            "lora_embedding_A": "lora_embedding_A",
            "lora_embedding_B": "lora_embedding_B",
            "default_lora_latent_mapping.weight": "latent",
        }
    )
    # how training went or where layers were found: none of it changes B A, whose modules the tensors name themselves
    flags = frozenset(
        "alpha_pattern corda_config eva_config init_lora_weights loftq_config lora_alpha lora_dropout lora_ga_config "
        "megatron_config megatron_core qalora_group_size r rank_pattern runtime_config target_parameters use_rslora".split()
    )
    reasons = MappingProxyType(
        {
            "use_dora": "DoRA rescales the whole weight, so its delta needs the base weights",
            "lora_bias": "a bias on lora_B is an update outside B A",
            "layer_replication": "its modules exist only in a base model with repeated layers",
            "alora_invocation_tokens": "an activated LoRA applies to some tokens only, so it is not one delta",
            "arrow_config": "a router over several adapters is not one delta",
            "ensure_weight_tying": "a delta of tied weights counts in two layers",
            "velora_config": "VeLoRA changes what a layer computes, not only its weight",
            "monteclora_config": "MonteCLoRA draws its factors at random",
            "kasa_config": "KaSA cuts the base weights, so its delta needs them",
            "use_qalora": "QA-LoRA pools the input before A, so A is narrower than the layer",
            "use_bdlora": "block-diagonal factors are laid out differently",
            "lora_magnitude_vector": "DoRA magnitudes rescale the whole weight, so the delta needs the base weights",
            ".lora_B.bias": "a bias on lora_B is an update outside B A",
            ".base_layer.weight": "it is a copy of the base model's weights, which may have been resized or trained",
        }
    )

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        _check_initialisation(config)
        wrapped = _parameters(config, modules)
        keys = tuple(dict.fromkeys(key for module in modules for key in wrapped.get(module) or (module,)))
        r = fields.by_pattern(config, "r", "rank_pattern", keys)
        alpha = fields.by_pattern(config, "lora_alpha", "alpha_pattern", keys)
        rslora = fields.flag(config, "use_rslora")
        found = {}
        for module in modules:
            own = wrapped.get(module, ())
            pairs = {(r[key], alpha[key]) for key in own or (module,)}
            if len(pairs) > 1:
                reason = "its parameters differ in rank or alpha, and the file does not say which is which"
                raise UnsupportedAdapter(f"module {module[:200]}", reason, "train them with one rank and alpha")
            found[module] = Settings(*pairs.pop(), rslora, {"parameters": own} if own else {})
        return found

    def recognises(self, roles: frozenset[str]) -> bool:
        return roles >= _PLAIN

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        if settings.constants.get("parameters"):
            return _experts(parts, settings)
        found = roles_of(parts, _PLAIN, _EMBEDDING, _LATENT)
        if found == _EMBEDDING:
            (rank, d_in), (d_out, inner) = (dimensions(parts, f"lora_embedding_{half}", 2) for half in "AB")
            layer = EMBEDDING
        else:
            (rank, *of_A), (d_out, inner, *of_B) = (dimensions(parts, f"lora_{half}", 2, 3, 4, 5) for half in "AB")
            layer, d_in = _layer(parts, of_A, of_B), math.prod(of_A)
            _check_groups(parts, layer, rank, inner)
        check_equal(parts, (d_out, rank), (d_out, inner))
        if found == _LATENT:
            check_equal(parts, (rank, rank), dimensions(parts, "latent", 2))
        check_rank(parts, settings, "lora_embedding_A" if layer == EMBEDDING else "lora_A", rank)
        return (ModuleSpec(parts.module, (d_out, d_in), rank, self.name, parts.names, scaling(settings, rank), layer),)

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        if spec.layer == EMBEDDING:
            A, B = tensors["lora_embedding_A"], tensors["lora_embedding_B"]
        else:
            A, B = tensors["lora_A"].flatten(1), tensors["lora_B"].flatten(1)
        B = B.float() * spec.scaling
        return LowRankDelta(B @ tensors["latent"].float() if "latent" in tensors else B, A)


def scaling(settings: Settings, r: float) -> float:
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


def _layer(parts: Parts, of_A: Sequence[int], of_B: Sequence[int]) -> Layer:
    """of_A: (in, *kernel), of_B: (*ones)."""
    kernel = tuple(of_A[1:])
    check_equal(parts, (1,) * len(kernel), tuple(of_B))
    return Layer("conv", kernel) if kernel else LINEAR


def _check_groups(parts: Parts, layer: Layer, rank: int, inner: int) -> None:
    if layer.kind == "conv" and inner < rank and rank % inner == 0:
        reason = f"lora_B of {rank // inner} groups adapts more connections than the convolution has"
        raise UnsupportedAdapter(f"module {parts.module[:200]}", reason, "train it without grouped convolutions")


def _parameters(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Module -> full names of the bare parameters that its factors adapt: one of them each, which one the file does not say.

    PEFT wraps a module once per parameter, in the order in which the model's code declares them.
    """
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InvalidParams("adapter_config.json: target_parameters", "must be a list of names")
    by_owner: dict[str, list[str]] = {}
    for owner, name in (target.rpartition(".")[::2] for target in sorted(set(targets))):
        by_owner.setdefault(owner, []).append(name)
    wrapped = {module: _names(module.replace(_WRAPPED, ""), by_owner) for module in modules} if targets else {}
    return _all_there({module: names for module, names in wrapped.items() if names})


def _names(module: str, by_owner: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Parameters whose owner is this module or its dotted tail."""
    pieces = module.split(".")
    tails = [".".join(pieces[n:]) for n in range(len(pieces) + 1)]
    names = tuple(f"{module}.{name}" for tail in tails for name in by_owner.get(tail, ()))
    if len(names) > _MAX_PARAMETERS:
        reason = f"{len(names)} parameters of one module; at most {_MAX_PARAMETERS} are read"
        raise UnsupportedAdapter("adapter_config.json: target_parameters", reason, "list those that were trained")
    return tuple(dict.fromkeys(names))


def _all_there(wrapped: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Raises UnsupportedAdapter where a module has fewer or more pairs of factors than parameters."""
    for module, names in wrapped.items():
        plain = module.replace(_WRAPPED, "")
        pairs = {f"{plain}{_WRAPPED * depth}" for depth in range(len(names))}
        if not pairs <= wrapped.keys() or module not in pairs:
            reason = f"it has not one pair of factors for each of {', '.join(names)[:300]}"
            raise UnsupportedAdapter(f"module {plain[:200]}", reason, "list in target_parameters just those that were trained")
    return dict(wrapped)


def _experts(parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
    roles_of(parts, _PLAIN)
    (rows, d_in), (d_out, columns) = dimensions(parts, "lora_A", 2), dimensions(parts, "lora_B", 2)
    r = int(settings.r or rows)
    if rows != columns or r < 1 or r != settings.r or rows % r or rows // r > _MAX_EXPERTS:
        raise ShapeMismatch(parts.module, (max(r, 1), d_in), (rows, d_in))
    layer = Layer("expert", (), rows // r, tuple(settings.constants["parameters"]))
    return tuple(
        ModuleSpec(
            name=f"{parts.module}[{expert}]" if layer.experts > 1 else parts.module,
            shape=(d_out, d_in),
            r=r,
            kind=LoRA.name,
            tensors=parts.names,
            scaling=scaling(settings, r),
            layer=layer,
            slices={
                "lora_A": (slice(expert * r, (expert + 1) * r),),
                "lora_B": (slice(None), slice(expert, None, layer.experts)),
            },
        )
        for expert in range(layer.experts)
    )
