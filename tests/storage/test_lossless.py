"""Originals come back byte for byte from the one file that holds them all, and what they share is held once."""

import json
import math
import random
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from making import Made, make
from storage import lossless
from storage.digest import Descriptor, Digest
from storage.errors import DigestMismatch, InvalidTensorFile, StorageError
from storage.lossless import Original, Packing, pack, unpack
from storage.manifest import canonical_json
from storage.memory import MemoryBlobs
from storage.tensor_writer import layout, write
from storage.tensors import ITEM_BYTES, open_tensors

EXAMPLES = sorted(path.parent for path in (Path(__file__).parents[2] / "examples" / "adapters").glob("*/adapter_config.json"))
Files = tuple[bytes, bytes]  # a config and a safetensors file


def safetensors(tensors: dict[str, tuple[str, tuple[int, ...], bytes]], **style: Any) -> bytes:
    """A file whose header is in the order of `tensors`; its data is laid out in the reverse of it."""
    at, entries = 0, {}
    for name, (dtype, shape, data) in reversed(tensors.items()):
        entries[name] = {"data_offsets": [at, at := at + len(data)], "shape": shape, "dtype": dtype}
    entries |= {"__metadata__": style["metadata"]} if "metadata" in style else {}
    ordered = {name: entries[name] for name in (*tensors, *entries)}
    header = json.dumps(ordered, indent=style.get("indent")).encode() + style.get("padding", b"")
    return len(header).to_bytes(8, "little") + header + b"".join(data for _, _, data in reversed(tensors.values()))


def packed(packing: Packing) -> bytes:
    return b"".join(write(layout(packing.specs), packing.chunks))


def packed_bytes(files: list[Files], directory: Path) -> tuple[bytes, bytes]:
    """The packed file, and its layout as it would be written beside it."""
    packing = pack(written(files, directory))
    return packed(packing), canonical_json(packing.layout)


def written(files: list[Files], directory: Path) -> list[Original]:
    for n, (_, weights) in enumerate(files):
        (directory / f"{n}").write_bytes(weights)
    return [Original(config, directory / f"{n}") for n, (config, _) in enumerate(files)]


def views(packing: Packing) -> Callable[[str], bytes]:
    """The tensors as the format's own reader finds them in the packed file."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(packed(packing))
        with open_tensors(Path(file.name)) as tensors:
            return {name: tensors.read(name) for name in tensors.header.tensors}.__getitem__


def restored(packing: Packing) -> list[Files]:
    """By way of JSON, as a reader in another process would get the layout."""
    plan, view = json.loads(canonical_json(packing.layout)), views(packing)
    unpacked = [unpack(plan, task, view) for task in range(len(plan["tasks"]))]
    return [(config, b"".join(chunks)) for config, chunks in unpacked]


def files_of(made: Made) -> Files:
    return made.files["adapter_config.json"], made.files["adapter_model.safetensors"]


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most bytes Python held at once inside the block, beyond what it held before; in the list when it ends."""
    measured: list[int] = []
    tracemalloc.start()
    try:
        yield measured
        measured.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def floats(seed: int, count: int, dtype: torch.dtype) -> bytes:
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return drawn.view(torch.uint8).numpy().tobytes()


NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/\\"), min_size=1, max_size=12).filter(
    lambda name: ".." not in name and name != "__metadata__"
)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, tuple[int, ...], bytes]:
    dtype, shape = draw(st.sampled_from(sorted(ITEM_BYTES))), tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    size_bytes = ITEM_BYTES[dtype] * math.prod(shape)
    filled = st.binary(min_size=1, max_size=8).map(lambda pattern: (pattern * size_bytes)[:size_bytes])
    drawn = st.integers(0, 2).map(lambda seed: random.Random(seed).randbytes(size_bytes))
    return dtype, shape, draw(filled | drawn)


STYLES = st.fixed_dictionaries(
    {},
    optional={
        "padding": st.sampled_from([b" ", b"   ", b"\n\t", b" " * 300]),
        "indent": st.integers(0, 3),
        "metadata": st.dictionaries(NAMES, st.text(max_size=9).filter(lambda text: text.isascii()), max_size=3),
    },
)
WEIGHTS = st.builds(lambda drawn, style: safetensors(drawn, **style), st.dictionaries(NAMES, tensors(), max_size=5), STYLES)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=60), WEIGHTS), max_size=4))
def test_originals_come_back_byte_for_byte(files: list[Files]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        assert restored(pack(written(files, Path(directory)))) == files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adapters_of_every_float_type_come_back_smaller(dtype: torch.dtype, tmp_path: Path) -> None:
    shapes = {"layers.0.q_proj": (512, 256), "layers.0.mlp.up": (768, 256)}
    files = [files_of(make(seed, shapes=shapes, dtype=dtype)) for seed in range(3)]
    packing = pack(written(files, tmp_path))
    assert restored(packing) == files
    assert len(packed(packing)) < 0.95 * sum(len(weights) for _, weights in files)


def test_trained_adapters_come_back_smaller(tmp_path: Path) -> None:
    files = [((d / "adapter_config.json").read_bytes(), (d / "adapter_model.safetensors").read_bytes()) for d in EXAMPLES]
    packing = pack(written(files, tmp_path))
    assert files and restored(packing) == files
    size_bytes = len(packed(packing)) + len(canonical_json(packing.layout))
    assert size_bytes < 0.9 * sum(len(config) + len(weights) for config, weights in files)


@pytest.mark.parametrize("extra", [-8, -1, 0, 1, 8], ids=str)
def test_a_tensor_of_many_blocks_comes_back(extra: int, tmp_path: Path) -> None:
    data = floats(0, lossless.BLOCK_BYTES // 2, torch.float16) + b"\x01" * (lossless.BLOCK_BYTES + extra)
    files = [(b"{}", safetensors({"a": ("U8", (len(data),), data)}))]
    assert restored(pack(written(files, tmp_path))) == files


@pytest.mark.parametrize("seed", [1, 2])
def test_a_shared_tensor_is_held_once(seed: int, tmp_path: Path) -> None:
    shared, own = floats(0, 4000, torch.float32), floats(seed, 4000, torch.float32)
    one = (b"1", safetensors({"a": ("F32", (4000,), shared)}))
    two = (b"2", safetensors({"b": ("F32", (4000,), shared), "c": ("F32", (4000,), own)}))
    alone, _ = packed_bytes([(b"2", two[1])], tmp_path)
    both, _ = packed_bytes([one, two], tmp_path)
    assert len(both) - len(alone) < 500  # a config and a header, not the tensor's 16000 bytes


def test_an_identical_adapter_is_nearly_free(tmp_path: Path) -> None:
    files = files_of(make())
    once, layout_once = packed_bytes([files], tmp_path)
    often, layout_often = packed_bytes([files] * 5, tmp_path)
    assert often == once
    assert len(layout_often) < 4 * len(layout_once)


def test_noise_is_kept_as_it_is(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(50_000)
    (_, _, part) = pack(written([(b"", safetensors({"a": ("I32", (12_500,), noise)}))], tmp_path)).layout["parts"]
    assert part == [[50_000, 50_000]]


def test_runs_cost_next_to_nothing(tmp_path: Path) -> None:
    size_bytes = 4 * 250_000  # float32 that a training never touched
    once, _ = packed_bytes([(b"", safetensors({"a": ("F32", (250_000,), bytes(size_bytes))}))], tmp_path)
    assert len(once) < size_bytes / 100


def test_a_large_tensor_takes_a_few_blocks_of_memory(tmp_path: Path) -> None:
    count = 2 * lossless.BLOCK_BYTES  # 8 blocks of float32
    originals = written([(b"{}", safetensors({"a": ("F32", (count,), bytes(4 * count))}))], tmp_path)
    with peak() as packing_bytes:
        packing = pack(originals)
        sizes = [sum(map(len, packing.chunks(spec.name))) for spec in packing.specs]
    view = views(packing)
    with peak() as unpacking_bytes:
        assert sum(map(len, unpack(packing.layout, 0, view)[1])) > 4 * count
    assert sizes == [spec.size_bytes for spec in packing.specs]
    assert max(packing_bytes + unpacking_bytes) < 5 * lossless.BLOCK_BYTES


def test_packed_tensors_are_plain_bytes_named_after_the_prefix(tmp_path: Path) -> None:
    specs = pack(written([files_of(make())], tmp_path), prefix="braid.2").specs
    assert {spec.dtype for spec in specs} == {"U8"} and {len(spec.shape) for spec in specs} == {1}
    assert [spec.name for spec in specs] == [f"braid.2.blob.{n}" for n in range(len(specs))]


def test_the_same_originals_give_the_same_bytes(tmp_path: Path) -> None:
    files = [files_of(make(seed)) for seed in range(3)]
    assert packed_bytes(files, tmp_path) == packed_bytes(files, tmp_path)


def test_the_layout_describes_every_file(tmp_path: Path) -> None:
    files = [files_of(make(seed)) for seed in range(2)]
    tasks = pack(written(files, tmp_path)).layout["tasks"]
    described = [tuple(Descriptor.from_json(task[key]) for key in ("config", "weights")) for task in tasks]
    assert [tuple((d.digest, d.size_bytes) for d in pair) for pair in described] == [
        tuple((Digest.of(data), len(data)) for data in pair) for pair in files
    ]


def test_only_the_parts_of_the_task_are_read_each_when_its_turn_comes(tmp_path: Path) -> None:
    packing, seen = pack(written([files_of(make(seed)) for seed in range(3)], tmp_path)), []
    task, view = packing.layout["tasks"][1], views(packing)
    names = [f"0.blob.{n}" for n in (*task["config"]["parts"], *task["weights"]["parts"])]
    _, chunks = unpack(packing.layout, 1, lambda name: seen.append(name) or view(name))
    assert seen == names[:1]
    assert [next(chunks) and len(seen) for _ in names[1:]] == list(range(2, len(names) + 1))
    assert seen == names


@pytest.mark.parametrize("data", [b"", b"\x00" * 7, (9).to_bytes(8, "little") + b'{"a": 12}'], ids=["empty", "short", "bad"])
def test_what_the_reader_refuses_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(InvalidTensorFile):
        pack(written([(b"{}", data)], tmp_path))


@pytest.mark.parametrize("prefix", ["a/b", "..", "\x00"], ids=repr)
def test_a_prefix_that_is_not_plain_is_refused(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidTensorFile):
        pack(written([files_of(make())], tmp_path), prefix)


def damaged(packing: Packing, at: int, change: Callable[[bytes, int], bytes]) -> Iterator[bytes]:
    """The first original's bytes, config first, from a file one of whose tensors is changed halfway through."""
    view, name = views(packing), packing.specs[at].name
    config, chunks = unpack(packing.layout, 0, lambda n: change(view(n), len(view(n)) // 2) if n == name else view(n))
    yield from (config, *chunks)


@pytest.mark.parametrize("at", range(4), ids=["config", "header", "a", "b"])
@pytest.mark.parametrize(
    "change",
    [
        lambda data, at: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
        lambda data, at: data[:at],
        lambda data, at: bytes(len(data)),
        lambda data, at: data[:at] + data[at + 1 :] + b"x",
    ],
    ids=["a bit", "cut", "zeros", "shifted"],
)
def test_damage_is_noticed(at: int, change: Callable[[bytes, int], bytes], tmp_path: Path) -> None:
    smooth, noise = floats(0, 5000, torch.bfloat16), random.Random(0).randbytes(5000)
    weights = safetensors({"b": ("BF16", (5000,), smooth), "a": ("U8", (5000,), noise)})
    packing = pack(written([(b'{"r": 8, "alpha": 8, "and so on": 8}', weights)], tmp_path))
    with pytest.raises((InvalidTensorFile, DigestMismatch)):
        list(damaged(packing, at, change))


def test_a_store_keeps_nothing_of_a_damaged_file(tmp_path: Path) -> None:
    packing, blobs = pack(written([files_of(make())], tmp_path)), MemoryBlobs(tmp_path / "blobs")
    pieces = damaged(packing, 3, lambda data, at: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(StorageError):
        blobs.put(pieces, media_type="application/vnd.safetensors")
    assert list(blobs.digests()) == []


def test_a_stream_that_inflates_to_more_than_was_recorded_is_refused(tmp_path: Path) -> None:
    packing = pack(written([(b"", safetensors({"a": ("F32", (25_000,), bytes(100_000))}))], tmp_path))
    *parts, [[size_bytes, *stored]] = packing.layout["parts"]
    shorter = dict(packing.layout) | {"parts": [*parts, [[size_bytes - 4, *stored]]]}
    with pytest.raises(InvalidTensorFile, match="where 24999 are due"):
        list(damaged(replace(packing, layout=shorter), 1, lambda data, at: data))


def test_no_originals_make_an_empty_packing() -> None:
    packing = pack([])
    assert packing.specs == () and restored(packing) == []
