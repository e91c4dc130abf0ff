"""Every method that learns its coefficients, discovered: one file, one class with a `name`."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from merge_algos.discovery import named_classes
from merge_algos.learn.method import Learned


@cache
def registry() -> Mapping[str, type[Learned]]:
    """name -> class, sorted by name. Pure: the answer is a property of the installed files."""
    return MappingProxyType(named_classes(__name__, __path__))
