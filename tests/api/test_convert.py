"""An adapter in another format: the same deltas, loadable by that format's tools, a file of its own for ever."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import httpx2
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from asking import preloaded, problem
from hub_server import HubServer
from making import Made, Single, image_deltas, image_factors, make, make_diffusers, make_kohya
from merge_algos import formats
from serving import Server

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMATS = ("peft", "kohya", "diffusers")


def make_peft(seed: int, *, r: int = 2, alpha: float = 4) -> Made:
    tensors = {}
    for module, pair in image_factors(seed, r=r).items():
        tensors |= {f"base_model.model.{module}.lora_{half}.weight": t for half, t in zip("AB", pair, strict=True)}
    return Made(tensors, {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "base_model_name_or_path": "sd_v1"})


# format -> an adapter that came in it, and its deltas
ADAPTERS = {
    "peft": (make_peft(1), image_deltas(1, scaling=2)),
    "kohya": (make_kohya(2, alpha=0.7), image_deltas(2, scaling=0.35)),
    "diffusers": (make_diffusers(3), image_deltas(3)),
}


def get(server: Server, adapter: str, to: str, part: str = WEIGHTS, **headers: str) -> httpx2.Response:
    return server.http.get(f"/adapters/{adapter}/{part}", params={"format": to}, headers=headers)


def converted(server: Server, adapter: str, to: str) -> Made:
    """What a client has after downloading all of it."""
    tensors = load(get(server, adapter, to).raise_for_status().content)
    return Made(tensors, get(server, adapter, to, CONFIG).raise_for_status().json()) if to == "peft" else Single(tensors)


def deltas(made: Made) -> dict[str, Tensor]:
    """Without the component, as `image_deltas` names modules."""
    read = formats.read(None if isinstance(made, Single) else made.config, made.tensors).deltas
    return {name.removeprefix("unet."): delta.B.double() @ delta.A.double() for name, delta in read.items()}


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert sorted(got) == sorted(expected)
    for module, delta in expected.items():
        assert float((got[module] - delta).norm() / delta.norm()) <= tolerance, module


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("came", FORMATS)
def test_every_format_becomes_every_other(server: Server, came: str, to: str) -> None:
    made, expected = ADAPTERS[came]
    assert_close(deltas(converted(server, server.add(made), to)), expected)


@pytest.mark.parametrize("way", [("peft", "kohya", "peft"), ("kohya", "diffusers", "kohya"), ("diffusers", "peft", "diffusers")])
def test_there_and_back_leaves_the_delta(server: Server, way: tuple[str, ...]) -> None:
    made, expected = ADAPTERS[way[0]]
    for to in way[1:]:
        made = converted(server, server.add(made), to)
    assert_close(deltas(made), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_type_stays_and_what_rounding_costs_is_told(server: Server, dtype: torch.dtype) -> None:
    made = make_kohya(4, alpha=0.7, dtype=dtype)
    adapter = server.add(made)
    found = converted(server, adapter, "diffusers")
    assert {tensor.dtype for tensor in found.tensors.values()} == {dtype}
    told = get(server, adapter, "diffusers", "report.json").json()["rounding_error"]
    before, after = deltas(made), deltas(found)
    lost = sum(float((after[m] - before[m]).square().sum()) for m in before)
    assert told == pytest.approx((lost / sum(float(d.square().sum()) for d in before.values())) ** 0.5, rel=0.05)


def test_a_kohya_file_has_one_rank_and_alpha_is_that(server: Server) -> None:
    found = load(get(server, server.add(make_peft(5, r=3)), "kohya").content)
    ranks = {tensor.shape[0] for name, tensor in found.items() if name.endswith("lora_down.weight")}
    assert ranks == {float(tensor) for name, tensor in found.items() if name.endswith(".alpha")} == {3}


def test_a_merge_can_be_had_as_kohya(server: Server) -> None:
    job = server.merge(server.add(make_kohya(6)), server.add(make_peft(7)), dtype="float32")
    one, other = image_deltas(6, scaling=0.5), image_deltas(7, scaling=2)
    assert_close(deltas(converted(server, job["result"]["id"], "kohya")), {module: one[module] + other[module] for module in one})


def test_the_format_it_came_in_is_the_very_file(server: Server) -> None:
    for came, (made, _) in ADAPTERS.items():
        assert get(server, server.add(made), came).content == made.files[WEIGHTS]


# --- a file of its own


@pytest.fixture(scope="module")
def adapter(server: Server) -> str:
    return server.add(ADAPTERS["peft"][0])


def test_its_etag_is_its_own_sha256(server: Server, adapter: str) -> None:
    answer = get(server, adapter, "kohya")
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    assert "immutable" in answer.headers["cache-control"]


def test_asking_twice_gives_the_same_bytes_of_one_adapter(server: Server, adapter: str) -> None:
    first = get(server, adapter, "kohya").content
    count = len(server.http.get("/adapters?limit=200").json()["data"])
    assert get(server, adapter, "kohya").content == first
    assert len(server.http.get("/adapters?limit=200").json()["data"]) == count


def test_two_services_write_the_same_bytes(server: Server, hub_service: Server, adapter: str) -> None:
    other = hub_service.add(ADAPTERS["peft"][0])
    assert get(server, adapter, "kohya").content == get(hub_service, other, "kohya").content


def test_ranges_and_copies_at_hand_are_of_that_file(server: Server, adapter: str) -> None:
    whole = get(server, adapter, "kohya")
    assert get(server, adapter, "kohya", range="bytes=100-199").content == whole.content[100:200]
    assert get(server, adapter, "kohya", **{"if-none-match": whole.headers["etag"]}).status_code == 304


def test_head_tells_what_get_would_send(server: Server, adapter: str) -> None:
    answer = server.http.head(f"/adapters/{adapter}/{WEIGHTS}", params={"format": "kohya"})
    assert answer.headers["etag"] == get(server, adapter, "kohya").headers["etag"]


def test_it_is_an_adapter_that_knows_where_it_came_from(server: Server, adapter: str) -> None:
    get(server, adapter, "diffusers").raise_for_status()
    made = [a for a in server.http.get("/adapters?limit=200").json()["data"] if a["source"] == "conversion"]
    assert adapter in {parent for each in made for parent in each["inputs"]}


def test_only_pefts_format_has_a_config(server: Server, adapter: str) -> None:
    problem(get(server, adapter, "kohya", CONFIG), 404, "unknown-part")


def test_a_private_adapter_stays_private_in_every_format(hub_service: Server, hub: HubServer) -> None:
    hub.add_repo("org/secret-format", make_peft(8).files, private=True, readers=["hf_reader"])
    token = {"x-hub-token": "hf_reader"}
    secret = hub_service.http.post("/adapters", json={"source": "hub:org/secret-format"}, headers=token).json()["id"]
    answer = get(hub_service, secret, "kohya", **token)
    assert answer.status_code == 200 and "private" in answer.headers["cache-control"]
    problem(get(hub_service, secret, "kohya"), 404, "repo-not-found")
    made = hub_service.http.get("/adapters").json()["data"][0]
    problem(hub_service.http.get(made["links"][WEIGHTS]), 404, "repo-not-found")


# --- refusals


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_module_without_a_place_in_the_format_is_named(server: Server, to: str) -> None:
    found = problem(get(server, server.add(make(1)), to), 422, "unsupported-adapter")
    assert "module layers.0." in found["subject"]


def test_a_name_that_no_table_has_stays_in_kohyas_format(server: Server) -> None:
    tensors = {name.replace("mid_block", "some_block"): tensor for name, tensor in make_kohya(9).tensors.items()}
    opaque = server.add(Single(tensors, metadata={"ss_base_model_version": "other"}))
    merged = server.merge(opaque, weights=[2.0], dtype="float32")["result"]["id"]
    assert "lora_unet_some_block_attentions_0_proj_in" in deltas(converted(server, merged, "kohya"))
    assert "lora_unet_some_block" in problem(get(server, merged, "diffusers"), 422, "unsupported-adapter")["subject"]


def test_a_format_that_does_not_exist_is_named(server: Server, adapter: str) -> None:
    assert "query.format" in str(problem(get(server, adapter, "onnx"), 422, "invalid-request")["errors"])


# --- the command line


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convert")


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_the_command_writes_the_file_that_the_server_sends(
    server: Server, adapter: str, tmp_path: Path, data_dir: Path, to: str
) -> None:
    directory, here, there = ADAPTERS["peft"][0].write(tmp_path / "in"), tmp_path / "here.x", tmp_path / "there.x"
    for output, where in ((here, ()), (there, ("--url", server.url))):
        ran = preloaded("convert", directory, output, "--to", to, *where, data_dir=data_dir)
        assert ran.returncode == 0, ran.stderr
    assert here.read_bytes() == there.read_bytes() == get(server, adapter, to).content


@pytest.mark.parametrize("there", [False, True])
def test_the_command_writes_a_directory_for_peft(server: Server, tmp_path: Path, data_dir: Path, there: bool) -> None:
    made, _ = ADAPTERS["kohya"]
    (tmp_path / "in.safetensors").write_bytes(made.files[WEIGHTS])
    where = ("--url", server.url) if there else ()
    ran = preloaded("convert", tmp_path / "in.safetensors", tmp_path / "out", "--to", "peft", *where, data_dir=data_dir)
    assert ran.returncode == 0, ran.stderr
    assert {CONFIG, WEIGHTS} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert load((tmp_path / "out" / WEIGHTS).read_bytes()).keys() == make_peft(2).tensors.keys()


@pytest.mark.parametrize(
    ("output", "to", "mention"),
    [("x", "onnx", "peft, kohya, diffusers"), (".", "kohya", "one file"), ("in.x", "peft", "directory")],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, data_dir: Path, output: str, to: str, mention: str) -> None:
    (tmp_path / "in.x").write_bytes(ADAPTERS["kohya"][0].files[WEIGHTS])
    ran = preloaded("convert", tmp_path / "in.x", tmp_path / output, "--to", to, data_dir=data_dir)
    assert (ran.returncode, mention in ran.stderr, len(ran.stderr.strip().splitlines())) == (2, True, 1), ran.stderr


# --- Flux, whose layers kohya fuses


def make_flux(r: int = 3, d: int = 4) -> Single:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, d_out in (
        ("double_blocks_0_img_attn_qkv", 3 * d),
        ("single_blocks_0_linear1", 7 * d),
        ("double_blocks_0_img_mlp_0", d),
    ):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(r, d, generator=generator)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(d_out, r, generator=generator)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.5)
    return Single(tensors)


def test_what_was_fused_is_fused_again_at_its_rank(server: Server) -> None:
    made = make_flux()
    apart = converted(server, server.add(made), "diffusers")
    again = converted(server, server.add(apart), "kohya")
    assert {name: tensor.shape for name, tensor in again.tensors.items()} == {n: t.shape for n, t in made.tensors.items()}
    assert_close(deltas(again), deltas(made))


def test_what_was_never_fused_is_fused_at_the_sum_of_ranks(server: Server) -> None:
    apart = converted(server, server.add(make_flux()), "diffusers")
    only = {name: tensor * (2 if "to_k.lora_A" in name else 1) for name, tensor in apart.tensors.items() if "to_v" not in name}
    again = converted(server, server.add(Single(only)), "kohya")
    assert again.tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (6, 4)
    got = {name: delta for name, delta in deltas(again).items() if "to_v" not in name}
    assert_close(got, deltas(Single(only)))
    assert not any(delta.any() for name, delta in deltas(again).items() if "to_v" in name)
