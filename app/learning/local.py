"""What the command line may name as a path: rows, heads and base models, before a request names them by digest."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from app.errors import InvalidField
from app.settings import Settings


def tasks_with(request: Mapping[str, Any], add: Callable[[Path], str]) -> list[dict[str, Any]]:
    """The request's tasks; a `data` or `head` that is a file becomes the id that `add` gives it."""
    return [{**task, **{key: _added(task[key], add) for key in ("data", "head") if task.get(key)}} for task in _tasks(request)]


def base_here(settings: Settings, request: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """Who merges in a process of their own is the operator, and may name any directory as the base model."""
    base = request.get("base_model")
    if not base or not Path(base).is_dir():
        return settings, dict(request)
    folder = Path(base).resolve()
    return settings.model_copy(update={"bases_dir": folder.parent}), {**request, "base_model": f"dir:{folder.name}"}


def refuse_directory(request: Mapping[str, Any]) -> None:
    """Raises InvalidField for a directory of this machine, which a server reads nothing from."""
    base = request.get("base_model")
    if base and ":" not in base and Path(base).is_dir():
        reason = (
            "a server does not read directories of this machine; name hub:org/name, or dir: and a folder that its operator allows"
        )
        raise InvalidField("base_model", reason)


def _tasks(request: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(request.get("tasks") or [])


def _added(source: str, add: Callable[[Path], str]) -> str:
    return add(Path(source)) if Path(source).is_file() else source
