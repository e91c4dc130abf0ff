"""LoRA: a pair of low-rank factors, and everything that is one on disk (rsLoRA, LoRA-FA, EVA, LoRI, MonteCLoRA, VeLoRA).

Beside the base model's weight also DoRA, and PiSSA and OLoRA, which begin by taking their factors out of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_algos.errors import InvalidParams, ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import fields, grounded
from merge_algos.formats.bare_parameters import experts_of, parameters_of
from merge_algos.formats.kind import Kind, Parts, Settings, bounded, check_equal, check_rank, dimensions, roles_of, scaling
from merge_algos.formats.spec import EMBEDDING, LINEAR, Layer, ModuleSpec
from merge_algos.lowrank import LowRankDelta

_INITS_KEEPING_THE_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})
# these take B0 A0 out of the base weight, which says what they were
_INITS_FROM_THE_BASE = frozenset({"pissa", "olora"})
# and these, too, but by more than the weight: B A is then relative to a base that nobody else has
_LOST_INITS: Mapping[str, str] = MappingProxyType(
    {
        "pissa_niter": "its beginning is a randomised SVD of the base weights, whose draw is not saved",
        "corda": "its beginning depends on data that it does not save",
        "lora_ga": "its beginning depends on gradients that it does not save",
        "loftq": "its base weights were quantised, and B A is relative to that",
    }
)
_LOST = "this initialisation is unknown, or also changes the base weights"

_PLAIN = frozenset({"lora_A", "lora_B"})
_EMBEDDING = frozenset({"lora_embedding_A", "lora_embedding_B"})
_LATENT = _PLAIN | {"latent"}
_MAGNITUDE = frozenset({"magnitude"})
_MAX_PATTERNS = 200
# numbers that only training uses: how VeLoRA compresses what it remembers, and what MonteCLoRA samples from
_SAMPLER = ("expert_weights", "expert_weights_prior", "gaussian_var_prior", "std_prior")
_TRAINING = frozenset({"velora_embed", *(f"sampler.{name}" for name in _SAMPLER)})


class LoRA(Kind):
    """`scaling * B A`, scaling = alpha/r or, for rsLoRA, alpha/sqrt(r). lora_A: (r, d_in), lora_B: (d_out, r).

    Of a convolution (r, in, kh, kw) and (out, r, 1, 1); of a bare parameter with E experts (E r, d_in) with the experts one
    after another and (d_out, r E) with the experts innermost. Hu et al. 2021, arXiv:2106.09685. LoRA-XS (Bałazy et al. 2024,
    arXiv:2405.17604) keeps A and B as they began and trains a latent (r, r) between them: `scaling * B R A`. Of BD-LoRA
    A or B is the blocks of a block-diagonal matrix, one above the other. What needs the base weight is in `grounded`.
    """

    name = "LoRA"
    paper = "arXiv:2106.09685"
    meaning = (
        "scaling * B A of linear, convolution and embedding layers, fused projections and experts; B R A of LoRA-XS; "
        "block-diagonal factors of BD-LoRA"
    )
    rank = "r"
    peft_types = ("LORA",)
    suffixes = MappingProxyType(
        {
            "lora_A.weight": "lora_A",
            "lora_B.weight": "lora_B",
            "lora_embedding_A": "lora_embedding_A",
            "lora_embedding_B": "lora_embedding_B",
            "default_lora_latent_mapping.weight": "latent",
            "lora_magnitude_vector": "magnitude",
            "lora_magnitude_vector.weight": "magnitude",
            "lora_velora_embed": "velora_embed",
        }
        | {f"lora_monteclora_sampler.{name}": f"sampler.{name}" for name in _SAMPLER}
    )
    # how training went or where layers were found: none of it changes B A, whose modules the tensors name themselves
    flags = frozenset(
        "alpha_pattern corda_config eva_config init_lora_weights layer_replication loftq_config lora_alpha lora_dropout "
        "lora_ga_config megatron_config megatron_core monteclora_config qalora_group_size r rank_pattern runtime_config "
        "target_parameters use_bdlora use_dora use_rslora velora_config".split()
    )
    reasons = MappingProxyType(
        {
            "alora_invocation_tokens": "an activated LoRA applies to some tokens only, so it is not one delta",
            "arrow_config": "a router over several adapters is not one delta",
            "ensure_weight_tying": "a delta of tied weights counts in two layers",
            "kasa_config": "KaSA cuts the base weights, so its delta needs them",
            "use_qalora": "QA-LoRA pools the input before A, so A is narrower than the layer",
            ".lora_diag": "KaSA cuts the base weights, so its delta needs them",
            ".lora_B.bias": "a bias on lora_B is an update outside B A",
        }
    )

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        begun, is_dora = _beginning(config), bool(config.get("use_dora"))
        wrapped, blocks = parameters_of(config, modules), _blocks(config, modules)
        keys = tuple(dict.fromkeys(key for module in modules for key in wrapped.get(module) or (module,)))
        r = fields.by_pattern(config, "r", "rank_pattern", keys)
        alpha = fields.by_pattern(config, "lora_alpha", "alpha_pattern", keys)
        rslora, is_transposed = fields.flag(config, "use_rslora"), fields.flag(config, "fan_in_fan_out")
        found = {}
        for module in modules:
            own = wrapped.get(module, ())
            pairs = {(r[key], alpha[key]) for key in own or (module,)}
            if len(pairs) > 1:
                reason = "its parameters differ in rank or alpha, and the file does not say which is which"
                raise UnsupportedAdapter(f"module {module[:200]}", reason, "train them with one rank and alpha")
            asked = {"begun": begun, "is_dora": is_dora, "is_transposed": is_transposed}
            constants = {"parameters": own, "blocks": blocks.get(module, (1, 1)), **asked}
            found[module] = Settings(*pairs.pop(), rslora, constants)
        return found

    def recognises(self, roles: frozenset[str]) -> bool:
        return roles >= _PLAIN

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        found = roles_of(parts, _PLAIN, _EMBEDDING, _LATENT, optional=_TRAINING | _MAGNITUDE)
        grounding = _grounding(parts, settings, found)
        if found == _PLAIN and settings.constants.get("parameters"):
            return experts_of(parts, settings, kind=self.name, scaling=scaling(settings, settings.r or 1))
        if found == _PLAIN and settings.constants.get("blocks", (1, 1)) != (1, 1):
            return (_block_diagonal(parts, settings),)
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
        spec = ModuleSpec(parts.module, (d_out, d_in), rank, self.name, parts.names, scaling(settings, rank), layer)
        return (_with_base(parts, settings, spec, grounding) if grounding else spec,)

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        if spec.layer == EMBEDDING:
            A, B = tensors["lora_embedding_A"], tensors["lora_embedding_B"]
        else:
            A, B = (_whole(tensors[f"lora_{half}"].flatten(1), spec.constants.get(half, 1)) for half in "AB")
        B = B.float() * spec.scaling
        return LowRankDelta(B @ tensors["latent"].float() if "latent" in tensors else B, A)

    def ground(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> Tensor | LowRankDelta:
        how, delta = spec.constants["grounding"], self.load(spec, tensors).to(torch.float32)
        if how.startswith("pissa"):
            delta = grounded.beside_pissa(delta, W, delta.rank, spec.name)
        elif how.startswith("olora"):
            delta = grounded.beside_olora(delta, W, delta.rank, spec.scaling, is_transposed=spec.constants["is_transposed"])
        return grounded.dora(delta, tensors["magnitude"], W) if how.endswith("dora") else delta


def _beginning(config: Mapping[str, Any]) -> str | None:
    """How B A began, where that was in the base weight. Raises UnsupportedAdapter where nobody can know any more."""
    initial = config.get("init_lora_weights")
    name = str(initial).lower()
    if isinstance(initial, bool | None) or name in _INITS_KEEPING_THE_BASE:
        return None
    if name in _INITS_FROM_THE_BASE:
        return name
    reason = next((why for begin, why in _LOST_INITS.items() if name.startswith(begin)), _LOST)
    remedy = "save it converted to plain LoRA (path_initial_model_for_weight_conversion)"
    raise UnsupportedAdapter(f"init_lora_weights {str(initial)[:100]!r}", reason, remedy)


def _grounding(parts: Parts, settings: Settings, found: frozenset[str]) -> str | None:
    """What the base weight has to do with the delta: how it began, then `dora`, or nothing. Raises UnsupportedAdapter."""
    asked = settings.constants
    begun = asked.get("begun") if found != _EMBEDDING else None  # which PEFT begins as any other LoRA
    is_dora, has_magnitude = asked.get("is_dora", False), "magnitude" in parts.shapes
    if is_dora and not has_magnitude:
        reason = "use_dora is set, but it has no lora_magnitude_vector"
        raise UnsupportedAdapter(f"module {parts.module[:200]}", reason, "check how the adapter was saved")
    if has_magnitude and not is_dora:
        reason = "it is a DoRA magnitude, which rescales the base weights, and no use_dora says so"
        remedy = "export the adapter as plain LoRA, or with its own config"
        raise UnsupportedAdapter(f"tensor {parts.names['magnitude'][:200]}", reason, remedy)
    how = " ".join([*([begun] if begun else []), *(["dora"] if is_dora else [])]) or None
    is_plain = found != _LATENT and not asked.get("parameters") and asked.get("blocks", (1, 1)) == (1, 1)
    if how is not None and not is_plain:
        reason = f"{how} together with what else its config asks for has no known meaning"
        raise UnsupportedAdapter(f"module {parts.module[:200]}", reason, "save it converted to plain LoRA")
    return how


def _with_base(parts: Parts, settings: Settings, spec: ModuleSpec, how: str) -> ModuleSpec:
    """The module as one that needs the base model's weight. Raises ShapeMismatch, UnsupportedAdapter."""
    assert spec.shape is not None
    d_out, d_in = spec.shape
    r = min(d_out, d_in)
    if "magnitude" in parts.shapes:
        _check_magnitude(parts, spec.layer, d_out)
    else:
        r = min(2 * spec.r, r)
    if how != "dora" and spec.layer != LINEAR:
        reason = f"{how} begins in linear layers, and this is another layer"
        raise UnsupportedAdapter(f"module {parts.module[:200]}", reason, "save it converted to plain LoRA")
    own = {"grounding": how, "rank": spec.r, "is_transposed": settings.constants["is_transposed"]}
    return replace(spec, r=r, needs_base=True, constants={**spec.constants, **own})


def _check_magnitude(parts: Parts, layer: Layer, d_out: int) -> None:
    """Raises ShapeMismatch naming the tensor: d_out numbers, those of a convolution (1, d_out, *ones)."""
    shape = parts.shapes["magnitude"]
    expected = (1, d_out, *(1 for _ in layer.kernel)) if layer.kind == "conv" else (d_out,)
    if shape != expected:
        raise ShapeMismatch(parts.names["magnitude"], expected, shape)


def _layer(parts: Parts, of_A: Sequence[int], of_B: Sequence[int]) -> Layer:
    """of_A: (in, *kernel), of_B: (*ones)."""
    kernel = tuple(of_A[1:])
    check_equal(parts, (1,) * len(kernel), tuple(of_B))
    return Layer("conv", kernel) if kernel else LINEAR


def _check_groups(parts: Parts, layer: Layer, rank: int, inner: int) -> None:
    if layer.kind == "conv" and inner < rank and rank % inner == 0:
        reason = f"lora_B of {rank // inner} groups adapts more connections than the convolution has"
        raise UnsupportedAdapter(f"module {parts.module[:200]}", reason, "train it without grouped convolutions")


def _blocks(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Module -> of how many diagonal blocks A and B consist; PEFT looks for its patterns anywhere in a name."""
    asked = config.get("use_bdlora") or {}
    if not isinstance(asked, Mapping):
        raise InvalidParams("adapter_config.json: use_bdlora", "must be an object or null")
    count = int(fields.positive("use_bdlora.nblocks", asked.get("nblocks", 1)))
    of_A, of_B = (fields.texts(asked, f"target_modules_bd_{half}") for half in "ab")
    if len(of_A) + len(of_B) > _MAX_PATTERNS:  # every one is looked for in every name
        raise InvalidParams("adapter_config.json: use_bdlora", f"holds more than {_MAX_PATTERNS} patterns")
    found = {}
    for module in modules if asked else ():
        in_A, in_B = any(part in module for part in of_A), any(part in module for part in of_B)
        if in_A and in_B:
            reason = "it is to have both factors block-diagonal, which PEFT refuses"
            raise UnsupportedAdapter(f"module {module[:200]}", reason, "check how the adapter was saved")
        found[module] = (count if in_A else 1, count if in_B else 1)
    return found


def _block_diagonal(parts: Parts, settings: Settings) -> ModuleSpec:
    """lora_A: (r, d_in / blocks), lora_B: (d_out, r / blocks), of which one is whole."""
    blocks_A, blocks_B = settings.constants["blocks"]
    (r, across), (d_out, inner) = dimensions(parts, "lora_A", 2), dimensions(parts, "lora_B", 2)
    check_equal(parts, (d_out, r), (d_out, inner * blocks_B))
    check_rank(parts, settings, "lora_A", r)
    if r % blocks_A or d_out % blocks_B:
        raise ShapeMismatch(parts.module, (blocks_A, blocks_B), (r, d_out))
    constants = {"A": blocks_A, "B": blocks_B}
    shape = d_out, across * blocks_A
    return bounded(ModuleSpec(parts.module, shape, r, LoRA.name, parts.names, scaling(settings, r), constants=constants))


def _whole(factor: Tensor, blocks: int) -> Tensor:
    """The matrix whose diagonal blocks lie one above the other in `factor`."""
    if blocks == 1:
        return factor
    each = torch.eye(blocks, dtype=factor.dtype, device=factor.device)
    return torch.einsum("bim,bc->bicm", factor.reshape(blocks, -1, factor.shape[1]), each).reshape(len(factor), -1)
