"""Deltas that only the base model's weight completes: what each kind's training did to it. W: (d_out, d_in) throughout.

A weight whose delta would be the small difference of large numbers is never formed where the difference has a form of its own.
"""

import torch
from torch import Tensor

from merge_algos.errors import UnsupportedAdapter
from merge_algos.lowrank import LowRankDelta, concat

_LEAST_GAP = 1e-5  # of the largest singular value: at it, float32 mixes the last kept direction with the next one by a percent


def dora(delta: LowRankDelta, magnitude: Tensor, W: Tensor) -> Tensor:
    """`g (W + D) - W` with g = m / ||W + D|| of each row (Liu et al. 2024, arXiv:2402.09353, eq. 5), dense.

    delta: D, scaled.  magnitude: d_out numbers.
    """
    D = delta.to_dense()
    norms = torch.linalg.vector_norm((W + D).double(), dim=1)  # float64: g is 1 but for the little that training moved it
    moved = (magnitude.flatten().double() - norms) / norms  # g - 1
    added: Tensor = (moved[:, None] * (W + D).double()).to(W.dtype)
    return added + D


def beside_pissa(delta: LowRankDelta, W: Tensor, r: int, module: str) -> LowRankDelta:
    """`s B A - W_r`, W_r the best rank-r part of W, from where PiSSA begins (Meng et al. 2024, arXiv:2404.02948).

    What training lost when it rounded `W - W_r` to the type of its base model is in no file, and not here.
    Raises UnsupportedAdapter where W does not decide what its leading r directions are.
    """
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    if r < len(S) and float(S[r - 1] - S[r]) < _LEAST_GAP * float(S[0]):
        reason = f"singular values {r} and {r + 1} of its base weight are too close to know from which part PiSSA began"
        remedy = "save it converted to plain LoRA (path_initial_model_for_weight_conversion)"
        raise UnsupportedAdapter(f"module {module[:200]}", reason, remedy)
    return concat([delta, LowRankDelta(-U[:, :r] * S[:r], Vh[:r]).to(delta.B.dtype)])


def beside_olora(delta: LowRankDelta, W: Tensor, r: int, scaling: float, *, is_transposed: bool) -> LowRankDelta:
    """`s (B A - Q_r R_r)` with W = Q R, from where OLoRA begins (Büyükakyüz 2024, arXiv:2406.01775).

    is_transposed: the layer stores its weight as (d_in, d_out), and PEFT factors it as it is stored.
    """
    Q, R = torch.linalg.qr((W.mT if is_transposed else W).double())
    begun = LowRankDelta(R[:r].mT, Q[:, :r].mT) if is_transposed else LowRankDelta(Q[:, :r], R[:r])
    return concat([delta, LowRankDelta(-scaling * begun.B, begun.A).to(delta.B.dtype)])
