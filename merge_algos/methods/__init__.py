"""Every merge method, discovered: one file, one class with a `name`, sorted by it."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from merge_algos.errors import UnknownMethod
from merge_algos.protocol import MergeMethod


@cache
def registry() -> Mapping[str, type[MergeMethod]]:
    """name -> class, sorted by name. Pure: the answer is a property of the installed files."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    classes = [c for m in modules for c in vars(m).values() if _is_method(c, m.__name__)]
    return MappingProxyType({c.name: c for c in sorted(classes, key=lambda c: c.name)})


def find(name: str) -> type[MergeMethod]:
    """Raises UnknownMethod, listing the known ones."""
    if name not in registry():
        raise UnknownMethod(name, tuple(registry()))
    return registry()[name]


def _is_method(candidate: object, module: str) -> bool:
    return isinstance(candidate, type) and candidate.__module__ == module and hasattr(candidate, "name")
