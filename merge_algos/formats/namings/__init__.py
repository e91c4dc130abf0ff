"""Every naming, discovered: one file, one class with a `name`, sorted by it."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from merge_algos.discovery import named_classes
from merge_algos.formats.naming import Naming


@cache
def registry() -> Mapping[str, Naming]:
    """name -> the naming, sorted by name. Pure: the answer is a property of the installed files."""
    return MappingProxyType({name: found() for name, found in named_classes(__name__, __path__).items()})
