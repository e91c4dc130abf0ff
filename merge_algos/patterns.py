"""Regular expressions from strangers, matched against module names with a limit on time and length.

Python's own `re` cannot be interrupted, so one hostile pattern in a recipe or adapter_config.json would stop the service.
"""

import time
from collections.abc import Sequence

import regex

from merge_algos.errors import BadPattern

_MAX_LENGTH = 512
_TIMEOUT_S = 0.25
_TOTAL_S = 10.0


def matching(pattern: str, names: Sequence[str], *, anchored: bool = False) -> tuple[str, ...]:
    """The names in which `pattern` is found; `anchored`: PEFT's rule, the pattern is the whole name or its dotted tail.

    Raises BadPattern if it does not compile, is longer than 512 characters or takes longer than a quarter of a second.
    """
    if len(pattern) > _MAX_LENGTH:
        raise BadPattern(pattern, f"longer than {_MAX_LENGTH} characters")
    try:
        compiled = regex.compile(rf"^(.*\.)?({pattern})$" if anchored else pattern)  # PEFT's groups, so that \2 is \2
        ends_at = time.monotonic() + _TIMEOUT_S
        return tuple(name for name in names if compiled.search(name, timeout=max(ends_at - time.monotonic(), 0.001)))
    except (regex.error, ValueError, RecursionError) as error:
        raise BadPattern(pattern, str(error)) from error
    except TimeoutError as error:
        raise BadPattern(pattern, "takes too long to match") from error


def matching_each(patterns: Sequence[str], names: Sequence[str], *, anchored: bool = False) -> dict[str, tuple[str, ...]]:
    """`matching` of every pattern. Raises BadPattern also if all of them together take longer than ten seconds."""
    found, ends_at = {}, time.monotonic() + _TOTAL_S
    for pattern in patterns:
        if time.monotonic() > ends_at:
            raise BadPattern(pattern, f"{len(patterns)} patterns take too long to match")
        found[pattern] = matching(pattern, names, anchored=anchored)
    return found
