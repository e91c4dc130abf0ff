"""What one task out of a basis costs on a 7B-like set: 8 adapters of rank 16 in bfloat16, in a basis at half their bytes.

    python benchmarks/reconstruct.py [--layers 32] [--adapters 8] [--codec truncate] [--budget 0.5]

Makes the basis as the worker does, then asks for one task in a process of its own: wall time after its imports, peak resident
memory above what it takes after them, and the bytes of the basis that it had to read, beside those of the whole file. Then the
same again, from the store.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from merge import LAYER, RANK
from rich.console import Console
from rich.table import Table
from spine import make_adapter, peak_kib

from app.bases import OpenBasis
from app.console import progress_bar
from app.engine.child import workbench
from app.engine.direct import DirectExecutor
from app.engine.workflow import Run, run_all
from app.recipe import Recipe, RecipeInput
from app.reconstruct import reconstruct
from app.services import Services
from app.settings import Settings
from merge_algos.rank import RankRule
from storage.digest import Digest

MIB = 1024 * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--codec", default="truncate")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--child", nargs=2, metavar=("DATA_DIR", "BASIS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(Path(args.child[0]), Digest.parse(args.child[1]))))
        return
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as folder:
        services = Services.open(Settings(data_dir=Path(folder), devices="cpu", log_level="WARNING"))
        inputs = tuple(make_adapter(services, n, LAYER, args.layers, RANK, "bfloat16", console) for n in range(args.adapters))
        started = time.perf_counter()
        basis = make_basis(services, inputs, args, console)
        made_s = time.perf_counter() - started
        command = [sys.executable, __file__, "--child", folder, str(basis)]
        rows = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(2)]
        Console(width=120).print(table(services, basis, rows, made_s, args))


def make_basis(services: Services, inputs: tuple[Digest, ...], args: argparse.Namespace, console: Console) -> Digest:
    recipe = Recipe(
        method="rmm",
        method_version=1,
        parameters={"codec": args.codec, "budget": args.budget},
        rank=RankRule(),
        dtype="auto",
        seed=0,
        profile="portable",
        allow_base_mismatch=False,
        adapters=tuple(RecipeInput(str(digest), f"task-{n}", 1.0) for n, digest in enumerate(inputs)),
    )
    with progress_bar(console) as report:
        executor = DirectExecutor(workbench(services, "cpu", os.cpu_count() or 1))
        return run_all(Run(services, recipe, executor, report, stop=lambda: False))


def measured(data_dir: Path, digest: Digest) -> dict[str, float]:
    services = Services.open(Settings(data_dir=data_dir, devices="cpu", log_level="WARNING"))
    basis = services.index.get_basis(digest)
    assert basis is not None
    before_kib, started = peak_kib(os.getpid()), time.perf_counter()
    rebuilt = reconstruct(services, basis, {basis.tasks[-1]: 1.0}, RankRule())
    wall_s = time.perf_counter() - started
    return {
        "wall_s": wall_s,
        "over_import_mib": (peak_kib(os.getpid()) - before_kib) / 1024,
        "result_mib": rebuilt.record.size_bytes / MIB,
        "relative_error": rebuilt.report["relative_error"],
    }


def table(services: Services, basis: Digest, rows: list[dict[str, float]], made_s: float, args: argparse.Namespace) -> Table:
    opened = OpenBasis.open(services.blobs, basis)
    place = opened.place(opened.manifest.tasks[-1])
    names = [name for module, own in opened.modules(place).items() for name in parts(place.group, own, place.position, module)]
    own_mib = sum(opened.tensors.header.tensors[name].size_bytes for name in names if name in opened.tensors.header.tensors) / MIB
    title = f"{args.layers} layers x {{4 x 4096², 3 x 4096x11008}}, {args.adapters} adapters of rank {RANK}: codec {args.codec}"
    file_mib = opened.manifest.tensors.size_bytes / MIB
    found = Table(
        title=title, caption=f"the basis: {file_mib:.0f} MiB, made in {made_s:.0f} s; {own_mib:.0f} MiB of it are this task's"
    )
    for heading in ("one task", "wall", "peak RSS over import", "result", "relative error"):
        found.add_column(heading, justify="right")
    for case, r in zip(("first time", "from the store"), rows, strict=True):
        sizes = (f"{r['over_import_mib']:.0f} MiB", f"{r['result_mib']:.0f} MiB", f"{r['relative_error']:.4f}")
        found.add_row(case, f"{r['wall_s']:.2f} s", *sizes)
    return found


def parts(group: int, own: dict[str, object], position: int, module: str) -> tuple[str, str]:
    part = own["layout"]["part_of"][position]  # type: ignore[index]
    return f"{group}.shared.{module}", f"{group}.{part}.{module}"


if __name__ == "__main__":
    main()
