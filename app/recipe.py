"""The recipe: everything that decides a merge's bytes, with every default written out and every source pinned.

Its canonical JSON has one digest, and that digest is the job's id: the same recipe is the same job.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from merge_algos.errors import BadPattern
from merge_algos.patterns import matching
from merge_algos.rank import RankRule
from storage.digest import Digest
from storage.manifest import canonical_json

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Profile = Literal["portable", "compact", "vllm"]
REFUSE_EXTRAS = "refuse"
# left out of the JSON where there is none, so that a recipe without it keeps its digest
_ABSENT = ("extends", "base_model", "tasks", "models", "base_rank")


@dataclass(frozen=True, slots=True)
class RecipeInput:
    """One adapter of a recipe. source: `hub:org/name@<commit>` or `sha256:<manifest>`.

    weights_by_module: (pattern, weight) pairs that replace `weight` in the modules the pattern is found in.
    """

    source: str
    name: str
    weight: float
    weights_by_module: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RecipeStep:
    """A post-step: by name, version and parameters with every default written out."""

    name: str
    version: int
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RecipeTask:
    """What coefficients are learned for. data: blobs of rows.  text, label, prompt: their columns.  head: a blob, or None.

    forget: lose this task's skill instead.  restricted: Hub sources of the data that not everybody may read.
    """

    name: str
    weight: float
    data: tuple[str, ...]
    text: str
    label: str | None = None
    prompt: str | None = None
    head: str | None = None
    forget: bool = False
    restricted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RecipeModels:
    """Two models whose difference becomes an adapter, pinned as `Recipe.base_model` is.

    base_model: what the adapter calls the base.
    """

    base: str
    tuned: str
    base_model: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge as a value. dtype `auto` is the widest dtype among the inputs, which is itself a function of the recipe.

    extends: the basis that these adapters are added to.  base_model: `hub:org/name@<commit>` or `sha256:<manifest>`, where
    coefficients are learned or inputs need its weights.  base_rank: what such inputs are cut to; None is the default.  models:
    what an adapter is extracted from, in place of merged adapters.  extras: what becomes of what its inputs hold beside deltas,
    `refuse`, `average` or `from:<name of an adapter>`.
    """

    method: str
    method_version: int
    parameters: Mapping[str, Any]
    rank: RankRule
    dtype: Dtype
    seed: int
    profile: Profile
    allow_base_mismatch: bool
    adapters: tuple[RecipeInput, ...]
    post: tuple[RecipeStep, ...] = ()
    extends: str | None = None
    base_model: str | None = None
    tasks: tuple[RecipeTask, ...] = ()
    models: RecipeModels | None = None
    base_rank: RankRule | None = None
    extras: str = REFUSE_EXTRAS

    def to_json(self) -> dict[str, Any]:
        given = {k: v for k, v in asdict(self).items() if (v or k not in _ABSENT) and (k, v) != ("extras", REFUSE_EXTRAS)}
        lists = {"adapters": [_input_json(item) for item in self.adapters], "post": [asdict(step) for step in self.post]}
        tasks = [{**asdict(task), "data": list(task.data), "restricted": list(task.restricted)} for task in self.tasks]
        return {"schema": 1, **given, **lists, **({"tasks": tasks} if tasks else {})}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        fields = {name: value for name, value in data.items() if name != "schema"}
        inputs = tuple(_input(item) for item in data["adapters"])
        steps = tuple(RecipeStep(**step) for step in data["post"])
        tasks = tuple(map(_task, data.get("tasks", ())))
        models = RecipeModels(**data["models"]) if "models" in data else None
        rules = {name: RankRule(**data[name]) for name in ("rank", "base_rank") if name in data}
        return cls(**{**fields, **rules, "adapters": inputs, "post": steps, "tasks": tasks, "models": models})

    @property
    def digest(self) -> Digest:
        return Digest.of(canonical_json(self.to_json()))


def module_weights(inputs: Sequence[RecipeInput], modules: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Module -> one weight per adapter.

    Raises BadPattern for a pattern that matches no module (a typo would otherwise pass silently), and for two patterns
    that give one module different weights (JSON objects have no order that could decide).
    """
    columns = [_column(item, modules) for item in inputs]
    return {module: tuple(column[module] for column in columns) for module in modules}


def _column(item: RecipeInput, modules: Sequence[str]) -> dict[str, float]:
    chosen: dict[str, float] = {}
    for pattern, weight in item.weights_by_module:
        matched = matching(pattern, modules)
        if not matched:
            raise BadPattern(pattern, f"matches no module of this merge (adapter {item.name})")
        for module in matched:
            if chosen.setdefault(module, weight) != weight:
                raise BadPattern(pattern, f"gives {module} the weight {weight}, another pattern gives it {chosen[module]}")
    return {module: chosen.get(module, item.weight) for module in modules}


def _input_json(item: RecipeInput) -> dict[str, Any]:
    return {**asdict(item), "weights_by_module": [list(pair) for pair in item.weights_by_module]}


def _task(data: Mapping[str, Any]) -> RecipeTask:
    return RecipeTask(**{**data, "data": tuple(data["data"]), "restricted": tuple(data["restricted"])})


def _input(data: Mapping[str, Any]) -> RecipeInput:
    pairs = tuple((str(pattern), float(weight)) for pattern, weight in data["weights_by_module"])
    return RecipeInput(data["source"], data["name"], float(data["weight"]), pairs)
