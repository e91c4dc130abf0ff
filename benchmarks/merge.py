"""How fast a merge is, side by side in one run: Braid, PEFT's `add_weighted_adapter`, and the dense textbook version.

    python benchmarks/merge.py                      # modules with 8 adapters, and the 7B-like set: about 20 minutes
    python benchmarks/merge.py --counts 2,8,32      # half an hour, nearly all of it PEFT's dense SVD
    python benchmarks/merge.py --parts modules --shapes 1024x1024
    python benchmarks/merge.py --parts set --layers 1 --methods ties,dare

modules: one layer at a time, in memory that is kept for the next as the worker's child keeps it, for all of them; ratio is
the other's time over ours, errors are against the float64 sum. What PEFT cannot do in this machine's memory is left out of its
column. Rows are appended to --state as they are measured.
set: 32 layers x {4 x 4096^2, 3 x 4096x11008}, adapters of rank 16 in bfloat16 files, files in and file out, through the
worker's own child; beside it the time of merely reading the inputs and writing the result. By turns, the best of three on
both sides; of one where a merge takes ten seconds.
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

from app.engine.child import keep_what_is_freed
from app.services import Services
from app.settings import Settings
from merge_algos.lowrank import LowRankDelta
from merge_algos.merge import build, merge_module
from merge_algos.protocol import ModuleContext
from merge_algos.rank import RankRule

T = TypeVar("T")
RANK = 16
DENSE = "dense sum, SVD"
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
    parser.add_argument("--counts", default="8", help="numbers of adapters of one module")
    parser.add_argument("--layers", type=int, default=32, help="of the set")
    parser.add_argument("--adapters", type=int, default=8, help="of the set")
    parser.add_argument("--methods", default="", help="comma-separated, of the set: at rank 16")
    parser.add_argument("--state", type=Path, help="append rows of modules here, and do not measure what stands here again")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_what_is_freed()
    console = Console(width=150)
    if "modules" in args.parts:
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
        counts = [int(count) for count in args.counts.split(",")]
        rows = read_rows(args.state)
        for row in module_rows([(*shape, count) for shape in shapes for count in counts], rows):
            rows.append(row)
            if args.state:
                with args.state.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        console.print(module_table(rows))
    if "set" in args.parts:
        chosen = [(method, RANK) for method in args.methods.split(",")] if args.methods else SET_CASES
        console.print(set_table(args.layers, args.adapters, chosen))


def read_rows(state: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in state.read_text().splitlines()] if state and state.exists() else []


def module_rows(sizes: Sequence[tuple[int, int, int]], known: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of (d_out, d_in, adapters) a row for each of PEFT's combinations, and one for the dense sum."""
    found = {(row["module"], row["adapters"], row["other"]) for row in known}
    for d_out, d_in, count in sizes:
        deltas = [random_delta(seed, d_out, d_in) for seed in range(count)]
        for other, pair in {**{f"PEFT {name}": pair for name, pair in PAIRS.items()}, DENSE: PAIRS["svd"]}.items():
            if (f"{d_out}x{d_in}", count, other) not in found:
                yield module_row(deltas, other, *pair)


def module_row(
    deltas: Sequence[LowRankDelta], other: str, method: str, rank: int | None, parameters: dict[str, Any]
) -> dict[str, Any]:
    count, (d_out, d_in) = len(deltas), deltas[0].shape
    exact = sum((d.to_dense().double() / count for d in deltas), start=torch.zeros(d_out, d_in, dtype=torch.float64))
    our_s, ours = timed(lambda: our_merge(method, rank, parameters, deltas), enough_s=1.0)
    row = {
        "module": f"{d_out}x{d_in}",
        "adapters": count,
        "case": f"{method}, {f'rank {rank}' if rank else 'exact'}",
        "ours_s": our_s,
        "our_error": relative(ours.to_dense(), exact),
        "other": other,
        "other_s": None,
        "other_error": None,
    }
    if other == DENSE:
        other_s, theirs = timed(lambda: cut(sum(d.to_dense() / count for d in deltas)), enough_s=0.0)
    elif fits(other, exact.numel(), count):
        with peft_layer(deltas) as (model, layer):
            other_s, _ = timed(lambda: peft_merge(model, other.removeprefix("PEFT "), count), enough_s=0.0)
            theirs = layer.get_delta_weight("merged").detach()
    else:
        return row
    return {**row, "other_s": other_s, "other_error": relative(theirs, exact)}


def fits(other: str, entries: int, count: int) -> bool:
    """Whether PEFT's stack of dense deltas, of which it makes four copies in float32, fits this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "ties" not in other or 4 * 4 * entries * count < 0.8 * memory


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


def timed(body: Callable[[], T], *, enough_s: float) -> tuple[float, T]:
    """The least wall time of as many runs as take `enough_s` together, after one to warm up; at 0 of one. The last result.

    PEFT gets one run, since it does nothing when it is asked for the same combination again.
    """
    if enough_s:
        body()
    seconds: list[float] = []
    while not seconds or sum(seconds) < enough_s:
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
        missing = (r["other"], "too large", "", "")
        other = missing if r["other_s"] is None else (r["other"], *their_cells(r))
        table.add_row(r["module"], str(r["adapters"]), r["case"], *ours, *other)
    return table


def their_cells(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['other_s']:.2f} s", f"{row['other_error']:.6f}", f"{row['other_s'] / row['ours_s']:.0f}x"


def set_table(layers: int, count: int, cases: Sequence[tuple[str, int | None]]) -> Table:
    """The whole set, end to end, each case from the same stored adapters."""
    table = Table(title=f"{layers} layers x {{4 x 4096², 3 x 4096x11008}}, {count} adapters of rank {RANK}, bfloat16 files")
    for heading in ("case", "wall", "copy", "wall/copy", "peak RSS", "over import", "inputs", "result"):
        table.add_column(heading, justify="right")
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as folder:
        services = Services.open(Settings(data_dir=Path(folder), devices="cpu", log_level="WARNING"))
        inputs = tuple(make_adapter(services, seed, LAYER, layers, RANK, "bfloat16", console) for seed in range(count))
        for method, rank in cases:
            r = measure(services, inputs, method, RankRule(max=rank), console)
            case = f"{method}, {f'rank {rank}' if rank else 'exact'}"
            sizes = [f"{size:.0f} MiB" for size in (r.peak_rss_mib, r.above_import_mib, r.input_mib, r.result_mib)]
            table.add_row(case, f"{r.wall_s:.1f} s", f"{r.copy_s:.1f} s", f"{r.wall_s / r.copy_s:.1f}", *sizes)
    return table


if __name__ == "__main__":
    main()
