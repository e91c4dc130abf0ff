"""Written safetensors files are byte for byte the library's, whatever the order of the specs, and leave in small pieces."""

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from storage.errors import InvalidTensorFile
from storage.tensor_writer import PIECE_BYTES, TensorSpec, layout, write
from storage.tensors import ITEM_BYTES, read_header

TORCH_DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def contents(spec: TensorSpec) -> bytes:
    """Bytes that depend on the name, so that swapped tensors are noticed."""
    seed = sum(spec.name.encode()) % 251
    return bytes((seed + at) % 256 for at in range(spec.size_bytes))


def as_torch(spec: TensorSpec) -> torch.Tensor:
    dtype = TORCH_DTYPES[spec.dtype]
    if spec.size_bytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(bytearray(contents(spec)), dtype=dtype).reshape(spec.shape)


def written(specs: list[TensorSpec]) -> bytes:
    by_name = {spec.name: spec for spec in specs}
    return b"".join(write(layout(specs), lambda name: [contents(by_name[name])]))


def by_library(specs: list[TensorSpec]) -> bytes:
    return save({spec.name: as_torch(spec) for spec in specs}, metadata={"format": "pt"})


NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/\\"), min_size=1, max_size=12).filter(
    lambda name: ".." not in name and name != "__metadata__"
)
SPECS = st.lists(
    st.builds(TensorSpec, NAMES, st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
    max_size=8,
    unique_by=lambda spec: spec.name,
)
LORA = [
    TensorSpec("base_model.model.layers.0.q_proj.lora_B.weight", "BF16", (8, 2)),
    TensorSpec("base_model.model.layers.0.q_proj.lora_A.weight", "BF16", (2, 4)),
    TensorSpec("base_model.model.layers.10.q_proj.lora_A.weight", "F32", (2, 4)),
    TensorSpec("base_model.model.layers.2.q_proj.lora_A.weight", "F16", (2, 4)),
    TensorSpec("empty", "I64", (0, 3)),
    TensorSpec("scalar", "F32", ()),
]


@settings(max_examples=150, deadline=None)
@given(SPECS)
def test_written_bytes_are_the_librarys(specs: list[TensorSpec]) -> None:
    assert written(specs) == by_library(specs)


@settings(max_examples=100, deadline=None)
@given(SPECS.flatmap(lambda specs: st.tuples(st.just(specs), st.permutations(specs))))
def test_layout_does_not_depend_on_the_order_of_the_specs(pair: tuple[list[TensorSpec], list[TensorSpec]]) -> None:
    assert layout(pair[0]) == layout(pair[1])


def test_every_dtype_is_ordered_as_the_library_orders_it() -> None:
    specs = [TensorSpec(f"{at:02}{dtype}", dtype, (3,)) for at, dtype in enumerate(reversed(ITEM_BYTES))]
    assert written(specs) == by_library(specs)


def test_every_dtype_has_the_size_torch_gives_it() -> None:
    assert {dtype: TORCH_DTYPES[dtype].itemsize for dtype in ITEM_BYTES} == dict(ITEM_BYTES)


def test_save_file_writes_the_same_file(tmp_path: Path) -> None:
    save_file({spec.name: as_torch(spec) for spec in LORA}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "theirs").read_bytes() == written(LORA)


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "ours").write_bytes(written(LORA))
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(spec.name).nan_to_num(), as_torch(spec).nan_to_num()) for spec in LORA)


def test_layout_knows_the_size_of_the_file() -> None:
    assert layout(LORA).size_bytes == len(written(LORA))


def test_each_tensor_is_asked_for_only_when_its_turn_comes() -> None:
    plan, asked = layout([TensorSpec("a", "U8", (2,)), TensorSpec("b", "U8", (1,))]), []

    def give(name: str) -> list[bytes]:
        asked.append(name)
        return [b"xy"] if name == "a" else [b"z"]

    seen = [(piece, tuple(asked)) for piece in write(plan, give)]
    assert seen == [(plan.header, ()), (b"xy", ("a",)), (b"z", ("a", "b"))]


def test_a_large_chunk_leaves_in_small_pieces() -> None:
    plan = layout([TensorSpec("a", "F32", (PIECE_BYTES,))])
    lengths = [len(piece) for piece in write(plan, lambda _: [torch.zeros(PIECE_BYTES).numpy().data])]
    assert lengths == [len(plan.header), *[PIECE_BYTES] * 4]


@pytest.mark.parametrize(
    "chunks",
    [[b"12345678"], [b"", b"123", b"", b"45678"], [memoryview(b"1234"), bytearray(b"5678")]],
    ids=["whole", "empty between", "views"],
)
def test_chunking_does_not_change_the_bytes(chunks: list[bytes]) -> None:
    assert b"".join(write(layout([TensorSpec("a", "F32", (2,))]), lambda _: chunks))[-8:] == b"12345678"


def test_an_empty_tensor_may_come_as_an_empty_array() -> None:
    spec = TensorSpec("a", "F32", (0, 4))
    assert b"".join(write(layout([spec]), lambda _: [as_torch(spec).numpy().data])) == by_library([spec])


@pytest.mark.parametrize("chunks", [[], [b"1234567"], [b"123456789"], [b"12345678", b"9"]], ids=repr)
def test_a_tensor_of_the_wrong_length_is_refused(chunks: list[bytes]) -> None:
    with pytest.raises(InvalidTensorFile) as caught:
        list(write(layout([TensorSpec("a", "F32", (2,))]), lambda _: chunks))
    assert caught.value.tensor == "a"


def test_surplus_bytes_never_leave() -> None:
    pieces = write(layout([TensorSpec("a", "U8", (1,))]), lambda _: iter([b"1", b"2"]))
    assert [next(pieces), next(pieces)][1] == b"1"
    with pytest.raises(InvalidTensorFile):
        next(pieces)


def test_two_specs_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidTensorFile, match="twice"):
        layout([TensorSpec("a", "F32", (2,)), TensorSpec("a", "F16", (2,))])


def test_a_tensor_cannot_take_the_place_of_the_metadata() -> None:
    with pytest.raises(InvalidTensorFile, match="twice"):
        layout([TensorSpec("__metadata__", "F32", (2,))])


@pytest.mark.parametrize(
    "spec",
    [
        ("", "F32", (1,)),
        ("a/b", "F32", (1,)),
        ("a", "F31", (1,)),
        ("a", "F32", (-1,)),
        ("a", "F32", (True,)),
        ("a", "F32", (1,) * 9),
    ],
    ids=repr,
)
def test_a_spec_no_reader_should_meet_is_refused(spec: tuple[str, str, tuple[int, ...]]) -> None:
    with pytest.raises(InvalidTensorFile):
        TensorSpec(*spec)


@settings(max_examples=100, deadline=None)
@given(SPECS)
def test_what_is_written_is_read_back(specs: list[TensorSpec]) -> None:
    file = written(specs)
    header = read_header(io.BytesIO(file), len(file))
    assert tuple(header.tensors.values()) == layout(specs).tensors
