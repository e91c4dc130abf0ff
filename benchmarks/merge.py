"""How fast a merge is, side by side in one run: Braid, PEFT's `add_weighted_adapter`, and the dense textbook version.

    python benchmarks/merge.py                      # modules with 8 adapters, and the 7B-like set: about 20 minutes
    python benchmarks/merge.py --full               # 2, 8 and 32 adapters: hours, nearly all of them PEFT's dense SVD
    python benchmarks/merge.py --parts modules --shapes 1024x1024

modules: one layer at a time, in memory; ratio is the other's time over ours, errors are against the float64 sum.
set: 32 layers x {4 x 4096^2, 3 x 4096x11008}, adapters of rank 16 in bfloat16 files, files in and file out, through the
worker's own child; beside it the time of merely reading the inputs and writing the result.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from spine import make_adapter, measure

from app.services import Services
from app.settings import Settings
from merge_algos.lowrank import LowRankDelta
from merge_algos.merge import build, merge_module
from merge_algos.protocol import ModuleContext
from merge_algos.rank import RankRule

T = TypeVar("T")
RANK = 16
# PEFT's combination -> ours that answers the same question, with the same parameters
PAIRS: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "cat": ("task_arithmetic", None, {}),
    "linear": ("peft_linear", None, {}),
    "svd": ("task_arithmetic", RANK, {}),
    "ties_svd": ("ties", RANK, {"density": 0.5}),
    "dare_ties_svd": ("dare", RANK, {"density": 0.5, "combine": "ties"}),
}
LAYER = {
    **{f"self_attn.{n}_proj": (4096, 4096) for n in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
SET_CASES = (("task_arithmetic", None), *((m, RANK) for m in ("task_arithmetic", "lego", "pico", "knots", "tsv", "core_space")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="modules,set")
    parser.add_argument("--shapes", default="4096x4096,11008x4096")
    parser.add_argument("--full", action="store_true", help="2, 8 and 32 adapters instead of 8")
    parser.add_argument("--layers", type=int, default=32, help="of the set")
    parser.add_argument("--adapters", type=int, default=8, help="of the set")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    console, rows = Console(width=150), []
    if "modules" in args.parts:
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
        for d_out, d_in in shapes:
            for count in (2, 8, 32) if args.full else (8,):
                rows += module_rows(d_out, d_in, count)
        console.print(module_table(rows))
    if "set" in args.parts:
        console.print(set_table(args.layers, args.adapters))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def module_rows(d_out: int, d_in: int, count: int) -> list[dict[str, Any]]:
    deltas = [random_delta(seed, d_out, d_in) for seed in range(count)]
    exact = sum((d.to_dense().double() / count for d in deltas), start=torch.zeros(d_out, d_in, dtype=torch.float64))
    rows = []
    for combination, (method, rank, parameters) in PAIRS.items():
        our_s, ours = timed(lambda m=method, r=rank, p=parameters: our_merge(m, r, p, deltas), repeat=3)
        with peft_layer(deltas) as (model, layer):
            their_s, _ = timed(lambda c=combination: peft_merge(model, c, count), repeat=1)
            theirs = layer.get_delta_weight("merged").detach()
        rows.append(
            {
                "module": f"{d_out}x{d_in}",
                "adapters": count,
                "case": f"{method}, {f'rank {rank}' if rank else 'exact'}",
                "ours_s": our_s,
                "other": f"PEFT {combination}",
                "other_s": their_s,
                "our_error": relative(ours.to_dense(), exact),
                "other_error": relative(theirs, exact),
            }
        )
    svd_row = next(r for r in rows if r["other"] == "PEFT svd")
    dense_s, dense = timed(lambda: cut(sum(d.to_dense() / count for d in deltas)), repeat=1)
    rows.append({**svd_row, "other": "dense sum, SVD", "other_s": dense_s, "other_error": relative(dense, exact)})
    return rows


def random_delta(seed: int, d_out: int, d_in: int) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.02  # noqa: E731
    return LowRankDelta(draw(d_out, RANK), draw(RANK, d_in))


def our_merge(method: str, rank: int | None, parameters: dict[str, Any], deltas: Sequence[LowRankDelta]) -> LowRankDelta:
    """The whole life of the module: method, cut, cast and certificate."""
    chosen = build(method, parameters)
    context = ModuleContext("module", 0, RankRule(max=rank))
    weights = (1 / len(deltas),) * len(deltas)
    return merge_module(chosen, deltas, weights, context, torch.float32).delta


@contextmanager
def peft_layer(deltas: Sequence[LowRankDelta]) -> Iterator[tuple[Any, Any]]:
    """A PEFT model of one linear layer that carries these adapters."""
    from peft import LoraConfig, get_peft_model

    d_out, d_in = deltas[0].shape
    base = torch.nn.Sequential(torch.nn.Linear(d_in, d_out, bias=False))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = get_peft_model(base, config, adapter_name="a0")
    for n in range(1, len(deltas)):
        model.add_adapter(f"a{n}", config)
    layer = model.base_model.model[0]
    for n, delta in enumerate(deltas):
        layer.lora_A[f"a{n}"].weight.data.copy_(delta.A)
        layer.lora_B[f"a{n}"].weight.data.copy_(delta.B)
    yield model, layer


def peft_merge(model: Any, combination: str, count: int) -> None:
    options: dict[str, Any] = {"svd_rank": RANK} if combination.endswith("svd") else {}
    if "ties" in combination:
        options["density"] = 0.5
    names = [f"a{n}" for n in range(count)]
    model.add_weighted_adapter(names, [1 / count] * count, "merged", combination_type=combination, **options)


def cut(matrix: torch.Tensor) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    return (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def timed(body: Callable[[], T], *, repeat: int) -> tuple[float, T]:
    """The least wall time of `repeat` runs after one to warm up (none where there is only one), and the last result."""
    if repeat > 1:
        body()
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        result = body()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def module_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        title=f"one module, adapters of rank {RANK}, float32, {os.cpu_count()} cores",
        caption="errors: against the exact float64 sum",
    )
    for heading in ("module", "adapters", "Braid", "time", "error", "other", "time", "error", "ratio"):
        table.add_column(heading, justify="right")
    for r in rows:
        ours = (f"{1000 * r['ours_s']:.1f} ms", f"{r['our_error']:.6f}")
        other = (r["other"], f"{r['other_s']:.2f} s", f"{r['other_error']:.6f}", f"{r['other_s'] / r['ours_s']:.0f}x")
        table.add_row(r["module"], str(r["adapters"]), r["case"], *ours, *other)
    return table


def set_table(layers: int, count: int) -> Table:
    """The whole set, end to end, each case from the same stored adapters."""
    table = Table(title=f"{layers} layers x {{4 x 4096², 3 x 4096x11008}}, {count} adapters of rank {RANK}, bfloat16 files")
    for heading in ("case", "wall", "copy", "wall/copy", "peak RSS over import", "inputs", "result"):
        table.add_column(heading, justify="right")
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as folder:
        services = Services.open(Settings(data_dir=Path(folder), devices="cpu", log_level="WARNING"))
        inputs = tuple(make_adapter(services, seed, LAYER, layers, RANK, "bfloat16", console) for seed in range(count))
        for method, rank in SET_CASES:
            r = measure(services, inputs, method, RankRule(max=rank), console)
            case = f"{method}, {f'rank {rank}' if rank else 'exact'}"
            sizes = (f"{r.above_import_mib:.0f} MiB", f"{r.input_mib:.0f} MiB", f"{r.result_mib:.0f} MiB")
            table.add_row(case, f"{r.wall_s:.1f} s", f"{r.copy_s:.1f} s", f"{r.wall_s / r.copy_s:.1f}", *sizes)
    return table


if __name__ == "__main__":
    main()
