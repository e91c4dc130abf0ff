"""A base model and its fine-tune for tests: a small Llama as folders, and steps through the engine without a server."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from app.engine.child import workbench
from app.engine.direct import DirectExecutor
from app.engine.workflow import Run, run_all
from app.extract.request import resolve_extraction
from app.recipe import Recipe
from app.schemas import ExtractRequest
from app.services import Services
from llama import write_llama
from storage.digest import Digest

State = dict[str, Tensor]
LAYERS = 2
LINEAR = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
MODULES = {f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in LINEAR}


def is_linear(tensor: str) -> bool:
    return tensor.removesuffix(".weight") in MODULES


def is_any(_tensor: str) -> bool:
    return True


def state_of(folder: Path) -> State:
    return dict(load_file(folder / "model.safetensors"))


def write_pair(root: Path, only: Callable[[str], bool] = is_any, *, seed: int = 1) -> tuple[Path, Path]:
    """root/base and root/tuned: the same Llama, whose tensors that `only` names have moved by about a tenth."""
    base, tuned = write_llama(root / "base"), root / "tuned"
    generator = torch.Generator().manual_seed(seed)
    change = {name: 0.1 * t.std(correction=0) * torch.randn(t.shape, generator=generator) for name, t in state_of(base).items()}
    state = {name: t + change[name] + 1e-3 if only(name) else t for name, t in state_of(base).items()}
    write_like(base, tuned, state)
    return base, tuned


def write_like(base: Path, folder: Path, state: Mapping[str, Tensor]) -> None:
    """A folder with these weights, and all else as in base."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})


def in_shards(folder: Path) -> None:
    """The same weights as two files and their index."""
    state = state_of(folder)
    names = sorted(state)
    parts = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, tensors in parts.items():
        (folder / file).write_bytes(save({name: state[name] for name in tensors}, metadata={"format": "pt"}))
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in parts.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def asked(**fields: Any) -> ExtractRequest:
    return ExtractRequest.model_validate({"base": "dir:base", "tuned": "dir:tuned", "rank": 4, **fields})


def recipe_in(services: Services, token: str | None = None, **fields: Any) -> Recipe:
    return resolve_extraction(asked(**fields), services, token=token)


def run(services: Services, recipe: Recipe, *, stop: Callable[[], bool] = lambda: False) -> Digest:
    executor = DirectExecutor(workbench(services, "cpu", 2))
    return run_all(Run(services, recipe, executor, lambda *_: None, stop))
