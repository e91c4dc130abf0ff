"""kohya's single files in: every tensor counts once, exactly, or the file is refused by name."""

import pytest
import torch
from torch import Tensor

from merge_algos import formats
from merge_algos.errors import NonFiniteTensor, ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import components
from merge_algos.formats.kohya_names import place, spelled

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


# name as kohya spells it, below it the module: diffusers' UNet and CLIP, the original UNet (as SDXL's trainers have it), Flux
OWN = """
lora_te2_text_model_encoder_layers_31_self_attn_k_proj
    text_encoder_2.text_model.encoder.layers.31.self_attn.k_proj
lora_te1_text_model_encoder_layers_0_self_attn_out_proj
    text_encoder.text_model.encoder.layers.0.self_attn.out_proj
lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj
    unet.up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj
lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0
    unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0
lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q
lora_unet_down_blocks_2_downsamplers_0_conv
    unet.down_blocks.2.downsamplers.0.conv
lora_unet_down_blocks_1_resnets_0_time_emb_proj
    unet.down_blocks.1.resnets.0.time_emb_proj
lora_unet_time_embedding_linear_2
    unet.time_embedding.linear_2
lora_te_text_model_encoder_layers_11_mlp_fc1
    text_encoder.text_model.encoder.layers.11.mlp.fc1
lora_te2_text_projection
    text_encoder_2.text_projection
"""
ORIGINAL = """
lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q
    unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q
lora_unet_input_blocks_8_1_proj_in
    unet.down_blocks.2.attentions.1.proj_in
lora_unet_middle_block_1_transformer_blocks_9_ff_net_2
    unet.mid_block.attentions.0.transformer_blocks.9.ff.net.2
lora_unet_middle_block_2_in_layers_2
    unet.mid_block.resnets.1.conv1
lora_unet_output_blocks_5_1_proj_out
    unet.up_blocks.1.attentions.2.proj_out
lora_unet_output_blocks_2_2_conv
    unet.up_blocks.0.upsamplers.0.conv
lora_unet_output_blocks_7_0_skip_connection
    unet.up_blocks.2.resnets.1.conv_shortcut
lora_unet_input_blocks_3_0_op
    unet.down_blocks.0.downsamplers.0.conv
lora_unet_input_blocks_1_0_emb_layers_1
    unet.down_blocks.0.resnets.0.time_emb_proj
lora_unet_input_blocks_2_0_out_layers_3
    unet.down_blocks.0.resnets.1.conv2
lora_unet_input_blocks_0_0
    unet.conv_in
lora_unet_out_2
    unet.conv_out
lora_unet_time_embed_0
    unet.time_embedding.linear_1
lora_unet_label_emb_0_2
    unet.add_embedding.linear_2
"""
FLUX = """
lora_unet_double_blocks_18_img_attn_proj
    transformer.transformer_blocks.18.attn.to_out.0
lora_unet_double_blocks_0_txt_mlp_2
    transformer.transformer_blocks.0.ff_context.net.2
lora_unet_single_blocks_37_linear2
    transformer.single_transformer_blocks.37.proj_out
lora_transformer_single_transformer_blocks_0_attn_to_k
    transformer.single_transformer_blocks.0.attn.to_k
"""


def pairs(*tables: str) -> list[tuple[str, str]]:
    words = [word for table in tables for word in table.split()]
    return list(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize(("name", "module"), pairs(OWN, ORIGINAL, FLUX))
def test_a_known_name_is_a_module_of_its_component(name: str, module: str) -> None:
    assert place(name).modules == (module,)


@pytest.mark.parametrize("name", ["lora_unet_joint_blocks_0_x", "lora_te3_encoder_block_0", "lora_unet_input_blocks_4_7_proj_in"])
def test_an_unknown_name_stands_for_itself(name: str) -> None:
    assert list(deltas(lora(name))) == [name]


@pytest.mark.parametrize("table", components.TABLES.values(), ids=components.TABLES)
def test_underscores_never_join_two_modules(table: tuple[str, ...]) -> None:
    assert len({template.replace(".", "_") for template in table}) == len(table)


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


# --- adapters side by side


def spec(*modules: str) -> formats.AdapterSpec:
    described = formats.describe(None, {k: tuple(t.shape) for k, t in lora().items()})
    (module,) = described.modules
    replaced = [type(module)(name, module.shape, module.r, module.kind, module.tensors) for name in modules]
    return type(described)("", None, None, False, tuple(replaced))


KNOWN, PARTLY, PLAIN, OPAQUE = Q_MODULE, "unet.some.layer", "model.layers.0.q_proj", "lora_unet_some_layer"


@pytest.mark.parametrize("pair", [(KNOWN, PARTLY), (KNOWN, OPAQUE), (OPAQUE, OPAQUE), (PLAIN, PLAIN), (PARTLY, PARTLY)])
def test_names_that_can_be_matched_go_together(pair: tuple[str, str]) -> None:
    components.check_names([spec(name) for name in pair])


TEXT, TEXT_ALONE = "text_encoder_2.encoder.layers.0.x", "text_model.encoder.layers.0.x"


@pytest.mark.parametrize(
    "pair",
    [(KNOWN, PLAIN), (PARTLY, "some.layer"), (PARTLY, OPAQUE), (PLAIN, OPAQUE), (TEXT, TEXT_ALONE)],
)
def test_names_that_cannot_be_matched_are_refused_in_any_order(pair: tuple[str, str]) -> None:
    for names in (pair, pair[::-1]):
        with pytest.raises(UnsupportedAdapter, match=names[1]) as caught:
            components.check_names([spec(name) for name in names])
        assert names[0] in caught.value.reason


def test_modules_of_gpt2_are_no_component() -> None:
    inner, outer = "transformer.h.0.attn.c_attn", "lm_head"
    components.check_names([spec(inner), spec(inner, outer), spec(outer)])


def test_names_within_one_adapter_are_its_own_matter() -> None:
    components.check_names([spec(KNOWN, OPAQUE), spec(KNOWN, OPAQUE)])


def test_a_third_adapter_is_compared_with_all_before() -> None:
    with pytest.raises(UnsupportedAdapter):
        components.check_names([spec(PARTLY), spec(KNOWN), spec(OPAQUE)])


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


# --- what has no kohya name


def unnamed(*modules: str) -> UnsupportedAdapter:
    with pytest.raises(UnsupportedAdapter) as caught:
        spelled(modules)
    return caught.value


@pytest.mark.parametrize("module", [PLAIN, PARTLY, "transformer.blocks.0.attn", "text_encoder_3.encoder.block.0.q", "unet"])
def test_a_module_that_no_table_has_is_named(module: str) -> None:
    assert module in unnamed(KNOWN, module).subject


def test_a_transformer_that_may_not_be_flux_is_refused() -> None:
    block = "transformer.transformer_blocks.0.attn.to_q"
    assert block in unnamed(block).subject
    assert "lora_unet_double_blocks_0_img_attn_qkv" in spelled((block, "transformer.single_transformer_blocks.0.proj_out"))


STABLE_DIFFUSION = [module for _, module in pairs(OWN, ORIGINAL) if module.split(".")[0] in ("unet", "text_encoder")]
SINGLE = "transformer.single_transformer_blocks.9.proj_out"


@pytest.mark.parametrize("beside", ["text_encoder.text_projection", "text_encoder_2.text_projection"], ids=["1.5", "XL"])
@pytest.mark.parametrize("module", STABLE_DIFFUSION)
def test_a_spelling_is_read_as_the_module_it_was_made_of(module: str, beside: str) -> None:
    names = list(spelled((module, beside)))
    assert [place(name).modules for name in names] == [(module,), (beside,)]


@pytest.mark.parametrize("module", [module for _, module in pairs(FLUX)])
def test_so_is_one_of_flux(module: str) -> None:
    assert module in [read for name in spelled((module, SINGLE)) for read in place(name).modules]
