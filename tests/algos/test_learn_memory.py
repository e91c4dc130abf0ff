"""A batch that does not fit the memory is tried once more in halves; then the job ends with a sentence."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from app.engine.learning import fitting
from app.errors import OutOfMemory, problem
from learning_case import SmallProblem
from merge_algos.learn.objectives import Output
from merge_algos.learn.problem import Picked
from merge_algos.learned.atlas import Atlas


@dataclass
class Narrow(SmallProblem):
    """Holds so many rows of a task while it trains, and any number while it only looks."""

    room: int = 4

    def outputs(self, coefficients: Tensor, picked: Picked, *, held_out: bool = False, noise: int | None = None) -> list[Output]:
        if coefficients.requires_grad and max(map(len, picked.values())) > self.room:
            raise torch.OutOfMemoryError("no room")
        return super().outputs(coefficients, picked, held_out=held_out, noise=noise)


def trained(room: int, *, accumulate: int = 1, steps: int = 3) -> tuple[Narrow, Sequence[int]]:
    """The pieces of every state on the way."""
    found, method = Narrow(room=room), Atlas(steps=steps, init=0.3, batch_size=8, accumulate=accumulate)
    state, pieces = fitting(found, method, None, seed=0), []
    while not state.done:
        state = fitting(found, method, state, seed=0)
        pieces.append(state.pieces)
    return found, pieces


@pytest.mark.parametrize(("room", "accumulate", "pieces"), [(8, 1, 1), (4, 1, 2), (4, 2, 2), (2, 2, 4)])
def test_half_of_the_batch_is_tried_once_and_kept(room: int, accumulate: int, pieces: int) -> None:
    assert trained(room, accumulate=accumulate)[1] == [pieces] * 3


def test_no_row_is_lost_to_the_retry() -> None:
    found, _ = trained(4, steps=5)
    assert sorted(row for picked in found.trained_on for row in picked[0]) == list(range(found.rows))


@pytest.mark.parametrize(("room", "accumulate"), [(3, 1), (1, 2)])
def test_what_does_not_fit_in_halves_is_refused_with_the_device(room: int, accumulate: int) -> None:
    with pytest.raises(OutOfMemory, match="cpu") as raised:
        trained(room, accumulate=accumulate)
    assert problem(raised.value)["status"] == 507
