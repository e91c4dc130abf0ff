"""UniLoRA: LoRA factors whose every entry is one of a short vector's, scaled."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, check_equal, check_rank, dimensions, needed, roles_of
from merge_algos.formats.kinds.vblora import check_indices
from merge_algos.formats.spec import ModuleSpec
from merge_algos.lowrank import LowRankDelta

_NAMED = frozenset({"indices_A", "indices_B", "scales_A", "scales_B"})
_REASON = "which entries it takes is not in the file, and the generator that drew them is not the same everywhere"


class UniLoRA(Kind):
    """`(theta[indices_B] o scales_B) (theta[indices_A] o scales_A)`; theta: (length), indices and scales as factors are.

    Li et al. 2025, arXiv:2506.00799.
    """

    name = "UniLoRA"
    paper = "arXiv:2506.00799"
    meaning = "B A with entries taken from the shared vector by the saved indices"
    rank = "r"
    peft_types = ("UNILORA",)
    suffixes = MappingProxyType({f"unilora_{role}": role for role in sorted(_NAMED)})
    shared = MappingProxyType({"base_model.unilora_theta_d": "theta"})
    indices = frozenset({"indices_A", "indices_B"})
    flags = frozenset("init_theta_d_bound init_weights proj_seed r save_indices theta_d_length unilora_dropout".split())

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        return dict.fromkeys(modules, Settings(fields.positive("r", config.get("r", 4))))

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        needed(parts, _NAMED, _REASON, "save it with save_indices=True")
        roles_of(parts, _NAMED | {"theta"})
        dimensions(parts, "theta", 1)
        (r, d_in), (d_out, inner) = dimensions(parts, "indices_A", 2), dimensions(parts, "indices_B", 2)
        check_equal(parts, (d_out, r), (d_out, inner))
        check_equal(parts, (r, d_in, d_out, r), (*parts.shapes["scales_A"], *parts.shapes["scales_B"]))
        check_rank(parts, settings, "indices_A", r)
        return (ModuleSpec(parts.module, (d_out, d_in), r, self.name, parts.names),)

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        A, B = (_entries(spec, tensors, half) for half in "AB")
        return LowRankDelta(B, A)


def _entries(spec: ModuleSpec, tensors: Mapping[str, Tensor], half: str) -> Tensor:
    theta, indices = tensors["theta"].float(), tensors[f"indices_{half}"].long()
    check_indices(spec.tensors[f"indices_{half}"], indices, len(theta))
    return theta[indices] * tensors[f"scales_{half}"].float()
