"""PEFT's files mean here what they mean to PEFT, scaling and patterns included, and so do those that we write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel, PreTrainedModel

from making import make
from merge_algos import formats
from merge_algos.formats.spec import AdapterSpec
from merge_algos.formats.written import config_for, factor_names

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*did not match any targeted module")

D = 16
LAYERS = 3
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(
            vocab_size=32,
            hidden_size=D,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=32, n_positions=8, n_embd=D, n_layer=2, n_head=2))


def trained(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """As after training: both factors random, B not zero."""
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=generator)
    return model


def saved(base: PreTrainedModel, config: LoraConfig, directory: Path) -> Path:
    trained(base, config).save_pretrained(directory)
    return directory


def files(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def described(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterSpec:
    return formats.describe(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


def ingested(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module -> dense delta as we read it."""
    return {name: delta.to_dense() for name, delta in formats.read(config, tensors).deltas.items()}


def of_peft(base: PreTrainedModel, directory: Path) -> dict[str, Tensor]:
    """Module -> dense delta as PEFT applies the files, (d_out, d_in) whatever way the layer stores its weight.

    The files, not the model that was trained: PEFT sorts the keys of what it saves, and with them the order of patterns.
    """
    model = PeftModel.from_pretrained(base, directory)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    deltas = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    return {name: delta.mT if layers[name].fan_in_fan_out else delta for name, delta in deltas.items()}


def largest_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Of any entry, relative to the largest of its matrix."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max() / right[name].abs().max()) for name in left)


# --- the meaning of an adapter, against PEFT itself


LLAMA_CONFIGS: dict[str, dict[str, Any]] = {
    "list of targets": {"target_modules": ATTENTION},
    "regular expression": {"target_modules": r".*layers\.[02]\.self_attn\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": 1, "layers_pattern": "layers"},
    "some layers": {"target_modules": ATTENTION, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": ATTENTION, "exclude_modules": [r"layers.1.self_attn.q_proj"]},
    "full names": {"target_modules": ["layers.0.self_attn.q_proj", "layers.2.mlp.up_proj"]},
    "odd alpha": {"target_modules": ATTENTION, "r": 3, "lora_alpha": 7},
    "fractional alpha": {"target_modules": ATTENTION, "lora_alpha": 0.3},
    "negative alpha": {"target_modules": ATTENTION, "lora_alpha": -4},
    "rank above both sizes": {"target_modules": "all-linear", "r": 40},
    "rank 1": {"target_modules": ATTENTION, "r": 1},
    "rsLoRA": {"target_modules": ATTENTION, "use_rslora": True, "r": 6},
    "rank_pattern": {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 5}},
    "alpha_pattern": {"target_modules": ATTENTION, "alpha_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 5}},
    "both patterns": {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3, "k_proj": 1}},
    "both patterns and rsLoRA": {
        "target_modules": ATTENTION,
        "rank_pattern": {r"layers\.\d\.self_attn\.q_proj": 3},
        "alpha_pattern": {r".*\.[12]\..*": 5},
        "use_rslora": True,
    },
    "the general pattern first": {"target_modules": ATTENTION, "alpha_pattern": {"q_proj": 2, r"layers.1.self_attn.q_proj": 5}},
    "the special pattern first": {"target_modules": ATTENTION, "alpha_pattern": {r"layers.1.self_attn.q_proj": 5, "q_proj": 2}},
    "alternatives": {"target_modules": ATTENTION, "alpha_pattern": {r"q_proj|k_proj": 5, r"(v|o)_proj": 2}},
    "anchored pattern": {"target_modules": ATTENTION, "rank_pattern": {r"^layers.1.self_attn.q_proj": 5, r"^q_proj": 2}},
    "a part of a name is no match": {"target_modules": ATTENTION, "alpha_pattern": {"proj": 9, "self_attn": 9, "q_pro": 9}},
    "gaussian": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ATTENTION, "init_lora_weights": "mica"},
    "no initialisation": {"target_modules": ATTENTION, "init_lora_weights": False},
    "dropout": {"target_modules": ATTENTION, "lora_dropout": 0.3},
}


@pytest.mark.parametrize("kind", LLAMA_CONFIGS)
def test_our_deltas_are_pefts(kind: str, tmp_path: Path) -> None:
    saved(tiny_llama(), LoraConfig(**{"r": 4, "lora_alpha": 8, **LLAMA_CONFIGS[kind]}), tmp_path)
    assert largest_difference(ingested(*files(tmp_path)), of_peft(tiny_llama(), tmp_path)) <= 1e-6


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"rank_pattern": {"c_attn": 3}, "alpha_pattern": {"c_proj": 5}}])
def test_our_deltas_of_transposed_layers_are_pefts(config: dict[str, Any], tmp_path: Path) -> None:
    targets = ["c_attn", "c_proj", "c_fc"]
    saved(tiny_gpt2(), LoraConfig(target_modules=targets, fan_in_fan_out=True, **config), tmp_path)
    assert largest_difference(ingested(*files(tmp_path)), of_peft(tiny_gpt2(), tmp_path)) <= 1e-6


def test_a_transposed_adapter_says_so(tmp_path: Path) -> None:
    saved(tiny_gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), tmp_path)
    assert described(*files(tmp_path)).fan_in_fan_out


POOL = ["q_proj", "k_proj", "self_attn.q_proj", r"layers.1.*", r".*\.q_proj", r"layers\.[12]\..*", "^layers.0.self_attn.q_proj"]
POOL += [
    "layers",
    "proj",
    "q|k_proj",
    r"(q|k)_proj",
    "layers.1.self_attn.k_proj",
    r"\w+",
    "",
    r"self_a(t)\3n.k_proj",
    "l.yers.0.+",
]
NAMES = [f"layers.{n}.self_attn.{p}" for n in range(LAYERS) for p in ("q_proj", "k_proj")]


@given(st.lists(st.sampled_from(POOL), unique=True, max_size=5))
def test_the_first_pattern_in_the_configs_order_decides_as_in_peft(patterns: list[str]) -> None:
    alphas = {pattern: n + 1 for n, pattern in enumerate(patterns)}
    made = make(shapes=dict.fromkeys(NAMES, (6, 5)), r=4, alpha=100, alpha_pattern=alphas)
    expected = {name: alphas.get(get_pattern_key(list(alphas), name), 100) / 4 for name in NAMES}
    assert {m.name: m.scaling for m in described(made.config, made.tensors).modules} == expected


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 4), (True, 8 / 2), (None, 8 / 4)])
def test_the_scaling_is_alpha_over_the_rank_or_its_root(rslora: bool | None, scaling: float) -> None:
    made = make(r=4, alpha=8, use_rslora=rslora)
    assert {m.scaling for m in described(made.config, made.tensors).modules} == {scaling}


def test_missing_rank_and_alpha_are_pefts_defaults() -> None:
    made = make(r=8)
    config = {key: value for key, value in made.config.items() if key not in {"r", "lora_alpha"}}
    assert {m.scaling for m in described(config, made.tensors).modules} == {1.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_scaling_is_applied_in_float32(dtype: torch.dtype) -> None:
    made = make(r=3, alpha=7, dtype=dtype)
    module = described(made.config, made.tensors).modules[0]
    factors = {role: made.tensors[name] for role, name in module.tensors.items()}
    B = factors["lora_B"]
    assert torch.allclose(formats.load(module, factors).B.double(), B.double() * 7 / 3, rtol=1e-6)


def test_loading_changes_neither_factor() -> None:
    made = make(alpha=3)
    before = {name: tensor.clone() for name, tensor in made.tensors.items()}
    formats.read(made.config, made.tensors)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.tensors.items())


def test_modules_keep_the_files_order() -> None:
    made = make(shapes={"b": (3, 3), "a": (3, 3)})
    assert [m.name for m in described(made.config, made.tensors).modules] == ["b", "a"]


# --- what we write


RANKS_WRITTEN = st.dictionaries(st.sampled_from([*NAMES, "q_proj", "head", "inner.head", "a.inner.head"]), st.integers(1, 5))


@given(RANKS_WRITTEN.filter(bool))
def test_our_config_gives_every_module_its_rank_as_peft_reads_it(ranks: dict[str, int]) -> None:
    config = written(ranks)
    patterns = config["rank_pattern"]
    assert {name: patterns.get(get_pattern_key(list(patterns), name), config["r"]) for name in ranks} == ranks


@given(RANKS_WRITTEN.filter(bool))
def test_our_config_scales_nothing(ranks: dict[str, int]) -> None:
    shapes = {}
    for name, r in ranks.items():
        lora_A, lora_B = factor_names(name)
        shapes |= {lora_A: (r, 5), lora_B: (6, r)}
    assert {m.scaling for m in formats.describe(written(ranks), shapes).modules} == {1.0}


def test_one_rank_everywhere_needs_no_patterns() -> None:
    config = written({"a": 4, "b": 4})
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})


@given(RANKS_WRITTEN.filter(bool))
def test_our_config_targets_full_names_in_a_list(ranks: dict[str, int]) -> None:
    assert written(ranks)["target_modules"] == list(ranks)


def test_our_config_is_a_peft_config() -> None:
    assert LoraConfig(**written({"a": 4, "b": 2})).r == 4


def written(ranks: Mapping[str, int]) -> dict[str, Any]:
    return config_for(base_model="org/base", revision=None, task_type=None, fan_in_fan_out=False, ranks=ranks)
