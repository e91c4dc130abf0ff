"""Who is started again and who ends with whom, where processes are forks and where, as on macOS, they are started anew."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import psutil
import pytest

from app.engine.processes import Supervisor
from making import make
from serving import Server, announced, are_gone, environment_for, eventually, start, stopped

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
    data_dir.mkdir(exist_ok=True)
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
    pids(service)
    assert listeners(service) == {"supervisor", "api"}


def listeners(server: Server) -> set[str]:
    """Who holds the socket at the service's address."""
    return {
        name
        for name, process in server.processes().items()
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == server.http.base_url.port
    }


@pytest.mark.parametrize("how", ["forks", "starts anew"])
def test_all_end_with_the_supervisor_and_the_port_is_free(tmp_path: Path, how: str) -> None:
    with supervising(tmp_path, how) as server:
        assert merges(server, 1.0)
        family = list(server.processes().values())
        assert len(family) == 4
        server.process.kill()
        eventually(lambda: (are_gone(family) and is_free(server.http.base_url.port)) or None, wait_s=3)


def is_free(port: int) -> bool:
    """A process of several threads counts as gone a moment before the last of them has let go of its files."""
    with socket.socket() as following, suppress(OSError):
        following.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        following.bind(("127.0.0.1", port))
        return True
    return False


def test_what_a_worker_cannot_have_ends_the_service_with_a_sentence(tmp_path: Path) -> None:
    environment = {**environment_for(tmp_path), "BRAID_DEVICES": "cuda:77"}
    ran = subprocess.run([sys.executable, "-c", SERVE, "forks"], env=environment, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, "Traceback" in ran.stderr) == (2, False)
    assert "cuda:77 is not on this machine" in ran.stderr


@pytest.mark.parametrize("moment", range(8))
def test_a_service_that_only_begins_can_be_stopped(tmp_path: Path, moment: int) -> None:
    """In the half of a second in which its processes start, whatever they wait for."""
    log = tmp_path / "service.log"
    process = start("serve", "--port", "0", data_dir=tmp_path, log=log)
    with stopped(process):
        announced(process, log)
        time.sleep(0.06 * moment)
        began = time.monotonic()
        process.terminate()
        assert process.wait(20) == 0
        assert time.monotonic() - began < 4


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_closed_standard_streams_do_no_harm(tmp_path: Path, closed: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "service.log").open("w") as errors:
        environment = {**environment_for(tmp_path), "BRAID_PORT": str(port)}
        command = ["sh", "-c", f'exec "{sys.executable}" -m app.cli serve {closed}']
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
    with stopped(process), httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        server = Server(f"http://127.0.0.1:{port}", tmp_path, process, tmp_path / "service.log", http)
        eventually(lambda: answers(server) or None, wait_s=60)
        assert merges(server, 1.0)
        assert listeners(server) == {"supervisor", "api"}
        family = list(server.processes().values())
        process.kill()
        eventually(lambda: are_gone(family) or None, wait_s=3)


def answers(server: Server) -> bool:
    with suppress(httpx2.TransportError):
        return server.http.get("/readyz").status_code == 200
    return False


# what a worker asks


@pytest.fixture
def line() -> Iterator[tuple[Supervisor, socket.socket]]:
    """A worker's end of a connection, and the supervisor's, which is ours here."""
    theirs, ours = socket.socketpair()
    with theirs, ours:
        yield Supervisor(theirs), ours


def test_a_worker_whose_supervisor_is_gone_ends_and_fails_no_job(line: tuple[Supervisor, socket.socket]) -> None:
    worker, supervisor = line
    supervisor.close()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            worker.launch("app.engine.child", ["cpu", "1"])
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_start_that_the_system_refuses_is_told_and_leaves_no_pipe_open(line: tuple[Supervisor, socket.socket]) -> None:
    worker, supervisor = line
    before = psutil.Process().num_fds()
    for _ in range(5):
        supervisor.send(json.dumps({"refused": "Cannot allocate memory"}).encode())
        with pytest.raises(OSError, match="Cannot allocate memory"):
            worker.launch("app.engine.child", ["cpu", "1"])
    assert psutil.Process().num_fds() == before
