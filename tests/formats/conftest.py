"""Small matrices on busy machines: one thread, since two only wait for each other, and no deadline on one example."""

from collections.abc import Iterator

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
