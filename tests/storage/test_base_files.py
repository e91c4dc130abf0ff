"""Which files of a folder make a base model, and under which names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.base_files import PLAIN, choose, own_name, require_index_of
from storage.digest import Descriptor, Digest
from storage.errors import NoBaseModel, PickleOnly
from storage.manifest import BaseManifest, named_parts, parts_of

WHOLE = ["config.json", "model.safetensors", "tokenizer.json"]
SHARDED = ["config.json", "model.safetensors.index.json", *(f"model-0000{n}-of-00003.safetensors" for n in (2, 3, 1))]
PART = Descriptor(Digest.of(b"x"), 1, "application/json")


def test_a_whole_model_is_its_known_files() -> None:
    others = ["README.md", "modeling.py", "pytorch_model.bin", "onnx", ".gitattributes"]
    assert choose([*WHOLE, *others], "x") == {name: name for name in WHOLE}


def test_shards_come_with_their_index() -> None:
    assert set(choose(SHARDED, "x")) == set(SHARDED)


def test_one_whole_file_goes_before_shards_and_gguf() -> None:
    assert choose([*SHARDED, *WHOLE, "a.gguf", "b.gguf"], "x") == {name: name for name in WHOLE}


def test_one_gguf_is_kept_under_our_name_and_needs_no_config() -> None:
    assert choose(["tiny-Q4_K_M.gguf", "README.md"], "x") == {"model.gguf": "tiny-Q4_K_M.gguf"}


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl"])
def test_pickles_alone_are_refused_by_name(file: str) -> None:
    with pytest.raises(PickleOnly, match=f"org/x.*{file}.*safetensors"):
        choose(["config.json", file], "hub:org/x")


@pytest.mark.parametrize(
    ("names", "mention"),
    [
        ([], "neither"),
        (["config.json", "README.md"], "neither"),
        (["model.safetensors"], "config.json"),
        ([name for name in SHARDED if "00002-of" not in name], "model-00002-of-00003.safetensors is missing"),
        ([name for name in SHARDED if "index" not in name], "index.json is missing"),
        ([*SHARDED, "model-00001-of-00002.safetensors"], "not one set"),
        (["config.json", "model-00001-of-00000.safetensors"], "not one set"),
        (["config.json", "model-00001-of-99999.safetensors"], "not one set"),
        (["a.gguf", "b.gguf"], "2 GGUF files"),
        (["../a.gguf"], "not plain"),
    ],
)
def test_an_incomplete_model_is_refused_with_the_reason(names: list[str], mention: str) -> None:
    with pytest.raises(NoBaseModel, match=mention):
        choose(names, "x")


@given(st.lists(st.text("model-0123of.safetensorsgguf/\\~", max_size=40) | st.sampled_from([*WHOLE, *SHARDED, *PLAIN])))
def test_whatever_the_names_the_chosen_ones_are_ours(names: list[str]) -> None:
    try:
        chosen = choose(names, "x")
    except (NoBaseModel, PickleOnly):
        return
    assert all(own_name(name) == name for name in chosen)
    assert all("/" not in name and "\\" not in name and ".." not in name for name in chosen)
    assert set(chosen.values()) <= set(names)


@pytest.mark.parametrize(
    "name", ["", "../config.json", "config.json/", "modeling.py", "pytorch_model.bin", "model-1-of-2.safetensors"]
)
def test_no_other_name_is_ours(name: str) -> None:
    with pytest.raises(NoBaseModel):
        own_name(name)


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}, {"a": ["model-00001-of-00003.safetensors"]}])
def test_an_index_without_a_map_of_files_is_refused(weight_map: object) -> None:
    with pytest.raises(NoBaseModel, match="weight_map"):
        require_index_of(weight_map, SHARDED, "x")


@pytest.mark.parametrize("file", ["../../secret", "/etc/passwd", "model-00004-of-00003.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(file: str) -> None:
    with pytest.raises(NoBaseModel, match="none of its shards"):
        require_index_of({"a": SHARDED[2], "b": file}, SHARDED, "x")


def test_a_manifest_reads_back_what_it_writes() -> None:
    manifest = BaseManifest(dict.fromkeys(sorted(SHARDED), PART), "hub:org/x@1")
    assert BaseManifest.from_bytes(manifest.to_bytes()) == manifest
    assert named_parts(manifest.to_bytes()) == manifest.parts
    assert set(parts_of(manifest.to_bytes())) == {PART}


def test_a_manifest_with_a_foreign_name_is_neither_written_nor_read() -> None:
    with pytest.raises(NoBaseModel):
        BaseManifest({"../x": PART}, "x").to_bytes()
    good = BaseManifest({"config.json": PART}, "x").to_bytes()
    with pytest.raises(NoBaseModel):
        BaseManifest.from_bytes(good.replace(b"config.json", b"../../x.py!"))
