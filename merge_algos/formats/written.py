"""What we write: PEFT's LoRA layout with one scaling that every loader agrees on, alpha = r and no rsLoRA."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from merge_algos.formats.components import without_component
from merge_algos.formats.spec import Layer

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Written:
    """One tensor of a file. factors: names of the plain factors it is made of.  shape: what it has in the file.

    r: the rank to which its factors are padded with zeros: rows of A (half "A") or columns of B. rows: of a module that fuses
    several, where each factor's rows go: (start, stop) ranges in order.  one_A: they share its columns. Half "alpha" is the
    number r itself.
    """

    name: str
    half: Literal["A", "B", "alpha"]
    factors: tuple[str, ...]
    r: int
    shape: tuple[int, ...]
    rows: tuple[tuple[tuple[int, int], ...], ...] = ()
    one_A: bool = False


def factor_names(module: str) -> tuple[str, str]:
    """Names of the plain factors (r, d_in) and (d_out, r), which are those of PEFT's file for a linear layer."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def written(shapes: Mapping[str, tuple[int, int]], layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> tuple[Written, ...]:
    """The tensors of a file with these modules at these ranks, in their order; experts at the largest rank among them."""
    wrapped = {module: owner_of(module, layers[module]) for module in ranks}
    owners: dict[str, list[str]] = {}
    for module, owner in wrapped.items():
        owners.setdefault(owner, []).append(module)
    called = without_component(tuple(owners))
    return tuple(
        tensor
        for owner, modules in owners.items()
        for tensor in _tensors(called[owner], modules, shapes[modules[0]], layers[modules[0]], max(ranks[m] for m in modules))
    )


def owner_of(module: str, layer: Layer) -> str:
    """The module of the model: without the number of an expert."""
    return module.rpartition("[")[0] if layer.experts > 1 else module


def joined(tensor: Written, factors: Sequence[Tensor]) -> Tensor:
    """The tensor as it stands in the file. factors: in the order of `tensor.factors`, of any rank up to r."""
    if tensor.half == "alpha":
        return torch.tensor(float(tensor.r))
    if tensor.rows:
        return _fused(tensor, factors)
    if len(factors) == 1 and factors[0].shape[tensor.half == "B"] == tensor.r:
        return factors[0].reshape(tensor.shape)  # nothing to pad: nothing to copy
    if tensor.half == "A":
        return torch.cat([pad(factor, (0, 0, 0, tensor.r - factor.shape[0])) for factor in factors]).reshape(tensor.shape)
    return torch.stack([pad(factor, (0, tensor.r - factor.shape[1])) for factor in factors], 2).reshape(tensor.shape)


def _fused(tensor: Written, factors: Sequence[Tensor]) -> Tensor:
    """Factors B, each in rows of its own and, unless they have one A, in columns of its own."""
    B = factors[0].new_zeros(tensor.shape[0], tensor.shape[1])
    for n, (factor, ranges) in enumerate(zip(factors, tensor.rows, strict=True)):
        first = 0 if tensor.one_A else n * tensor.r
        parts = torch.split(factor, [stop - start for start, stop in ranges])
        for (start, stop), part in zip(ranges, parts, strict=True):
            B[start:stop, first : first + factor.shape[1]] = part
    return B.reshape(tensor.shape)


def config_for(
    *,
    base_model: str,
    revision: str | None,
    task_type: str | None,
    fan_in_fan_out: bool,
    ranks: Mapping[str, int],
    layers: Mapping[str, Layer] | None = None,
) -> dict[str, Any]:
    """`adapter_config.json` for modules of these ranks: alpha = r throughout, full module names as targets.

    One rank everywhere gives empty patterns, which is what every server reads; different ranks need both patterns. layers: of
    modules that are not linear; bare parameters are targets of their own, and have one rank per module.
    """
    called = without_component(tuple(ranks))
    targets = _targets(
        {called[module]: r for module, r in ranks.items()},
        {called[module]: layer for module, layer in (layers or {}).items() if module in called},
    )
    named = {name: r for own in targets for name, r in own.items()}
    r = max(ranks.values())
    other = {_only(name, named): rank for name, rank in named.items() if rank != r}
    modules, parameters = targets
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
        "target_modules": list(modules),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    } | ({"target_parameters": list(parameters)} if parameters else {})


def _targets(ranks: Mapping[str, int], layers: Mapping[str, Layer]) -> tuple[dict[str, int], dict[str, int]]:
    """Modules and bare parameters with their ranks."""
    modules: dict[str, int] = {}
    parameters: dict[str, int] = {}
    for module, r in ranks.items():
        own = layers[module].parameters if module in layers else ()
        for name in own or (module,):
            target = parameters if own else modules
            target[name] = max(r, target.get(name, 0))
    return modules, parameters


def _tensors(owner: str, modules: Sequence[str], shape: tuple[int, int], layer: Layer, r: int) -> tuple[Written, Written]:
    d_out, d_in = shape
    of_A, of_B = zip(*(factor_names(module) for module in modules), strict=True)
    name_A, name_B = factor_names(owner)
    if layer.kind == "embedding":
        name_A, name_B = f"{_PREFIX}{owner}.lora_embedding_A", f"{_PREFIX}{owner}.lora_embedding_B"
    rows, columns = r * layer.experts, (d_in // layer.size, *layer.kernel)
    return (
        Written(name_A, "A", of_A, r, (rows, *columns)),
        Written(name_B, "B", of_B, r, (d_out, rows, *(1 for _ in layer.kernel))),
    )


def _only(name: str, modules: Iterable[str]) -> str:
    """A pattern for this module alone: its name, anchored where that is also the dotted tail of another module's."""
    is_tail = any(other.endswith(f".{name}") for other in modules)
    return f"^{re.escape(name)}" if is_tail else name
