"""Files of image models against diffusers' own loader: the weights after fusing are the base plus the deltas read here."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from image_models import fused, layers, pipeline
from merge_algos import formats
from merge_algos.formats import components, namings
from merge_algos.formats.kohya_names import spelled
from merge_algos.formats.written import Written, factor_names, joined

pytestmark = pytest.mark.filterwarnings("ignore")
R = 3
CLOSE = 1e-5

Deltas = Mapping[str, Tensor]
Pair = tuple[Tensor, Tensor]


def factors(name: str, chosen: Callable[[str], bool] = lambda module: True, seed: int = 0) -> dict[str, Pair]:
    """Module -> random (A, B) as a layer of its kind has them, for every layer of the pipeline that is chosen."""
    generator = torch.Generator().manual_seed(seed)

    def pair(layer: nn.Module) -> Pair:
        d_out, *d_in = layer.weight.shape
        ones = [1] * (len(d_in) - 1)
        return torch.randn(R, *d_in, generator=generator), torch.randn(d_out, R, *ones, generator=generator)

    modules = ((f"{component}.{path}", layer) for component, path, layer in layers(name))
    return {module: pair(layer) for module, layer in modules if chosen(module)}


def apart(got: Deltas, expected: Deltas) -> float:
    """The largest difference of an entry; the modules are the same."""
    assert sorted(got) == sorted(expected)
    return max(float((got[m].reshape(expected[m].shape) - expected[m]).abs().max()) for m in expected)


def read(file: Path) -> dict[str, Tensor]:
    """Module -> the dense delta as we read the file."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        spec = formats.describe(None, {name: tuple(t.shape) for name, t in tensors.items()}, opened.metadata())
    deltas = {m.name: formats.load(m, {role: tensors[name] for role, name in m.tensors.items()}) for m in spec.modules}
    return {name: delta.B.double() @ delta.A.double() for name, delta in deltas.items()}


def save(tensors: Mapping[str, Tensor], file: Path, **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt", **metadata})
    return file


def kohya(pairs: Mapping[str, Pair], alpha: float = 1.5) -> dict[str, Tensor]:
    """As kohya's trainer writes it for the model at hand: its names with `_` for every dot."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
    tensors = {}
    for module, (A, B) in pairs.items():
        component, path = components.divided(module)
        name = prefixes[component] + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(alpha)}
    return tensors


def is_attention(module: str) -> bool:
    return module.rpartition(".")[2] in {"to_q", "to_k", "to_v", "0", "q_proj", "k_proj", "v_proj", "out_proj"}


# --- in


def test_every_layer_of_the_models_has_a_name_here() -> None:
    unknown = [f"{c}.{path}" for name in ("sd", "sdxl", "flux") for c, path, _ in layers(name)]
    assert [module for module in unknown if not components.is_known(module)] == []


def test_a_kohya_file_of_stable_diffusion_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    file = save(kohya(factors("sd")), tmp_path / "kohya.safetensors")
    assert apart(read(file), fused("sd", file)) <= CLOSE


def test_a_kohya_file_of_sdxl_with_the_original_names_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    pairs = factors("sdxl", lambda module: "text_projection" not in module)
    names = {where.modules[0]: name for name, where in spelled(tuple(pairs)).items()}
    assert any("input_blocks" in name for name in names.values())
    tensors = {}
    for module, (A, B) in pairs.items():
        name = names[module]
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(1.5)}
    file = save(tensors, tmp_path / "kohya.safetensors")
    assert apart(read(file), fused("sdxl", file)) <= CLOSE


def trained(name: str, tmp_path: Path, *, told: bool, **config: Any) -> Path:
    """As diffusers' training scripts save: adapters through PEFT, `save_lora_weights`. told: with the config as metadata."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    loaded, saved = pipeline(name), {}
    generator = torch.Generator().manual_seed(1)
    parts = {"text_encoder": loaded.text_encoder, ("transformer" if name == "flux" else "unet"): None}
    for part in parts:
        model = getattr(loaded, part)
        targets = ["q_proj", "out_proj"] if part == "text_encoder" else ["to_q", "to_out.0"]
        model.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=targets, **config))
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data.normal_(generator=generator)
        state = get_peft_model_state_dict(model)
        saved[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state) if part == "text_encoder" else state
    told_by = _collate_lora_metadata({part: getattr(loaded, part) for part in parts}) if told else {}
    type(loaded).save_lora_weights(tmp_path, **saved, **told_by)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        assert (LORA_ADAPTER_METADATA_KEY in opened.metadata()) == told
    return file


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
@pytest.mark.parametrize("told", [False, True])
def test_a_file_that_diffusers_saved_is_what_it_loads(tmp_path: Path, name: str, told: bool) -> None:
    file = trained(name, tmp_path, told=told, lora_alpha=8)
    assert apart(read(file), fused(name, file)) <= CLOSE


def test_the_config_in_the_metadata_scales(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = (read(trained("sd", tmp_path / n, told=True, lora_alpha=alpha)) for n, alpha in (("a", 4), ("b", 8)))
    assert apart(other, {module: 2 * delta for module, delta in one.items()}) <= CLOSE


# --- out


def written_as(naming: str, pairs: Mapping[str, Pair], file: Path) -> Path:
    """The factors in a file of that naming."""
    halves: dict[str, Tensor] = {}
    tensors = {f"{module}.lora_{half}.weight": t for module, pair in pairs.items() for half, t in zip("AB", pair, strict=True)}
    spec = formats.describe(None, {name: tuple(t.shape) for name, t in tensors.items()})
    for module, (A, B) in pairs.items():
        halves |= zip(factor_names(module), (A.flatten(1), B.flatten(1)), strict=True)
    parts = namings.registry()[naming].written(spec.shapes, spec.layers, {module.name: module.r for module in spec.modules})
    return save({part.name: made(part, halves) for part in parts}, file)


def made(part: Written, halves: Mapping[str, Tensor]) -> Tensor:
    return joined(part, [halves[factor] for factor in part.factors])


def dense(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    return {module: B.double().flatten(1) @ A.double().flatten(1) for module, (A, B) in pairs.items()}


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_what_is_written_loads_as_the_base_plus_the_deltas(tmp_path: Path, name: str, naming: str) -> None:
    pairs = factors(name, lambda module: "text_projection" not in module)
    file = written_as(naming, pairs, tmp_path / "out.safetensors")
    assert apart(fused(name, file), dense(pairs)) <= CLOSE


def test_what_is_written_of_flux_loads_as_the_base_plus_the_deltas(tmp_path: Path) -> None:
    # diffusers' loader shares out kohya's fused single blocks by the width of the real model only, so a tiny one has none of them
    pairs = factors("flux", lambda module: ".transformer_blocks" in module or "single_transformer_blocks.0.proj_out" in module)
    file = written_as("kohya", pairs, tmp_path / "out.safetensors")
    assert apart(fused("flux", file), dense(pairs)) <= CLOSE


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_what_is_written_reads_back(tmp_path: Path, name: str, naming: str) -> None:
    pairs = factors(name)
    assert apart(read(written_as(naming, pairs, tmp_path / "out.safetensors")), dense(pairs)) <= CLOSE


def test_what_is_written_holds_no_metadata_but_the_format(tmp_path: Path) -> None:
    with safe_open(written_as("kohya", factors("sd", is_attention), tmp_path / "out.safetensors"), "pt") as opened:
        assert json.dumps(opened.metadata()) == '{"format": "pt"}'
