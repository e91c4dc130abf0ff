"""A real `braid serve` (or `braid worker`) in a process of its own, for tests that talk HTTP or kill things."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import psutil

from forked import Forked, forked
from making import Made

T = TypeVar("T")
Process = Forked | subprocess.Popen[bytes]


@dataclass(frozen=True)
class Server:
    """A running service. `log`: everything it, its worker and its children wrote."""

    url: str
    data_dir: Path
    process: Process
    log: Path
    http: httpx2.Client

    def upload(self, made: Made, **fields: str) -> httpx2.Response:
        files = {name: (name, data) for name, data in made.files.items()}
        return self.http.post("/adapters", files=files, data=fields)

    def add(self, made: Made) -> str:
        """Upload, expecting success: the adapter's id."""
        answer = self.upload(made)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def merge(self, *adapters: str, wait_s: int = 60, **request: Any) -> dict[str, Any]:
        """Merge stored adapters and wait: the job as it ended."""
        body = {"adapters": [{"source": a, "weight": w} for a, w in self._weighted(adapters, request)], **request}
        answer = self.http.post("/merge", json=body, headers={"prefer": f"wait={wait_s}"})
        assert answer.status_code in {200, 202}, answer.text
        return self.ended(answer.json()["id"], wait_s=wait_s)

    def ended(self, job: str, *, wait_s: float = 60) -> dict[str, Any]:
        return eventually(lambda: self._if_final(job), wait_s=wait_s)

    def download(self, adapter: str, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        for part in ("adapter_config.json", "adapter_model.safetensors"):
            (directory / part).write_bytes(self.http.get(f"/adapters/{adapter}/{part}").raise_for_status().content)
        return directory

    def processes(self) -> dict[str, psutil.Process]:
        """supervisor, api, worker and child, as far as they live."""
        supervisor = psutil.Process(self.process.pid)
        found = {"supervisor": supervisor}
        for process in supervisor.children():
            with suppress(psutil.NoSuchProcess):  # it ended in this moment, or is a zombie
                title = " ".join(process.cmdline()).split()
                if title[:1] == ["braid"]:
                    found[title[1]] = process
        return found

    def expect_a_broken_connection(self) -> None:
        """The API has been killed, and with it our open connection; the next one waits until there is another API."""
        with suppress(httpx2.TransportError):
            self.http.get("/healthz")

    def _if_final(self, job: str) -> dict[str, Any] | None:
        view: dict[str, Any] = self.http.get(f"/jobs/{job}").json()
        return view if view["state"] in {"succeeded", "failed", "cancelled"} else None

    @staticmethod
    def _weighted(adapters: tuple[str, ...], request: dict[str, Any]) -> list[tuple[str, float]]:
        weights = request.pop("weights", [1.0] * len(adapters))
        return list(zip(adapters, weights, strict=True))


@contextmanager
def serving(data_dir: Path, *flags: str, wait_ready: bool = True, **environment: str) -> Iterator[Server]:
    """`braid serve` on a free port over this data directory; killed with all its children at the end."""
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "service.log"
    process = start("serve", "--port", "0", *flags, data_dir=data_dir, log=log, environment=environment)
    with stopped(process):
        url = announced(process, log)
        with httpx2.Client(base_url=url, timeout=60) as http:
            server = Server(url, data_dir, process, log, http)
            if wait_ready:
                http.get("/readyz").raise_for_status()
            yield server


def start(*command: str, data_dir: Path, log: Path, environment: Mapping[str, str] = {}) -> Forked:
    """What it prints is beside its log, in a file that `announced` looks into."""
    environment = {**environment_for(data_dir), **environment}
    return forked(*command, environment=environment, stdout=log.with_suffix(".out"), stderr=log)


def announced(process: Process, log: Path) -> str:
    """The address, as soon as it is told."""

    def told() -> str | None:
        running, said = process.poll() is None, out.read_text()
        assert running or said, f"the service ended before it listened; see {log}"
        return said.strip().rpartition(" ")[2] if said.endswith("\n") else None

    out = log.with_suffix(".out")
    return eventually(told, wait_s=60)


@contextmanager
def stopped(process: Process) -> Iterator[None]:
    """In the end."""
    try:
        yield
    finally:
        stop(process)


def environment_for(data_dir: Path) -> dict[str, str]:
    """Nothing of the developer's own settings, no GPU, and no Hub."""
    own = {"BRAID_DATA_DIR": str(data_dir), "BRAID_DEVICES": "cpu", "BRAID_HUB_ENDPOINT": "http://127.0.0.1:9"}
    return {**{name: value for name, value in os.environ.items() if not re.match("BRAID_|HF_", name)}, **own}


def stop(process: Process) -> None:
    """SIGTERM, then SIGKILL for it and whatever is left below it."""
    below = []
    with suppress(psutil.NoSuchProcess):  # it has ended already
        below = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in below:
        if child.is_running():
            child.send_signal(signal.SIGKILL)


def are_gone(processes: Sequence[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def eventually(probe: Callable[[], T | None], *, wait_s: float = 120, every_s: float = 0.05) -> T:
    """The first answer of `probe` that is not None. Fails after `wait_s`."""
    ends_at = time.monotonic() + wait_s
    while time.monotonic() < ends_at:
        answer = probe()
        if answer is not None:
            return answer
        time.sleep(every_s)
    raise AssertionError(f"nothing within {wait_s} s")
