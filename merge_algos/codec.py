"""What a reversible codec is: the deltas of one module in, few bytes out, from which any single task comes back.

A codec sees only what is worth coding: `Codec.fit` leaves out absent and zero deltas and folds equal ones into one part
(whose importance they share) before the codec's own `represent` is asked. A part is the bytes of one task alone; reading a
task takes the shared bytes, one part, and the layout.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from merge_algos.errors import InvalidParams, NonFiniteTensor, ShapeMismatch, WrongCount
from merge_algos.lowrank import LowRankDelta, canonical, concat
from merge_algos.packing import Field, join

Quantize = Literal["none", "int8", "int6", "int4", "auto"]
QUANTIZE: tuple[Quantize, ...] = get_args(Quantize)
MAX_ADAPTERS = 64
_CANCELLED = 1e-8  # squared: below this a float64 Gram has lost too many digits
_SAME = 1e-7  # relative distance of deltas that differ by rounding of float32 factors only

Fields = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """n tasks' deltas of one module. shape: (d_out, d_in).

    shared, parts: 1-D uint8; what every task needs, and what is one task's alone.  layout: JSON; which part is whose
    (`part_of`, one entry per task, -1 where the delta is zero) and which matrices lie in the bytes (`shared`, `parts`).
    """

    codec: str
    shape: tuple[int, int]
    shared: Tensor
    parts: tuple[Tensor, ...]
    layout: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        """The payload; the layout is not counted, as names and shapes are not counted in the inputs."""
        return len(self.shared) + sum(len(part) for part in self.parts)

    @property
    def part_of(self) -> tuple[int, ...]:
        """Position in `parts` of each task, -1 where its delta is zero."""
        return tuple(self.layout["part_of"])

    @property
    def tasks(self) -> tuple[Tensor, ...]:
        """The own bytes of each task; equal tasks have the same."""
        return tuple(self.parts[k] if k >= 0 else self.shared[:0] for k in self.part_of)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What a codec's `represent` is given: different deltas, none of them zero.

    deltas: float64, as the adapters factor them.  canonical: the same, balanced and free of the choice of factors.
    importance: factor of each one's squared error, above 0.
    """

    shape: tuple[int, int]
    deltas: tuple[LowRankDelta, ...]
    canonical: tuple[LowRankDelta, ...]
    importance: tuple[float, ...]
    budget_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """What `represent` returns. parts: one per delta of the problem, in its order."""

    shared: Sequence[Field]
    parts: Sequence[Sequence[Field]]

    @property
    def size_bytes(self) -> int:
        return sum(field.size_bytes for fields in (self.shared, *self.parts) for field in fields)


@dataclass(frozen=True, slots=True)
class Floor:
    """A size that a representation may have, and errors (squared, one per delta) that it then has at least."""

    size_bytes: int
    errors: tuple[float, ...]


class Codec(Protocol):
    """One file in `merge_algos/codecs/`: a frozen dataclass whose fields are its parameters; see `truncate`.

    name: as in a recipe.  paper: arXiv identifier or citation.  version: raised when results change.
    grid: the budgets that are tried for each module before bytes are spread over modules, as multiples of the whole
    budget's fraction; 1 is among them, so that an even spread is among what is compared.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int] = 1
    grid: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0, 1.5)

    @staticmethod
    def prepare(problem: Problem) -> Any:
        """What of the work does not depend on the budget; codecs with one and the same function share what it returns."""
        return None

    def represent(self, problem: Problem, prepared: Any) -> Packed:
        """At most `problem.budget_bytes`, deterministic. There is at least one delta."""
        ...

    def stand_in(self, problem: Problem, prepared: Any) -> str | None:
        """The codec that gives this very representation, where that is known without making it."""
        return None

    def floors(self, problem: Problem) -> Sequence[Floor]:
        """One of these is met by whatever `represent` makes. Empty where nothing can be said; only of use where it is cheap."""
        return ()

    @staticmethod
    def restore(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
        """One task's delta from the matrices of its part and the shared ones."""
        ...

    def decoded(self, shape: tuple[int, int], packed: Packed, part: int) -> LowRankDelta:
        """One part as it will come back, float32; -1 for a zero delta."""
        if part < 0:
            return LowRankDelta.zero(*shape)
        return self.restore(shape, values(packed.shared), values(packed.parts[part])).to(torch.float32)

    def fit(
        self, deltas: Sequence[LowRankDelta], budget_bytes: int, seed: int = 0, importance: Sequence[float] | None = None
    ) -> Encoded:
        """deltas: of one shape, rank 0 where absent.  importance: factor of each task's squared error, or 1/||delta||^2.

        seed: for codecs that draw numbers; none of these does.
        Raises WrongCount outside 1 to 64 deltas, ShapeMismatch, NonFiniteTensor, and InvalidParams for an importance below 0.
        """
        part_of, problem = distinct(deltas, budget_bytes, importance)
        packed = self.represent(problem, self.prepare(problem)) if problem.deltas else Packed((), ())
        shared, layout = join(packed.shared)
        parts = [join(part) for part in packed.parts]
        return Encoded(
            codec=self.name,
            shape=problem.shape,
            shared=shared,
            parts=tuple(data for data, _ in parts),
            layout={"part_of": list(part_of), "shared": layout, "parts": [own for _, own in parts]},
        )


def distinct(
    deltas: Sequence[LowRankDelta], budget_bytes: int, importance: Sequence[float] | None = None
) -> tuple[tuple[int, ...], Problem]:
    """The part of each task, -1 for a zero delta, and the problem of coding the parts. Raises what `Codec.fit` raises."""
    check_deltas(deltas)
    wide = [delta.to(torch.float64) for delta in deltas]
    norms = [delta.norm() for delta in wide]
    given = _importance(norms, importance)
    part_of, first = _fold(wide, norms)
    shares = tuple(sum(g for g, part in zip(given, part_of, strict=True) if part == k) for k in range(len(first)))
    worth = [k for k, share in enumerate(shares) if share > 0]  # what no error of can matter is stored as zero
    place = {k: n for n, k in enumerate(worth)}
    kept = tuple(wide[first[k]] for k in worth)
    gauged = tuple(canonical(delta) for delta in kept)
    problem = Problem(deltas[0].shape, kept, gauged, tuple(shares[k] for k in worth), max(0, budget_bytes))
    return tuple(place.get(part, -1) for part in part_of), problem


def check_deltas(deltas: Sequence[LowRankDelta], module: str = "module") -> None:
    """Raises WrongCount, ShapeMismatch or NonFiniteTensor."""
    check_count(len(deltas))
    for n, delta in enumerate(deltas):
        if delta.shape != deltas[0].shape:
            raise ShapeMismatch(module, deltas[0].shape, delta.shape)
        if not (delta.B.isfinite().all() and delta.A.isfinite().all()):
            raise NonFiniteTensor(f"{module} of adapter {n}")


def check_count(count: int) -> None:
    if not 1 <= count <= MAX_ADAPTERS:
        raise WrongCount("rmm", 1, MAX_ADAPTERS, count)


def check_quantize(value: str) -> None:
    """Raises InvalidParams."""
    if value not in QUANTIZE:
        raise InvalidParams("parameters.quantize", f"must be one of {', '.join(QUANTIZE)}, not {json.dumps(value)[:100]}")


def measured(delta: LowRankDelta, decoded: LowRankDelta) -> float:
    """`||delta - decoded||^2`, float64.

    The Gram of the difference's factors loses half of the digits, so where little is left the core of their QR is taken.
    """
    wide = delta.to(torch.float64)
    difference = concat([wide, decoded.to(torch.float64, wide.B.device).scale(-1.0)])
    error = max(difference.inner(difference), 0.0)
    if error > _CANCELLED * wide.inner(wide):
        return error
    core = torch.linalg.qr(difference.B).R @ torch.linalg.qr(difference.A.mT).R.mT  # QB core QA^T is the difference
    return float(core.square().sum())


def loss(problem: Problem, packed: Packed, codec: type[Codec]) -> float:
    """What a codec makes small: the sum of importance times squared error over the parts, after decoding."""
    shared = values(packed.shared)
    decoded = [codec.restore(problem.shape, shared, values(part)) for part in packed.parts]
    errors = [measured(delta, back) for delta, back in zip(problem.deltas, decoded, strict=True)]
    return sum(w * error for w, error in zip(problem.importance, errors, strict=True))


def best(problem: Problem, tried: Iterable[Packed], codec: type[Codec]) -> Packed:
    """Of what fits the budget that of the smallest measured loss, the first of equals; nothing at all where that is better."""
    fitting = [packed for packed in tried if packed.size_bytes <= problem.budget_bytes]
    nothing = Packed((), [()] * len(problem.deltas))
    return min((nothing, *fitting), key=lambda packed: loss(problem, packed, codec))


def values(fields: Sequence[Field]) -> dict[str, Tensor]:
    """The matrices as decoding gives them."""
    return {field.label: field.matrix for field in fields}


def _importance(norms: Sequence[float], given: Sequence[float] | None) -> tuple[float, ...]:
    """Per task; 0 where the delta is zero. Raises InvalidParams."""
    if given is None:
        return tuple(1.0 / norm**2 if norm**2 > 0 else 0.0 for norm in norms)
    if len(given) != len(norms) or not all(math.isfinite(g) and g >= 0 for g in given):
        raise InvalidParams("importance", "must be one finite number of at least 0 for each adapter")
    return tuple(float(g) if norm > 0 else 0.0 for g, norm in zip(given, norms, strict=True))


def _fold(deltas: Sequence[LowRankDelta], norms: Sequence[float]) -> tuple[list[int], list[int]]:
    """Which different delta each one is, -1 for zero; and where each different one is first met."""
    part_of: list[int] = []
    first: list[int] = []
    for n, delta in enumerate(deltas):
        equals = (k for k, other in enumerate(first) if _same(delta, deltas[other], norms[n], norms[other]))
        part = next(equals, len(first)) if norms[n] > 0 else -1
        first += [n] if part == len(first) else []
        part_of.append(part)
    return part_of, first


def _same(left: LowRankDelta, right: LowRankDelta, norm: float, other: float) -> bool:
    return abs(norm - other) <= _SAME * norm and measured(left, right) <= (_SAME * norm) ** 2
