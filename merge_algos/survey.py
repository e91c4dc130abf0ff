"""What one module of a reversible basis would lose at several sizes: measured, so that bytes can be spread over modules."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch

from merge_algos import codecs
from merge_algos.codec import Codec, Encoded, Fields, Floor, Problem, Quantize, check_deltas, check_quantize, distinct, measured
from merge_algos.entries import check_choice, check_finite_number, check_flag, check_whole_number
from merge_algos.errors import InvalidParams, NonFiniteResult
from merge_algos.lowrank import LowRankDelta
from merge_algos.packing import split

CodecChoice = Literal["auto", "hybrid", "rmm", "rmm_aligned", "truncate", "tucker2"]
_ORDER = {"hybrid": 1, "rmm": 2, "rmm_aligned": 2}  # after those that may stand in for them or leave them no chance
_SAFELY = 0.999  # a floor is exact but for rounding
_PRINCIPAL = ("rmm", "rmm_aligned")


@dataclass(frozen=True)
class Options:
    """How to make a reversible basis.

    codec: one for all modules, or `auto`: per module the one of least measured error.  quantize: `none` is bf16; `auto`
    mixes precisions.  budget: bytes of the basis as a fraction of the inputs' bytes stored as bf16, above 0.
    p: of the rmm codecs, principal directions per position, given instead of the budget, which then means nothing;
    exact but for the encoding at min(r, n - 1).  center, align: of rmm, see there; align null leaves it to the codec's name.
    seed: of codecs that draw random numbers; none of these does.
    Raises InvalidParams naming `parameters.<field>`.
    """

    codec: CodecChoice = "auto"
    quantize: Quantize = "auto"
    p: int | None = None
    budget: float = 0.5
    center: bool = True
    align: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("codec", self.codec, ("auto", *codecs.registry()))
        check_quantize(self.quantize)
        check_finite_number("budget", self.budget)
        if self.budget <= 0:
            raise InvalidParams("parameters.budget", f"must be above 0, not {self.budget}")
        check_flag("center", self.center)
        if self.align is not None:
            check_flag("align", self.align)
        check_whole_number("seed", self.seed, least=0)
        self._check_p()

    def _check_p(self) -> None:
        if self.p is None:
            return
        check_whole_number("p", self.p, least=0)
        if self.codec not in _PRINCIPAL:
            raise InvalidParams("parameters.p", f"only {' and '.join(_PRINCIPAL)} have principal directions, not {self.codec}")

    def check_for(self, count: int, rank: int | None = None) -> None:
        """Raises InvalidParams for more directions than these adapters can have. rank: the largest of them, where known."""
        most = min(count - bool(self.center), count if rank is None else rank)
        if self.p is not None and self.p > most:
            raise InvalidParams("parameters.p", f"these adapters have at most {most} principal directions, not {self.p}")

    @property
    def codecs(self) -> tuple[str, ...]:
        return tuple(codecs.registry()) if self.codec == "auto" else (self.codec,)

    def parameters(self, codec: str) -> dict[str, Any]:
        """What of these options the codec has a field for."""
        known = {field.name for field in dataclasses.fields(codecs.find(codec))}  # type: ignore[arg-type]
        return {name: given for name, given in asdict(self).items() if name in known and given is not None}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store a module. errors: squared Frobenius error per task, measured after decoding.

    importance: factor of each task's squared error in the fit, None for 1/||delta||^2.
    """

    codec: str
    parameters: Mapping[str, Any]
    budget_bytes: int
    size_bytes: int
    errors: tuple[float, ...]
    importance: tuple[float, ...] | None = None

    def build(self) -> Codec:
        return codecs.find(self.codec)(**self.parameters)


@dataclass(frozen=True, slots=True)
class Survey:
    """input_bytes: of the module's inputs as bf16.  norms: squared Frobenius norm per task.

    candidates: storing nothing is among them for every codec, so that any budget can be met. A codec's even share may be
    missing, where others are smaller and better whatever it does.
    """

    shape: tuple[int, int]
    input_bytes: int
    norms: tuple[float, ...]
    candidates: tuple[Candidate, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """What `to_json` gave, also after a round trip through text, where tuples have become lists."""
        return cls(
            shape=(document["shape"][0], document["shape"][1]),
            input_bytes=document["input_bytes"],
            norms=tuple(document["norms"]),
            candidates=tuple(_candidate(candidate) for candidate in document["candidates"]),
        )


def survey(
    deltas: Sequence[LowRankDelta],
    options: Options,
    *,
    module: str,
    seed: int,
    importance: Sequence[float] | None = None,
) -> Survey:
    """Fit and measure every codec that the options allow at every budget of its grid, but for those without a chance.

    deltas: one per adapter, rank 0 where absent.  importance: factor of each task's squared error, in the fit and in the
    allocation, which takes 1 / squared norm of the whole adapter; 1 / squared norm of its delta here unless given.
    Raises WrongCount, ShapeMismatch, NonFiniteTensor or NonFiniteResult naming the module, InvalidParams for a p too large.
    """
    check_deltas(deltas, module)
    options.check_for(len(deltas))
    wide = [delta.to(torch.float64) for delta in deltas]
    norms = tuple(delta.norm() ** 2 for delta in wide)
    if not all(math.isfinite(norm) and norm < torch.finfo(torch.float32).max for norm in norms):
        raise NonFiniteResult(module, "float32")
    input_bytes = sum(2 * delta.rank * sum(delta.shape) for delta in deltas)
    given = None if importance is None else tuple(importance)
    asked = [Candidate(codec, parameters, size, 0, norms, given) for codec, parameters, size in _plans(options, input_bytes)]
    return Survey(deltas[0].shape, input_bytes, norms, tuple(_measured(wide, asked, module)))


def encode(deltas: Sequence[LowRankDelta], choice: Candidate, *, module: str, seed: int) -> tuple[Encoded, tuple[float, ...]]:
    """The module as `survey` measured it, and the relative error of each task's delta, measured again; 0 for a zero delta.

    Raises what `survey` raises.
    """
    check_deltas(deltas, module)
    wide = [delta.to(torch.float64) for delta in deltas]
    encoded = choice.build().fit(wide, choice.budget_bytes, seed, choice.importance)
    errors = _errors(wide, decode_all(encoded), module)
    norms = [delta.norm() for delta in wide]
    return encoded, tuple(math.sqrt(error) / norm if norm else 0.0 for error, norm in zip(errors, norms, strict=True))


def even_bytes(options: Options, input_bytes: int) -> int:
    """A module's share of the budget when bytes are spread evenly."""
    return int(options.budget * input_bytes)


def decode_task(encoded: Encoded, task: int) -> LowRankDelta:
    """The delta of one task, float32 factors."""
    return decode(encoded.codec, encoded.layout, encoded.shape, encoded.shared, encoded.tasks[task], task)


def decode(
    codec: str, layout: Mapping[str, Any], shape: tuple[int, int], shared: torch.Tensor, own: torch.Tensor, task: int
) -> LowRankDelta:
    """The delta of one task, float32 factors, from the shared bytes and the task's own. Raises InvalidParams for the codec.

    shared, own: 1-D uint8.  own: `parts[layout["part_of"][task]]`, anything where that is -1.
    """
    return _restore(codec, layout, shape, split(layout["shared"], shared), own, task)


def decode_all(encoded: Encoded) -> list[LowRankDelta]:
    """The deltas of all tasks, in their order; the shared bytes are unpacked once."""
    shared = split(encoded.layout["shared"], encoded.shared)
    return [_restore(encoded.codec, encoded.layout, encoded.shape, shared, own, task) for task, own in enumerate(encoded.tasks)]


def _restore(
    codec: str, layout: Mapping[str, Any], shape: tuple[int, int], shared: Fields, own: torch.Tensor, task: int
) -> LowRankDelta:
    part = layout["part_of"][task]
    if part < 0:
        return LowRankDelta.zero(*shape)
    return codecs.find(codec).restore(shape, shared, split(layout["parts"][part], own)).to(torch.float32)


def _plans(options: Options, input_bytes: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Codec, its parameters, its bytes: the grid of each, and nothing at all."""
    for codec in options.codecs:
        parameters = options.parameters(codec)
        grid = (1.0,) if options.p is not None else codecs.find(codec).grid
        yield codec, parameters, 0
        for budget_bytes in (
            even_bytes(options, input_bytes) if x == 1.0 else int(x * options.budget * input_bytes) for x in grid
        ):
            if budget_bytes:
                yield codec, parameters, budget_bytes


def _measured(deltas: Sequence[LowRankDelta], asked: Sequence[Candidate], module: str) -> list[Candidate]:
    """All that are worth it, fitted and measured. What codecs need beforehand is prepared once, and no byte is packed.

    A codec that names a stand-in makes the same bytes as that one, so what was measured of it at this budget is its own. Left
    out is a share of a codec that has no other (its grid is 1) when candidates before it are smaller and better than every
    form it can take: see `allocate` for why nothing is lost by that.
    """
    part_of, problem = distinct(deltas, 0, asked[0].importance)
    prepared: dict[Callable[[Problem], Any], Any] = {}
    found: dict[tuple[str, int], Candidate] = {}
    for each in sorted(asked, key=lambda each: _ORDER.get(each.codec, 0)):
        codec, room = each.build(), dataclasses.replace(problem, budget_bytes=each.budget_bytes)
        if not (each.budget_bytes and problem.deltas):
            found[each.codec, each.budget_bytes] = each
            continue
        if codec.prepare not in prepared:
            prepared[codec.prepare] = codec.prepare(problem)
        same = found.get((codec.stand_in(room, prepared[codec.prepare]) or "", each.budget_bytes))
        if same is not None:
            size_bytes, errors = same.size_bytes, same.errors
        elif found and codec.grid == (1.0,) and _is_beaten(codec.floors(room), part_of, [*found.values()]):
            continue
        else:
            packed = codec.represent(room, prepared[codec.prepare])
            decoded = [codec.decoded(room.shape, packed, part) for part in part_of]
            size_bytes, errors = packed.size_bytes, _errors(deltas, decoded, module)
        found[each.codec, each.budget_bytes] = dataclasses.replace(each, size_bytes=size_bytes, errors=errors)
    return [found[key] for key in ((each.codec, each.budget_bytes) for each in asked) if key in found]


def _is_beaten(floors: Sequence[Floor], part_of: Sequence[int], found: Sequence[Candidate]) -> bool:
    """Whether each of the floors is above a candidate of no more bytes, by any weighting that the allocation may use."""
    return bool(floors) and all(any(_is_below(each, floor, part_of) for each in found) for floor in floors)


def _is_below(candidate: Candidate, floor: Floor, part_of: Sequence[int]) -> bool:
    if candidate.size_bytes > floor.size_bytes:
        return False
    pairs = [(error, floor.errors[part]) for error, part in zip(candidate.errors, part_of, strict=True) if part >= 0]
    if candidate.importance is None:
        return all(error < _SAFELY * least for error, least in pairs)
    weights = [w for w, part in zip(candidate.importance, part_of, strict=True) if part >= 0]
    error, least = (math.fsum(w * e for w, e in zip(weights, side, strict=True)) for side in zip(*pairs, strict=True))
    return error < _SAFELY * least


def _errors(deltas: Sequence[LowRankDelta], decoded: Sequence[LowRankDelta], module: str) -> tuple[float, ...]:
    """Squared, per task."""
    errors = tuple(measured(delta, back) for delta, back in zip(deltas, decoded, strict=True))
    if not all(math.isfinite(error) for error in errors):
        raise NonFiniteResult(module, "float32")
    return errors


def _candidate(document: Mapping[str, Any]) -> Candidate:
    importance = document["importance"]
    return Candidate(
        codec=document["codec"],
        parameters=dict(document["parameters"]),
        budget_bytes=document["budget_bytes"],
        size_bytes=document["size_bytes"],
        errors=tuple(document["errors"]),
        importance=None if importance is None else tuple(importance),
    )
