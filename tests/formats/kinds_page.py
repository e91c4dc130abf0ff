"""docs/kinds.md, made from the registry of kinds, the table of refusals and the cases that prove them.

Write it again with `python tests/formats/kinds_page.py` in the repository.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from kind_cases import CASES, GROUNDED
from merge_algos.formats import kinds
from merge_algos.formats.kind import MAX_FACTOR_ENTRIES, Kind
from merge_algos.formats.refused import REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "kinds.md"

INTRODUCTION = """\
# Which adapters are read

Every adapter is read exactly or refused by name, with the reason and what to do. What is read becomes, module by module, a
pair of low-rank factors with the scaling folded in; so any kinds merge with each other, and the result is a plain LoRA that
PEFT loads. This page is written by `python tests/formats/kinds_page.py` from the code and the cases that prove it: each was
saved by PEFT itself, its delta is the one PEFT merges to 1e-5, and merged alone at weight 1 it is the same adapter to PEFT.
Kinds beside the base model are proven by their delta alone: what a merge cuts of one of full rank, its certificate tells.
"""

MIB = MAX_FACTOR_ENTRIES * 4 >> 20

REMARKS = f"""\
- **Layers.** Linear (also transformers' `Conv1D`), `Conv1d`, `Conv2d`, `Conv3d`, embeddings, fused projections, both
  projections of `nn.MultiheadAttention`, and bare parameters (`target_parameters`), of which every expert is a module of its
  own, `experts[3]`. A module that is a convolution to one adapter and a linear layer to another is refused, and so are
  grouped convolutions.
- **Flattened convolutions.** LoHa, LoKr and AdaLoRA may write a convolution as a matrix that looks like a linear layer's. It
  takes the shape that another adapter of the merge shows; alone it is written as a linear layer, which PEFT refuses to load
  into a convolution.
- **Shapes that a file does not say.** VeRA, PVeRA, MiSS and RandLoRA do not save how wide a layer is. They merge with any
  adapter of the same layers that says so; one of weight 0 will do.
- **Bone** is what MiSS was called before PEFT 0.19. Its files are read as MiSS, which is proven with three that PEFT 0.17.1
  wrote (`tests/formats/bone/`).
- **Bounds.** Where a kind's factors are larger than its file, those of one module hold at most {MAX_FACTOR_ENTRIES} numbers
  ({MIB} MiB of float32), which is checked before any tensor is read; forming them takes at most twice that in memory. A rank
  above the smaller side of a layer is cut to it without loss.
- **Nothing is left over.** One tensor that no kind reads, or one flag that is unknown, refuses the adapter. Saved embeddings,
  `modules_to_save`, biases and trained tokens are [extras](formats.md): what becomes of them is for the request to say.
"""


GROUNDED_REMARKS = """\
The delta of these depends on the base model's weights, so a merge needs `base_model`, of which it reads the weights of the
adapted layers alone. A delta of full rank is cut (`base_rank`), and the certificate says by how much; the others are exact.
"""
# kind that needs the base in some variants alone, as it or its case's label begins -> what is read, rank, paper
IN_PART = {
    "DoRA": (
        "m (W + s B A) / norm of each row - W, of linear, convolution and embedding layers",
        "min(d_out, d_in)",
        "arXiv:2402.09353",
    ),
    "PiSSA": ("s B A less the leading rank-r part of W, saved without conversion", "2 r", "arXiv:2404.02948"),
    "OLoRA": ("s (B A - Q_r R_r), W = Q R, saved without conversion", "2 r", "arXiv:2406.01775"),
    "MiSS": (
        "the `bat` variant: the base weight in squares (r, r) times a block, and the block",
        "min(d_out, d_in)",
        "arXiv:2409.15371",
    ),
}


def page() -> str:
    without_base = {case.kind for case in CASES} | {name for name, kind in kinds.registry().items() if not kind.peft_types}
    shown = [kind for kind in kinds.registry().values() if kind.name in without_base]
    refused_kinds = [[f"`{name}`", *why] for name, why in sorted(REFUSED.items())]
    refused_flags = [
        [kind.name, f"`{what}`", reason] for kind in kinds.registry().values() for what, reason in sorted(kind.reasons.items())
    ]
    sections = (
        INTRODUCTION,
        "## Read\n",
        table(("kind", "`peft_type`", "what is read", "rank of the delta", "paper", "proven with"), map(_row, shown)),
        REMARKS,
        "## Read beside the base model\n",
        GROUNDED_REMARKS,
        table(("kind", "what is read", "rank of the delta", "paper", "proven with"), _grounded_rows()),
        "## Refused kinds\n",
        table(("`peft_type`", "why", "what to do"), refused_kinds),
        "## Refused flags and tensors\n",
        table(("kind", "flag, or part of a tensor's name", "why"), refused_flags),
    )
    return "\n".join(sections)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _row(kind: Kind) -> list[str]:
    peft_types = ", ".join(f"`{each}`" for each in kind.peft_types) or "none: single files"
    proven = "; ".join(case.label for case in CASES if case.kind == kind.name) or "files of image models"
    return [kind.name, peft_types, kind.meaning, f"`{kind.rank}`", kind.paper, proven]


def _grounded_rows() -> Iterable[Sequence[str]]:
    own = {case.kind: kinds.registry()[case.kind] for case in GROUNDED if case.kind not in {"LoRA", *IN_PART}}
    for name, said in {**IN_PART, **{name: (kind.meaning, kind.rank, kind.paper) for name, kind in own.items()}}.items():
        labels = [c.label for c in GROUNDED if c.kind == name or (c.kind == "LoRA" and c.label.startswith(name))]
        yield name, said[0], f"`{said[1]}`", said[2], "; ".join(labels)


if __name__ == "__main__":
    PAGE.write_text(page())
