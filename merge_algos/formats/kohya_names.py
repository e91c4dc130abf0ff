"""How kohya's trainers, and the image tools after them, spell modules: `lora_<prefix>_` and the path with `_` for every dot.

The underscores are undone by the tables of `components`, never by guessing. For SDXL and Flux the path is that of the original
models (`input_blocks_4_1`, `double_blocks_0_img_attn_qkv`), which fuses what diffusers keeps apart: such a module is several
modules here, each a range of its rows.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats.components import CLIP, FLUX, UNET, divided, filled, is_opaque, numbered

Split = Literal["whole", "thirds", "attention and mlp", "halves swapped"]

_BLOCKS_PER_LEVEL = 3  # two residual blocks and what changes the resolution
_LDM_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_LDM_ALONE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_LDM_MIDDLE = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}

_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
_DOUBLE = {
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
    "img_attn_qkv": tuple(f"attn.{to}" for to in _QKV),
    "txt_attn_qkv": tuple(f"attn.{to}" for to in _ADDED_QKV),
}
_SINGLE = {
    "linear1": (*(f"attn.{to}" for to in _QKV), "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_BFL_ALONE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{name}_in_{side}_layer": f"time_text_embed.{embedder}_embedder.linear_{n}"
        for name, embedder in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for n, side in ((1, "in"), (2, "out"))
    },
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}


@dataclass(frozen=True, slots=True)
class Place:
    """The modules that one kohya name stands for, and how its rows are shared out among them."""

    modules: tuple[str, ...]
    split: Split = "whole"


def place(name: str) -> Place:
    """Of a name with its prefix. A name that no table has stands for itself: see `components.is_opaque`."""
    prefix, _, path = name.removeprefix("lora_").partition("_")
    found: Place | None = None
    match prefix:
        case "unet":
            found = _unet(path) or _bfl(path)
        case "te" | "te1":
            found = _from_table("text_encoder", path, _SPELLED_CLIP)
        case "te2":
            found = _from_table("text_encoder_2", path, _SPELLED_CLIP)
        case "transformer":
            found = _from_table("transformer", path, _SPELLED_FLUX)
    return found or Place((name,))


def spelled(modules: Sequence[str]) -> dict[str, Place]:
    """kohya's names of these modules, with what each stands for: the original UNet's for SDXL, the original model's for Flux.

    SDXL is known by its second text encoder or by more than one transformer block in a place; its own trainers read no other
    names, while other loaders read both. Raises UnsupportedAdapter for a module that no table has, and for a transformer that may
    be Stable Diffusion 3's, whose blocks diffusers calls as Flux's and kohya does not.
    """
    xl = any(_is_xl(module) for module in modules)
    of_transformer = [module for module in modules if module.startswith("transformer.")]
    if of_transformer and not any(".single_transformer_blocks." in module for module in of_transformer):
        reason = "without a single block of Flux it may be another model's, which kohya spells in another way"
        raise UnsupportedAdapter(f"module {of_transformer[0][:200]}", reason, "keep it in diffusers' format")
    several = xl or bool(of_transformer)
    found: dict[str, Place] = {}
    for module in modules:
        name = _spell(module, xl=xl, text="te1" if several else "te")
        where = place(name)
        if module not in where.modules or not is_opaque(name):
            reason = "no table here has its kohya name"
            raise UnsupportedAdapter(f"module {module[:200]}", reason, "keep it in the format it came in")
        found[name] = where
    return found


def rows_in_all(where: Place, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Rows of the fused layer. shapes: of the modules that are there."""
    d_out, d_in = next(shapes[module] for module in where.modules if module in shapes)
    if where.split == "attention and mlp":
        # FluxTransformer2DModel's mlp_ratio is 4 and no setting
        return 3 * d_in + (shapes[where.modules[-1]][0] if where.modules[-1] in shapes else 4 * d_in)
    return d_out * len(where.modules)


def rows(split: Split, shape: tuple[int, int]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """For each module of a place its (start, stop) row ranges of a delta of this shape; none where it cannot be split so."""
    d_out, d_in = shape
    if split == "thirds" and d_out % 3 == 0:
        return tuple(((n * d_out // 3, (n + 1) * d_out // 3),) for n in range(3))
    if split == "attention and mlp" and d_out > 3 * d_in:
        return (*(((n * d_in, (n + 1) * d_in),) for n in range(3)), ((3 * d_in, d_out),))
    if split == "halves swapped" and d_out % 2 == 0:  # shift and scale are in another order than in diffusers
        return (((d_out // 2, d_out), (0, d_out // 2)),)
    return (((0, d_out),),) if split == "whole" else ()


def _is_xl(module: str) -> bool:
    component, path = divided(module)
    deep = re.search(r"attentions\.\d+\.transformer_blocks\.[1-9]", path) is not None
    return component == "text_encoder_2" or (component == "unet" and (deep or path.startswith("add_embedding.")))


def _spell(module: str, *, xl: bool, text: str) -> str:
    component, path = divided(module)
    match component:
        case "unet":
            return f"lora_unet_{(_to_ldm(path) if xl else None) or path.replace('.', '_')}"
        case "transformer":
            return f"lora_unet_{_to_bfl(path)}"
        case "text_encoder" | "text_encoder_2":
            return f"lora_{text if component == 'text_encoder' else 'te2'}_{path.replace('.', '_')}"
    return module


def _to_ldm(path: str) -> str | None:
    """The inverse of `_from_ldm`, for SDXL."""
    flat = path.replace(".", "_")
    alone = {here: there for there, here in _LDM_ALONE.items()}
    if flat in alone:
        return alone[flat]
    found = re.fullmatch(r"(?:(down|up)_blocks_(\d+)|mid_block)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_(.+)", flat)
    if found is None:
        return None
    way, level, part, layer, rest = found.groups()
    inner = {"resnets": 0, "attentions": 1}.get(part)
    rest = {here: there for there, here in _LDM_RESNET.items()}.get(rest, rest)
    if way is None:
        return f"middle_block_{2 * int(layer) + (inner or 0)}_{rest}"
    first = _BLOCKS_PER_LEVEL * int(level)
    if part == "downsamplers":
        return f"input_blocks_{first + 3}_0_op"
    if part == "upsamplers":
        return f"output_blocks_{first + 2}_2_conv"  # behind the attention that every SDXL level with an upsampler has
    return f"{'input' if way == 'down' else 'output'}_blocks_{first + int(layer) + (way == 'down')}_{inner}_{rest}"


def _to_bfl(path: str) -> str | None:
    """The inverse of `_bfl`."""
    alone = {here: there for there, here in _BFL_ALONE.items()}
    found = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", path)
    if found is None:
        return alone.get(path)
    single, block, rest = found.groups()
    kind, table = ("single", _SINGLE) if single else ("double", _DOUBLE)
    layer = next((layer for layer, modules in table.items() if rest in modules), None)
    return f"{kind}_blocks_{block}_{layer}"


def _spelled(table: tuple[str, ...]) -> Mapping[str, str]:
    return MappingProxyType({template.replace(".", "_"): template for template in table})


_SPELLED_UNET, _SPELLED_CLIP, _SPELLED_FLUX = _spelled(UNET), _spelled(CLIP), _spelled(FLUX)


def _from_table(component: str, path: str, table: Mapping[str, str]) -> Place | None:
    template, numbers = numbered(path)
    return Place((f"{component}.{filled(table[template], numbers)}",)) if template in table else None


def _unet(path: str) -> Place | None:
    return _from_table("unet", _from_ldm(path) or path, _SPELLED_UNET)


def _from_ldm(path: str) -> str | None:
    """The path in the original UNet of Stable Diffusion (two residual blocks per level) as diffusers has it."""
    if path in _LDM_ALONE:
        return _LDM_ALONE[path]
    found = re.fullmatch(r"(input_blocks|output_blocks|middle_block)_(\d+)_(?:(\d+)_)?(.+)", path)
    if found is None:
        return None
    where, block, inner, rest = found.groups()
    if where == "middle_block":
        rest = f"{inner}_{rest}" if inner else rest
        part = _LDM_MIDDLE.get(block)
        return f"mid_block_{part}_{_LDM_RESNET.get(rest, rest)}" if part else None
    return _level(where, int(block), inner or "", rest)


def _level(where: str, block: int, inner: str, rest: str) -> str | None:
    down = where == "input_blocks"
    level, layer = divmod(block - 1 if down else block, _BLOCKS_PER_LEVEL)
    if rest == "op" and down:
        return f"down_blocks_{level}_downsamplers_0_conv"
    if rest == "conv" and not down:
        return f"up_blocks_{level}_upsamplers_0_conv"
    part = {"0": "resnets", "1": "attentions"}.get(inner)
    return f"{'down' if down else 'up'}_blocks_{level}_{part}_{layer}_{_LDM_RESNET.get(rest, rest)}" if part else None


def _bfl(path: str) -> Place | None:
    """The path in Black Forest Labs' own Flux as diffusers has it."""
    if path in _BFL_ALONE:
        swapped = path.startswith("final_layer_adaLN")
        return Place((f"transformer.{_BFL_ALONE[path]}",), "halves swapped" if swapped else "whole")
    found = re.fullmatch(r"(double|single)_blocks_(\d+)_(\w+)", path)
    if found is None:
        return None
    kind, block, layer = found.groups()
    modules = (_DOUBLE if kind == "double" else _SINGLE).get(layer)
    if modules is None:
        return None
    blocks = "transformer_blocks" if kind == "double" else "single_transformer_blocks"
    split: Split = "whole" if len(modules) == 1 else "thirds" if len(modules) == 3 else "attention and mlp"
    return Place(tuple(f"transformer.{blocks}.{block}.{module}" for module in modules), split)
