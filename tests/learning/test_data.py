"""Data files: what is recognised, what is refused and why, and columns as they were."""

import json
import subprocess
import sys
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save

from app import data, data_formats
from app.commands import collect_garbage
from app.errors import InvalidData, MissingColumn, UnknownData
from app.services import Services
from merge_algos.errors import NonFiniteTensor
from storage.digest import Digest
from storage.errors import BadSource, BlobTooLarge, InvalidTensorFile

ROWS: list[dict[str, Any]] = [
    {"text": "a good film", "label": 1, "score": 0.5},
    {"text": "ein schlechter Film: naïve ☹", "label": 0, "score": None},
    {"text": "", "label": 1, "score": -1e300},
]


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict[str, Any]] = ROWS, **options: Any) -> bytes:
    stream = BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), stream, **options)
    return stream.getvalue()


def head(classes: int = 3, features: int = 4, **more: torch.Tensor) -> bytes:
    return save({"weight": torch.ones(classes, features), **more})


def add(services: Services, content: bytes) -> data.FileRecord:
    return data.add(services, [content])


# --- recognised


@pytest.mark.parametrize(("content", "kind"), [(jsonl(*ROWS), "jsonl"), (as_parquet(), "parquet")])
def test_rows_come_back_as_they_were(services: Services, content: bytes, kind: str) -> None:
    record = add(services, content)
    assert (record.kind, record.rows, record.columns) == (kind, 3, ("text", "label", "score"))
    assert (record.id, record.size_bytes, record.restricted) == (Digest.of(content), len(content), ())
    assert data.read_columns(services, record.id, ["score", "text"]) == {
        "score": [row["score"] for row in ROWS],
        "text": [row["text"] for row in ROWS],
    }


def test_columns_keep_the_order_in_which_they_appear(services: Services) -> None:
    assert add(services, jsonl({"b": 1, "a": 2}, {"c": 3, "a": 4})).columns == ("b", "a", "c")


def test_the_last_line_needs_no_end(services: Services) -> None:
    assert add(services, b'{"a": 1}\r\n{"a": 2}').rows == 2


def test_compressed_parquet_of_many_row_groups_is_read_whole(services: Services) -> None:
    rows = [{"n": n, "nested": {"tags": [str(n)]}} for n in range(5000)]
    record = add(services, as_parquet(rows, compression="zstd", row_group_size=700))
    assert data.read_columns(services, record.id, ["nested", "n"]) == {
        "nested": [row["nested"] for row in rows],
        "n": list(range(5000)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_classification_head_counts_its_classes(services: Services, dtype: torch.dtype) -> None:
    record = add(services, save({"weight": torch.ones(3, 4, dtype=dtype), "bias": torch.zeros(3, dtype=dtype)}))
    assert (record.kind, record.rows, record.columns) == ("safetensors", 3, ("weight", "bias"))


def test_a_head_may_go_without_bias(services: Services) -> None:
    assert add(services, head()).columns == ("weight",)


def test_adding_twice_is_adding_once(services: Services) -> None:
    first, second = add(services, jsonl(*ROWS)), add(services, jsonl(*ROWS))
    assert first == second and services.materials.page_of_files(limit=9) == [first]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    st.lists,
    max_leaves=5,
)


@given(st.lists(st.fixed_dictionaries({"x": values, "y": values}), min_size=1, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
def test_any_json_comes_back_as_it_was(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    file = tmp_path / "rows"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert data_formats.recognise(file).rows == len(rows)
    assert data_formats.read(file, ["x", "y"]) == {name: [row[name] for row in rows] for name in ("x", "y")}


# --- refused


@pytest.mark.parametrize(
    ("content", "mention"),
    [
        (b"", "no rows"),
        (b"\n", "empty line.*line 1"),
        (jsonl(ROWS[0]) + b"\n" + jsonl(ROWS[1]), "empty line.*line 2"),
        (b'{"a": 1}\n{"a": \n', "not JSON.*line 2"),
        (b'{"a": 1}\n[1]\n', "not a JSON object.*line 2"),
        (b'{"a": 1}\n"a"\n', "not a JSON object.*line 2"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "UTF-8.*line 2"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8.*line 1"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM.*line 1"),
        (b'{"a": "\\ud800"}', "UTF-8.*line 1"),
        (b'{"a": NaN}', "NaN.*line 1"),
        (b'{"a": -Infinity}', "Infinity.*line 1"),
        (b'{"a": 1, "a": 2}', "twice.*line 1"),
        (b'{"": 1}', "name.*line 1"),
        (b'{"a\\n": 1}', "name.*line 1"),
        (b'{"' + b"a" * 201 + b'": 1}', "name.*line 1"),
        (jsonl({str(n): 0 for n in range(1001)}), "1000 columns"),
        (b"[" * 200_000, "not JSON.*line 1"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not JSON.*line 1"),
        (b"text,label\na,1\n", "not JSON.*line 1"),
        (b"GGUF\x03\0\0\0", "JSON|UTF-8|safetensors"),
        (b"PAR1", "Parquet"),
        (b"PAR1 and no more", "Parquet"),
        (as_parquet()[:-20], "Parquet"),
        (as_parquet([]), "no rows"),
        (head(bias=torch.zeros(2)), "bias has shape"),
        (head(0, 4), "weight has shape"),
        (save({"weight": torch.ones(3)}), "weight has shape"),
        (save({"bias": torch.ones(3)}), "tensor weight"),
        (head(other=torch.zeros(2)), "nothing else"),
        (save({"weight": torch.ones(2, 2, dtype=torch.int64)}), "type I64"),
    ],
    ids=lambda value: str(value[:24]) if isinstance(value, bytes) else None,
)
def test_what_is_no_data_file_is_refused_with_the_reason(services: Services, content: bytes, mention: str) -> None:
    with pytest.raises((InvalidData, InvalidTensorFile), match=f"(?s){mention}"):
        add(services, content)
    assert services.materials.files() == ()


@pytest.mark.parametrize("content", [head()[:-1], head()[:20], b"\x10\0\0\0\0\0\0\0", head() + b"x"])
def test_a_damaged_head_is_refused_as_a_tensor_file(services: Services, content: bytes) -> None:
    with pytest.raises(InvalidTensorFile):
        add(services, content)


def test_a_head_that_is_not_finite_is_refused(services: Services) -> None:
    with pytest.raises(NonFiniteTensor):
        add(services, head(bias=torch.tensor([0.0, float("nan"), 0.0])))


def test_a_damaged_page_of_parquet_is_found_when_it_is_added(services: Services) -> None:
    content = bytearray(as_parquet([{"text": "x" * 50 + str(n)} for n in range(2000)], compression="snappy"))
    content[200:4000] = bytes(3800)
    with pytest.raises(InvalidData, match="Parquet"):
        add(services, bytes(content))


@given(st.binary(max_size=300) | st.binary(max_size=200).map(lambda b: b"PAR1" + b + b"PAR1"))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_the_bytes_they_are_recognised_or_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "any"
    file.write_bytes(content)
    with suppress(InvalidData, InvalidTensorFile, NonFiniteTensor):
        assert data_formats.recognise(file).rows > 0


def test_a_file_above_the_limit_is_refused(services: Services) -> None:
    with pytest.raises(BlobTooLarge):
        add(services, b" " * (services.settings.max_upload_bytes + 1))
    assert list(services.blobs.digests()) == []


def test_parquet_without_pyarrow_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(as_parquet())
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from pathlib import Path; from app import data_formats\n"
        "try: data_formats.recognise(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    ran = subprocess.run([sys.executable, "-c", program, tmp_path / "rows"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("NotInstalled") and "pip install 'lora-braid[learn]'" in ran.stdout


# --- columns


@pytest.mark.parametrize("content", [jsonl(*ROWS), as_parquet()])
def test_a_column_that_is_not_there_is_named_beside_those_that_are(services: Services, content: bytes) -> None:
    with pytest.raises(MissingColumn, match=r"'sentence'.*text, label, score"):
        data.read_columns(services, add(services, content).id, ["text", "sentence"])


def test_a_row_without_the_column_is_named_by_its_line(services: Services) -> None:
    record = add(services, jsonl({"text": "a", "label": 1}, {"text": "b"}))
    with pytest.raises(MissingColumn, match=r"line 2 .*'label'.*text"):
        data.read_columns(services, record.id, ["text", "label"])


def test_a_nested_field_is_no_column(services: Services) -> None:
    with pytest.raises(MissingColumn):
        data.read_columns(services, add(services, as_parquet([{"a": {"b": 1}}])).id, ["a.b"])


def test_a_head_has_no_rows_to_read(services: Services) -> None:
    with pytest.raises(InvalidData):
        data.read_columns(services, add(services, head()).id, ["weight"])


# --- by id, and gone


def test_a_file_is_a_source_by_its_id(services: Services) -> None:
    record = add(services, jsonl(*ROWS))
    assert data.pin(services, str(record.id), "any", token=None) == str(record.id)
    assert data.obtain(services, str(record.id), "any") == (record.id,)


def test_a_head_is_no_source_of_rows(services: Services) -> None:
    source = str(add(services, head()).id)
    for take in (lambda: data.pin(services, source, "train", token=None), lambda: data.obtain(services, source, "train")):
        with pytest.raises(InvalidData):
            take()


@pytest.mark.parametrize("source", ["train.jsonl", "hub:org/name", "", "name:a/b"])
def test_what_is_no_source_of_data_is_refused(services: Services, source: str) -> None:
    with pytest.raises(BadSource):
        data.pin(services, source, "train", token=None)


def test_garbage_collection_keeps_what_is_known_and_frees_what_is_forgotten(services: Services) -> None:
    record = add(services, jsonl(*ROWS))
    collect_garbage(services.settings, 0)
    assert data.get(services, record.id) == record
    services.materials.forget(record.id)
    with pytest.raises(UnknownData):
        data.get(services, record.id)
    collect_garbage(services.settings, 0)
    assert list(services.blobs.digests()) == []


@pytest.mark.parametrize("content", [jsonl(*ROWS), as_parquet(), b'{"parts": {"x": {"digest": "sha256:1"}}}', b'{"parts": 1}'])
def test_a_forgotten_file_of_a_job_under_way_is_kept(services: Services, content: bytes) -> None:
    record, job = add(services, content), Digest.of(b"job")
    services.jobs.submit(job, 1, method="x", recipe={"adapters": [], "data": [{"source": str(record.id)}], "name": "sha256:no"})
    services.materials.forget(record.id)
    collect_garbage(services.settings, 0)
    assert services.blobs.stat(record.id) == len(content)
