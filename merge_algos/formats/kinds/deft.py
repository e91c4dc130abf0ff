"""DEFT: a part of the base weight taken away, and something else put in its place."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_algos.errors import InvalidParams, ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, check_equal, dimensions, roles_of
from merge_algos.formats.spec import ModuleSpec, Shape
from merge_algos.lowrank import LowRankDelta

_WHOLE, _PARA = frozenset({"P", "R"}), frozenset({"P"})
_WAYS = ("relu", "qr")
_SAME = 0.99  # cosine of a direction in float32 and in float64: 1 but where rounding decides


class DEFT(Kind):
    """`Q (s R - V^T W)`; P: (d_out, r), R: (r, d_in), s = alpha / r or 1. Kumar et al., NeurIPS 2025.

    relu: Q = P, V = max(P, 0).  qr: Q = V the Q of P, signs included.  para: without R, a pure removal.
    """

    name = "DEFT"
    paper = "NeurIPS 2025"
    meaning = "Q (s R - V^T W) of linear layers, Q and V from P as they are or by a QR; PaRa, which has no R"
    rank = "r"
    peft_types = ("DEFT",)
    suffixes = MappingProxyType({"deft_P": "P", "deft_R": "R"})
    flags = frozenset("alpha decomposition_method deft_dropout init_scale init_weights para r".split())

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        r = fields.positive("r", config.get("r", 8))
        way = fields.text(config, "decomposition_method") or "relu"
        if way not in _WAYS:
            raise InvalidParams("adapter_config.json: decomposition_method", f"must be one of {', '.join(_WAYS)}")
        alpha = fields.number("alpha", config.get("alpha") or 0)
        constants = {"way": way, "para": fields.flag(config, "para")}
        return dict.fromkeys(modules, Settings(r, float(alpha), constants=constants))

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        roles_of(parts, _PARA if settings.constants["para"] else _WHOLE)
        d_out, r = dimensions(parts, "P", 2)
        check_equal(parts, (d_out, min(int(settings.r or r), d_out)), (d_out, r))  # which PEFT cuts to d_out
        shape = None
        if "R" in parts.shapes:
            inner, d_in = dimensions(parts, "R", 2)
            check_equal(parts, (r, d_in), (inner, d_in))
            shape = d_out, d_in
        scaling = settings.alpha / r if settings.alpha else 1.0
        constants = {"way": settings.constants["way"], "d_out": d_out}
        spec = ModuleSpec(parts.module, shape, r, self.name, parts.names, scaling, constants=constants, needs_base=True)
        return (spec,)

    def complete(self, spec: ModuleSpec, shape: Shape) -> ModuleSpec:
        if shape[0] != spec.constants["d_out"]:
            raise ShapeMismatch(spec.name, (spec.constants["d_out"], shape[1]), shape)
        return replace(spec, shape=shape)

    def ground(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> LowRankDelta:
        P = tensors["P"].float()
        Q, V = (P, P.relu()) if spec.constants["way"] == "relu" else (_directions(P, spec.tensors["P"]),) * 2
        A = -(V.double().mT @ W.double())  # (r, d_in)
        if "R" in tensors:
            A = A + tensors["R"].double() * spec.scaling
        return LowRankDelta(Q.float(), A.float())


def _directions(P: Tensor, name: str) -> Tensor:
    """The Q of P, as PEFT has it in float32. Raises UnsupportedAdapter where rounding decides a direction or its sign."""
    Q: Tensor = torch.linalg.qr(P.double()).Q
    if bool(((Q * torch.linalg.qr(P).Q).sum(0) < _SAME).any()):
        reason = "the directions of its QR are decided by rounding, so that no two machines need agree on them"
        raise UnsupportedAdapter(f"tensor {name[:200]}", reason, "merge it into its base and take a LoRA out of the difference")
    return Q
