"""PEANuT: a small network that reads the base weight and gives a change of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, check_equal, check_rank, dimensions, roles_of
from merge_algos.formats.spec import ModuleSpec, Shape
from merge_algos.lowrank import LowRankDelta

_MAX_DEPTH = 32
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": functional.gelu,
        "leaky_relu": functional.leaky_relu,
        "linear": lambda x: x,
        "relu": functional.relu,
        "sigmoid": torch.sigmoid,
        "silu": functional.silu,
        "swish": functional.silu,
        "tanh": torch.tanh,
    }
)


class PEANuT(Kind):
    """`s B f(W^T A^T)^T`, of rank r; A: (r, d_out), B: (d_out, r). Zhong et al. 2024, arXiv:2410.01870.

    f: the activation, then `depth` layers (r, r) that encode and as many that decode, each decoder added to what the encoder
    opposite to it was given. The file does not say d_in.
    """

    name = "PEANuT"
    paper = "arXiv:2410.01870"
    meaning = "B times a network of the base weight of a linear layer, with the activations " + ", ".join(_ACTIVATIONS)
    rank = "r"
    peft_types = ("PEANUT",)
    suffixes = MappingProxyType(
        {"peanut_A.weight": "A", "peanut_B.weight": "B"}
        | {f"peanut_{way}s.{n}.weight": f"{way}.{n}" for way in ("encoder", "decoder") for n in range(_MAX_DEPTH)}
    )
    flags = frozenset("act_fn depth init_weights r scaling".split())

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        r = fields.positive("r", config.get("r", 32))
        depth = fields.number("depth", config.get("depth", 0))
        activation = fields.text(config, "act_fn") or "relu"
        if activation not in _ACTIVATIONS:
            reason = f"this activation is not one of {', '.join(_ACTIVATIONS)}"
            remedy = "merge it into its base and take a LoRA out of the difference"
            raise UnsupportedAdapter(f"adapter_config.json: act_fn {activation[:100]!r}", reason, remedy)
        scale = float(fields.number("scaling", config.get("scaling", 1.0)))
        return dict.fromkeys(modules, Settings(r, constants={"depth": depth, "act_fn": activation, "scaling": scale}))

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        depth = settings.constants["depth"]
        inner = [f"{way}.{n}" for way in ("encoder", "decoder") for n in range(_MAX_DEPTH) if n < depth]
        roles_of(parts, frozenset({"A", "B", *inner}))
        (r, d_out), of_B = dimensions(parts, "A", 2), dimensions(parts, "B", 2)
        check_equal(parts, (d_out, r), of_B)
        check_rank(parts, settings, "A", r)
        for role in inner:
            check_equal(parts, (r, r), dimensions(parts, role, 2))
        constants = {**settings.constants, "d_out": d_out}
        return (ModuleSpec(parts.module, None, r, self.name, parts.names, constants=constants, needs_base=True),)

    def complete(self, spec: ModuleSpec, shape: Shape) -> ModuleSpec:
        if shape[0] != spec.constants["d_out"]:
            raise ShapeMismatch(spec.name, (spec.constants["d_out"], shape[1]), shape)
        return replace(spec, shape=shape)

    def ground(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> LowRankDelta:
        wide = {role: tensor.double() for role, tensor in tensors.items()}
        f, depth = _ACTIVATIONS[spec.constants["act_fn"]], int(spec.constants["depth"])
        hidden = f(W.double().mT @ wide["A"].mT)  # (d_in, r)
        given = []
        for n in range(depth):
            given.append(hidden)
            hidden = f(hidden @ wide[f"encoder.{n}"].mT)
        for n in range(depth):
            hidden = f(hidden @ wide[f"decoder.{n}"].mT) + given[depth - 1 - n]
        return LowRankDelta((wide["B"] * spec.constants["scaling"]).float(), hidden.mT.float())
