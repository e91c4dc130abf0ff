"""Tiny image pipelines, and what diffusers' own loader makes of an adapter file: the weights after fusing minus those before."""

import copy
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_CLIP: Mapping[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@cache
def _pipeline(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"sd": _sd, "sdxl": _sdxl, "flux": _flux}[name]()


def pipeline(name: str) -> Any:
    """A fresh one: loading changes it."""
    return copy.deepcopy(_pipeline(name))


def _sd() -> Any:
    """Stable Diffusion 1.5 in small: four levels, two residual blocks each, attention in three."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        sample_size=8,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    parts = {"vae": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    text_encoder = CLIPTextModel(CLIPTextConfig(**_CLIP))
    return StableDiffusionPipeline(
        unet=unet, text_encoder=text_encoder, scheduler=DDIMScheduler(), requires_safety_checker=False, **parts
    )


def _sdxl() -> Any:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        sample_size=8,
        cross_attention_dim=12,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    return StableDiffusionXLPipeline(
        vae=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        text_encoder=CLIPTextModel(CLIPTextConfig(**_CLIP)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP)),
        scheduler=DDIMScheduler(),
        add_watermarker=False,
    )


def _flux() -> Any:
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=[2, 2, 4],
        guidance_embeds=True,
    )
    return FluxPipeline(
        vae=None,
        tokenizer=None,
        tokenizer_2=None,
        text_encoder_2=None,
        transformer=transformer,
        text_encoder=CLIPTextModel(CLIPTextConfig(**_CLIP)),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def layers(name: str) -> Iterator[tuple[str, str, nn.Module]]:
    """(component, path as diffusers' files have it, layer) of all that LoRA adapts."""
    for component in COMPONENTS:
        model = getattr(_pipeline(name), component, None)
        for path, layer in model.named_modules() if model is not None else ():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                old = f"text_model.{path}" if component.startswith("text") and path.startswith("encoder.") else path
                yield component, old, layer


def fused(name: str, file: Path) -> dict[str, Tensor]:
    """`<component>.<path>` -> what fusing this file adds to the weight, in float64, wherever it adds anything."""
    loaded = pipeline(name)
    for component in COMPONENTS:
        if getattr(loaded, component, None) is not None:
            getattr(loaded, component).double()
    loaded.load_lora_weights(str(file.parent), weight_name=file.name)
    loaded.fuse_lora(components=[part for part in loaded._lora_loadable_modules if getattr(loaded, part, None) is not None])
    loaded.unload_lora_weights()
    changed = {}
    for component, path, layer in layers(name):
        here = path.removeprefix("text_model.") if not hasattr(getattr(loaded, component), "text_model") else path
        delta = getattr(loaded, component).get_submodule(here).weight.data - layer.weight.double()
        if bool(delta.any()):
            changed[f"{component}.{path}"] = delta.detach()
    return changed
