"""Names of modules in image models: kohya's underscores undone by tables, and adapters whose names cannot be matched refused."""

import pytest

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats import components
from merge_algos.formats.kohya_names import place, spelled
from merge_algos.formats.spec import AdapterSpec, ModuleSpec

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


@pytest.mark.parametrize("table", components.TABLES.values(), ids=components.TABLES)
def test_underscores_never_join_two_modules(table: tuple[str, ...]) -> None:
    assert len({template.replace(".", "_") for template in table}) == len(table)


# --- adapters side by side


def spec(*modules: str) -> AdapterSpec:
    return AdapterSpec("", None, None, False, tuple(ModuleSpec(name, (6, 5), 3, "LoRA", {}) for name in modules))


KNOWN, PARTLY = "unet.mid_block.attentions.0.proj_in", "unet.some.layer"
PLAIN, OPAQUE = "model.layers.0.q_proj", "lora_unet_some_layer"


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
