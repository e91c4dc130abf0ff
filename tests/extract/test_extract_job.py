"""An extraction through the engine: what is shipped and certified, what is resumed, who may have it, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from app import base_models, ingest
from app.adapters import OpenAdapter
from app.commands import collect_garbage, save
from app.engine.executor import Stopped
from app.errors import BadBase, InvalidField, UnknownBaseModel
from app.report import read_report
from app.services import Services
from app.settings import Settings
from hub_server import HubServer
from making import dense_directory
from merge_algos import RankRule, extract
from merge_algos.errors import (
    BadPattern,
    IncomparableTensor,
    InvalidRank,
    LeftoverTensors,
    NonFiniteTensor,
    NothingToExtract,
    ShapeMismatch,
)
from pairs import MODULES, State, in_shards, is_linear, recipe_in, run, state_of, write_like, write_pair
from storage.digest import Digest
from storage.errors import NoBaseModel, RepoNotFound

TOKENS = torch.tensor([[0, 3, 4, 5, 6, 7], [0, 8, 9, 10, 11, 12]])
ONE_MODULE, ALL = 1, 2**30  # bytes to a shard


def certificate(services: Services, adapter: Digest) -> dict[str, Any]:
    report = read_report(services.blobs, adapter)
    assert report is not None
    return report


def saved(services: Services, adapter: Digest, folder: Path) -> Path:
    save(services, adapter, folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


# What is shipped


def test_the_service_ships_the_very_factors_of_the_library(services: Services, models: Path) -> None:
    adapter = OpenAdapter.open(services.blobs, run(services, recipe_in(services, profile="compact")))
    expected = extract(state_of(models / "base"), state_of(models / "tuned"), rank=4).adapter.deltas
    assert set(adapter.modules) == set(expected) == MODULES
    for name, delta in expected.items():
        shipped = adapter.delta(name, delta.shape, "cpu")
        assert torch.equal(shipped.B, delta.B) and torch.equal(shipped.A, delta.A)


@pytest.mark.parametrize("rank", [{"energy": 0.9}, {"energy": 0.9, "max": 6}, {"heavy_tail": 5}, {"heavy_tail": 5, "max": 6}])
def test_every_rule_gives_what_the_library_gives(services: Services, models: Path, rank: dict[str, Any]) -> None:
    report, most = certificate(services, run(services, recipe_in(services, rank=rank))), rank.get("max")
    tails = {"heavy_tail": rank.get("heavy_tail"), "heavy_tail_max": most}
    rule: dict[str, Any] = {"rank": RankRule(most, rank["energy"])} if "energy" in rank else tails
    expected = extract(state_of(models / "base"), state_of(models / "tuned"), **rule)
    assert {m["module"]: m["rank_out"] for m in report["modules"]} == {r.module: r.rank_out for r in expected.reports}
    assert all(module["rank_out"] <= (most or 32) for module in report["modules"])


def test_peft_adds_the_truncated_difference_to_the_base(services: Services, models: Path, tmp_path: Path) -> None:
    folder = saved(services, run(services, recipe_in(services, rank=4)), tmp_path / "out")
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(models / "base"), folder)
    by_hand, deltas = state_of(models / "base"), dense_directory(folder)
    for name, delta in deltas.items():
        by_hand[f"{name}.weight"] = by_hand[f"{name}.weight"] + delta.float()
    write_like(models / "base", models / "by-hand", by_hand)
    expected = logits(LlamaForCausalLM.from_pretrained(models / "by-hand"))
    torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)
    assert set(deltas) == MODULES


def test_at_full_energy_peft_gives_the_tuned_model_where_linear_layers_alone_have_changed(
    services: Services, models: Path, tmp_path: Path
) -> None:
    write_pair(models, only=is_linear)
    adapter = run(services, recipe_in(services, rank={"energy": 1.0}, leftover="refuse"))
    folder = saved(services, adapter, tmp_path / "out")
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(models / "base"), folder)
    tuned, base = (logits(LlamaForCausalLM.from_pretrained(models / name)) for name in ("tuned", "base"))
    torch.testing.assert_close(logits(adapted), tuned, atol=1e-5, rtol=1e-5)
    assert float((base - tuned).abs().max()) > 1e-3
    assert certificate(services, adapter)["totals"]["relative_error"] < 1e-5


@pytest.mark.parametrize(("profile", "alike"), [("portable", True), ("compact", False)])
def test_a_profile_pads_or_not(services: Services, tmp_path: Path, profile: str, alike: bool) -> None:
    folder = saved(services, run(services, recipe_in(services, rank={"heavy_tail": 5}, profile=profile)), tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["rank_pattern"] == {}) is alike


def test_the_config_names_the_base_and_its_task(services: Services, models: Path, tmp_path: Path) -> None:
    config = json.loads((saved(services, run(services, recipe_in(services)), tmp_path / "a") / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"], config["revision"]) == ("base", "CAUSAL_LM", None)
    named = run(services, recipe_in(services, base_model_name="org/llama"))
    config = json.loads((saved(services, named, tmp_path / "b") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/llama"


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "BF16"), ("float32", "F32"), ("float16", "F16")])
def test_the_type_is_the_widest_of_both_models_or_the_one_asked_for(
    services: Services, models: Path, dtype: str, expected: str
) -> None:
    for name in ("base", "tuned"):
        write_like(models / "base", models / name, {n: t.bfloat16() for n, t in state_of(models / name).items()})
    adapter = OpenAdapter.open(services.blobs, run(services, recipe_in(services, dtype=dtype)))
    assert adapter.dtypes == {expected}


def test_weights_in_shards_are_the_same_weights(services: Services, models: Path) -> None:
    whole = OpenAdapter.open(services.blobs, run(services, recipe_in(services)))
    in_shards(models / "tuned")
    parts = OpenAdapter.open(services.blobs, run(services, recipe_in(services)))
    assert parts.manifest.weights == whole.manifest.weights


# The certificate


def test_totals_are_over_the_whole_difference(services: Services, models: Path, tmp_path: Path) -> None:
    adapter = run(services, recipe_in(services, rank=4))
    report, deltas = certificate(services, adapter), dense_directory(saved(services, adapter, tmp_path / "out"))
    base, tuned = (state_of(models / name) for name in ("base", "tuned"))
    whole, lost = 0.0, 0.0
    for tensor, before in base.items():
        change = tuned[tensor].double() - before.double()
        whole += float(change.square().sum())
        lost += float((change - deltas.get(tensor.removesuffix(".weight"), torch.zeros(()))).square().sum())
    assert report["totals"]["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert report["totals"]["retained_energy"] == pytest.approx(1 - lost / whole, rel=1e-4)
    assert report["totals"]["left_out"] == len(report["left_out"]) == len(base) - len(MODULES)


def test_the_certificate_names_models_modules_and_what_was_left_out(services: Services) -> None:
    adapter = run(services, recipe_in(services, include=["lm_head"]))
    report = certificate(services, adapter)
    assert [each["source"] for each in report["inputs"]] == ["dir:base", "dir:tuned"]
    assert {module["module"] for module in report["modules"]} == {*MODULES, "lm_head"}
    assert all(module["diagnostics"]["relative_norm"] > 0 for module in report["modules"])
    assert "model.embed_tokens.weight" in {each["tensor"] for each in report["left_out"]}
    card = services.blobs.path(OpenAdapter.open(services.blobs, adapter).manifest.parts["README.md"].digest).read_text()
    assert "| model.embed_tokens.weight | an embedding |" in card


# Shards, resuming, garbage


def opened(settings: Settings, shard_bytes: int) -> Services:
    return Services.open(settings.model_copy(update={"shard_bytes": shard_bytes}))


@pytest.mark.parametrize("rank", [4, {"heavy_tail": 4}])
def test_how_the_shards_are_cut_changes_nothing(settings: Settings, tmp_path: Path, rank: Any) -> None:
    fine = opened(settings, ONE_MODULE)
    coarse = opened(settings.model_copy(update={"data_dir": tmp_path / "other"}), ALL)
    assert run(fine, recipe_in(fine, rank=rank)) == run(coarse, recipe_in(coarse, rank=rank))


def test_an_extraction_that_was_stopped_goes_on_after_its_last_shard(settings: Settings, tmp_path: Path) -> None:
    services = opened(settings, ONE_MODULE)
    recipe = recipe_in(services)
    with pytest.raises(Stopped):
        run(services, recipe, stop=lambda: len(services.jobs.shards(recipe.digest)) >= 5)
    finished = services.jobs.shards(recipe.digest)
    assert len(finished) == 5
    written = {number: services.blobs.path(shard.digest).stat().st_mtime_ns for number, shard in finished.items()}
    calm = opened(settings.model_copy(update={"data_dir": tmp_path / "other"}), ALL)
    assert run(services, recipe) == run(calm, recipe_in(calm))
    assert {number: services.blobs.path(shard.digest).stat().st_mtime_ns for number, shard in finished.items()} == written


def test_garbage_collection_leaves_the_models_and_the_result(services: Services) -> None:
    recipe = recipe_in(services)
    before = set(services.blobs.digests())
    result = run(services, recipe)
    collect_garbage(services.settings, grace_s=0)
    parts = {part.digest for part in OpenAdapter.open(services.blobs, result).manifest.parts.values()}
    assert set(services.blobs.digests()) == before | parts | {result}


def test_the_same_request_is_the_same_recipe_and_another_is_another(services: Services) -> None:
    first = recipe_in(services).digest
    assert recipe_in(services).digest == first
    changes: list[dict[str, Any]] = [{"rank": 5}, {"seed": 1}, {"exclude": ["q_proj"]}, {"dtype": "float16"}]
    others = [*changes, {"leftover": "refuse"}, {"base_model_name": "x"}, {"rank": {"heavy_tail": 4}}]
    assert len({first, *(recipe_in(services, **fields).digest for fields in others)}) == len(others) + 1


# From the Hub, and who may have it


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_models_of_the_hub_are_pinned_fetched_and_named(services: Services, hub: HubServer, models: Path, tmp_path: Path) -> None:
    commits = [hub.add_repo(f"org/{name}", files_of(models / name)) for name in ("base", "tuned")]
    recipe = recipe_in(services, base="hub:org/base", tuned="hub:org/tuned@main")
    assert recipe.models is not None
    assert (recipe.models.base, recipe.models.tuned) == (f"hub:org/base@{commits[0]}", f"hub:org/tuned@{commits[1]}")
    folder = saved(services, run(services, recipe), tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commits[0])


@pytest.mark.parametrize("private", ["base", "tuned"])
def test_what_comes_of_a_private_model_is_as_private(services: Services, hub: HubServer, models: Path, private: str) -> None:
    hub.add_repo("org/mine", files_of(models / private), private=True, readers=["hf_mine"])
    recipe = recipe_in(services, token="hf_mine", **{private: "hub:org/mine"})
    adapter = run(services, recipe)
    record = services.index.get(adapter)
    assert record is not None and [source.partition("@")[0] for source in record.restricted] == ["hub:org/mine"]
    ingest.check_access(services, record, token="hf_mine")
    with pytest.raises(RepoNotFound):
        ingest.check_access(services, record, token=None)


def test_a_model_forgotten_meanwhile_is_as_private_as_before(services: Services, hub: HubServer, models: Path) -> None:
    hub.add_repo("org/mine", files_of(models / "tuned"), private=True, readers=["hf_mine"])
    mine = base_models.obtain(services, base_models.pin(services, "hub:org/mine", token="hf_mine"))
    recipe = recipe_in(services, token="hf_mine", tuned=str(mine))
    known = base_models.restrictions(services, mine)
    services.materials.forget(mine)
    record = services.index.get(run(services, recipe))
    assert record is not None and record.restricted == known != ()


@pytest.mark.parametrize("token", [None, "hf_others"])
def test_a_private_model_is_not_read_for_others(services: Services, hub: HubServer, models: Path, token: str | None) -> None:
    hub.add_repo("org/mine", files_of(models / "tuned"), private=True, readers=["hf_mine"])
    hub.tokens.add("hf_others")
    recipe_in(services, token="hf_mine", tuned="hub:org/mine")
    with pytest.raises(RepoNotFound):
        recipe_in(services, token=token, tuned="hub:org/mine")


# Refusals: what headers tell is refused at once, what only the weights tell fails the job


def edited(change: Callable[[State], object]) -> Callable[[Path], None]:
    def write(models: Path) -> None:
        state = state_of(models / "tuned")
        change(state)
        save_file(state, models / "tuned" / "model.safetensors", metadata={"format": "pt"})

    return write


def configured(**fields: Any) -> Callable[[Path], None]:
    def write(models: Path) -> None:
        config = json.loads((models / "base" / "config.json").read_text())
        (models / "base" / "config.json").write_text(json.dumps({**config, **fields}))

    return write


def as_gguf(models: Path) -> None:
    (models / "tuned" / "model.safetensors").unlink()
    (models / "tuned" / "model.gguf").write_bytes(b"GGUF and more")


def twice(models: Path) -> None:
    in_shards(models / "tuned")
    first, second = (models / "tuned" / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    save_file({**load_file(second), "model.norm.weight": torch.ones(32)}, second, metadata={"format": "pt"})
    save_file({**load_file(first), "model.norm.weight": torch.ones(32)}, first, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "fields", "error", "says"),
    [
        (as_gguf, {}, NoBaseModel, "GGUF are quantised"),
        (configured(model_type="gpt2"), {}, BadBase, "gpt2 are stored transposed"),
        (edited(lambda s: s.pop("lm_head.weight")), {}, IncomparableTensor, "lm_head.weight .* only the base model"),
        (edited(lambda s: s.update(extra=torch.ones(2))), {}, IncomparableTensor, "extra .* only the tuned model"),
        (edited(lambda s: s.update({"lm_head.weight": torch.ones(20, 32)})), {}, ShapeMismatch, "lm_head.weight"),
        (twice, {}, IncomparableTensor, "model.norm.weight .* two files of the tuned model"),
        (None, {"tuned": "dir:base"}, NothingToExtract, "the same"),
        (None, {"rank": 33}, InvalidRank, "rank 33: the result can have rank 32 at most"),
        (None, {"include": ["lm_haed"]}, BadPattern, "matches no matrix"),
        (None, {"exclude": ["("]}, InvalidField, "exclude.0"),
    ],
)
def test_what_headers_tell_is_refused_at_once(
    services: Services, models: Path, spoil: Any, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    if spoil:
        spoil(models)
    with pytest.raises(error, match=says):
        recipe_in(services, **fields)


@pytest.mark.parametrize(
    ("spoil", "fields", "error", "says"),
    [
        (edited(lambda s: s[UP].fill_(float("nan"))), {}, NonFiniteTensor, f"{UP} of the tuned model"),
        (edited(lambda s: s.update({UP: s[UP].to(torch.int32)})), {}, IncomparableTensor, f"{UP} .* types F32 and I32"),
        (None, {"leftover": "refuse"}, LeftoverTensors, "model.embed_tokens.weight"),
        (None, {"exclude": ["."]}, NothingToExtract, "only lm_head.weight, .* and 16 more did"),
    ],
)
def test_what_the_weights_tell_fails_the_job(
    services: Services, models: Path, spoil: Any, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    if spoil:
        spoil(models)
    with pytest.raises(error, match=says):
        run(services, recipe_in(services, **fields))


def test_buffers_of_whole_numbers_are_no_difference_while_they_are_the_same(services: Services, models: Path) -> None:
    for name in ("base", "tuned"):
        write_like(models / "base", models / name, {**state_of(models / name), "position_ids": torch.arange(7)})
    report = certificate(services, run(services, recipe_in(services)))
    assert "position_ids" not in {each["tensor"] for each in report["left_out"]}


@pytest.mark.parametrize("damaged", [False, True])
def test_models_that_have_gone_from_the_store_are_named(services: Services, damaged: bool) -> None:
    recipe = recipe_in(services)
    assert recipe.models is not None
    manifest = base_models.read(services, Digest.parse(recipe.models.tuned))
    services.blobs.path(manifest.files["model.safetensors"].digest if damaged else Digest.parse(recipe.models.tuned)).unlink()
    with pytest.raises(UnknownBaseModel, match=recipe.models.tuned):
        run(services, recipe)
