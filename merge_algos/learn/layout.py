"""Which coefficient scales what: a flat vector of coefficients, and its place in every module of every adapter."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from merge_algos.errors import InvalidParams

Granularity = Literal["matrix", "rank", "module_type", "global"]
Table = Sequence[Mapping[str, float | Sequence[float]]]  # of each adapter: block -> its coefficient, or one per rank

EVERYWHERE = "*"  # the block of `global`

_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Block:
    """Coefficients `start` to `start + count` scale the modules of this name in one adapter."""

    name: str
    start: int
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """blocks: of each adapter, in order.  index: module -> (R,), of each rank-one term of the concatenated adapters its
    coefficient.  group: (size,), equal for the coefficients that different adapters have in the same place.
    """

    granularity: Granularity
    blocks: tuple[tuple[Block, ...], ...]
    index: Mapping[str, Tensor]
    group: Tensor

    @property
    def size(self) -> int:
        return len(self.group)

    def table(self, coefficients: Tensor) -> list[dict[str, float | list[float]]]:
        """The coefficients (size,) by adapter and block, as numbers that JSON keeps exactly."""
        values: list[float] = coefficients.double().tolist()
        if self.granularity == "rank":
            return [{b.name: values[b.start : b.start + b.count] for b in blocks} for blocks in self.blocks]
        return [{block.name: values[block.start] for block in blocks} for blocks in self.blocks]


def lay_out(ranks: Mapping[str, Sequence[int]], granularity: Granularity) -> Layout:
    """ranks: module -> rank of each adapter there, 0 where it is absent. In the modules' order, adapter after adapter."""
    adapters = len(next(iter(ranks.values())))
    blocks = [_blocks(ranks, adapter, granularity) for adapter in range(adapters)]
    starts = accumulate((sum(own.values()) for own in blocks[:-1]), initial=0)
    placed = tuple(_placed(own, start) for own, start in zip(blocks, starts, strict=True))
    found = [{block.name: block for block in own} for own in placed]
    index = {
        module: torch.cat([_terms(found[a].get(block_of(module, granularity)), r, granularity) for a, r in enumerate(row)])
        for module, row in ranks.items()
    }
    return Layout(granularity, placed, index, _groups(placed))


def block_of(module: str, granularity: Granularity) -> str:
    """The block that a module belongs to. A type is the module's name without its layer numbers."""
    match granularity:
        case "global":
            return EVERYWHERE
        case "module_type":
            return _NUMBER.sub("", module).lstrip(".")
        case _:
            return module


def scales_of(own: Mapping[str, float | Sequence[float]], module: str, rank: int) -> list[float]:
    """What scales each of the adapter's rank-one terms in this module. own: the adapter's line of a table.

    Raises InvalidParams where the table says nothing, or something for another rank.
    """
    for granularity in ("matrix", "module_type", "global"):
        value = own.get(block_of(module, granularity))
        if value is not None:
            return _per_rank(value, module, rank)
    raise InvalidParams("parameters.table", f"has no coefficient for {module[:200]}, nor for its type, nor for {EVERYWHERE!r}")


def _per_rank(value: Any, module: str, rank: int) -> list[float]:
    if isinstance(value, int | float):
        return [float(value)] * rank
    if len(value) != rank:
        raise InvalidParams("parameters.table", f"has {len(value)} coefficients for {module[:200]}, whose rank is {rank}")
    return [float(each) for each in value]


def _blocks(ranks: Mapping[str, Sequence[int]], adapter: int, granularity: Granularity) -> dict[str, int]:
    """Block -> number of coefficients, of the modules that this adapter has."""
    present = {module: row[adapter] for module, row in ranks.items() if row[adapter]}
    return {block_of(module, granularity): r if granularity == "rank" else 1 for module, r in present.items()}


def _placed(blocks: Mapping[str, int], start: int) -> tuple[Block, ...]:
    placed = []
    for name, count in blocks.items():
        placed.append(Block(name, start, count))
        start += count
    return tuple(placed)


def _terms(block: Block | None, rank: int, granularity: Granularity) -> Tensor:
    """(rank,): of one adapter in one module."""
    if block is None or not rank:
        return torch.zeros(0, dtype=torch.long)
    return block.start + (torch.arange(rank) if granularity == "rank" else torch.zeros(rank, dtype=torch.long))


def _groups(blocks: Sequence[Sequence[Block]]) -> Tensor:
    """(size,): a number for every place, a place being a block and, within it, a rank."""
    places = [(block.name, k) for own in blocks for block in own for k in range(block.count)]
    numbers = {place: n for n, place in enumerate(dict.fromkeys(places))}
    return torch.tensor([numbers[place] for place in places], dtype=torch.long)
