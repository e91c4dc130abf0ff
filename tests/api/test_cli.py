"""`braid` as people type it: real processes, their output and exit codes."""

import json
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.cli import app, data_app, rmm_app, store_app
from asking import Ran, braid, hub_files, make_named, preloaded
from hub_server import HubServer
from making import Made, dense, dense_directory, make
from serving import Server
from storage.digest import Digest
from storage.files import FileBlobs

MATH, CODE = make(101, r=3, base_model="org/cli"), make(102, r=2, base_model="org/cli")
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "report.json"]
COMMANDS = [
    "serve",
    "worker",
    "merge",
    "reconstruct",
    "import",
    "convert",
    "extract",
    "demo",
    "rmm show",
    "data add",
    "data list",
    "store gc",
    "store verify",
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return MATH.write(root / "math"), CODE.write(root / "code")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli-data")


@pytest.fixture(scope="module")
def here(directories: tuple[Path, Path], data_dir: Path) -> tuple[Path, str]:
    """What a merge in the command's own process saved and said."""
    output = data_dir.parent / "cli-here"
    ran = braid("merge", *directories, "-w", "0.5", "-w", "-2", "--rank", "4", "-o", output, data_dir=data_dir)
    assert ran.returncode == 0, ran.stderr
    return output, ran.stdout


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def recipe(output: Path) -> Any:
    return json.loads((output / "report.json").read_text())["recipe"]


# --- merge


def test_a_merge_saves_every_part(here: tuple[Path, str]) -> None:
    assert sorted(contents(here[0])) == FILES


def test_a_merge_shows_the_certificate_and_how_to_load(here: tuple[Path, str]) -> None:
    assert "all 6 modules" in here[1]
    assert f'"{here[0]}")' in here[1]


def test_a_merge_is_right(directories: tuple[Path, Path], tmp_path: Path, data_dir: Path) -> None:
    preloaded("merge", *directories, "-w", "0.5", "-w", "-2", "-o", tmp_path / "m", data_dir=data_dir)
    got, (a, b) = dense_directory(tmp_path / "m"), (dense(MATH), dense(CODE))
    assert max(float((got[m] - (0.5 * a[m] - 2 * b[m])).norm()) for m in a) < 1e-4


def test_a_server_gives_the_same_bytes(
    here: tuple[Path, str], server: Server, directories: tuple[Path, Path], tmp_path: Path, data_dir: Path
) -> None:
    flags = ("-w", "0.5", "-w", "-2", "--rank", "4", "-o", tmp_path, "--url", server.url)
    ran = preloaded("merge", *directories, *flags, data_dir=data_dir)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert contents(tmp_path) == contents(here[0])


@pytest.fixture(scope="module")
def body(server: Server) -> dict[str, Any]:
    adapters = [
        {"source": server.add(MATH), "weight": 1, "weights_by_module": {"q_proj": 2}},
        {"source": server.add(CODE), "weight": 0},
    ]
    return {"adapters": adapters, "rank": 2, "dtype": "float16", "seed": 5}


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_flags_override_a_recipe(server: Server, body: dict[str, Any], kind: str, tmp_path: Path, data_dir: Path) -> None:
    path = tmp_path / f"recipe.{kind}"
    path.write_text(yaml.safe_dump(body) if kind == "yaml" else json.dumps(body))
    flags = ("--rank", "energy:0.9:3", "--profile", "compact", "-w", "1", "-w", "-1", "--url", server.url)
    ran = preloaded("merge", "-f", path, *flags, "-o", tmp_path / "out", data_dir=data_dir)
    assert ran.returncode == 0, ran.stderr
    used = recipe(tmp_path / "out")
    assert (used["rank"], used["profile"]) == ({"energy": 0.9, "max": 3}, "compact")
    assert (used["dtype"], used["seed"]) == ("float16", 5)
    assert [(a["weight"], a["weights_by_module"]) for a in used["adapters"]] == [(1.0, [["q_proj", 2.0]]), (-1.0, [])]


# --- bases

BASIS = ("--method", "rmm", "-p", "codec=truncate", "-p", "budget=1.0")


@pytest.fixture(scope="module", params=["here", "there"])
def basis(
    request: pytest.FixtureRequest, server: Server, directories: tuple[Path, Path], data_dir: Path
) -> tuple[str, tuple[Any, ...], Path]:
    """A basis made in the command's own process or on a server: its id, the flags to find it with, and where it was saved."""
    flags = () if request.param == "here" else ("--url", server.url)
    output = data_dir.parent / f"cli-basis-{request.param}"
    ran = preloaded("merge", *directories, *BASIS, "-o", output, *flags, data_dir=data_dir)
    assert ran.returncode == 0, ran.stderr
    (command,) = [line for line in ran.stdout.splitlines() if line.startswith("braid reconstruct")]
    assert command.split()[3:] == ["math", "-o", "math"]
    return command.split()[2], flags, output


def test_a_basis_is_saved_whole(basis: tuple[str, tuple[Any, ...], Path]) -> None:
    assert sorted(contents(basis[2])) == ["basis.json", "basis.safetensors", "report.json"]


def test_a_task_comes_back(basis: tuple[str, tuple[Any, ...], Path], tmp_path: Path, data_dir: Path) -> None:
    ran = preloaded("reconstruct", basis[0], "math", "-o", tmp_path / "math", *basis[1], data_dir=data_dir)
    assert (ran.returncode, ran.stderr) == (0, "")
    got, expected = dense_directory(tmp_path / "math"), dense(MATH)
    assert max(float((got[m] - expected[m]).norm() / expected[m].norm()) for m in expected) < 1e-2


def test_a_mix_comes_back_at_its_rank(basis: tuple[str, tuple[Any, ...], Path], tmp_path: Path, data_dir: Path) -> None:
    ran = preloaded(
        "reconstruct", basis[0], "math=0.5", "code=-2", "-r", "5", "-o", tmp_path / "mix", *basis[1], data_dir=data_dir
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    got, (a, b) = dense_directory(tmp_path / "mix"), (dense(MATH), dense(CODE))
    assert max(float((got[m] - 0.5 * a[m] + 2 * b[m]).norm() / b[m].norm()) for m in a) < 4e-2


def test_a_basis_shows_its_tasks(basis: tuple[str, tuple[Any, ...], Path], data_dir: Path) -> None:
    ran = preloaded("rmm", "show", basis[0], *basis[1], data_dir=data_dir)
    assert ran.returncode == 0, ran.stderr
    assert all(word in ran.stdout for word in ("math", "code", "truncate"))


@pytest.mark.parametrize(
    ("task", "mention"), [("law", "no task 'law'"), ("math=x", "'math=x' is neither a task nor task=weight")], ids=str
)
def test_a_task_that_cannot_be_is_refused(
    basis: tuple[str, tuple[Any, ...], Path], task: str, mention: str, data_dir: Path
) -> None:
    assert_refused(preloaded("reconstruct", basis[0], task, *basis[1], data_dir=data_dir), mention)


# --- import and the store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, directories: tuple[Path, Path]) -> Path:
    """A store of its own: one adapter that was named, one that nothing refers to."""
    data_dir = tmp_path_factory.mktemp("cli-store")
    imported = preloaded("import", directories[0], "--name", "cli/math", data_dir=data_dir)
    assert imported.returncode == 0, imported.stderr
    FileBlobs(data_dir).put([b"an orphan"], media_type="text/plain")
    return data_dir


def test_an_import_prints_the_id(server: Server, directories: tuple[Path, Path], data_dir: Path) -> None:
    printed = preloaded("import", directories[0], "--url", server.url, data_dir=data_dir).stdout.strip()
    assert printed == server.add(MATH)


def test_an_import_from_the_hub(hub_service: Server, hub: HubServer, data_dir: Path) -> None:
    hub.add_repo("org/cli", hub_files(make_named("org/cli")), readers=["hf_cli"], private=True)
    command = ("import", "hub:org/cli", "--name", "cli/hub", "--hub-token", "hf_cli")
    there = preloaded(*command, "--url", hub_service.url, data_dir=data_dir)
    in_process = preloaded(*command, data_dir=data_dir, BRAID_HUB_ENDPOINT=hub.endpoint)
    assert (there.returncode, there.stdout) == (0, in_process.stdout), there.stderr


def test_a_named_import_is_a_source(store: Path, tmp_path: Path) -> None:
    assert preloaded("merge", "name:cli/math", "-o", tmp_path / "m", data_dir=store).returncode == 0


def test_gc_removes_what_nothing_refers_to_and_nothing_else(store: Path, tmp_path: Path) -> None:
    before = sum(1 for _ in FileBlobs(store).digests())
    swept = preloaded("store", "gc", "--grace", "0", data_dir=store)
    assert swept.stdout.startswith("removed ")
    assert 0 < sum(1 for _ in FileBlobs(store).digests()) < before
    assert preloaded("merge", "name:cli/math", "-w", "2", "-o", tmp_path / "m", data_dir=store).returncode == 0


def test_gc_keeps_what_is_young(store: Path) -> None:
    young = FileBlobs(store).put([b"young"], media_type="text/plain")
    preloaded("store", "gc", data_dir=store)
    assert FileBlobs(store).stat(young.digest) == 5


def test_verify_names_a_damaged_blob(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    whole, damaged = (blobs.put([text], media_type="text/plain").digest for text in (b"whole", b"damaged"))
    path = blobs.path(damaged)
    path.chmod(0o644)
    path.write_bytes(b"damageD")
    ran = preloaded("store", "verify", data_dir=tmp_path)
    assert (ran.returncode, str(damaged) in ran.stdout, str(whole) in ran.stdout) == (1, True, False)


def test_gc_keeps_what_a_waiting_job_needs(lean: Server) -> None:
    adapter = lean.add(MATH)
    lean.http.post("/merge", json={"adapters": [{"source": adapter}]}).raise_for_status()
    lean.http.delete(f"/adapters/{adapter}").raise_for_status()
    preloaded("store", "gc", "--grace", "0", data_dir=lean.data_dir)
    blobs = FileBlobs(lean.data_dir)
    assert [blobs.stat(Digest.of(data)) for data in MATH.files.values()] == [len(data) for data in MATH.files.values()]


# --- help and refusals


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command: str, data_dir: Path) -> None:
    ran = preloaded(*command.split(), "--help", data_dir=data_dir)
    assert (ran.returncode, "Example" in ran.stdout, f"braid {command}" in ran.stdout) == (0, True, True)


def test_no_command_is_left_out() -> None:
    top = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    groups = [
        (group, c.name or getattr(c.callback, "__name__", ""))
        for group in (store_app, rmm_app, data_app)
        for c in group.registered_commands
    ]
    below = [f"{group.info.name} {name}" for group, name in groups]
    assert sorted(top + below) == sorted(COMMANDS)


def assert_refused(ran: Ran, mention: str) -> None:
    """One sentence, exit code 2, no traceback."""
    assert ran.returncode == 2, ran.stderr
    assert mention in ran.stderr
    assert "Traceback" not in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert ran.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("command", "mention"),
    [
        ("merge", "at least one adapter"),
        ("merge DIR -w 1 -w 2", "2 weights for 1 adapters"),
        ("merge DIR --rank many", "many"),
        ("merge DIR --rank 0", "rank"),
        ("merge DIR -w nan", "adapters.0.weight"),
        ("merge DIR -m ties-typo", "task_arithmetic"),
        ("merge DIR -p density", "name=value"),
        ("merge ./nowhere", "./nowhere"),
        ("merge EMPTY", "adapter_config.json"),
        ("merge EMPTY --url SERVER", "adapter_config.json"),
        ("merge DIR --rank 1000", "rank 3 at most"),
        ("merge -f EMPTY/none.yaml", "none.yaml"),
        ("merge -f RECIPE", "adapters"),
        ("merge sha256:xyz --url SERVER", "sha256:xyz"),
        ("merge DIR --url http://127.0.0.1:9", "127.0.0.1:9"),
        ("merge DIR --url nonsense", "nonsense"),
        ("merge DIR --url HUB", "no Braid server"),
        ("merge DIR -o FILE", "FILE"),
        ("import ./nowhere", "neither a directory nor hub:"),
        ("import hub:org/../x", "org/../x"),
        ("import DIR --name x --url SERVER", "name"),
        ("worker --data-dir FILE", "FILE"),
        ("store verify --data-dir FILE", "FILE"),
    ],
)
def test_a_mistake_is_one_sentence(
    server: Server,
    hub: HubServer,
    directories: tuple[Path, Path],
    tmp_path: Path,
    data_dir: Path,
    command: str,
    mention: str,
) -> None:
    places = {"DIR": directories[0], "EMPTY": tmp_path, "SERVER": server.url, "HUB": hub.endpoint, "FILE": tmp_path / "FILE"}
    (tmp_path / "FILE").write_text("a file")
    (tmp_path / "RECIPE").write_text("adapters: [1, {weight: x}]")
    words = [str(places.get(word, word)).replace("EMPTY/", f"{tmp_path}/") for word in command.split()]
    words = [str(tmp_path / "RECIPE") if word == "RECIPE" else word for word in words]
    assert_refused(preloaded(*words, data_dir=data_dir), mention)


def test_a_port_in_use_is_one_sentence(data_dir: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(preloaded("serve", "--port", port, data_dir=data_dir), "in use")


@pytest.mark.parametrize(
    ("name", "value"),
    [("BRAID_PORT", "many"), ("BRAID_DEVICES", "gpu"), ("BRAID_LOG_LEVEL", "LOUD"), ("BRAID_WORKER_ID", "../x")],
)
def test_a_wrong_setting_is_one_sentence(data_dir: Path, name: str, value: str) -> None:
    assert_refused(preloaded("serve", data_dir=data_dir, **{name: value}), name)


def test_a_job_that_fails_on_the_server_is_one_sentence(
    hub_service: Server, hub: HubServer, tmp_path: Path, data_dir: Path
) -> None:
    good = make_named("org/cli-broken")
    nan = {name: tensor * float("nan") for name, tensor in good.tensors.items()}
    hub.add_repo("org/cli-broken", hub_files(Made(nan, good.config)))
    ran = preloaded("merge", "hub:org/cli-broken", "-o", tmp_path / "m", "--url", hub_service.url, data_dir=data_dir)
    assert_refused(ran, "NaN or Inf")


# --- demo


def test_the_demo_ends_with_an_adapter_that_loads(tmp_path: Path, data_dir: Path) -> None:
    ran = braid("demo", "-o", tmp_path / "m", data_dir=data_dir)
    assert ran.returncode == 0, ran.stderr
    assert "30 modules carry the merged adapter" in ran.stdout
    assert sorted(contents(tmp_path / "m")) == FILES


def test_the_demo_takes_adapters_from_the_hub(hub: HubServer, tmp_path: Path, data_dir: Path) -> None:
    for n, name in enumerate(("org/demo-a", "org/demo-b")):
        hub.add_repo(name, hub_files(make_named("org/demo", n)))
    command = ("demo", "--hub", "org/demo-a", "org/demo-b", "--weight", "0.5", "-o", tmp_path / "m")
    ran = preloaded(*command, data_dir=data_dir, BRAID_HUB_ENDPOINT=hub.endpoint)
    assert ran.returncode == 0, ran.stderr
    assert [a["source"].partition("@")[0] for a in json.loads((tmp_path / "m/report.json").read_text())["inputs"]] == [
        "hub hub:org/demo-a",
        "hub hub:org/demo-b",
    ]
