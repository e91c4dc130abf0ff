"""The container files say nothing that the code does not know: paths, ports, variables, users and commands.

No container is started. Every command of theirs runs here as a process, in the environment that they would give it,
adjusted only in address, port and data directory.
"""

import fnmatch
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import app.demo
from app.cli import app as cli
from app.main import create_app
from app.settings import Settings
from making import dense, dense_directory, make
from serving import Server, serving, start, stopped

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY", re.IGNORECASE)
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


@dataclass(frozen=True)
class Instruction:
    """One line of a Dockerfile: `COPY --from=builder a b` is name COPY, flags {"from": "builder"}, rest "a b"."""

    name: str
    flags: Mapping[str, str]
    rest: str

    @property
    def words(self) -> list[str]:
        """The arguments, from the JSON form or the plain one."""
        return json.loads(self.rest) if self.rest.startswith("[") else shlex.split(self.rest)


def parse_dockerfile(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\s*\n", " ", "\n".join(lines))
    return [_instruction(line) for line in joined.splitlines() if line.strip()]


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().partition(" ")
    flags = {}
    while match := re.match(r"\s*--([a-z-]+)=(\S+)\s*", rest):
        flags[match[1]] = match[2]
        rest = rest[match.end() :]
    return Instruction(name.upper(), flags, rest.strip())


def stages(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    starts = [index for index, each in enumerate(instructions) if each.name == "FROM"]
    return [list(instructions[start:end]) for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True)]


def named(instructions: Sequence[Instruction], name: str) -> list[Instruction]:
    return [each for each in instructions if each.name == name]


def assigned(instructions: Sequence[Instruction]) -> dict[str, str]:
    """What ENV sets."""
    return dict(word.split("=", 1) for each in named(instructions, "ENV") for word in each.words)


DOCKERFILE = parse_dockerfile((ROOT / "Dockerfile").read_text())
BUILDER, FINAL = stages(DOCKERFILE)
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ENTRYPOINT = named(FINAL, "ENTRYPOINT")[0].words
DEFAULT_COMMAND = named(FINAL, "CMD")[0].words
COMMANDS = {"image": DEFAULT_COMMAND, **{name: list(service["command"]) for name, service in SERVICES.items()}}
HEALTHCHECK = json.loads(named(FINAL, "HEALTHCHECK")[0].rest.removeprefix("CMD "))
VENV = "/opt/braid"


def environment(service: str) -> dict[str, str]:
    """BRAID_* as the container of this service would see them, where the host sets none of those passed through."""
    given = {**assigned(FINAL), **(SERVICES[service].get("environment", {}) if service in SERVICES else {})}
    return {name: value for name, value in given.items() if name.startswith("BRAID_") and value is not None}


def local_sources() -> list[str]:
    return [source for each in named(DOCKERFILE, "COPY") if "from" not in each.flags for source in each.words[:-1]]


def test_the_parser_reads_continuations_flags_and_both_forms() -> None:
    text = 'FROM a:1 AS b\n# not me\nRUN x \\\n  # nor me\n  && y\nCOPY --from=b --chown=1 p q\nCMD ["c", "d e"]\n'
    parsed = parse_dockerfile(text)
    assert [each.name for each in parsed] == ["FROM", "RUN", "COPY", "CMD"]
    assert parsed[1].words == ["x", "&&", "y"]
    assert (parsed[2].flags, parsed[2].words) == ({"from": "b", "chown": "1"}, ["p", "q"])
    assert parsed[3].words == ["c", "d e"]


# The image


def test_every_base_image_has_a_version() -> None:
    for stage in (BUILDER, FINAL):
        image, _, tag = stage[0].words[0].partition(":")
        assert image and re.match(r"\d", tag), stage[0].rest


def test_the_image_runs_a_python_that_the_project_supports() -> None:
    versions = {stage[0].words[0].partition(":")[2].partition("-")[0] for stage in (BUILDER, FINAL)}
    assert len(versions) == 1
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert [int(n) for n in versions.pop().split(".")] >= [int(n) for n in oldest.split(".")]


def test_the_final_stage_takes_only_the_environment_from_the_builder() -> None:
    copied = named(FINAL, "COPY")
    assert [(each.flags, each.words) for each in copied] == [({"from": BUILDER[0].words[2]}, [VENV, VENV])]
    assert not any("pip" in each.rest for each in named(FINAL, "RUN"))
    assert assigned(FINAL)["PATH"].startswith(f"{VENV}/bin:")


@pytest.mark.parametrize("source", local_sources())
def test_every_copied_path_exists_and_reaches_the_build(source: str) -> None:
    assert (ROOT / source).exists()
    rules = (ROOT / ".dockerignore").read_text().split()
    kept = [rule for rule in rules if fnmatch.fnmatch(source, rule.removeprefix("!"))]
    assert kept[-1].startswith("!")


def test_nothing_reaches_the_build_but_what_is_copied() -> None:
    rules = (ROOT / ".dockerignore").read_text().split()
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == set(local_sources())


def test_every_directory_of_sources_is_a_package_that_gets_installed() -> None:
    included = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    holding = {file.parent for name in ("app", "merge_algos", "storage") for file in (ROOT / name).rglob("*.py")}
    for directory in holding:
        assert (directory / "__init__.py").is_file(), directory
        assert any(fnmatch.fnmatch(".".join(directory.relative_to(ROOT).parts), pattern) for pattern in included)


def test_pip_installs_the_project_with_the_tested_versions() -> None:
    installs = [each.rest for each in named(BUILDER, "RUN") if "pip install" in each.rest]
    assert len(installs) == 2
    assert all("-c constraints.txt" in each for each in installs)
    assert installs[-1].endswith(" .")
    wanted = [re.split(r"[<>=\[]", each)[0] for each in PROJECT["project"]["dependencies"]]
    assert [name for name in wanted if _plain(name) not in {_plain(pin) for pin in PINS}] == []


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def test_torch_comes_from_the_cpu_index_unless_the_build_argument_says_otherwise() -> None:
    (argument,) = named(BUILDER, "ARG")
    name, _, default = argument.rest.partition("=")
    assert default == "https://download.pytorch.org/whl/cpu"
    (install,) = [each.rest for each in named(BUILDER, "RUN") if f'--index-url "${name}"' in each.rest]
    assert install.endswith(" torch") and "--no-deps" in install
    assert f"--build-arg {name}=https://download.pytorch.org/whl/cu" in (ROOT / "Dockerfile").read_text()


def test_the_pin_of_torch_fits_every_index() -> None:
    assert re.fullmatch(r"[\d.]+", PINS["torch"])


def test_the_demo_finds_its_adapters_beside_the_package() -> None:
    looked_for = app.demo._EXAMPLES.relative_to(Path(app.demo.__file__).parent.parent)
    (copied,) = [each for each in named(BUILDER, "COPY") if each.words[0] == looked_for.parts[0]]
    version = BUILDER[0].words[0].partition(":")[2].removesuffix("-slim")
    assert copied.words[1] == f"{VENV}/lib/python{version}/site-packages/{looked_for.parts[0]}"


def test_the_user_is_not_root() -> None:
    (user,) = named(FINAL, "USER")
    assert int(user.rest) > 0
    assert f"--uid {user.rest} " in named(FINAL, "RUN")[0].rest
    assert not named(FINAL[FINAL.index(user) :], "RUN")


def test_the_data_directory_is_the_volume_and_belongs_to_the_user() -> None:
    data_dir = environment("image")["BRAID_DATA_DIR"]
    assert named(FINAL, "VOLUME")[0].words == [data_dir]
    assert re.search(rf"install -d -o (\w+) -g \1 {data_dir}$", named(FINAL, "RUN")[0].rest)
    assert FINAL.index(named(FINAL, "RUN")[0]) < FINAL.index(named(FINAL, "VOLUME")[0])


def test_the_entry_point_is_the_command_of_the_project() -> None:
    assert list(PROJECT["project"]["scripts"]) == ENTRYPOINT


@pytest.mark.parametrize("file", ["Dockerfile", "docker-compose.yml"])
def test_every_variable_is_a_setting(file: str) -> None:
    used = set(re.findall(r"BRAID_[A-Z_]+", (ROOT / file).read_text()))
    assert used and used <= {f"BRAID_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("service", COMMANDS)
def test_the_environment_is_one_that_the_settings_accept(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(service).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    for name, value in environment(service).items():
        assert str(getattr(settings, name.removeprefix("BRAID_").lower())) == value


def test_no_secret_is_baked_in() -> None:
    baked = [word for name in ("ENV", "ARG", "LABEL") for each in named(DOCKERFILE, name) for word in each.words]
    assert not [word for word in baked if SECRET.search(word)]
    given = [pair for service in SERVICES.values() for pair in service.get("environment", {}).items()]
    assert {name: value for name, value in given if SECRET.search(name)} == {"BRAID_HUB_TOKEN": None}


# The services


def test_the_services_are_the_api_and_a_worker() -> None:
    assert {name: command[0] for name, command in COMMANDS.items()} == {"image": "serve", "api": "serve", "worker": "worker"}
    assert "--no-worker" in COMMANDS["api"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_built_here_and_carries_the_version_of_the_project(service: str) -> None:
    assert SERVICES[service]["build"] == "."
    assert SERVICES[service]["image"] == f"braid:{PROJECT['project']['version']}"


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_comes_back_after_a_crash_and_reaps_its_children(service: str) -> None:
    assert SERVICES[service]["restart"] == "always"
    assert SERVICES[service]["init"] is True


@pytest.mark.parametrize("service", SERVICES)
def test_all_services_share_one_volume_at_the_data_directory(service: str) -> None:
    (volume,) = COMPOSE["volumes"]
    assert SERVICES[service]["volumes"] == [f"{volume}:{environment(service)['BRAID_DATA_DIR']}"]


def test_the_ports_agree() -> None:
    port = Settings.model_fields["port"].default
    assert named(FINAL, "EXPOSE")[0].words == [str(port)]
    assert environment("image")["BRAID_PORT"] == str(port)
    assert [each.split(":")[1:] for each in SERVICES["api"]["ports"]] == [[str(port), str(port)]]
    assert "ports" not in SERVICES["worker"]


def test_the_api_is_published_to_this_machine_only() -> None:
    assert all(each.startswith("127.0.0.1:") for each in SERVICES["api"]["ports"])


def test_only_the_api_is_asked_for_its_health() -> None:
    assert "healthcheck" not in SERVICES["api"]  # the image's own
    assert SERVICES["worker"]["healthcheck"] == {"disable": True}


def test_what_a_service_depends_on_is_a_service() -> None:
    assert {name for service in SERVICES.values() for name in service.get("depends_on", ())} <= set(SERVICES)


def test_the_worker_has_a_name_of_its_own() -> None:
    names = [environment(service).get("BRAID_WORKER_ID") for service, command in COMMANDS.items() if command[0] == "worker"]
    assert all(names) and len(names) == len(set(names))


# The commands


def parse_command(argv: Sequence[str]) -> dict[str, Any]:
    """Parameters of a `braid` command line as typer itself reads it. Raises SystemExit or typer's errors if it does not."""
    command, words = typer.main.get_command(cli), list(argv)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command.make_context(argv[0], words).params


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS)
def test_every_command_and_flag_is_one_of_the_command_line(argv: list[str]) -> None:
    flags = [word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in argv if word.startswith("--")]
    assert set(flags) <= set(parse_command(argv))


@pytest.mark.parametrize("argv", [["serve", "--nope"], ["worker", "--port", "1"], ["wait"]], ids=" ".join)
def test_an_unknown_command_or_flag_would_be_noticed(argv: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such option|wait"):
        parse_command(argv)


@pytest.mark.parametrize("argv", [COMMANDS["image"], COMMANDS["api"]], ids=["image", "api"])
def test_the_api_listens_where_the_outside_of_a_container_reaches_it(argv: list[str]) -> None:
    assert parse_command(argv)["host"] == "0.0.0.0"


@contextmanager
def running(service: str, data_dir: Path) -> Iterator[Server]:
    """The `serve` command of this service on a free loopback port."""
    flags = ["127.0.0.1" if word == "0.0.0.0" else word for word in COMMANDS[service][1:]]
    here = {"BRAID_DATA_DIR": str(data_dir), "BRAID_PORT": "0"}
    with serving(data_dir, *flags, **{**environment(service), **here}) as server:
        yield server


@contextmanager
def working(data_dir: Path) -> Iterator[None]:
    here = {**environment("worker"), "BRAID_DATA_DIR": str(data_dir)}
    process = start(*COMMANDS["worker"], data_dir=data_dir, log=data_dir / "worker.log", environment=here)
    with stopped(process):
        yield


def check_health(url: str) -> int:
    """Exit status of the image's health check, run by our interpreter against this server."""
    assert HEALTHCHECK[0] == "python"
    here = {"BRAID_PORT": url.rpartition(":")[2]}
    return subprocess.run([sys.executable, *HEALTHCHECK[1:]], env=here, timeout=20, stderr=subprocess.DEVNULL).returncode


def merge_two(server: Server, directory: Path) -> None:
    """Upload, merge and download, and compare with the plain sum."""
    first, second = make(1), make(2, r=3)
    job = server.merge(server.add(first), server.add(second), weights=[0.5, -2.0], dtype="float32")
    assert job["state"] == "succeeded", job["error"]
    merged = dense_directory(server.download(job["result"]["id"], directory))
    left, right = dense(first), dense(second)
    for module, delta in merged.items():
        assert (delta - (0.5 * left[module] - 2.0 * right[module])).abs().max() < 1e-4
    assert merged.keys() == left.keys()


def test_the_composed_services_merge_together(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    with working(data_dir), running("api", data_dir) as server:  # at the same time, as compose starts them
        assert "worker" not in server.processes()
        merge_two(server, tmp_path / "merged")


def test_the_image_merges_by_itself_and_is_healthy(tmp_path: Path) -> None:
    with running("image", tmp_path / "data") as server:
        assert check_health(server.url) == 0
        merge_two(server, tmp_path / "merged")
    assert check_health(server.url) != 0


def test_the_health_check_asks_a_route_of_the_app(tmp_path: Path) -> None:
    paths = re.findall(r"'(/[a-z]+)'", " ".join(HEALTHCHECK))
    assert paths and set(paths) <= set(create_app(Settings(data_dir=tmp_path)).openapi()["paths"])
