"""HRA: reflections of the base weight's input, one after the other."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, check_rank, dimensions, roles_of, with_inputs
from merge_algos.formats.spec import ModuleSpec, Shape
from merge_algos.lowrank import LowRankDelta


class HRA(Kind):
    """`W H_1 .. H_r - W` with `H_i = I - 2 u_i u_i^T`, of rank r. u: (d_in, r). Yuan et al. 2024, arXiv:2405.17484.

    The product is never formed: what H_i adds to `W H_1 .. H_{i-1}` is a column times u_i. apply_GS: the u are made orthonormal.
    """

    name = "HRA"
    paper = "arXiv:2405.17484"
    meaning = "the base weight of a linear layer times r Householder reflections, less itself, as r columns times r directions"
    rank = "r"
    peft_types = ("HRA",)
    suffixes = MappingProxyType({"hra_u": "u"})
    flags = frozenset("apply_GS init_weights r rank_pattern".split())

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        r = fields.by_pattern(config, "r", "rank_pattern", modules)
        is_orthonormal = fields.flag(config, "apply_GS")
        return {module: Settings(r[module], constants={"apply_GS": is_orthonormal}) for module in modules}

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        roles_of(parts, frozenset({"u"}))
        d_in, r = dimensions(parts, "u", 2)
        check_rank(parts, settings, "u", r)
        constants = {**settings.constants, "d_in": d_in}
        return (ModuleSpec(parts.module, None, r, self.name, parts.names, constants=constants, needs_base=True),)

    def complete(self, spec: ModuleSpec, shape: Shape) -> ModuleSpec:
        return with_inputs(spec, shape)

    def ground(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> LowRankDelta:
        u = tensors["u"].double()
        u = _orthonormal(u) if spec.constants["apply_GS"] else u / u.norm(dim=0)
        B = W.double() @ u  # (d_out, r)
        between = u.mT @ u  # (r, r)
        for i in range(spec.r):
            B[:, i] = -2 * (B[:, i] + B[:, :i] @ between[:i, i])
        return LowRankDelta(B.float(), u.mT.float())


def _orthonormal(u: Tensor) -> Tensor:
    """Gram-Schmidt, column after column: the Q of a QR, whose signs do not matter to a reflection."""
    Q: Tensor = torch.linalg.qr(u).Q
    return Q
