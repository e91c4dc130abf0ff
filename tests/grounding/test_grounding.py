"""Adapters that need the base model's weights in a merge: what comes out, what the certificate says of it, what is done twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from app.commands import collect_garbage, save
from app.convert import convert
from app.data_commands import add_here
from app.engine.executor import Stopped
from app.errors import InvalidField
from app.grounding.recipe import ground_recipes
from app.recipe import Recipe
from app.resolve import resolve
from app.schemas import MergeRequest
from app.services import Services
from app.settings import Settings
from doras import (
    TARGETS,
    added,
    certificate,
    dense_doras,
    difference,
    dora,
    norm,
    recipe_of,
    run,
    write_adapter,
)
from llama import LLAMA_TEXTS
from making import PREFIX, dense_directory
from merge_algos.errors import InvalidRank, UnsupportedAdapter
from storage.digest import Digest

ON_BASE = {"base_model": "dir:base"}
WHOLE = {**ON_BASE, "base_rank": {"energy": 1.0}}


def saved(services: Services, adapter: Digest, folder: Path) -> dict[str, torch.Tensor]:
    save(services, adapter, folder)
    return dense_directory(folder)


# What comes out


def test_the_oracle_is_what_peft_merges(written: Path, tmp_path: Path) -> None:
    merged = write_adapter(written / "base", tmp_path / "dora", dora())
    assert norm(difference(merged, dense_doras(written / "base", tmp_path / "dora"))) <= 1e-5 * norm(merged)


def test_at_full_rank_a_dora_alone_is_what_peft_merges(services: Services, models: Path, tmp_path: Path) -> None:
    exact = dense_doras(models / "base", models / "dora")
    found = saved(services, run(services, recipe_of(services, added(services, models / "dora"), **WHOLE)), tmp_path / "out")
    assert norm(difference(found, exact)) <= 1e-5 * norm(exact)


@pytest.mark.parametrize("base_rank", [3, {"energy": 0.9}, {"energy": 0.999, "max": 8}])
def test_the_certified_error_is_the_true_one(services: Services, models: Path, tmp_path: Path, base_rank: Any) -> None:
    exact = dense_doras(models / "base", models / "dora")
    adapter = run(services, recipe_of(services, added(services, models / "dora"), **ON_BASE, base_rank=base_rank))
    (section,) = certificate(services, adapter)["grounded"]
    error = norm(difference(saved(services, adapter, tmp_path / "out"), exact)) / norm(exact)
    assert section["relative_error"] == pytest.approx(error, rel=1e-3)
    assert section["relative_error"] > 1e-3 and section["norm"] == pytest.approx(norm(exact), rel=1e-5)


def test_a_cut_is_the_best_one_of_that_rank(services: Services, models: Path, tmp_path: Path) -> None:
    adapter = run(services, recipe_of(services, added(services, models / "dora"), **ON_BASE, base_rank=3))
    found = saved(services, adapter, tmp_path / "out")
    for module, delta in dense_doras(models / "base", models / "dora").items():
        beyond = torch.linalg.svdvals(delta)[3:].norm()
        assert float((found[module] - delta).norm()) == pytest.approx(float(beyond), rel=1e-4)


@pytest.mark.parametrize("base_rank", [4, {"energy": 1.0}])
def test_a_mixed_merge_is_the_weighted_sum_within_the_certified_error(
    services: Services, models: Path, tmp_path: Path, base_rank: Any
) -> None:
    sources = [added(services, models / name) for name in ("dora", "lora")]
    adapter = run(services, recipe_of(services, *sources, weights=[0.7, -0.4], **ON_BASE, base_rank=base_rank))
    (section,) = certificate(services, adapter)["grounded"]
    doras, loras = dense_doras(models / "base", models / "dora"), dense_directory(models / "lora")
    expected = {module: 0.7 * doras[module] - 0.4 * loras[module] for module in doras}
    error = norm(difference(saved(services, adapter, tmp_path / "out"), expected))
    assert error <= 0.7 * section["relative_error"] * section["norm"] + 1e-5 * norm(expected)


def test_a_rank_that_grounding_has_not_left_is_no_mistake(services: Services, models: Path) -> None:
    adapter = run(services, recipe_of(services, added(services, models / "dora"), **ON_BASE, base_rank=3, rank=20))
    assert certificate(services, adapter)["totals"]["rank"] == 3


def test_a_rank_that_no_layer_can_have_is_refused(services: Services, models: Path) -> None:
    with pytest.raises(InvalidRank, match="rank 32 at most"):
        recipe_of(services, added(services, models / "dora"), **ON_BASE, rank=33)


def test_layers_that_are_stored_transposed_are_turned(services: Services, models: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2)).save_pretrained(models / "gpt2")
    config = dora(["c_attn", "c_proj"], fan_in_fan_out=True)  # attn.c_proj is square
    merged = write_adapter(models / "gpt2", models / "turned", config)
    recipe = recipe_of(services, added(services, models / "turned"), base_model="dir:gpt2", base_rank={"energy": 1.0})
    found = saved(services, run(services, recipe), tmp_path / "out")
    assert norm(difference({name: delta.T for name, delta in found.items()}, merged)) <= 1e-5 * norm(merged)


def test_a_shape_that_no_file_says_comes_from_the_base(services: Services, models: Path, tmp_path: Path) -> None:
    config = VeraConfig(r=4, target_modules=["q_proj"], save_projection=True)
    merged = write_adapter(models / "base", models / "vera", config)
    adapter = run(services, recipe_of(services, added(services, models / "vera"), **ON_BASE))
    assert norm(difference(saved(services, adapter, tmp_path / "out"), merged)) <= 1e-5 * norm(merged)
    assert certificate(services, adapter)["totals"]["exact"]


def test_the_type_is_that_of_the_adapters(services: Services, models: Path, tmp_path: Path) -> None:
    write_adapter(models / "base", models / "half", dora(), dtype=torch.bfloat16)
    save(services, run(services, recipe_of(services, added(services, models / "half"), **ON_BASE)), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_every_method_takes_it(services: Services, models: Path) -> None:
    sources = [added(services, models / name) for name in ("dora", "lora")]
    ties = recipe_of(services, *sources, method="ties", rank=4, **ON_BASE)
    assert certificate(services, run(services, ties))["grounded"]


def test_a_basis_holds_it_as_it_is_beside_the_base(services: Services, models: Path) -> None:
    sources = [{"source": added(services, models / name), "name": name} for name in ("dora", "lora")]
    asked = MergeRequest.model_validate({"method": "rmm", "parameters": {"budget": 0.5}, "adapters": sources, **ON_BASE})
    report = certificate(services, run(services, resolve(asked, services, token=None)))
    first, second = report["tasks"]
    assert (first["input"], first["grounded"]["name"]) == (sources[0]["source"], "dora") and "grounded" not in second


# What is certified


def test_the_inputs_are_the_adapters_that_were_asked_for(services: Services, models: Path) -> None:
    source = added(services, models / "dora")
    adapter = run(services, recipe_of(services, source, **ON_BASE))
    report = certificate(services, adapter)
    assert [each["id"] for each in report["inputs"]] == [source]
    assert [str(parent) for parent in services.index.inputs(adapter)] == [source]


def test_what_was_cut_before_is_not_called_exact(services: Services, models: Path) -> None:
    report = certificate(services, run(services, recipe_of(services, added(services, models / "dora"), **ON_BASE, base_rank=2)))
    (section,) = report["grounded"]
    assert (report["totals"]["exact"], section["exact"]) == (False, False)
    assert (section["base"], section["rank_rule"]) == ("dir:base", {"max": 2, "energy": None})
    assert section["worst_module"]["relative_error"] >= section["relative_error"]


def test_the_card_tells_what_was_cut(services: Services, models: Path, tmp_path: Path) -> None:
    adapter = run(services, recipe_of(services, added(services, models / "dora"), **ON_BASE, base_rank=2))
    save(services, adapter, tmp_path / "out")
    (section,) = certificate(services, adapter)["grounded"]
    assert f"| dir:base | 2 | {section['relative_error']:.4g} |" in (tmp_path / "out" / "README.md").read_text()


def test_the_default_rule_is_written_out(services: Services, models: Path) -> None:
    recipe = recipe_of(services, added(services, models / "dora"), **ON_BASE)
    assert recipe.to_json()["base_rank"] == {"max": 256, "energy": 0.999}


def test_a_recipe_without_a_base_has_the_digest_that_it_had(services: Services, models: Path) -> None:
    assert "base_rank" not in recipe_of(services, added(services, models / "lora")).to_json()


# Done once


def counted(services: Services, recipe: Recipe) -> list[int]:
    """What the stage has counted, without repetitions."""
    seen: list[int] = []
    run(services, recipe, report=lambda stage, done, _: seen.append(done) if stage == "ground" else None)
    return list(dict.fromkeys(seen))


def test_the_same_request_is_the_same_recipe_and_the_same_bytes(services: Services, models: Path, tmp_path: Path) -> None:
    source = added(services, models / "dora")
    first = recipe_of(services, source, **ON_BASE)
    other = Services.open(services.settings.model_copy(update={"data_dir": tmp_path / "other", "shard_bytes": 1}))
    again = recipe_of(other, added(other, models / "dora"), **ON_BASE)
    assert first.digest == again.digest and run(services, first) == run(other, again)


def test_another_merge_of_the_same_adapter_grounds_nothing(services: Services, models: Path) -> None:
    source = added(services, models / "dora")
    assert counted(services, recipe_of(services, source, weights=[1.0], **ON_BASE)) == [0, 4]
    assert counted(services, recipe_of(services, source, weights=[2.0], **ON_BASE)) == [0]


def test_finished_shards_are_not_run_again(services: Services, models: Path) -> None:
    services = Services.open(services.settings.model_copy(update={"shard_bytes": 1}))
    recipe = recipe_of(services, added(services, models / "dora"), **ON_BASE)
    (grounding,) = ground_recipes(recipe)
    with pytest.raises(Stopped):
        run(services, recipe, stop=lambda: len(services.jobs.shards(grounding.digest)) >= 2)
    kept = services.jobs.shards(grounding.digest)
    before = {n: services.blobs.path(shard.digest).stat().st_mtime_ns for n, shard in kept.items()}
    assert counted(services, recipe) == [0, 2, 3, 4]
    assert before == {n: services.blobs.path(shard.digest).stat().st_mtime_ns for n, shard in kept.items()}


def test_shards_of_a_job_under_way_survive_garbage_collection(settings: Settings, models: Path) -> None:
    services = Services.open(settings.model_copy(update={"shard_bytes": 1}))
    recipe = recipe_of(services, added(services, models / "dora"), **ON_BASE)
    services.jobs.submit(recipe.digest, 1, method=recipe.method, recipe=recipe.to_json())
    (grounding,) = ground_recipes(recipe)
    with pytest.raises(Stopped):
        run(services, recipe, stop=lambda: len(services.jobs.shards(grounding.digest)) >= 2)
    collect_garbage(services.settings, grace_s=0.0)
    assert counted(services, recipe) == [0, 2, 3, 4]


# Refused


def test_without_a_base_it_is_refused_by_name(services: Services, models: Path) -> None:
    with pytest.raises(UnsupportedAdapter, match=r"model\.layers\.0\.\S+: .*depends on the base model's weight; give base_model"):
        recipe_of(services, added(services, models / "dora"))


def test_a_base_that_nothing_needs_is_refused(services: Services, models: Path) -> None:
    with pytest.raises(InvalidField, match=r"base_model: .*no adapter here depends on its weights"):
        recipe_of(services, added(services, models / "lora"), **ON_BASE)


def test_a_rank_for_no_base_is_refused(services: Services, models: Path) -> None:
    with pytest.raises(InvalidField, match="base_rank"):
        recipe_of(services, added(services, models / "lora"), base_rank=4)


def test_another_format_cannot_hold_it(services: Services, models: Path) -> None:
    record = services.index.get(Digest.parse(added(services, models / "dora")))
    assert record is not None
    with pytest.raises(UnsupportedAdapter, match="depends on the base model's weight; merge it alone with base_model"):
        convert(services, record, "kohya")


def test_targets_of_both_adapters_are_the_same(written: Path) -> None:
    """Else the mixed merge above would leave its layers alone."""
    assert dense_doras(written / "base", written / "dora").keys() == dense_directory(written / "lora").keys()
    assert len(dense_directory(written / "lora")) == 2 * len(TARGETS)


def test_what_it_holds_beside_its_deltas_is_not_lost_on_the_way(services: Services, models: Path, tmp_path: Path) -> None:
    write_adapter(models / "base", models / "more", dora(modules_to_save=["lm_head"]))
    source = added(services, models / "more")
    with pytest.raises(UnsupportedAdapter, match="lm_head"):
        recipe_of(services, source, **ON_BASE)
    adapter = run(services, recipe_of(services, source, **WHOLE, extras="average"))
    exact = dense_doras(models / "base", models / "more")
    assert norm(difference(saved(services, adapter, tmp_path / "out"), exact)) <= 1e-5 * norm(exact)
    name = f"{PREFIX}lm_head.weight"
    before, after = (load_file(folder / "adapter_model.safetensors")[name] for folder in (models / "more", tmp_path / "out"))
    assert torch.equal(before, after)


# Beside learning


def test_a_method_that_learns_takes_it(services: Services, models: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in LLAMA_TEXTS * 4))
    task = {"name": "colours", "data": add_here(services.settings, tmp_path / "rows.jsonl")}
    sources = [added(services, models / name) for name in ("dora", "lora")]
    steps = {"steps": 2, "evaluate_every": 1, "init": 0.3}
    recipe = recipe_of(services, *sources, method="atlas", parameters=steps, tasks=[task], **ON_BASE)
    report = certificate(services, run(services, recipe))
    assert report["training"]["step"] == 2 and [each["id"] for each in report["inputs"]] == sources
    assert report["grounded"][0]["rank_rule"] == {"max": 256, "energy": 0.999}


def test_a_recipe_that_learns_has_the_digest_that_it_had(services: Services, models: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "red is a colour"}) + "\n")
    task = {"name": "colours", "data": add_here(services.settings, tmp_path / "rows.jsonl")}
    recipe = recipe_of(services, added(services, models / "lora"), method="atlas", tasks=[task], **ON_BASE)
    assert "base_rank" not in recipe.to_json()
