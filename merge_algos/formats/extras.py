"""What an adapter holds beside the deltas of its modules: whole trained modules, biases, rows of embeddings, biases of lora_B.

Each is announced by a flag of the config, or is an embedding that PEFT saves by itself; what nothing announces is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from merge_algos.errors import InvalidParams, UnsupportedAdapter
from merge_algos.formats import fields

PREFIX = "base_model.model."
# whole values, but for `lora_bias`, which is added to what the base gives
Sort = Literal["module", "base", "bias", "tokens", "lora_bias", "magnitude"]

_EMBEDDINGS = frozenset({"embed_tokens", "lm_head"})  # which PEFT saves whole where their vocabulary was resized
_TOKENS, _LORA_BIAS, _BIAS = ".token_adapter.trainable_tokens_delta", ".lora_B.bias", ".bias"
_WRAPPED = ".base_layer.weight"  # what an adapted embedding is added to, which PEFT saves beside its delta
_REMEDY = "save the adapter whole, or without the flag"


@dataclass(frozen=True, slots=True)
class Extra:
    """One tensor beside the deltas. tensor: its name in the file.  module: in the model, called as a spec calls its modules.

    indices: which rows of an embedding it holds.  scaling: what a `lora_bias` is multiplied by.
    """

    tensor: str
    sort: Sort
    module: str
    shape: tuple[int, ...]
    indices: tuple[int, ...] = ()
    scaling: float = 1.0

    @property
    def place(self) -> str:
        """What it is a value of, under one name whether its layer is wrapped in the adapter or not."""
        return self.tensor.replace(".base_layer.", ".")


def recognised(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Extra]:
    """Tensor -> what it is, of those that are extras. shapes: of tensors that no kind reads.

    Raises InvalidParams, or UnsupportedAdapter for a flag without its tensors.
    """
    saved = fields.texts(config, "modules_to_save")
    has_bias = config.get("bias") in ("all", "lora_only")
    indices = _token_indices(config)
    found: dict[str, Extra] = {}
    for tensor, shape in shapes.items():
        path = tensor.removeprefix(PREFIX)
        if path == tensor:
            continue
        if path.endswith(_TOKENS) and indices:
            module = path.removesuffix(_TOKENS)
            found[tensor] = Extra(tensor, "tokens", module, shape, _rows_of(module, indices, shape))
        elif path.endswith(_LORA_BIAS) and fields.flag(config, "lora_bias"):
            found[tensor] = Extra(tensor, "lora_bias", path.removesuffix(_LORA_BIAS), shape)
        elif owner := _saved_module(path, saved):
            found[tensor] = Extra(tensor, "module", owner, shape)
        elif path.endswith(_BIAS) and has_bias and ".lora_" not in path:
            found[tensor] = Extra(tensor, "bias", path.removesuffix(_BIAS).removesuffix(".base_layer"), shape)
        elif path.endswith(_WRAPPED):
            found[tensor] = Extra(tensor, "base", path.removesuffix(_WRAPPED), shape)
        elif path.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS and path.endswith(".weight"):
            found[tensor] = Extra(tensor, "module", path.removesuffix(".weight"), shape)
    _check_announced(config, found.values())
    return found


def config_of(extras: Iterable[Extra], configs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What an `adapter_config.json` says of these extras. configs: of the adapters that they come from."""
    sorts = {extra.sort for extra in extras}
    given = [config for config in configs if config]
    saved = dict.fromkeys(name for config in given for name in config.get("modules_to_save") or ())
    biases = [config["bias"] for config in given if config.get("bias") in ("all", "lora_only")]
    tokens = [config["trainable_token_indices"] for config in given if config.get("trainable_token_indices")]
    return {
        **({"modules_to_save": list(saved)} if "module" in sorts and saved else {}),
        **({"bias": "all" if "all" in biases else "lora_only"} if "bias" in sorts else {}),
        **({"trainable_token_indices": tokens[0]} if "tokens" in sorts else {}),
        **({"lora_bias": True} if "lora_bias" in sorts else {}),
        **({"use_dora": True} if "magnitude" in sorts else {}),
    }


def scaled(extras: Iterable[Extra], scalings: Mapping[str, float]) -> tuple[Extra, ...]:
    """The extras with the scalings of their modules. Raises UnsupportedAdapter for a bias of lora_B without its lora_B."""
    return tuple(_scaled(extra, scalings) if extra.sort == "lora_bias" else extra for extra in extras)


def check_wrapped(extras: Iterable[Extra], grounded: Mapping[str, bool]) -> None:
    """Raises UnsupportedAdapter for a saved base weight whose delta is missing or depends on it. grounded: of the modules."""
    for extra in (extra for extra in extras if extra.sort == "base" and grounded.get(extra.module, True)):
        depends = extra.module in grounded
        reason = (
            f"it is the weight beneath a delta, {'which depends on it' if depends else 'but the file has none of this module'}"
        )
        raise UnsupportedAdapter(f"tensor {extra.tensor[:200]}", reason, "save the adapter with save_embedding_layers=False")


def _scaled(extra: Extra, scalings: Mapping[str, float]) -> Extra:
    if extra.module not in scalings:
        reason = "it is a bias of lora_B in a module that has no lora_B"
        raise UnsupportedAdapter(f"tensor {extra.tensor[:200]}", reason, "check how the adapter was saved")
    return replace(extra, scaling=scalings[extra.module])


def _token_indices(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tail of an embedding's name, empty for any, -> rows. Raises InvalidParams."""
    given = config.get("trainable_token_indices") or {}
    lists = given if isinstance(given, Mapping) else {"": given}
    for rows in lists.values():
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
            raise InvalidParams("adapter_config.json: trainable_token_indices", "must be lists of row numbers")
    return {str(name): tuple(rows) for name, rows in lists.items() if rows}


def _rows_of(module: str, indices: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> tuple[int, ...]:
    rows = next((rows for tail, rows in indices.items() if _ends_with(module, tail)), ())
    if len(shape) != 2 or shape[0] != len(rows):
        reason = f"it holds {shape[:1]} rows where trainable_token_indices names {len(rows)}"
        raise UnsupportedAdapter(f"module {module[:200]}", reason, "check how the adapter was saved")
    return rows


def _saved_module(path: str, saved: Sequence[str]) -> str | None:
    """The module of `modules_to_save` that this tensor is in."""
    parts = path.split(".")
    owners = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((owner for owner in owners if any(_ends_with(owner, name) for name in saved)), None)


def _ends_with(module: str, tail: str) -> bool:
    return not tail or module == tail or module.endswith(f".{tail}")


def _check_announced(config: Mapping[str, Any], found: Iterable[Extra]) -> None:
    """A bias may be announced where the model has none; the other flags mean nothing without their tensors."""
    sorts = {extra.sort for extra in found}
    for flag, sort in (("modules_to_save", "module"), ("trainable_token_indices", "tokens"), ("lora_bias", "lora_bias")):
        if config.get(flag) and sort not in sorts:
            raise UnsupportedAdapter(f"adapter_config.json: {flag}", "it announces tensors that the file does not hold", _REMEDY)
