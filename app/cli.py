"""braid: the command line. Commands parse and delegate; heavy imports wait until a command needs them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from app.settings import Settings

app = typer.Typer(
    name="braid",
    help="Braid merges LoRA adapters: exact or refused, certified, without the base model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(name="store", help="Look after the store.", no_args_is_help=True)
rmm_app = typer.Typer(name="rmm", help="Look at reversible bases.", no_args_is_help=True)
data_app = typer.Typer(name="data", help="Look after data files that merges are learned from.", no_args_is_help=True)
app.add_typer(store_app)
app.add_typer(rmm_app)
app.add_typer(data_app)

out = Console()
err = Console(stderr=True)

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where everything is kept [default: BRAID_DATA_DIR or ~/.braid].")
]
Url = Annotated[str | None, typer.Option("--url", help="Use this server instead of working in this process.")]
HubToken = Annotated[str | None, typer.Option("--hub-token", help="Your Hub token, for private and gated adapters.")]


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [default: BRAID_HOST or 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one [default: BRAID_PORT or 8000].")] = None,
    data_dir: DataDir = None,
    worker: Annotated[bool, typer.Option("--worker/--no-worker", help="Also keep a worker running.")] = True,
) -> None:
    """Run the API, and a worker beside it.

    Example: `braid serve --port 8000 --data-dir ./data`
    """
    settings = _settings(host=host, port=port, data_dir=data_dir)
    from app.server import run_server

    with _problems_told():
        raise typer.Exit(run_server(settings, worker=worker, say=out.print))


@app.command()
def worker(data_dir: DataDir = None) -> None:
    """Run a worker: take jobs from the queue, one per device.

    Example: `BRAID_WORKER_ID=gpu-1 BRAID_DEVICES=cuda:0,cuda:1 braid worker --data-dir ./data`
    """
    settings = _settings(data_dir=data_dir)
    from app.supervisor import run_worker

    with _problems_told():
        raise typer.Exit(run_worker(settings))


@app.command()
def merge(
    sources: Annotated[
        list[str] | None, typer.Argument(help="hub:org/name@rev, sha256:…, name:ns/name, directory or file.")
    ] = None,
    weight: Annotated[list[float] | None, typer.Option("--weight", "-w", help="One per source [default: 1/n each].")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="See GET /methods [default: task_arithmetic].")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="name=value, a parameter of the method.")
    ] = None,
    post: Annotated[
        list[str] | None, typer.Option("--post", help="A step on the result: svc, restore_norm or restore_norm:scale=1.2.")
    ] = None,
    rank: Annotated[str | None, typer.Option("--rank", "-r", help="32, energy:0.99, or energy:0.99:64 [default: exact].")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Where DoRA and its like, or learning, need it; also a directory.")
    ] = None,
    base_rank: Annotated[str | None, typer.Option(help="What those are cut to, as --rank [default: energy:0.999:256].")] = None,
    extras: Annotated[
        str | None, typer.Option(help="Trained modules, biases, tokens: refuse, average or from:NAME [default: refuse].")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16 or bfloat16.")] = None,
    profile: Annotated[str | None, typer.Option(help="portable, compact or vllm.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of methods that draw at random.")] = None,
    name: Annotated[str | None, typer.Option(help="Also keep the result as name:<ns>/<name>.")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-f", help="YAML or JSON body of POST /merge; flags override it.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the merged adapter.")] = Path("merged"),
    url: Url = None,
    data_dir: DataDir = None,
    hub_token: HubToken = None,
) -> None:
    """Merge adapters into one, here or on a server.

    Examples:

    `braid merge ./math ./code -w 0.7 -w 0.3 --rank 32 -o merged`

    `braid merge hub:org/math-lora@main hub:org/code-lora@main --url http://127.0.0.1:8000`

    `braid merge ./dora ./math --base-model ./llama --base-rank 64`

    `braid merge -f recipe.yaml --rank energy:0.99`

    `braid merge ./math ./code ./law --method rmm -p budget=0.25 -o basis` makes a basis; see `braid reconstruct`.
    """
    from app import commands

    with _problems_told():
        flags = {"method": method, "dtype": dtype, "profile": profile, "seed": seed, "name": name, "base_model": base_model}
        given = (recipe, sources or [], weight or [], parameter or [], rank, flags)
        request = commands.build_request(*given, base_rank=base_rank, extras=extras, post=post or [])
        if url is None:
            settings = _settings(data_dir=data_dir)
            merged = commands.merge_here(settings, request, output, out, token=hub_token)
        else:
            merged = commands.merge_there(url, request, output, out, token=hub_token)
        commands.show(merged, output, out)


@app.command()
def extract(
    base: Annotated[str, typer.Option("--base", help="hub:org/name@rev, dir:NAME, sha256:…, or a directory.")],
    tuned: Annotated[str, typer.Option("--tuned", help="The same after full fine-tuning.")],
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Of every module.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Or: fraction of each module's squared norm.")] = None,
    heavy_tail: Annotated[int | None, typer.Option("--heavy-tail", help="Or: mean rank, spread by heavy tails.")] = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", help="Of any module, with --energy or --heavy-tail.")] = None,
    include: Annotated[list[str] | None, typer.Option("--include", help="Pattern of heads to extract too: lm_head.")] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Pattern of modules to leave out.")] = None,
    leftover: Annotated[str | None, typer.Option(help="report or refuse changes that a plain LoRA cannot hold.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16 or bfloat16.")] = None,
    profile: Annotated[str | None, typer.Option(help="portable or compact.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sketches.")] = None,
    base_model_name: Annotated[str | None, typer.Option(help="What the adapter calls its base model.")] = None,
    name: Annotated[str | None, typer.Option(help="Also keep the result as name:<ns>/<name>.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the adapter.")] = Path("extracted"),
    url: Url = None,
    data_dir: DataDir = None,
    hub_token: HubToken = None,
) -> None:
    """Get a LoRA out of a full fine-tune, here or on a server.

    Examples:

    `braid extract --base ./llama --tuned ./llama-math --rank 32 -o math`

    `braid extract --base hub:org/base@main --tuned hub:org/tuned@main --energy 0.9 --max-rank 128 --profile compact`
    """
    from app import commands, extract_commands

    with _problems_told():
        flags = {"base": base, "tuned": tuned, "include": include, "exclude": exclude, "leftover": leftover, "dtype": dtype}
        more = {"profile": profile, "seed": seed, "base_model_name": base_model_name, "name": name}
        request = extract_commands.build_request(rank, energy, heavy_tail, max_rank, **flags, **more)
        if url is None:
            settings = _settings(data_dir=data_dir)
            extracted = extract_commands.extract_here(settings, request, output, out, token=hub_token)
        else:
            extracted = extract_commands.extract_there(url, request, output, out, token=hub_token)
        commands.show(extracted, output, out)


@app.command()
def reconstruct(
    basis: Annotated[str, typer.Argument(help="sha256:… of a basis, or name:ns/name where it has one.")],
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="One task, or several as task=weight for a mix.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the adapter.")] = Path("reconstructed"),
    rank: Annotated[str | None, typer.Option("--rank", "-r", help="Of a mix: 32 or energy:0.99 [default: exact].")] = None,
    url: Url = None,
    data_dir: DataDir = None,
    hub_token: HubToken = None,
) -> None:
    """Get one task of a basis back as an adapter, or mix several.

    Examples:

    `braid reconstruct sha256:… math -o math`

    `braid reconstruct sha256:… math=0.7 code=0.3 --rank 16 -o both --url http://127.0.0.1:8000`
    """
    from app import basis_commands

    with _problems_told():
        weights = basis_commands.weights_of(tasks)
        if url is None:
            settings = _settings(data_dir=data_dir)
            lost = basis_commands.reconstruct_here(settings, basis, weights, rank, output, token=hub_token)
        else:
            lost = basis_commands.reconstruct_there(url, basis, weights, rank, output, token=hub_token)
        basis_commands.tell(lost, output, out)


@rmm_app.command()
def show(
    basis: Annotated[str, typer.Argument(help="sha256:… of a basis, or name:ns/name where it has one.")],
    url: Url = None,
    data_dir: DataDir = None,
) -> None:
    """A table of the basis's tasks, their errors and bytes.

    Example: `braid rmm show sha256:…`
    """
    from app import basis_commands

    with _problems_told():
        if url is None:
            basis_commands.show_here(_settings(data_dir=data_dir), basis, out)
        else:
            basis_commands.show_there(url, basis, out)


@data_app.command()
def add(
    file: Annotated[Path, typer.Argument(help="JSONL, Parquet, or a classification head as safetensors.")],
    url: Url = None,
    data_dir: DataDir = None,
) -> None:
    """Bring a data file into the store and print its id.

    Example: `braid data add train.jsonl`
    """
    from app import data_commands

    with _problems_told():
        print(data_commands.add_here(_settings(data_dir=data_dir), file) if url is None else data_commands.add_there(url, file))


@data_app.command(name="list")
def list_(url: Url = None, data_dir: DataDir = None) -> None:
    """A table of the data files in the store, newest first.

    Example: `braid data list`
    """
    from app import data_commands

    with _problems_told():
        if url is None:
            data_commands.list_here(_settings(data_dir=data_dir), out)
        else:
            data_commands.list_there(url, out)


@app.command(name="import")
def import_(
    source: Annotated[str, typer.Argument(help="hub:org/name[/subfolder][@revision], a directory, or one .safetensors file.")],
    name: Annotated[str | None, typer.Option(help="Also keep it as name:<ns>/<name>.")] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Of a single file [default: as its metadata names it].")
    ] = None,
    url: Url = None,
    data_dir: DataDir = None,
    hub_token: HubToken = None,
) -> None:
    """Bring one adapter into the store and print its id.

    Examples: `braid import hub:org/math-lora@main --name me/math`, `braid import style.safetensors --base-model sd_v1`
    """
    from app import commands

    with _problems_told():
        if url is None:
            print(commands.import_here(_settings(data_dir=data_dir), source, name, base_model, token=hub_token))
        else:
            print(commands.import_there(url, source, name, base_model, token=hub_token))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="hub:org/name@rev, sha256:…, name:ns/name, directory or file.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; for --to peft a directory.")],
    to: Annotated[str, typer.Option("--to", help="peft, kohya or diffusers.")],
    url: Url = None,
    data_dir: DataDir = None,
    hub_token: HubToken = None,
) -> None:
    """Write an adapter in another format: the same deltas under other names.

    Example: `braid convert ./unet-lora style.safetensors --to kohya`
    """
    from app import convert_commands

    with _problems_told():
        wanted = convert_commands.format_of(to)
        if url is None:
            convert_commands.convert_here(_settings(data_dir=data_dir), source, output, wanted, token=hub_token)
        else:
            convert_commands.convert_there(url, source, output, wanted, token=hub_token)


@app.command()
def demo(
    hub: Annotated[
        list[str] | None, typer.Option("--hub", help="Adapters from the Hub, org/name[@revision], instead of ours.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(help="More Hub adapters after --hub.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the merged adapter; 0 merges exactly.")] = 16,
    weight: Annotated[float, typer.Option(help="Weight of every adapter.")] = 0.3,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the merged adapter.")] = Path("demo-merged"),
    data_dir: DataDir = None,
) -> None:
    """Start the service, import real adapters, merge them and show the certificate.

    Examples: `braid demo`, `braid demo --hub org/a org/b --rank 32`
    """
    from app.demo import run_demo

    with _problems_told():
        references = [*(hub or []), *(more or [])]
        run_demo(
            _settings(data_dir=data_dir), references, rank=rank or None, weight=weight, output=output, keep=data_dir, console=out
        )


@store_app.command()
def gc(
    grace: Annotated[float, typer.Option(help="Seconds a blob must be old before it is removed.")] = 3600.0,
    data_dir: DataDir = None,
) -> None:
    """Remove blobs that nothing refers to.

    Example: `braid store gc --grace 3600`
    """
    from app import commands

    with _problems_told():
        print(commands.collect_garbage(_settings(data_dir=data_dir), grace))


@store_app.command()
def verify(data_dir: DataDir = None) -> None:
    """Read every blob and compare it with its digest; exit 1 if one is damaged.

    Example: `braid store verify`
    """
    from app import commands

    with _problems_told():
        damaged = commands.verify_store(_settings(data_dir=data_dir), out)
        raise typer.Exit(1 if damaged else 0)


def _settings(**given: Any) -> Settings:
    """Settings from the environment, overridden by the flags that were given."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for wrong in error.errors(include_url=False, include_input=False):
            setting = f"BRAID_{'.'.join(map(str, wrong['loc'])).upper()}"
            err.print(f"error: {setting}: {wrong['msg']}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def _problems_told() -> Iterator[None]:
    """A refusal is a sentence and exit code 2, never a traceback; a defect of ours keeps its traceback."""
    from app.client import Refused
    from app.errors import REFUSALS, sentence

    told: tuple[type[Exception], ...] = (Refused, *REFUSALS)
    try:
        yield
    except told as error:
        err.print(f"error: {sentence(error)}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


def main() -> None:
    app()


if __name__ == "__main__":
    main()
