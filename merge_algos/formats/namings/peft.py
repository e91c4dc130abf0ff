"""PEFT's directory: `base_model.model.<module>.<role>` beside an `adapter_config.json` that names the kind."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats import extras, fields, kinds
from merge_algos.formats.components import component_alone
from merge_algos.formats.kind import Kind, Parts, Settings, scaling
from merge_algos.formats.naming import Naming, OneA, Shapes, apart
from merge_algos.formats.refused import REFUSED, UNKNOWN
from merge_algos.formats.spec import AdapterSpec, Layer, ModuleSpec, Shape
from merge_algos.formats.written import Written, written

_PREFIX = "base_model.model."
_MAX_MODULES = 100_000

# what every kind's config holds: who, for what, and where layers were found, which the tensors say themselves
_HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode layers_pattern layers_to_transform "
    "peft_type peft_version revision target_modules task_type "
    # extras
    "bias lora_bias modules_to_save trainable_token_indices".split()
)
_NOT_SET: tuple[Any, ...] = (None, False, "none", {}, [])


class Peft(Naming):
    """Reading is exact or refused: a flag or tensor that changes what the adapter means, and that its kind does not read, is
    an UnsupportedAdapter naming it.
    """

    name = "peft"

    def recognises(self, config: Mapping[str, Any] | None, shapes: Shapes) -> bool:
        return config is not None

    def describe(self, config: Mapping[str, Any] | None, shapes: Shapes, metadata: Mapping[str, str]) -> AdapterSpec:
        assert config is not None
        kind = _kind(config)
        refuse_flags(config, kind)
        beside = extras.recognised(
            config, {name: tuple(shape) for name, shape in shapes.items() if _place(name, kind)[1] is None}
        )
        parts = _split({name: shape for name, shape in shapes.items() if name not in beside}, kind)
        settings = kind.settings(config, tuple(parts))
        modules = _modules(kind, parts, settings)
        found = extras.scaled(beside.values(), {module: scaling(own, own.r or 1) for module, own in settings.items()})
        extras.check_wrapped(found, {module.name: module.needs_base for module in modules})
        # a UNet or transformer of an image model, which PEFT wraps alone, is the component of a pipeline to other namings
        component = component_alone(module.name for module in modules)
        start = f"{component}." if component else ""
        return AdapterSpec(
            base_model=fields.text(config, "base_model_name_or_path") or "",
            revision=fields.text(config, "revision"),
            task_type=fields.text(config, "task_type"),
            fan_in_fan_out=fields.flag(config, "fan_in_fan_out"),
            modules=tuple(replace(module, name=f"{start}{module.name}") for module in modules),
            extras=tuple(replace(extra, module=f"{start}{extra.module}") for extra in found),
            extras_config=extras.config_of(beside.values(), [config]),
            layer_replication=fields.ranges(config, "layer_replication"),
        )

    def written(
        self, shapes: Mapping[str, Shape], layers: Mapping[str, Layer], ranks: Mapping[str, int], *, one_A: OneA = apart
    ) -> tuple[Written, ...]:
        return written(shapes, layers, ranks)


def _modules(kind: Kind, parts: Mapping[str, Parts], settings: Mapping[str, Settings]) -> tuple[ModuleSpec, ...]:
    modules: list[ModuleSpec] = []
    for module, own in parts.items():
        modules.extend(kind.describe(own, settings[module]))
        if len(modules) > _MAX_MODULES:
            reason = f"more than {_MAX_MODULES} modules, experts counted one by one"
            raise UnsupportedAdapter("adapter_model.safetensors", reason, "check how the adapter was saved")
    return tuple(modules)


def _kind(config: Mapping[str, Any]) -> Kind:
    kind = kinds.of_peft_type(config.get("peft_type"))
    if kind is None:
        peft_type = str(config.get("peft_type"))
        raise UnsupportedAdapter(f"peft_type {peft_type[:100]!r}", *REFUSED.get(peft_type, UNKNOWN))
    return kind


def refuse_flags(config: Mapping[str, Any], kind: Kind) -> None:
    """Raises UnsupportedAdapter for a flag that is set and that neither every kind nor this one knows."""
    for flag, value in config.items():
        if flag not in _HARMLESS | kind.flags and value not in _NOT_SET:
            reason = kind.reasons.get(flag, "this flag is unknown and may change what the adapter means")
            raise UnsupportedAdapter(f"adapter_config.json: {flag[:100]}", reason, "train or export the adapter without it")


def _split(shapes: Shapes, kind: Kind) -> dict[str, Parts]:
    """Module -> its tensors, in the order met, with the shared ones. Raises UnsupportedAdapter for a tensor of no role."""
    shared: dict[str, str] = {}
    own: dict[str, dict[str, str]] = {}
    for tensor in shapes:
        module, role = _place(tensor, kind)
        if role is None:
            reason = _why_not(tensor, tuple(shapes[tensor]), kind)
            raise UnsupportedAdapter(f"tensor {tensor[:200]}", reason, "export the adapter as plain LoRA, without it")
        roles = own.setdefault(module, {}) if module else shared
        if role in roles:
            reason = f"it is there twice, also as {roles[role][:200]}"
            raise UnsupportedAdapter(f"tensor {tensor[:200]}", reason, "check how the adapter was saved")
        roles[role] = tensor
    if not own and shared:
        reason = f"it holds {', '.join(shared.values())} and no tensor of any module"
        raise UnsupportedAdapter("adapter_model.safetensors", reason, "save it whole (save_indices=True, save_projection=True)")
    if not own:
        raise UnsupportedAdapter("adapter_model.safetensors", "it holds no tensors", "check how the adapter was saved")
    return {module: _parts(module, {**shared, **names}, shapes) for module, names in own.items()}


def _parts(module: str, names: Mapping[str, str], shapes: Shapes) -> Parts:
    return Parts(module, names, {role: tuple(shapes[tensor]) for role, tensor in names.items()})


def _place(tensor: str, kind: Kind) -> tuple[str, str | None]:
    """(module, role); no module where all share the tensor, no role where it has none."""
    if tensor in kind.shared:
        return "", kind.shared[tensor]
    name = tensor.removeprefix(_PREFIX)
    for suffix, role in kind.suffixes.items():
        if name != tensor and name.endswith(f".{suffix}") and len(name) > len(suffix) + 1:
            return name[: -len(suffix) - 1], role
    return "", None


def _why_not(tensor: str, shape: tuple[int, ...], kind: Kind) -> str:
    known = (reason for part, reason in kind.reasons.items() if part in tensor)
    return next(known, f"it is no tensor of a {kind.name} adapter (shape {shape})")
