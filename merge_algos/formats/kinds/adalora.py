"""AdaLoRA: LoRA with singular values of its own, some of which training has pruned."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from merge_algos.errors import InvalidParams
from merge_algos.formats import fields
from merge_algos.formats.kind import Kind, Parts, Settings, check_equal, check_rank, roles_of
from merge_algos.formats.spec import FLAT, ModuleSpec
from merge_algos.lowrank import LowRankDelta

_ROLES = frozenset({"lora_A", "lora_B", "lora_E"})
_EPSILON = 1e-5  # PEFT adds it to the rank that it divides by


class AdaLoRA(Kind):
    """`alpha / ranknum * B diag(E) A`; lora_E: (r, 1), and r may be 0. Zhang et al. 2023, arXiv:2303.10512.

    ranknum is the rank before pruning, which PEFT keeps dividing by: a tensor of older files, else `init_r`. An alpha that is
    not positive means the present rank.
    """

    name = "AdaLoRA"
    paper = "arXiv:2303.10512"
    meaning = "alpha / init_r * B diag(E) A, with the ranks that pruning left"
    rank = "r"
    peft_types = ("ADALORA",)
    suffixes = MappingProxyType(dict(zip(*[("lora_A", "lora_B", "lora_E", "ranknum")] * 2, strict=True)))
    flags = frozenset(
        "alpha_pattern beta1 beta2 corda_config deltaT eva_config init_lora_weights init_r loftq_config lora_alpha lora_dropout "
        "lora_ga_config megatron_config megatron_core orth_reg_weight qalora_group_size r rank_pattern runtime_config target_r "
        "tfinal tinit total_step use_rslora".split()
    )

    def settings(self, config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Settings]:
        init_r = fields.positive("init_r", config.get("init_r", 12))
        alpha = fields.number("lora_alpha", config.get("lora_alpha", 8))
        kept = _kept(config)
        constants = {"ranknum": init_r}
        return {module: Settings(kept.get(module, init_r), alpha, constants=constants) for module in modules}

    def recognises(self, roles: frozenset[str]) -> bool:
        return roles >= _ROLES

    def describe(self, parts: Parts, settings: Settings) -> tuple[ModuleSpec, ...]:
        roles_of(parts, _ROLES, optional=frozenset({"ranknum"}))
        A, B, E = (parts.shapes[role] for role in ("lora_A", "lora_B", "lora_E"))
        rank, d_out, d_in = A[0] if A else 0, B[0] if B else 0, A[-1] if A else 0
        for expected, got in zip(((rank, max(d_in, 1)), (max(d_out, 1), rank), (rank, 1)), (A, B, E), strict=True):
            check_equal(parts, expected, got)
        if "ranknum" in parts.shapes:
            check_equal(parts, (1,), parts.shapes["ranknum"])
        check_rank(parts, settings, "lora_A", rank)
        alpha = settings.alpha or 0.0
        constants = {"alpha": alpha if alpha > 0 else float(rank), **settings.constants}
        return (ModuleSpec(parts.module, (d_out, d_in), rank, self.name, parts.names, layer=FLAT, constants=constants),)

    def load(self, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LowRankDelta:
        E = tensors["lora_E"].float().mT  # (1, r)
        ranknum = tensors["ranknum"].float() if "ranknum" in tensors else spec.constants["ranknum"]
        return LowRankDelta(tensors["lora_B"].float() * (E * spec.constants["alpha"] / (ranknum + _EPSILON)), tensors["lora_A"])


def _kept(config: Mapping[str, Any]) -> dict[str, int]:
    """Module -> how many singular values pruning has left. PEFT's keys are `<module>.lora_E`, each with a mask."""
    masks = config.get("rank_pattern") or {}
    if not isinstance(masks, Mapping) or not all(isinstance(mask, list) for mask in masks.values()):
        raise InvalidParams("adapter_config.json: rank_pattern", "must be an object of lists of true and false")
    if not all(isinstance(kept, bool) for mask in masks.values() for kept in mask):
        raise InvalidParams("adapter_config.json: rank_pattern", "must be an object of lists of true and false")
    return {name.partition(".lora_E")[0]: sum(mask) for name, mask in masks.items()}
