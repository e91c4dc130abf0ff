"""A whole adapter as mathematics: the base model it belongs to, and one delta per module."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from merge_algos.errors import BaseModelMismatch, ShapeMismatch
from merge_algos.lowrank import LowRankDelta


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """base_model: as its config names it.  deltas: module name in the base model -> delta, scaling folded in."""

    base_model: str
    deltas: Mapping[str, LowRankDelta]

    def delta(self, module: str, shape: tuple[int, int]) -> LowRankDelta:
        """The delta of a module, or the rank-0 delta of that shape where the adapter does not target it."""
        return self.deltas[module] if module in self.deltas else LowRankDelta.zero(*shape)


def union(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Every module of any adapter with its (d_out, d_in), layer 2 before layer 10. Raises ShapeMismatch."""
    return agree({name: delta.shape for name, delta in adapter.deltas.items()} for adapter in adapters)


def agree(shapes_by_adapter: Iterable[Mapping[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """The union of module shapes in natural order. Raises ShapeMismatch naming the first module with two shapes."""
    shapes: dict[str, tuple[int, int]] = {}
    for adapter in shapes_by_adapter:
        for module, shape in adapter.items():
            if shapes.setdefault(module, shape) != shape:
                raise ShapeMismatch(module, shapes[module], shape)
    return dict(sorted(shapes.items(), key=lambda item: natural(item[0])))


def common_base(base_models: Sequence[str], *, allow_mismatch: bool = False) -> str:
    """The base model all adapters share; with `allow_mismatch`, the first one's. Raises BaseModelMismatch."""
    distinct = tuple(dict.fromkeys(base_models))
    if len(distinct) > 1 and not allow_mismatch:
        raise BaseModelMismatch(distinct)
    return distinct[0]


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """The key that sorts layer 2 before layer 10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts)
