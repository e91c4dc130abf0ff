"""Every post-step, discovered: one file, one class with a `name`, sorted by it."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from merge_algos.discovery import named_classes
from merge_algos.errors import UnknownMethod
from merge_algos.protocol import PostStep


@cache
def registry() -> Mapping[str, type[PostStep]]:
    """name -> class, sorted by name. Pure: the answer is a property of the installed files."""
    return MappingProxyType(named_classes(__name__, __path__))


def find(name: str) -> type[PostStep]:
    """Raises UnknownMethod, listing the known ones."""
    if name not in registry():
        raise UnknownMethod(name, tuple(registry()))
    return registry()[name]
