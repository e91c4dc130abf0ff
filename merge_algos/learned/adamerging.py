"""AdaMerging: coefficients that make the predictions on unlabelled text certain."""

from dataclasses import dataclass
from typing import Literal

from merge_algos.learn.layout import Granularity
from merge_algos.learn.method import Learned
from merge_algos.learn.objectives import Objective


@dataclass(frozen=True)
class AdaMerging(Learned):
    """Layer-wise AdaMerging (Yang et al. 2024, arXiv:2310.02575): from 0.3 on, the least entropy on unlabelled rows.

    Differs from the paper: a coefficient per matrix, not per layer of all matrices, unless `granularity` says otherwise;
    early stopping by the entropy of held-out rows.
    """

    name = "adamerging"
    paper = "arXiv:2310.02575"

    objective: Objective = "entropy"
    granularity: Granularity = "matrix"
    init: float | Literal["tuned"] = 0.3
    lr: float = 1e-3
    weight_decay: float = 0.0
