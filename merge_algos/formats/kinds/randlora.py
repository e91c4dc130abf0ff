"""RandLoRA: a sum of scaled random low-rank matrices that together have full rank."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, equal

from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import fields
from merge_algos.formats.kind import (
    Kind,
    Parts,
    Settings,
    bounded,
    check_equal,
    check_rank,
    dimensions,
    in_full,
    needed,
    roles_of,
)
from merge_algos.formats.spec import ModuleSpec, Shape
from merge_algos.lowrank import LowRankDelta

_REASON = "the random bases are not in the file, and the generator they were drawn from is not the same everywhere"
_REMEDY = "save it with save_projection=True"
_SHARED = frozenset({"A", "B"})
_COPIES = frozenset({"own_A", "own_B"})
_ROLES = frozenset({"lambda", "gamma"}) | _SHARED


class RandLoRA(Kind):
    """`alpha/r * B (lambda o A o gamma)`, turned where d_out < d_in. Albert et al. 2025, arXiv:2502.00987.

    n bases: lambda (r, n), gamma (n, smaller), A (r, 1 or n.., at least smaller), B (at least larger, n.., r). The product runs
    over pairs of base and rank, which PEFT counts base first in B and rank first in A. n r is at least the smaller dimension,
    so the delta has full rank, and the file does not say the larger one. PEFT saves the bases once more with each layer.
    """

    name = "RandLoRA"
    paper = "arXiv:2502.00987"
    meaning = "the sum of scaled bases with the saved bases; the larger width of a layer comes from another adapter"
    rank = "min(d_out, d_in)"
    peft_types = ("RANDLORA",)
    suffixes = MappingProxyType(
        {"randlora_lambda": "lambda", "randlora_gamma": "gamma", "randlora_A": "own_A", "randlora_B": "own_B"}
    )
    shared = MappingProxyType({"base_model.randlora_A": "A", "base_model.randlora_B": "B"})
    flags = frozenset(
        "init_weights projection_prng_key r randlora_alpha randlora_dropout save_projection sparse very_sparse".split()
    )

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        r = fields.positive("r", config.get("r", 32))
        alpha = fields.number("randlora_alpha", config.get("randlora_alpha", 640))
        return dict.fromkeys(modules, Settings(r, alpha))

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        needed(parts, _SHARED, _REASON, _REMEDY)
        roles_of(parts, _ROLES, optional=_COPIES)
        (r, bases), (count, smaller) = dimensions(parts, "lambda", 2), dimensions(parts, "gamma", 2)
        (rank_A, own, narrow), (widest, offered, rank_B) = dimensions(parts, "A", 3), dimensions(parts, "B", 3)
        check_equal(parts, (bases, r, r), (count, rank_A, rank_B))
        check_rank(parts, settings, "lambda", r)
        if narrow < smaller or offered < bases or (own != 1 and own < bases):
            raise ShapeMismatch(parts.module, (r, bases, smaller), (r, min(own, offered), narrow))
        for role in sorted(_COPIES & parts.shapes.keys()):
            check_equal(parts, parts.shapes[role.removeprefix("own_")], parts.shapes[role])
        constants = {"smaller": smaller, "widest": widest, "bases": bases, "scaling": (settings.alpha or 0.0) / r}
        return (ModuleSpec(parts.module, None, smaller, self.name, parts.names, constants=constants),)

    def complete(self, spec: ModuleSpec, shape: Shape) -> ModuleSpec:
        smaller, widest = spec.constants["smaller"], spec.constants["widest"]
        if min(shape) != smaller or max(shape) > widest:
            raise ShapeMismatch(spec.name, shape, (widest, smaller))
        return bounded(ModuleSpec(spec.name, shape, spec.r, spec.kind, spec.tensors, constants=spec.constants))

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        assert spec.shape is not None
        for role in sorted(_COPIES & tensors.keys()):
            if not equal(tensors[role], tensors[role.removeprefix("own_")]):
                reason = "the layer's copy of the bases is not what the whole adapter has"
                raise UnsupportedAdapter(f"tensor {spec.tensors[role][:200]}", reason, "check how the adapter was saved")
        bases, smaller, larger = spec.constants["bases"], min(spec.shape), max(spec.shape)
        right = tensors["lambda"].float()[:, :, None] * tensors["A"][:, :bases, :smaller].float() * tensors["gamma"].float()
        left = tensors["B"][:larger, :bases].float().flatten(1)  # (larger, n r)
        W = left @ right.flatten(0, 1) * spec.constants["scaling"]
        return in_full(W if smaller == spec.shape[1] else W.mT)
