"""What a merge refuses, and why. Each error carries its data and makes its own sentence.

MergeError
├── UnknownMethod        no method of that name
├── InvalidParams        a parameter is unknown, of the wrong type, or out of range
├── InvalidRank          the rank rule is impossible
├── InvalidWeights       not one finite weight per adapter
├── WrongCount           the method merges another number of adapters than it was given
├── BadPattern           a regular expression does not compile, matches nothing, is ambiguous or too slow
├── BaseModelMismatch    the adapters were trained on different base models
├── ShapeMismatch        one module, two shapes
├── NonFiniteTensor      a tensor holds NaN or Inf
├── NonFiniteResult      the merged factors overflow the requested dtype
├── TrainingDiverged     the loss is no number any more
├── IncomparableTensor   a tensor of two models that has no difference
├── NothingToExtract     two models whose linear layers are the same
├── LeftoverTensors      more has changed than an adapter can hold, and that was to be refused
└── UnsupportedAdapter   an adapter kind, flag or tensor that cannot be ingested exactly
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class MergeError(Exception):
    """Root of the tree; never raised itself."""


@dataclass(eq=False)
class UnknownMethod(MergeError):
    method: str
    known: Sequence[str]

    def __str__(self) -> str:
        return f"no method {self.method[:100]!r}; there are {', '.join(self.known)}"


@dataclass(eq=False)
class InvalidParams(MergeError):
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


@dataclass(eq=False)
class InvalidRank(MergeError):
    rank: Any
    reason: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.reason}"


@dataclass(eq=False)
class InvalidWeights(MergeError):
    reason: str

    def __str__(self) -> str:
        return f"weights: {self.reason}"


@dataclass(eq=False)
class WrongCount(MergeError):
    """least, most: how many adapters the method merges; most is None where there is no limit."""

    method: str
    least: int
    most: int | None
    got: int

    def __str__(self) -> str:
        wanted = (
            f"{self.least}"
            if self.least == self.most
            else f"at least {self.least}"
            if self.most is None
            else f"{self.least} to {self.most}"
        )
        return f"{self.method} merges {wanted} adapters, got {self.got}"


@dataclass(eq=False)
class BadPattern(MergeError):
    pattern: str
    reason: str

    def __str__(self) -> str:
        return f"pattern {self.pattern[:200]!r}: {self.reason}"


@dataclass(eq=False)
class BaseModelMismatch(MergeError):
    base_models: Sequence[str]

    def __str__(self) -> str:
        listed = ", ".join(self.base_models)
        return f"the adapters belong to different base models ({listed}); allow_base_mismatch merges them anyway"


@dataclass(eq=False)
class ShapeMismatch(MergeError):
    module: str
    expected: tuple[int, ...]
    got: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.module}: shape {self.got} where {self.expected} was expected"


@dataclass(eq=False)
class NonFiniteTensor(MergeError):
    tensor: str

    def __str__(self) -> str:
        return f"{self.tensor} holds NaN or Inf"


@dataclass(eq=False)
class NonFiniteResult(MergeError):
    module: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.module}: the merged factors do not fit {self.dtype}; use smaller weights or a wider dtype"


@dataclass(eq=False)
class TrainingDiverged(MergeError):
    step: int

    def __str__(self) -> str:
        return f"the loss was not finite at step {self.step}; a smaller lr, or data without extremes, may help"


@dataclass(eq=False)
class IncomparableTensor(MergeError):
    tensor: str
    reason: str

    def __str__(self) -> str:
        return f"{self.tensor[:200]} of the two models cannot be compared: {self.reason}"


@dataclass(eq=False)
class NothingToExtract(MergeError):
    """left_out: tensors that changed, none of them a module."""

    left_out: Sequence[str]

    def __str__(self) -> str:
        changed = f"only {_some(self.left_out)} did" if self.left_out else "the two models are the same"
        return f"no linear layer has changed, so there is nothing to extract: {changed}"


@dataclass(eq=False)
class LeftoverTensors(MergeError):
    tensors: Sequence[str]

    def __str__(self) -> str:
        return f"a plain LoRA cannot hold the changes of {_some(self.tensors)}; leftover: report extracts the rest"


@dataclass(eq=False)
class UnsupportedAdapter(MergeError):
    subject: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}; {self.remedy}"


def _some(names: Sequence[str]) -> str:
    """As many as a sentence can carry."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name[:200] for name in names[:5]) + more
