"""What tests of the API ask again and again: is it that problem, what did the stream say, how much is stored, run a command."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from forked import forked
from making import Made, make
from serving import Server, environment_for

OPERATORS_TOKEN = "hf_the-token-of-the-operator"
ZERO = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Event:
    number: int
    name: str
    data: Mapping[str, Any]


def problem(answer: httpx2.Response, status: int, slug: str) -> dict[str, Any]:
    """The problem, after checking that it is exactly this one and consistent with itself."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    found: dict[str, Any] = answer.json()
    assert (answer.status_code, found["type"]) == (status, f"urn:braid:problem:{slug}"), found
    assert found["status"] == status
    return found


def events(lines: Iterator[str]) -> list[Event]:
    """Everything a stream says until it ends."""
    found, fields = [], dict[str, str]()
    for line in lines:
        name, _, value = line.partition(": ")
        if line and name:
            fields[name] = value
        elif "data" in fields:
            found.append(Event(int(fields["id"]), fields["event"], json.loads(fields["data"])))
            fields = {}
    return found


def follow(server: Server, job: str, **headers: str) -> list[Event]:
    with server.http.stream("GET", f"/jobs/{job}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events(answer.iter_lines())


def pages(server: Server, path: str, limit: int = 200) -> Iterator[list[dict[str, Any]]]:
    """The pages of a list, by its cursors."""
    cursor: str | None = None
    while True:
        query = {"limit": str(limit)} | ({"cursor": cursor} if cursor else {})
        page = server.http.get(path, params=query).raise_for_status().json()
        yield page["data"]
        cursor = page["next"]
        if cursor is None:
            return


def count(server: Server) -> tuple[int, int]:
    """How many jobs and adapters there are."""
    jobs, adapters = (sum(map(len, pages(server, path))) for path in ("/jobs", "/adapters"))
    return jobs, adapters


def hub_files(made: Made, folder: str = "") -> dict[str, bytes]:
    return {f"{folder}{name}": data for name, data in made.files.items()}


def make_named(base: str, seed: int = 0, **rest: Any) -> Made:
    """Two small modules; different bases make adapters that no other test shares."""
    shapes = {"layers.0.q_proj": (12, 8), "layers.1.q_proj": (12, 8)}
    return make(seed, base_model=base, shapes=shapes, r=2, alpha=4, **rest)


@dataclass(frozen=True)
class Ran:
    """How a command ended, and all it wrote."""

    returncode: int
    stdout: str
    stderr: str


def braid(*command: str | Path, data_dir: Path, **environment: str) -> Ran:
    """The command line in a process of its own."""
    arguments = [sys.executable, "-m", "app.cli", *map(str, command)]
    ran = subprocess.run(arguments, env=_environment(data_dir, environment), capture_output=True, text=True, timeout=120)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def preloaded(*command: str | Path, data_dir: Path, **environment: str) -> Ran:
    """The same without its seconds of imports."""
    with tempfile.TemporaryDirectory() as directory:
        stdout, stderr = (Path(directory) / name for name in ("stdout", "stderr"))
        process = forked(*map(str, command), environment=_environment(data_dir, environment), stdout=stdout, stderr=stderr)
        return Ran(process.wait(120), stdout.read_text(), stderr.read_text())


def _environment(data_dir: Path, more: Mapping[str, str]) -> dict[str, str]:
    """As wide as no terminal is, so that sentences stay whole."""
    return {**environment_for(data_dir), "COLUMNS": "400", **more}
