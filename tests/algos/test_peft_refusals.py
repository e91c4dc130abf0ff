"""Whatever in PEFT's files is not a plain LoRA factor is refused: by name, with the reason and a remedy."""

import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from making import PREFIX, make
from merge_algos import formats
from merge_algos.errors import BadPattern, InvalidParams, NonFiniteTensor, ShapeMismatch, UnsupportedAdapter
from merge_algos.formats.spec import AdapterSpec, check_finite
from merge_algos.formats.written import factor_names

NAMES = [f"layers.{n}.self_attn.{p}" for n in range(3) for p in ("q_proj", "k_proj")]


def described(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterSpec:
    return formats.describe(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


# --- refused flags


FLAGS: dict[str, Any] = {
    "use_dora": True,
    "lora_bias": True,
    "modules_to_save": ["classifier"],
    "trainable_token_indices": [1, 2],
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "use_qalora": True,
    "kasa_config": {"beta": 1e-4},
    "ensure_weight_tying": True,
    "a_flag_of_the_future": "on",
    "another_of_the_future": 3,
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_changes_the_meaning_is_refused_by_name(flag: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=flag):
        describe_with(**{flag: FLAGS[flag]})


@pytest.mark.parametrize("flag", FLAGS)
def test_a_refused_flag_comes_with_a_remedy(flag: str) -> None:
    with pytest.raises(UnsupportedAdapter) as refused:
        describe_with(**{flag: FLAGS[flag]})
    assert refused.value.remedy in str(refused.value) and len(refused.value.remedy) > 10


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("unset", [None, False, [], {}])
def test_a_flag_that_is_not_set_is_accepted(flag: str, unset: Any) -> None:
    assert describe_with(**{flag: unset}).modules


@pytest.mark.parametrize("bias", ["all", "lora_only", "none"])
def test_biases_of_a_model_that_has_none_are_announced_in_vain(bias: str) -> None:
    assert describe_with(bias=bias).extras == ()


MOVING = ["pissa_niter_16", "PiSSA_niter_4", "corda", "loftq", "lora_ga", "an_init_of_the_future", 3]


@pytest.mark.parametrize("init", MOVING)
def test_an_initialisation_that_may_move_the_base_is_refused_by_name(init: Any) -> None:
    with pytest.raises(UnsupportedAdapter, match=f"init_lora_weights {init!r}|init_lora_weights '{init}'"):
        describe_with(init_lora_weights=init)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_is_accepted(init: Any) -> None:
    assert describe_with(init_lora_weights=init).modules


@pytest.mark.parametrize("kind", ["IA3", "ROAD", "PROMPT_TUNING", "XLORA", "lora", "A_KIND_OF_THE_FUTURE", None, 3, ["LORA"], {}])
def test_another_kind_of_adapter_is_refused_by_name(kind: Any) -> None:
    with pytest.raises(UnsupportedAdapter, match=re.escape(f"peft_type {str(kind)!r}")):
        describe_with(peft_type=kind)


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", [None, True, "8", [8], math.nan, math.inf, 10**400])
def test_a_number_that_is_none_is_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidParams, match=field):
        describe_with(**{field: value})


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [["q_proj"], "q_proj", 3, {"q_proj": "8"}, {"q_proj": None}, {"q_proj": 10**400}])
def test_a_pattern_of_the_wrong_type_is_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidParams, match=field):
        describe_with(**{field: value})


@pytest.mark.parametrize("field", ["use_rslora", "fan_in_fan_out"])
@pytest.mark.parametrize("value", ["false", 1, [], {}])
def test_a_truth_that_is_none_is_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidParams, match=field):
        describe_with(**{field: value})


@pytest.mark.parametrize("field", ["base_model_name_or_path", "revision", "task_type"])
def test_a_text_that_is_none_is_refused_by_field(field: str) -> None:
    with pytest.raises(InvalidParams, match=field):
        describe_with(**{field: 3})


def describe_with(**config: Any) -> AdapterSpec:
    made = make()
    return described({**made.config, **config}, made.tensors)


# --- refused tensors


MODULE = "layers.0.q_proj"
LORA_A, LORA_B = factor_names(MODULE)
FOREIGN_TENSORS: dict[str, tuple[int, ...]] = {
    f"{PREFIX}{MODULE}.lora_magnitude_vector": (24,),
    f"{PREFIX}{MODULE}.lora_magnitude_vector.weight": (24,),
    f"{PREFIX}{MODULE}.lora_B.bias": (24,),
    f"{PREFIX}classifier.weight": (2, 16),
    f"{PREFIX}classifier.modules_to_save.weight": (2, 16),
    f"{PREFIX}{MODULE}.lora_A.default.weight": (4, 16),
    f"{PREFIX}experts.lora_A": (4, 16),
    "lora_unet_down_blocks_0.lora_down.weight": (4, 16),
    "transformer.q_proj.lora_A.weight": (4, 16),
    f"{PREFIX}{MODULE}.hada_w1_a": (4, 16),
    "": (1,),
}


@pytest.mark.parametrize("tensor", FOREIGN_TENSORS)
def test_a_tensor_that_is_no_factor_is_refused_by_name(tensor: str) -> None:
    with pytest.raises(UnsupportedAdapter) as refused:
        describe_tensors({tensor: FOREIGN_TENSORS[tensor]})
    assert refused.value.subject == f"tensor {tensor}"


@pytest.mark.parametrize("tensor", FOREIGN_TENSORS)
def test_a_refused_tensor_comes_with_a_remedy(tensor: str) -> None:
    with pytest.raises(UnsupportedAdapter, match="export the adapter as plain LoRA"):
        describe_tensors({tensor: FOREIGN_TENSORS[tensor]})


REASONS = {
    f"{PREFIX}{MODULE}.lora_magnitude_vector": "DoRA",
    f"{PREFIX}{MODULE}.lora_B.bias": "bias",
}


@pytest.mark.parametrize("tensor", REASONS)
def test_a_tensor_of_a_known_kind_is_refused_with_its_reason(tensor: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=REASONS[tensor]):
        describe_tensors({tensor: FOREIGN_TENSORS[tensor]})


@pytest.mark.parametrize("half", ["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"])
@pytest.mark.parametrize("shape", [(4, 4), (4, 3, 3, 3)])
def test_a_factor_without_its_other_half_is_refused_naming_the_module(half: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedAdapter, match=f"module alone: only {half} is there"):
        describe_tensors({f"{PREFIX}alone.{half}{'' if 'embedding' in half else '.weight'}": shape})


def test_a_file_without_tensors_is_refused_with_a_remedy() -> None:
    with pytest.raises(UnsupportedAdapter, match=r"no tensors; check how the adapter was saved"):
        formats.describe(make().config, {})


def test_a_rank_other_than_the_configured_is_refused_naming_the_module() -> None:
    with pytest.raises(ShapeMismatch, match=MODULE):
        describe_tensors({LORA_A: (5, 16), LORA_B: (24, 5)})


def test_factors_of_two_ranks_are_refused_naming_the_module() -> None:
    with pytest.raises(ShapeMismatch, match=MODULE):
        describe_tensors({LORA_A: (4, 16), LORA_B: (24, 5)})


@pytest.mark.parametrize(("A", "B", "r"), [((0, 16), (24, 0), 0), ((4, 0), (24, 4), 4), ((4, 16), (0, 4), 4)])
def test_factors_without_entries_are_refused_naming_the_module(A: tuple[int, int], B: tuple[int, int], r: int) -> None:
    with pytest.raises(ShapeMismatch, match=MODULE):
        formats.describe({**make().config, "r": r}, {LORA_A: A, LORA_B: B})


def test_a_very_long_tensor_name_is_cut_in_the_message() -> None:
    with pytest.raises(UnsupportedAdapter) as refused:
        describe_tensors({"x" * 100_000: (1,)})
    assert len(str(refused.value)) < 1000


def describe_tensors(shapes: Mapping[str, tuple[int, ...]]) -> AdapterSpec:
    made = make()
    return formats.describe(made.config, {name: tuple(t.shape) for name, t in made.tensors.items()} | shapes)


# --- hostile patterns


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(a|a)*b", "(.*a){25}b", "((a*)*)*b"])
@pytest.mark.parametrize("modules", [1, 500])
def test_a_hostile_pattern_ends_quickly(pattern: str, modules: int) -> None:
    started_at = time.process_time()  # so that it does not count what else the machine does
    quietly_describe(pattern, [f"layers.{n}.{'a' * 40}!" for n in range(modules)])
    assert time.process_time() - started_at < 2.0


@pytest.mark.parametrize("modules", [1, 500])
def test_a_pattern_that_takes_too_long_is_refused_by_name(modules: int) -> None:
    with pytest.raises(BadPattern, match=r"\(a\|aa\)\+\$.*too long"):
        described_with_pattern("(a|aa)+$", [f"layers.{n}.{'a' * 40}!" for n in range(modules)])


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<x", "a" * 513, "(" * 500, "(?V0)(?V1)"])
def test_a_pattern_that_is_none_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(BadPattern) as refused:
        described_with_pattern(pattern, NAMES)
    assert refused.value.pattern == pattern


def described_with_pattern(pattern: str, names: list[str]) -> AdapterSpec:
    made = make(shapes=dict.fromkeys(names, (3, 2)), r=1, alpha_pattern={pattern: 3})
    return described(made.config, made.tensors)


def quietly_describe(pattern: str, names: list[str]) -> None:
    with suppress(BadPattern):  # both answers are right, only slowness is not
        described_with_pattern(pattern, names)


# --- numbers that are none


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1])
def test_a_factor_that_is_not_finite_is_refused_by_name(dtype: torch.dtype, bad: float, position: int) -> None:
    module = described(make().config, make().tensors).modules[0]
    factors = [torch.ones(4, 16, dtype=dtype), torch.ones(24, 4, dtype=dtype)]
    factors[position][2, 3] = bad
    with pytest.raises(NonFiniteTensor) as refused:
        formats.load(module, dict(zip(("lora_A", "lora_B"), factors, strict=True)))
    assert refused.value.tensor == tuple(module.tensors.values())[position]


def test_infinities_of_both_signs_do_not_hide_each_other() -> None:
    with pytest.raises(NonFiniteTensor, match="here"):
        check_finite("here", torch.tensor([math.inf, -math.inf]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_finite_values_are_accepted(dtype: torch.dtype) -> None:
    check_finite("here", torch.full((50, 50), torch.finfo(dtype).max, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_infinity_among_the_largest_values_is_refused(dtype: torch.dtype) -> None:
    tensor = torch.full((50, 50), torch.finfo(dtype).max, dtype=dtype)
    tensor[20, 20] = math.inf
    with pytest.raises(NonFiniteTensor, match="here"):
        check_finite("here", tensor)
