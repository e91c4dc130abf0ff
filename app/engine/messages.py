"""What a child process is asked to do between two checkpoints: values that name their inputs by digest.

A task is answered with a descriptor, so it can run in any process that reaches the store, and running it twice stores the
same bytes once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from storage.digest import Descriptor, Digest


@dataclass(frozen=True, slots=True)
class FetchTask:
    """Bring one pinned source into the store: answers with the manifest of the adapter, or of the base model.

    needed_by: of the base model at least the tensors that this adapter needs.
    """

    source: str
    what: Literal["adapter", "base"] = "adapter"
    needed_by: Digest | None = None
    kind: Literal["fetch"] = "fetch"


@dataclass(frozen=True, slots=True)
class SurveyTask:
    """Look at some modules before any is merged: answers with their findings, pooled, in JSON.

    known: what the rounds before have settled, None in the first.
    """

    recipe: Mapping[str, Any]
    inputs: tuple[Digest, ...]
    modules: Mapping[str, tuple[int, int]]
    weights: Mapping[str, tuple[float, ...]]
    number: int
    known: Any = None
    kind: Literal["survey"] = "survey"


@dataclass(frozen=True, slots=True)
class LearnTask:
    """Train coefficients for a while, from a checkpoint or from the beginning: answers with the next checkpoint, in JSON."""

    recipe: Mapping[str, Any]
    inputs: tuple[Digest, ...]
    base: Digest
    checkpoint: Digest | None
    kind: Literal["learn"] = "learn"


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Merge, extract or ground some modules: answers with a shard: factors in a safetensors blob and their reports in JSON.

    known: what a survey has settled of the whole adapters, None where the method asks for none.  origins: the adapters that
    `inputs` are or were grounded from, one each.
    """

    recipe: Mapping[str, Any]
    inputs: tuple[Digest, ...]
    modules: Mapping[str, tuple[int, int]]
    weights: Mapping[str, tuple[float, ...]]
    number: int
    known: Any = None
    origins: tuple[Digest, ...] = ()
    kind: Literal["shard"] = "shard"


@dataclass(frozen=True, slots=True)
class AssembleTask:
    """Put the shards together, in order: answers with the adapter's manifest.

    learned: the last checkpoint of the training, where there was one.  known: as of ShardTask, where it is to be certified.
    origins: as of ShardTask.
    """

    recipe: Mapping[str, Any]
    inputs: tuple[Digest, ...]
    base_model: str
    shards: tuple[Descriptor, ...]
    learned: Digest | None = None
    known: Any = None
    origins: tuple[Digest, ...] = ()
    kind: Literal["assemble"] = "assemble"


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """Encode some modules of a basis: answers with a shard, as ShardTask. group: the number they will have in the basis."""

    recipe: Mapping[str, Any]
    inputs: tuple[Digest, ...]
    modules: Mapping[str, tuple[int, int]]
    weights: Mapping[str, tuple[float, ...]]
    number: int
    known: Any = None
    group: int = 0
    kind: Literal["encode"] = "encode"


@dataclass(frozen=True, slots=True)
class JoinTask:
    """Put the shards together as a basis, after those of the basis it extends: answers with the basis's manifest.

    origins: as of ShardTask.
    """

    recipe: Mapping[str, Any]
    inputs: tuple[Digest, ...]
    base_model: str
    shards: tuple[Descriptor, ...]
    origins: tuple[Digest, ...] = ()
    kind: Literal["join"] = "join"


Task = FetchTask | LearnTask | SurveyTask | ShardTask | AssembleTask | EncodeTask | JoinTask
