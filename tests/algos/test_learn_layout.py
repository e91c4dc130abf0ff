"""Coefficients in a vector, a table and a merge: one meaning."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learning_case import MODULES, SmallProblem, adapters, dense_outputs, whole
from merge_algos import Adapter, merge
from merge_algos.errors import InvalidParams, UnsupportedAdapter
from merge_algos.learn.attach import attached, check_modules
from merge_algos.learn.layout import block_of, lay_out, scales_of
from merge_algos.lowrank import LowRankDelta

GRANULARITIES = ("matrix", "rank", "module_type", "global")
RANKS = {"layers.0.q": [2, 0, 3], "layers.0.v": [2, 1, 3], "layers.10.q": [2, 1, 0]}
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


@pytest.mark.parametrize(
    ("granularity", "blocks"),
    [
        ("matrix", {"layers.0.q", "layers.0.v", "layers.10.q"}),
        ("rank", {"layers.0.q", "layers.0.v", "layers.10.q"}),
        ("module_type", {"layers.q", "layers.v"}),
        ("global", {"*"}),
    ],
)
def test_blocks(granularity: str, blocks: set[str]) -> None:
    layout = lay_out(RANKS, granularity)
    assert {block.name for block in layout.blocks[0]} == blocks


@pytest.mark.parametrize(("granularity", "size"), [("matrix", 7), ("rank", 14), ("module_type", 6), ("global", 3)])
def test_size_counts_what_each_adapter_has(granularity: str, size: int) -> None:
    assert lay_out(RANKS, granularity).size == size


@every_granularity
def test_the_table_says_what_the_index_says(granularity: str) -> None:
    layout = lay_out(RANKS, granularity)
    coefficients = torch.arange(layout.size).float()
    table = layout.table(coefficients)
    for module, ranks in RANKS.items():
        expected = [s for own, r in zip(table, ranks, strict=True) if r for s in scales_of(own, module, r)]
        assert coefficients[layout.index[module]].tolist() == expected


@every_granularity
def test_a_group_is_one_place_in_every_adapter(granularity: str) -> None:
    layout = lay_out({m: [2, 2, 2] for m in RANKS}, granularity)
    assert sorted(layout.group.bincount().tolist()) == [3] * (layout.size // 3)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("layers.0.q", "layers.q"),
        ("0.q", "q"),
        ("model.layers.31.mlp.experts.7.up", "model.layers.mlp.experts.up"),
        ("h1.q2", "h1.q2"),
    ],
)
def test_a_type_has_no_layer_numbers(module: str, kind: str) -> None:
    assert block_of(module, "module_type") == kind


def test_the_most_particular_block_counts() -> None:
    own = {"layers.0.q": 1.0, "layers.q": 2.0, "*": 3.0}
    assert [scales_of(own, m, 1) for m in ("layers.0.q", "layers.5.q", "layers.5.v")] == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize("own", [{}, {"other": 1.0}, {"layers.0.q": [1.0, 2.0]}])
def test_a_table_that_does_not_fit_is_refused(own: dict[str, float]) -> None:
    with pytest.raises(InvalidParams, match=r"layers\.0\.q"):
        scales_of(own, "layers.0.q", 3)


# §2.5: what coefficients mean


def forward(problem: SmallProblem, coefficients: torch.Tensor) -> torch.Tensor:
    return problem.forward(coefficients, problem.inputs[0])


@every_granularity
def test_zero_coefficients_are_the_base(granularity: str) -> None:
    problem = SmallProblem(granularity=granularity)
    plain = problem.model(problem.inputs[0])
    assert torch.equal(forward(problem, torch.zeros(problem.layout.size)), plain)


@every_granularity
@pytest.mark.parametrize("adapter", range(3))
def test_one_adapter_at_1_is_that_adapter(granularity: str, adapter: int) -> None:
    problem = SmallProblem(granularity=granularity)
    coefficients = torch.zeros(problem.layout.size)
    for block in problem.layout.blocks[adapter]:
        coefficients[block.start : block.start + block.count] = 1.0
    expected = dense_outputs(problem.model, [problem.deltas[adapter]], [1.0], problem.inputs[0])
    assert torch.allclose(forward(problem, coefficients).double(), expected, atol=1e-5)


@every_granularity
@given(seed=st.integers(0, 10_000))
def test_the_exported_adapter_is_the_forward_in_training(granularity: str, seed: int) -> None:
    problem = SmallProblem(granularity=granularity)
    coefficients = torch.randn(problem.layout.size, generator=torch.Generator().manual_seed(seed))
    table = problem.layout.table(coefficients)
    merged = merge([Adapter("base", a) for a in problem.deltas], method="coefficients", parameters={"table": table})
    exported = dense_outputs(problem.model, [merged.adapter.deltas], [1.0], problem.inputs[0])
    assert torch.allclose(forward(problem, coefficients).double(), exported, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_the_formula() -> None:
    """dL / d lambda_i = <G, B_i A_i> = tr(A_i G^T B_i), where G is the gradient by the weight matrix."""
    problem = SmallProblem()
    for parameter in problem.model.parameters():
        parameter.requires_grad_(True)
    coefficients = torch.full((problem.layout.size,), 0.3, requires_grad=True)
    forward(problem, coefficients).square().sum().backward()
    for adapter, blocks in enumerate(problem.layout.blocks):
        for block in blocks:
            G = problem.model.get_submodule(block.name).weight.grad
            delta = whole(problem.deltas[adapter], block.name)
            expected = torch.trace(delta.A @ G.mT @ delta.B)
            assert torch.allclose(coefficients.grad[block.start], expected, rtol=1e-4, atol=1e-4)


def test_the_order_of_adapters_means_nothing() -> None:
    problem, turned = SmallProblem(), SmallProblem(deltas=adapters()[::-1])
    values = {0: 0.2, 1: -0.4, 2: 0.7}
    one = torch.cat([torch.full((len(blocks),), values[n]) for n, blocks in enumerate(problem.layout.blocks)])
    other = torch.cat([torch.full((len(blocks),), values[2 - n]) for n, blocks in enumerate(turned.layout.blocks)])
    assert torch.allclose(forward(problem, one), forward(turned, other), atol=1e-5)


@pytest.mark.parametrize("granularity", ["matrix", "module_type", "global"])
def test_it_does_not_matter_how_an_adapter_is_factored(granularity: str) -> None:
    turn = torch.tensor([[2.0, 1.0], [0.5, 1.0]])
    regauged = [{m: LowRankDelta(d.B @ turn, torch.linalg.solve(turn, d.A)) for m, d in a.items()} for a in adapters()]
    problem, other = SmallProblem(granularity=granularity), SmallProblem(deltas=regauged, granularity=granularity)
    coefficients = torch.linspace(-1, 1, problem.layout.size)
    assert torch.allclose(forward(problem, coefficients), forward(other, coefficients), atol=1e-4)


# Attaching


def test_hooks_go_when_the_block_ends_even_by_an_error() -> None:
    problem = SmallProblem()
    x = problem.inputs[0]
    plain = problem.model(x)
    with (
        pytest.raises(RuntimeError, match="mine"),
        attached(problem.model, {"layers.0.up": adapters()[0]["layers.0.up"]}, lambda _: torch.ones(2)),
    ):
        assert not torch.equal(problem.model(x), plain)
        raise RuntimeError("mine")
    assert torch.equal(problem.model(x), plain)


@pytest.mark.parametrize(
    ("module", "shape", "says"),
    [
        ("layers.7.up", (12, 8), "no such module"),
        ("layers.0.up", (12, 9), "is 12 x 8 there"),
        ("layers", (1, 1), "not a linear layer"),
    ],
)
def test_modules_that_the_base_lacks_are_refused_by_name(module: str, shape: tuple[int, int], says: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=f"{module}.*{says}"):
        check_modules(SmallProblem().model, {module: shape})


def test_the_prefix_of_a_model_with_a_head_is_found() -> None:
    model = SmallProblem().model
    model.base_model_prefix = "bert"
    assert check_modules(model, {"bert.layers.0.up": (12, 8), "layers.1.up": (5, 12)}) == {
        "bert.layers.0.up": "layers.0.up",
        "layers.1.up": "layers.1.up",
    }


def test_modules_of_the_case_are_those_of_the_model() -> None:
    assert check_modules(SmallProblem().model, MODULES) == {m: m for m in MODULES}
