"""Methods that make a basis: in the steps of the service they do what the plain call does, and say what they are."""

import dataclasses
import functools
import json
import re
from typing import Any

import pytest
import torch

from cases import random_delta
from merge_algos import Adapter, LowRankDelta, bases, catalogue
from merge_algos.adapter import union
from merge_algos.bases.rmm import Rmm, importance
from merge_algos.codec import Encoded
from merge_algos.errors import InvalidParams
from merge_algos.protocol import ModuleContext
from merge_algos.rank import RankRule
from merge_algos.reversible import Options, build_basis

SHAPES = {"q_proj": (24, 18), "v_proj": (12, 18), "down_proj": (30, 10)}
ROUNDS = 2


def adapters() -> list[Adapter]:
    """Of unequal ranks and norms; the second lacks a module, the third is zero in one."""
    drawn = [
        {name: random_delta(10 * n + k, shape, 2 + (n + k) % 3).scale(3.0**-n) for k, (name, shape) in enumerate(SHAPES.items())}
        for n in range(3)
    ]
    del drawn[1]["v_proj"]
    drawn[2]["q_proj"] = drawn[2]["q_proj"].scale(0.0)
    return [Adapter("org/base", each) for each in drawn]


def through_text(value: Any) -> Any:
    """As findings and knowledge travel: as JSON whose keys are sorted."""
    return json.loads(json.dumps(value, sort_keys=True, allow_nan=False))


def in_steps(method: Rmm, given: list[Adapter]) -> tuple[dict[str, tuple[Encoded, tuple[float, ...]]], int]:
    """What the service makes of every module, and in how many rounds."""
    rows = {name: [a.delta(name, shape) for a in given] for name, shape in union(given).items()}
    known, rounds = None, 0
    while method.unsettled(known):
        context = functools.partial(ModuleContext, seed=0, rank=RankRule(), known=known)
        findings = [through_text(method.survey(row, [1.0] * len(row), context(name))) for name, row in rows.items()]
        pooled = through_text(functools.reduce(method.pool, findings))
        known, rounds = through_text(method.settle(pooled, known)), rounds + 1
        assert rounds <= ROUNDS, "a survey has to end"
    return {name: method.encode(row, ModuleContext(name, 0, RankRule(), known)) for name, row in rows.items()}, rounds


def assert_same(left: Encoded, right: Encoded) -> None:
    assert (left.codec, left.shape, left.layout) == (right.codec, right.shape, right.layout)
    assert torch.equal(left.shared, right.shared)
    assert all(torch.equal(a, b) for a, b in zip(left.parts, right.parts, strict=True))


@pytest.mark.parametrize(
    "parameters",
    [{"budget": 0.3}, {"codec": "truncate"}, {"codec": "rmm", "p": 1}, {"codec": "hybrid", "quantize": "none", "budget": 0.8}],
    ids=str,
)
def test_the_steps_of_the_service_make_the_basis_of_the_plain_call(parameters: dict[str, Any]) -> None:
    whole = build_basis(adapters(), ["a", "b", "c"], Options(**parameters))
    modules, rounds = in_steps(Rmm(**parameters), adapters())
    assert (list(modules), rounds) == (list(whole.modules), ROUNDS)
    for name, (encoded, errors) in modules.items():
        assert_same(encoded, whole.modules[name])
        assert errors == whole.module_errors[name]


def test_adapters_of_nothing_but_zeros_make_a_basis() -> None:
    zeros = [Adapter("org/base", {"m": LowRankDelta.zero(4, 3)}), Adapter("org/base", {"m": random_delta(0, (4, 3), 1).scale(0)})]
    modules, _ = in_steps(Rmm(), zeros)
    assert (modules["m"][0].size_bytes, modules["m"][1]) == (0, (0.0, 0.0))


def test_pooling_does_not_depend_on_how_it_is_grouped() -> None:
    method, one, two, three = Rmm(), {"a": [1.0]}, {"b": [2.0]}, {"c": [3.0]}
    assert method.pool(method.pool(one, two), three) == method.pool(one, method.pool(two, three))


def test_how_much_a_task_counts_is_one_over_its_whole_norm() -> None:
    assert importance([[1.0, 0.0, 4.0], [3.0, 0.0, 4.0]]) == [0.25, 0.0, 0.125]


def test_what_is_kept_as_it_is_needs_no_survey() -> None:
    assert not Rmm(codec="lossless").unsettled(None)


@pytest.mark.parametrize(("count", "rank", "p"), [(3, 4, 2), (1, 4, 0), (9, 2, 2)])
def test_as_many_directions_as_there_are_can_be_asked_for(count: int, rank: int, p: int) -> None:
    Rmm(codec="rmm", p=p).check_inputs(count, rank)
    with pytest.raises(InvalidParams, match=rf"parameters\.p.*at most {p}"):
        Rmm(codec="rmm", p=p + 1).check_inputs(count, rank)


@pytest.mark.parametrize(("field", "bad"), [("codec", "zip"), ("quantize", "int3"), ("budget", 0), ("p", -1), ("center", 1)])
def test_a_parameter_out_of_range_is_refused_by_name(field: str, bad: Any) -> None:
    with pytest.raises(InvalidParams, match=rf"^parameters\.{field}"):
        Rmm(**{"codec": "rmm", field: bad})


# --- what every such method says of itself


@pytest.mark.parametrize("name", bases.registry())
def test_a_basis_method_declares_itself(name: str) -> None:
    method = bases.registry()[name]
    assert method.__module__ == f"merge_algos.bases.{name}"
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    assert (method.produces, method.default_weight, method.memory, method.needs) == ("basis", 1.0, "factors", "nothing")
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", method.paper) and method.paper in (method.__doc__ or "")
    assert catalogue.find(name) is method


@pytest.mark.parametrize("name", bases.registry())
def test_a_basis_method_is_made_from_what_it_says_it_is(name: str) -> None:
    method = catalogue.build(name, {})
    assert catalogue.build(name, through_text(dataclasses.asdict(method))) == method
