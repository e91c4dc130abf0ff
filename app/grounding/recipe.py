"""Which inputs of a merge are grounded in the base model first, and the recipe of each: the same one is grounded once."""

from collections.abc import Sequence
from dataclasses import replace

from app.errors import InvalidField
from app.extras import merged_specs
from app.recipe import Recipe, RecipeInput
from merge_algos import formats
from merge_algos.formats.spec import AdapterSpec
from merge_algos.formats.together import replicated
from merge_algos.ground import DEFAULT_RULE, Ground

_ANY = "adapter"  # what it is called in the merge is not part of what it is


def is_grounding(recipe: Recipe) -> bool:
    return recipe.method == Ground.name


def ground_recipe(recipe: Recipe, item: RecipeInput) -> Recipe:
    """Of one input of a merge: a plain LoRA in float32, whose type no later rounding regrets. recipe: with a base model."""
    assert recipe.base_model is not None
    return Recipe(
        method=Ground.name,
        method_version=Ground.version,
        parameters={},
        rank=recipe.base_rank or DEFAULT_RULE,
        dtype="float32",
        seed=recipe.seed,
        profile="compact",
        allow_base_mismatch=False,
        adapters=(RecipeInput(item.source, _ANY, 1.0),),
        base_model=recipe.base_model,
    )


def ground_recipes(recipe: Recipe) -> tuple[Recipe, ...]:
    """Of every input, whether it will be grounded or not."""
    return tuple(ground_recipe(recipe, item) for item in recipe.adapters) if recipe.base_model else ()


def to_ground(recipe: Recipe, specs: Sequence[AdapterSpec]) -> tuple[bool, ...]:
    """Which of the inputs need the base model: for a delta, or for a shape that no adapter here says.

    Raises UnsupportedAdapter naming the first module that needs one where none is given, InvalidField for one that nothing needs.
    """
    if recipe.base_model is None:
        refuse_ungrounded(merged_specs(recipe, specs))
        return (False,) * len(specs)
    if any(spec.layer_replication for spec in specs):  # whose modules are counted otherwise than the model's own
        raise replicated("a base_model")
    known = {name for spec in specs for name in spec.shapes}
    needing = tuple(spec.needs_base or any(module.name not in known for module in spec.modules) for spec in specs)
    if not any(needing) and not recipe.tasks:
        raise InvalidField("base_model", f"{recipe.method} does not learn, and no adapter here depends on its weights")
    return needing


def refuse_ungrounded(specs: Sequence[AdapterSpec], *, remedy: str | None = None) -> None:
    """Raises UnsupportedAdapter for the first module whose delta needs the base model's weight. remedy: if it is another."""
    for module in (module for spec in specs for module in spec.modules if module.needs_base):
        error = formats.needs_base(module)
        raise replace(error, remedy=remedy) if remedy else error
