"""What becomes of the extras of several adapters: refused, those of one of them, or their mean. Pure: from specs to a plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from app.adapters import OpenAdapter, read_tensor, spelling
from app.engine.assembly import shipped_dtype
from app.recipe import REFUSE_EXTRAS, Recipe
from merge_algos import catalogue
from merge_algos.errors import NonFiniteResult, UnsupportedAdapter
from merge_algos.formats.components import without_component
from merge_algos.formats.extras import PREFIX, Extra, config_of
from merge_algos.formats.spec import AdapterSpec, Layer, Shape
from merge_algos.formats.together import as_doras
from merge_algos.learn.method import Learned
from storage.tensor_writer import TensorSpec

FROM = "from:"
_REMEDY = "say what becomes of it, extras: average or extras: {from: NAME}, or save the adapter without it"


@dataclass(frozen=True, slots=True)
class Mix:
    """One tensor of the result: `sum_i factor_i * tensor_i` over parts: position of an adapter, its extra, factor."""

    extra: Extra
    parts: tuple[tuple[int, Extra, float], ...]


@dataclass(frozen=True, slots=True)
class Extras:
    """Of a result. dropped: name of an adapter -> its tensors that are not in it."""

    mixes: tuple[Mix, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, Sequence[str]] = field(default_factory=dict)


def combined(recipe: Recipe, specs: Sequence[AdapterSpec], weights: Mapping[str, Sequence[float]]) -> Extras:
    """The extras of the result. weights: module -> the adapters' weights there.

    Raises UnsupportedAdapter naming a tensor that the recipe says nothing about, or that does not agree between adapters.
    """
    check(recipe, specs)
    found = _of_one(recipe, specs) if recipe.extras.startswith(FROM) else _of_all(recipe, specs, weights)
    _check_places(found.mixes, {name: layer for spec in specs for name, layer in spec.layers.items()})
    if found.mixes and recipe.profile == "vllm":
        reason = "vLLM loads no adapter with anything beside its deltas"
        raise UnsupportedAdapter(f"tensor {found.mixes[0].extra.tensor[:200]}", reason, "ask for another profile")
    return found


def _of_all(recipe: Recipe, specs: Sequence[AdapterSpec], weights: Mapping[str, Sequence[float]]) -> Extras:
    places: dict[str, list[tuple[int, Extra]]] = {}
    for position, spec in enumerate(specs):
        for extra in spec.extras:
            places.setdefault(extra.place, []).append((position, extra))
    own = [item.weight for item in recipe.adapters]
    mixes = tuple(_average(found, own, weights) for found in places.values())
    return Extras(mixes, _config([mix.extra for mix in mixes], specs))


def check(recipe: Recipe, specs: Sequence[AdapterSpec]) -> None:
    """What can be told before anything is planned. Raises UnsupportedAdapter."""
    if not any(spec.extras for spec in specs):
        return
    _check_method(recipe, specs)
    if recipe.extras == REFUSE_EXTRAS:
        raise _unspoken(specs)


def as_merged(recipe: Recipe, adapters: Sequence[OpenAdapter]) -> list[OpenAdapter]:
    """The adapters as this recipe reads them: DoRAs as the LoRAs and magnitudes that they are made of, if it mixes these."""
    own = [adapter.spec for adapter in adapters]
    specs = merged_specs(recipe, own)
    return [a if spec is before else a.described(spec) for a, spec, before in zip(adapters, specs, own, strict=True)]


def merged_specs(recipe: Recipe, specs: Sequence[AdapterSpec]) -> list[AdapterSpec]:
    """The same of specs. Raises UnsupportedAdapter for DoRAs of different modules."""
    mixes = recipe.extras != REFUSE_EXTRAS and recipe.base_model is None
    return list((as_doras(specs) if mixes else None) or specs)


def read(mix: Mix, adapters: Sequence[OpenAdapter], dtype: torch.dtype) -> Tensor:
    """The tensor of the result, added up in float64; one that is taken as it is keeps its bits."""
    if len(mix.parts) == 1 and mix.parts[0][2] == 1.0:
        ((position, extra, _),) = mix.parts
        return _cast(mix, read_tensor(adapters[position].tensors, extra.tensor), dtype)
    total: Tensor | float = 0.0
    for position, extra, factor in mix.parts:
        total = total + factor * read_tensor(adapters[position].tensors, extra.tensor).double()
    assert isinstance(total, Tensor)
    return _cast(mix, total, dtype)


def _cast(mix: Mix, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        raise NonFiniteResult(f"tensor {mix.extra.tensor[:200]}", str(dtype).removeprefix("torch."))
    return cast


def tensors_of(
    recipe: Recipe, extras: Extras, adapters: Sequence[OpenAdapter], shapes: Mapping[str, Shape]
) -> dict[TensorSpec, Callable[[], Tensor]]:
    """The tensors of the result, to be read in their turn. shapes: of the modules that it adapts, so that a loader wraps them.

    `lora_bias` holds for all layers or none, so a module that no adapter has one of gets zeros.
    """
    called = without_component(tuple(shapes))
    found: dict[TensorSpec, Callable[[], Tensor]] = {}
    for mix in extras.mixes:
        infos = [adapters[n].tensors.header.tensors[extra.tensor] for n, extra, _ in mix.parts]
        dtype = shipped_dtype(recipe, [info.dtype for info in infos])
        found[TensorSpec(_name(mix.extra, called), spelling(dtype), infos[0].shape)] = partial(read, mix, adapters, dtype)
    biased = {mix.extra.module: mix for mix in extras.mixes if mix.extra.sort == "lora_bias"}
    for module in (module for module in shapes if biased and module not in biased):
        dtype = shipped_dtype(recipe, [dtype for adapter in adapters for dtype in adapter.dtypes])
        zeros = partial(torch.zeros, shapes[module][0], dtype=dtype)
        found[TensorSpec(f"{PREFIX}{called[module]}.lora_B.bias", spelling(dtype), shapes[module][:1])] = zeros
    return found


def _name(extra: Extra, called: Mapping[str, str]) -> str:
    """Of a tensor of the result. called: adapted module -> its name in the result."""
    if extra.module in called and extra.sort in {"lora_bias", "magnitude"}:
        return f"{PREFIX}{called[extra.module]}{extra.tensor[extra.tensor.rindex('.lora_') :]}"
    if extra.module in called and extra.sort in {"bias", "base"}:
        return f"{PREFIX}{called[extra.module]}.base_layer.{'bias' if extra.sort == 'bias' else 'weight'}"
    return extra.place


def certified(recipe: Recipe, extras: Extras) -> dict[str, Any] | None:
    """What the certificate says of them; None where no adapter had any."""
    if not extras.mixes and not extras.dropped:
        return None
    names = [item.name for item in recipe.adapters]
    tensors = [
        {
            "tensor": mix.extra.tensor,
            "sort": mix.extra.sort,
            "from": [names[position] for position, _, _ in mix.parts],
            "factors": [factor for _, _, factor in mix.parts],
        }
        for mix in extras.mixes
    ]
    exact = not extras.dropped and all(_is_exact(mix) for mix in extras.mixes)
    return {
        "policy": recipe.extras,
        "exact": exact,
        "tensors": tensors,
        "dropped": {name: list(own) for name, own in extras.dropped.items()},
    }


def _is_exact(mix: Mix) -> bool:
    """Whether it is what the adapter has, or a sum as outputs add up; a mean of whole values is neither."""
    return mix.extra.sort == "lora_bias" or (len(mix.parts) == 1 and mix.parts[0][2] == 1.0)


def _check_method(recipe: Recipe, specs: Sequence[AdapterSpec]) -> None:
    method = catalogue.find(recipe.method)
    reason = None
    if method.produces == "basis":
        reason = "a basis keeps the deltas of its adapters, and this is none"
    elif issubclass(method, Learned) and recipe.tasks:
        reason = f"{recipe.method} learns how deltas are scaled, and would learn it without this"
    if reason is not None:
        raise UnsupportedAdapter(_first(specs), reason, "save the adapter without it")


def _unspoken(specs: Sequence[AdapterSpec]) -> UnsupportedAdapter:
    sort = next(extra.sort for spec in specs for extra in spec.extras)
    what = {
        "module": "a whole trained module is saved beside the deltas",
        "base": "the weight beneath an adapted embedding is saved beside its delta",
        "bias": "a trained bias is an update outside B A",
        "tokens": "trained rows of an embedding are an update outside B A",
        "lora_bias": "a bias of lora_B is an update outside B A",
        "magnitude": "a DoRA magnitude rescales the whole weight",
    }
    return UnsupportedAdapter(_first(specs), what[sort], _REMEDY)


def _first(specs: Sequence[AdapterSpec]) -> str:
    return f"tensor {next(extra.tensor for spec in specs for extra in spec.extras)[:200]}"


def _of_one(recipe: Recipe, specs: Sequence[AdapterSpec]) -> Extras:
    names = [item.name for item in recipe.adapters]
    chosen = names.index(recipe.extras.removeprefix(FROM))
    mixes = tuple(Mix(extra, ((chosen, extra, extra.scaling),)) for extra in specs[chosen].extras)
    dropped = {name: [e.tensor for e in spec.extras] for name, spec in zip(names, specs, strict=True) if spec.extras}
    return Extras(mixes, dict(specs[chosen].extras_config), {name: own for name, own in dropped.items() if name != names[chosen]})


def _average(found: Sequence[tuple[int, Extra]], own: Sequence[float], weights: Mapping[str, Sequence[float]]) -> Mix:
    """The weighted mean of whole values; of what is added to the base's outputs, the weighted sum."""
    _, first = found[0]
    for _, other in found:
        if other.sort != first.sort:
            reason = "one adapter has saved this module whole, another a part of it"
            raise UnsupportedAdapter(f"module {first.module[:200]}", reason, "save both in one way")
        if (other.shape, other.indices) != (first.shape, first.indices):
            what = "rows" if other.indices != first.indices else "shapes"
            reason = f"two adapters have it in different {what} ({_said(first)} and {_said(other)}), which have no mean"
            raise UnsupportedAdapter(f"tensor {first.tensor[:200]}", reason, "take it from one of them: extras: {from: NAME}")
    if first.sort == "lora_bias":
        return Mix(first, tuple((n, extra, weights[extra.module][n] * extra.scaling) for n, extra in found))
    total = sum(own[n] for n, _ in found)
    if total == 0.0:
        reason = "the weights of the adapters that have it add up to 0, so it has no mean"
        raise UnsupportedAdapter(f"tensor {first.tensor[:200]}", reason, "take it from one of them: extras: {from: NAME}")
    return Mix(first, tuple((n, extra, own[n] / total) for n, extra in found))


def _said(extra: Extra) -> str:
    return str(list(extra.indices[:8]) if extra.indices else extra.shape)


def _check_places(mixes: Sequence[Mix], layers: Mapping[str, Layer]) -> None:
    """Raises UnsupportedAdapter for what PEFT has no one layer for. layers: of the modules that any adapter has a delta of."""
    tokens = {mix.extra.module for mix in mixes if mix.extra.sort == "tokens"}
    for extra in (mix.extra for mix in mixes):
        reason, place = None, extra.module
        inside = next((name for name in layers if f"{name}.".startswith(f"{place}.")), None)
        if extra.sort == "module" and inside is not None:
            reason = "one adapter has saved this module whole, another has a delta of it"
        elif extra.sort in {"module", "base"} and place in tokens:
            reason = "one adapter has saved this module whole, another has trained rows of it"
        if reason is not None:
            raise UnsupportedAdapter(f"module {place[:200]}", reason, "save both in one way")
    if any(mix.extra.sort == "lora_bias" for mix in mixes):
        for name in (name for name, layer in layers.items() if layer.kind in {"embedding", "expert"}):
            reason = "PEFT has no bias of lora_B in such a layer, and knows it for all layers or none"
            raise UnsupportedAdapter(f"module {name[:200]}", reason, "save the adapters without lora_bias")


def _config(extras: Sequence[Extra], specs: Sequence[AdapterSpec]) -> dict[str, Any]:
    tokens = [spec.extras_config["trainable_token_indices"] for spec in specs if "trainable_token_indices" in spec.extras_config]
    if any(other != tokens[0] for other in tokens):
        reason = "two adapters have trained other rows, or say it in another way"
        remedy = "take it from one of them: extras: {from: NAME}"
        raise UnsupportedAdapter("adapter_config.json: trainable_token_indices", reason, remedy)
    return config_of(extras, [spec.extras_config for spec in specs])
