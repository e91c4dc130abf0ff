"""What a kind of adapter is: the roles its tensors play, and how one module's tensors become a delta."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats.spec import ModuleSpec, Shape
from merge_algos.lowrank import LowRankDelta

MAX_FACTOR_ENTRIES = 1 << 27  # of one module's B and A together: 512 MiB of float32


@dataclass(frozen=True, slots=True)
class Parts:
    """One module's tensors by role, with those of the whole adapter that every module shares. names, shapes: by role."""

    module: str
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a config says of one module; None where nothing says it, as of a file without a config.

    r: the rank that the factors must have.  alpha: None also where the file holds it as a tensor of role `alpha`.
    constants: what only this kind knows.
    """

    r: float | None = None
    alpha: float | None = None
    rslora: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)


class Kind(Protocol):
    """One file in `merge_algos/formats/kinds/`; see `lora` and, for the shortest, `delora`.

    name, paper, meaning, rank: as documented in docs/kinds.md; rank is of the delta.  peft_types: how `adapter_config.json`
    calls it.  suffixes: how PEFT's name of a module's tensor ends -> its role.  shared: PEFT's whole name of a tensor that all
    modules use -> its role.  indices: roles of tensors of integers.  flags: config keys that are read or change nothing.
    reasons: flag, or part of a tensor's name -> why it is refused.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    meaning: ClassVar[str]
    rank: ClassVar[str]
    peft_types: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[Mapping[str, str]]
    shared: ClassVar[Mapping[str, str]] = MappingProxyType({})
    indices: ClassVar[frozenset[str]] = frozenset()
    flags: ClassVar[frozenset[str]]
    reasons: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        """What an `adapter_config.json` says of each module.

        Raises InvalidParams, BadPattern, and UnsupportedAdapter for a value with which there is no exact delta.
        """
        ...

    def recognises(self, roles: frozenset[str]) -> bool:
        """Whether a module with tensors of these roles is of this kind: how files without a config are told apart."""
        return False

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        """One module, or one per expert. Every role of `parts` is one of the kind's.

        Raises ShapeMismatch or UnsupportedAdapter naming module or tensor.
        """
        ...

    def complete(self, spec: ModuleSpec, shape: Shape) -> ModuleSpec:
        """The spec of a module whose file did not say its shape. Raises ShapeMismatch if it cannot have this one."""
        raise AssertionError(f"a {self.name} file says every shape")

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        """The exact delta, scaling folded into B in float32 or wider. spec: with a shape.  tensors: by role, finite."""
        ...

    def ground(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> Tensor | LowRankDelta:
        """The delta of a module that needs the base: factors where it has few, else dense (d_out, d_in).

        spec: with `needs_base`.  W: (d_out, d_in) float32, the base model's weight of this module as a matrix.
        """
        raise AssertionError(f"a {self.name} delta is known without the base weights")


def roles_of(parts: Parts, *complete: frozenset[str], optional: frozenset[str] = frozenset()) -> frozenset[str]:
    """The set of roles among `complete` that the module has. Raises UnsupportedAdapter if it has another set."""
    found = frozenset(parts.shapes)
    for roles in complete:
        if roles <= found <= roles | optional:
            return roles
    listed = ", ".join(sorted(found))
    raise UnsupportedAdapter(f"module {parts.module[:200]}", f"only {listed} is there", "check how the adapter was saved")


def dimensions(parts: Parts, role: str, *counts: int) -> tuple[int, ...]:
    """The tensor's shape. Raises UnsupportedAdapter if it has another number of dimensions, ShapeMismatch if one is 0."""
    shape = parts.shapes[role]
    if len(shape) not in counts:
        reason = f"a factor must have {' or '.join(map(str, counts))} dimensions (shape {shape})"
        raise UnsupportedAdapter(f"tensor {parts.names[role][:200]}", reason, "check how the adapter was saved")
    if 0 in shape:
        raise ShapeMismatch(parts.module, tuple(max(dim, 1) for dim in shape), shape)
    return shape


def check_equal(parts: Parts, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    """Raises ShapeMismatch."""
    if expected != got:
        raise ShapeMismatch(parts.module, expected, got)


def check_rank(parts: Parts, settings: Settings, role: str, r: int) -> None:
    """Raises ShapeMismatch if the config says another rank: PEFT scales by that one, so the file has no one meaning."""
    if settings.r is not None and r != settings.r:
        shape = parts.shapes[role]
        raise ShapeMismatch(parts.module, tuple(int(settings.r) if dim == r else dim for dim in shape), shape)


def scalar(parts: Parts, role: str) -> None:
    """Raises ShapeMismatch if there is such a tensor and it holds more or less than one number."""
    if math.prod(parts.shapes.get(role, ())) != 1:
        raise ShapeMismatch(parts.module, (1,), parts.shapes[role])


def scaling(settings: Settings, r: float) -> float:
    """What the factors are multiplied by; 1 where no config says it."""
    if settings.alpha is None:
        return 1.0
    return settings.alpha / (math.sqrt(r) if settings.rslora else r)


def needed(parts: Parts, roles: frozenset[str], reason: str, remedy: str) -> None:
    """Raises UnsupportedAdapter if one of these shared tensors is not in the file."""
    for role in sorted(roles - parts.shapes.keys()):
        raise UnsupportedAdapter(f"tensor {role}", reason, remedy)


def with_inputs(spec: ModuleSpec, shape: Shape) -> ModuleSpec:
    """The spec with this shape, of a file that says only the number of inputs, `d_in`. Raises ShapeMismatch."""
    if shape[1] != spec.constants["d_in"]:
        raise ShapeMismatch(spec.name, shape, (shape[0], spec.constants["d_in"]))
    return replace(spec, shape=shape)


def bounded(spec: ModuleSpec) -> ModuleSpec:
    """The spec, if its factors may be formed. Raises UnsupportedAdapter, before anything is read, if they would be too large."""
    entries = spec.r * sum(spec.shape or (1, 1))
    if entries > MAX_FACTOR_ENTRIES:
        reason = f"as {spec.kind} it has rank {spec.r}, {entries} numbers in its factors; at most {MAX_FACTOR_ENTRIES} are formed"
        raise UnsupportedAdapter(f"module {spec.name[:200]}", reason, "use a smaller rank, or convert it to LoRA first")
    return spec


def in_full(W: Tensor) -> LowRankDelta:
    """A matrix of full rank as factors: itself and an identity, which are fewer numbers than any other pair."""
    d_out, d_in = W.shape
    if d_out <= d_in:
        return LowRankDelta(torch.eye(d_out, dtype=W.dtype, device=W.device), W)
    return LowRankDelta(W, torch.eye(d_in, dtype=W.dtype, device=W.device))
