"""LoRA-LEGO: take adapters apart into rank-one units, cluster the units, build one adapter from the centroids."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from merge_algos.blocks import seed_of
from merge_algos.entries import check_choice
from merge_algos.lowrank import LowRankDelta, canonical, present
from merge_algos.protocol import Merged, MergeMethod, ModuleContext

_ZERO_RATIO = 1e-6
_DECIMALS = 9  # of coordinates, whose rounding is far below
_CANCELLED = 1e-9  # a mean this much smaller than its members is their rounding


@dataclass(frozen=True)
class Lego(MergeMethod):
    """LoRA-LEGO (Zhao et al. 2024, arXiv:2409.16167): k-means over minimal semantic units `[a_j ; b_j]`.

    A unit is a row of A with its column of B, `sqrt|w|` folded into both halves and the sign of w into b. Centroids are
    means, rescaled so that their largest entry is the mean of their members' (parameter reweighting); the update is
    multiplied by `sqrt(r_ref / k)`, r_ref the rounded mean rank of the adapters present (output reweighting). k is the
    requested rank, else half of all units, but no less than the largest adapter: on real adapters, fewer clusters keep less
    than plain averaging does. An adapter's rank is its number of units that are not zero.

    canonical: `svd` gives every delta its balanced singular vectors first, so how it was factored cannot matter;
    `balanced` only evens norms and signs of each unit; `raw` is the published method.
    It averages: n copies at weight 1 are the adapter. With k = R nothing is clustered.
    Differs from the paper: clustering in the coordinates of the R x R Gram matrix, which gives the same partition.
    """

    name = "lego"
    paper = "arXiv:2409.16167"
    default_weight = 1.0
    breaks = MappingProxyType(
        {
            "two copies": "it averages units, so two copies at weight 1, not 1/2, are the adapter",
            "opposites": "units of opposite sign are different units",
            "linear": "clusters depend on all units and their sizes",
        }
    )

    canonical: Literal["svd", "balanced", "raw"] = "svd"

    def __post_init__(self) -> None:
        check_choice("canonical", self.canonical, ("svd", "balanced", "raw"))

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        here = present(deltas, weights)
        units, owners = self._units(deltas, weights, here)
        if not len(units):
            return Merged(LowRankDelta.zero(*deltas[0].shape, like=deltas[0].B))
        ranks = list(Counter(owners).values())
        k = min(context.rank.max or max(*ranks, len(units) // 2), len(units))
        gram = units @ units.mT  # (R, R): all that distances depend on
        labels = cluster(gram, k, seed_of(context.seed, context.module) % 2**32)
        means = _means(labels).to(units)  # (k, R): means @ units are the centres
        centroids = _reweighted(means, units)
        d_in = deltas[0].shape[1]
        output = (round(sum(ranks) / len(ranks)) / len(centroids)) ** 0.5
        merged = LowRankDelta(output * centroids[:, d_in:].mT, centroids[:, :d_in])
        return Merged(merged, _diagnostics(gram, labels, means, owners))

    def _units(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], here: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Rows `[a ; b]` (R, d_in + d_out), float64, none of them zero, and the position of the adapter each came from."""
        rows, owners = [torch.zeros(0, sum(deltas[0].shape), dtype=torch.float64, device=deltas[0].B.device)], []
        for n in here:
            delta = self._gauged(deltas[n])
            root = abs(weights[n]) ** 0.5
            own = torch.cat([root * delta.A.double(), (root if weights[n] > 0 else -root) * delta.B.double().mT], 1)
            own = own[own.abs().amax(1) > _ZERO_RATIO * own.abs().max()] if len(own) else own
            rows.append(own)
            owners += [n] * len(own)
        return torch.cat(rows), owners

    def _gauged(self, delta: LowRankDelta) -> LowRankDelta:
        if self.canonical == "svd":
            return canonical(delta)
        return _balanced(delta) if self.canonical == "balanced" else delta


def cluster(gram: Tensor, k: int, seed: int) -> Tensor:
    """Labels 0 .. of R units in at most k clusters, none empty. gram: (R, R), their inner products.

    k-means++ depends on the order of what it is given, so the longest unit comes first, whoever's it is.
    """
    # here, because importing scikit-learn takes a second that every process would otherwise pay
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if k == len(gram):
        return torch.arange(k)
    order = gram.diagonal().argsort(descending=True, stable=True)
    scaled = gram[order][:, order] / gram.diagonal().max()  # the partition has no unit of length
    eigenvalues, vectors = torch.linalg.eigh(scaled)
    sizes = eigenvalues.where(eigenvalues > _ZERO_RATIO**2 * eigenvalues[-1], 0).sqrt()
    # (R, R), distances as between the units; rounded, so that equal units are equal here too
    coordinates = (vectors * sizes).round(decimals=_DECIMALS).cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct units than k: fewer clusters, not an error
        found = KMeans(k, init="k-means++", n_init=10, tol=0.0, random_state=seed).fit_predict(coordinates)
    labels = torch.from_numpy(np.unique(found, return_inverse=True)[1])
    return labels[order.cpu().argsort()]


def _means(labels: Tensor) -> Tensor:
    """(k, R): row c averages the members of cluster c."""
    members = torch.nn.functional.one_hot(labels).double().mT
    return members / members.sum(1, keepdim=True)


def _reweighted(means: Tensor, units: Tensor) -> Tensor:
    """(k, D) centres scaled to their members' mean largest magnitude; of members that cancel no more than rounding."""
    centres = means @ units
    wanted = means @ units.abs().amax(1)
    return centres * (wanted / centres.abs().amax(1).clamp(min=_CANCELLED * wanted))[:, None]


def _balanced(delta: LowRankDelta) -> LowRankDelta:
    """Every unit with equal norms of a and b, and the largest entry of b positive."""
    a, b = delta.A.norm(dim=1), delta.B.norm(dim=0)
    ratio = torch.where((a > 0) & (b > 0), (b / a.clamp(min=1e-30)).sqrt(), 1)
    largest = delta.B.gather(0, delta.B.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(largest < 0, -1.0, 1.0).to(delta.B.dtype)
    return LowRankDelta(delta.B * (sign / ratio), (sign * ratio)[:, None] * delta.A)


def _diagnostics(gram: Tensor, labels: Tensor, means: Tensor, owners: list[int]) -> dict[str, Any]:
    own = means[labels.to(means.device)]  # (R, R): row j averages the cluster of unit j
    products, squares = (own * gram).sum(1), ((own @ gram) * own).sum(1)  # <u_j, its centre>, ||its centre||^2
    lengths = gram.diagonal()
    cosine = products / (lengths * squares).clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    return {
        "cluster_sizes": torch.bincount(labels).tolist(),
        "inertia": float((lengths - squares).sum().clamp(min=0)),
        "within_cluster_cosine": float(cosine.mean()),
        "assignment": [[owner, label] for owner, label in zip(owners, labels.tolist(), strict=True)],
    }
