"""What a kind of adapter is: the roles its tensors play, and how one module's tensors become a delta."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from torch import Tensor

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats.spec import ModuleSpec
from merge_algos.lowrank import LowRankDelta


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
    """One file in `merge_algos/formats/kinds/`; see `lora`.

    name: as documented.  peft_types: how `adapter_config.json` calls it.  suffixes: how PEFT's name of a module's tensor ends
    -> its role.  shared: PEFT's whole name of a tensor that all modules use -> its role.  flags: config keys that are read or
    change nothing.  reasons: flag, or part of a tensor's name -> why it is refused.
    """

    name: ClassVar[str]
    peft_types: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[Mapping[str, str]]
    shared: ClassVar[Mapping[str, str]] = MappingProxyType({})
    flags: ClassVar[frozenset[str]]
    reasons: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        """What an `adapter_config.json` says of each module.

        Raises InvalidParams, BadPattern, and UnsupportedAdapter for a value with which there is no exact delta.
        """
        ...

    def recognises(self, roles: frozenset[str]) -> bool:
        """Whether a module with tensors of these roles is of this kind: how files without a config are told apart."""
        ...

    def describe(self, parts: Parts, settings: Settings) -> ModuleSpec:
        """Every role of `parts` is one of the kind's. Raises ShapeMismatch or UnsupportedAdapter naming module or tensor."""
        ...

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        """The exact delta, scaling folded into B in float32 or wider. tensors: by role, finite."""
        ...


def incomplete(module: str, roles: Sequence[str]) -> UnsupportedAdapter:
    """A module that has these tensors only."""
    return UnsupportedAdapter(f"module {module[:200]}", f"only {', '.join(roles)} is there", "check how the adapter was saved")
