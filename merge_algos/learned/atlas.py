"""aTLAS: learned anisotropic scaling, a coefficient for every weight matrix of every adapter."""

from dataclasses import dataclass

from merge_algos.learn.method import Learned


@dataclass(frozen=True)
class Atlas(Learned):
    """`W0 + sum_i lambda_{i,block} delta_i` (Zhang et al. 2024, arXiv:2407.02880) with lambda trained on a few labelled rows.

    granularity: a block is a weight matrix, one rank of it, all layers' matrices of one kind, or a whole adapter.
    objective: `cross_entropy`; `entropy` and `ufm` need no labels; `negation` unlearns the tasks marked `forget` and keeps
    the others.  init: the coefficients training begins at, the paper's is 0; `tuned`: the best single number on the training
    rows, so that the result is never worse than task arithmetic on the held-out rows.
    Differs from the paper: coefficients decay towards their start, not to 0; losses are divided by log(classes), so that
    tasks count alike; `ufm` drops tokens where images are augmented; `negation` asks for no more than guessing.
    """

    name = "atlas"
    paper = "arXiv:2407.02880"
