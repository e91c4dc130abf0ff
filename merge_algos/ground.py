"""An adapter whose deltas depend on the base model's weights, as the plain LoRA that it is beside them, cut to a rank rule."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merge_algos import formats
from merge_algos.blocks import BlockMatrix
from merge_algos.errors import NonFiniteResult
from merge_algos.formats.spec import AdapterSpec, ModuleSpec
from merge_algos.lowrank import LowRankDelta
from merge_algos.merge import ModuleResult, reduce, shipped
from merge_algos.protocol import Method, ModuleContext
from merge_algos.rank import RankRule

# a rescaled or rotated weight has full rank, and its spectrum falls slowly: the most that common servers load
DEFAULT_RULE = RankRule(max=256, energy=0.999)


@dataclass(frozen=True)
class Ground(Method):
    """Randomised SVD (arXiv:0909.4061) of every delta that is dense; what has few factors of its own keeps them."""

    name = "ground"
    paper = "arXiv:0909.4061"
    memory = "dense"
    needs = "base"

    def ground(self, module: ModuleSpec, tensors: Mapping[str, Tensor], W: Tensor | None, context: ModuleContext) -> ModuleResult:
        """One module in float32. tensors: as for `formats.load`.  W: as for `formats.ground`, None where nothing needs it.

        Raises NonFiniteTensor, and NonFiniteResult where the delta overflows.
        """
        if W is None:
            return _shipped(formats.load(module, tensors), replace(context, rank=RankRule()))
        delta = formats.ground(module, tensors, W)
        if isinstance(delta, LowRankDelta):
            return _shipped(delta, replace(context, rank=RankRule(max=context.rank.max)))
        if not bool(delta.isfinite().all()):
            raise NonFiniteResult(module.name, str(delta.dtype).removeprefix("torch."))
        d_out, d_in = delta.shape
        return _shipped(BlockMatrix((d_out, d_in), lambda start, stop: delta[start:stop]), context)


def rank_bound(module: ModuleSpec, rule: RankRule) -> int:
    """The most columns that `Ground.ground` gives. module: with a shape."""
    assert module.shape is not None
    full = min(module.shape)
    return min(rule.max or full, full) if module.needs_base else min(module.r, full)


def expected(spec: AdapterSpec, rule: RankRule) -> AdapterSpec:
    """The adapter as it will be described once it is grounded, as far as a plan needs that. spec: with every shape."""
    plain = [replace(module, r=rank_bound(module, rule), needs_base=False) for module in spec.modules]
    return replace(spec, modules=tuple(plain))


def _shipped(delta: LowRankDelta | BlockMatrix, context: ModuleContext) -> ModuleResult:
    try:
        cut = reduce(delta, context)
        return shipped(cut, cut.delta, context.module, torch.float32)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        # no SVD of finite numbers fails: something overflowed on the way there
        raise NonFiniteResult(context.module, "float32") from error
