"""diffusers' single file: `unet.<module>.lora_A.weight` and its older spellings, a config for each component or none."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats import kinds
from merge_algos.formats.components import COMPONENTS, divided, is_known, is_opaque
from merge_algos.formats.kind import Parts, Settings
from merge_algos.formats.metadata import adapter_config, base_model_of
from merge_algos.formats.naming import Naming, OneA, Shapes, apart
from merge_algos.formats.namings.kohya import check_distinct
from merge_algos.formats.namings.peft import refuse_flags
from merge_algos.formats.spec import AdapterSpec, Layer, ModuleSpec, Shape
from merge_algos.formats.wrapped import ALPHA, check_alpha_shape, with_alpha
from merge_algos.formats.written import Written, factor_names

_HALVES = {"lora_A": "lora_A", "lora_B": "lora_B", "down": "lora_A", "up": "lora_B"}
# as save_lora_weights has written factors over the years; `_lora` belonged to the attention processors of the first versions
_FACTOR = re.compile(r"(.+?)(?:\.(lora_[AB])|(_lora|\.lora|\.lora_linear_layer)\.(down|up))\.weight")
_REASONS: Mapping[str, str] = {
    "lora_magnitude_vector": "DoRA magnitudes rescale the whole weight, so the delta needs the base weights",
    "dora_scale": "DoRA magnitudes rescale the whole weight, so the delta needs the base weights",
    ".bias": "a trained bias is an update outside B A",
    "base_model.model.": "PEFT's factors say nothing of their scaling without their adapter_config.json",
}
_PROCESSOR_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Diffusers(Naming):
    """scaling as diffusers' own loader has it (loaders/lora_base.py, utils/peft_utils.py): what the metadata says of a component
    as PEFT reads it; else alpha / rank where there is an alpha tensor; else 1.
    """

    name = "diffusers"

    def recognises(self, config: Mapping[str, Any] | None, shapes: Shapes) -> bool:
        foreign = config is not None or any(is_opaque(tensor.partition(".")[0]) for tensor in shapes)
        return not foreign and any(_module_of(tensor) is not None for tensor in shapes)

    def describe(self, config: Mapping[str, Any] | None, shapes: Shapes, metadata: Mapping[str, str]) -> AdapterSpec:
        said = adapter_config(metadata)
        modules = _split(shapes)
        settings = {name: Settings() for name in modules} if said is None else _settings(said, tuple(modules))
        described = tuple(_described(name, roles, settings[name], shapes) for name, roles in modules.items())
        check_distinct(described)
        _check_one_source(described, said)
        return AdapterSpec(base_model_of(metadata), None, None, False, described)

    def written(
        self, shapes: Mapping[str, Shape], layers: Mapping[str, Layer], ranks: Mapping[str, int], *, one_A: OneA = apart
    ) -> tuple[Written, ...]:
        for module in ranks:
            if not divided(module)[0] or layers[module].kind not in ("linear", "conv", "flat"):
                reason = "a diffusers file holds linear layers and convolutions of a pipeline's components only"
                raise UnsupportedAdapter(f"module {module[:200]}", reason, "keep it in PEFT's format")
        return tuple(tensor for module, r in ranks.items() for tensor in _pair(module, shapes[module], layers[module], r))


def _pair(module: str, shape: Shape, layer: Layer, r: int) -> tuple[Written, Written]:
    # diffusers' loader knows the text encoders of its own scripts by this older spelling
    down, up = ("lora_linear_layer.down", "lora_linear_layer.up") if module.startswith("text_encoder") else ("lora_A", "lora_B")
    (lora_A, lora_B), (d_out, d_in) = factor_names(module), shape
    return (
        Written(f"{module}.{down}.weight", "A", (lora_A,), r, (r, d_in // layer.size, *layer.kernel)),
        Written(f"{module}.{up}.weight", "B", (lora_B,), r, (d_out, r, *(1 for _ in layer.kernel))),
    )


def _split(shapes: Shapes) -> dict[str, dict[str, str]]:
    """Module -> role -> tensor. Raises UnsupportedAdapter for a tensor of no module or role, or one spelt twice."""
    modules: dict[str, dict[str, str]] = {}
    for tensor in shapes:
        placed = _module_of(tensor)
        if placed is None:
            reason = next((why for part, why in _REASONS.items() if part in tensor), "diffusers' files have no such tensor")
            raise UnsupportedAdapter(f"tensor {tensor[:200]}", reason, "train or export the adapter without it")
        module, role = placed
        if role in modules.setdefault(module, {}):
            reason = f"it is there twice, also as {modules[module][role][:200]}"
            raise UnsupportedAdapter(f"tensor {tensor[:200]}", reason, "check how the adapter was saved")
        modules[module][role] = tensor
    return modules


def _module_of(tensor: str) -> tuple[str, str] | None:
    """(module, role); None for a tensor that is no factor or alpha of a component."""
    found = _FACTOR.fullmatch(tensor)
    if found is not None:
        path, half, style, side = found.groups()
        module = _plain(path, processor=style == "_lora")
        return (module, _HALVES[half or side]) if module else None
    path = tensor.removesuffix(f".{ALPHA}")
    module = _plain(path, processor=False) if path != tensor else None
    return (module, ALPHA) if module else None


def _plain(path: str, *, processor: bool) -> str | None:
    """The module as it is called here; None where no component is named and the UNet has no such module."""
    path = path.replace(".processor.", ".")
    component, rest = divided(path)
    if not component:
        component, rest = "unet", path  # UNet2DConditionModel.save_attn_procs wrote no component
    text = component.startswith("text_encoder")
    if processor:
        head, _, last = rest.rpartition(".")
        last = _PROCESSOR_TEXT.get(last, last) if text else last.replace("to_out", "to_out.0")
        rest = f"{head}.{last}"
    if text and rest.startswith("encoder.layers."):
        rest = f"text_model.{rest}"  # as CLIPTextModel was called before transformers 5
    module = f"{component}.{rest}"
    return module if path.partition(".")[0] in COMPONENTS or is_known(module) else None


def _settings(said: Mapping[str, Any], modules: tuple[str, ...]) -> dict[str, Settings]:
    """Of each module what the config of its component says. Raises what PEFT's kind of LoRA raises."""
    kind = kinds.registry()["LoRA"]
    settings: dict[str, Settings] = {}
    for component in dict.fromkeys(divided(module)[0] for module in modules):
        config = {key.removeprefix(f"{component}."): value for key, value in said.items() if key.startswith(f"{component}.")}
        refuse_flags(config, kind)
        _refuse_anchors(component, config)
        paths = {divided(module)[1]: module for module in modules if divided(module)[0] == component}
        found = kind.settings(config, tuple(paths))
        settings |= {paths[path]: own for path, own in found.items()}
    return settings


def _refuse_anchors(component: str, config: Mapping[str, Any]) -> None:
    """CLIP's modules are called differently before transformers 5, so what is anchored would match there and not here."""
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(field) or ():
            if component.startswith("text_encoder") and str(pattern).startswith("^"):
                reason = "an anchored pattern means other modules to other versions of the text encoder"
                raise UnsupportedAdapter(f"metadata {component}.{field} {str(pattern)[:100]!r}", reason, "write it without ^")


def _described(module: str, roles: Mapping[str, str], settings: Settings, shapes: Shapes) -> ModuleSpec:
    names = {role: tensor for role, tensor in roles.items() if role != ALPHA}
    parts = Parts(module, names, {role: tuple(shapes[tensor]) for role, tensor in names.items()})
    (described,) = kinds.registry()["LoRA"].describe(parts, settings)
    if ALPHA not in roles:
        return replace(described, name=module)
    check_alpha_shape(roles[ALPHA], shapes[roles[ALPHA]])
    return with_alpha(described, roles[ALPHA], described.r)


def _check_one_source(modules: tuple[ModuleSpec, ...], said: Mapping[str, Any] | None) -> None:
    alpha = next((module.tensors[ALPHA] for module in modules if ALPHA in module.tensors), None)
    if said is not None and alpha is not None:
        reason = "the metadata says the scaling too, and diffusers' loader refuses a file with both"
        raise UnsupportedAdapter(f"tensor {alpha[:200]}", reason, "remove one of them")
