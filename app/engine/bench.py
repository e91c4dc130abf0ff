"""What a task runs with, and how it uses the CPU."""

from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from app.adapters import OpenAdapter
from app.services import Services
from merge_algos.lowrank import LowRankDelta
from storage.digest import Digest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Workbench:
    """What a task runs with: the services, a device, CPU threads, and how to open an adapter (a caller may keep them open).

    pool: those threads, shared by the tasks of this process: while one task writes, the modules of another are computed.
    """

    services: Services
    device: str
    threads: int
    pool: Executor
    open_adapter: Callable[[Digest], OpenAdapter]
    kept: dict[str, Any] = field(default_factory=dict)  # what is slow to load and needed again by the next task

    def deltas(self, inputs: Iterable[Digest], module: str, shape: tuple[int, int]) -> list[LowRankDelta]:
        """One module of these adapters, on the device."""
        return [self.open_adapter(digest).delta(module, shape, self.device) for digest in inputs]

    def side_by_side(self, one: Callable[[str], T], names: Iterable[str]) -> list[T]:
        """`one` of every name, in order, each by one thread: small matrices gain little from more, and bytes never depend on it.

        Raises the first error, in order; what has not begun by then does not begin.
        """
        futures = [self.pool.submit(one, name) for name in names]
        try:
            return [future.result() for future in futures]
        finally:
            wait(future for future in futures if not future.cancel())


def threads_of(count: int) -> Executor:
    """That many, of which each computes alone."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
