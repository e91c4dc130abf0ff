"""From a recipe and the headers of its inputs to what must be computed: a pure function, so it can refuse before any work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from app.extract.models import OpenPair
from app.grounding.recipe import refuse_ungrounded
from app.profiles import served_rank
from app.recipe import Recipe, module_weights
from merge_algos import catalogue
from merge_algos.adapter import common_base, natural
from merge_algos.errors import InvalidRank
from merge_algos.extract import as_matrix, tensor_of
from merge_algos.formats.components import check_names
from merge_algos.formats.spec import LINEAR, AdapterSpec, Layer
from merge_algos.formats.together import agreed_replication, agreed_shapes, layers_of, replicated
from merge_algos.ground import rank_bound
from merge_algos.merge import check_count, check_rule
from merge_algos.protocol import BasisMethod

_MAX_MODULES_PER_SHARD = 16
_COMPUTE_BYTES = 4  # float32 at the widest that is shipped


@dataclass(frozen=True, slots=True)
class Plan:
    """modules: name -> (d_out, d_in), in natural order; layers of the same.  shards: their names, cut into checkpoints."""

    base_model: str
    modules: Mapping[str, tuple[int, int]]
    layers: Mapping[str, Layer]
    weights: Mapping[str, tuple[float, ...]]
    shards: tuple[tuple[str, ...], ...]


def plan(recipe: Recipe, specs: Sequence[AdapterSpec], *, shard_bytes: int) -> Plan:
    """Raises what makes the recipe impossible for these adapters.

    BaseModelMismatch, ShapeMismatch, BadPattern, InvalidRank, TooFewAdapters, UnknownMethod, InvalidParams.
    """
    method = catalogue.build(recipe.method, recipe.parameters)
    check_count(method, len(specs))
    check_rule(method, recipe.rank)
    if method.produces == "basis":
        cast(BasisMethod, method).check_inputs(len(specs), max(spec.rank for spec in specs))
    refuse_ungrounded(specs)
    base_model = common_base([spec.base_model for spec in specs], allow_mismatch=recipe.allow_base_mismatch)
    check_names(specs)
    _check_replication(recipe, method.produces, specs)
    modules = agreed_shapes(specs)
    layers = layers_of(specs, modules)
    full = {name: min(shape) for name, shape in modules.items()}
    ranks = full if method.full_rank else _ranks(specs, modules)
    # what an energy has left of a grounded input nobody could know who asked for a rank
    _check_rank(recipe, ranks if recipe.base_rank is None else full, modules)
    sizes = {name: _shipped_bytes(recipe, ranks[name], shape) for name, shape in modules.items()}
    return Plan(base_model, modules, layers, module_weights(recipe.adapters, tuple(modules)), _shards(sizes, shard_bytes))


def plan_grounding(recipe: Recipe, spec: AdapterSpec, *, shard_bytes: int) -> Plan:
    """The modules of one adapter. spec: with every shape."""
    specs = {module.name: module for module in sorted(spec.modules, key=lambda module: natural(module.name))}
    modules = {name: module.shape for name, module in specs.items() if module.shape is not None}
    assert len(modules) == len(specs)
    sizes = {name: _shipped_bytes(recipe, rank_bound(specs[name], recipe.rank), shape) for name, shape in modules.items()}
    return Plan(spec.base_model, modules, spec.layers, dict.fromkeys(modules, ()), _shards(sizes, shard_bytes))


def plan_extraction(recipe: Recipe, pair: OpenPair, known: Any, *, shard_bytes: int) -> Plan:
    """The tensors to survey, or, once that is known, the modules to extract, by module name.

    Raises InvalidRank for a rank that no linear layer of these models can have.
    """
    assert recipe.models is not None
    if known is None:
        matrices = {tensor: as_matrix(shape) for tensor, shape in pair.shapes.items()}
        candidates = {tensor: shape for tensor, shape in matrices.items() if pair.reasons[tensor] is None}
        if candidates:  # where there is none, the survey says what has changed instead
            _check_rank(recipe, {tensor: min(shape) for tensor, shape in candidates.items()}, candidates)
        return Plan(
            recipe.models.base_model,
            matrices,
            dict.fromkeys(matrices, LINEAR),
            dict.fromkeys(matrices, ()),
            _shards(dict.fromkeys(matrices, 0), 0),
        )
    names = sorted(known["modules"], key=natural)
    modules = {name: as_matrix(pair.shapes[tensor_of(name)]) for name in names}
    ranks = {name: known["modules"][name].get("rank", min(shape)) for name, shape in modules.items()}
    sizes = {name: _shipped_bytes(recipe, ranks[name], shape) for name, shape in modules.items()}
    return Plan(
        recipe.models.base_model,
        modules,
        dict.fromkeys(modules, LINEAR),
        dict.fromkeys(modules, ()),
        _shards(sizes, shard_bytes),
    )


def _check_replication(recipe: Recipe, produces: str, specs: Sequence[AdapterSpec]) -> None:
    """Raises UnsupportedAdapter for a result that knows the base model only as it is, not with repeated layers."""
    if agreed_replication(specs) and (produces == "basis" or recipe.profile == "vllm"):
        raise replicated("a basis" if produces == "basis" else "the profile vllm")


def _ranks(specs: Sequence[AdapterSpec], modules: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Module -> sum of the ranks of the adapters present: the most that any method can produce."""
    ranks = dict.fromkeys(modules, 0)
    for spec in specs:
        for module in spec.modules:
            ranks[module.name] += module.r
    return ranks


def _check_rank(recipe: Recipe, ranks: Mapping[str, int], modules: Mapping[str, tuple[int, int]]) -> None:
    if recipe.profile == "vllm" and recipe.rank.max is not None:
        served_rank(recipe.rank.max)
    possible = max(min(ranks[name], *shape) for name, shape in modules.items())
    if recipe.rank.energy is None and recipe.rank.max is not None and recipe.rank.max > possible:
        raise InvalidRank(recipe.rank.max, f"the result can have rank {possible} at most")


def _shipped_bytes(recipe: Recipe, rank: int, shape: tuple[int, int]) -> int:
    return min(rank, *shape, recipe.rank.max or rank) * sum(shape) * _COMPUTE_BYTES


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> tuple[tuple[str, ...], ...]:
    shards: list[list[str]] = []
    room = 0
    for name, size_bytes in sizes.items():
        if not shards or size_bytes > room or len(shards[-1]) == _MAX_MODULES_PER_SHARD:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size_bytes
    return tuple(tuple(shard) for shard in shards)
