"""Values of an `adapter_config.json`, checked: JSON from strangers holds anything."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from merge_algos.errors import InvalidParams
from merge_algos.patterns import matching_each


def number(field: str, value: Any) -> float:
    """A finite number. Raises InvalidParams."""
    # compared, not converted: JSON has integers beyond any float
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InvalidParams(f"adapter_config.json: {field}", f"must be a finite number, not {str(value)[:100]}")
    return value


def positive(field: str, value: Any) -> float:
    """A finite number of at least 1, as ranks and counts are. Raises InvalidParams."""
    if number(field, value) < 1:
        raise InvalidParams(f"adapter_config.json: {field}", f"must be at least 1, not {str(value)[:100]}")
    return float(value)


def flag(config: Mapping[str, Any], field: str) -> bool:
    """Raises InvalidParams."""
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise InvalidParams(f"adapter_config.json: {field}", "must be true, false or null")
    return bool(value)


def text(config: Mapping[str, Any], field: str) -> str | None:
    """Raises InvalidParams."""
    value = config.get(field)
    # JSON can write half a character, which no file can hold
    if value is not None and not (isinstance(value, str) and value == value.encode(errors="ignore").decode()):
        raise InvalidParams(f"adapter_config.json: {field}", "must be text or null")
    return value


def texts(config: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A list of texts, or nothing. Raises InvalidParams."""
    value = config.get(field) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidParams(f"adapter_config.json: {field}", "must be a list of texts or null")
    return tuple(value)


def ranges(config: Mapping[str, Any], field: str) -> tuple[tuple[int, int], ...]:
    """A list of pairs of whole numbers, or nothing. Raises InvalidParams."""
    value = config.get(field) or []
    is_pair = lambda pair: isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)  # noqa: E731
    if not isinstance(value, list) or not all(map(is_pair, value)):
        raise InvalidParams(f"adapter_config.json: {field}", "must be a list of [start, stop] or null")
    return tuple((start, stop) for start, stop in value)


def by_pattern(
    config: Mapping[str, Any], default: str, pattern: str, modules: Sequence[str], *, otherwise: float = 8
) -> dict[str, float]:
    """Value per module: the first pattern that is the module's name or its dotted tail, else the default (PEFT's rule).

    default, pattern: fields of the config.  otherwise: where the config has no default either.
    """
    values = dict.fromkeys(modules, number(default, config.get(default, otherwise)))
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, Mapping):
        raise InvalidParams(f"adapter_config.json: {pattern}", "must be an object")
    matched = matching_each(tuple(patterns), modules, anchored=True)
    for key, value in reversed(list(patterns.items())):  # reversed, so that the first pattern that matches has the last word
        values.update(dict.fromkeys(matched[key], number(pattern, value)))
    return values
