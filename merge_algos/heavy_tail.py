"""Ranks by heavy tails: what a mean rank becomes in each module, from how fast its spectrum falls.

In a heavy-tailed spectrum few directions hold most of the energy, so few ranks keep it; a light tail falls slowly and needs
more. The measure is the Hill estimator of heavy-tailed self-regularisation, the rule that of AlphaLoRA (Qing et al. 2024,
arXiv:2410.10054), which gives layers of a large alpha more experts as these modules get more ranks.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from merge_algos.lowrank import numerical_rank

EXPONENT = 2.5  # AlphaLoRA's beta
_LARGEST_ALPHA = 10.0  # a flat spectrum has none
_HALVINGS = 100  # of an interval of floats: none is left between its ends


def hill_alpha(S: Tensor) -> float:
    """The exponent of the power law that eigenvalues `S**2` beyond the last one follow: 1 is heaviest.

    S: (k + 1,) leading singular values, descending, all above 0; with fewer than 2 of them there is no tail, and no alpha but
    the largest.
    """
    logs = S.double().square().log()
    total = float((logs[:-1] - logs[-1]).sum())
    return min(1.0 + (len(S) - 1) / total, _LARGEST_ALPHA) if total > 0.0 else _LARGEST_ALPHA


def tail_of(S: Tensor, full: int) -> tuple[float, int]:
    """Alpha, and the most ranks that are of use: those above rounding if S (k,) reaches down to it, else `full`."""
    count = numerical_rank(S)
    return hill_alpha(S[: max(count, 1)]), count if count < len(S) else full


def heavy_tail_ranks(alphas: Mapping[str, float], most: Mapping[str, int], mean: int) -> dict[str, int]:
    """Module -> rank: in proportion to `alpha ** 2.5`, at least 1 and at most `most`, together no more than `mean` each.

    Equal alphas and limits get equal ranks, and a larger alpha never fewer; so a few ranks of the sum may be left over.
    Differs from AlphaLoRA: alphas are of the difference's leading singular values instead of all of the pretrained weight's,
    per module instead of averaged over a layer, and what rounding leaves is not dealt out.
    """
    shares = {module: alpha**EXPONENT for module, alpha in alphas.items()}
    low, high = 0.0, float(max(most.values()) + 1)  # every share is at least 1
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = sum(_within(shares, most, middle).values()) <= mean * len(shares)
        low, high = (middle, high) if fits else (low, middle)
    return _within(shares, most, low)


def _within(shares: Mapping[str, float], most: Mapping[str, int], scale: float) -> dict[str, int]:
    return {module: min(max(math.floor(scale * share), 1), most[module]) for module, share in shares.items()}
