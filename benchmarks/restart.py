"""What a supervisor that forks is worth, beside the same one that starts fresh interpreters, in one run.

    python benchmarks/restart.py [--rounds 5]

A whole `braid serve` each way, and two small adapters. For every process that is killed: the time from the kill to the end of
a merge that is asked for right after it (of the API: to an answer), the median of the rounds. Memory is what all processes
of the service hold together, shared pages counted once (PSS). Linux only: it reads /proc.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
from rich.console import Console
from rich.table import Table
from spine import make_adapter

from app.services import Services
from app.settings import Settings

SERVE = """
import sys
from app.server import run_server
from app.settings import Settings
sys.exit(run_server(Settings(), worker=True, say=lambda line: print(line, flush=True), forks=sys.argv[1] == "forks"))
"""
WAYS = ("forks", "interpreters")
VICTIMS = ("child", "worker", "api")
WAIT_S = 60.0


@dataclass(frozen=True)
class Service:
    pid: int
    http: httpx2.Client

    def processes(self) -> Mapping[str, int]:
        """child, worker and api, by their titles."""
        found = {}
        for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with suppress(FileNotFoundError):
                title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split()
                if title[:1] == ["braid"]:
                    found[title[1]] = int(pid)
        return found

    def merge(self, inputs: list[str], weight: float) -> None:
        """Ask for a merge that was never asked for before, and wait for its end."""
        body = {"adapters": [{"source": source, "weight": weight} for source in inputs]}
        job = self.http.post("/merge", json=body).raise_for_status().json()["id"]
        until(lambda: self.http.get(f"/jobs/{job}").json()["state"] == "succeeded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    table = Table(title="seconds, and MiB of the whole service", caption="ratio: of fresh interpreters to forks")
    for column in ("", *WAYS, "ratio"):
        table.add_column(column, justify="right" if column else "left")
    with Console(stderr=True).status("a service each way"):
        forks, interpreters = (measured(way, args.rounds) for way in WAYS)
    for name, value in forks.items():
        table.add_row(name, f"{value:.2f}", f"{interpreters[name]:.2f}", f"{interpreters[name] / value:.1f}")
    Console(width=100).print(table)


def measured(way: str, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as folder:
        settings = Settings(data_dir=Path(folder), devices="cpu", port=0, log_level="ERROR")
        services, console = Services.open(settings), Console(quiet=True)
        inputs = [str(make_adapter(services, n, {"q_proj": (64, 64)}, 1, 4, "float32", console)) for n in range(2)]
        began = time.perf_counter()
        with serving(settings, way) as service:
            service.merge(inputs, 1.0)
            found = {"start to the end of a merge": time.perf_counter() - began, "CPU until then": cpu_s(service)}
            found["memory then"] = sum(pss_mib(pid) for pid in (service.pid, *service.processes().values()))
            for place, victim in enumerate(VICTIMS):
                took_s = [killed(service, victim, inputs, 2.0 + place + n / rounds) for n in range(rounds)]
                found[f"{victim} killed, {'to an answer' if victim == 'api' else 'to the end of a merge'}"] = statistics.median(
                    took_s
                )
    return found


def killed(service: Service, victim: str, inputs: list[str], weight: float) -> float:
    until(lambda: victim in service.processes())
    began = time.perf_counter()
    os.kill(service.processes()[victim], signal.SIGKILL)
    if victim == "api":
        until(lambda: answers(service))
        return time.perf_counter() - began
    service.merge(inputs, weight)
    return time.perf_counter() - began


def answers(service: Service) -> bool:
    with suppress(httpx2.TransportError):
        return service.http.get("/readyz").status_code == 200
    return False


@contextmanager
def serving(settings: Settings, way: str) -> Iterator[Service]:
    command = [sys.executable, "-c", SERVE, way]
    with subprocess.Popen(command, env=settings.to_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().rpartition(" ")[2].strip()
        with httpx2.Client(base_url=address, timeout=WAIT_S) as http:
            yield Service(process.pid, http)
        process.terminate()


def until(holds: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < ends_at, f"nothing within {WAIT_S} s"
        time.sleep(0.01)


def cpu_s(service: Service) -> float:
    """User and system time of all its processes."""
    stats = [
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in (service.pid, *service.processes().values())
    ]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def pss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main()
