"""PEFT's `target_parameters`: factors of bare parameters, which may hold many experts, and the names that these go by.

PEFT wraps a module once for each of its parameters, in the order in which the model's code declares them, which no file says.
So a module is named by its wrapping, `experts.base_layer`, and an expert by its number, `experts.base_layer[3]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import Parts, Settings, dimensions
from merge_algos.formats.spec import Layer, ModuleSpec

_WRAPPED = ".base_layer"
_MAX_PARAMETERS = 16
_MAX_EXPERTS = 4096


def parameters_of(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Module -> full names of the bare parameters that its factors adapt: one of them each, which one the file does not say.

    Raises InvalidParams, or UnsupportedAdapter where a module has not one pair of factors for each.
    """
    targets = fields.texts(config, "target_parameters")
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


def experts_of(parts: Parts, settings: Settings, *, kind: str, scaling: float) -> tuple[ModuleSpec, ...]:
    """One module per expert. lora_A: (E r, d_in), lora_B: (d_out, r E), experts innermost. Raises ShapeMismatch."""
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
            kind=kind,
            tensors=parts.names,
            scaling=scaling,
            layer=layer,
            slices={
                "lora_A": (slice(expert * r, (expert + 1) * r),),
                "lora_B": (slice(None), slice(expert, None, layer.experts)),
            },
        )
        for expert in range(layer.experts)
    )
