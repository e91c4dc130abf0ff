"""kohya's single files in: every tensor counts once, exactly, or the file is refused by name."""

import pytest
import torch
from torch import Tensor

from merge_algos import formats
from merge_algos.errors import NonFiniteTensor, ShapeMismatch, UnsupportedAdapter

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
Q_MODULE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
CONV_MODULE = "unet.down_blocks.0.resnets.0.conv1"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(name: str = Q, d_out: int = 6, d_in: int = 5, r: int = 3, alpha: float | None = 2.0) -> dict[str, Tensor]:
    tensors = {f"{name}.lora_down.weight": drawn(r, d_in, seed=1), f"{name}.lora_up.weight": drawn(d_out, r, seed=2)}
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(alpha)}


def dense(tensors: dict[str, Tensor], name: str) -> Tensor:
    """up @ down * alpha / rank in float64, the plain reading."""
    up, down = (tensors[f"{name}.lora_{half}.weight"].double().flatten(1) for half in ("up", "down"))
    alpha = float(tensors[f"{name}.alpha"]) if f"{name}.alpha" in tensors else down.shape[0]
    return alpha / down.shape[0] * up @ down


def deltas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {module: delta.B.double() @ delta.A.double() for module, delta in formats.read(None, tensors).deltas.items()}


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [None, 3.0, 1.0, 0.5, -2.0])
def test_alpha_over_rank_scales(alpha: float | None) -> None:
    tensors = lora(alpha=alpha)
    assert close(deltas(tensors)[Q_MODULE], dense(tensors, Q))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_may_be_any_tensor_of_one_number(shape: tuple[int, ...]) -> None:
    tensors = lora() | {f"{Q}.alpha": torch.full(shape, 2.0)}
    assert close(deltas(tensors)[Q_MODULE], dense(lora(), Q))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3)])
def test_a_convolution_is_the_product_of_its_two(kernel: tuple[int, int]) -> None:
    down, up = drawn(3, 4, *kernel, seed=1), drawn(6, 3, 1, 1, seed=2)
    tensors = {f"{CONV}.lora_down.weight": down, f"{CONV}.lora_up.weight": up, f"{CONV}.alpha": torch.tensor(1.5)}
    x = drawn(1, 4, 8, 8, seed=3).double()
    both = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down.double()), up.double()) * 0.5
    (delta,) = deltas(tensors).values()
    assert close(torch.nn.functional.conv2d(x, delta.reshape(6, 4, *kernel)), both)


def test_a_core_is_the_convolution_in_the_middle() -> None:
    down, mid, up = drawn(3, 4, 1, 1, seed=1), drawn(3, 3, 3, 3, seed=2), drawn(6, 3, 1, 1, seed=3)
    parts = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    tensors = {f"{CONV}.{part}.weight": tensor for part, tensor in parts.items()} | {f"{CONV}.alpha": torch.tensor(1.5)}
    x = drawn(1, 4, 8, 8, seed=4).double()
    through = x
    for layer in (down, mid, up):
        through = torch.nn.functional.conv2d(through, layer.double())
    (delta,) = deltas(tensors).values()
    assert close(torch.nn.functional.conv2d(x, delta.reshape(6, 4, 3, 3)), through * 0.5)


def test_a_core_of_another_rank_is_refused() -> None:
    shapes = {"lora_down": (3, 4, 1, 1), "lora_mid": (2, 2, 3, 3), "lora_up": (6, 3, 1, 1)}
    with pytest.raises(ShapeMismatch, match=CONV):
        formats.describe(None, {f"{CONV}.{part}.weight": shape for part, shape in shapes.items()})


def test_half_precision_is_scaled_in_float32() -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in lora(alpha=1.0).items()}
    assert close(deltas(tensors)[Q_MODULE], dense(tensors, Q))


# --- names


@pytest.mark.parametrize("name", ["lora_unet_joint_blocks_0_x", "lora_te3_encoder_block_0", "lora_unet_input_blocks_4_7_proj_in"])
def test_an_unknown_name_stands_for_itself(name: str) -> None:
    assert list(deltas(lora(name))) == [name]


@pytest.mark.parametrize(
    ("fused", "d_out", "modules"),
    [
        ("double_blocks_1_img_attn_qkv", 12, {f"transformer_blocks.1.attn.to_{to}": 4 for to in "qkv"}),
        ("double_blocks_1_txt_attn_qkv", 12, {f"transformer_blocks.1.attn.add_{to}_proj": 4 for to in "qkv"}),
        (
            "single_blocks_2_linear1",
            28,
            {f"single_transformer_blocks.2.attn.to_{to}": 4 for to in "qkv"} | {"single_transformer_blocks.2.proj_mlp": 16},
        ),
    ],
)
def test_a_fused_layer_is_the_layers_it_is_made_of(fused: str, d_out: int, modules: dict[str, int]) -> None:
    name = f"lora_unet_{fused}"
    tensors = lora(name, d_out=d_out, d_in=4)
    got = deltas(tensors)
    assert {module: delta.shape[0] for module, delta in got.items()} == {f"transformer.{m}": rows for m, rows in modules.items()}
    assert close(torch.cat(list(got.values())), dense(tensors, name))


def test_scale_and_shift_of_the_last_layer_change_places() -> None:
    name = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = lora(name, d_out=8, d_in=4)
    shift, scale = dense(tensors, name).chunk(2)
    assert close(deltas(tensors)["transformer.norm_out.linear"], torch.cat([scale, shift]))


def test_a_fused_layer_that_cannot_be_shared_out_is_refused() -> None:
    name = "lora_unet_double_blocks_1_img_attn_qkv"
    with pytest.raises(UnsupportedAdapter, match=name):
        formats.read(None, lora(name, d_out=10, d_in=4))


# --- the base model


@pytest.mark.parametrize(
    ("metadata", "base_model"),
    [
        ({"ss_base_model_version": "sd_v1", "ss_sd_model_name": "x.safetensors"}, "sd_v1"),
        ({"ss_base_model_version": "None", "ss_sd_model_name": "x.safetensors"}, "x.safetensors"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "stable-diffusion-xl-v1-base"),
        ({"lora_adapter_metadata": '{"unet.base_model_name_or_path": "org/base"}'}, "org/base"),
        ({"ss_sd_model_name": "half \ud800 a character"}, "half  a character"),
        ({}, ""),
    ],
)
def test_the_metadata_names_the_base_model(metadata: dict[str, str], base_model: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in lora().items()}
    assert formats.describe(None, shapes, metadata).base_model == base_model


# --- refusals


def refused(tensors: dict[str, Tensor]) -> UnsupportedAdapter:
    with pytest.raises(UnsupportedAdapter) as caught:
        formats.read(None, tensors)
    return caught.value


@pytest.mark.parametrize(
    ("suffix", "reason"),
    [
        ("dora_scale", "base weights"),
        ("diff", "no low-rank factor"),
        ("diff_b", "bias"),
        ("w_norm", "norm"),
        ("b_norm", "norm"),
        ("oft_blocks", "rotates"),
        ("reshape_weight", "shape of the base"),
        ("lora_down.bias", "no such tensor"),
        ("scalar", "no such tensor"),
    ],
)
def test_a_tensor_that_no_kind_reads_is_named(suffix: str, reason: str) -> None:
    error = refused(lora() | {f"{Q}.{suffix}": torch.ones(6)})
    assert error.subject == f"tensor {Q}.{suffix}" and reason in error.reason


@pytest.mark.parametrize("foreign", ["unet.conv_in.lora_A.weight", "bundle_emb.x.string_to_param", "lora_unet_.alpha"])
def test_a_tensor_of_no_module_is_named(foreign: str) -> None:
    assert foreign in refused(lora() | {foreign: torch.ones(2, 2)}).subject


@pytest.mark.parametrize("alone", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_half_a_module_is_named(alone: str) -> None:
    assert Q in refused({f"{Q}.{alone}": lora()[f"{Q}.{alone}"]}).subject


def test_an_alpha_of_0_is_refused_because_loaders_disagree() -> None:
    assert refused(lora(alpha=0.0)).subject == f"tensor {Q}.alpha"


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(alpha: float) -> None:
    with pytest.raises(NonFiniteTensor, match=r"alpha"):
        formats.read(None, lora(alpha=alpha))


def test_an_alpha_of_several_numbers_is_refused() -> None:
    assert "one number" in refused(lora() | {f"{Q}.alpha": torch.ones(3)}).reason


def test_a_module_spelt_twice_is_refused() -> None:
    other = Q.replace("down_blocks_0_attentions_0", "input_blocks_1_1")
    error = refused(lora() | lora(other))
    assert Q in error.reason and other in error.reason


def test_factors_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=Q):
        formats.read(None, lora() | {f"{Q}.lora_up.weight": torch.ones(6, 2)})


# --- LyCORIS


def lycoris(name: str, d_out: int, width: int, **more: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A LoHa of rank 2 and alpha 1 as LyCORIS saves it, and its delta."""
    halves = {
        f"w{n}_{side}": drawn(*shape, seed=10 * n + len(side) + (side == "b"))
        for n in (1, 2)
        for side, shape in (("a", (d_out, 2)), ("b", (2, width)))
    }
    tensors = {f"{name}.hada_{half}": tensor for half, tensor in halves.items()} | {f"{name}.alpha": torch.tensor(1.0)}
    wide = {half: tensor.double() for half, tensor in halves.items()}
    return tensors | more, 0.5 * (wide["w1_a"] @ wide["w1_b"]) * (wide["w2_a"] @ wide["w2_b"])


def test_a_loha_is_read() -> None:
    tensors, expected = lycoris(Q, 6, 5)
    assert close(deltas(tensors)[Q_MODULE], expected)


def test_a_loha_of_a_known_convolution_is_one() -> None:
    tensors, expected = lycoris(CONV, 6, 36)
    spec = formats.describe(None, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert spec.layers[CONV_MODULE].kernel == (3, 3)
    assert close(deltas(tensors)[CONV_MODULE], expected)


@pytest.mark.parametrize(
    ("shapes", "scaling"),
    [
        ({"w1": (2, 3), "w2": (3, 2)}, 1.0),  # whole matrices have no rank to divide alpha by
        ({"w1": (2, 3), "w2_a": (3, 2), "w2_b": (2, 2)}, 0.5),
        ({"w1_a": (2, 4), "w1_b": (4, 3), "w2": (3, 2)}, 0.25),
    ],
)
def test_a_lokr_is_read(shapes: dict[str, tuple[int, int]], scaling: float) -> None:
    parts = {part: drawn(*shape, seed=n) for n, (part, shape) in enumerate(shapes.items())}
    tensors = {f"{Q}.lokr_{part}": tensor for part, tensor in parts.items()} | {f"{Q}.alpha": torch.tensor(1.0)}
    wide = {part: tensor.double() for part, tensor in parts.items()}
    w1, w2 = (wide[f"w{n}"] if f"w{n}" in wide else wide[f"w{n}_a"] @ wide[f"w{n}_b"] for n in (1, 2))
    assert close(deltas(tensors)[Q_MODULE], scaling * torch.kron(w1, w2))
