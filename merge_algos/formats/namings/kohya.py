"""kohya's single file: `lora_unet_<module with underscores>.lora_down.weight`, alpha beside it, no config."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import kinds
from merge_algos.formats.components import is_opaque, layer_of
from merge_algos.formats.kind import Kind, Parts, Settings
from merge_algos.formats.kohya_names import Place, place, rows, rows_in_all, spelled
from merge_algos.formats.metadata import base_model_of
from merge_algos.formats.naming import Naming, OneA, Shapes, apart
from merge_algos.formats.spec import AdapterSpec, Layer, ModuleSpec, Shape
from merge_algos.formats.wrapped import ALPHA, check_alpha_shape, with_alpha, with_rows
from merge_algos.formats.written import Written, factor_names

_ROLES: Mapping[str, str] = {
    "lora_down.weight": "lora_A",
    "lora_up.weight": "lora_B",
    "lora_mid.weight": "lora_mid",
    ALPHA: ALPHA,
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")},
}
_REASONS: Mapping[str, str] = {
    "dora_scale": "DoRA magnitudes rescale the whole weight, so the delta needs the base weights",
    "diff": "a whole trained weight is no low-rank factor",
    "diff_b": "a trained bias is an update outside B A",
    "w_norm": "a trained norm is an update outside B A",
    "b_norm": "a trained norm is an update outside B A",
    "oft_blocks": "OFT rotates the base weights, so the delta needs them",
    "oft_diag": "OFT rotates the base weights, so the delta needs them",
    "reshape_weight": "it changes the shape of the base weights",
}
# what alpha is divided by: a dimension 0 of the first of these. A LoKr of whole matrices has none and is not scaled, whatever
# its alpha: LyCORIS and ComfyUI (comfy/weight_adapter/lokr.py) agree on that.
_RANKED = ("lora_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


class Kohya(Naming):
    """scaling = alpha / rank; where alpha is missing 1, as in kohya-ss/sd-scripts (networks/lora.py), diffusers and ComfyUI.

    LyCORIS' kinds (LoHa, LoKr, LoCon with `lora_mid`) are told apart by their tensors. No tensor is left over.
    """

    name = "kohya"

    def recognises(self, config: Mapping[str, Any] | None, shapes: Shapes) -> bool:
        return config is None and any(is_opaque(tensor.partition(".")[0]) for tensor in shapes)

    def describe(self, config: Mapping[str, Any] | None, shapes: Shapes, metadata: Mapping[str, str]) -> AdapterSpec:
        modules = tuple(spec for name, roles in _split(shapes).items() for spec in _modules(name, roles, shapes))
        check_distinct(modules)
        return AdapterSpec(base_model_of(metadata), None, None, False, modules)

    def written(
        self, shapes: Mapping[str, Shape], layers: Mapping[str, Layer], ranks: Mapping[str, int], *, one_A: OneA = apart
    ) -> tuple[Written, ...]:
        for module in ranks:
            if layers[module].kind not in ("linear", "conv", "flat"):
                reason = "a kohya file holds linear layers and convolutions only"
                raise UnsupportedAdapter(f"module {module[:200]}", reason, "keep it in PEFT's format")
        named = spelled(tuple(ranks))
        return tuple(tensor for name, where in named.items() for tensor in _triple(name, where, shapes, layers, ranks, one_A))


def _triple(
    name: str, where: Place, shapes: Mapping[str, Shape], layers: Mapping[str, Layer], ranks: Mapping[str, int], one_A: OneA
) -> tuple[Written, Written, Written]:
    """down, up and alpha of one name. Modules that it fuses lie side by side in its rank, or one below the other where they have
    one A; an absent one is rows of zeros.
    """
    present = [module for module in where.modules if module in ranks]
    d_in, layer, r = shapes[present[0]][1], layers[present[0]], max(ranks[module] for module in present)
    d_out = rows_in_all(where, shapes)
    found = rows(where.split, (d_out, d_in))
    if not found:
        reason = f"its shape {(d_out, d_in)} is none that {name} can have"
        raise UnsupportedAdapter(f"module {present[0][:200]}", reason, "keep it in the format it came in")
    ranges = dict(zip(where.modules, found, strict=True))
    for module in present:
        size = sum(stop - start for start, stop in ranges[module])
        if shapes[module] != (size, d_in):
            raise ShapeMismatch(module, (size, d_in), shapes[module])
    lora_A, lora_B = zip(*(factor_names(module) for module in present), strict=True)
    shared = len(present) > 1 and one_A(present)
    lora_A, rank = (lora_A[:1], r) if shared else (lora_A, r * len(present))
    of_A, of_B = (rank, d_in // layer.size, *layer.kernel), (d_out, rank, *(1 for _ in layer.kernel))
    return (
        Written(f"{name}.lora_down.weight", "A", lora_A, r, of_A),
        Written(f"{name}.lora_up.weight", "B", lora_B, r, of_B, tuple(ranges[module] for module in present), shared),
        Written(f"{name}.{ALPHA}", "alpha", (), rank, ()),
    )


def kind_of(module: str, roles: frozenset[str]) -> Kind:
    """The kind that has most of these roles. Raises UnsupportedAdapter where no kind knows them."""
    found = [kind for kind in kinds.registry().values() if kind.recognises(roles)]
    if not found:
        raise UnsupportedAdapter(
            f"module {module[:200]}",
            f"{', '.join(sorted(roles)) or 'alpha alone'} is no kind of adapter known here",
            "check how the adapter was saved",
        )
    return max(found, key=lambda kind: len(roles & set(kind.suffixes.values())))


def check_distinct(modules: tuple[ModuleSpec, ...]) -> None:
    """Raises UnsupportedAdapter for a module that the file spells in two ways."""
    seen: dict[str, ModuleSpec] = {}
    for module in modules:
        if module.name in seen:
            twice = [next(iter(spec.tensors.values())) for spec in (seen[module.name], module)]
            reason = f"it is there twice, as {twice[0][:200]} and {twice[1][:200]}"
            raise UnsupportedAdapter(f"module {module.name[:200]}", reason, "check how the adapter was saved")
        seen[module.name] = module


def _split(shapes: Shapes) -> dict[str, dict[str, str]]:
    """Module as the file names it -> role -> tensor. Raises UnsupportedAdapter for a tensor of no module or role."""
    modules: dict[str, dict[str, str]] = {}
    for tensor in shapes:
        module, _, suffix = tensor.partition(".")
        if not is_opaque(module) or suffix not in _ROLES:
            reason = _REASONS.get(suffix, "kohya's files have no such tensor")
            raise UnsupportedAdapter(f"tensor {tensor[:200]}", reason, "train or export the adapter without it")
        modules.setdefault(module, {})[_ROLES[suffix]] = tensor
    return modules


def _modules(name: str, roles: Mapping[str, str], shapes: Shapes) -> Iterator[ModuleSpec]:
    """The modules that one name of the file stands for. Raises what its kind raises."""
    names = {role: tensor for role, tensor in roles.items() if role != ALPHA}
    parts = Parts(name, names, {role: tuple(shapes[tensor]) for role, tensor in names.items()})
    for found in kind_of(name, frozenset(names)).describe(parts, Settings()):
        yield from _placed(_scaled(found, roles.get(ALPHA), parts, shapes), place(name))


def _scaled(module: ModuleSpec, alpha: str | None, parts: Parts, shapes: Shapes) -> ModuleSpec:
    if alpha is None:
        return module
    check_alpha_shape(alpha, shapes[alpha])
    ranked = next((role for role in _RANKED if role in parts.shapes), None)
    return with_alpha(module, alpha, parts.shapes[ranked][0] if ranked else None)


def _placed(module: ModuleSpec, where: Place) -> Iterator[ModuleSpec]:
    if where.split == "whole":
        (name,) = where.modules
        yield replace(module, name=name, layer=layer_of(name, module.layer))
        return
    ranges = rows(where.split, module.shape) if module.shape else ()
    if not ranges:
        reason = f"its shape {module.shape} cannot be shared out among {', '.join(where.modules)}"
        raise UnsupportedAdapter(f"module {module.name[:200]}", reason, "check how the adapter was saved")
    for name, own in zip(where.modules, ranges, strict=True):
        yield with_rows(module, name, own)
