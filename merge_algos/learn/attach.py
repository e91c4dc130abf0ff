"""A base model with all adapters attached at once, each rank-one term scaled: `y += B (s * (A x))`, never a dense delta."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from merge_algos.errors import UnsupportedAdapter
from merge_algos.lowrank import LowRankDelta

Scale = Callable[[str], Tensor]


def check_modules(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Module of the adapters -> its name in this model, which may lack the prefix that a model with a head has.

    Raises UnsupportedAdapter for a module that the model does not have, or that is no linear layer of that shape.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."
    named = dict(model.named_modules())
    return {module: _find(named, module, prefix, shape) for module, shape in shapes.items()}


def _find(named: Mapping[str, nn.Module], module: str, prefix: str, shape: tuple[int, int]) -> str:
    for name in (module, module.removeprefix(prefix), prefix + module):
        if name in named:
            own = _shape(named[name])
            if own != shape:
                what = f"is {own[0]} x {own[1]} there" if own else f"is a {type(named[name]).__name__} there, not a linear layer"
                raise UnsupportedAdapter(f"module {module[:200]}", what, "give the base model that the adapters were trained on")
            return name
    reason = "the base model has no such module"
    raise UnsupportedAdapter(f"module {module[:200]}", reason, "give the base model that the adapters were trained on")


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer, whichever way round it stores its weight; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):  # transformers' linear layer of GPT-2
        return weight.shape[1], weight.shape[0]
    return None


@contextmanager
def attached(model: nn.Module, deltas: Mapping[str, LowRankDelta], scale: Scale) -> Iterator[None]:
    """Inside, `model` computes with the deltas. deltas: name in the model -> all adapters stacked, in the model's dtype.

    scale: name -> (R,), asked at every pass, so that what it is computed from gets its gradient.
    """
    hooks = [model.get_submodule(name).register_forward_hook(partial(_add, delta, scale, name)) for name, delta in deltas.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(delta: LowRankDelta, scale: Scale, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    projected = linear(inputs[0], delta.A) * scale(name).to(delta.A.dtype)
    return output.add_(linear(projected, delta.B))  # in place: no gradient of a linear layer needs its output
