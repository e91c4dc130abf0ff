"""VeRA: one random pair of projections for all layers, and two trained vectors for each."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from merge_algos.errors import ShapeMismatch
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, check_equal, check_rank, dimensions, needed, roles_of
from merge_algos.formats.spec import ModuleSpec, Shape
from merge_algos.lowrank import LowRankDelta

_REASON = "the projections are not in the file, and the generator they were drawn from is not the same everywhere"
_REMEDY = "save it with save_projection=True"


class VeRA(Kind):
    """`diag(b) B[:d_out] diag(d) A[:, :d_in]`; A: (r, widest), B: (widest, r). Kopiczko et al. 2023, arXiv:2310.11454.

    The file says d_out of a layer (the length of b), but not d_in.
    """

    name = "VeRA"
    paper = "arXiv:2310.11454"
    meaning = "diag(b) B diag(d) A with the saved projections; the input width of a layer comes from another adapter"
    rank = "r"
    peft_types = ("VERA",)
    suffixes = MappingProxyType({"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"})
    shared = MappingProxyType({"base_model.vera_A": "A", "base_model.vera_B": "B"})
    flags = frozenset("d_initial init_weights projection_prng_key r save_projection vera_dropout".split())
    means = 1  # halves of A, of which the first is the delta

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        r = fields.positive("r", config.get("r", 256))
        return dict.fromkeys(modules, Settings(r))

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        needed(parts, frozenset({"A", "B"}), _REASON, _REMEDY)
        roles_of(parts, frozenset({"lambda_b", "lambda_d", "A", "B"}))
        (rows, _), (widest, r) = dimensions(parts, "A", 2), dimensions(parts, "B", 2)
        (d_out,), (length,) = dimensions(parts, "lambda_b", 1), dimensions(parts, "lambda_d", 1)
        check_equal(parts, (r * self.means, r * self.means), (rows, length))
        check_rank(parts, settings, "B", r)
        if d_out > widest:
            raise ShapeMismatch(parts.module, (d_out, r), (widest, r))
        constants = {"d_out": d_out, "widest": parts.shapes["A"][1]}
        return (ModuleSpec(parts.module, None, r, self.name, parts.names, constants=constants),)

    def complete(self, spec: ModuleSpec, shape: Shape) -> ModuleSpec:
        d_out, widest = spec.constants["d_out"], spec.constants["widest"]
        if shape[0] != d_out or shape[1] > widest:
            raise ShapeMismatch(spec.name, shape, (d_out, widest))
        return ModuleSpec(spec.name, shape, spec.r, spec.kind, spec.tensors, constants=spec.constants)

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        assert spec.shape is not None
        d_out, d_in = spec.shape
        b, d = tensors["lambda_b"].float()[:, None], tensors["lambda_d"].float()[: spec.r]
        return LowRankDelta(b * tensors["B"][:d_out].float() * d, tensors["A"][: spec.r, :d_in])
