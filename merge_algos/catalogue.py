"""Every method by name, whether it makes one adapter or a basis of all, and whether it learns."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from merge_algos import bases, learned, methods
from merge_algos.errors import UnknownMethod
from merge_algos.merge import build_any
from merge_algos.protocol import BasisMethod, MergeMethod


@cache
def registry() -> Mapping[str, type[MergeMethod] | type[BasisMethod]]:
    """name -> class, sorted by name."""
    both: dict[str, type[MergeMethod] | type[BasisMethod]] = {**methods.registry(), **bases.registry(), **learned.registry()}
    return MappingProxyType({name: both[name] for name in sorted(both)})


def find(name: str) -> type[MergeMethod] | type[BasisMethod]:
    """Raises UnknownMethod, listing the known ones."""
    if name not in registry():
        raise UnknownMethod(name, tuple(registry()))
    return registry()[name]


def build(name: str, parameters: Mapping[str, Any]) -> MergeMethod | BasisMethod:
    """The method with these parameters. Raises UnknownMethod, or InvalidParams naming the field."""
    return build_any(find(name), parameters)
