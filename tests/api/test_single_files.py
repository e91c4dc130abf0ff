"""One file without a config, as kohya's trainers and diffusers write: in, merged with other namings, and out of bases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from asking import preloaded, problem
from hub_server import HubServer
from making import Made, Single, image_deltas, image_factors, make, make_diffusers, make_kohya
from serving import Server

WEIGHTS = "adapter_model.safetensors"
BASE = "sd_v1"


def peft(seed: int, *, r: int = 2, alpha: float = 4) -> Made:
    """As PEFT saves a LoRA of the UNet alone."""
    tensors = {}
    for module, pair in image_factors(seed, r=r).items():
        tensors |= {f"base_model.model.{module}.lora_{half}.weight": t for half, t in zip("AB", pair, strict=True)}
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "base_model_name_or_path": BASE, "target_modules": ["x"]}
    return Made(tensors, config)


def dense(server: Server, adapter: str) -> dict[str, Tensor]:
    """Module -> B @ A of a merge result, whose scaling is 1."""
    found = load(server.http.get(f"/adapters/{adapter}/{WEIGHTS}").raise_for_status().content)
    halves = {name.removeprefix("base_model.model."): tensor.double().flatten(1) for name, tensor in found.items()}
    modules = {name.rpartition(".lora_")[0] for name in halves}
    return {module: halves[f"{module}.lora_B.weight"] @ halves[f"{module}.lora_A.weight"] for module in modules}


def added(*terms: tuple[float, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {module: sum(weight * deltas[module] for weight, deltas in terms) for module in terms[0][1]}


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(got) == sorted(expected)
    for module, delta in expected.items():
        assert torch.allclose(got[module], delta, rtol=1e-5, atol=1e-5), module


# --- uploads


def test_a_single_file_is_an_adapter(server: Server) -> None:
    view = server.upload(make_kohya(1)).json()
    assert (view["base_model"], view["modules"], view["rank"]) == (BASE, 4, 2)
    assert sorted(view["links"]) == [WEIGHTS, "self"]


def test_its_bytes_come_back(server: Server) -> None:
    made = make_kohya(2)
    assert server.http.get(f"/adapters/{server.add(made)}/{WEIGHTS}").content == made.files[WEIGHTS]


def test_the_same_file_twice_is_one_adapter(server: Server) -> None:
    assert server.add(make_kohya(3)) == server.add(make_kohya(3))


def test_a_base_model_can_be_given(server: Server) -> None:
    views = [server.upload(make_kohya(4, base_model=""), **fields).json() for fields in ({}, {"base_model": "org/base"})]
    assert [view["base_model"] for view in views] == ["", "org/base"]
    assert views[0]["id"] != views[1]["id"]


def test_the_base_model_given_is_the_one_that_merges_compare(server: Server) -> None:
    one = server.upload(make_kohya(5), base_model="org/base").json()["id"]
    other = server.upload(make_diffusers(6), base_model="org/base").json()["id"]
    assert server.merge(one, other)["state"] == "succeeded"
    answer = server.http.post("/merge", json={"adapters": [{"source": one}, {"source": server.add(make_kohya(5))}]})
    problem(answer, 409, "base-model-mismatch")


def test_an_alpha_of_0_is_refused_before_the_file_is_an_adapter(server: Server) -> None:
    assert "alpha" in problem(server.upload(make_kohya(7, alpha=0.0)), 422, "unsupported-adapter")["subject"]


# --- merges


@pytest.mark.parametrize("rank", [None, 6])
def test_every_naming_of_one_model_merges_with_the_others(server: Server, rank: int | None) -> None:
    one, three = server.add(make_kohya(11, alpha=0.5)), server.add(peft(13))
    two = server.upload(make_diffusers(12), base_model=BASE).json()["id"]
    job = server.merge(one, two, three, weights=[0.7, -0.4, 0.3], rank=rank, dtype="float32")
    expected = added((0.7, image_deltas(11, scaling=0.25)), (-0.4, image_deltas(12)), (0.3, image_deltas(13, scaling=2)))
    assert job["state"] == "succeeded", job["error"]
    assert_close(dense(server, job["result"]["id"]), expected)


def make_loha(seed: int, r: int = 2) -> tuple[Single, dict[str, Tensor]]:
    """As LyCORIS saves it, convolutions flattened, alpha 1; and its dense deltas."""
    generator, tensors, dense_ = torch.Generator().manual_seed(seed), {}, {}
    for module, delta in image_deltas(0).items():
        d_out, d_in = delta.shape
        shapes = {"w1_a": (d_out, r), "w1_b": (r, d_in), "w2_a": (d_out, r), "w2_b": (r, d_in)}
        drawn = {half: torch.randn(shape, generator=generator) for half, shape in shapes.items()}
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{name}.hada_{half}": tensor for half, tensor in drawn.items()} | {f"{name}.alpha": torch.tensor(1.0)}
        wide = {half: tensor.double() for half, tensor in drawn.items()}
        dense_[module] = (wide["w1_a"] @ wide["w1_b"]) * (wide["w2_a"] @ wide["w2_b"]) / r
    return Single(tensors, metadata={"ss_base_model_version": BASE}), dense_


def test_kinds_and_namings_merge_together(server: Server) -> None:
    loha, of_loha = make_loha(51)
    rslora = Made(peft(52).tensors, {**peft(52).config, "use_rslora": True})
    inputs = [server.add(made) for made in (make_kohya(53), loha, rslora)]
    job = server.merge(*inputs, weights=[0.5, -1.0, 2.0], dtype="float32")
    assert job["state"] == "succeeded", job["error"]
    terms = (0.5, image_deltas(53, scaling=0.5)), (-1.0, of_loha), (2.0, image_deltas(52, scaling=4 / 2**0.5))
    assert_close(dense(server, job["result"]["id"]), added(*terms))


def test_the_merge_of_a_unet_loads_in_peft(server: Server, tmp_path: Path) -> None:
    import peft as library
    from torch import nn

    job = server.merge(server.add(make_kohya(14)), server.add(make_kohya(15)), dtype="float32")
    directory = server.download(job["result"]["id"], tmp_path)
    model = nn.Module()
    for module, (A, B) in image_factors(0).items():
        layer = nn.Linear(A.shape[1], B.shape[0]) if A.ndim == 2 else nn.Conv2d(A.shape[1], B.shape[0], A.shape[2:])
        here = model
        *parents, last = module.split(".")
        for parent in parents:
            if not hasattr(here, parent):
                here.add_module(parent, nn.Module())
            here = getattr(here, parent)
        here.add_module(last, layer)
    before = {module: model.get_submodule(module).weight.detach().clone() for module in image_factors(0)}
    merged = library.PeftModel.from_pretrained(model, directory).merge_and_unload()
    changed = {module: (merged.get_submodule(module).weight - weight).detach() for module, weight in before.items()}
    expected = added((1.0, image_deltas(14, scaling=0.5)), (1.0, image_deltas(15, scaling=0.5)))
    assert_close({module: delta.double().flatten(1) for module, delta in changed.items()}, expected)


def test_a_merge_result_merges_on(server: Server) -> None:
    first = server.merge(server.add(make_kohya(16)), server.add(make_kohya(17)), dtype="float32")["result"]["id"]
    job = server.merge(first, server.add(make_kohya(18)), dtype="float32")
    scaled = [(1.0, image_deltas(seed, scaling=0.5)) for seed in (16, 17, 18)]
    assert_close(dense(server, job["result"]["id"]), added(*scaled))


def test_the_narrowest_type_is_that_of_the_factors_whatever_alpha_is(server: Server) -> None:
    job = server.merge(server.add(make_kohya(19, dtype=torch.bfloat16)))
    found = load(server.http.get(job["result"]["links"][WEIGHTS]).content)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_names_that_cannot_be_matched_are_refused(server: Server) -> None:
    plain = server.add(make(1, base_model=BASE))
    answer = server.http.post("/merge", json={"adapters": [{"source": server.add(make_kohya(1))}, {"source": plain}]})
    assert "layers.0" in problem(answer, 422, "unsupported-adapter")["subject"]


# --- bases


@pytest.fixture(scope="module")
def verbatim(server: Server) -> dict[str, Any]:
    sources = [server.add(make_kohya(seed)) for seed in (21, 22)]
    return server.merge(*sources, weights=[None, None], method="rmm", parameters={"codec": "lossless"})["result"]


def test_a_basis_gives_the_very_file_back(server: Server, verbatim: Mapping[str, Any]) -> None:
    task = server.http.get(f"/rmm/{verbatim['id']}").json()["tasks"][0]
    made = next(m for m in (make_kohya(21), make_kohya(22)) if server.add(m) == task["input"])
    assert server.http.get(task["links"][WEIGHTS]).content == made.files[WEIGHTS]


def test_it_has_no_config_there_either(server: Server, verbatim: Mapping[str, Any]) -> None:
    task = server.http.get(f"/rmm/{verbatim['id']}").json()["tasks"][0]
    problem(server.http.get(task["links"]["adapter_config.json"]), 404, "unknown-part")


def test_a_mix_of_what_is_kept_verbatim_is_the_sum(server: Server, verbatim: Mapping[str, Any]) -> None:
    tasks = [task["name"] for task in server.http.get(f"/rmm/{verbatim['id']}").json()["tasks"]]
    mixed = server.http.post(f"/rmm/{verbatim['id']}/reconstruct", json={"weights": dict.fromkeys(tasks, 1.0)}).json()
    expected = added(*((1.0, image_deltas(seed, scaling=0.5)) for seed in (21, 22)))
    assert_close(dense(server, mixed["adapter"]["id"]), expected)


# --- the Hub


def hub_import(server: Server, source: str, **fields: Any) -> Any:
    return server.http.post("/adapters", json={"source": source, **fields})


def test_a_repository_of_one_file_is_an_adapter(hub_service: Server, hub: HubServer) -> None:
    file = make_kohya(31).files[WEIGHTS]
    commit = hub.add_repo("org/single", {"pytorch_lora_weights.safetensors": file, "README.md": b"x", "old/x.safetensors": b"y"})
    view = hub_import(hub_service, "hub:org/single").json()
    assert (view["source"], view["base_model"]) == (f"hub:org/single@{commit}", BASE)
    assert hub_service.http.get(view["links"][WEIGHTS]).content == file


def test_the_card_names_the_base_model_where_the_file_does_not(hub_service: Server, hub: HubServer) -> None:
    hub.add_repo("org/card", {"x.safetensors": make_diffusers(32).files[WEIGHTS]}, card={"base_model": ["org/base"]})
    assert hub_import(hub_service, "hub:org/card").json()["base_model"] == "org/base"


@pytest.fixture(scope="module")
def several(hub: HubServer) -> dict[str, bytes]:
    files = {f"{name}.safetensors": make_kohya(seed).files[WEIGHTS] for name, seed in (("a", 33), ("b", 34))}
    hub.add_repo("org/several", {**files, "folder/c.safetensors": make_kohya(35).files[WEIGHTS]})
    return files


def test_a_repository_of_several_files_is_refused_with_the_list(hub_service: Server, several: Mapping[str, bytes]) -> None:
    found = problem(hub_import(hub_service, "hub:org/several"), 422, "several-adapters")
    assert found["files"] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("path", ["b.safetensors", "b.safetensors@main"])
def test_one_of_several_files_can_be_named(hub_service: Server, several: Mapping[str, bytes], path: str) -> None:
    view = hub_import(hub_service, f"hub:org/several/{path}").json()
    assert hub_service.http.get(view["links"][WEIGHTS]).content == several["b.safetensors"]


def test_a_file_in_a_folder_can_be_named(hub_service: Server, several: Mapping[str, bytes]) -> None:
    assert hub_import(hub_service, "hub:org/several/folder").status_code == 201
    assert hub_import(hub_service, "hub:org/several/folder/c.safetensors").status_code == 201


def test_a_file_that_is_not_there_is_named(hub_service: Server, several: Mapping[str, bytes]) -> None:
    found = problem(hub_import(hub_service, "hub:org/several/z.safetensors"), 422, "not-an-adapter")
    assert found["missing"] == "z.safetensors"


def test_a_model_is_no_adapter(hub_service: Server, hub: HubServer) -> None:
    hub.add_repo("org/model", {"model.safetensors": make_kohya(36).files[WEIGHTS], "config.json": b"{}"})
    problem(hub_import(hub_service, "hub:org/model"), 422, "not-an-adapter")


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("hub:org/secret-file", "style.safetensors"),
        ("hub:org/secret-file/style.safetensors", "style.safetensors"),
        ("hub:org/secret-odd", "a style #1.safetensors"),
    ],
)
def test_a_private_file_is_given_only_to_who_may_read_it(hub_service: Server, hub: HubServer, reference: str, name: str) -> None:
    file = make_kohya(37).files[WEIGHTS]
    repo = "/".join(reference.removeprefix("hub:").split("/")[:2])
    hub.add_repo(repo, {name: file}, private=True, readers=["hf_reader"])
    token = {"x-hub-token": "hf_reader"}
    link = hub_service.http.post("/adapters", json={"source": reference}, headers=token).json()["links"][WEIGHTS]
    assert hub_service.http.get(link, headers=token).content == file
    problem(hub_service.http.get(link), 404, "repo-not-found")


def test_a_merge_takes_a_file_from_the_hub(hub_service: Server, hub: HubServer, several: Mapping[str, bytes]) -> None:
    job = hub_service.merge("hub:org/several/a.safetensors", "hub:org/several/b.safetensors", dtype="float32")
    assert job["state"] == "succeeded", job["error"]
    expected = added((1.0, image_deltas(33, scaling=0.5)), (1.0, image_deltas(34, scaling=0.5)))
    assert_close(dense(hub_service, job["result"]["id"]), expected)


# --- the command line


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("single-files")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "style.safetensors", tmp_path / "subject.safetensors"
    for seed, path in enumerate(paths, 41):
        path.write_bytes(make_kohya(seed).files[WEIGHTS])
    return paths


@pytest.mark.parametrize("there", [False, True])
def test_files_are_merged_and_called_as_they_are(
    server: Server, files: tuple[Path, Path], tmp_path: Path, data_dir: Path, there: bool
) -> None:
    where = ("--url", server.url) if there else ()
    ran = preloaded("merge", *files, "-o", tmp_path / "m", *where, data_dir=data_dir)
    assert ran.returncode == 0, ran.stderr
    assert "| style |" in (tmp_path / "m" / "README.md").read_text()


def test_an_import_of_a_file_prints_the_id(server: Server, files: tuple[Path, Path], data_dir: Path) -> None:
    command = ("import", files[0], "--base-model", "org/base")
    there, here = (preloaded(*command, *where, data_dir=data_dir) for where in (("--url", server.url), ()))
    assert here.returncode == there.returncode == 0, here.stderr + there.stderr
    assert here.stdout == there.stdout
    assert server.http.get(f"/adapters/{there.stdout.strip()}").json()["base_model"] == "org/base"


def test_a_base_model_is_only_of_a_file(data_dir: Path) -> None:
    ran = preloaded("import", "hub:org/x", "--base-model", "org/base", data_dir=data_dir)
    assert (ran.returncode, "--base-model" in ran.stderr) == (2, True)
