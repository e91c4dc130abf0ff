"""What a naming is: how the tensor names of a file split into modules and roles, and where the base model is named."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from merge_algos.formats.spec import AdapterSpec, Layer, Shape
from merge_algos.formats.written import Written

Shapes = Mapping[str, tuple[int, ...]]
OneA = Callable[[Sequence[str]], bool]


def apart(modules: Sequence[str]) -> bool:
    """What is known of factors that were not looked at."""
    return False


class Naming(Protocol):
    """One file in `merge_algos/formats/namings/`. name: as documented."""

    name: ClassVar[str]

    def recognises(self, config: Mapping[str, Any] | None, shapes: Shapes) -> bool:
        """By content, never by the name of a file; so that no two namings claim one adapter."""
        ...

    def describe(self, config: Mapping[str, Any] | None, shapes: Shapes, metadata: Mapping[str, str]) -> AdapterSpec:
        """Raises UnsupportedAdapter naming the tensor or flag that no kind consumes, and what the kinds raise.

        shapes: of every tensor.  metadata: the file's own, whose values are text.
        """
        ...

    def written(
        self, shapes: Mapping[str, Shape], layers: Mapping[str, Layer], ranks: Mapping[str, int], *, one_A: OneA = apart
    ) -> tuple[Written, ...]:
        """The tensors of a file of this naming, of scaling 1. Raises UnsupportedAdapter for a module without a place in it.

        one_A: whether modules that the naming fuses have one and the same A, which is then written once.
        """
        ...
