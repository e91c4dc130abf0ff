"""A base model on a Hub: only the tensors that an adapter needs are asked for, and what comes of a private one stays private."""

import re
from pathlib import Path

import pytest
from pydantic import SecretStr

from app import base_models, ingest
from app.adapters import read_manifest
from app.errors import BadBase, UnknownBaseModel
from app.services import Services
from doras import added, certificate, dense_doras, difference, files_of, norm, recipe_of, run
from hub_server import HubServer
from pairs import in_shards
from storage.digest import Digest
from storage.errors import BlobTooLarge, HubUnavailable, RepoNotFound
from storage.tensors import open_tensors
from test_grounding import saved

ON_HUB = {"base_model": "hub:org/base", "base_rank": {"energy": 1.0}}
MINE = "hf_mine"


def spans(hub: HubServer, sizes: dict[str, int]) -> dict[str, set[tuple[int, int]]]:
    """File of weights -> ranges (start, stop) that storage was asked for; the whole file where none was said."""
    found: dict[str, set[tuple[int, int]]] = {}
    for seen in hub.requests("GET", host="cdn"):
        path, _ = hub.blob(seen.path.partition("?")[0].rpartition("/")[2])
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", seen.headers.get("range", ""))
        found.setdefault(path, set()).add((int(asked[1]), int(asked[2]) + 1) if asked else (0, sizes[path]))
    return found


def needed(folder: Path) -> dict[str, set[tuple[int, int]]]:
    """The same of the header and the tensors that the DoRA needs; files that hold none of them are not there."""
    wanted = {f"{module}.weight" for module in dense_doras(folder, folder.parent / "dora")}
    found = {}
    for path in folder.glob("*.safetensors"):
        with open_tensors(path) as file:
            start = file.header.data_start
            held = {(start + i.start, start + i.end) for name, i in file.header.tensors.items() if name in wanted}
            if held:
                found[path.name] = {(0, 8), (8, start), *held}
    return found


def merged(services: Services, models: Path, **fields: object) -> Digest:
    return run(services, recipe_of(services, added(services, models / "dora"), **{**ON_HUB, **fields}))


def test_only_the_bytes_that_are_needed_are_asked_for(services: Services, models: Path, hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("org/base", files_of(models / "base"))
    exact, size = dense_doras(models / "base", models / "dora"), (models / "base" / "model.safetensors").stat().st_size
    found = saved(services, merged(services, models), tmp_path / "out")
    assert norm(difference(found, exact)) <= 1e-5 * norm(exact)
    asked = spans(hub, {"model.safetensors": size})
    assert asked == needed(models / "base")
    assert sum(stop - start for start, stop in asked["model.safetensors"]) < 0.5 * size
    assert not [seen for seen in hub.requests("GET", "/resolve/") if "tokenizer" in seen.path]


def test_of_shards_only_those_are_opened_that_hold_what_is_needed(services: Services, models: Path, hub: HubServer) -> None:
    expected = {f"{module}.weight" for module in dense_doras(models / "base", models / "dora")}
    in_shards(models / "base")
    hub.add_repo("org/base", files_of(models / "base"))
    merged(services, models)
    asked = spans(hub, {path.name: path.stat().st_size for path in models.glob("base/*.safetensors")})
    tensors = {}
    for path in models.glob("base/*.safetensors"):
        with open_tensors(path) as file:
            start = file.header.data_start
            tensors |= {(path.name, start + i.start, start + i.end): name for name, i in file.header.tensors.items()}
    beyond = {(name, *span) for name, own in asked.items() for span in own if (name, *span) in tensors}
    assert {tensors[span] for span in beyond} == expected
    assert all(span[0] in (0, 8) or (name, *span) in beyond for name, own in asked.items() for span in own)


def test_the_weights_are_the_same_bytes_whether_read_in_part_or_whole(
    services: Services, models: Path, hub: HubServer, tmp_path: Path
) -> None:
    commit = hub.add_repo("org/base", files_of(models / "base"))
    in_part = merged(services, models)
    other = Services.open(services.settings.model_copy(update={"data_dir": tmp_path / "other"}))
    base_models.obtain(other, f"hub:org/base@{commit}")
    assert merged(other, models) == in_part


def test_a_hub_that_ignores_ranges_is_read_whole(services: Services, models: Path, hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add_repo("org/base", files_of(models / "base"))
    hub.fail("model.safetensors", "no_range", times=float("inf"))
    exact = dense_doras(models / "base", models / "dora")
    assert norm(difference(saved(services, merged(services, models), tmp_path / "out"), exact)) <= 1e-5 * norm(exact)
    assert base_models.held(services, f"hub:org/base@{commit}") is not None


def test_what_is_whole_in_the_store_is_not_asked_for(services: Services, models: Path, hub: HubServer) -> None:
    commit = hub.add_repo("org/base", files_of(models / "base"))
    base_models.obtain(services, f"hub:org/base@{commit}")
    before = len(hub.requests())
    merged(services, models, base_model=f"hub:org/base@{commit}")
    assert len(hub.requests()) == before


def test_a_second_adapter_of_the_same_layers_fetches_nothing(services: Services, models: Path, hub: HubServer) -> None:
    hub.add_repo("org/base", files_of(models / "base"))
    merged(services, models)
    before = spans(hub, {})
    merged(services, models, seed=1)
    assert {path: own - before[path] for path, own in spans(hub, {}).items()} == {"model.safetensors": set()}


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_connection_that_breaks_goes_on_where_it_was(
    services: Services, models: Path, hub: HubServer, kind: str, tmp_path: Path
) -> None:
    hub.add_repo("org/base", files_of(models / "base"))
    exact = dense_doras(models / "base", models / "dora")
    hub.fail("model.safetensors", kind, at=100, times=2)
    assert norm(difference(saved(services, merged(services, models), tmp_path / "out"), exact)) <= 1e-5 * norm(exact)


@pytest.mark.parametrize(("kind", "value"), [("commit", "f" * 40), ("etag", '"of another file"')])
def test_parts_of_two_files_are_never_put_together(
    services: Services, models: Path, hub: HubServer, kind: str, value: str
) -> None:
    hub.add_repo("org/base", files_of(models / "base"))
    recipe = recipe_of(services, added(services, models / "dora"), **ON_HUB)
    hub.fail("model.safetensors", kind, value=value)
    with pytest.raises(HubUnavailable):
        run(services, recipe)


def test_a_module_that_is_not_there_is_named(services: Services, models: Path, hub: HubServer) -> None:
    files = files_of(models / "base") | {"model.safetensors": files_of(models / "lora")["adapter_model.safetensors"]}
    hub.add_repo("org/base", files)
    with pytest.raises(BadBase, match=r"module model\.layers\.0\.\S+ of the adapter needs"):
        merged(services, models)


def test_more_than_the_operator_allows_is_refused_unread(services: Services, models: Path, hub: HubServer) -> None:
    hub.add_repo("org/base", files_of(models / "base"))
    narrow = Services.open(services.settings.model_copy(update={"max_base_bytes": 1000}))
    with pytest.raises(BlobTooLarge):
        merged(narrow, models)
    assert all(start in (0, 8) for start, _ in spans(hub, {})["model.safetensors"])


# Who may have it


def test_what_comes_of_a_private_base_is_as_private(services: Services, models: Path, hub: HubServer) -> None:
    commit = hub.add_repo("org/base", files_of(models / "base"), private=True, readers=[MINE])
    operated = Services.open(services.settings.model_copy(update={"hub_token": SecretStr(MINE)}))
    record = operated.index.get(merged(operated, models))
    assert record is not None and record.restricted == (f"hub:org/base@{commit}#model.safetensors",)
    assert base_models.held(operated, f"hub:org/base@{commit}") is None
    with pytest.raises(RepoNotFound):
        ingest.check_access(services, record, token=None)


def test_what_only_the_caller_can_read_is_read_when_the_recipe_is_made(services: Services, models: Path, hub: HubServer) -> None:
    commit = hub.add_repo("org/base", files_of(models / "base"), private=True, readers=[MINE])
    recipe = recipe_of(services, added(services, models / "dora"), token=MINE, **ON_HUB)
    record = services.index.get(run(services, recipe))
    assert record is not None and record.restricted == (f"hub:org/base@{commit}#model.safetensors",)


def test_what_comes_of_a_public_base_is_public(services: Services, models: Path, hub: HubServer) -> None:
    hub.add_repo("org/base", files_of(models / "base"))
    record = services.index.get(merged(services, models))
    assert record is not None and record.restricted == ()


def test_some_tensors_are_no_base_model_by_their_id(services: Services, models: Path, hub: HubServer) -> None:
    hub.add_repo("org/base", files_of(models / "base"))
    merged(services, models)
    (part,) = services.materials.bases()
    with pytest.raises(UnknownBaseModel):
        base_models.pin(services, str(part), token=None)


def test_the_certificate_names_the_commit(services: Services, models: Path, hub: HubServer) -> None:
    commit = hub.add_repo("org/base", files_of(models / "base"))
    adapter = merged(services, models)
    (section,) = certificate(services, adapter)["grounded"]
    assert section["base"] == f"hub:org/base@{commit}"
    assert read_manifest(services.blobs, adapter).inputs == (Digest.parse(section["input"]),)
