"""GLoRA: the base weight rescaled entry by entry, and something added to it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, check_equal, check_rank, dimensions, roles_of
from merge_algos.formats.spec import ModuleSpec, Shape
from merge_algos.lowrank import LowRankDelta

_FACTORS = frozenset({"A.Xd", "A.Xu", "B.Xd", "B.Xu"})
_SINGLE = frozenset({"A.X", "B.X"})
_ZEROS = frozenset({"C.zeros", "D.zeros", "E.zeros"})
_BIAS = "it changes the bias of the layer, which is an update outside its weight"


class GLoRA(Kind):
    """`W * A + B`, entry by entry; A and B each Xd Xu: (d_out, r) (r, d_in), or one number per output, or one number.

    Chavan et al. 2023, arXiv:2306.07967. C, D and E change the bias; of a layer without one PEFT saves them as zeros.
    """

    name = "GLoRA"
    paper = "arXiv:2306.07967"
    meaning = "W * A + B of linear layers, A and B of rank r, one number per output or one number; biases as they were"
    rank = "min(d_out, d_in)"
    peft_types = ("GLORA",)
    suffixes = MappingProxyType({f"glora_{role}": role for role in sorted((*_FACTORS, *_SINGLE, *_ZEROS))})
    flags = frozenset("config_A_B config_C config_D_E init_weights r".split())
    reasons = MappingProxyType(
        {
            ".glora_C.X": _BIAS,
            ".glora_D.X": _BIAS,
            ".glora_E.X": _BIAS,
            ".glora_A.zeros": "config_A_B is none, so it changes no weight",
            ".glora_B.zeros": "config_A_B is none, so it changes no weight",
        }
    )

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        return dict.fromkeys(modules, Settings(fields.positive("r", config.get("r", 8))))

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        found = roles_of(parts, _FACTORS | _ZEROS, _SINGLE | _ZEROS)
        shape, d_out, rank = None, None, 1
        if found >= _FACTORS:
            (d_out, r), (inner, d_in) = dimensions(parts, "A.Xd", 2), dimensions(parts, "A.Xu", 2)
            check_equal(parts, (d_out, r, r, d_in), (*parts.shapes["B.Xd"], *parts.shapes["B.Xu"]))
            check_equal(parts, (r, d_in), (inner, d_in))
            check_rank(parts, settings, "A.Xd", r)
            shape, rank = (d_out, d_in), min(d_out, d_in)
        else:
            d_out, *ones = dimensions(parts, "A.X", 1, 2)
            check_equal(parts, ((d_out, 1) if ones else (1,)), parts.shapes["A.X"])
            check_equal(parts, parts.shapes["A.X"], parts.shapes["B.X"])
            d_out = d_out if ones else None
        spec = ModuleSpec(parts.module, shape, rank, self.name, parts.names, constants={"d_out": d_out}, needs_base=True)
        return (spec,)

    def complete(self, spec: ModuleSpec, shape: Shape) -> ModuleSpec:
        d_out = spec.constants["d_out"]
        if d_out not in {None, shape[0]}:
            raise ShapeMismatch(spec.name, (d_out, shape[1]), shape)
        return replace(spec, shape=shape, r=min(shape))

    def ground(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor) -> Tensor:
        for role in sorted(_ZEROS):
            if bool(tensors[role].any()):
                raise UnsupportedAdapter(f"tensor {spec.tensors[role][:200]}", _BIAS, "check how the adapter was saved")
        A, B = (_entries(tensors, half) for half in "AB")
        return W * A + B


def _entries(tensors: Mapping[str, Tensor], half: str) -> Tensor:
    """(d_out, d_in), or what is broadcast to it."""
    if f"{half}.X" in tensors:
        return tensors[f"{half}.X"].float()
    return LowRankDelta(tensors[f"{half}.Xd"].float(), tensors[f"{half}.Xu"].float()).to_dense()
