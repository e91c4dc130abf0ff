"""Texts as tokens, and their labels, checked against what will read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from app.errors import BadData
from merge_algos.blocks import seed_of
from merge_algos.learn.objectives import IGNORED

TaskType = Literal["causal_lm", "sequence_classification", "feature_classification"]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """tokens: of each row, 1-D long.  labels: of each row a class (), or a class per token; None where there are none."""

    tokens: tuple[Tensor, ...]
    labels: tuple[Tensor, ...] | None

    def __len__(self) -> int:
        return len(self.tokens)

    def at(self, positions: Sequence[int]) -> "Rows":
        chosen = None if self.labels is None else tuple(self.labels[n] for n in positions)
        return Rows(tuple(self.tokens[n] for n in positions), chosen)


@dataclass(frozen=True, slots=True)
class Limits:
    """max_length: tokens of a row, special ones included.  truncate: cut longer ones instead of refusing them."""

    max_length: int
    truncate: bool


def classified(
    task: str,
    tokenizer: Any,
    texts: Sequence[Any],
    labels: Sequence[Any] | None,
    classes: Mapping[str, int] | int,
    limits: Limits,
) -> Rows:
    """Rows of one class each. classes: their number, or name -> number. Raises BadData naming task and row."""
    tokens = [_encoded(task, n, tokenizer, text, limits) for n, text in enumerate(_texts(task, texts))]
    if labels is None:
        return Rows(tuple(tokens), None)
    return Rows(tuple(tokens), tuple(torch.tensor(_class(task, n, label, classes)) for n, label in enumerate(labels)))


def continued(task: str, tokenizer: Any, prompts: Sequence[Any] | None, texts: Sequence[Any], limits: Limits) -> Rows:
    """Rows whose every token is to be predicted, but for those of a prompt. Raises BadData naming task and row."""
    given = _texts(task, texts)
    starts = [""] * len(given) if prompts is None else _texts(task, prompts, empty=True)
    rows = [_continued(task, n, tokenizer, *pair, limits) for n, pair in enumerate(zip(starts, given, strict=True))]
    return Rows(tuple(row for row, _ in rows), tuple(labels for _, labels in rows))


def split(count: int, fraction: float, most: int, *, seed: int, task: str) -> tuple[list[int], list[int]]:
    """Rows for training, and rows held out: a fraction of all, at least one of each, at most `most` held out."""
    held_out = min(max(1, round(fraction * count)), most, count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, "held out", task))).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def _texts(task: str, texts: Sequence[Any], *, empty: bool = False) -> list[str]:
    for n, text in enumerate(texts):
        if not isinstance(text, str) or not (text.strip() or empty):
            raise BadData(
                task, f"row {n} holds {type(text).__name__}, not text" if not isinstance(text, str) else f"row {n} is empty"
            )
    return list(texts)


def _encoded(task: str, row: int, tokenizer: Any, text: str, limits: Limits) -> Tensor:
    return torch.tensor(_cut(task, row, tokenizer(text)["input_ids"], limits, last=_last(tokenizer)))


def _last(tokenizer: Any) -> int:
    """How many special tokens stand at the end of a row, to be kept when it is cut."""
    sample = tokenizer("a")["input_ids"]
    return int(sample[-1] in tokenizer.all_special_ids)


def _cut(task: str, row: int, tokens: list[int], limits: Limits, *, last: int = 0) -> list[int]:
    if len(tokens) <= limits.max_length:
        return tokens
    if not limits.truncate:
        remedy = "raise max_length, or set truncate"
        raise BadData(task, f"row {row} has {len(tokens)} tokens where max_length is {limits.max_length}; {remedy}")
    return tokens[: limits.max_length - last] + tokens[len(tokens) - last :]


def _class(task: str, row: int, label: Any, classes: Mapping[str, int] | int) -> int:
    if isinstance(classes, Mapping):
        if label in classes:
            return classes[label]
        classes = len(classes)
    if isinstance(label, bool) or not isinstance(label, int):
        raise BadData(task, f"row {row} has the label {str(label)[:50]!r}, where a class number is needed")
    if not 0 <= label < classes:
        raise BadData(task, f"row {row} has the label {label}, where the head knows 0 to {classes - 1}")
    return label


def _continued(task: str, row: int, tokenizer: Any, prompt: str, text: str, limits: Limits) -> tuple[Tensor, Tensor]:
    before = tokenizer(prompt)["input_ids"] if prompt else []
    after = tokenizer(text, add_special_tokens=not prompt)["input_ids"]
    tokens = torch.tensor(_cut(task, row, [*before, *after], limits))
    labels = tokens.clone()
    labels[: len(before)] = IGNORED
    if len(tokens) < 2 or not (labels[1:] != IGNORED).any():
        raise BadData(task, f"row {row} leaves no token to predict")
    return tokens, labels
