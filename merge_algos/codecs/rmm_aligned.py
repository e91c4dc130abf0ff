"""Reversible Model Merging in the gauge that suits it: the published basis after a free rotation of every adapter."""

from collections.abc import Sequence
from dataclasses import dataclass

from merge_algos.codec import Codec, Fields, Floor, Packed, Problem, Quantize, check_quantize
from merge_algos.codecs.rmm import Settings, coded, floors, restored
from merge_algos.entries import check_flag, check_whole_number
from merge_algos.lowrank import LowRankDelta


@dataclass(frozen=True)
class RmmAligned(Codec):
    """RMM (arXiv:2510.14163) of adapters brought to one gauge, which costs no storage and leaves their deltas as they are.

    Parameters as for `rmm`. A basis of factors depends on how each adapter happens to be factored; this one on the deltas.
    """

    name = "rmm_aligned"
    paper = "arXiv:2510.14163"
    grid = (1.0,)

    quantize: Quantize = "auto"
    p: int | None = None
    center: bool = True

    def __post_init__(self) -> None:
        check_quantize(self.quantize)
        check_flag("center", self.center)
        if self.p is not None:
            check_whole_number("p", self.p, least=0)

    def represent(self, problem: Problem, prepared: None) -> Packed:
        return coded(problem, self._settings)

    def floors(self, problem: Problem) -> Sequence[Floor]:
        return floors(problem, self._settings)

    @property
    def _settings(self) -> Settings:
        return Settings(self.quantize, self.p, self.center, align=True)

    @staticmethod
    def restore(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
        return restored(shape, shared, own)
