"""Finding what is written: every class with a `name` in the modules of a package, sorted by that name."""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


def named_classes(package: str, path: Iterable[str]) -> dict[str, Any]:
    """name -> class. A class counts where it is defined, not where it is imported."""
    modules = [importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(path)]
    classes = [c for m in modules for c in vars(m).values() if _is_named(c, m.__name__)]
    return {c.name: c for c in sorted(classes, key=lambda c: c.name)}


def _is_named(candidate: object, module: str) -> bool:
    return isinstance(candidate, type) and candidate.__module__ == module and hasattr(candidate, "name")
