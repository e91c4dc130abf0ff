"""Names and flags in an adapter file -> low-rank deltas, exactly or not at all.

A naming (`namings/`, one file each) splits tensor names into modules and roles; a kind (`kinds/`, one file each) turns one
module's tensors into a delta; `written` is the way back. Both are found by what a file holds, never by what it is called.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from merge_algos.adapter import Adapter
from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import kinds, namings
from merge_algos.formats.naming import Naming, Shapes
from merge_algos.formats.spec import AdapterSpec, ModuleSpec, Shape, check_finite
from merge_algos.formats.wrapped import ALPHA, unwrapped
from merge_algos.lowrank import LowRankDelta


def describe(
    config: Mapping[str, Any] | None, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None
) -> AdapterSpec:
    """The meaning of an adapter file with tensors of these shapes. config: its `adapter_config.json`, if it has one.

    Raises UnsupportedAdapter naming the kind, flag or tensor that has no exact delta, ShapeMismatch naming the module whose
    tensors or configured rank disagree, BadPattern for a hostile pattern, InvalidParams for a value of the wrong type.
    """
    sizes = {name: tuple(shape) for name, shape in shapes.items()}
    return naming_of(config, sizes).describe(config, sizes, metadata or {})


def naming_of(config: Mapping[str, Any] | None, shapes: Shapes) -> Naming:
    """The one naming that a file with these tensors has. Raises UnsupportedAdapter."""
    for naming in namings.registry().values():
        if naming.recognises(config, shapes):
            return naming
    first = next(iter(shapes), "")
    reason = f"no naming known here has a tensor {first[:200]!r}; there are {', '.join(namings.registry())}"
    raise UnsupportedAdapter("an adapter without adapter_config.json", reason, "upload it with its config, or convert it to PEFT")


def index_tensors(spec: AdapterSpec) -> frozenset[str]:
    """Names of the tensors that hold integers."""
    known = {module.kind: kinds.registry()[module.kind].indices for module in spec.modules}
    return frozenset(name for m in spec.modules for role, name in m.tensors.items() if role in known[m.kind])


def alpha_tensors(spec: AdapterSpec) -> frozenset[str]:
    """Names of the tensors that are one number, by which a module is scaled."""
    return frozenset(module.tensors[ALPHA] for module in spec.modules if ALPHA in module.tensors)


def load(module: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
    """The module's delta, scaling folded in. module: with a shape.  tensors: by role, each cut to the module's slices.

    Raises NonFiniteTensor naming the tensor, UnsupportedAdapter for a module whose delta needs the base model's weight.
    """
    if module.needs_base:
        raise needs_base(module)
    for role, tensor in tensors.items():
        check_finite(module.tensors[role], tensor)
    own = {role: tensor for role, tensor in tensors.items() if role != ALPHA}
    return unwrapped(module, kinds.registry()[module.kind].load(module, own), tensors)


def ground(module: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> Tensor | LowRankDelta:
    """The delta of a module with `needs_base`, beside the base model's weight: factors where it has few, else dense.

    tensors: as for `load`.  W: (d_out, d_in) float32, laid out as the module's delta.  Raises NonFiniteTensor.
    """
    for role, tensor in tensors.items():
        check_finite(module.tensors[role], tensor)
    return kinds.registry()[module.kind].ground(module, tensors, W)


def needs_base(module: ModuleSpec) -> UnsupportedAdapter:
    """What is said of such a module where nobody has given the base model."""
    return UnsupportedAdapter(
        f"module {module.name[:200]}",
        f"its {module.kind} delta depends on the base model's weight",
        "give base_model, whose weights of the adapted layers are then read",
    )


def completed(module: ModuleSpec, shape: Shape) -> ModuleSpec:
    """The module with the shape that other adapters say it has. Raises ShapeMismatch if its file contradicts."""
    if module.shape is None:
        return kinds.registry()[module.kind].complete(module, shape)
    if module.shape != shape:
        raise ShapeMismatch(module.name, shape, module.shape)
    return module


def read(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape] | None = None) -> Adapter:
    """A whole adapter in memory. shapes: of modules whose shape its file does not say. Raises what the steps raise."""
    spec = describe(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    known = {**spec.shapes, **(shapes or {})}
    whole = [completed(module, known[module.name]) for module in spec.modules]
    own = {m.name: {role: tensors[name][m.slices.get(role, ())] for role, name in m.tensors.items()} for m in whole}
    return Adapter(spec.base_model, {m.name: load(m, own[m.name]) for m in whole})
