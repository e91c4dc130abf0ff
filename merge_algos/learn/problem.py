"""What the training loop is given: tasks whose rows it can have the outputs of, for coefficients that it chooses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from merge_algos.learn.layout import Layout
from merge_algos.learn.objectives import Output

Picked = Mapping[int, Sequence[int]]  # task -> rows of its training or held-out part


@dataclass(frozen=True, slots=True)
class Task:
    """weight: of its loss, above 0.  rows: for training.  held_out: for early stopping.  forget: minimise its skill instead."""

    name: str
    weight: float
    rows: int
    held_out: int
    forget: bool = False


class Problem(Protocol):
    """A model, its adapters and its data, wherever they are."""

    @property
    def layout(self) -> Layout: ...

    @property
    def tasks(self) -> Sequence[Task]: ...

    def outputs(self, coefficients: Tensor, picked: Picked, *, held_out: bool = False, noise: int | None = None) -> list[Output]:
        """Of these rows, one per task picked, in that order; differentiable in the coefficients (size,).

        noise: a seed for dropping some tokens, the strong view of `ufm`.  Raises torch.OutOfMemoryError.
        """
        ...
