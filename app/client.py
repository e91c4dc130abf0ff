"""The API as the command line uses it: post, follow, download."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx2

WEIGHTS = "adapter_model.safetensors"

_CONNECT_TIMEOUT_S = 10.0
_IMPORT_TIMEOUT_S = 3600.0


@dataclass(eq=False)
class Refused(Exception):
    """The server answered with a problem."""

    problem: Mapping[str, Any]

    def __str__(self) -> str:
        return str(self.problem.get("detail", self.problem))


@dataclass(frozen=True, slots=True)
class Client:
    """One server. Raises Refused for every answer that is a problem."""

    http: httpx2.Client

    @classmethod
    @contextmanager
    def connect(cls, url: str, *, token: str | None = None) -> Iterator[Self]:
        headers = {"x-hub-token": token} if token else {}
        timeout = httpx2.Timeout(_IMPORT_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        try:
            with httpx2.Client(base_url=url, headers=headers, timeout=timeout) as http:
                yield cls(http)
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise Refused({"detail": f"{url} cannot be used as a Braid server: {error}"}) from error

    def import_hub(self, source: str, name: str | None = None) -> dict[str, Any]:
        return self._json("POST", "/adapters", json={"source": source, "name": name})

    def upload(self, place: Path, name: str | None = None, base_model: str | None = None) -> dict[str, Any]:
        """Upload a PEFT adapter directory, or a single file."""
        paths = {part: place / part for part in ("adapter_config.json", WEIGHTS)} if place.is_dir() else {WEIGHTS: place}
        fields = {"name": name, "base_model": base_model}
        with ExitStack() as stack:
            files = {part: (part, stack.enter_context(path.open("rb"))) for part, path in paths.items()}
            given = {field: value for field, value in fields.items() if value}
            return self._json("POST", "/adapters", files=files, data=given)

    def add_data(self, file: Path) -> dict[str, Any]:
        with file.open("rb") as stream:
            return self._json("POST", "/data", files={"file": (file.name, stream)})

    def list_data(self) -> Iterator[dict[str, Any]]:
        """Every data file, newest first, page by page."""
        cursor: dict[str, str] | None = {}
        while cursor is not None:
            page = self._json("GET", "/data", params=cursor)
            yield from page["data"]
            cursor = {"cursor": page["next"]} if page["next"] else None

    def merge(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return self._json("POST", "/merge", json=dict(request))

    def extract(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return self._json("POST", "/extract", json=dict(request))

    def reconstruct(self, basis: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        return self._json("POST", f"/rmm/{basis}/reconstruct", json=dict(asked))

    def basis_report(self, basis: str) -> dict[str, Any]:
        return self._json("GET", f"/rmm/{basis}/report.json")

    def job(self, job: str) -> dict[str, Any]:
        return self._json("GET", f"/jobs/{job}")

    def follow(self, job: str) -> Iterator[dict[str, Any]]:
        """The job's events as they come, the final one last."""
        with self.http.stream("GET", f"/jobs/{job}/events") as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    def download(self, link: str, target: Path) -> None:
        with self.http.stream("GET", link) as response:
            if response.status_code != 200:
                response.read()
                raise Refused(_problem(response))
            with target.open("wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)

    def _json(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        response = self.http.request(method, path, **content)
        if not response.is_success or response.headers.get("content-type") != "application/json":
            raise Refused(_problem(response))
        answer: dict[str, Any] = response.json()
        return answer


def _problem(response: httpx2.Response) -> dict[str, Any]:
    """The problem of an answer; one of our own words where something else than Braid answered."""
    if response.headers.get("content-type") == "application/problem+json":
        problem: dict[str, Any] = response.json()
        return problem
    return {"detail": f"{response.url} answered {response.status_code} and is no Braid server"}
