"""What a request says of learning: refused early where it cannot be, then pinned."""

from app import data, ingest
from app.errors import InvalidField
from app.recipe import RecipeTask
from app.schemas import LearningTask, MergeRequest
from app.services import Services
from merge_algos.learn.method import Learned
from merge_algos.protocol import Method
from storage.digest import Digest


def check(request: MergeRequest, method: Method) -> None:
    """Raises InvalidField naming what is missing, superfluous or contradictory."""
    if not isinstance(method, Learned):
        if request.tasks:
            raise InvalidField("tasks", f"{method.name} does not learn, so it has no use for this")
        return
    if request.base_model is None:
        raise InvalidField("base_model", f"{method.name} learns, so it needs the model that the adapters were trained on")
    if not request.tasks:
        raise InvalidField("tasks", f"{method.name} learns, so it needs at least one task with its data")
    names = [task.name for task in request.tasks]
    for position, task in enumerate(request.tasks):
        if names.count(task.name) > 1:
            raise InvalidField(f"tasks.{position}.name", f"{task.name!r} is used twice")
        _check_task(f"tasks.{position}", task, method)
    _check_together(request, method)


def _check_task(field: str, task: LearningTask, method: Learned) -> None:
    if method.task_type == "feature_classification" and task.head is None:
        raise InvalidField(f"{field}.head", "feature_classification reads bare features, so every task needs a head")
    if method.task_type == "causal_lm" and task.head is not None:
        raise InvalidField(f"{field}.head", "causal_lm predicts tokens, so it has no use for a head")
    if method.task_type != "causal_lm" and method.labelled and task.label is None:
        raise InvalidField(f"{field}.label", f"{method.objective} needs labels: name their column")
    if method.task_type != "causal_lm" and task.prompt is not None:
        raise InvalidField(f"{field}.prompt", "only causal_lm has prompts")
    if task.forget and method.objective != "negation":
        raise InvalidField(f"{field}.forget", "only the objective negation forgets")


def _check_together(request: MergeRequest, method: Learned) -> None:
    with_head = [task.head is not None for task in request.tasks]
    if any(with_head) != all(with_head):
        raise InvalidField("tasks", "give a head to every task, or to none")
    if method.objective == "negation" and not any(task.forget for task in request.tasks):
        raise InvalidField("tasks", "the objective negation needs a task to `forget`")


def pinned(position: int, task: LearningTask, services: Services, token: str | None) -> RecipeTask:
    """The task with its rows and head named by digest; a Hub dataset is fetched now. Raises the errors of `app.data`."""
    split = task.split or "train"
    source = data.pin(services, task.data, split, token=token)
    parts = data.obtain(services, source, split)
    head = _head(services, f"tasks.{position}.head", task.head, token) if task.head else None
    files = [data.get(services, part) for part in (*parts, *([head] if head else []))]
    return RecipeTask(
        name=task.name,
        weight=task.weight,
        data=tuple(str(part) for part in parts),
        text=task.text,
        label=task.label,
        prompt=task.prompt,
        head=str(head) if head else None,
        forget=task.forget,
        restricted=tuple(dict.fromkeys(source for file in files for source in file.restricted)),
    )


def _head(services: Services, field: str, head: str, token: str | None) -> Digest:
    """Raises InvalidField for what is no head, UnknownData, and the Hub's errors."""
    record = data.get(services, Digest.parse(head))
    if record.kind != "safetensors":
        raise InvalidField(field, f"these are rows ({record.kind}), not the weights of a head")
    ingest.check_access(services, record, token=token)
    return record.id
