"""Braid's algorithms: LoRA deltas in, LoRA deltas out. No files, no network, no environment, no base model.

from merge_algos import Adapter, LowRankDelta, merge

merged = merge([math, code], weights=[0.7, 0.3], rank=32)
"""

from merge_algos.adapter import Adapter
from merge_algos.extract import Extracted, extract
from merge_algos.lowrank import LowRankDelta
from merge_algos.merge import MergeResult, ModuleReport, merge
from merge_algos.rank import RankRule
from merge_algos.reversible import Basis, build_basis

__all__ = [
    "Adapter",
    "Basis",
    "Extracted",
    "LowRankDelta",
    "MergeResult",
    "ModuleReport",
    "RankRule",
    "build_basis",
    "extract",
    "merge",
]
