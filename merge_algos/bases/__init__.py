"""Every method that makes a reversible basis, discovered: one file, one class with a `name`."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from merge_algos.discovery import named_classes
from merge_algos.protocol import BasisMethod


@cache
def registry() -> Mapping[str, type[BasisMethod]]:
    """name -> class, sorted by name. Pure: the answer is a property of the installed files."""
    return MappingProxyType(named_classes(__name__, __path__))
