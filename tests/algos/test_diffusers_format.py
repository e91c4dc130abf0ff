"""diffusers' single files in: every spelling of every year, the scaling its own loader would use, nothing left over."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_algos import formats
from merge_algos.errors import ShapeMismatch, UnsupportedAdapter

UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0.self_attn"
SPELLINGS = {
    # tensor names of (A, B) -> module
    (f"unet.{UNET}.to_q.lora_A.weight", f"unet.{UNET}.to_q.lora_B.weight"): f"unet.{UNET}.to_q",
    (f"unet.{UNET}.to_q.lora.down.weight", f"unet.{UNET}.to_q.lora.up.weight"): f"unet.{UNET}.to_q",
    (f"unet.{UNET}.processor.to_q_lora.down.weight", f"unet.{UNET}.processor.to_q_lora.up.weight"): f"unet.{UNET}.to_q",
    (f"unet.{UNET}.processor.to_out_lora.down.weight", f"unet.{UNET}.processor.to_out_lora.up.weight"): f"unet.{UNET}.to_out.0",
    (f"{UNET}.processor.to_k_lora.down.weight", f"{UNET}.processor.to_k_lora.up.weight"): f"unet.{UNET}.to_k",
    (f"text_encoder.{TEXT}.q_proj.lora_linear_layer.down.weight", f"text_encoder.{TEXT}.q_proj.lora_linear_layer.up.weight"): (
        f"text_encoder.{TEXT}.q_proj"
    ),
    (f"text_encoder.{TEXT}.to_out_lora.down.weight", f"text_encoder.{TEXT}.to_out_lora.up.weight"): (
        f"text_encoder.{TEXT}.out_proj"
    ),
    ("text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight", "text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight"): (
        "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    ),
    (f"text_encoder_2.{TEXT}.v_proj.lora_A.weight", f"text_encoder_2.{TEXT}.v_proj.lora_B.weight"): (
        f"text_encoder_2.{TEXT}.v_proj"
    ),
    ("transformer.blocks.7.attn.lora_A.weight", "transformer.blocks.7.attn.lora_B.weight"): "transformer.blocks.7.attn",
}
NAMES = next(iter(SPELLINGS))
MODULE = SPELLINGS[NAMES]
A = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
B = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
DELTA = B.double() @ A.double()


def file(names: tuple[str, str] = NAMES) -> dict[str, Tensor]:
    return dict(zip(names, (A, B), strict=True))


def said(**config: Any) -> dict[str, str]:
    return {"format": "pt", "lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}


def deltas(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, Tensor]:
    spec = formats.describe(None, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, metadata)
    loaded = {m.name: formats.load(m, {role: tensors[name] for role, name in m.tensors.items()}) for m in spec.modules}
    return {name: delta.B.double() @ delta.A.double() for name, delta in loaded.items()}


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("names", "module"), SPELLINGS.items(), ids=lambda value: value if isinstance(value, str) else value[0])
def test_every_spelling_is_the_same_delta(names: tuple[str, str], module: str) -> None:
    (found,) = deltas(file(names)).items()
    assert found[0] == module and close(found[1], DELTA)


def test_a_convolution_is_read() -> None:
    tensors = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1)}
    assert close(deltas(tensors)["unet.conv_in"], torch.full((8, 36), 2.0).double())


def test_an_alpha_tensor_scales() -> None:
    assert close(deltas(file() | {f"{MODULE}.alpha": torch.tensor(1.5)})[MODULE], DELTA * 0.5)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"r": 3, "lora_alpha": 6}, 2),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        ({"r": 8, "rank_pattern": {"to_q": 3}, "lora_alpha": 6}, 2),
        ({"r": 3, "lora_alpha": 3, "alpha_pattern": {f"^{UNET}.to_q": 12}}, 4),
        ({"r": 3, "lora_alpha": 3, "alpha_pattern": {"to_k": 12}}, 1),
    ],
)
def test_what_the_metadata_says_scales_as_in_peft(config: dict[str, Any], scaling: float) -> None:
    assert close(deltas(file(), said(**config))[MODULE], DELTA * scaling)


def test_the_metadata_of_another_component_says_nothing_but_that_defaults_hold() -> None:
    with pytest.raises(ShapeMismatch):  # as to diffusers' loader, whose default rank is then 8
        deltas(file(), {"lora_adapter_metadata": '{"text_encoder.r": 3}'})


def refused(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> UnsupportedAdapter:
    with pytest.raises(UnsupportedAdapter) as caught:
        deltas(tensors, metadata)
    return caught.value


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (f"unet.{UNET}.to_q.lora_magnitude_vector", "base weights"),
        (f"unet.{UNET}.to_q.dora_scale", "base weights"),
        (f"unet.{UNET}.to_q.lora_B.bias", "bias"),
        ("base_model.model.q.lora_A.weight", "adapter_config.json"),
        ("vae.conv.lora_A.weight", "no such tensor"),
        ("unet.conv_in.weight", "no such tensor"),
    ],
)
def test_a_tensor_that_is_no_factor_is_named(tensor: str, reason: str) -> None:
    error = refused(file() | {tensor: torch.ones(2, 2)})
    assert error.subject == f"tensor {tensor}" and reason in error.reason


@pytest.mark.parametrize("position", [0, 1])
def test_half_a_module_is_named(position: int) -> None:
    assert MODULE in refused({NAMES[position]: (A, B)[position]}).subject


def test_an_alpha_alone_is_refused() -> None:
    assert "unet.conv_in" in refused(file() | {"unet.conv_in.alpha": torch.tensor(1.0)}).subject


def test_a_factor_spelt_twice_is_refused() -> None:
    error = refused(file() | file((f"unet.{UNET}.to_q.lora.down.weight", f"unet.{UNET}.to_q.lora.up.weight")))
    assert NAMES[0] in error.reason


def test_two_sources_of_scaling_are_refused() -> None:
    assert "alpha" in refused(file() | {f"{MODULE}.alpha": torch.tensor(1.5)}, said(r=3, lora_alpha=3)).subject


def test_a_flag_that_means_more_is_named() -> None:
    error = refused(file(), said(r=3, lora_alpha=3, use_dora=True))
    assert error.subject == f"module {MODULE}" and "use_dora" in error.reason


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000])
def test_metadata_that_is_no_object_is_refused(text: str) -> None:
    assert "lora_adapter_metadata" in refused(file(), {"lora_adapter_metadata": text}).subject


def test_an_anchored_pattern_of_a_text_encoder_is_refused() -> None:
    text = json.dumps({"text_encoder.r": 3, "text_encoder.alpha_pattern": {"^encoder.layers.0": 2}})
    names = ("text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight", "text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight")
    assert "alpha_pattern" in refused(file(names), {"lora_adapter_metadata": text}).subject


def test_a_file_of_no_naming_is_refused() -> None:
    assert "base_model.model.q" in refused({"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}).reason
