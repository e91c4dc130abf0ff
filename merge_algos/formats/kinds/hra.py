"""HRA: reflections of the base weight's input, one after the other."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, check_rank, dimensions, roles_of, with_inputs
from merge_algos.formats.spec import FLAT, ModuleSpec, Shape
from merge_algos.lowrank import LowRankDelta

_LEAST_LEFT = 1e-5  # of a unit column: less is what float32, in which PEFT does this, makes of nothing


class HRA(Kind):
    """`W H_1 .. H_r - W` with `H_i = I - 2 u_i u_i^T`, of rank r. u: (d_in, r). Yuan et al. 2024, arXiv:2405.17484.

    The product is `I - U T U^T`, T^-1 the part above the diagonal of U^T U with 1/2 on it (Joffrain et al. 2006,
    doi:10.1145/1141885.1141886), and is never formed. apply_GS: the u are made orthonormal.
    """

    name = "HRA"
    paper = "arXiv:2405.17484"
    meaning = "the base weight of a linear or 2d convolution layer times r Householder reflections, less itself"
    rank = "r"
    peft_types = ("HRA",)
    suffixes = MappingProxyType({"hra_u": "u"})
    flags = frozenset("apply_GS init_weights r".split())

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        r = fields.positive("r", config.get("r", 8))
        return dict.fromkeys(modules, Settings(r, constants={"apply_GS": fields.flag(config, "apply_GS")}))

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        roles_of(parts, frozenset({"u"}))
        d_in, r = dimensions(parts, "u", 2)
        check_rank(parts, settings, "u", r)
        if r > d_in:
            reason = f"{r} reflections of {d_in} inputs are more than these have directions"
            raise UnsupportedAdapter(f"tensor {parts.names['u'][:200]}", reason, "check how the adapter was saved")
        constants = {**settings.constants, "d_in": d_in}
        return (ModuleSpec(parts.module, None, r, self.name, parts.names, layer=FLAT, constants=constants, needs_base=True),)

    def complete(self, spec: ModuleSpec, shape: Shape) -> ModuleSpec:
        return with_inputs(spec, shape)

    def ground(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> LowRankDelta:
        u = tensors["u"].double()
        U = u / u.norm(dim=0)
        if spec.constants["apply_GS"]:
            U = _orthonormal(U, spec.tensors["u"])
        inverse = torch.triu(U.mT @ U, 1) + 0.5 * torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        B = torch.linalg.solve_triangular(inverse, W.double() @ U, upper=True, left=False)  # (d_out, r)
        return LowRankDelta(-B.float(), U.mT.float())


def _orthonormal(U: Tensor, name: str) -> Tensor:
    """Gram-Schmidt, column after column: the Q of a QR, whose signs do not matter to a reflection. U: unit columns.

    Raises UnsupportedAdapter where a column is, to float32, a sum of those before it: what is left of it is rounding.
    """
    Q, R = torch.linalg.qr(U)
    if bool((R.diagonal().abs() < _LEAST_LEFT).any()):
        reason = "apply_GS makes its columns orthogonal, and one of them is a sum of those before it"
        raise UnsupportedAdapter(f"tensor {name[:200]}", reason, "train it with apply_GS=False")
    orthonormal: Tensor = Q
    return orthonormal
