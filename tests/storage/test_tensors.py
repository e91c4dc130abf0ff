"""Foreign safetensors files: hostile ones are refused, sound ones are read as the library reads them, and memory stays flat."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from storage.errors import InvalidTensorFile
from storage.tensors import Header, open_tensors, read_header

SIZE_BYTES = 8


def framed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, SIZE_BYTES), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def built(entries: Mapping[str, Any], data_bytes: int = SIZE_BYTES) -> bytes:
    return framed(json.dumps(entries).encode(), bytes(data_bytes))


def parsed(file: bytes) -> Header:
    return read_header(io.BytesIO(file), len(file))


LORA = {
    "base_model.model.layers.0.q_proj.lora_A.weight": torch.arange(8, dtype=torch.bfloat16).reshape(2, 4),
    "base_model.model.layers.0.q_proj.lora_B.weight": torch.arange(16, dtype=torch.float32).reshape(8, 2),
    "empty": torch.empty(0, 3, dtype=torch.int64),
    "odd": torch.arange(3, dtype=torch.uint8),
    "scalar": torch.tensor(7.0),
}
FILE = save(LORA, metadata={"format": "pt"})


def contents(name: str) -> bytes:
    return bytes(LORA[name].reshape(-1).view(torch.uint8).numpy())


@pytest.fixture(name="lora")
def _lora(tmp_path: Path) -> Path:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(FILE)
    return path


def test_what_is_read_are_the_tensors_bytes(lora: Path) -> None:
    with open_tensors(lora) as file:
        assert all(file.read(name) == contents(name) for name in LORA)
        assert all(b"".join(file.chunks(name)) == contents(name) for name in LORA)


def test_any_part_can_be_read_into_memory_that_is_there(lora: Path) -> None:
    part = bytearray(5)
    with open_tensors(lora) as file:
        file.read_into("base_model.model.layers.0.q_proj.lora_B.weight", memoryview(part)[1:4], start=2)
    assert part == b"\0" + contents("base_model.model.layers.0.q_proj.lora_B.weight")[2:5] + b"\0"


def test_a_map_is_the_tensors_bytes_and_outlives_the_file(lora: Path) -> None:
    with open_tensors(lora) as file:
        mapped = file.mapped("odd")
    assert mapped == contents("odd")
    assert mapped.readonly


def test_threads_read_one_file_side_by_side(lora: Path) -> None:
    with open_tensors(lora) as file, ThreadPoolExecutor(8) as pool:
        names = list(LORA) * 200
        assert list(pool.map(file.read, names)) == [contents(name) for name in names]


def test_a_file_that_is_cut_short_after_it_was_opened_is_an_error(lora: Path) -> None:
    with open_tensors(lora) as file:
        last = list(file.header.tensors)[-1]
        os.truncate(lora, len(FILE) - 1)
        with pytest.raises(InvalidTensorFile, match="ends 1 bytes early") as caught:
            file.read(last)
    assert caught.value.tensor == last


def test_a_file_is_closed_by_hand_or_with_its_last_reader(lora: Path) -> None:
    numbers = Path("/proc/self/fd")
    before = len(list(numbers.iterdir()))
    with open_tensors(lora) as file:
        kept = replace(file)
    with pytest.raises(OSError, match="Bad file descriptor"):
        kept.read("odd")
    file = open_tensors(lora)
    assert len(list(numbers.iterdir())) == before + 1
    del file
    assert len(list(numbers.iterdir())) == before


def test_tensors_come_in_file_order_whatever_the_header_says() -> None:
    header = parsed(built({"b": entry("U8", (4,), (4, 8)), "e": entry("U8", (0,), (4, 4)), "a": entry("U8", (4,), (0, 4))}))
    assert list(header.tensors) == ["a", "e", "b"]


def test_metadata_is_kept() -> None:
    assert parsed(built({"__metadata__": {"format": "pt", "ss_dim": "8"}, "a": entry()})).metadata == {
        "format": "pt",
        "ss_dim": "8",
    }


def test_a_file_without_tensors_is_a_file() -> None:
    assert dict(parsed(framed(b"{}")).tensors) == {}


def test_a_padded_header_is_read() -> None:
    assert parsed(framed(b"{}      ")).data_start == 16


def repeated(*parts: str) -> bytes:
    return framed(("{" + ",".join(parts) + "}").encode(), bytes(SIZE_BYTES))


ONE = json.dumps(entry())
HOSTILE_ENTRIES: dict[str, Any] = {
    "not an object": 7,
    "null": None,
    "no dtype": {"shape": [2], "data_offsets": [0, 8]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 8]},
    "no offsets": {"dtype": "F32", "shape": [2]},
    "unknown key": entry(stride=[1]),
    "unknown dtype": entry("F31"),
    "dtype below a byte": entry("F4", (16,)),
    "lower-case dtype": entry("f32"),
    "dtype not text": entry(32),
    "dtype unhashable": entry(["F32"]),
    "nine dimensions": entry(shape=[2, *[1] * 8]),
    "5000 dimensions": entry(shape=[2, *[1] * 5000]),
    "negative dimension": entry(shape=[-2]),
    "two negative dimensions": entry(shape=[-2, -1]),
    "boolean dimension": entry(shape=[2, True]),
    "float dimension": entry(shape=[2.0]),
    "NaN dimension": entry(shape=[float("nan")]),
    "infinite dimension": entry(shape=[float("inf")]),
    "text dimension": entry(shape=["2"]),
    "shape not a list": entry(shape=2),
    "shape an object": entry(shape={"0": 2}),
    "product that wraps to 8 bytes": entry(shape=[2**62 + 2, 1]),
    "product past 64 bits": entry(shape=[2**40, 2**40]),
    "size larger than the span": entry(shape=[3]),
    "size smaller than the span": entry(shape=[1]),
    "one offset": entry(offsets=[8]),
    "three offsets": entry(offsets=[0, 8, 8]),
    "reversed offsets": entry(offsets=[8, 0]),
    "negative offset": entry(offsets=[-8, 0]),
    "boolean offset": entry(offsets=[False, 8]),
    "float offset": entry(offsets=[0, 8.0]),
    "offsets not a list": entry(offsets="08"),
    "beyond the file": entry(shape=[2**40], offsets=[0, 2**42]),
    "hole at the start": entry(shape=[1], offsets=[4, 8]),
    "bytes left over": entry(shape=[1], offsets=[0, 4]),
}
HOSTILE_NAMES = [
    "",
    "a" * 513,
    "a/b",
    "/etc/passwd",
    "../../x",
    "..",
    "a..b",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\x7fb",
    "a\x1b[31mb",
    "a\u202eb",
]
HOSTILE_FILES = {
    "overlap": built({"a": entry(), "b": entry()}),
    "partial overlap": built({"a": entry("U8", (6,), (0, 6)), "b": entry("U8", (6,), (2, 8))}),
    "hole": built({"a": entry("U8", (2,), (0, 2)), "b": entry("U8", (2,), (6, 8))}),
    "empty tensor out of place": built({"a": entry(), "b": entry("U8", (0,), (3, 3))}),
    "empty tensor past the end": built({"a": entry(), "b": entry("U8", (0,), (9, 9))}),
    "dimension past 64 bits beside a zero": built({"a": entry(shape=[0, 2**64], offsets=[0, 0])}, data_bytes=0),
    "product past 64 bits beside a zero": built({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}, data_bytes=0),
    "data without tensors": framed(b"{}", b"1"),
    "name twice": repeated(f'"a":{ONE}', f'"a":{ONE}'),
    "name twice, once escaped": repeated(f'"a":{ONE}', f'"\\u0061":{ONE}'),
    "metadata twice": repeated('"__metadata__":{}', '"__metadata__":{}', f'"a":{ONE}'),
    "metadata key twice": repeated('"__metadata__":{"k":"1","k":"2"}', f'"a":{ONE}'),
    "entry key twice": repeated('"a":{"dtype":"F16","dtype":"F32","shape":[2],"data_offsets":[0,8]}'),
    "surrogate in a name": repeated(f'"\\ud800":{ONE}'),
    "surrogate in metadata": repeated('"__metadata__":{"k":"\\udc00"}', f'"a":{ONE}'),
    "metadata not text": repeated('"__metadata__":{"k":1}', f'"a":{ONE}'),
    "metadata a list": repeated('"__metadata__":[]', f'"a":{ONE}'),
    "metadata null": repeated('"__metadata__":null', f'"a":{ONE}'),
    "metadata only a tensor": repeated(f'"__metadata__":{ONE}'),
    "header a list": framed(b"[]"),
    "header text": framed(b'"a"'),
    "header empty": framed(b""),
    "header of spaces": framed(b" " * 8),
    "space first": framed(b" {}"),
    "byte order mark": framed(b"\xef\xbb\xbf{}"),
    "not UTF-8": framed(b'{"\xff":1}'),
    "UTF-16": framed("{}".encode("utf-16-le")),
    "not JSON": framed(b"{a:1}"),
    "two values": framed(b"{}{}"),
    "NUL padding": framed(b"{}\0\0\0\0\0\0"),
    "trailing comma": repeated(f'"a":{ONE}', ""),
    "deep lists": framed(b'{"a":' + b"[" * 100_000),
    "deep objects": framed(b'{"a":' * 100_000),
    "deep and closed": framed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "integer of 5000 digits": framed(b'{"a":' + b"9" * 5000 + b"}"),
    "length past the file": (9).to_bytes(8, "little") + b"{}      ",
    "length of all ones": b"\xff" * 8 + b"{}",
    "longer than 16 MiB": framed(b"{}" + b" " * 16 * 1024 * 1024),
}


@pytest.mark.parametrize("hostile", HOSTILE_ENTRIES.values(), ids=HOSTILE_ENTRIES)
def test_a_hostile_entry_is_refused(hostile: Any) -> None:
    with pytest.raises(InvalidTensorFile):
        parsed(built({"a": hostile}))


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_name_that_is_not_plain_is_refused(name: str) -> None:
    with pytest.raises(InvalidTensorFile) as caught:
        parsed(built({name: entry()}))
    assert caught.value.tensor == name


@pytest.mark.parametrize("file", HOSTILE_FILES.values(), ids=HOSTILE_FILES)
def test_a_hostile_file_is_refused(file: bytes) -> None:
    with pytest.raises(InvalidTensorFile):
        parsed(file)


@pytest.mark.parametrize("depth", range(900, 1000, 3))
def test_nesting_near_the_interpreters_limit_is_refused_alike(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    for key in ("dtype", "shape", "data_offsets"):
        fields = {"dtype": '"F32"', "shape": "[2]", "data_offsets": "[0,8]", key: nested}
        with pytest.raises(InvalidTensorFile):
            parsed(repeated('"a":{' + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"))


def test_a_file_of_too_many_tensors_is_refused() -> None:
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    with pytest.raises(InvalidTensorFile, match="100001 tensors"):
        parsed(framed(("{" + ",".join(f'"{at}":{empty}' for at in range(100_001)) + "}").encode()))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    for length in range(len(FILE)):
        path.write_bytes(FILE[:length])
        with pytest.raises(InvalidTensorFile):
            open_tensors(path)


def test_a_header_dear_in_memory_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(InvalidTensorFile, match="more than 400000 lists"):
        parsed(framed(b'{"a":[' + b",".join([b"[]"] * 400_000) + b"]}"))


def test_a_stream_longer_than_announced_is_not_read_past_the_file() -> None:
    with pytest.raises(InvalidTensorFile, match="does not fit"):
        read_header(io.BytesIO(framed(b"{}")), 9)


def test_one_byte_too_many_is_refused() -> None:
    with pytest.raises(InvalidTensorFile):
        parsed(FILE + b"\0")


def test_a_stream_shorter_than_announced_is_refused() -> None:
    with pytest.raises(InvalidTensorFile, match="ends inside its header"):
        read_header(io.BytesIO(FILE[:20]), len(FILE))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["F32", "U8", "F4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.fixed_dictionaries({}, optional={"dtype": JSON, "shape": JSON | st.just([2]), "data_offsets": JSON | st.just([0, 8])})
HEADERS = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), JSON | FIELDS | st.just(entry()), max_size=3)


def refused_or_sound(file: bytes) -> None:
    try:
        header = parsed(file)
    except InvalidTensorFile as error:
        assert str(error)
    else:
        assert header.data_start + sum(info.size_bytes for info in header.tensors.values()) == len(file)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64) | st.binary(max_size=64).map(framed) | st.binary(max_size=64).map(lambda raw: framed(b"{" + raw)))
def test_random_bytes_raise_nothing_else(file: bytes) -> None:
    refused_or_sound(file)


@settings(max_examples=300, deadline=None)
@given(HEADERS, st.integers(0, 16))
def test_random_headers_raise_nothing_else(entries: dict[str, Any], data_bytes: int) -> None:
    refused_or_sound(built(entries, data_bytes))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_flipped_byte_raises_nothing_else(data: st.DataObject) -> None:
    file = bytearray(FILE)
    file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    refused_or_sound(bytes(file))


# Memory

WALK = """
import sys
from pathlib import Path
from storage.tensors import open_tensors

def resident_kb():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

with open_tensors(Path(sys.argv[1])) as file:
    before, peak, kept = resident_kb(), 0, []
    for name in file.header.tensors:
        kept = [file.read(name)] + (kept if sys.argv[2] == "keep" else [])
        peak = max(peak, resident_kb())
print(peak - before)
"""


@pytest.fixture(name="large", scope="module")
def _large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """300 MiB in 20 tensors; the data section is a hole in the file, so that it costs no disk."""
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    size = 15 * 1024 * 1024
    header = built({f"t{at:02}": entry("U8", [size], [at * size, (at + 1) * size]) for at in range(20)}, data_bytes=0)
    path.write_bytes(header)
    with path.open("r+b") as stream:
        stream.truncate(len(header) + 20 * size)
    yield path
    path.unlink()


@pytest.fixture(name="growth_mib")
def _growth_mib(large: Path) -> Callable[[str], float]:
    def walk(mode: str) -> float:
        out = subprocess.run([sys.executable, "-c", WALK, str(large), mode], capture_output=True, text=True, check=True)
        return int(out.stdout) / 1024

    return walk


def test_walking_a_large_file_keeps_memory_flat(growth_mib: Callable[[str], float]) -> None:
    assert growth_mib("let go") < 60


def test_who_keeps_what_was_read_holds_the_whole_file(growth_mib: Callable[[str], float]) -> None:
    assert growth_mib("keep") > 200


def test_reading_and_writing_need_no_torch() -> None:
    code = "import sys, storage.tensors, storage.tensor_writer; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
