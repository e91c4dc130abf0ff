"""Files from strangers: whatever shapes and settings they claim, the answer is a delta or one of our errors, and soon."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kind_cases import CASES, GROUNDED, shapes
from making import PREFIX, Made
from merge_algos import formats
from merge_algos.errors import InvalidParams, MergeError, ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import kinds
from merge_algos.formats.kind import MAX_FACTOR_ENTRIES, Kind
from merge_algos.formats.spec import ModuleSpec
from test_kinds import read

KINDS = [kind for kind in kinds.registry().values() if kind.peft_types]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)

DIMS = st.integers(0, 5) | st.sampled_from([10**4, 10**6, 2**31, 2**62])
SHAPES = st.lists(DIMS, max_size=5).map(tuple)
SMALL = st.lists(st.integers(0, 5), max_size=5).map(tuple)
NUMBERS = st.integers(-1, 6) | st.floats() | st.sampled_from([0, None, True, "4", [4], {}, 10**400, 1e308, -1e-5, 2.5])
VALUES = NUMBERS | st.booleans() | st.dictionaries(st.sampled_from(["up", "up.lora_E", "("]), NUMBERS | st.lists(st.booleans()))


def names(kind: Kind) -> list[str]:
    return [*kind.shared, *(f"{PREFIX}{module}.{suffix}" for module in ("up", "down") for suffix in kind.suffixes)]


def settings_of(kind: Kind) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(sorted(kind.flags)), VALUES, max_size=4)


@every_kind
@settings(max_examples=40)  # for each kind, and there are many
@given(data=st.data())
def test_any_header_is_described_or_refused(kind: Kind, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(names(kind)), unique=True) | st.just(names(kind)))
    header = {name: data.draw(SHAPES) for name in chosen}
    config = {**data.draw(settings_of(kind)), "peft_type": kind.peft_types[0]}
    outcome(lambda: formats.describe(config, header))


@cache
def real(kind: str) -> tuple[Made, Mapping[str, tuple[int, int]]]:
    """An adapter of this kind as PEFT writes it, and the shapes that its file may not say."""
    case = next(case for case in (*CASES, *GROUNDED) if case.kind == kind)
    with TemporaryDirectory() as directory:
        return read(case.save(Path(directory))), shapes(case.model())


@every_kind
@settings(max_examples=40)  # for each kind, and there are many
@given(data=st.data())
def test_a_real_file_of_which_something_is_changed_is_read_or_refused(kind: Kind, data: st.DataObject) -> None:
    made, known = real(kind.name)
    changed = dict(made.tensors)
    for name in data.draw(st.lists(st.sampled_from(sorted(changed)), unique=True, max_size=3)):
        like = changed[name]
        shape = data.draw(SMALL | st.just(tuple(like.shape)).flatmap(st.permutations).map(tuple))
        changed[name] = filled(like, shape, data.draw(st.sampled_from([0.0, 1.0, -3.0, 200.0, float("nan")])))
    config = {**made.config, **data.draw(st.just({}) | settings_of(kind))}
    up = data.draw(st.sampled_from([(20, 12), (12, 20), (7, 3)]))
    outcome(lambda: whole(config, changed, {**known, "up": up}))


def whole(config: Mapping[str, Any], tensors: Mapping[str, Tensor], known: Mapping[str, tuple[int, int]]) -> None:
    """Every module, read alone or beside a base model's weight."""
    for module in formats.describe(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}).modules:
        own = formats.completed(module, module.shape or known[module.name])
        by_role = {role: tensors[name][own.slices.get(role, ())] for role, name in own.tensors.items()}
        assert own.shape is not None
        if own.needs_base:
            formats.ground(own, by_role, torch.linspace(-1, 1, own.shape[0] * own.shape[1]).reshape(own.shape))
        else:
            formats.load(own, by_role)


def filled(like: Tensor, shape: tuple[int, ...], value: float) -> Tensor:
    return torch.full(shape, value if like.is_floating_point() or math.isfinite(value) else -1).to(like.dtype)


def outcome(call: Any) -> None:
    with suppress(MergeError):
        call()


# --- nothing grows without bound


def lycoris(kind: str, dims: Mapping[str, tuple[int, ...]], r: int) -> tuple[ModuleSpec, ...]:
    config = {"peft_type": kind, "r": r, "alpha": r}
    return formats.describe(config, {f"{PREFIX}up.{name}": shape for name, shape in dims.items()}).modules


def test_a_hadamard_product_of_huge_rank_is_refused_before_anything_is_formed() -> None:
    r, d = 10**4, 2 * 10**4
    dims = {f"hada_w{n}_{half}": (d, r) if half == "a" else (r, d) for n in "12" for half in "ab"}
    started_at = time.monotonic()
    with pytest.raises(UnsupportedAdapter, match=r"module up: as LoHa it has rank 20000.*at most 134217728"):
        lycoris("LOHA", dims, r)
    assert time.monotonic() - started_at < 1.0


def test_a_kronecker_product_of_huge_sides_is_refused_before_anything_is_formed() -> None:
    with pytest.raises(UnsupportedAdapter, match="module up: as LoKr"):
        lycoris("LOKR", {"lokr_w1": (10**3, 10**3), "lokr_w2": (10**3, 10**3)}, 8)


def test_tiny_blocks_that_claim_a_huge_grid_are_refused() -> None:
    config = {"peft_type": "GRALORA", "r": 10**4, "gralora_k": 10**4, "alpha": 1}
    header = {f"{PREFIX}up.gralora_A": (10**4, 1, 10**4), f"{PREFIX}up.gralora_B": (10**4, 10**4, 1)}
    with pytest.raises(UnsupportedAdapter, match="module up: as GraLoRA"):
        formats.describe(config, header)


def test_a_block_on_a_huge_layer_is_refused() -> None:
    made = Made({f"{PREFIX}up.miss_block": torch.ones(64, 8)}, {"peft_type": "MISS", "r": 64})
    with pytest.raises(UnsupportedAdapter, match="module up: as MiSS"):
        formats.read(made.config, made.tensors, {"up": (8, 2**40)})


@pytest.mark.parametrize(("r", "d"), [(8, 4096), (32, 4096), (64, 4096), (300, 8192)])
def test_what_is_formed_is_bounded_by_the_layer_and_by_the_limit(r: int, d: int) -> None:
    dims = {f"hada_w{n}_{half}": (d, r) if half == "a" else (r, d) for n in "12" for half in "ab"}
    (module,) = lycoris("LOHA", dims, r)
    assert module.r == min(r * r, d) and 2 * d * module.r <= MAX_FACTOR_ENTRIES


def test_experts_beyond_counting_are_refused() -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_parameters": ["experts.up"]}
    header = {f"{PREFIX}experts.lora_A.weight": (10**9, 1), f"{PREFIX}experts.lora_B.weight": (1, 10**9)}
    with pytest.raises(ShapeMismatch, match="experts"):
        formats.describe(config, header)


def test_modules_beyond_counting_are_refused() -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_parameters": ["experts.up"]}
    header: dict[str, tuple[int, ...]] = {}
    for n in range(50):
        header |= {f"{PREFIX}{n}.experts.lora_A.weight": (4096, 1), f"{PREFIX}{n}.experts.lora_B.weight": (1, 4096)}
    with pytest.raises(UnsupportedAdapter, match="more than 100000 modules"):
        formats.describe(config, header)


def test_more_block_diagonal_patterns_than_names_bear_are_refused() -> None:
    config = {"peft_type": "LORA", "use_bdlora": {"nblocks": 2, "target_modules_bd_a": [str(n) for n in range(201)]}}
    with pytest.raises(InvalidParams, match="use_bdlora"):
        formats.describe(config, {f"{PREFIX}up.lora_A.weight": (8, 4), f"{PREFIX}up.lora_B.weight": (4, 8)})


def test_many_target_parameters_on_many_modules_end_quickly() -> None:
    targets = [f"experts.p{n}" for n in range(20_000)]
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_parameters": targets}
    started_at = time.monotonic()
    with pytest.raises(UnsupportedAdapter, match="target_parameters"):
        formats.describe(config, {f"{PREFIX}{n}.experts.lora_A.weight": (4, 1) for n in range(20_000)})
    assert time.monotonic() - started_at < 5.0
