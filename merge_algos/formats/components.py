"""What the modules of image models are called here: `<component>.<path in the diffusers or transformers model>`.

component: as in a diffusers pipeline. Files spell these names in many ways; the tables below say which are known, so that
adapters from different trainers meet in one module. Number segments are `#` in the tables.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats.spec import FLAT, AdapterSpec, Layer

COMPONENTS = frozenset("unet transformer transformer_2 text_encoder text_encoder_2 text_encoder_3".split())

_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
_OPAQUE = re.compile(r"lora_(unet|te\d?|transformer|prior_unet|prior_te)_\w+")

_BLOCKS = ("down_blocks.#", "mid_block", "up_blocks.#")
_ATTENTION = (
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.#.{attn}.{to}" for attn in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v", "to_out.#")),
    *(f"transformer_blocks.#.ff.net.{layer}" for layer in ("#.proj", "#")),
)
_RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")

# Stable Diffusion 1, 2 and XL: UNet2DConditionModel
UNET = (
    "conv_in",
    "conv_out",
    "time_embedding.linear_#",
    "add_embedding.linear_#",
    *(f"{block}.attentions.#.{layer}" for block in _BLOCKS for layer in _ATTENTION),
    *(f"{block}.resnets.#.{layer}" for block in _BLOCKS for layer in _RESNET),
    "down_blocks.#.downsamplers.#.conv",
    "up_blocks.#.upsamplers.#.conv",
)
# FluxTransformer2DModel, and what is laid out like it
FLUX = (
    *(f"transformer_blocks.#.attn.{to}" for to in "to_q to_k to_v to_out.# add_q_proj add_k_proj add_v_proj to_add_out".split()),
    *(f"transformer_blocks.#.{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("#.proj", "#")),
    *(f"transformer_blocks.#.{norm}.linear" for norm in ("norm1", "norm1_context")),
    *(f"single_transformer_blocks.#.{layer}" for layer in "attn.to_q attn.to_k attn.to_v proj_mlp proj_out norm.linear".split()),
    *(f"time_text_embed.{name}_embedder.linear_#" for name in ("timestep", "guidance", "text")),
    *("x_embedder", "context_embedder", "norm_out.linear", "proj_out"),
)
CLIP = (
    *(f"text_model.encoder.layers.#.self_attn.{to}" for to in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *(f"text_model.encoder.layers.#.mlp.{layer}" for layer in ("fc1", "fc2")),
    "text_projection",
)
TABLES: Mapping[str, Sequence[str]] = MappingProxyType(
    {"unet": UNET, "transformer": FLUX, "text_encoder": CLIP, "text_encoder_2": CLIP}
)
_CONVOLUTIONS = re.compile(r"conv_in|conv_out|.+\.(conv1|conv2|conv)")
# the models that PEFT wraps by themselves, so that their names there begin without a component
_ALONE = ("unet", "transformer")


def numbered(name: str) -> tuple[str, list[str]]:
    """The name with `#` for every number segment, and those numbers."""
    return _NUMBER.sub("#", name), _NUMBER.findall(name)


def filled(template: str, numbers: Iterable[str]) -> str:
    """The inverse of `numbered`."""
    left = iter(numbers)
    return re.sub("#", lambda _: next(left), template)


def divided(module: str) -> tuple[str, str]:
    """(component, path in it); no component where the name begins with none."""
    first, _, rest = module.partition(".")
    return (first, rest) if first in COMPONENTS and rest else ("", module)


def is_known(module: str) -> bool:
    """Whether the module of a component is in its table."""
    component, path = divided(module)
    return component in TABLES and numbered(path)[0] in TABLES[component]


def layer_of(module: str, seen: Layer) -> Layer:
    """The layer that a known module is, where its file does not tell a convolution from a linear layer."""
    component, path = divided(module)
    if seen != FLAT or component != "unet" or not is_known(module):
        return seen
    if path.endswith(".conv_shortcut"):
        return Layer("conv", (1, 1))
    return Layer("conv", (3, 3)) if _CONVOLUTIONS.fullmatch(path) else seen


def is_opaque(module: str) -> bool:
    """Whether this is a name as kohya spells it. As a module's it is one that no table resolves: it meets only itself."""
    return _OPAQUE.fullmatch(module) is not None


def component_alone(paths: Iterable[str]) -> str | None:
    """The component whose table has all these paths, at least one of them in its blocks; None where there is none."""
    seen = {numbered(path)[0] for path in paths}
    for component in _ALONE:
        if seen and seen <= set(TABLES[component]) and any("blocks." in path or "mid_block." in path for path in seen):
            return component
    return None


def without_component(modules: Sequence[str]) -> dict[str, str]:
    """Module -> its name for PEFT, which wraps one model: the path alone, where that is enough to know the component again."""
    paths = {module: divided(module)[1] for module in modules}
    component = component_alone(paths.values())
    if component is not None and all(module == f"{component}.{path}" for module, path in paths.items()):
        return paths
    return {module: module for module in modules}


def check_names(adapters: Sequence[AdapterSpec]) -> None:
    """Refuse adapters whose names cannot be matched, because they would be merged as if they had no module in common.

    Raises UnsupportedAdapter naming a module of each.
    """
    for first, second in combinations([_by_kind(adapter) for adapter in adapters], 2):
        for of_first, of_second in (*_NEVER, *(pair[::-1] for pair in _NEVER)):
            if of_first in first and of_second in second:
                raise _unmatched(second[of_second][0], first[of_first][0])
        for of_first, of_second in (("component", "plain"), ("plain", "component")):
            paths = {_path(module): module for module in first.get(of_first, ())}
            for module in second.get(of_second, ()):
                if _path(module) in paths:
                    raise _unmatched(module, paths[_path(module)])


# not `component` beside `plain`, unless they name one path: GPT-2's own modules begin with `transformer.`, too
_NEVER = (("known", "plain"), ("opaque", "plain"), ("opaque", "component"))


def _by_kind(adapter: AdapterSpec) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for module in adapter.modules:
        found.setdefault(_kind(module.name), []).append(module.name)
    return found


def _kind(module: str) -> str:
    if is_opaque(module):
        return "opaque"
    if is_known(module):
        return "known"
    return "component" if divided(module)[0] else "plain"


def _path(module: str) -> str:
    return divided(module)[1].removeprefix("text_model.")


def _unmatched(module: str, other: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"module {module[:200]}",
        f"it may be a module of another adapter, whose names are of another kind ({other[:200]}), and no table here says which",
        "merge adapters whose modules are named alike, or convert one with the tool that made it",
    )
