"""Adapters for tests: random PEFT directories of any shape, rank, scaling and dtype, and their dense float64 meaning."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

PREFIX = "base_model.model."
SHAPES = {f"layers.{n}.{name}": shape for n in range(3) for name, shape in {"q_proj": (24, 16), "mlp.up": (40, 16)}.items()}


@dataclass(frozen=True)
class Made:
    """A PEFT adapter as files would hold it. tensors: state dict names -> tensors."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        weights = save({name: t.contiguous() for name, t in self.tensors.items()}, metadata={"format": "pt"})
        return {"adapter_config.json": json.dumps(self.config).encode(), "adapter_model.safetensors": weights}

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (directory / name).write_bytes(data)
        return directory


@dataclass(frozen=True)
class Single(Made):
    """An adapter that is one file without a config, as image trainers write it. metadata: of the file."""

    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        tensors = {name: t.contiguous() for name, t in self.tensors.items()}
        return {"adapter_model.safetensors": save(tensors, metadata=dict(self.metadata))}


# modules of Stable Diffusion's UNet, by diffusers' names: (d_out, d_in, *kernel)
IMAGE_SHAPES: Mapping[str, tuple[int, ...]] = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (12, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": (8, 12),
    "down_blocks.1.resnets.0.conv1": (6, 4, 3, 3),
    "mid_block.attentions.0.proj_in": (6, 6, 1, 1),
}


def image_factors(seed: int, *, r: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A, B) as a layer of its shape has them."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, (d_out, *d_in) in IMAGE_SHAPES.items():
        ones = [1] * (len(d_in) - 1)
        factors[module] = torch.randn(r, *d_in, generator=generator), torch.randn(d_out, r, *ones, generator=generator)
    return factors


def make_kohya(
    seed: int = 0, *, r: int = 2, alpha: float = 1.0, base_model: str = "sd_v1", dtype: torch.dtype = torch.float32
) -> Single:
    tensors = {}
    for module, (A, B) in image_factors(seed, r=r).items():
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": A.to(dtype), f"{name}.lora_up.weight": B.to(dtype)}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return Single(tensors, metadata={"ss_base_model_version": base_model} if base_model else {})


def make_diffusers(seed: int = 0, *, r: int = 2) -> Single:
    tensors = {}
    for module, pair in image_factors(seed, r=r).items():
        tensors |= {f"unet.{module}.lora_{half}.weight": factor for half, factor in zip("AB", pair, strict=True)}
    return Single(tensors)


def image_deltas(seed: int, *, r: int = 2, scaling: float = 1.0) -> dict[str, Tensor]:
    """Module -> scaling * B @ A in float64, convolutions flattened; the naive oracle."""
    wide = {module: (A.double().flatten(1), B.double().flatten(1)) for module, (A, B) in image_factors(seed, r=r).items()}
    return {module: scaling * B @ A for module, (A, B) in wide.items()}


def make(
    seed: int = 0,
    *,
    r: int = 4,
    alpha: float = 8,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    base_model: str = "org/base",
    dtype: torch.dtype = torch.float32,
    ranks: Mapping[str, int] | None = None,
    **config: Any,
) -> Made:
    """Random factors. ranks: module -> rank where it differs from r (goes into rank_pattern). config: more config keys."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (d_out, d_in) in shapes.items():
        rank = (ranks or {}).get(module, r)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator).to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator).to(dtype)
    written = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted({m.rpartition(".")[2] for m in shapes}),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
        "bias": "none",
    }
    if ranks:
        written["rank_pattern"] = dict(ranks)
    return Made(tensors, written | config)


def dense(made: Made) -> dict[str, Tensor]:
    """Module -> scaling * B @ A in float64, by the plain reading of PEFT's rules; the naive oracle."""
    return dense_tensors(made.tensors, made.config)


def dense_directory(directory: Path) -> dict[str, Tensor]:
    """The same for a saved adapter."""
    config = json.loads((directory / "adapter_config.json").read_text())
    return dense_tensors(load_file(directory / "adapter_model.safetensors"), config)


def dense_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    deltas = {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            A, B = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
            alpha = (config.get("alpha_pattern") or {}).get(module, config["lora_alpha"])
            r = A.shape[0]
            deltas[module] = (alpha / (r**0.5 if config.get("use_rslora") else r)) * B @ A
    return deltas
