"""Reversible model merging: not one adapter but a basis, from which each adapter comes back with a stated error."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from merge_algos import codecs
from merge_algos.allocation import allocate
from merge_algos.codec import MAX_ADAPTERS, Encoded, Quantize
from merge_algos.entries import check_choice
from merge_algos.lowrank import LowRankDelta
from merge_algos.protocol import BasisMethod, ModuleContext
from merge_algos.survey import Candidate, Options, Survey, encode, survey


@dataclass(frozen=True)
class Rmm(BasisMethod):
    """A reversible basis (RMM, arXiv:2510.14163, among other codecs) within a budget of bytes.

    codec: one for all modules; `auto`, per module the one of least measured error within the whole budget; or `lossless`,
    the adapters' own bytes, shared where they are equal and compressed.  quantize: `none` is bf16, `auto` mixes precisions.
    budget: bytes as a fraction of the inputs' bytes stored as bf16, above 0.  p: of the rmm codecs, principal directions per
    position, instead of a budget.  center, align: of rmm; align null leaves it to the codec's name.
    Raises InvalidParams naming the field.
    """

    name = "rmm"
    paper = "arXiv:2510.14163"
    max_adapters = MAX_ADAPTERS

    codec: Literal["auto", "hybrid", "lossless", "rmm", "rmm_aligned", "truncate", "tucker2"] = "auto"
    quantize: Quantize = "auto"
    budget: float = 0.5
    p: int | None = None
    center: bool = True
    align: bool | None = None

    def __post_init__(self) -> None:
        check_choice("codec", self.codec, ("auto", "lossless", *codecs.registry()))
        _ = self.options  # which checks the rest

    @property
    def options(self) -> Options:
        given = dataclasses.asdict(self)
        return Options(**{**given, "codec": "auto" if self.verbatim else self.codec})

    @property
    def verbatim(self) -> bool:
        return self.codec == "lossless"

    def check_inputs(self, count: int, rank: int) -> None:
        """Raises InvalidParams for more principal directions than there are."""
        if not self.verbatim:
            self.options.check_for(count, rank)

    def unsettled(self, known: Any) -> bool:
        """Whether a round is missing: of the adapters' norms, then of what every codec would lose of every module."""
        return not self.verbatim and (known is None or "choices" not in known)

    def survey(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Any:
        """Squared norms per task; then the module's candidates, as `Survey.to_json`."""
        if context.known is None:
            return {context.module: [delta.norm() ** 2 for delta in deltas]}
        found = survey(deltas, self.options, module=context.module, seed=context.seed, importance=context.known["importance"])
        return {context.module: found.to_json()}

    def pool(self, left: Any, right: Any) -> Any:
        """Module -> finding, of both."""
        return {**left, **right}

    def settle(self, findings: Any, known: Any) -> Any:
        """How much each task's error counts; then what is chosen for each module."""
        if known is None:
            return {"importance": importance(list(findings.values()))}
        surveys = {module: Survey.from_json(findings[module]) for module in sorted(findings)}
        return {**known, "choices": {m: _brief(choice) for m, choice in allocate(surveys, self.options).items()}}

    def encode(self, deltas: Sequence[LowRankDelta], context: ModuleContext) -> tuple[Encoded, tuple[float, ...]]:
        """As it was chosen. Raises what `merge_algos.survey.encode` raises."""
        brief, given = context.known["choices"][context.module], tuple(context.known["importance"])
        choice = Candidate(brief["codec"], brief["parameters"], brief["budget_bytes"], 0, (), given)
        return encode(deltas, choice, module=context.module, seed=context.seed)


def importance(norms: Sequence[Sequence[float]]) -> list[float]:
    """Per task one over the squared norm of its whole adapter; 0 for one that is zero. norms: squared, module by task."""
    totals = [sum(column) for column in zip(*norms, strict=True)]
    return [1.0 / total if 0 < total < math.inf else 0.0 for total in totals]


def _brief(choice: Candidate) -> Mapping[str, Any]:
    return {"codec": choice.codec, "parameters": dict(choice.parameters), "budget_bytes": choice.budget_bytes}
