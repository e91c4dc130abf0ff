"""What the code offers is written down, and what is written down exists: settings, routes, errors, commands."""

import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from app.cli import app as cli
from app.errors import STATUS, slug
from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ERRORS = (ROOT / "docs" / "errors.md").read_text()
VARIABLES = {f"BRAID_{name.upper()}": field for name, field in Settings.model_fields.items()}
VERBS = "GET|HEAD|POST|PUT|PATCH|DELETE"


def rows(text: str) -> dict[str, list[str]]:
    """Tables of Markdown whose first column is in backticks: that word -> the other cells."""
    cells = [re.split(r"\s*\|\s*", line.strip().strip("|").strip()) for line in text.splitlines() if line.startswith("| `")]
    return {first.strip("`"): rest for first, *rest in cells}


def routes() -> Mapping[str, Any]:
    return create_app(Settings()).openapi()["paths"]


def unnamed(path: str) -> str:
    """`/jobs/{job_id}` -> `/jobs/{}`: how a variable part is called is free."""
    return re.sub(r"\{\w*\}", "{}", path)


# Settings


@pytest.mark.parametrize("variable", VARIABLES)
def test_every_setting_is_in_the_table_with_its_default(variable: str) -> None:
    default = VARIABLES[variable].default
    shown = "none" if default is None else str(default).replace(str(Path.home()), "~")
    assert rows(README)[variable][0].strip("`") == shown


@pytest.mark.parametrize("variable", VARIABLES)
def test_every_setting_says_what_it_is_for_in_the_same_words_everywhere(variable: str) -> None:
    assert rows(README)[variable][1].replace("`", "") == (VARIABLES[variable].description or "").replace("`", "")


@pytest.mark.parametrize("file", ["README.md", "docs/errors.md", "Dockerfile", "docker-compose.yml"])
def test_no_variable_is_mentioned_that_nobody_reads(file: str) -> None:
    assert set(re.findall(r"BRAID_[A-Z_]+", (ROOT / file).read_text())) <= set(VARIABLES)


# Routes


def offered() -> Iterator[str]:
    for path, operations in routes().items():
        yield from (f"{verb.upper()} {path}" for verb in operations)


@pytest.mark.parametrize("operation", sorted(offered()))
def test_every_route_is_in_the_readme(operation: str) -> None:
    assert f"`{unnamed(operation)}`" in unnamed(README)


def test_every_route_of_the_readme_exists() -> None:
    mentioned = re.findall(rf"`((?:{VERBS}) /[^`\s]*)`", README)
    assert {unnamed(each) for each in mentioned} <= {unnamed(each) for each in offered()}


def test_every_route_is_called_in_an_example_or_answers_without_a_body() -> None:
    called = re.findall(r"curl [^\n]*localhost:8000(/[a-z]+)", README)
    changing = {path.split("/")[1] for path, operations in routes().items() if operations.keys() - {"get", "head"}}
    assert changing <= {path.strip("/") for path in called}


# Errors


def improvised() -> set[str]:
    """Slugs that come from no exception class: hyphenated words in the modules that make problems."""
    found = set()
    for file in sorted((ROOT / "app").rglob("*.py")):
        tree = ast.parse(file.read_text())
        if any(isinstance(node, ast.Name) and node.id == "make_problem" for node in ast.walk(tree)):
            words = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
            found |= {word for word in words if re.fullmatch(r"[a-z]+(-[a-z]+)+", word)}
    return found


@pytest.mark.parametrize("error", STATUS, ids=slug)
def test_every_error_is_documented_with_its_status_and_members(error: type[Exception]) -> None:
    status, members, *_ = rows(ERRORS)[slug(error)]
    fields = [field.name for field in dataclasses.fields(error)] if dataclasses.is_dataclass(error) else []
    assert (status, re.findall(r"`(\w+)`", members)) == (str(STATUS[error]), fields)


def test_problems_that_are_no_exceptions_are_documented() -> None:
    assert {"not-found", "invalid-request", "internal-error"} <= improvised()
    assert sorted(improvised() - set(rows(ERRORS))) == []


def test_every_documented_error_exists() -> None:
    assert sorted(set(rows(ERRORS)) - {slug(error) for error in STATUS} - improvised()) == []


@pytest.mark.parametrize("row", rows(ERRORS).items(), ids=lambda row: row[0])
def test_every_error_says_what_it_means_and_what_to_do(row: tuple[str, list[str]]) -> None:
    _, _, meaning, remedy = row[1]
    assert meaning and remedy


# The command line


def commands(group: Any, prefix: str = "braid") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


COMMANDS = dict(commands(typer.main.get_command(cli)))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"`{command}" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command: str) -> None:
    assert re.search(rf"Example.*`.*{command}\b", COMMANDS[command].help, re.DOTALL)


def test_every_command_and_flag_of_the_readme_exists() -> None:
    for line in re.findall(r"(?:^|`)(braid [a-z][^`#\n]*)", README, re.MULTILINE):
        known = [name for name in COMMANDS if f"{line} ".startswith(f"{name} ")]
        assert known, line
        options = {flag for parameter in COMMANDS[known[0]].params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", line)) <= options, line


# Links


@pytest.mark.parametrize("file", ["README.md", "docs/errors.md"])
def test_every_link_into_the_repository_leads_somewhere(file: str) -> None:
    document = ROOT / file
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target
