"""An adapter as its config and its header describe it, before any tensor is read: what every naming and every kind agree on.

A module is one matrix whatever its layer: a linear layer's weight; a convolution's with all but the first dimension flattened,
(out, in * kh * kw); an embedding's transposed, (embedding_dim, num_embeddings), as PEFT's `lora_embedding_B @ lora_embedding_A`;
one expert's of a bare parameter, (out, in) as PEFT's factors have it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from torch import Tensor

from merge_algos.errors import NonFiniteTensor
from merge_algos.formats.extras import Extra
from merge_algos.lowrank import all_finite

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Layer:
    """The kind of layer that a module adapts, and so how its factors are written.

    flat: a matrix that may be a linear layer's or a flattened convolution's, because nothing in its file tells; it takes the
    layer that another adapter has there, else it is linear.  kernel: spatial dimensions of a convolution, else empty.
    expert: one of `experts` in a bare parameter; parameters: the full names of all that PEFT wraps around one module, because
    which of them is the outer one is not in the file.
    """

    kind: Literal["linear", "conv", "embedding", "flat", "expert"] = "linear"
    kernel: tuple[int, ...] = ()
    experts: int = 1
    parameters: tuple[str, ...] = ()

    def weight_shape(self, shape: Shape) -> tuple[int, ...]:
        """Of the base model's weight, for a delta of this shape (d_out, d_in)."""
        d_out, d_in = shape
        if self.kind == "embedding":
            return d_in, d_out
        experts = (self.experts,) if self.experts > 1 else ()
        return (*experts, d_out, d_in // self.size, *self.kernel)

    @property
    def size(self) -> int:
        """Of the kernel."""
        return math.prod(self.kernel)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "kernel": self.kernel, "experts": self.experts, "parameters": self.parameters}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(value["kind"], tuple(value["kernel"]), value["experts"], tuple(value["parameters"]))


LINEAR = Layer()
FLAT = Layer("flat")
EMBEDDING = Layer("embedding")


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """Where one module's tensors are and what they mean. tensors: role -> tensor name; the kind knows the roles.

    shape: (d_out, d_in) of the delta; None where the file does not say it, so that another adapter must.  r: the most columns
    that `load` gives.  kind: a name in `kinds`.  scaling: what the config says, 1 where a tensor says it.  constants: what else
    the kind must know to load, all of it plain values.  slices: role -> the slices of a tensor that are this module's, where it
    holds others' too.  needs_base: whether the delta depends on the base model's weight of this module.
    """

    name: str
    shape: Shape | None
    r: int
    kind: str
    tensors: Mapping[str, str]
    scaling: float = 1.0
    layer: Layer = LINEAR
    constants: Mapping[str, Any] = field(default_factory=dict)
    slices: Mapping[str, tuple[slice, ...]] = field(default_factory=dict)
    needs_base: bool = False


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A whole adapter. Modules in the file's order; every tensor of the file belongs to at least one of them, or is an extra.

    extras_config: what its config says of its extras.  layer_replication: of which layers the base model is put together before
    modules are counted, as (start, stop) ranges; empty for the base as it is.
    """

    base_model: str
    revision: str | None
    task_type: str | None
    fan_in_fan_out: bool
    modules: tuple[ModuleSpec, ...]
    extras: tuple[Extra, ...] = ()
    extras_config: Mapping[str, Any] = field(default_factory=dict)
    layer_replication: tuple[tuple[int, int], ...] = ()

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of the modules whose shape the file says."""
        return {module.name: module.shape for module in self.modules if module.shape is not None}

    @property
    def layers(self) -> dict[str, Layer]:
        return {module.name: module.layer for module in self.modules}

    @property
    def needs_base(self) -> bool:
        return any(module.needs_base for module in self.modules)

    @property
    def rank(self) -> int:
        return max((module.r for module in self.modules), default=0)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises NonFiniteTensor."""
    if not all_finite(tensor):
        raise NonFiniteTensor(name)
