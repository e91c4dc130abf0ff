"""What `braid reconstruct` and `braid rmm` do, in this process or on a server."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from app.client import Client
from app.commands import parse_rank, save, tell_how_to_load
from app.console import basis_table
from app.errors import InvalidField, UnknownBasis
from app.ingest import check_access
from app.reconstruct import reconstruct
from app.report import read_report
from app.services import Services
from app.settings import Settings
from merge_algos.rank import RankRule
from storage.digest import Digest
from storage.index import BasisRecord


def weights_of(tasks: Sequence[str]) -> dict[str, float]:
    """`math` -> math at weight 1; `math=0.7 code=0.3` -> a mix. Raises InvalidField."""
    weights: dict[str, float] = {}
    for text in tasks:
        task, _, weight = text.partition("=")
        try:
            weights[task] = float(weight or 1)
        except ValueError as error:
            raise InvalidField("TASK", f"{text!r} is neither a task nor task=weight") from error
    return weights


def reconstruct_here(
    settings: Settings, basis: str, weights: Mapping[str, float], rank: str | None, output: Path, *, token: str | None
) -> tuple[float, float]:
    """Save the adapter of one task, or a mix; what the basis lost of it, and what rounding did."""
    services = Services.open(settings)
    record = _find(services, basis)
    check_access(services, record, token=token)
    rebuilt = reconstruct(services, record, weights, _rule(rank))
    save(services, rebuilt.record.id, output)
    return rebuilt.report["relative_error"], rebuilt.report["rounding_error"]


def reconstruct_there(
    url: str, basis: str, weights: Mapping[str, float], rank: str | None, output: Path, *, token: str | None
) -> tuple[float, float]:
    """The same on a server. Raises Refused."""
    alone = len(weights) == 1 and set(weights.values()) == {1.0} and rank is None
    asked: dict[str, Any] = {"task": next(iter(weights))} if alone else {"weights": dict(weights)}
    if rank is not None:
        asked["rank"] = parse_rank(rank)
    output.mkdir(parents=True, exist_ok=True)
    with Client.connect(url, token=token) as client:
        answer = client.reconstruct(basis, asked)
        for part, link in answer["adapter"]["links"].items():
            if part != "self":
                client.download(link, output / Path(part).name)
    return answer["relative_error"], answer["rounding_error"]


def tell(lost: tuple[float, float], output: Path, console: Console) -> None:
    error, rounding = lost
    console.print(f"lost: {error:.2%} of the norm (of a mix or a cut: at most), by rounding {rounding:.1e}")
    tell_how_to_load(output, console)


def show_here(settings: Settings, basis: str, console: Console) -> None:
    services = Services.open(settings)
    console.print(basis_table(read_report(services.blobs, _find(services, basis).id) or {}))


def show_there(url: str, basis: str, console: Console) -> None:
    """Raises Refused."""
    with Client.connect(url) as client:
        console.print(basis_table(client.basis_report(basis)))


def _find(services: Services, basis: str) -> BasisRecord:
    """By id, or by the name that its recipe asked for. Raises BadDigest or UnknownBasis."""
    digest = services.index.resolve_name(basis.removeprefix("name:")) if basis.startswith("name:") else Digest.parse(basis)
    record = services.index.get_basis(digest) if digest else None
    if record is None or services.blobs.stat(record.id) is None:
        raise UnknownBasis(basis)
    return record


def _rule(rank: str | None) -> RankRule:
    parsed = None if rank is None else parse_rank(rank)
    return RankRule(**parsed) if isinstance(parsed, dict) else RankRule(max=parsed)  # type: ignore[arg-type]
