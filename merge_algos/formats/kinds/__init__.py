"""Every kind of adapter, discovered: one file, one class with a `name`, sorted by it."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from merge_algos.discovery import named_classes
from merge_algos.formats.kind import Kind


@cache
def registry() -> Mapping[str, Kind]:
    """name -> the kind, sorted by name. Pure: the answer is a property of the installed files."""
    return MappingProxyType({name: found() for name, found in named_classes(__name__, __path__).items()})


def of_peft_type(peft_type: object) -> Kind | None:
    """The kind that an `adapter_config.json` names so."""
    return next((kind for kind in registry().values() if peft_type in kind.peft_types), None)
