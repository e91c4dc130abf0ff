"""What a file without a config says around a kind: alpha as a tensor of its own, and modules that are rows of a fused one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats.spec import ModuleSpec
from merge_algos.lowrank import LowRankDelta

ALPHA = "alpha"


def with_alpha(module: ModuleSpec, tensor: str, r: int | None) -> ModuleSpec:
    """The module scaled by alpha / r, alpha being that tensor; by nothing where r is None."""
    return replace(module, tensors={**module.tensors, ALPHA: tensor}, constants={**module.constants, "alpha_r": r})


def with_rows(module: ModuleSpec, name: str, rows: Sequence[tuple[int, int]]) -> ModuleSpec:
    """The module that is made of these (start, stop) ranges of a fused one's rows, one after the other."""
    assert module.shape is not None
    shape = (sum(stop - start for start, stop in rows), module.shape[1])
    return replace(module, name=name, shape=shape, constants={**module.constants, "rows": [list(pair) for pair in rows]})


def check_alpha_shape(tensor: str, shape: Sequence[int]) -> None:
    """Raises UnsupportedAdapter."""
    if math.prod(shape) != 1:
        raise UnsupportedAdapter(f"tensor {tensor[:200]}", f"alpha must be one number (shape {tuple(shape)})", "save it again")


def read_alpha(name: str, tensor: Tensor) -> float:
    """The value; finite. Raises UnsupportedAdapter for 0, which trainers read as "no scaling" and loaders as "no effect".

    kohya-ss/sd-scripts networks/lora.py takes 0 for the rank; diffusers and ComfyUI multiply by 0.
    """
    alpha = float(tensor)
    if alpha == 0:
        reason = "alpha 0 is the rank to the trainer that writes it, and no effect at all to other loaders"
        raise UnsupportedAdapter(f"tensor {name[:200]}", reason, "save it with the alpha that is meant")
    return alpha


def unwrapped(module: ModuleSpec, delta: LowRankDelta, tensors: Mapping[str, Tensor]) -> LowRankDelta:
    """The delta of the module itself. delta: as the kind gives it.  tensors: by role, finite."""
    B, r = delta.B, module.constants.get("alpha_r")
    if r is not None:
        B = B.float() * (read_alpha(module.tensors[ALPHA], tensors[ALPHA]) / r)
    if "rows" in module.constants:
        B = torch.cat([B[start:stop] for start, stop in module.constants["rows"]])
    return LowRankDelta(B, delta.A)
