"""Methods that see all modules before they merge one: TIES with the threshold of the whole adapter, by brute force."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import SAMPLE, WEIGHTS, close, dense, one_module, random_delta, value
from merge_algos import Adapter, LowRankDelta, MergeResult, RankRule, merge
from merge_algos.blocks import BLOCK_ENTRIES, dense_rows, row_ranges
from merge_algos.entries import at_least
from merge_algos.errors import NonFiniteResult
from merge_algos.merge import build, merge_module, survey_module
from merge_algos.methods import registry
from merge_algos.protocol import ModuleContext
from oracles import elect

Shape = tuple[int, int]
ROUNDS = {"float32": 2, "float64": 4, "mixed": 5}  # of the last, the first finds only that it is mixed


@dataclass(frozen=True)
class Model:
    """Adapters of several modules, one weight for each."""

    shapes: Mapping[str, Shape]
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]

    def inputs(self, module: str) -> list[LowRankDelta]:
        """What a merge of the module computes with: all in float64 if one of them is."""
        deltas = [adapter.delta(module, self.shapes[module]) for adapter in self.adapters]
        wide = any(torch.float64 in (delta.B.dtype, delta.A.dtype) for delta in deltas)
        return [delta.to(torch.float64 if wide else torch.float32) for delta in deltas]

    def present(self, module: str) -> list[int]:
        deltas = self.inputs(module)
        return [n for n, weight in enumerate(self.weights) if weight and deltas[n].rank]

    def merged(self, density: float, **options: Any) -> MergeResult:
        parameters = {"trim": "model", "density": density}
        rank, dtype = max(map(min, self.shapes.values())), torch.float64
        return merge(self.adapters, method="ties", weights=self.weights, rank=rank, dtype=dtype, parameters=parameters, **options)


@st.composite
def deltas(draw: st.DrawFn, shape: Shape) -> LowRankDelta:
    """Of float32 or float64; half of them with entries that are small whole numbers, so that many are equal."""
    delta = random_delta(draw(st.integers(0, 2**32)), shape, draw(st.integers(1, 4)))
    delta = delta if draw(st.booleans()) else LowRankDelta(delta.B.round(), delta.A.round())
    return delta.scale(2.0 ** draw(st.integers(-4, 4))).to(draw(st.sampled_from([torch.float32, torch.float64])))


@st.composite
def models(draw: st.DrawFn) -> Model:
    sizes = st.integers(1, 9)
    shapes = {f"layers.{n}": draw(st.tuples(sizes, sizes)) for n in range(draw(st.integers(1, 4)))}
    adapters = []
    for _ in range(draw(st.integers(1, 3))):
        here = [name for name in shapes if draw(st.booleans())] or ["layers.0"]
        adapters.append(Adapter("org/base", {name: draw(deltas(shapes[name])) for name in here}))
    used = {name: shape for name, shape in shapes.items() if any(name in adapter.deltas for adapter in adapters)}
    return Model(used, tuple(adapters), tuple(draw(st.lists(WEIGHTS, min_size=len(adapters), max_size=len(adapters)))))


def brute_force(model: Model, n: int, density: float) -> float:
    """The smallest magnitude that adapter n keeps: a full sort of all its entries, in every module that it is present in."""
    here = [model.inputs(module)[n] for module in model.shapes if n in model.present(module)]
    entries = torch.cat([delta.to_dense().double().abs().flatten() for delta in here])
    return sorted(entries.tolist(), reverse=True)[max(1, round(density * len(entries))) - 1]


densities = st.floats(0.01, 1.0)


@settings(max_examples=60)
@given(model=models(), density=densities)
def test_the_threshold_is_that_of_all_entries_of_the_adapter(model: Model, density: float) -> None:
    for report in model.merged(density).reports:
        expected = [brute_force(model, n, density) for n in model.present(report.module)]
        assert report.diagnostics.get("thresholds", []) == expected


@settings(max_examples=40)
@given(model=models(), density=densities)
def test_every_module_is_what_its_trimmed_deltas_elect(model: Model, density: float) -> None:
    result = model.merged(density)
    thresholds = {n: brute_force(model, n, density) for module in model.shapes for n in model.present(module)}
    for module, shape in model.shapes.items():
        here, given_ = model.present(module), model.inputs(module)
        stack = [trimmed(given_[n].to_dense().double(), thresholds[n]) for n in here]
        expected = elect(stack, [model.weights[n] for n in here]) if here else torch.zeros(shape, dtype=torch.float64)
        scale = 1.0 + sum(float(dense(delta).norm()) for delta in given_)
        assert close(dense(result.adapter.deltas[module]), expected, scale, tolerance=1e-5)


def trimmed(X: Tensor, threshold: float) -> Tensor:
    return torch.where(X.abs() >= threshold, X, 0.0)


def test_a_module_of_several_blocks_is_counted_whole() -> None:
    shape = (1500, 1100)
    delta = random_delta(0, shape, 3).to(torch.float32)
    rows = [dense_rows(delta, start, stop) for start, stop in row_ranges(shape)]
    entries = torch.cat(rows).abs().flatten()
    assert shape[0] * shape[1] > BLOCK_ENTRIES
    adapters = [Adapter("org/base", {"a": delta, "b": delta.scale(2.0)})]
    result = merge(adapters, method="ties", rank=1, parameters={"trim": "model", "density": 0.1})
    both = torch.cat([entries, 2 * entries])
    expected = float(both.kthvalue(len(both) - round(0.1 * len(both)) + 1).values)
    assert [report.diagnostics["thresholds"] for report in result.reports] == [[expected], [expected]]


def test_of_one_module_both_trims_are_the_same() -> None:
    alone, whole = (value("ties", SAMPLE, parameters={"trim": trim}) for trim in ("module", "model"))
    assert torch.equal(alone, whole)


def test_a_module_of_small_entries_is_trimmed_away() -> None:
    large = random_delta(0, (6, 5), 2)
    adapter = Adapter("org/base", {"large": large, "small": large.scale(1e-6)})
    result = merge([adapter], method="ties", rank=5, parameters={"trim": "model", "density": 0.5})
    assert [bool(result.adapter.deltas[name].to_dense().any()) for name in ("large", "small")] == [True, False]


def test_without_any_module_nothing_is_surveyed() -> None:
    assert merge([Adapter("org/base", {})], method="ties", rank=1, parameters={"trim": "model"}).reports == ()


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), threshold=st.floats(0, 4), nearest=st.booleans())
def test_a_float64_threshold_cuts_float32_entries_where_it_lies(seed: int, threshold: float, nearest: bool) -> None:
    X = random_delta(seed, (6, 5), 2).to(torch.float32).to_dense()
    at = float(torch.nextafter(X[0, 0].double().abs(), torch.tensor(threshold, dtype=torch.float64))) if nearest else threshold
    assert torch.equal(at_least(X, at), trimmed(X.double(), at).float())


# --- rounds


def context(known: Any = None, module: str = "layers.0") -> ModuleContext:
    return ModuleContext(module, 0, RankRule(max=1), known)


def typed(*dtypes: torch.dtype) -> list[list[LowRankDelta]]:
    """Modules of two adapters, each of one dtype."""
    return [[random_delta(seed, (6, 5 + seed), 2).to(dtype) for _ in range(2)] for seed, dtype in enumerate(dtypes)]


def findings(modules: Sequence[Sequence[LowRankDelta]], known: Any = None) -> list[Any]:
    method = build("ties", {"trim": "model"})
    return [survey_module(method, deltas, [0.5] * len(deltas), context(known)) for deltas in modules]


@pytest.mark.parametrize("method", registry())
def test_no_method_surveys_unless_it_is_told_to(method: str) -> None:
    assert not build(method, {}).unsettled(None)


@pytest.mark.parametrize(
    ("kind", "dtypes"),
    [
        ("float32", (torch.float32, torch.float32)),
        ("float64", (torch.float64, torch.float64)),
        ("mixed", (torch.float32, torch.float64)),
    ],
)
def test_the_rounds_are_as_many_as_the_bits_ask_for(kind: str, dtypes: tuple[torch.dtype, ...]) -> None:
    method, known, rounds = build("ties", {"trim": "model"}), None, 0
    while method.unsettled(known):
        known, rounds = method.settle(reduce(method.pool, findings(typed(*dtypes), known)), known), rounds + 1
    assert rounds == ROUNDS[kind]


KINDS = {
    "float32": typed(*[torch.float32] * 3),
    "mixed": typed(torch.float32, torch.float64, torch.float32),
    "one module has no adapter": [[LowRankDelta.zero(6, 5)] * 2, *typed(torch.float64, torch.float64)],
}
every_kind = pytest.mark.parametrize("modules", KINDS.values(), ids=KINDS)


@every_kind
def test_findings_are_pooled_in_any_grouping(modules: Sequence[Sequence[LowRankDelta]]) -> None:
    pool, (one, two, three) = build("ties", {"trim": "model"}).pool, findings(modules)
    assert pool(pool(one, two), three) == pool(one, pool(two, three))


@every_kind
def test_what_travels_is_json(modules: Sequence[Sequence[LowRankDelta]]) -> None:
    method, found = build("ties", {"trim": "model"}), findings(modules)
    known = method.settle(reduce(method.pool, found), None)
    assert json.loads(json.dumps([found, known], allow_nan=False)) == [found, known]


def test_a_module_is_not_merged_before_the_survey() -> None:
    with pytest.raises(AssertionError, match="survey"):
        merge_module(build("ties", {"trim": "model"}), typed(torch.float32)[0], [1.0, 1.0], context(), torch.float32)


@pytest.mark.parametrize("size", [1e30, float("inf"), float("nan")])
def test_an_entry_that_overflows_is_refused_by_its_module(size: float) -> None:
    usual = random_delta(0, (6, 5), 2).to(torch.float32)
    wrong = LowRankDelta(usual.B * size, usual.A * 1e30)
    adapter = Adapter("org/base", {"a": usual, "b": wrong})
    with pytest.raises(NonFiniteResult) as refused:
        merge([adapter], method="ties", rank=2, parameters={"trim": "model"})
    assert refused.value.module == "b"


def test_permuting_adapters_and_weights_together_changes_nothing() -> None:
    first, second = one_module(SAMPLE.deltas[0], "a"), Adapter("org/base", {"a": SAMPLE.deltas[1], "b": SAMPLE.deltas[2]})
    model = Model({"a": SAMPLE.shape, "b": SAMPLE.shape}, (first, second), (0.75, -0.5))
    turned = Model(model.shapes, model.adapters[::-1], model.weights[::-1])
    one, other = (each.merged(0.3).adapter.deltas for each in (model, turned))
    assert all(close(dense(one[name]), dense(other[name]), SAMPLE.scale) for name in model.shapes)
