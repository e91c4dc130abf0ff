"""From a request for an extraction to its recipe: models pinned, defaults written out, the impossible refused early."""

import dataclasses
from collections.abc import Sequence

from app import base_models
from app.engine.workflow import plan_models
from app.errors import InvalidField
from app.recipe import Recipe, RecipeModels
from app.schemas import ExtractRequest, HeavyTailRank
from app.services import Services
from merge_algos.errors import BadPattern, NothingToExtract
from merge_algos.extract import Extract, check_extraction
from merge_algos.patterns import matching
from merge_algos.rank import RankRule
from storage.digest import Digest
from storage.sources.hub import HubRef


def resolve_extraction(request: ExtractRequest, services: Services, *, token: str | None) -> Recipe:
    """The recipe of a request. token: the caller's Hub token, used here and never kept.

    Raises the errors of `base_models.pin`, and those of the plan where both models are already in the store.
    """
    method, rule = _method(request), _rule(request)
    check_extraction(method, rule)
    for field in ("include", "exclude"):
        _check_patterns(field, getattr(request, field))
    base, tuned = (base_models.pin(services, getattr(request, f), token=token, field=f) for f in ("base", "tuned"))
    if base == tuned:
        raise NothingToExtract(())
    recipe = Recipe(
        method=method.name,
        method_version=method.version,
        parameters={**dataclasses.asdict(method), "include": list(method.include), "exclude": list(method.exclude)},
        rank=rule,
        dtype=request.dtype,
        seed=request.seed,
        profile=request.profile,
        allow_base_mismatch=False,
        adapters=(),
        models=RecipeModels(base, tuned, request.base_model_name or _name_of(services, base)),
    )
    stored = [base_models.held(services, pinned) for pinned in (base, tuned)]
    inputs = [digest for digest in stored if digest is not None]
    if len(inputs) == len(stored):
        plan_models(services, recipe, inputs)
    return recipe


def _method(request: ExtractRequest) -> Extract:
    spread = request.rank if isinstance(request.rank, HeavyTailRank) else None
    return Extract(
        include=tuple(request.include),
        exclude=tuple(request.exclude),
        leftover=request.leftover,
        heavy_tail=spread.heavy_tail if spread else None,
        heavy_tail_max=spread.max if spread else None,
    )


def _rule(request: ExtractRequest) -> RankRule:
    match request.rank:
        case HeavyTailRank():
            return RankRule()
        case int(rank):
            return RankRule(max=rank)
    return RankRule(max=request.rank.max, energy=request.rank.energy)


def _check_patterns(field: str, patterns: Sequence[str]) -> None:
    """Refuse a pattern that does not compile before anything is fetched."""
    for position, pattern in enumerate(patterns):
        try:
            matching(pattern, ())
        except BadPattern as error:
            raise InvalidField(f"{field}.{position}", str(error)) from error


def _name_of(services: Services, pinned: str) -> str:
    """What the adapter calls its base model: `org/name` of the Hub, or the name of the folder it was read from."""
    source = pinned if pinned.startswith("hub:") else base_models.read(services, Digest.parse(pinned)).source
    kind, _, rest = source.partition(":")
    return HubRef.parse(rest).repo if kind == "hub" else rest.rstrip("/").rpartition("/")[2]
