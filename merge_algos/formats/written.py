"""What we write: PEFT's LoRA layout with one scaling that every loader agrees on, alpha = r and no rsLoRA."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from merge_algos.formats.spec import Layer

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Written:
    """One tensor of a PEFT file. factors: names of the plain factors it is made of.  shape: what it has in the file.

    r: the rank to which its factors are padded with zeros: rows of A (half "A") or columns of B.
    """

    name: str
    half: Literal["A", "B"]
    factors: tuple[str, ...]
    r: int
    shape: tuple[int, ...]


def factor_names(module: str) -> tuple[str, str]:
    """Names of the plain factors (r, d_in) and (d_out, r), which are those of PEFT's file for a linear layer."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def written(shapes: Mapping[str, tuple[int, int]], layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> tuple[Written, ...]:
    """The tensors of a file with these modules at these ranks, in their order."""
    return tuple(tensor for module, r in ranks.items() for tensor in _tensors(module, shapes[module], layers[module], r))


def joined(tensor: Written, factors: Sequence[Tensor]) -> Tensor:
    """The tensor as it stands in the file. factors: in the order of `tensor.factors`, of any rank up to r."""
    (factor,) = factors
    extra = (0, 0, 0, tensor.r - factor.shape[0]) if tensor.half == "A" else (0, tensor.r - factor.shape[1])
    return torch.nn.functional.pad(factor, extra).reshape(tensor.shape)


def config_for(
    *,
    base_model: str,
    revision: str | None,
    task_type: str | None,
    fan_in_fan_out: bool,
    ranks: Mapping[str, int],
) -> dict[str, Any]:
    """`adapter_config.json` for modules of these ranks: alpha = r throughout, full module names as targets.

    One rank everywhere gives empty patterns, which is what every server reads; different ranks need both patterns.
    """
    r = max(ranks.values())
    other = {_only(name, ranks): rank for name, rank in ranks.items() if rank != r}
    return {
        "alpha_pattern": other,
        "base_model_name_or_path": base_model or None,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": other,
        "revision": revision,
        "target_modules": list(ranks),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def _tensors(module: str, shape: tuple[int, int], layer: Layer, r: int) -> tuple[Written, Written]:
    lora_A, lora_B = factor_names(module)
    d_out, d_in = shape
    if layer.kind == "embedding":
        names = f"{_PREFIX}{module}.lora_embedding_A", f"{_PREFIX}{module}.lora_embedding_B"
        return Written(names[0], "A", (lora_A,), r, (r, d_in)), Written(names[1], "B", (lora_B,), r, (d_out, r))
    of_A, of_B = (r, *layer.weight_shape(shape)[1:]), (d_out, r, *(1 for _ in layer.kernel))
    return Written(lora_A, "A", (lora_A,), r, of_A), Written(lora_B, "B", (lora_B,), r, of_B)


def _only(name: str, modules: Iterable[str]) -> str:
    """A pattern for this module alone: its name, anchored where that is also the dotted tail of another module's."""
    is_tail = any(other.endswith(f".{name}") for other in modules)
    return f"^{re.escape(name)}" if is_tail else name
