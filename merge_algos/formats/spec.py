"""An adapter as its config and its header describe it, before any tensor is read: what every naming and every kind agree on.

A module is one matrix whatever its layer: a linear layer's weight; a convolution's with all but the first dimension flattened,
(out, in * kh * kw); an embedding's transposed, (embedding_dim, num_embeddings), as PEFT's `lora_embedding_B @ lora_embedding_A`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from torch import Tensor

from merge_algos.errors import NonFiniteTensor, ShapeMismatch


@dataclass(frozen=True, slots=True)
class Layer:
    """The kind of layer that a module adapts, and so how its factors are written.

    kernel: spatial dimensions of a convolution, else empty.  `flat`: a matrix that may be a linear layer's or a flattened
    convolution's, because nothing in its file tells; it takes the layer that another adapter has there, else it is linear.
    """

    kind: Literal["linear", "conv", "embedding", "flat"] = "linear"
    kernel: tuple[int, ...] = ()

    def weight_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Of the base model's weight, for a delta of this shape (d_out, d_in)."""
        d_out, d_in = shape
        if self.kind == "embedding":
            return d_in, d_out
        size = 1
        for dim in self.kernel:
            size *= dim
        return (d_out, d_in // size, *self.kernel)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "kernel": list(self.kernel)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(value["kind"], tuple(value["kernel"]))


LINEAR = Layer()
FLAT = Layer("flat")
EMBEDDING = Layer("embedding")


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """Where one module's tensors are and what they mean. tensors: role -> tensor name; the kind knows the roles.

    shape: (d_out, d_in) of the delta.  r: the rank that `load` gives.  kind: a name in `kinds`.  scaling: what the config
    says, 1 where a tensor says it.  constants: what else the kind must know to load, all of it plain values.
    """

    name: str
    shape: tuple[int, int]
    r: int
    kind: str
    tensors: Mapping[str, str]
    scaling: float = 1.0
    layer: Layer = LINEAR
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A whole adapter. Modules in the file's order; every tensor of the file belongs to at least one of them."""

    base_model: str
    revision: str | None
    task_type: str | None
    fan_in_fan_out: bool
    modules: tuple[ModuleSpec, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {module.name: module.shape for module in self.modules}

    @property
    def layers(self) -> dict[str, Layer]:
        return {module.name: module.layer for module in self.modules}

    @property
    def rank(self) -> int:
        return max((module.r for module in self.modules), default=0)


def agreed_layers(specs: Iterable[tuple[Mapping[str, tuple[int, int]], Mapping[str, Layer]]]) -> dict[str, Layer]:
    """Module -> the layer that all adapters see there. specs: of each adapter its shapes and layers.

    Raises ShapeMismatch naming the module that is one layer to one adapter and another layer to another.
    """
    agreed: dict[str, Layer] = {}
    for shapes, layers in specs:
        for module, shape in shapes.items():
            own = layers.get(module, LINEAR)
            known = agreed.setdefault(module, own)
            if known == FLAT and own.kind in {"linear", "conv"}:
                agreed[module] = own
            elif known != own and not (own == FLAT and known.kind in {"linear", "conv"}):
                raise ShapeMismatch(module, known.weight_shape(shape), own.weight_shape(shape))
    return agreed


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises NonFiniteTensor. The sum is finite only if every entry is, and costs no mask; overflow falls back to the mask."""
    if not bool(tensor.float().sum().isfinite()) and not bool(tensor.isfinite().all()):
        raise NonFiniteTensor(name)
