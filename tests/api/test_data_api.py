"""Data files over HTTP and on the command line: upload, list, show, forget, and what is refused."""

from pathlib import Path

import httpx2
import pytest
import torch
from safetensors.torch import save

from asking import ZERO, pages, preloaded, problem
from serving import Server
from storage.digest import Digest

ROWS = b'{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n'


def rows(text: str) -> bytes:
    """As ROWS, but nobody else's."""
    return ROWS.replace(b"good", text.encode())


def upload(server: Server, content: bytes, field: str = "file") -> httpx2.Response:
    return server.http.post("/data", files={field: ("../../etc/passwd", content)})


def test_an_upload_is_answered_with_what_it_is(server: Server) -> None:
    answer = upload(server, rows("answered"))
    assert answer.status_code == 201
    view = answer.json()
    assert answer.headers["location"] == view["links"]["self"] == f"/data/{Digest.of(rows('answered'))}"
    described = {name: view[name] for name in ("kind", "rows", "columns", "size_bytes", "source")}
    expected = {"kind": "jsonl", "rows": 2, "columns": ["text", "label"], "size_bytes": len(rows("answered")), "source": None}
    assert described == expected


def test_a_head_is_a_data_file_too(server: Server) -> None:
    view = upload(server, save({"weight": torch.ones(5, 3), "bias": torch.ones(5)})).json()
    assert (view["kind"], view["rows"], view["columns"]) == ("safetensors", 5, ["weight", "bias"])


def test_what_is_shown_is_what_was_answered(server: Server) -> None:
    view = upload(server, rows("shown")).json()
    assert server.http.get(view["links"]["self"]).json() == view


def test_uploading_twice_is_uploading_once(server: Server) -> None:
    assert upload(server, rows("twice")).json() == upload(server, rows("twice")).json()


def test_pages_hold_every_file_once_newest_first(server: Server) -> None:
    added = [upload(server, rows(f"page {n}")).json()["id"] for n in range(5)]
    listed = [view["id"] for page in pages(server, "/data", limit=2) for view in page]
    assert [each for each in listed if each in added] == added[::-1]
    assert len(listed) == len(set(listed))


def test_a_forgotten_file_is_gone(server: Server) -> None:
    link = upload(server, rows("forgotten")).json()["links"]["self"]
    assert server.http.delete(link).status_code == 204
    problem(server.http.get(link), 404, "unknown-data")
    problem(server.http.delete(link), 404, "unknown-data")
    assert upload(server, rows("forgotten")).status_code == 201


@pytest.mark.parametrize(
    ("content", "slug", "mention"),
    [
        (b"", "invalid-data", "no rows"),
        (b'{"a": 1}\n{"a": \xff}', "invalid-data", "line 2"),
        (b"PAR1", "invalid-data", "Parquet"),
        (b"\x08\0\0\0\0\0\0\0{}", "invalid-tensor-file", "header"),
        (save({"weight": torch.full((2, 2), float("inf"))}), "non-finite-tensor", "weight"),
    ],
    ids=["empty", "no UTF-8", "cut Parquet", "cut safetensors", "infinite"],
)
def test_a_file_that_cannot_be_used_is_a_problem_with_its_reason(server: Server, content: bytes, slug: str, mention: str) -> None:
    assert mention in problem(upload(server, content), 422, slug)["detail"]
    problem(server.http.get(f"/data/{Digest.of(content)}"), 404, "unknown-data")


def test_a_line_is_a_member_of_its_problem(server: Server) -> None:
    assert problem(upload(server, b'{"a": 1}\n[]'), 422, "invalid-data")["line"] == 2


@pytest.mark.parametrize(
    "form", [{"files": {"data": b"x"}}, {"data": {"file": "text"}}, {"files": {"file": b"x"}, "data": {"a": "b"}}]
)
def test_a_form_with_anything_but_the_file_is_refused(server: Server, form: dict[str, dict[str, bytes]]) -> None:
    answer = server.http.post("/data", **{"files": {}, **form})
    assert answer.status_code in {400, 415}, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_that_is_no_form_is_refused(server: Server) -> None:
    problem(server.http.post("/data", json={"source": "hub:datasets/org/name"}), 415, "unsupported-media-type")


def test_a_file_above_the_limit_is_refused(lean: Server) -> None:
    problem(upload(lean, b'{"a": "' + b"x" * 2_000_000 + b'"}'), 413, "blob-too-large")


@pytest.mark.parametrize(("data_id", "status", "slug"), [(ZERO, 404, "unknown-data"), ("sha256:x", 422, "bad-digest")])
def test_an_id_that_is_nobodys_is_refused(server: Server, data_id: str, status: int, slug: str) -> None:
    for verb in ("GET", "DELETE"):
        problem(server.http.request(verb, f"/data/{data_id}"), status, slug)


# --- the command line


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_bytes(rows("by command"))
    return tmp_path / "train.jsonl"


def test_a_command_adds_and_lists_here(tmp_path: Path, file: Path) -> None:
    added = preloaded("data", "add", file, data_dir=tmp_path / "store")
    assert (added.returncode, added.stdout.strip()) == (0, str(Digest.of(rows("by command"))))
    listed = preloaded("data", "list", data_dir=tmp_path / "store")
    assert listed.returncode == 0 and added.stdout.strip() in listed.stdout and "text, label" in listed.stdout


def test_a_command_adds_and_lists_there(server: Server, tmp_path: Path, file: Path) -> None:
    added = preloaded("data", "add", file, "--url", server.url, data_dir=tmp_path)
    assert added.returncode == 0, added.stderr
    assert server.http.get(f"/data/{added.stdout.strip()}").json()["rows"] == 2
    assert added.stdout.strip() in preloaded("data", "list", "--url", server.url, data_dir=tmp_path).stdout


@pytest.mark.parametrize(("name", "mention"), [("nowhere.jsonl", "is no file"), ("bad.jsonl", "line 1"), (".", "is no file")])
@pytest.mark.parametrize("there", [False, True])
def test_a_command_that_cannot_add_says_why(server: Server, tmp_path: Path, name: str, mention: str, there: bool) -> None:
    (tmp_path / "bad.jsonl").write_text("no JSON")
    where = ["--url", server.url] if there else []
    ran = preloaded("data", "add", tmp_path / name, *where, data_dir=tmp_path / "store")
    assert (ran.returncode, mention in ran.stderr, "Traceback" in ran.stderr) == (2, True, False)
