"""A small problem to learn: two linear layers, adapters that each solve one task, rows drawn from that task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from merge_algos import LowRankDelta
from merge_algos.learn.attach import attached
from merge_algos.learn.layout import Granularity, Layout, lay_out
from merge_algos.learn.objectives import Output
from merge_algos.learn.problem import Picked, Task
from merge_algos.lowrank import concat

MODULES = {"layers.0.up": (12, 8), "layers.1.up": (5, 12)}
CLASSES = 5
CPU = torch.device("cpu")


def base() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"up": nn.Linear(d_in, d_out)}) for d_out, d_in in MODULES.values()]
    return Base(nn.ModuleList(layers)).requires_grad_(False)


class Base(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        first, second = (layer["up"] for layer in self.layers)
        out: Tensor = second(torch.tanh(first(x)))
        return out


def adapters(count: int = 3, rank: int = 2, seed: int = 1) -> list[dict[str, LowRankDelta]]:
    """module -> delta, each large enough to change what the base says; the last one lacks the second module."""
    drawn = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=drawn)  # noqa: E731
    found = [{m: LowRankDelta(draw(d_out, rank), draw(rank, d_in)) for m, (d_out, d_in) in MODULES.items()} for _ in range(count)]
    return [*found[:-1], {"layers.0.up": found[-1]["layers.0.up"]}]


def whole(adapter: Mapping[str, LowRankDelta], module: str) -> LowRankDelta:
    return adapter.get(module, LowRankDelta.zero(*MODULES[module]))


@dataclass
class SmallProblem:
    """Task n: to say what the base with adapter n at weight 1 says. Rows and labels are drawn, so held-out rows are unseen."""

    deltas: Sequence[Mapping[str, LowRankDelta]] = field(default_factory=adapters)
    granularity: Granularity = "matrix"
    rows: int = 40
    held_out: int = 16
    weights: Sequence[float] = (1.0, 1.0, 1.0)
    forget: Sequence[int] = ()
    labelled: bool = True
    device: torch.device = CPU
    trained_on: list[Picked] = field(default_factory=list)
    scored: list[Picked] = field(default_factory=list)

    @cached_property
    def model(self) -> nn.Module:
        return base()

    @cached_property
    def layout(self) -> Layout:
        return lay_out({m: [whole(a, m).rank for a in self.deltas] for m in MODULES}, self.granularity)

    @property
    def tasks(self) -> list[Task]:
        return [Task(f"task{n}", w, self.rows, self.held_out, n in self.forget) for n, w in enumerate(self.weights)]

    @cached_property
    def inputs(self) -> Tensor:
        """(tasks, rows and held out, 8)."""
        return torch.randn(len(self.weights), self.rows + self.held_out, 8, generator=torch.Generator().manual_seed(2))

    @cached_property
    def labels(self) -> Tensor:
        return torch.stack([dense_outputs(self.model, [self.deltas[n]], [1.0], x).argmax(1) for n, x in enumerate(self.inputs)])

    def outputs(self, coefficients: Tensor, picked: Picked, *, held_out: bool = False, noise: int | None = None) -> list[Output]:
        (self.trained_on if coefficients.requires_grad else self.scored).append(picked)
        found = []
        for task, own in picked.items():
            rows = [n + self.rows * held_out for n in own]
            x = self.inputs[task][rows]
            if noise is not None:
                x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(noise))
            labels = self.labels[task][rows] if self.labelled else None
            found.append(Output(self.forward(coefficients, x), labels))
        return found

    def asked(self, picked: Picked, *, held_out: bool = False) -> list[int]:
        return [len(rows) for rows in picked.values()]

    def forward(self, coefficients: Tensor, x: Tensor) -> Tensor:
        stacked = {m: concat([whole(a, m) for a in self.deltas]) for m in MODULES}
        scales = {m: coefficients[self.layout.index[m]] for m in MODULES}
        with attached(self.model, stacked, scales.__getitem__):
            out: Tensor = self.model(x)
        return out


def dense_outputs(model: nn.Module, deltas: Sequence[Mapping[str, LowRankDelta]], weights: Sequence[float], x: Tensor) -> Tensor:
    """The oracle: weights changed densely, in float64."""
    changed = {}
    for module in MODULES:
        W = model.get_submodule(module).weight.double()
        terms = [w * whole(delta, module).to_dense().double() for delta, w in zip(deltas, weights, strict=True)]
        changed[module] = W + sum(terms, start=torch.zeros_like(W))
    first, second = MODULES
    bias = {m: model.get_submodule(m).bias.double() for m in MODULES}
    hidden = torch.tanh(x.double() @ changed[first].mT + bias[first])
    return hidden @ changed[second].mT + bias[second]
