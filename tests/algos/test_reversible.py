"""Whole adapters through one basis: bytes spread by measured error, any task back, mixing, and what is refused."""

import json
import math
from functools import cache
from typing import Any

import pytest
import torch

from cases import dense, random_delta
from merge_algos import Adapter, LowRankDelta
from merge_algos.codec import distinct
from merge_algos.codecs import find, registry
from merge_algos.errors import BaseModelMismatch, InvalidParams, NonFiniteResult, NonFiniteTensor, ShapeMismatch, WrongCount
from merge_algos.reversible import Basis, Candidate, Options, Survey, allocate, build_basis, encode, survey
from merge_algos.survey import decode_all

SHAPES = {"q_proj": (24, 18), "v_proj": (12, 18), "down_proj": (30, 10)}


def adapters(count: int = 3, seed: int = 0) -> list[Adapter]:
    """Of unequal ranks and norms; the last lacks a module."""
    return [Adapter("org/base", _deltas(n, seed, without="v_proj" if n == count - 1 and n else "")) for n in range(count)]


def _deltas(n: int, seed: int, without: str) -> dict[str, LowRankDelta]:
    drawn = {name: random_delta(seed + 10 * n + k, shape, 2 + (n + k) % 3) for k, (name, shape) in enumerate(SHAPES.items())}
    return {name: delta.scale(4.0**-k) for k, (name, delta) in enumerate(drawn.items()) if name != without}


def names(count: int) -> list[str]:
    return [f"task{n}" for n in range(count)]


@cache
def built(count: int = 3, seed: int = 0, **options: Any) -> Basis:
    return build_basis(adapters(count, seed), names(count), Options(**options))


def whole_loss(basis: Basis) -> float:
    return sum(error**2 for error in basis.errors.values())


@cache
def surveys(options: Options, seed: int = 0) -> dict[str, Survey]:
    rows = {name: [a.delta(name, shape) for a in adapters(3, seed)] for name, shape in SHAPES.items()}
    return {name: survey(row, options, module=name, seed=0) for name, row in rows.items()}


# --- the basis


@pytest.mark.parametrize("codec", ["auto", *registry()])
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.8])
def test_the_stated_errors_are_those_of_what_comes_back(codec: str, budget: float) -> None:
    basis = built(codec=codec, budget=budget)
    assert basis.size_bytes <= budget * basis.input_bytes
    for n, (name, original) in enumerate(zip(basis.names, adapters(), strict=True)):
        back, lost, total = basis.reconstruct(name), 0.0, 0.0
        for module, shape in SHAPES.items():
            wanted = dense(original.delta(module, shape))
            error = float((wanted - dense(back.delta(module, shape))).square().sum())
            norm = float(wanted.square().sum())
            assert math.isclose(basis.module_errors[module][n] ** 2 * norm, error, rel_tol=1e-5, abs_tol=1e-12)
            lost, total = lost + error, total + norm
        assert math.isclose(basis.errors[name], math.sqrt(lost / total), rel_tol=1e-5)


@pytest.mark.parametrize(("seed", "budget"), [(0, 0.05), (0, 0.3), (0, 0.8), (7, 0.2)])
def test_auto_is_never_worse_than_any_one_codec(seed: int, budget: float) -> None:
    seeded = {"seed": seed} if seed else {}  # as the other tests ask, whose bases are kept
    auto = built(codec="auto", budget=budget, **seeded)
    for codec in registry():
        single = built(codec=codec, budget=budget, **seeded)
        assert whole_loss(auto) <= whole_loss(single) * (1 + 1e-9)


def test_nothing_is_lost_by_leaving_out_what_is_beaten() -> None:
    given = [Adapter("org/base", {m: random_delta(10 * n + k, (2048, 2048), 3) for k, m in enumerate("ab")}) for n in range(3)]
    importance = [1 / sum(d.norm() ** 2 for d in a.deltas.values()) for a in given]
    losses = {}
    for codec in ("auto", "rmm", "rmm_aligned"):
        options = Options(codec=codec)
        rows = {m: [a.deltas[m] for a in given] for m in "ab"}
        found = {m: survey(row, options, module=m, seed=0, importance=importance) for m, row in rows.items()}
        chosen = allocate(found, options)
        losses[codec] = sum(w * e for c in chosen.values() for w, e in zip(importance, c.errors, strict=True))
        left = {c.codec for c in found["a"].candidates if c.budget_bytes}
        assert (codec in left) == (codec != "auto") and not (codec == "auto" and {"rmm", "rmm_aligned"} & left)
    assert losses["auto"] <= min(losses.values())


def test_a_plan_of_a_codec_that_was_left_out_takes_what_beat_it() -> None:
    options = Options(budget=0.5)
    kept = Candidate("truncate", {}, 40, 40, (0.2,))
    nothing = [Candidate(codec, {}, 0, 0, (1.0,)) for codec in options.codecs]
    shares = [Candidate(codec, {}, 50, 50, (0.9,)) for codec in options.codecs if codec != "rmm"]
    whole = Survey((1, 1), 100, (1.0,), (*nothing, *shares, kept))
    assert allocate({"a": whole, "b": whole}, options) == {"a": kept, "b": kept}


def test_a_spread_by_error_is_never_worse_than_an_even_one() -> None:
    options = Options(codec="truncate", budget=0.3)
    basis, deltas = built(codec="truncate", budget=0.3), adapters()
    even = 0.0
    totals = [sum(d.norm() ** 2 for d in a.deltas.values()) for a in deltas]
    for name, shape in SHAPES.items():
        row = [a.delta(name, shape) for a in deltas]
        whole = survey(row, options, module=name, seed=0, importance=[1 / t for t in totals])
        (share,) = [c for c in whole.candidates if c.budget_bytes == int(0.3 * whole.input_bytes)]
        even += sum(e / t for e, t in zip(share.errors, totals, strict=True))
    assert whole_loss(basis) <= even * (1 + 1e-9)


def test_a_mix_is_the_sum_of_what_comes_back() -> None:
    basis, weights = built(), {"task0": 0.7, "task2": -0.3}
    mixed = basis.mix(weights)
    for module, shape in SHAPES.items():
        parts = [w * dense(basis.reconstruct(name).delta(module, shape)) for name, w in weights.items()]
        assert float((dense(mixed.delta(module, shape)) - sum(parts)).norm()) < 1e-5


def test_a_mix_can_be_cut_to_a_rank() -> None:
    assert all(delta.rank <= 2 for delta in built().mix({"task0": 1.0, "task1": 1.0}, rank=2).deltas.values())


def test_the_same_adapters_give_the_same_basis() -> None:
    first, second = built(), build_basis(adapters(), names(3), Options())
    assert first.errors == second.errors
    for module, encoded in first.modules.items():
        assert torch.equal(encoded.shared, second.modules[module].shared) and encoded.layout == second.modules[module].layout


def test_a_duplicate_costs_nothing() -> None:
    plain, (first, *rest) = built(codec="auto", budget=0.3), adapters()
    doubled = build_basis([first, *rest, first], [*names(3), "again"], Options(budget=0.3 * 3 / 4))
    assert doubled.size_bytes <= plain.size_bytes * 1.25 and doubled.errors["again"] == doubled.errors["task0"]


def test_a_module_of_one_adapter_is_kept_for_it() -> None:
    basis = built(budget=1.0)
    assert "v_proj" not in basis.reconstruct("task2").deltas and "v_proj" in basis.reconstruct("task0").deltas


def test_one_adapter_makes_a_basis() -> None:
    assert built(1, budget=1.0).errors["task0"] < 0.01


def test_adapters_of_nothing_make_an_empty_basis() -> None:
    basis = build_basis([Adapter("org/base", {})], ["none"])
    assert basis.size_bytes == 0 and basis.errors == {"none": 0.0} and basis.reconstruct("none").deltas == {}


def test_with_p_the_size_follows_from_p() -> None:
    exact = built(codec="rmm", p=2)
    assert max(exact.errors.values()) < 0.01 and exact.size_bytes > exact.input_bytes


def test_no_delta_becomes_dense() -> None:
    wide = [Adapter("org/base", {"m": random_delta(n, (200_000, 150_000), 1).to(torch.float32)}) for n in range(2)]
    assert max(build_basis(wide, names(2), Options(codec="truncate")).errors.values()) < 0.01


# --- surveys and their allocation


def test_a_survey_survives_text() -> None:
    for whole in surveys(Options(budget=0.2)).values():
        assert Survey.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_a_choice_alone_gives_the_surveyed_bytes_again() -> None:
    for name, shape in SHAPES.items():
        row = [a.delta(name, shape) for a in adapters()]
        whole = survey(row, Options(), module=name, seed=0, importance=[0.2, 3.0, 0.7])
        for candidate in whole.candidates:
            encoded, errors = encode(row, candidate, module=name, seed=0)
            assert encoded.size_bytes == candidate.size_bytes
            squared = [e**2 * n for e, n in zip(errors, whole.norms, strict=True)]
            assert all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-30) for a, b in zip(squared, candidate.errors, strict=True))


@pytest.mark.parametrize("common", [True, False])
def test_a_codec_makes_the_bytes_of_its_stand_in(common: bool) -> None:
    row = [random_delta(2 * n, (300, 280), 3) for n in range(4)]
    row = [LowRankDelta(delta.B, row[0].A) for delta in row] if common else row
    _, problem = distinct(row, 4 * 3 * 580)
    hybrid = find("hybrid")()
    name = hybrid.stand_in(problem, hybrid.prepare(problem))
    assert name == ("tucker2" if common else "truncate")
    own, other = hybrid.fit(row, problem.budget_bytes), find(name)().fit(row, problem.budget_bytes)
    assert torch.equal(own.shared, other.shared) and all(torch.equal(a, b) for a, b in zip(own.parts, other.parts, strict=True))
    for one, same in zip(decode_all(own), decode_all(other), strict=True):
        assert torch.equal(one.B, same.B) and torch.equal(one.A, same.A)


@pytest.mark.parametrize("budget", [1e-6, 0.2, 2.0])
def test_an_allocation_is_within_the_budget(budget: float) -> None:
    options = Options(budget=budget)
    found = surveys(options)
    chosen = allocate(found, options)
    assert list(chosen) == list(found)
    assert sum(c.size_bytes for c in chosen.values()) <= budget * sum(s.input_bytes for s in found.values())


def test_bytes_go_where_the_energy_is() -> None:
    chosen = allocate(surveys(Options(codec="truncate", budget=0.25)), Options(codec="truncate", budget=0.25))
    spent = {name: chosen[name].size_bytes / sum(SHAPES[name]) for name in SHAPES}
    assert spent["q_proj"] > spent["down_proj"]


# --- what is refused


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("codec", {"codec": "no_such"}),
        ("quantize", {"quantize": "int3"}),
        *(("budget", {"budget": bad}) for bad in (0, -1, math.nan, math.inf, "1", True)),
        *(("p", {"codec": "rmm", "p": bad}) for bad in (-1, 1.5, True)),
        ("p", {"codec": "truncate", "p": 1}),
        ("p", {"p": 1}),
        ("center", {"center": 1}),
        ("align", {"align": "yes"}),
        ("seed", {"seed": -1}),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams, match=rf"^parameters\.{field}:"):
        Options(**options)


@pytest.mark.parametrize("p", [3, 9])
def test_more_directions_than_there_can_be_are_refused(p: int) -> None:
    with pytest.raises(InvalidParams, match=r"parameters\.p.*at most 2"):
        built(codec="rmm", p=p)


def test_no_adapters_and_too_many_are_refused() -> None:
    for count in (0, 65):
        with pytest.raises(WrongCount):
            build_basis([Adapter("org/base", {})] * count, names(count))


@pytest.mark.parametrize("given", [["a", "b"], ["a", "a", "b"]])
def test_names_that_do_not_tell_tasks_apart_are_refused(given: list[str]) -> None:
    with pytest.raises(InvalidParams, match="names"):
        build_basis(adapters(), given)


def test_a_task_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidParams, match=r"no_such.*task0"):
        built().reconstruct("no_such")


def test_a_mix_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidParams, match="weights"):
        built().mix({})


def _pair(second: LowRankDelta, base: str = "org/base") -> list[Adapter]:
    return [Adapter("org/base", {"m": random_delta(0, (6, 5), 2)}), Adapter(base, {"m": second})]


def test_adapters_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(BaseModelMismatch):
        build_basis(_pair(random_delta(1, (6, 5), 2), "org/other"), names(2))
    with pytest.raises(ShapeMismatch, match="m"):
        build_basis(_pair(random_delta(1, (7, 5), 2)), names(2))


def test_numbers_that_are_not_finite_or_do_not_fit_are_refused() -> None:
    bad = random_delta(1, (6, 5), 2)
    bad.B[1, 1] = math.inf
    with pytest.raises(NonFiniteTensor, match="m of adapter 1"):
        build_basis(_pair(bad), names(2))
    with pytest.raises(NonFiniteResult, match="m"):
        build_basis(_pair(random_delta(1, (6, 5), 2).scale(1e200)), names(2))
