"""Which tensor of a base model is a module's weight, however the checkpoint calls it, and what is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from app.errors import BadBase
from app.grounding.weights import tensor_of
from app.services import Services
from doras import added, dense_doras, difference, norm, recipe_of, run
from merge_algos.errors import NonFiniteTensor, ShapeMismatch
from merge_algos.formats.spec import EMBEDDING, Layer, ModuleSpec
from pairs import in_shards, state_of
from storage.errors import NoBaseModel
from test_grounding import WHOLE, saved

Q = "model.layers.0.self_attn.q_proj.weight"


def module(name: str, layer: Layer = EMBEDDING) -> ModuleSpec:
    return ModuleSpec(name, (4, 4), 2, "LoRA", {}, layer=layer, needs_base=True)


@pytest.mark.parametrize(
    ("name", "tensors", "expected"),
    [
        ("model.up", ["model.up.weight", "up.weight"], "model.up.weight"),
        ("transformer.h.0.attn", ["h.0.attn.weight", "h.1.attn.weight"], "h.0.attn.weight"),
        ("layers.0.up", ["model.layers.0.up.weight", "model.layers.10.up.weight"], "model.layers.0.up.weight"),
        ("unet.mid.conv", ["mid.conv.weight", "mid.conv.bias"], "mid.conv.weight"),
    ],
)
def test_a_weight_is_found_by_its_name_or_by_its_only_tail(name: str, tensors: list[str], expected: str) -> None:
    assert tensor_of(module(name), tensors) == expected


@pytest.mark.parametrize(
    ("name", "tensors", "reason"),
    [
        ("layers.0.up", ["vision.layers.0.up.weight", "text.layers.0.up.weight"], "could be it"),
        ("layers.0.up", ["layers.0.down.weight", "layers.0.up.bias", "startup.weight"], "nothing there is called so"),
        ("layers.0.up", ["model.xlayers.0.up.weight"], "nothing there is called so"),
    ],
)
def test_a_weight_that_is_missing_or_could_be_two_is_refused_by_name(name: str, tensors: list[str], reason: str) -> None:
    with pytest.raises(BadBase, match=rf"module {name} of the adapter needs {name}\.weight, but .*{reason}"):
        tensor_of(module(name), tensors)


def test_experts_are_refused() -> None:
    with pytest.raises(BadBase, match="one expert of several"):
        tensor_of(module("mlp.experts[3]", Layer("expert", experts=8)), [])


# A checkpoint of another class than PEFT wrapped


def changed(models: Path, change: Callable[[dict[str, Tensor]], dict[str, Any]]) -> None:
    save_file(change(state_of(models / "base")), models / "base" / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("rename", [lambda name: name.removeprefix("model."), lambda name: f"language.{name}"])
def test_the_weights_are_found_under_another_prefix(
    services: Services, models: Path, tmp_path: Path, rename: Callable[[str], str]
) -> None:
    exact = dense_doras(models / "base", models / "dora")
    changed(models, lambda state: {rename(name): tensor for name, tensor in state.items()})
    found = saved(services, run(services, recipe_of(services, added(services, models / "dora"), **WHOLE)), tmp_path / "out")
    assert norm(difference(found, exact)) <= 1e-5 * norm(exact)


def test_shards_are_read_as_one_file_is(services: Services, models: Path, tmp_path: Path) -> None:
    exact = dense_doras(models / "base", models / "dora")
    in_shards(models / "base")
    found = saved(services, run(services, recipe_of(services, added(services, models / "dora"), **WHOLE)), tmp_path / "out")
    assert norm(difference(found, exact)) <= 1e-5 * norm(exact)


# Refused: what headers tell at once, what only the weights tell fails the job


def without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != Q}


def narrow(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, Q: state[Q][:, :16].contiguous()}


def quantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, Q: state[Q].to(torch.int8)}


def infinite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, Q: torch.full_like(state[Q], torch.inf)}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (without, BadBase, rf"module model\.layers\.0\.self_attn\.q_proj of the adapter needs {Q}"),
        (narrow, ShapeMismatch, rf"{Q} of the base model: shape \(32, 16\) where \(32, 32\) was expected"),
    ],
)
def test_what_the_header_tells_is_refused_at_once(
    services: Services, models: Path, change: Callable[..., Any], error: type[Exception], said: str
) -> None:
    changed(models, change)
    source = added(services, models / "dora")
    with pytest.raises(error, match=said):
        recipe_of(services, source, **WHOLE)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [(quantised, BadBase, f"{Q} is of type I8"), (infinite, NonFiniteTensor, f"{Q} of the base model holds NaN or Inf")],
)
def test_what_the_weights_tell_fails_the_job(
    services: Services, models: Path, change: Callable[..., Any], error: type[Exception], said: str
) -> None:
    changed(models, change)
    recipe = recipe_of(services, added(services, models / "dora"), **WHOLE)
    with pytest.raises(error, match=said):
        run(services, recipe)


def test_a_gguf_is_refused(services: Services, models: Path) -> None:
    (models / "base" / "model.safetensors").unlink()
    (models / "base" / "model.gguf").write_bytes(b"GGUF and more")
    source = added(services, models / "dora")
    with pytest.raises(NoBaseModel, match="GGUF are quantised"):
        recipe_of(services, source, **WHOLE)
