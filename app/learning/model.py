"""The base model, from a folder of its own files, and the heads that go on top of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.adapters import TORCH_DTYPES, read_tensor
from app.errors import BadBase, BadData, NotInstalled
from app.learning.problem import POOLING, Forward, Head, linear_head, logits
from merge_algos.learn.method import Pooling, TaskType
from storage.blobs import BlobStore
from storage.digest import Digest
from storage.tensors import open_tensors

_LAST_LAYERS = ("score", "classifier.out_proj", "classifier", "classification_head.out_proj")


def load_base(folder: Path, task_type: TaskType, device: torch.device) -> tuple[nn.Module, Any]:
    """Model and tokenizer, frozen; float32 on a CPU, bfloat16 elsewhere. No code from the repository is ever run.

    Raises NotInstalled or BadBase.
    """
    try:
        import transformers
    except ImportError as error:
        raise NotInstalled("transformers", "learn") from error
    kinds = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "sequence_classification": transformers.AutoModelForSequenceClassification,
        "feature_classification": transformers.AutoModel,
    }
    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if (folder / "model.gguf").exists():
        given["gguf_file"] = "model.gguf"
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    weights = given if "gguf_file" in given else {**given, "use_safetensors": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **given)
        model = kinds[task_type].from_pretrained(folder, dtype=dtype, **weights)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise BadBase(str(error).replace(str(folder), "the base model").splitlines()[0][:300]) from error
    return model.eval().requires_grad_(False).to(device), tokenizer


def forward_of(model: nn.Module, task_type: TaskType, pooling: Pooling) -> Forward:
    return POOLING[pooling] if task_type == "feature_classification" else logits


def take_off_head(model: nn.Module) -> None:
    """Make a classifier give what its last layer reads, so that each task's own head can read it. Raises BadBase."""
    for name in _LAST_LAYERS:
        parent, _, own = name.rpartition(".")
        holder = model.get_submodule(parent) if not parent or hasattr(model, parent.split(".")[0]) else None
        if holder is not None and isinstance(getattr(holder, own, None), nn.Linear):
            setattr(holder, own, nn.Identity())
            return
    raise BadBase(f"a {type(model).__name__} has no last layer that a task's own head could replace")


def read_head(blobs: BlobStore, task: str, head: Digest, device: torch.device, dtype: torch.dtype) -> tuple[Head, int]:
    """A task's frozen linear head, and its number of classes. Raises BadData."""
    with open_tensors(blobs.path(head)) as file:
        infos = file.header.tensors
        if "weight" not in infos or len(infos["weight"].shape) != 2 or infos["weight"].dtype not in TORCH_DTYPES:
            raise BadData(task, "the head must hold `weight` (classes, features), and may hold `bias` (classes)")
        tensors: Mapping[str, Tensor] = {name: read_tensor(file, name) for name in ("weight", "bias") if name in infos}
    placed = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    return linear_head(placed["weight"], placed.get("bias")), len(placed["weight"])


def classes_of(model: nn.Module) -> Mapping[str, int] | int:
    """Of the model's own head: name -> number where it has names."""
    config: Any = model.config
    names = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    return names if len(names) == config.num_labels else int(config.num_labels)


def pad_token(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if token is not None:
            return int(token)
    raise AssertionError("0 is a token")
