"""A real `braid serve` (or `braid worker`) in a process of its own, for tests that talk HTTP or kill things."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import psutil

from making import Made

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """A running service. `log`: everything it, its worker and its children wrote."""

    url: str
    data_dir: Path
    process: subprocess.Popen[str]
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
        """api, worker and child, as far as they live."""
        found = {"api": psutil.Process(self.process.pid)}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it ended in this moment, or is a zombie
                line = " ".join(process.cmdline())
                if " worker" in line:
                    found["worker"] = process
                elif "app.engine.child" in line:
                    found["child"] = process
        return found

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
    url = eventually(lambda: _announced(process), wait_s=60)
    try:
        with httpx2.Client(base_url=url, timeout=60) as http:
            server = Server(url, data_dir, process, log, http)
            if wait_ready:
                http.get("/readyz").raise_for_status()
            yield server
    finally:
        stop(process)


def start(*command: str, data_dir: Path, log: Path, environment: Mapping[str, str] = {}) -> subprocess.Popen[str]:
    own = {"BRAID_DATA_DIR": str(data_dir), "BRAID_DEVICES": "cpu", "BRAID_HUB_ENDPOINT": "http://127.0.0.1:9"}
    clean = {name: value for name, value in os.environ.items() if not re.match("BRAID_|HF_", name)}
    with log.open("a") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "app.cli", *command],
            env={**clean, **own, **environment},
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        )


def stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM, then SIGKILL for it and whatever is left below it."""
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in below:
        if child.is_running():
            child.send_signal(signal.SIGKILL)


def eventually(probe: Callable[[], T | None], *, wait_s: float = 120, every_s: float = 0.05) -> T:
    """The first answer of `probe` that is not None. Fails after `wait_s`."""
    ends_at = time.monotonic() + wait_s
    while time.monotonic() < ends_at:
        answer = probe()
        if answer is not None:
            return answer
        time.sleep(every_s)
    raise AssertionError(f"nothing within {wait_s} s")


def _announced(process: subprocess.Popen[str]) -> str | None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line or process.poll() is None, "the service ended before it listened; see its log"
    return line.strip().rpartition(" ")[2] if "listens on" in line else None
