"""Extraction in memory, against the dense SVD of the difference in float64; what is left out, and what is refused."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_algos import RankRule, extract
from merge_algos.blocks import BLOCK_ENTRIES
from merge_algos.errors import (
    BadPattern,
    IncomparableTensor,
    InvalidParams,
    InvalidRank,
    LeftoverTensors,
    MergeError,
    NonFiniteResult,
    NonFiniteTensor,
    NothingToExtract,
    ShapeMismatch,
)
from merge_algos.extract import Extract, Extracted, Pair
from merge_algos.protocol import ModuleContext

State = dict[str, Tensor]
LINEAR = {"layers.2.q_proj": (24, 16), "layers.10.q_proj": (24, 16), "layers.2.up": (40, 16)}
BESIDE = {
    "embed_tokens.weight": (50, 16),
    "lm_head.weight": (50, 16),
    "norm.weight": (16,),
    "layers.2.up.bias": (40,),
    "conv.weight": (4, 3, 2, 2),
    "scale": (),
}
SMALL = {**{f"{module}.weight": shape for module, shape in LINEAR.items()}, **BESIDE}


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int, size: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def moved(base: State, seed: int = 1, size: float = 0.1, only: Callable[[str], bool] = lambda name: True) -> State:
    change = random_state({name: tuple(tensor.shape) for name, tensor in base.items()}, seed, size)
    return {name: tensor + change[name] if only(name) else tensor.clone() for name, tensor in base.items()}


def is_linear(name: str) -> bool:
    return name.removesuffix(".weight") in LINEAR


BASE = random_state(SMALL, 0)
TUNED = moved(BASE)


def difference(name: str, base: State = BASE, tuned: State = TUNED) -> Tensor:
    return tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()


def optimum(delta: Tensor, rank: int) -> float:
    S = torch.linalg.svdvals(delta)
    return float((S[rank:].square().sum() / S.square().sum()).sqrt())


def measured(found: Extracted, name: str, delta: Tensor) -> float:
    return float((found.adapter.deltas[name].to_dense().double() - delta).norm() / delta.norm())


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_every_module_is_the_best_of_its_rank(rank: int) -> None:
    found = extract(BASE, TUNED, rank=rank)
    for report in found.reports:
        delta = difference(report.module)
        assert measured(found, report.module, delta) == pytest.approx(optimum(delta, rank), abs=1e-6)
        assert report.relative_error == pytest.approx(optimum(delta, rank), abs=1e-6)
        assert (report.rank_in, report.rank_out) == (16, rank)


def test_the_modules_of_an_adapter_are_the_linear_layers_in_natural_order() -> None:
    found = extract(BASE, TUNED, rank=2)
    assert list(found.adapter.deltas) == ["layers.2.q_proj", "layers.2.up", "layers.10.q_proj"]


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5])
def test_a_sketch_is_nearly_as_good_as_the_best_and_says_how_good(decay: float) -> None:
    """Larger than what is decomposed exactly, with a spectrum that falls slowly or fast."""
    U, V = (torch.linalg.qr(random_state({"x": (700, 700)}, seed)["x"].double()).Q for seed in (5, 6))
    delta = (U * torch.arange(1, 701).double() ** -decay) @ V
    base = {"w.weight": random_state({"x": (700, 700)}, 7)["x"].double()}
    found = extract(base, {"w.weight": base["w.weight"] + delta}, rank=24)
    (report,) = found.reports
    error = measured(found, "w", delta)
    assert report.relative_error == pytest.approx(error, rel=1e-5)
    assert optimum(delta, 24) * (1 - 1e-6) <= error <= optimum(delta, 24) * 1.002


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_an_energy_takes_the_fewest_ranks_that_hold_it(energy: float) -> None:
    found = extract(BASE, TUNED, rank=RankRule(energy=energy))
    for report in found.reports:
        S = torch.linalg.svdvals(difference(report.module)).square()
        held = S.cumsum(0) / S.sum()
        assert report.rank_out == int((held < energy - 1e-9).sum()) + 1


def test_at_full_rank_nothing_is_lost() -> None:
    found = extract(BASE, TUNED, rank=RankRule(energy=1.0))
    for name in LINEAR:
        torch.testing.assert_close(found.adapter.deltas[name].to_dense().double(), difference(name), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float64,) * 2])
def test_the_difference_is_taken_of_the_values_whatever_their_types(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    base, tuned = ({n: t.to(dtype) for n, t in state.items()} for state, dtype in zip((BASE, TUNED), dtypes, strict=True))
    found = extract(base, tuned, rank=RankRule(energy=1.0))
    for name in LINEAR:
        delta = difference(name, base, tuned)
        torch.testing.assert_close(found.adapter.deltas[name].to_dense().double(), delta, atol=1e-6, rtol=1e-5)


def test_the_same_seed_gives_the_same_factors_and_inputs_stay_as_they_are() -> None:
    before = {name: tensor.clone() for name, tensor in TUNED.items()}
    first, second = (extract(BASE, TUNED, rank=3).adapter.deltas for _ in range(2))
    assert all(torch.equal(first[n].B, second[n].B) and torch.equal(first[n].A, second[n].A) for n in first)
    assert all(torch.equal(before[name], TUNED[name]) for name in before)


def test_only_blocks_of_rows_are_ever_asked_for() -> None:
    shape, asked = (3000, 900), list[int]()

    def rows(scale: float) -> Callable[[int, int], Tensor]:
        def read(start: int, stop: int) -> Tensor:
            asked.append((stop - start) * shape[1])
            return scale * torch.arange(start, stop).float().sin()[:, None] * torch.arange(shape[1]).float().cos()

        return read

    pair, method = Pair("w.weight", shape, rows(1.0), rows(1.5)), Extract()
    context = ModuleContext("w", 0, RankRule(max=4))
    known = method.settle(method.measure(pair, None, context), None)
    result = method.extract(pair, ModuleContext("w", 0, RankRule(max=4), known), torch.float32)
    assert result.report.relative_error < 1e-5
    assert max(asked) <= BLOCK_ENTRIES < shape[0] * shape[1]


# Heavy tails


def test_a_mean_rank_is_spread_by_how_slowly_each_spectrum_falls() -> None:
    steep = torch.diag(2.0 ** -torch.arange(32.0))
    flat = torch.diag(torch.linspace(1.0, 0.9, 32))
    base = {f"{name}.weight": torch.zeros(32, 32) for name in ("steep", "flat")}
    found = extract(base, {"steep.weight": steep, "flat.weight": flat}, heavy_tail=8)
    ranks = {report.module: report.rank_out for report in found.reports}
    assert ranks["flat"] > ranks["steep"] and sum(ranks.values()) == 16
    alphas = {report.module: report.diagnostics["alpha"] for report in found.reports}
    assert alphas["flat"] > alphas["steep"]


def test_no_rank_is_spent_on_what_has_none() -> None:
    low = torch.zeros(32, 32)
    low[:3, :3] = torch.eye(3)
    base = {f"{name}.weight": torch.zeros(32, 32) for name in ("low", "other")}
    found = extract(base, {"low.weight": low, "other.weight": random_state({"x": (32, 32)}, 3)["x"]}, heavy_tail=8)
    ranks = {report.module: report.rank_out for report in found.reports}
    assert ranks == {"low": 3, "other": 13}


def test_no_module_gets_more_than_the_highest_rank() -> None:
    method = Extract(heavy_tail=8, heavy_tail_max=9)
    findings = {f"m{n}.weight": {"reason": None, "energy": 1.0, "base_energy": 1.0, "alpha": n + 2, "most": 64} for n in range(4)}
    assert max(module["rank"] for module in method.settle(findings, None)["modules"].values()) == 9


# What is left out


def test_what_no_module_can_hold_is_named_with_its_reason_and_norm() -> None:
    left_out = {each["tensor"]: each for each in extract(BASE, TUNED, rank=2).left_out}
    assert {name: each["reason"] for name, each in left_out.items()} == {
        "conv.weight": "not a linear layer",
        "embed_tokens.weight": "an embedding",
        "layers.2.up.bias": "not a linear layer",
        "lm_head.weight": "an output head",
        "norm.weight": "not a linear layer",
        "scale": "not a linear layer",
    }
    for name, each in left_out.items():
        delta = (TUNED[name].double() - BASE[name].double()).norm()
        assert each["norm"] == pytest.approx(float(delta))
        assert each["relative_norm"] == pytest.approx(float(delta / BASE[name].double().norm()))


def test_what_has_not_changed_is_neither_shipped_nor_left_out() -> None:
    found = extract(BASE, moved(BASE, only=lambda name: name == "layers.2.up.weight"), rank=2)
    assert (list(found.adapter.deltas), found.left_out) == (["layers.2.up"], ())


def test_a_change_from_zero_has_no_relative_norm() -> None:
    zero = {name: torch.zeros_like(tensor) for name, tensor in BASE.items()}
    assert {each["relative_norm"] for each in extract(zero, TUNED, rank=1).left_out} == {None}


def test_a_head_is_a_module_where_it_is_asked_for() -> None:
    found = extract(BASE, TUNED, rank=2, include=["^lm_head$"])
    assert "lm_head" in found.adapter.deltas and "lm_head.weight" not in {each["tensor"] for each in found.left_out}


def test_what_is_excluded_is_left_out_and_says_so() -> None:
    found = extract(BASE, TUNED, rank=2, exclude=[r"q_proj$"])
    assert list(found.adapter.deltas) == ["layers.2.up"]
    excluded = [each["tensor"] for each in found.left_out if each["reason"] == "excluded"]
    assert excluded == ["layers.2.q_proj.weight", "layers.10.q_proj.weight"]


def test_a_matrix_of_the_vocabulary_s_size_is_a_head_unless_it_is_in_a_layer() -> None:
    base = random_state({"to_words.weight": (24, 16), "layers.0.q.weight": (24, 16)}, 0)
    found = extract(base, moved(base), rank=2, vocabulary=[24])
    assert [each["reason"] for each in found.left_out] == ["an output head"]


@pytest.mark.parametrize(
    "name",
    "wte wpe shared tok_embeddings word_embeddings position_embeddings embed_in emb embedding relative_attention_bias".split(),
)
def test_an_embedding_is_known_by_its_name(name: str) -> None:
    base = random_state({f"h.{name}.weight": (20, 8), "h.0.q.weight": (8, 8)}, 0)
    assert [each["reason"] for each in extract(base, moved(base), rank=2).left_out] == ["an embedding"]


@pytest.mark.parametrize("name", ["embeddings_project", "embedding_hidden_mapping_in", "remember", "shared_expert_gate"])
def test_a_linear_layer_with_a_name_like_one_is_a_module(name: str) -> None:
    base = random_state({f"h.{name}.weight": (20, 8)}, 0)
    assert list(extract(base, moved(base), rank=2).adapter.deltas) == [f"h.{name}"]


# Refusals


def changed(**tensors: Tensor | None) -> State:
    state: dict[str, Any] = {**TUNED, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


NAN = TUNED["layers.2.up.weight"].clone()
NAN[3, 3] = float("nan")
INF = BASE["norm.weight"].clone()
INF[0] = float("-inf")


@pytest.mark.parametrize(
    ("base", "tuned", "options", "error", "says"),
    [
        (BASE, changed(layers__2__up__weight=NAN), {}, NonFiniteTensor, "layers.2.up.weight of the tuned model"),
        ({**BASE, "norm.weight": INF}, TUNED, {}, NonFiniteTensor, "norm.weight of the base model"),
        (BASE, changed(norm__weight=None), {}, IncomparableTensor, "norm.weight .* only the base model has it"),
        (BASE, changed(extra=torch.ones(2)), {}, IncomparableTensor, "extra .* only the tuned model has it"),
        (BASE, changed(lm_head__weight=torch.ones(51, 16)), {}, ShapeMismatch, r"lm_head.weight: shape \(51, 16\)"),
        (BASE, BASE, {}, NothingToExtract, "the two models are the same"),
        (BASE, moved(BASE, only=lambda n: n == "norm.weight"), {}, NothingToExtract, "only norm.weight did"),
        (BASE, TUNED, {"leftover": "refuse"}, LeftoverTensors, "conv.weight, .* and 1 more"),
        (BASE, TUNED, {"leftover": "ignore"}, InvalidParams, "leftover"),
        (BASE, TUNED, {"rank": None}, InvalidRank, "needs a rank or an energy"),
        (BASE, TUNED, {"heavy_tail": 3}, InvalidRank, "no room for another rule"),
        (BASE, TUNED, {"rank": None, "heavy_tail": 0}, InvalidParams, "at least 1"),
        (BASE, TUNED, {"rank": 0}, InvalidRank, "at least 1"),
        (BASE, TUNED, {"include": ["lm_haed"]}, BadPattern, "lm_haed"),
        (BASE, TUNED, {"exclude": ["("]}, BadPattern, "pattern"),
        (BASE, TUNED, {"include": ["embed"]}, InvalidParams, "embed_tokens is an embedding"),
        (BASE, {n: t * 1e30 for n, t in TUNED.items()}, {"dtype": torch.float16}, NonFiniteResult, "float16"),
    ],
)
def test_what_cannot_be_extracted_is_refused_by_name(
    base: State, tuned: State, options: dict[str, Any], error: type[MergeError], says: str
) -> None:
    with pytest.raises(error, match=says):
        extract(base, tuned, **{"rank": 2, **options})


def test_a_difference_beyond_float64_is_refused() -> None:
    base = {"w.weight": torch.full((4, 4), 1e300, dtype=torch.float64)}
    with pytest.raises(NonFiniteResult, match="w"):
        extract(base, {"w.weight": -base["w.weight"]}, rank=1)


def test_where_linear_layers_alone_have_changed_nothing_is_left_to_refuse() -> None:
    found = extract(BASE, moved(BASE, only=is_linear), rank=2, leftover="refuse")
    assert list(found.adapter.deltas) == ["layers.2.q_proj", "layers.2.up", "layers.10.q_proj"]
