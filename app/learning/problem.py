"""A base model, adapters and rows as the problem that the training loop knows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from app.learning.rows import Rows
from merge_algos.learn.attach import attached
from merge_algos.learn.layout import Layout
from merge_algos.learn.objectives import IGNORED, Output
from merge_algos.learn.problem import Picked, Task
from merge_algos.lowrank import LowRankDelta

Head = Callable[[Tensor], Tensor]
_DROPPED = 0.15  # of the tokens of the strong view


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """tokens, mask: (rows, length)."""

    tokens: Tensor
    mask: Tensor


Forward = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ModelProblem:
    """deltas: name in the model -> all adapters stacked.  modules: name in the model -> name in the layout.

    forward: a batch to features (rows, d), or to logits (rows, length, vocabulary).  heads: of each task, from features to
    logits.  per_pass: rows in one pass through the model; they are sorted by length first, so that little is padded.
    """

    model: nn.Module
    layout: Layout
    deltas: Mapping[str, LowRankDelta]
    modules: Mapping[str, str]
    tasks: tuple[Task, ...]
    train: tuple[Rows, ...]
    held: tuple[Rows, ...]
    heads: tuple[Head, ...]
    forward: Forward
    pad_token: int
    per_pass: int
    device: torch.device

    def outputs(self, coefficients: Tensor, picked: Picked, *, held_out: bool = False, noise: int | None = None) -> list[Output]:
        """See `merge_algos.learn.problem.Problem`."""
        source = self.held if held_out else self.train
        chosen = [source[task].at(rows) for task, rows in picked.items()]
        flat = [tokens for rows in chosen for tokens in rows.tokens]
        if noise is not None:
            flat = _thinned(flat, noise)
        placed = coefficients.to(self.device)
        scales = {name: placed[self.layout.index[module].to(self.device)] for name, module in self.modules.items()}
        with attached(self.model, self.deltas, scales.__getitem__):
            features = self._features(flat)
        outputs, at = [], 0
        for task, rows in zip(picked, chosen, strict=True):
            own = features[at : at + len(rows)]
            at += len(rows)
            outputs.append(_output(self.heads[task], own, rows, self.device))
        return outputs

    def asked(self, picked: Picked, *, held_out: bool = False) -> list[int]:
        """See `merge_algos.learn.problem.Problem`."""
        source = self.held if held_out else self.train
        return [_asked(source[task].at(rows)) for task, rows in picked.items()]

    def _features(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """Of each row, in the order given."""
        order = sorted(range(len(flat)), key=lambda n: len(flat[n]))
        found: dict[int, Tensor] = {}
        for group in _groups(order, self.per_pass):
            batch = _padded([flat[n] for n in group], self.pad_token, self.device)
            for n, row, tokens in zip(group, self.forward(self.model, batch), (flat[n] for n in group), strict=True):
                found[n] = row if row.ndim == 1 else row[: len(tokens)]
        return [found[n] for n in range(len(flat))]


def _groups(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _padded(rows: Sequence[Tensor], pad_token: int, device: torch.device) -> Batch:
    longest = max(map(len, rows))
    tokens = torch.stack([pad(row, (0, longest - len(row)), value=pad_token) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row), (0, longest - len(row))) for row in rows])
    return Batch(tokens.to(device), mask.to(device))


def _output(head: Head, features: Sequence[Tensor], rows: Rows, device: torch.device) -> Output:
    if features[0].ndim == 1:
        labels = None if rows.labels is None else torch.stack(rows.labels).to(device)
        return Output(head(torch.stack(list(features))), labels)
    assert rows.labels is not None
    return Output(torch.cat([row[:-1] for row in features]), torch.cat([labels[1:] for labels in rows.labels]).to(device))


def _asked(rows: Rows) -> int:
    if rows.labels is None or rows.labels[0].ndim == 0:
        return len(rows)
    return sum(int((labels[1:] != IGNORED).sum()) for labels in rows.labels)


def _thinned(rows: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Every row without some of its tokens, the first and last kept, since these may be special."""
    generator = torch.Generator().manual_seed(seed)
    kept = [torch.rand(len(row), generator=generator) >= _DROPPED for row in rows]
    for mask in kept:
        mask[0] = mask[-1] = True
    return [row[mask] for row, mask in zip(rows, kept, strict=True)]


def mean_pooled(model: nn.Module, batch: Batch) -> Tensor:
    """(rows, d): the mean of the last hidden states."""
    hidden = model(input_ids=batch.tokens, attention_mask=batch.mask).last_hidden_state
    mask = batch.mask.unsqueeze(-1).to(hidden.dtype)
    pooled: Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return pooled


def first_token(model: nn.Module, batch: Batch) -> Tensor:
    """(rows, d): the last hidden state of the first token."""
    hidden: Tensor = model(input_ids=batch.tokens, attention_mask=batch.mask).last_hidden_state
    return hidden[:, 0]


def last_token(model: nn.Module, batch: Batch) -> Tensor:
    """(rows, d): the last hidden state of each row's last token."""
    hidden: Tensor = model(input_ids=batch.tokens, attention_mask=batch.mask).last_hidden_state
    return hidden[torch.arange(len(hidden)), batch.mask.sum(1) - 1]


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """What the model itself says: (rows, classes), or (rows, length, vocabulary)."""
    found: Tensor = model(input_ids=batch.tokens, attention_mask=batch.mask).logits
    return found


def linear_head(weight: Tensor, bias: Tensor | None) -> Head:
    return lambda features: linear(features, weight, bias)


POOLING: Mapping[str, Forward] = {"mean": mean_pooled, "first": first_token, "last": last_token}
