"""DoRA adapters as PEFT saves them, what PEFT makes of them, and the same in float64 by the formula of the paper."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from app import ingest
from app.engine.child import workbench
from app.engine.direct import DirectExecutor
from app.engine.workflow import Run, run_all
from app.recipe import Recipe
from app.report import read_report
from app.resolve import resolve
from app.schemas import MergeRequest
from app.services import Services
from making import PREFIX
from storage.digest import Digest

TARGETS = ["q_proj", "down_proj"]  # a square layer and one that is not
Deltas = dict[str, Tensor]


def dora(targets: Sequence[str] = TARGETS, **fields: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), use_dora=True, **fields)


def write_adapter(base: Path, folder: Path, config: PeftConfig, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Deltas:
    """An adapter of that config with random weights, saved by PEFT; module -> the delta that PEFT itself merges."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted: Any = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.05 * torch.randn(parameter.shape))
            elif parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
            if parameter.requires_grad:
                parameter.copy_(parameter.to(dtype))
    adapted.save_pretrained(folder)
    if dtype != torch.float32:
        _recast(folder, dtype)
    after = adapted.merge_and_unload().state_dict()
    return {
        name.removesuffix(".weight"): (after[name] - before[name]).double()
        for name in before
        if not torch.equal(before[name], after[name])
    }


def dense_doras(base: Path, folder: Path) -> Deltas:
    """Module -> m / |W + s B A| (W + s B A) - W in float64, row by row (arXiv:2402.09353, equation 5)."""
    weights, tensors = load_file(base / "model.safetensors"), load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            A, B, m = (tensors[f"{PREFIX}{module}.{part}"].double() for part in PARTS)
            W = weights[f"{module}.weight"].double()
            V = W + config["lora_alpha"] / config["r"] * B @ A
            found[module] = m[:, None] / V.norm(dim=1, keepdim=True) * V - W
    return found


PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def norm(deltas: Mapping[str, Tensor]) -> float:
    return float(sum(delta.square().sum() for delta in deltas.values()) ** 0.5)


def difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Deltas:
    assert left.keys() == right.keys()
    return {module: left[module] - right[module] for module in left}


def added(services: Services, folder: Path) -> str:
    files = [[(folder / name).read_bytes()] for name in ("adapter_config.json", "adapter_model.safetensors")]
    return str(ingest.import_upload(services, *files).id)


def recipe_of(
    services: Services, *sources: str, token: str | None = None, weights: Sequence[float] = (), **fields: Any
) -> Recipe:
    weighted = [{"source": s, "weight": w} for s, w in zip(sources, weights or [1.0] * len(sources), strict=True)]
    return resolve(MergeRequest.model_validate({"adapters": weighted, **fields}), services, token=token)


def run(
    services: Services,
    recipe: Recipe,
    *,
    report: Callable[[str, int, int], None] = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
) -> Digest:
    executor = DirectExecutor(workbench(services, "cpu", 1))
    return run_all(Run(services, recipe, executor, report, stop))


def certificate(services: Services, adapter: Digest) -> dict[str, Any]:
    report = read_report(services.blobs, adapter)
    assert report is not None
    return report


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _recast(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
