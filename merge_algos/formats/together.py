"""Several adapters side by side: one shape and one layer for every module, or a refusal that names it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from merge_algos.adapter import agree
from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import kinds
from merge_algos.formats.extras import Extra
from merge_algos.formats.spec import LINEAR, AdapterSpec, Layer, ModuleSpec, Shape


def agreed_shapes(specs: Sequence[AdapterSpec]) -> dict[str, Shape]:
    """Module -> (d_out, d_in), in natural order, of all modules of all adapters.

    Raises ShapeMismatch, or UnsupportedAdapter for a module whose shape no adapter's file says.
    """
    shapes = agree(spec.shapes for spec in specs)
    for module in (module for spec in specs for module in spec.modules if module.shape is None):
        if module.name not in shapes:
            raise UnsupportedAdapter(
                f"module {module.name[:200]}",
                f"a {module.kind} file does not say how wide this layer is, and no other adapter here has it",
                "merge it with an adapter of the same layers that says so (one of weight 0 will do), or give base_model",
            )
        kinds.registry()[module.kind].complete(module, shapes[module.name])
    return shapes


def agreed_replication(specs: Sequence[AdapterSpec]) -> tuple[tuple[int, int], ...]:
    """Of which layers the base model of all these is put together. Raises UnsupportedAdapter where they do not agree."""
    distinct = tuple(dict.fromkeys(spec.layer_replication for spec in specs))
    if len(distinct) > 1:
        shown = " and ".join(str([list(pair) for pair in each] or "none")[:100] for each in distinct[:2])
        reason = f"two adapters count the layers in two ways ({shown}), so one name is two modules"
        raise UnsupportedAdapter("adapter_config.json: layer_replication", reason, "merge adapters of one layer_replication")
    return distinct[0]


def replicated(beside: str) -> UnsupportedAdapter:
    """What is said of repeated layers where something knows none."""
    reason = f"{beside} knows the base model only as it is, not with repeated layers"
    return UnsupportedAdapter(
        "adapter_config.json: layer_replication", reason, "merge such adapters by themselves, as PEFT files"
    )


def agreed_layers(adapters: Iterable[tuple[Mapping[str, Shape], Mapping[str, Layer]]]) -> dict[str, Layer]:
    """Module -> the layer that all adapters see there. adapters: of each, its modules' shapes, and layers where not linear.

    Raises ShapeMismatch naming the module that is one layer to one adapter and another layer to another.
    """
    agreed: dict[str, Layer] = {}
    for shapes, layers in adapters:
        for module, shape in shapes.items():
            own = layers.get(module, LINEAR)
            known = agreed.setdefault(module, own)
            agreed[module] = _agreed(module, shape, known, own)
    return agreed


def layers_of(specs: Sequence[AdapterSpec], shapes: Mapping[str, Shape]) -> dict[str, Layer]:
    """The same of whole specs. shapes: as `agreed_shapes` gives them."""
    return agreed_layers(({name: shapes[name] for name in spec.layers}, spec.layers) for spec in specs)


def as_doras(specs: Sequence[AdapterSpec]) -> tuple[AdapterSpec, ...] | None:
    """DoRAs as the LoRAs that they are made of, whose magnitudes are extras; None where one of them is none.

    Raises UnsupportedAdapter for a module that one adapter lacks: its magnitude there would be the norm of the base weight.
    """
    if not all(module.constants.get("grounding") == "dora" for spec in specs for module in spec.modules):
        return None
    for module in (module for spec in specs for module in spec.modules):
        if not all(module.name in spec.layers for spec in specs):
            reason = "an adapter has no magnitude there, which would be the norm of the base model's weight"
            raise UnsupportedAdapter(f"module {module.name[:200]}", reason, "give base_model, or merge DoRAs of the same modules")
    return tuple(_as_dora(spec) for spec in specs)


def _as_dora(spec: AdapterSpec) -> AdapterSpec:
    extras = [Extra(m.tensors["magnitude"], "magnitude", m.name, (m.shape or (0,))[:1]) for m in spec.modules]
    config = {**spec.extras_config, "use_dora": True}
    return replace(spec, modules=tuple(map(_as_lora, spec.modules)), extras=(*spec.extras, *extras), extras_config=config)


def _as_lora(module: ModuleSpec) -> ModuleSpec:
    tensors = {role: name for role, name in module.tensors.items() if role != "magnitude"}
    constants = {key: value for key, value in module.constants.items() if key != "grounding"}
    return replace(module, tensors=tensors, constants=constants, r=constants["rank"], needs_base=False)


def _agreed(module: str, shape: Shape, left: Layer, right: Layer) -> Layer:
    flat = [layer for layer in (left, right) if layer.kind == "flat"]
    firm = [layer for layer in (left, right) if layer.kind != "flat"]
    if left == right or not firm:
        return left
    if flat and firm[0].kind in {"linear", "conv"}:
        return firm[0]
    raise ShapeMismatch(module, left.weight_shape(shape), right.weight_shape(shape))
