"""Every reversible codec, discovered: one file, one class with a `name`, sorted by it."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from merge_algos.codec import Codec
from merge_algos.discovery import named_classes
from merge_algos.errors import InvalidParams


@cache
def registry() -> Mapping[str, type[Codec]]:
    """name -> class, sorted by name. Pure: the answer is a property of the installed files."""
    return MappingProxyType(named_classes(__name__, __path__))


def find(name: str) -> type[Codec]:
    """Raises InvalidParams, listing the known ones: a codec is a parameter of `rmm`."""
    if name not in registry():
        raise InvalidParams("parameters.codec", f"no codec {name[:100]!r}; there are {', '.join(registry())}")
    return registry()[name]
