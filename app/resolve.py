"""From what a caller asks for to a recipe: names and branches pinned, defaults written out, the impossible refused early."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from app import base_models, ingest
from app.bases import OpenBasis
from app.engine.workflow import preview
from app.errors import InvalidField, UnknownAdapter
from app.extras import FROM
from app.learning import request as learning
from app.recipe import Recipe, RecipeInput, RecipeStep
from app.schemas import AdapterInput, ExtendRequest, MergeRequest, PostStepRequest, RankRequest
from app.services import Services
from merge_algos import catalogue, post
from merge_algos.errors import BadPattern, InvalidParams
from merge_algos.ground import DEFAULT_RULE
from merge_algos.merge import check_count, check_rule, default_weights, refuse_unknown
from merge_algos.patterns import matching
from merge_algos.protocol import Method, PostStep
from merge_algos.rank import RankRule
from storage.digest import Digest
from storage.errors import BadSource
from storage.index import BasisRecord
from storage.manifest import canonical_json
from storage.sources.hub import HubRef, HubSnapshot

T = TypeVar("T", bound=Method | PostStep)

_NATURAL_CHARS = 90  # of a task's name at most, so that a number fits behind it


def resolve(request: MergeRequest, services: Services, *, token: str | None) -> Recipe:
    """The recipe of a request. token: the caller's Hub token, used here and never kept.

    Raises the errors of methods, sources and Hub; and those of the plan, where all inputs are already in the store.
    """
    method = checked_method(request.method, request.parameters)
    if method.produces == "basis":
        _check_basis(request)
    learning.check(request, method)
    if request.base_rank is not None and request.base_model is None:
        raise InvalidField("base_rank", "only what depends on the weights of a base_model is cut to it")
    check_count(method, len(request.adapters))
    rule = _rule(request.rank)
    check_rule(method, rule)
    steps = _steps(request.post)
    weights = _weights(method, request.adapters)
    _check_patterns(request.adapters)
    names = _names(request.adapters)
    sources = [pin(item.source, services, token=token, field=f"adapters.{n}.source") for n, item in enumerate(request.adapters)]
    recipe = Recipe(
        method=method.name,
        method_version=method.version,
        parameters=_parameters(method),
        rank=rule,
        dtype=request.dtype,
        seed=request.seed,
        profile=request.profile,
        allow_base_mismatch=request.allow_base_mismatch,
        adapters=tuple(map(_input, request.adapters, sources, names, weights)),
        post=steps,
        base_model=base_models.pin(services, request.base_model, token=token) if request.base_model else None,
        tasks=tuple(learning.pinned(n, task, services, token) for n, task in enumerate(request.tasks)),
        base_rank=_base_rank(request),
        extras=_extras(request, names),
    )
    _check_plan(recipe, services)
    return recipe


def resolve_extension(basis: BasisRecord, request: ExtendRequest, services: Services, *, token: str | None) -> Recipe:
    """The recipe of one adapter more in a basis, made like the basis's own unless other parameters are given.

    Raises what `resolve` raises, and InvalidField for a name that the basis has already.
    """
    first = OpenBasis.open(services.blobs, basis.id).contents["groups"][0]
    asked = MergeRequest(
        method="rmm",
        parameters={**_inherited(first["parameters"], request.parameters), **request.parameters},
        adapters=[request.adapter],
        dtype=request.dtype,
        seed=request.seed,
        profile=first["profile"],
        allow_base_mismatch=request.allow_base_mismatch,
        base_model=request.base_model,
        base_rank=request.base_rank,
    )
    recipe = dataclasses.replace(resolve(asked, services, token=token), extends=str(basis.id))
    (item,) = recipe.adapters
    if item.name in basis.tasks:
        raise InvalidField("adapter.name", f"the basis has a task {item.name!r} already")
    _check_plan(recipe, services)
    return recipe


def _inherited(parameters: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """A basis's parameters for one adapter more, which alone has one principal direction, or, around its mean, none.

    A number of directions means nothing to another codec, and would silence a budget that is asked for.
    """
    p = None if {"codec", "budget"} & asked.keys() else parameters["p"]
    center = asked.get("center", parameters["center"])
    return {**parameters, "p": None if p is None else min(p, 0 if center else 1)}


def _check_basis(request: MergeRequest) -> None:
    """Refuse what has no meaning for a basis, whose adapters are neither weighed nor changed."""
    for position, item in enumerate(request.adapters):
        if item.weight is not None or item.weights_by_module:
            raise InvalidField(
                f"adapters.{position}.weight", "a basis keeps every adapter as it is; weigh them when reconstructing"
            )
    if request.post:
        raise InvalidField("post", "a basis has no post-steps")


def pin(source: str, services: Services, *, token: str | None, field: str) -> str:
    """The source as a recipe names it, which this caller may read. Raises BadSource, UnknownAdapter and the Hub's errors.

    A caller's token is not kept for later, so what only that token can read is imported now.
    """
    kind, _, rest = source.partition(":")
    match kind:
        case "hub":
            return _pin_hub(HubRef.parse(rest), services, token)
        case "sha256":
            return str(_known(Digest.parse(source), source, services, token))
        case "name":
            return str(_known(services.index.resolve_name(rest), source, services, token))
    raise BadSource(source, f"{field} must begin with hub:, sha256: or name:")


def checked_method(name: str, parameters: Mapping[str, Any]) -> Method:
    """The method with these parameters, their types checked against its fields. Raises UnknownMethod or InvalidParams."""
    return _checked(catalogue.find(name), name, parameters, "parameters")


def parameter_schema(chosen: type[T]) -> TypeAdapter[T]:
    """A method's or post-step's dataclass fields as pydantic sees them: the one source of types, defaults and JSON Schema."""
    return TypeAdapter(chosen)


def _checked(chosen: type[T], name: str, parameters: Mapping[str, Any], field: str) -> T:
    refuse_unknown(chosen, name, parameters, field=field)
    try:
        # as JSON, because that is where strictness still lets an object become the method
        return parameter_schema(chosen).validate_json(canonical_json(dict(parameters)), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidParams(".".join([field, *map(str, first["loc"])]), first["msg"]) from None
    except ValueError as error:
        raise InvalidParams(field, "numbers must be finite") from error


def _steps(asked: Sequence[PostStepRequest]) -> tuple[RecipeStep, ...]:
    """Raises UnknownMethod or InvalidParams naming `post.<n>.parameters.<field>`."""
    steps = [_checked(post.find(step.name), step.name, step.parameters, f"post.{n}.parameters") for n, step in enumerate(asked)]
    return tuple(RecipeStep(step.name, step.version, _parameters(step)) for step in steps)


def _parameters(method: Method | PostStep) -> dict[str, Any]:
    return dataclasses.asdict(method)  # type: ignore[call-overload, no-any-return]


def _pin_hub(ref: HubRef, services: Services, token: str | None) -> str:
    found = ingest.pinned(services, ref, token=token)
    if not isinstance(found, HubSnapshot):
        return str(found)
    if found.restricted and token is not None:
        ingest.import_hub(services, found, token=token)
    return str(found.ref)


def _known(digest: Digest | None, source: str, services: Services, token: str | None) -> Digest:
    record = services.index.get(digest) if digest else None
    if record is None:
        raise UnknownAdapter(source)
    ingest.check_access(services, record, token=token)
    return record.id


def _weights(method: Method, adapters: Sequence[AdapterInput]) -> tuple[float, ...]:
    given = [item.weight for item in adapters]
    if all(weight is None for weight in given):
        return default_weights(method, len(given))
    for position, weight in enumerate(given):
        if weight is None:
            raise InvalidField(f"adapters.{position}.weight", "give a weight to every adapter, or to none")
    return tuple(float(weight) for weight in given if weight is not None)


def _check_patterns(adapters: Sequence[AdapterInput]) -> None:
    """Refuse a pattern that does not compile before anything is fetched."""
    for position, item in enumerate(adapters):
        for pattern in item.weights_by_module:
            try:
                matching(pattern, ())
            except BadPattern as error:
                raise InvalidField(f"adapters.{position}.weights_by_module", str(error)) from error


def _names(adapters: Sequence[AdapterInput]) -> tuple[str, ...]:
    """Distinct task names: those given, else from the source, numbered where two would be the same."""
    given = [item.name for item in adapters if item.name is not None]
    for position, item in enumerate(adapters):
        if item.name is not None and given.count(item.name) > 1:
            raise InvalidField(f"adapters.{position}.name", f"{item.name!r} is used twice")
    names: list[str] = []
    for item in adapters:
        taken = {*given, *names}
        candidates = (f"{_natural_name(item.source)}{suffix}" for suffix in ["", *(f"-{n}" for n in range(2, 1000))])
        names.append(item.name or next(name for name in candidates if name not in taken))
    return tuple(names)


def _natural_name(source: str) -> str:
    """`hub:org/math-lora@main` -> `math-lora`, `sha256:0123…` -> `0123456789ab`. As callers may write a task's name."""
    kind, _, rest = source.partition(":")
    last = rest[:12] if kind == "sha256" else rest.partition("@")[0].rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:_NATURAL_CHARS] or "task"


def _rule(asked: RankRequest | None) -> RankRule:
    return RankRule(max=asked) if asked is None or isinstance(asked, int) else RankRule(max=asked.max, energy=asked.energy)


def _base_rank(request: MergeRequest) -> RankRule | None:
    """Written out where the base model is there for nothing else; a recipe that learns is what it was before there was one."""
    if request.base_rank is None and (request.tasks or request.base_model is None):
        return None
    return DEFAULT_RULE if request.base_rank is None else _rule(request.base_rank)


def _extras(request: MergeRequest, names: Sequence[str]) -> str:
    if isinstance(request.extras, str):
        return request.extras
    if request.extras.name not in names:
        raise InvalidField("extras.from", f"no adapter of this merge is called {request.extras.name!r}: {', '.join(names)[:200]}")
    return f"{FROM}{request.extras.name}"


def _input(item: AdapterInput, source: str, name: str, weight: float) -> RecipeInput:
    return RecipeInput(source, name, weight, tuple(sorted(item.weights_by_module.items())))


def _check_plan(recipe: Recipe, services: Services) -> None:
    """What can be refused now need not fail later: only headers are read. Inputs still to be fetched are left to the job."""
    known = [_stored(item.source, services) for item in recipe.adapters]
    present = [digest for digest in known if digest is not None]
    if len(present) == len(known):
        preview(services, recipe, present)


def _stored(source: str, services: Services) -> Digest | None:
    if source.startswith("hub:"):
        record = ingest.held(services, source)
        return record.id if record else None
    digest = Digest.parse(source)
    return digest if ingest.complete(services, digest) else None
