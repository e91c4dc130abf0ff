"""What is minimised: of one task's logits, and labels where there are any, one number."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as token_cross_entropy

Objective = Literal["cross_entropy", "entropy", "ufm", "negation"]

TEMPERATURES = tuple(2 ** (k / 2) for k in range(-3, 5))  # 0.35 to 4
IGNORED = -100  # the label of a token that nothing is asked of


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """logits: (m, classes) of rows, or of tokens.  labels: (m,) long, IGNORED where none; None for an unlabelled task."""

    logits: Tensor
    labels: Tensor | None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled, divided by log(classes): 1 is guessing, so that tasks of different sizes count alike."""
    return token_cross_entropy(logits.float(), labels, ignore_index=IGNORED) / math.log(max(2, logits.shape[1]))


def calibrated(logits: Tensor, labels: Tensor) -> Tensor:
    """(t,): the cross entropy at each of TEMPERATURES. The least of it tells what predicts best, however sure it is of itself.

    A merge is often too sure: its loss is then least at weights that are too small for its accuracy.
    """
    return torch.stack([cross_entropy(logits / temperature, labels) for temperature in TEMPERATURES])


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions (AdaMerging, arXiv:2310.02575), divided by log(classes)."""
    log_p = logits.float().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean() / math.log(max(2, logits.shape[1]))


def pseudo_labels(logits: Tensor, threshold: float) -> Tensor:
    """(m,): the predicted class where its probability, after sharpening with exponent 2, reaches the threshold.

    Sharpening is `softmax ^ (1 / 0.5)`, normalised (FixMatch and aTLAS, arXiv:2407.02880, use temperature 0.5).
    """
    confidence, predicted = (2 * logits.detach().float()).softmax(1).max(1)
    return predicted.where(confidence >= threshold, IGNORED)


def most_confident(logits: Tensor, per_class: int) -> Tensor:
    """(m,): the predicted class for the `per_class` most confident rows of every predicted class; IGNORED for the others."""
    confidence, predicted = logits.detach().float().softmax(1).max(1)
    labels = torch.full_like(predicted, IGNORED)
    for each in sorted(set(predicted.tolist())):
        rows = (predicted == each).nonzero()[:, 0]
        best = rows[confidence[rows].argsort(descending=True, stable=True)[:per_class]]
        labels[best] = each
    return labels


def accuracy(output: Output) -> float:
    """Of the labelled."""
    assert output.labels is not None
    asked = output.labels != IGNORED
    return float((output.logits.argmax(1) == output.labels)[asked].float().mean())
