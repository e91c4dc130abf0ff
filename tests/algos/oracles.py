"""Every merge method again, on dense float64 matrices, as slow and as plain as the papers and ALGORITHMS.md say it.

Nothing of `merge_algos` is used here but `seed_of`, without which no mask could be drawn twice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from merge_algos.blocks import seed_of

ZERO = 1e-7  # singular values below this fraction of the largest are taken for none


@dataclass(frozen=True)
class Given:
    """One adapter that is present and has a weight. n: its position in the call."""

    n: int
    B: Tensor
    A: Tensor
    w: float

    @property
    def delta(self) -> Tensor:
        return self.B @ self.A


@dataclass(frozen=True)
class Call:
    """What was asked for beside the adapters."""

    module: str
    seed: int = 0
    rank: int | None = None


Oracle = Callable[..., Tensor]


def summed(given: Sequence[Given]) -> Tensor:
    return torch.stack([g.w * g.delta for g in given]).sum(0)


def svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of nonzero singular values only."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    k = int((ZERO * S.max() < S).sum()) if S.numel() else 0
    return U[:, :k], S[:k], Vh[:k].mT


def mean_norm(given: Sequence[Given]) -> float:
    return sum(float(g.delta.norm()) for g in given) / len(given)


# --- entries, one by one


def top(X: Tensor, density: float) -> Tensor:
    """The largest entries by magnitude; as many as a full sort says, and all that are equal to the last of them."""
    keep = max(1, round(density * X.numel()))
    threshold = sorted(X.abs().flatten().tolist(), reverse=True)[keep - 1]
    return torch.where(X.abs() >= threshold, X, 0.0)


def elect(stack: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    merged = torch.zeros_like(stack[0])
    for i, j in product(*map(range, merged.shape)):
        votes = [(w, float(X[i, j])) for w, X in zip(weights, stack, strict=True)]
        majority = sum(w * x for w, x in votes)
        agreeing = [(w, x) for w, x in votes if w * x * majority > 0]
        if agreeing:
            merged[i, j] = sum(w * x for w, x in agreeing) / sum(abs(w) for w, x in agreeing)
    return merged


def combined(stack: Sequence[Tensor], weights: Sequence[float], how: str) -> Tensor:
    if how == "ties":
        return elect(stack, weights)
    return torch.stack([w * X for w, X in zip(weights, stack, strict=True)]).sum(0)


def drawn(shape: Sequence[int], *seed: object) -> Tensor:
    """Uniform numbers, the same that the merge draws."""
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed_of(*seed)))


def weights_of(given: Sequence[Given]) -> list[float]:
    return [g.w for g in given]


def task_arithmetic(given: Sequence[Given], call: Call) -> Tensor:
    return summed(given)


def ties(given: Sequence[Given], call: Call, density: float = 0.2, lam: float = 1.0, trim: str = "module") -> Tensor:
    return lam * elect([top(g.delta, density) for g in given], weights_of(given))


def magnitude_prune(given: Sequence[Given], call: Call, density: float = 0.5) -> Tensor:
    return combined([top(g.delta, density) for g in given], weights_of(given), "sum")


def breadcrumbs(given: Sequence[Given], call: Call, beta: float = 0.85, gamma: float = 0.01) -> Tensor:
    total = torch.zeros_like(given[0].delta)
    for g in given:
        for i, row in enumerate(g.delta):
            order = sorted(range(len(row)), key=lambda j: -abs(float(row[j])))
            first = min(round(gamma * len(row)), len(row) - 1)
            for j in order[first : first + max(1, round(beta * len(row)))]:
                total[i, j] += g.w * row[j]
    return total


def dare(given: Sequence[Given], call: Call, density: float = 0.5, combine: str = "sum") -> Tensor:
    masks = [drawn(g.delta.shape, call.seed, call.module, g.n, 0) < density for g in given]
    return combined([g.delta * m / density for g, m in zip(given, masks, strict=True)], weights_of(given), combine)


def chances(X: Tensor, density: float, window: float) -> Tensor:
    """Of being kept: by rank of magnitude within the row, evenly from density - window / 2 to density + window / 2."""
    p = torch.full_like(X, density)
    for i, row in enumerate(X):
        for rank, j in enumerate(sorted(range(len(row)), key=lambda j: abs(float(row[j])))):
            if len(row) > 1:
                p[i, j] = density - window / 2 + window * rank / (len(row) - 1)
    return p


def della(
    given: Sequence[Given], call: Call, density: float = 0.5, window: float = 0.4, combine: str = "ties", lam: float = 1.0
) -> Tensor:
    stack = []
    for g in given:
        p = chances(g.delta, density, window)
        stack.append(g.delta * (drawn(p.shape, call.seed, call.module, g.n, 0) < p) / p)
    return lam * combined(stack, weights_of(given), combine)


# --- singular values


def knots(given: Sequence[Given], call: Call, density: float = 0.2, combine: str = "ties", lam: float = 1.0) -> Tensor:
    U, S, V = svd(torch.cat([g.delta for g in given], 1))
    shares = list((S[:, None] * V.mT).chunk(len(given), 1))
    if combine == "ties":
        shares = [top(X, density) for X in shares]
    if combine == "dare":
        masks = [drawn(X.shape, call.seed, call.module, g.n) < density for X, g in zip(shares, given, strict=True)]
        shares = [X * m / density for X, m in zip(shares, masks, strict=True)]
    return lam * U @ combined(shares, weights_of(given), combine)


def inverse_root(X: Tensor) -> Tensor:
    """`X^-1/2` of a symmetric matrix, pseudo-inverse where it is singular."""
    values, Q = torch.linalg.eigh(X)
    return Q * torch.where(values > 1e-11 * values.max(), values, torch.inf).rsqrt() @ Q.mT


def tsv(given: Sequence[Given], call: Call, alpha: float | None = None) -> Tensor:
    parts = [svd(g.delta) for g in given]
    U, V = (torch.cat([part[side] for part in parts], 1) for side in (0, 2))
    S = torch.cat([g.w * part[1] for g, part in zip(given, parts, strict=True)])
    alpha = len(given) ** 0.5 if alpha is None else alpha
    return alpha * (U @ inverse_root(U.mT @ U) * S) @ (V @ inverse_root(V.mT @ V)).mT


def iso_c(given: Sequence[Given], call: Call, alpha: float | None = None) -> Tensor:
    U, S, V = svd(summed(given))
    alpha = len(given) ** 0.5 if alpha is None else alpha
    return alpha * S.mean() * U @ V.mT


def iso_cts(given: Sequence[Given], call: Call, common: float = 0.8, alpha: float | None = None) -> Tensor:
    whole = min(len(svd(torch.cat([g.delta for g in given], side))[1]) for side in (0, 1))
    k = max(1, round(common * whole))
    U, S, V = (X[..., :k] for X in svd(summed(given)))
    Us, Ss, Vs = [U], [S], [V]
    for g in given:
        beyond = g.w * g.delta - U @ (U.mT @ (g.w * g.delta))
        values = torch.linalg.svdvals(beyond)
        real = int((values > ZERO * g.delta.norm()).sum())
        u, s, vh = torch.linalg.svd(beyond)
        for j in range(min((whole - k) // len(given), real)):
            Us, Ss, Vs = [*Us, u[:, j : j + 1]], [*Ss, s[j : j + 1]], [*Vs, vh[j : j + 1].mT]
    left, right = torch.cat(Us, 1), torch.cat(Vs, 1)
    alpha = len(given) ** 0.5 if alpha is None else alpha
    return alpha * torch.cat(Ss).mean() * left @ inverse_root(left.mT @ left) @ (right @ inverse_root(right.mT @ right)).mT


def core_space(given: Sequence[Given], call: Call, inner: str = "ties", density: float = 0.2, lam: float = 1.0) -> Tensor:
    parts = [svd(g.delta) for g in given]
    U, V = (svd(torch.cat([part[side] * part[1].sqrt() for part in parts], 1))[0] for side in (0, 2))
    cores = [Given(g.n, U.mT @ g.delta, V, g.w) for g in given]  # delta of a core is U^T delta V
    if inner == "ties":
        return lam * U @ ties(cores, call, density) @ V.mT
    return lam * U @ (tsv if inner == "tsv" else iso_c)(cores, call, alpha=1.0) @ V.mT


def np_lora(given: Sequence[Given], call: Call, mu: float = 0.5) -> Tensor:
    if len(given) < 2:
        return summed(given)
    first, second = given
    V = svd(first.delta)[2]
    return first.w * first.delta + second.w * second.delta @ (torch.eye(len(V), dtype=V.dtype) - mu / (1 + mu) * V @ V.mT)


def ctm(given: Sequence[Given], call: Call, iterations: int = 10) -> Tensor:
    deltas = [g.delta for g in given]
    ranks = [g.B.shape[1] for g in given]
    r = call.rank or max(sum(ranks) // 2, *ranks)
    U, V = leading(torch.cat(deltas, 1), r), leading(torch.cat([X.mT for X in deltas], 1), r)
    for _ in range(iterations):
        U = leading(torch.cat([X @ V for X in deltas], 1), r)
        V = leading(torch.cat([X.mT @ U for X in deltas], 1), r)
    return U @ U.mT @ summed(given) @ V @ V.mT


def leading(X: Tensor, r: int) -> Tensor:
    return torch.linalg.svd(X, full_matrices=False)[0][:, :r]


def spectral(given: Sequence[Given], call: Call, power: float = 0.25, scale: float = 1.0) -> Tensor:
    U, S, V = (X[..., : call.rank] for X in svd(summed(given)))
    raised = U * S**power @ V.mT
    return scale * mean_norm(given) * raised / raised.norm()


def peft_linear(given: Sequence[Given], call: Call) -> Tensor:
    B = torch.stack([abs(g.w) ** 0.5 * g.B for g in given]).sum(0)
    A = torch.stack([abs(g.w) ** 0.5 * (-1 if g.w < 0 else 1) * g.A for g in given]).sum(0)
    return B @ A


# --- lego and pico


def balanced_svd(g: Given) -> Given:
    """Its balanced singular factors, the largest entry of each left vector positive."""
    U, S, V = svd(g.delta)
    signs = torch.tensor([1.0 if column[column.abs().argmax()] > 0 else -1.0 for column in U.mT], dtype=S.dtype)
    return Given(g.n, U * signs * S.sqrt(), (V * signs * S.sqrt()).mT, g.w)


def evened(g: Given) -> Given:
    """Halves of equal norm, and the largest entry of b positive."""
    B, A = g.B.clone(), g.A.clone()
    for j in range(len(A)):
        b, a = g.B[:, j], g.A[j]
        factor = (a.norm() / b.norm()).sqrt() * torch.sign(b[b.abs().argmax()])
        B[:, j], A[j] = factor * b, a / factor
    return Given(g.n, B, A, g.w)


def lego_units(given: Sequence[Given], canonical: str) -> list[Tensor]:
    gauge = {"svd": balanced_svd, "balanced": evened, "raw": lambda g: g}[canonical]
    units = []
    for g in map(gauge, given):
        for j in range(len(g.A)):
            units.append(torch.cat([abs(g.w) ** 0.5 * g.A[j], abs(g.w) ** 0.5 * (-1 if g.w < 0 else 1) * g.B[:, j]]))
    return units


def lego(given: Sequence[Given], call: Call, canonical: str = "svd") -> Tensor:
    units = lego_units(given, canonical)
    ranks = [len(lego_units([g], canonical)) for g in given]
    k = min(call.rank or max(len(units) // 2, *ranks), len(units))
    units.sort(key=lambda unit: -float(unit.norm()))
    seed = seed_of(call.seed, call.module) % 2**32
    labels = KMeans(k, n_init=10, tol=0.0, random_state=seed).fit_predict(torch.stack(units).numpy())
    return lego_merge(units, labels.tolist(), round(sum(ranks) / len(ranks)), given[0].A.shape[1])


def lego_merge(units: Sequence[Tensor], labels: Sequence[int], r_ref: int, d_in: int) -> Tensor:
    """The update of a partition: every centroid reweighted, the whole by `sqrt(r_ref / k)`."""
    k = len(set(labels))
    update = torch.zeros(len(units[0]) - d_in, d_in, dtype=torch.float64)
    for cluster in sorted(set(labels)):
        members = [unit for unit, label in zip(units, labels, strict=True) if label == cluster]
        mu = torch.stack(members).mean(0)
        mu = mu * sum(float(m.abs().max()) for m in members) / len(members) / mu.abs().max()
        update += mu[d_in:, None] * mu[:d_in]
    return (r_ref / k) ** 0.5 * update


def pico_calibrated(given: Sequence[Given]) -> list[Given]:
    """By the SVD of all B side by side: `B~ = (I + U diag(a - 1) U^T) B`."""
    factors = [balanced_svd(g) for g in given]
    U, S, _ = torch.linalg.svd(torch.cat([g.B for g in factors], 1), full_matrices=False)
    a = 1 / (1 + (len(given) - 1) * S.square() / S.square().sum())
    turn = torch.eye(len(U), dtype=U.dtype) + U * (a - 1) @ U.mT
    return [Given(g.n, turn @ g.B, g.A, g.w) for g in factors]


def pico(
    given: Sequence[Given],
    call: Call,
    base: str = "task_arithmetic",
    restore: str = "merged",
    scale: float = 1.0,
    density: float = 0.2,
) -> Tensor:
    calibrated = pico_calibrated(given)
    if restore == "per_adapter":
        sizes = [float(g.delta.norm() / c.delta.norm()) for g, c in zip(given, calibrated, strict=True)]
        calibrated = [Given(c.n, size * c.B, c.A, c.w) for size, c in zip(sizes, calibrated, strict=True)]
    merge = {"task_arithmetic": task_arithmetic, "tsv": tsv, "ties": lambda g, c: ties(g, c, density)}[base]
    merged = best(merge(calibrated, call), call.rank)
    return scale * merged * (mean_norm(given) / merged.norm() if restore == "merged" else 1.0)


def best(X: Tensor, rank: int | None) -> Tensor:
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def coefficients(given: Sequence[Given], call: Call) -> Tensor:
    """Without a table; with one, see test_learn_layout."""
    return task_arithmetic(given, call)


ORACLES: Mapping[str, Oracle] = {
    oracle.__name__: oracle
    for oracle in (
        *(
            breadcrumbs,
            coefficients,
            core_space,
            ctm,
            dare,
            della,
            iso_c,
            iso_cts,
            knots,
            lego,
            magnitude_prune,
            np_lora,
            peft_linear,
        ),
        *(pico, spectral, task_arithmetic, ties, tsv),
    )
}

# --- post-steps, on what was merged


def svc(merged: Tensor, given: Sequence[Given], alpha: float | None = None) -> Tensor:
    calibrated = torch.zeros_like(merged)
    for u, sigma, v in zip(*(X.mT if X.ndim == 2 else X for X in svd(merged)), strict=True):
        counts = []
        for g in given:
            answer = u @ g.delta
            if answer.norm() > 1e-6 * g.delta.norm():
                counts.append(max(alpha or 1 / len(given), float((u @ merged) @ answer / (answer @ answer))))
        calibrated += (len(counts) / sum(counts) if counts else 1.0) * sigma * u[:, None] * v
    return calibrated


def restore_norm(merged: Tensor, given: Sequence[Given], scale: float = 1.0) -> Tensor:
    return scale * mean_norm(given) * merged / merged.norm() if given and merged.any() else merged


POST_ORACLES: Mapping[str, Oracle] = {"restore_norm": restore_norm, "svc": svc}
