"""Reversible merging as a plain Python call: one basis of several adapters, any task back with a stated error.

The service does the same in steps: `survey` per module, `allocate` over all, `encode` per module, `decode` per task.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_algos.adapter import Adapter, common_base, union
from merge_algos.allocation import allocate
from merge_algos.codec import Encoded, check_count
from merge_algos.errors import InvalidParams
from merge_algos.merge import merge
from merge_algos.rank import RankRule
from merge_algos.survey import Candidate, Options, Survey, decode, decode_task, encode, survey

__all__ = [
    "Basis",
    "Candidate",
    "Encoded",
    "Options",
    "Survey",
    "allocate",
    "build_basis",
    "decode",
    "decode_task",
    "encode",
    "survey",
]


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """names: of the tasks, in the order of the adapters.  modules: each one's bytes.

    errors: name -> `||decoded - adapter|| / ||adapter||` over all modules, measured.  module_errors: module -> the same of
    that module, one per task.  input_bytes: the adapters as bf16.
    """

    base_model: str
    names: tuple[str, ...]
    modules: Mapping[str, Encoded]
    errors: Mapping[str, float]
    module_errors: Mapping[str, tuple[float, ...]]
    input_bytes: int

    @property
    def size_bytes(self) -> int:
        return sum(encoded.size_bytes for encoded in self.modules.values())

    def reconstruct(self, name: str) -> Adapter:
        """One task's adapter, float32; without the modules where nothing of it is kept. Raises InvalidParams."""
        if name not in self.names:
            raise InvalidParams("task", f"no task {name[:100]!r}; there are {', '.join(self.names)}")
        task = self.names.index(name)
        deltas = {module: decode_task(encoded, task) for module, encoded in self.modules.items()}
        return Adapter(self.base_model, {module: delta for module, delta in deltas.items() if delta.rank})

    def mix(self, weights: Mapping[str, float], rank: int | RankRule | None = None) -> Adapter:
        """The weighted sum of decoded tasks, exact unless a rank is given. Raises InvalidParams, InvalidWeights, InvalidRank."""
        if not weights:
            raise InvalidParams("weights", "must name at least one task")
        adapters = [self.reconstruct(name) for name in weights]
        return merge(adapters, weights=list(weights.values()), rank=rank).adapter


def build_basis(adapters: Sequence[Adapter], names: Sequence[str], options: Options | None = None) -> Basis:
    """One basis of 1 to 64 adapters of one base model, of any ranks and modules. names: one each, all different.

    Raises WrongCount, InvalidParams, BaseModelMismatch, ShapeMismatch, NonFiniteTensor or NonFiniteResult.
    """
    chosen = options or Options()
    check_count(len(adapters))
    _check_names(names, len(adapters))
    shapes = union(adapters)
    rank = max((delta.rank for adapter in adapters for delta in adapter.deltas.values()), default=0)
    chosen.check_for(len(adapters), rank)
    deltas = {module: [adapter.delta(module, shape) for adapter in adapters] for module, shape in shapes.items()}
    sizes = [sum(column) for column in zip(*([d.norm() ** 2 for d in row] for row in deltas.values()), strict=True)]
    importance = [1.0 / size if 0 < size < math.inf else 0.0 for size in sizes]
    surveys = {m: survey(row, chosen, module=m, seed=chosen.seed, importance=importance) for m, row in deltas.items()}
    choices = allocate(surveys, chosen)
    encoded = {module: encode(row, choices[module], module=module, seed=chosen.seed) for module, row in deltas.items()}
    return Basis(
        base_model=common_base([adapter.base_model for adapter in adapters]),
        names=tuple(names),
        modules={module: result for module, (result, _) in encoded.items()},
        errors=dict(zip(names, _whole_errors([surveys[m].norms for m in encoded], [e for _, e in encoded.values()]), strict=True))
        if encoded
        else dict.fromkeys(names, 0.0),
        module_errors={module: errors for module, (_, errors) in encoded.items()},
        input_bytes=sum(each.input_bytes for each in surveys.values()),
    )


def _check_names(names: Sequence[str], count: int) -> None:
    if len(names) != count or len(set(names)) != count:
        raise InvalidParams("names", f"{count} adapters need as many different names, not {list(names)!r:.100}")


def _whole_errors(norms: Sequence[Sequence[float]], relative: Sequence[Sequence[float]]) -> list[float]:
    """Per task, from squared norms and relative errors of each module."""
    lost = [[n * e**2 for n, e in zip(*row, strict=True)] for row in zip(norms, relative, strict=True)]
    totals = zip(zip(*lost, strict=True), zip(*norms, strict=True), strict=True)
    return [math.sqrt(sum(error) / sum(norm)) if sum(norm) else 0.0 for error, norm in totals]
