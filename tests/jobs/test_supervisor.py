"""Who is started again and who ends with whom, where processes are forks and where, as on macOS, they are started anew."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from app.engine.processes import Forks
from making import make
from serving import Server, announced, are_gone, environment_for, eventually, stopped

SHAPES = {f"layers.{n}.q_proj": (64, 64) for n in range(4)}
SERVE = """
import sys
from app.server import run_server
from app.settings import Settings
sys.exit(run_server(Settings(port=0), worker=True, say=lambda line: print(line, flush=True), forks=sys.argv[1] == "forks"))
"""
WARDS = ("child", "worker", "api")


@contextmanager
def supervising(data_dir: Path, how: str) -> Iterator[Server]:
    log = data_dir / "service.log"
    with log.open("w") as errors, log.with_suffix(".out").open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", SERVE, how], env=environment_for(data_dir), stdout=out, stderr=errors)
    with stopped(process):
        url = announced(process, log)
        with httpx2.Client(base_url=url, timeout=60) as http:
            yield Server(url, data_dir, process, log, http)


@pytest.fixture(scope="module", params=["forks", "starts anew"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with supervising(tmp_path_factory.mktemp("supervised"), request.param) as server:
        yield server


def merges(server: Server, weight: float) -> bool:
    inputs = [server.add(make(seed, r=8, shapes=SHAPES)) for seed in range(2)]
    return bool(server.merge(*inputs, weights=[weight, weight])["state"] == "succeeded")


def kill(server: Server, victim: str) -> None:
    eventually(lambda: server.processes().get(victim)).kill()
    server.expect_a_broken_connection()


def pids(server: Server) -> dict[str, int]:
    """Once all are there."""
    found = eventually(lambda: known if len(known := server.processes()) == 1 + len(WARDS) else None)
    return {name: process.pid for name, process in found.items()}


@pytest.mark.parametrize("victim", WARDS)
def test_a_killed_process_is_started_again_at_the_same_address(service: Server, victim: str) -> None:
    assert merges(service, 1.0)  # so the child has been started
    before = service.processes()[victim].pid
    kill(service, victim)
    assert merges(service, 2.0 + WARDS.index(victim))
    assert service.processes()[victim].pid != before


def test_nobody_is_started_again_but_the_victim(service: Server) -> None:
    assert merges(service, 1.0)
    before = pids(service)
    kill(service, "api")
    after = pids(service)
    assert {name for name in before if before[name] != after[name]} == {"api"}


def test_a_child_ends_with_its_worker(service: Server) -> None:
    assert merges(service, 1.0)
    child = service.processes()["child"]
    kill(service, "worker")
    eventually(lambda: are_gone([child]) or None, wait_s=3)


def test_no_process_holds_what_is_not_its_own(service: Server) -> None:
    """The socket that listens must be the API's alone: another that holds it would keep the port from the next service."""
    port = service.http.base_url.port
    listening = {
        name
        for name, process in service.processes().items()
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"supervisor", "api"}


@pytest.mark.parametrize("how", ["forks", "starts anew"])
def test_all_end_with_the_supervisor_and_the_port_is_free(tmp_path: Path, how: str) -> None:
    with supervising(tmp_path, how) as server:
        assert merges(server, 1.0)
        family = list(server.processes().values())
        assert len(family) == 4
        server.process.kill()
        eventually(lambda: are_gone(family) or None, wait_s=3)
        with socket.socket() as following:
            following.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            following.bind(("127.0.0.1", server.http.base_url.port))


def test_what_a_worker_cannot_have_ends_the_service_with_a_sentence(tmp_path: Path) -> None:
    environment = {**environment_for(tmp_path), "BRAID_DEVICES": "cuda:77"}
    ran = subprocess.run([sys.executable, "-c", SERVE, "forks"], env=environment, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, "Traceback" in ran.stderr) == (2, False)
    assert "cuda:77 is not on this machine" in ran.stderr


# what a worker asks


@pytest.fixture
def forks() -> Iterator[tuple[Forks, socket.socket]]:
    """A worker's end of a connection, and the supervisor's, which is ours here."""
    theirs, ours = socket.socketpair()
    with theirs, ours:
        yield Forks(theirs), ours


def test_a_worker_whose_supervisor_is_gone_is_told_so(forks: tuple[Forks, socket.socket]) -> None:
    worker, supervisor = forks
    supervisor.close()
    with pytest.raises(ConnectionError):
        worker.start("app.engine.child", ["cpu", "1"])


def test_a_start_that_failed_leaves_no_pipe_open(forks: tuple[Forks, socket.socket]) -> None:
    worker, supervisor = forks
    supervisor.close()
    before = psutil.Process().num_fds()
    for _ in range(5):
        with pytest.raises(ConnectionError):
            worker.start("app.engine.child", ["cpu", "1"])
    assert psutil.Process().num_fds() == before


def test_a_start_that_the_system_refuses_is_told(forks: tuple[Forks, socket.socket]) -> None:
    worker, supervisor = forks
    supervisor.send(json.dumps({"refused": "Cannot allocate memory"}).encode())
    with pytest.raises(OSError, match="Cannot allocate memory"):
        worker.start("app.engine.child", ["cpu", "1"])
