"""A LoRA out of a full fine-tune: the difference of two models, tensor by tensor, each matrix cut to a low rank.

A plain LoRA holds updates of linear layers alone. Whatever else differs (norms, biases, embeddings, heads) is measured, named,
and counted as lost. Two passes: a survey of every tensor, then the cut of those that become modules. No tensor is ever whole
in memory: see `blocks`.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from merge_algos.adapter import Adapter, natural
from merge_algos.blocks import BlockMatrix, row_ranges, seed_of, truncated_svd
from merge_algos.entries import check_choice
from merge_algos.errors import (
    BadPattern,
    IncomparableTensor,
    InvalidParams,
    InvalidRank,
    LeftoverTensors,
    NonFiniteResult,
    NonFiniteTensor,
    NothingToExtract,
    ShapeMismatch,
)
from merge_algos.heavy_tail import heavy_tail_ranks, tail_of
from merge_algos.merge import ModuleReport, ModuleResult, reduce, shipped
from merge_algos.patterns import matching
from merge_algos.protocol import Method, ModuleContext
from merge_algos.rank import RankRule

Rows = Callable[[int, int], Tensor]
Shape = tuple[int, ...]

_WEIGHT = ".weight"
_HEADS = frozenset({"lm_head", "embed_out"})
_EMBEDDING = re.compile(r"wte|wpe|shared|relative_attention_bias|.*emb(ed(ding)?s?)?(_(in|tokens|positions))?")


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One tensor of both models. shape: (d_out, d_in), where a tensor of other dimensions is rows of its last one.

    base, tuned: (start, stop) -> (stop - start, d_in), any float dtype, the same at every call.
    """

    tensor: str
    shape: tuple[int, int]
    base: Rows
    tuned: Rows

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows of both models in one dtype, float32 or wider. Raises NonFiniteTensor naming tensor and model."""
        before, after = self.base(start, stop), self.tuned(start, stop)
        wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
        for rows, model in ((before, "base"), (after, "tuned")):
            if not bool(rows.isfinite().all()):
                raise NonFiniteTensor(f"{self.tensor} of the {model} model")
        return before.to(wide), after.to(wide)

    @property
    def difference(self) -> BlockMatrix:
        """`tuned - base`, by rows."""

        def rows(start: int, stop: int) -> Tensor:
            before, after = self.rows(start, stop)
            return after - before

        return BlockMatrix(self.shape, rows)


@dataclass(frozen=True)
class Extract(Method):
    """Randomised SVD (arXiv:0909.4061) of the difference of every linear layer, at ranks by a rule or by heavy tails.

    include, exclude: patterns of modules to add (a head, which is left out else) and to leave out.
    leftover: whether a change that no plain LoRA can hold is reported or refused.
    heavy_tail: a mean rank over all modules, see `heavy_tail_ranks`, of which none gets more than heavy_tail_max; None where a
    rank rule says it all.
    Raises InvalidParams.
    """

    name = "extract"
    paper = "arXiv:0909.4061"
    memory = "dense"
    needs = "base"

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    leftover: Literal["report", "refuse"] = "report"
    heavy_tail: int | None = None
    heavy_tail_max: int | None = None

    def __post_init__(self) -> None:
        check_choice("leftover", self.leftover, ("report", "refuse"))
        if any(rank is not None and rank < 1 for rank in (self.heavy_tail, self.heavy_tail_max)):
            raise InvalidParams("heavy_tail", "a rank is at least 1")

    def unsettled(self, known: Any) -> bool:
        return known is None

    def measure(self, pair: Pair, reason: str | None, context: ModuleContext) -> dict[str, Any]:
        """One tensor's findings, by its name; nothing of one that is the same in both models.

        reason: why it is no module, or None.  Raises NonFiniteTensor.
        """
        changed, energy, before = _energies(pair)
        if not math.isfinite(energy + before):
            raise NonFiniteResult(pair.tensor, "float64")
        if not changed:
            return {}
        own = {"reason": reason, "energy": energy, "base_energy": before}
        if reason is None and self.heavy_tail is not None:
            own |= dict(zip(("alpha", "most"), _tail(pair, self.heavy_tail, context), strict=True))
        return {pair.tensor: own}

    def pool(self, left: Any, right: Any) -> Any:
        return {**left, **right}

    def settle(self, findings: Any, known: Any) -> Any:
        """modules: name -> its rank by heavy tails, if asked for, and how far it moved.  left_out: what changed beside them.

        Raises NothingToExtract, and LeftoverTensors if they are to be refused.
        """
        changed = {tensor: findings[tensor] for tensor in sorted(findings, key=natural)}
        modules = {module_of(tensor): own for tensor, own in changed.items() if own["reason"] is None}
        left_out = [_left_out(tensor, own) for tensor, own in changed.items() if own["reason"] is not None]
        if not modules:
            raise NothingToExtract(tuple(each["tensor"] for each in left_out))
        if left_out and self.leftover == "refuse":
            raise LeftoverTensors(tuple(each["tensor"] for each in left_out))
        ranks = self._ranks(modules)
        return {
            "modules": {name: {"relative_norm": _relative(own), **ranks.get(name, {})} for name, own in modules.items()},
            "left_out": left_out,
        }

    def extract(self, pair: Pair, context: ModuleContext, dtype: torch.dtype) -> ModuleResult:
        """One module, cut and cast. Raises NonFiniteTensor, and NonFiniteResult if it overflows `dtype`."""
        found = dict(context.known["modules"][context.module])
        ranked = found.pop("rank", None)
        rule = context.rank if ranked is None else RankRule(max=ranked)
        try:
            cut = reduce(pair.difference, ModuleContext(context.module, context.seed, rule))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise NonFiniteResult(context.module, "float32") from error  # the difference of finite numbers overflowed
        return shipped(cut, cut.delta, context.module, dtype, found)

    def _ranks(self, modules: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        if self.heavy_tail is None:
            return {}
        alphas = {name: own["alpha"] for name, own in modules.items()}
        most = {name: min(own["most"], self.heavy_tail_max or own["most"]) for name, own in modules.items()}
        ranks = heavy_tail_ranks(alphas, most, self.heavy_tail)
        return {name: {"rank": ranks[name], "alpha": alphas[name]} for name in modules}


@dataclass(frozen=True, slots=True, eq=False)
class Extracted:
    """left_out: tensors that changed and are in no module, with reason, norm, and norm relative to the base's."""

    adapter: Adapter
    reports: tuple[ModuleReport, ...]
    left_out: tuple[Mapping[str, Any], ...]


def extract(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    rank: int | RankRule | None = None,
    heavy_tail: int | None = None,
    heavy_tail_max: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocabulary: Sequence[int] = (),
    base_model: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    leftover: Literal["report", "refuse"] = "report",
) -> Extracted:
    """The same in memory, of two state dicts. rank: of every module, or a rule; heavy_tail: or a mean rank, as in `Extract`.

    vocabulary: sizes of it, see `reasons_against`.  Raises what `pair_up`, `reasons_against` and `Extract` raise.
    """
    method = Extract(tuple(include), tuple(exclude), leftover, heavy_tail, heavy_tail_max)
    rule = rank if isinstance(rank, RankRule) else RankRule(max=rank)
    check_extraction(method, rule)
    shapes = pair_up(*({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (base, tuned)))
    reasons = reasons_against(shapes, vocabulary, method)
    pairs = {name: _pair(name, base[name], tuned[name]) for name in shapes}
    context = functools.partial(ModuleContext, seed=seed, rank=rule)
    findings = (method.measure(pair, reasons[name], context(name)) for name, pair in pairs.items())
    known = method.settle(functools.reduce(method.pool, findings), None)
    results = [method.extract(pairs[tensor_of(name)], context(name, known=known), dtype) for name in known["modules"]]
    adapter = Adapter(base_model, {result.report.module: result.delta for result in results})
    return Extracted(adapter, tuple(result.report for result in results), tuple(known["left_out"]))


def check_extraction(method: Extract, rule: RankRule) -> None:
    """Raises InvalidRank unless either the rule or the heavy tails say how many ranks a module gets."""
    if method.heavy_tail is None and rule == RankRule():
        raise InvalidRank(None, "the difference of two models has full rank, so it needs a rank or an energy")
    if method.heavy_tail is not None and rule != RankRule():
        raise InvalidRank(rule.max, "a mean rank by heavy tails leaves no room for another rule")


def pair_up(base: Mapping[str, Shape], tuned: Mapping[str, Shape]) -> dict[str, Shape]:
    """Tensor -> shape, in natural order. Raises IncomparableTensor for one in a single model, ShapeMismatch for two shapes."""
    for model, own, other in (("base", base, tuned), ("tuned", tuned, base)):
        for name in sorted(own.keys() - other.keys(), key=natural):
            raise IncomparableTensor(name, f"only the {model} model has it")
    for name, shape in base.items():
        if tuned[name] != shape:
            raise ShapeMismatch(name, shape, tuned[name])
    return {name: base[name] for name in sorted(base, key=natural)}


def reasons_against(shapes: Mapping[str, Shape], vocabulary: Sequence[int], method: Extract) -> dict[str, str | None]:
    """Tensor -> why it is no module of the adapter, or None: a matrix `*.weight` that is no embedding, head or excluded.

    vocabulary: sizes of it; a matrix outside the numbered layers with so many rows is taken for a head, whatever it is called.
    A head becomes a module where `include` finds it.
    Raises BadPattern for a pattern that finds no module, and InvalidParams where it finds an embedding.
    """
    matrices = {module_of(name): name for name, shape in shapes.items() if len(shape) == 2 and name[1:].endswith(_WEIGHT)}
    included, excluded = (_found(patterns, tuple(matrices)) for patterns in (method.include, method.exclude))
    reasons: dict[str, str | None] = dict.fromkeys(shapes, "not a linear layer")
    for module, name in matrices.items():
        last = module.rpartition(".")[2]
        embedding = _EMBEDDING.fullmatch(last) is not None
        numbered = any(part.isdecimal() for part in module.split("."))
        head = last in _HEADS or (shapes[name][0] in vocabulary and not numbered and not embedding)
        if embedding and not head:
            reasons[name] = "an embedding"
            if module in included:
                raise InvalidParams("include", f"{module} is an embedding, which an adapter of linear layers cannot hold")
        elif module in excluded:
            reasons[name] = "excluded"
        else:
            reasons[name] = "an output head" if head and module not in included else None
    return reasons


def module_of(tensor: str) -> str:
    return tensor.removesuffix(_WEIGHT)


def tensor_of(module: str) -> str:
    return f"{module}{_WEIGHT}"


def as_matrix(shape: Shape) -> tuple[int, int]:
    """(d_out, d_in) of any tensor: rows of its last dimension; a single number is one row of one, nothing is no rows."""
    if 0 in shape:
        return 0, 1
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _pair(name: str, base: Tensor, tuned: Tensor) -> Pair:
    shape = as_matrix(tuple(base.shape))
    before, after = base.reshape(shape), tuned.reshape(shape)
    return Pair(name, shape, lambda start, stop: before[start:stop], lambda start, stop: after[start:stop])


def _found(patterns: Sequence[str], modules: Sequence[str]) -> set[str]:
    """Raises BadPattern for one that finds nothing: a typo would otherwise pass silently."""
    found: set[str] = set()
    for pattern in patterns:
        matched = matching(pattern, modules)
        if not matched:
            raise BadPattern(pattern, "matches no matrix of these models")
        found.update(matched)
    return found


def _energies(pair: Pair) -> tuple[bool, float, float]:
    """Whether anything changed; squared norms, in float64, of the difference and of the base."""
    changed, energy, before = False, 0.0, 0.0
    for start, stop in row_ranges(pair.shape):
        own, after = pair.rows(start, stop)
        block = after - own
        changed = changed or bool(block.any())
        energy += float(block.double().square().sum())
        before += float(own.double().square().sum())
    return changed, energy, before


def _tail(pair: Pair, mean: int, context: ModuleContext) -> tuple[float, int]:
    """Alpha from as many singular values as twice the mean rank, at most half of them; and the most ranks of use."""
    full = min(pair.shape)
    k = max(min(2 * mean, full // 2), 1) + 1
    svd, _ = truncated_svd(pair.difference, min(k, full), seed=seed_of(context.seed, pair.tensor, "tail"))
    return tail_of(svd.S, full)


def _left_out(tensor: str, own: Mapping[str, Any]) -> dict[str, Any]:
    return {"tensor": tensor, "reason": own["reason"], "norm": math.sqrt(own["energy"]), "relative_norm": _relative(own)}


def _relative(own: Mapping[str, Any]) -> float | None:
    """Of the base's norm; None where that is 0."""
    return math.sqrt(own["energy"] / own["base_energy"]) if own["base_energy"] else None
