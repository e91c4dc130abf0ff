"""Small matrices on busy machines: one thread, since two only wait for each other, and no deadline on one example.

And PEFT as it is on a GPU: its extension for BOFT puts blocks on a diagonal, and without it PEFT trains one factor, whatever is
asked for. Everything else of several factors, their permutations included, is PEFT's own and runs anywhere.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import peft.tuners.boft.layer as boft
import pytest
import torch
from hypothesis import settings

settings.register_profile("formats", deadline=None)
settings.load_profile("formats")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _several_factors() -> Iterator[None]:
    before = boft._FBD_CUDA
    boft._FBD_CUDA = SimpleNamespace(forward=lambda blocks: [torch.stack([torch.block_diag(*each) for each in blocks])])
    yield
    boft._FBD_CUDA = before
