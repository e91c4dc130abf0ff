"""Adapters of different kinds together: merged they are the sum of PEFT's own deltas, whatever layers they adapt."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from kind_cases import ATTENTION, CONVOLUTIONS, LINEAR, linear, loha, lokr, lora
from making import Made, make
from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats.spec import EMBEDDING, FLAT, AdapterSpec, Layer, ModuleSpec
from merge_algos.formats.spec import LINEAR as LINEAR_LAYER
from merge_algos.formats.together import agreed_shapes, layers_of
from merge_algos.learn.attach import check_modules
from serving import Server
from test_kinds import read
from tiny import Case, forward, llama, mixture, zoo

EVERY_LAYER = [*LINEAR, *CONVOLUTIONS, "words"]
MIX: Mapping[Case, float] = {
    lora("LoRA", target_modules=EVERY_LAYER): 0.7,
    lora("rsLoRA", target_modules=["up", "image", "words"], use_rslora=True, r=3): -1.3,
    loha("LoHa", target_modules=["up", "down", "image"]): 0.9,
    loha("LoHa with cores", target_modules=["square", "wide", "image"], use_effective_conv2d=True): 0.4,
    lokr("LoKr", target_modules=["up", "image", "series"]): -0.6,
    linear("VeRA", "VeRA", peft.VeraConfig): 1.1,
    linear("MiSS", "MiSS", peft.MissConfig): 0.3,
    linear("VB-LoRA", "VB-LoRA", peft.VBLoRAConfig, num_vectors=9, vector_length=4): 0.8,
}


def saved(cases: Mapping[Case, float], directory: Path) -> dict[Case, Path]:
    return {case: case.save(directory / case.label, seed) for seed, case in enumerate(cases)}


def summed(cases: Mapping[Case, float], directories: Mapping[Case, Path]) -> nn.Module:
    """The base in float64 plus every delta as PEFT merges it, one after another."""
    base = zoo().double()
    for case, weight in cases.items():
        for name, delta in case.deltas(directories[case]).items():
            base.get_parameter(name).data += weight * delta
    return base


def through_peft(directory: Path) -> Tensor:
    return lora("merged").through_peft(directory)


@pytest.fixture(scope="module")
def mixed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], nn.Module]:
    directories = saved(MIX, tmp_path_factory.mktemp("mixed"))
    return [server.add(read(directory)) for directory in directories.values()], summed(MIX, directories)


@pytest.mark.parametrize("profile", ["portable", "compact"])
def test_a_mixed_merge_is_the_sum_of_pefts_deltas(
    mixed: tuple[list[str], nn.Module], profile: str, server: Server, tmp_path: Path
) -> None:
    adapters, expected = mixed
    job = server.merge(*adapters, weights=list(MIX.values()), dtype="float32", profile=profile)
    assert job["state"] == "succeeded", job["error"]
    merged, effect = through_peft(server.download(job["result"]["id"], tmp_path)), forward(expected) - forward(zoo().double())
    assert (merged - forward(expected)).norm() <= 1e-5 * effect.norm()


@pytest.mark.parametrize("method", ["pico", "knots", "tsv"])
def test_other_methods_take_a_mixture(mixed: tuple[list[str], nn.Module], method: str, server: Server) -> None:
    job = server.merge(*mixed[0], weights=list(MIX.values()), method=method, rank=4)
    assert job["state"] == "succeeded", job["error"]


PLAIN = {lora("first", target_modules=EVERY_LAYER, r=2): 1.0, lora("second", target_modules=EVERY_LAYER, use_rslora=True): 0.5}


@pytest.mark.parametrize("parameters", [{"codec": "rmm", "p": 1}, {"codec": "lossless"}, {"codec": "truncate", "budget": 3.0}])
def test_a_basis_gives_convolutions_and_embeddings_back(parameters: dict[str, Any], server: Server, tmp_path: Path) -> None:
    directories = saved(PLAIN, tmp_path)
    adapters = [{"source": server.add(read(path)), "name": case.label} for case, path in directories.items()]
    job = server.merge(method="rmm", adapters=adapters, parameters=parameters, dtype="float32")
    assert job["state"] == "succeeded", job["error"]
    for case, directory in directories.items():
        answer = server.http.post(f"/rmm/{job['result']['id']}/reconstruct", json={"task": case.label})
        error = answer.raise_for_status().json()["relative_error"]
        found = through_peft(server.download(answer.json()["adapter"]["id"], tmp_path / f"{case.label} back"))
        assert (found - through_peft(directory)).norm() <= (1e-5 + 3 * error) * found.norm()


@pytest.mark.parametrize("codec", ["rmm", "lossless"])
def test_a_mixture_from_a_basis_is_the_sum(codec: str, server: Server, tmp_path: Path) -> None:
    directories = saved(PLAIN, tmp_path)
    adapters = [{"source": server.add(read(path)), "name": case.label} for case, path in directories.items()]
    parameters = {"codec": codec} | ({"p": 1, "quantize": "none"} if codec == "rmm" else {})
    job = server.merge(method="rmm", adapters=adapters, parameters=parameters, dtype="float32")
    weights = {case.label: weight for case, weight in PLAIN.items()}
    answer = server.http.post(f"/rmm/{job['result']['id']}/reconstruct", json={"weights": weights}).raise_for_status()
    found, error = (
        through_peft(server.download(answer.json()["adapter"]["id"], tmp_path / "back")),
        answer.json()["relative_error"],
    )
    expected = forward(summed(PLAIN, directories))
    assert error <= 1e-2 and (found - expected).norm() <= (1e-5 + 3 * error) * expected.norm()


# --- one layer for every module


def spec(layer: Layer, shape: tuple[int, int] | None = (6, 36), kind: str = "LoRA", **constants: Any) -> AdapterSpec:
    module = ModuleSpec("image", shape, 2, kind, {}, layer=layer, constants=constants)
    return AdapterSpec("org/base", None, None, False, (module,))


CONV = Layer("conv", (3, 3))
ONE_LAYER = [(LINEAR_LAYER, FLAT), (CONV, FLAT), (FLAT, FLAT), (CONV, CONV), (EMBEDDING, EMBEDDING)]
TWO_LAYERS = [
    (LINEAR_LAYER, CONV),
    (LINEAR_LAYER, EMBEDDING),
    (EMBEDDING, FLAT),
    (CONV, Layer("conv", (9, 1))),
    (CONV, Layer("conv", (3, 3, 1))),
    (LINEAR_LAYER, Layer("expert", (), 1, ("image.weight",))),
]


@pytest.mark.parametrize("layers", ONE_LAYER)
@pytest.mark.parametrize("turn", [1, -1])
def test_a_flat_matrix_takes_the_layer_that_another_adapter_has(layers: tuple[Layer, Layer], turn: int) -> None:
    specs = [spec(layer) for layer in layers[::turn]]
    assert layers_of(specs, agreed_shapes(specs)) == {"image": layers[0]}


@pytest.mark.parametrize("layers", TWO_LAYERS)
@pytest.mark.parametrize("turn", [1, -1])
def test_a_module_that_is_two_layers_is_refused_by_name(layers: tuple[Layer, Layer], turn: int) -> None:
    specs = [spec(layer) for layer in layers[::turn]]
    with pytest.raises(ShapeMismatch, match="image"):
        layers_of(specs, agreed_shapes(specs))


@pytest.mark.parametrize("layer", [LINEAR_LAYER, FLAT, EMBEDDING, CONV, Layer("expert", (), 4, ("a.up", "a.down"))])
def test_a_layer_survives_a_basis(layer: Layer) -> None:
    assert Layer.from_json(layer.to_json()) == layer


def test_a_flattened_convolution_is_written_as_the_convolution_that_another_adapter_shows(server: Server, tmp_path: Path) -> None:
    flat, shown = loha("flat", target_modules=["image"], r=2), lora("shown", target_modules=["image"])
    directories = saved({flat: 1.0, shown: 0.0}, tmp_path)
    job = server.merge(*(server.add(read(path)) for path in directories.values()), weights=[1.0, 0.0], dtype="float32")
    merged = through_peft(server.download(job["result"]["id"], tmp_path / "merged"))
    assert torch.allclose(merged, flat.through_peft(directories[flat]), rtol=1e-5)


@pytest.mark.parametrize("kind", ["VeRA", "MiSS", "RandLoRA"])
def test_a_file_that_does_not_say_its_shapes_needs_one_that_does(kind: str, server: Server, tmp_path: Path) -> None:
    makers: dict[str, Any] = {"VeRA": peft.VeraConfig, "MiSS": peft.MissConfig, "RandLoRA": peft.RandLoraConfig}
    adapter = server.add(read(linear(kind, kind, makers[kind]).save(tmp_path)))
    answer = server.http.post("/merge", json={"adapters": [{"source": adapter}]})
    assert answer.status_code == 422, answer.text
    assert "module" in answer.json()["detail"] and "weight 0" in answer.json()["detail"]


@pytest.mark.parametrize(("kind", "constants"), [("VeRA", {"d_out": 6, "widest": 20}), ("MiSS", {"width": 6, "variant": True})])
def test_a_shape_that_its_file_contradicts_is_refused(kind: str, constants: dict[str, Any]) -> None:
    with pytest.raises(ShapeMismatch, match="image"):
        agreed_shapes([spec(LINEAR_LAYER, (7, 12)), spec(LINEAR_LAYER, None, kind, **constants)])


def test_the_refusal_names_the_module_whose_shape_nobody_says() -> None:
    with pytest.raises(UnsupportedAdapter, match="module image: a VeRA file does not say"):
        agreed_shapes([spec(LINEAR_LAYER, None, "VeRA"), replace(spec(LINEAR_LAYER), modules=())])


def test_a_basis_of_convolutions_takes_no_linear_layer_of_the_same_name(server: Server, tmp_path: Path) -> None:
    convolution = server.add(read(lora("conv", target_modules=["point"]).save(tmp_path)))
    linear_layer = server.add(make(shapes={"point": (4, 6)}, base_model=""))
    basis = server.merge(method="rmm", adapters=[{"source": convolution, "name": "one"}])["result"]["id"]
    answer = server.http.post(f"/rmm/{basis}/extend", json={"adapter": {"source": linear_layer, "name": "two"}})
    assert answer.status_code == 422 and "point" in answer.json()["detail"]


@pytest.mark.parametrize(("module", "shape"), [("image", (6, 36)), ("words", (12, 11)), ("first[0]", (10, 8))])
def test_learning_refuses_what_is_no_linear_layer_by_name(module: str, shape: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedAdapter, match=re.escape(f"module {module}")):
        check_modules(mixture() if "[" in module else zoo(), {module: shape})


# --- LoRA-XS, which PEFT does not write itself


def with_latent(directory: Path) -> tuple[Made, Tensor]:
    """A LoRA with a matrix between its factors, as LoRA-XS saves it; and what the base computes with `B R A`."""
    made, generator = read(directory), torch.Generator().manual_seed(5)
    factors = [name for name in made.tensors if name.endswith("lora_B.weight")]
    latents = {name: torch.randn(4, 4, generator=generator) for name in factors}
    folded = {name: made.tensors[name] @ latent for name, latent in latents.items()}
    plain = Made({**made.tensors, **folded}, made.config).write(directory / "folded")
    named = {name.replace("lora_B.weight", "default_lora_latent_mapping.weight"): latent for name, latent in latents.items()}
    return Made({**made.tensors, **named}, made.config), through_peft(plain)


def test_a_latent_matrix_between_the_factors_is_folded_in(server: Server, tmp_path: Path) -> None:
    made, expected = with_latent(lora("LoRA-XS", target_modules=LINEAR).save(tmp_path))
    job = server.merge(server.add(made), dtype="float32")
    assert torch.allclose(through_peft(server.download(job["result"]["id"], tmp_path / "merged")), expected, rtol=1e-5)


def test_indices_beyond_what_they_point_at_are_refused_on_upload(server: Server, tmp_path: Path) -> None:
    config = {"num_vectors": 9, "vector_length": 4, "save_only_topk_weights": True}
    made = read(linear("VB-LoRA", "indices", peft.VBLoRAConfig, **config).save(tmp_path))
    beyond = {name: t + 9 if name.endswith("indices") else t for name, t in made.tensors.items()}
    answer = server.upload(Made(beyond, made.config))
    assert answer.status_code == 422 and "not one of 9" in answer.json()["detail"]


# --- base models with repeated layers

REPEATED = [[0, 2], [1, 2]]


def of_layers(tmp_path: Path, replication: list[list[int]] | None) -> Made:
    config = {"target_modules": ["q_proj"], "layer_replication": replication}
    return read(lora("layers", llama, **config).save(tmp_path / str(replication)))


def refused_for(server: Server, *made: Made, **request: Any) -> str:
    adapters = [{"source": server.add(each)} for each in made]
    answer = server.http.post("/merge", json={"adapters": adapters, **request})
    assert answer.status_code == 422, answer.text
    return str(answer.json()["detail"])


def test_merged_alone_an_adapter_of_repeated_layers_is_the_same_to_peft(server: Server, tmp_path: Path) -> None:
    case = lora("layers", llama, target_modules=ATTENTION, layer_replication=REPEATED)
    original = case.save(tmp_path / "in")
    made = read(original)
    assert any("layers.2." in tensor for tensor in made.tensors)
    job = server.merge(server.add(made), server.add(read(case.save(tmp_path / "b", 9))), weights=[1.0, 0.0], dtype="float32")
    assert job["state"] == "succeeded", job["error"]
    merged, expected = (case.through_peft(each) for each in (server.download(job["result"]["id"], tmp_path / "out"), original))
    assert (merged - expected).norm() <= 1e-5 * (expected - case.through_base()).norm()


def test_adapters_that_count_layers_in_two_ways_are_refused(server: Server, tmp_path: Path) -> None:
    said = refused_for(server, of_layers(tmp_path, REPEATED), of_layers(tmp_path, None))
    assert "layer_replication" in said and "two ways" in said


@pytest.mark.parametrize(("request_", "beside"), [({"method": "rmm"}, "basis"), ({"profile": "vllm"}, "vllm")])
def test_what_knows_only_the_base_as_it_is_refuses_repeated_layers(
    request_: dict[str, Any], beside: str, server: Server, tmp_path: Path
) -> None:
    made = of_layers(tmp_path, REPEATED)
    said = refused_for(server, made, made, **request_)
    assert "layer_replication" in said and beside in said
