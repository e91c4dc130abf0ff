"""What adapters hold beside their deltas: refused, averaged or taken from one, as asked, and said in the certificate."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from app.extras import check
from app.recipe import Recipe, RecipeInput, RecipeTask
from making import PREFIX, Made
from merge_algos import formats
from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats.extras import Extra
from merge_algos.lowrank import LowRankDelta
from merge_algos.rank import RankRule
from serving import Server
from test_kinds import read
from tiny import Case, forward, llama, quietly, zoo

LINEAR = ["up", "square"]


def classifier() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=11, num_hidden_layers=1, pad_token_id=0, **shape)).eval()


def case(label: str, model: Callable[[], nn.Module] = zoo, **config: Any) -> Case:
    targets = ["q_proj", "v_proj"] if model is not zoo else LINEAR
    made: Callable[[], PeftConfig] = lambda: peft.LoraConfig(**{"target_modules": targets, "r": 3, "lora_alpha": 5, **config})  # noqa: E731
    return Case("LoRA", label, model, made)


def resized(model: peft.PeftModel) -> None:
    """As if the vocabulary had been, so that the weight beneath the delta is not the base model's."""
    model.base_model.model.embed_tokens.base_layer.weight.data.mul_(0.5)


CASES = {
    "module": case("a saved module", modules_to_save=["down"]),
    "embedding": case("a saved embedding", modules_to_save=["words"]),
    "head": case("the head of a classifier", classifier, task_type="SEQ_CLS"),
    "bias": case("biases of the wrapped layers", bias="lora_only"),
    "biases": case("all biases", bias="all", target_modules=["up", "square", "image"]),
    "base": replace(
        case("an adapted embedding", llama, target_modules=["embed_tokens", "q_proj"]), prepare=resized, saves_embeddings=True
    ),
    "tokens": case("trained tokens", llama, trainable_token_indices=[1, 3]),
    "named tokens": case("trained tokens of a named layer", llama, trainable_token_indices={"embed_tokens": [1, 3]}),
    "lora_bias": case("a bias of lora_B", lora_bias=True, target_modules=["up", "square", "image"]),
    "lora_bias, rsLoRA": case("a bias of lora_B, rsLoRA", lora_bias=True, use_rslora=True),
}
FACTORS = r"lora_(embedding_)?(A|B(?!\.bias))"
every = pytest.mark.parametrize("name", CASES)


def described(made: Made) -> tuple[Extra, ...]:
    return formats.describe(made.config, {name: tuple(tensor.shape) for name, tensor in made.tensors.items()}).extras


def delta_of(made: Made, module: str) -> LowRankDelta:
    return formats.read(made.config, made.tensors).deltas[module]


def output(case: Case, directory: Path) -> Tensor:
    """What the model with this adapter gives, float64."""
    loaded = quietly(lambda: peft.PeftModel.from_pretrained(case.model().double(), directory)).double()
    if case.model is classifier:
        with torch.no_grad():
            return loaded(input_ids=torch.arange(1, 11).reshape(2, 5)).logits
    return forward(loaded)


def merge(server: Server, *made: Made, to: Path, **request: Any) -> tuple[Made, dict[str, Any]]:
    job = server.merge(*(server.add(each) for each in made), dtype="float32", **request)
    assert job["state"] == "succeeded", job["error"]
    return read(server.download(job["result"]["id"], to)), job["certificate"]


def refusal(server: Server, *made: Made, weights: list[float] | None = None, **request: Any) -> str:
    given = weights or [1.0] * len(made)
    adapters = [{"source": server.add(each), "name": f"a{n}", "weight": given[n]} for n, each in enumerate(made)]
    answer = server.http.post("/merge", json={"adapters": adapters, **request})
    assert answer.status_code == 422, answer.text
    return str(answer.json()["detail"])


@every
def test_every_extra_is_recognised_by_its_flag(name: str, tmp_path: Path) -> None:
    made = read(CASES[name].save(tmp_path))
    sort = {"embedding": "module", "head": "module", "biases": "bias", "named tokens": "tokens"}.get(name, name.partition(",")[0])
    found = described(made)
    assert {extra.sort for extra in found} == {sort}
    assert {extra.tensor for extra in found} == {tensor for tensor in made.tensors if not re.search(FACTORS, tensor)}


@every
def test_without_a_policy_a_merge_is_refused_by_tensor(name: str, server: Server, tmp_path: Path) -> None:
    made = read(CASES[name].save(tmp_path))
    said = refusal(server, made)
    assert described(made)[0].tensor in said and "extras" in said


@every
@pytest.mark.parametrize("policy", ["average", {"from": "a"}], ids=["average", "from"])
def test_alone_at_weight_one_it_is_the_same_adapter_to_peft(name: str, policy: Any, server: Server, tmp_path: Path) -> None:
    case = CASES[name]
    directory = case.save(tmp_path / "in")
    adapters = [{"source": server.add(read(directory)), "name": "a", "weight": 1.0}]
    job = server.ended(server.http.post("/merge", json={"adapters": adapters, "dtype": "float32", "extras": policy}).json()["id"])
    assert job["state"] == "succeeded", job["error"]
    ours, theirs = output(case, server.download(job["result"]["id"], tmp_path / "out")), output(case, directory)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", ["module", "head", "bias", "tokens"])
def test_whole_values_are_averaged_by_weight(name: str, server: Server, tmp_path: Path) -> None:
    made = [read(CASES[name].save(tmp_path / str(seed), seed)) for seed in (3, 4)]
    merged, report = merge(server, *made, to=tmp_path / "out", weights=[3.0, 1.0], extras="average")
    for extra in described(made[0]):
        expected = (3 * made[0].tensors[extra.tensor].double() + made[1].tensors[extra.tensor].double()) / 4
        assert torch.allclose(merged.tensors[extra.tensor].double(), expected, rtol=1e-6, atol=0), extra.tensor
    assert [entry["factors"] for entry in report["extras"]["tensors"]] == [[0.75, 0.25]] * len(described(made[0]))


def test_weights_beneath_deltas_are_averaged_and_the_deltas_added(server: Server, tmp_path: Path) -> None:
    directories = [CASES["base"].save(tmp_path / str(seed), seed) for seed in (3, 4)]
    first, second = map(read, directories)
    name = f"{PREFIX}embed_tokens.base_layer.weight"
    second = Made({**second.tensors, name: 3 * second.tensors[name]}, second.config)
    merge(server, first, second, to=tmp_path / "out", weights=[0.5, 0.5], extras="average")
    merged = CASES["base"].deltas(tmp_path / "out")["embed_tokens.weight"] + llama().double().embed_tokens.weight
    deltas = [delta_of(made, "embed_tokens").to(torch.float64).to_dense().mT for made in (first, second)]
    assert torch.allclose(merged, 2 * first.tensors[name].double() + sum(deltas) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("whole", "said"), [(False, "has none of this module"), (True, "depends on it")])
def test_the_weight_beneath_a_delta_that_is_not_there_or_needs_it_is_refused(whole: bool, said: str, tmp_path: Path) -> None:
    made = read(replace(CASES["base"], config=lambda: dora_of_an_embedding(whole)).save(tmp_path))
    name = f"{PREFIX}embed_tokens.base_layer.weight"
    tensors = made.tensors if whole else {n: t for n, t in made.tensors.items() if "lora_" not in n or "embed_tokens" not in n}
    with pytest.raises(UnsupportedAdapter, match=f"{name}.*{said}"):
        described(Made(tensors, made.config))


def dora_of_an_embedding(use_dora: bool) -> PeftConfig:
    return peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=3, use_dora=use_dora)


def test_the_same_embedding_saved_whole_and_beneath_a_delta_has_no_mean(server: Server, tmp_path: Path) -> None:
    whole = case("a saved embedding", llama, modules_to_save=["embed_tokens"])
    made = [read(CASES["base"].save(tmp_path / "a")), read(whole.save(tmp_path / "b"))]
    assert "module embed_tokens" in refusal(server, *made, extras="average")


def test_biases_of_lora_B_are_added_with_their_scalings(server: Server, tmp_path: Path) -> None:
    plain, scaled = (CASES[name].save(tmp_path / name, 5 + n) for n, name in enumerate(("lora_bias", "lora_bias, rsLoRA")))
    made = [read(plain), read(scaled)]
    merged, _ = merge(server, *made, to=tmp_path / "out", weights=[0.5, -2.0], extras="average")
    up, image = (f"{PREFIX}{module}.lora_B.bias" for module in ("up", "image"))
    first, second = 5 / 3, 5 / 3**0.5
    expected = 0.5 * first * made[0].tensors[up].double() - 2 * second * made[1].tensors[up].double()
    assert torch.allclose(merged.tensors[up].double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.allclose(merged.tensors[image].double(), 0.5 * first * made[0].tensors[image].double(), rtol=1e-6)
    assert merged.config["lora_bias"] is True


def test_a_sum_with_biases_of_lora_B_is_the_sum_of_the_outputs(server: Server, tmp_path: Path) -> None:
    """One linear layer, so that what adapters add to its output adds up."""
    one = case("alone", lora_bias=True, target_modules=["volume"])
    directories = [one.save(tmp_path / str(seed), seed) for seed in (3, 4)]
    merge(server, *map(read, directories), to=tmp_path / "out", weights=[0.25, 0.5], extras="average")
    base = one.through_base()
    first, second = (output(one, directory) - base for directory in directories)
    assert (output(one, tmp_path / "out") - base - 0.25 * first - 0.5 * second).norm() <= 1e-5 * (first.norm() + second.norm())


def test_from_one_takes_its_bytes_and_names_what_is_dropped(server: Server, tmp_path: Path) -> None:
    made = [read(CASES["module"].save(tmp_path / str(seed), seed)) for seed in (3, 4)]
    adapters = [{"source": server.add(each), "name": f"a{n}", "weight": 0.5} for n, each in enumerate(made)]
    body = {"adapters": adapters, "extras": {"from": "a1"}}
    job = server.ended(server.http.post("/merge", json=body).json()["id"])
    merged = read(server.download(job["result"]["id"], tmp_path / "out"))
    names = [extra.tensor for extra in described(made[1])]
    assert all(torch.equal(merged.tensors[name], made[1].tensors[name]) for name in names)
    assert job["certificate"]["extras"]["dropped"] == {"a0": names}
    card = server.http.get(f"/adapters/{job['result']['id']}/README.md").text
    assert names[0] in card and "that of a0 was dropped" in card and "Lost of the deltas" in card
    assert server.http.post("/merge", json=body).json()["id"] == job["id"]


def test_a_bias_keeps_its_place_where_only_the_other_adapter_wraps_its_layer(server: Server, tmp_path: Path) -> None:
    wide = case("all biases", bias="all", target_modules=["up"])
    narrow = case("plain", target_modules=["square"])
    made = [read(wide.save(tmp_path / "a")), read(narrow.save(tmp_path / "b"))]
    merged, _ = merge(server, *made, to=tmp_path / "out", weights=[1.0, 1.0], extras="average")
    ours, theirs = merged.tensors[f"{PREFIX}square.base_layer.bias"], made[0].tensors[f"{PREFIX}square.bias"]
    assert torch.equal(ours, theirs)


# --- refusals


def test_other_rows_have_no_mean(server: Server, tmp_path: Path) -> None:
    other = case("other tokens", llama, trainable_token_indices=[1, 4])
    made = [read(CASES["tokens"].save(tmp_path / "a")), read(other.save(tmp_path / "b"))]
    assert "rows" in refusal(server, *made, extras="average")


def test_other_shapes_have_no_mean(server: Server, tmp_path: Path) -> None:
    made = read(CASES["module"].save(tmp_path / "a"))
    name = f"{PREFIX}down.weight"
    assert "shapes" in refusal(server, made, Made({**made.tensors, name: torch.ones(3, 20)}, made.config), extras="average")


def test_weights_that_cancel_have_no_mean(server: Server, tmp_path: Path) -> None:
    made = [read(CASES["module"].save(tmp_path / str(seed), seed)) for seed in (3, 4)]
    assert "add up to 0" in refusal(server, *made, weights=[1.0, -1.0], extras="average")


def test_a_module_saved_whole_by_one_and_adapted_by_another_is_refused(server: Server, tmp_path: Path) -> None:
    other = case("a delta of it", target_modules=["down"])
    made = [read(CASES["module"].save(tmp_path / "a")), read(other.save(tmp_path / "b"))]
    assert "module down" in refusal(server, *made, extras="average")


def test_from_must_name_an_adapter(server: Server, tmp_path: Path) -> None:
    assert "nobody" in refusal(server, read(CASES["module"].save(tmp_path)), extras={"from": "nobody"})


def test_a_basis_has_no_place_for_them(server: Server, tmp_path: Path) -> None:
    made = [read(CASES["module"].save(tmp_path / str(seed), seed)) for seed in (3, 4)]
    adapters = [{"source": server.add(each)} for each in made]
    answer = server.http.post("/merge", json={"adapters": adapters, "method": "rmm", "extras": "average"})
    assert answer.status_code == 422 and "basis" in answer.json()["detail"]


def test_a_method_that_learns_would_learn_without_them(tmp_path: Path) -> None:
    made = read(CASES["module"].save(tmp_path))
    spec = formats.describe(made.config, {name: tuple(tensor.shape) for name, tensor in made.tensors.items()})
    blob = "sha256:" + "0" * 64
    plain = Recipe(
        "task_arithmetic", 1, {}, RankRule(), "auto", 0, "portable", False, (RecipeInput(blob, "a", 1.0),), extras="average"
    )
    check(plain, [spec])
    with pytest.raises(UnsupportedAdapter, match="atlas learns how deltas are scaled"):
        check(replace(plain, method="atlas", tasks=(RecipeTask("t", 1.0, (blob,), "text"),)), [spec])


def test_no_other_format_has_a_place_for_them(server: Server, tmp_path: Path) -> None:
    adapter = server.add(read(CASES["module"].save(tmp_path)))
    answer = server.http.get(f"/adapters/{adapter}/adapter_model.safetensors?format=kohya")
    assert answer.status_code == 422 and f"{PREFIX}down" in answer.json()["detail"]


@pytest.mark.parametrize("flag", [{"modules_to_save": ["head"]}, {"trainable_token_indices": [1]}, {"lora_bias": True}])
def test_a_flag_without_its_tensors_is_refused(flag: Mapping[str, Any], tmp_path: Path) -> None:
    made = read(case("plain").save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match=next(iter(flag))):
        described(Made(made.tensors, {**made.config, **flag}))


@pytest.mark.parametrize(
    "tensor", ["down.weight", "up.lora_B.bias", "up.base_layer.bias", "words.token_adapter.trainable_tokens_delta"]
)
def test_what_no_flag_announces_is_refused_by_name(tensor: str, tmp_path: Path) -> None:
    made = read(case("plain").save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match=tensor):
        described(Made({**made.tensors, f"{PREFIX}{tensor}": torch.ones(4)}, made.config))


# --- DoRA as DoRA


def doras(tmp_path: Path, *targets: list[str]) -> list[Made]:
    made = [case("DoRA", use_dora=True, target_modules=own) for own in targets]
    return [read(each.save(tmp_path / str(n), 3 + n)) for n, each in enumerate(made)]


def test_doras_alone_merge_as_doras(server: Server, tmp_path: Path) -> None:
    targets = ["up", "square", "image", "words"]
    made = doras(tmp_path, targets, targets)
    merged, report = merge(server, *made, to=tmp_path / "out", weights=[0.75, 0.25], extras="average")
    assert merged.config["use_dora"] is True
    for module in ("up", "image"):
        name = f"{PREFIX}{module}.lora_magnitude_vector"
        expected = 0.75 * made[0].tensors[name].double() + 0.25 * made[1].tensors[name].double()
        assert torch.allclose(merged.tensors[name].double(), expected, rtol=1e-6)
    assert {entry["sort"] for entry in report["extras"]["tensors"]} == {"magnitude"}


def test_a_dora_alone_is_the_same_adapter_to_peft(server: Server, tmp_path: Path) -> None:
    one = case("DoRA", use_dora=True, target_modules=["up", "square", "image"])
    directory = one.save(tmp_path / "in")
    merge(server, read(directory), to=tmp_path / "out", weights=[1.0], extras="average")
    ours, theirs = output(one, tmp_path / "out"), output(one, directory)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_dora_beside_a_lora_needs_the_base_model(server: Server, tmp_path: Path) -> None:
    plain = read(case("plain").save(tmp_path / "plain"))
    assert "base_model" in refusal(server, *doras(tmp_path, LINEAR), plain, extras="average")


def test_doras_of_other_modules_need_the_base_model(server: Server, tmp_path: Path) -> None:
    assert "module square" in refusal(server, *doras(tmp_path, ["up", "square"], ["up"]), extras="average")


def test_a_dora_is_refused_where_nothing_is_said(server: Server, tmp_path: Path) -> None:
    assert "base_model" in refusal(server, *doras(tmp_path, LINEAR, LINEAR))


def test_the_recipe_says_nothing_of_extras_where_nothing_was_asked(server: Server, tmp_path: Path) -> None:
    _, report = merge(server, read(case("plain").save(tmp_path / "in")), to=tmp_path / "out", weights=[1.0])
    assert "extras" not in report["recipe"] and "extras" not in json.dumps(report)


# --- what has no one meaning together


def named(server: Server, *made: Made) -> list[dict[str, Any]]:
    return [{"source": server.add(each), "name": f"a{n}", "weight": 1.0} for n, each in enumerate(made)]


def test_taken_from_one_a_whole_module_is_refused_beside_a_delta_of_it(server: Server, tmp_path: Path) -> None:
    other = case("a delta of it", target_modules=["down"])
    made = [read(CASES["module"].save(tmp_path / "a")), read(other.save(tmp_path / "b"))]
    answer = server.http.post("/merge", json={"adapters": named(server, *made), "extras": {"from": "a0"}})
    assert answer.status_code == 422 and "module down" in answer.json()["detail"]


def test_a_delta_inside_a_whole_module_is_refused(server: Server, tmp_path: Path) -> None:
    whole, inside = case("mlp", llama, modules_to_save=["mlp"]), case("inside", llama, target_modules=["gate_proj"])
    made = [read(whole.save(tmp_path / "a")), read(inside.save(tmp_path / "b"))]
    assert "saved this module whole" in refusal(server, *made, extras="average")


def test_rows_of_an_embedding_that_another_saved_whole_are_refused(server: Server, tmp_path: Path) -> None:
    whole = case("embedding", llama, modules_to_save=["embed_tokens"])
    made = [read(whole.save(tmp_path / "a")), read(CASES["tokens"].save(tmp_path / "b"))]
    assert "rows of it" in refusal(server, *made, extras="average")


def test_a_bias_of_lora_B_has_no_place_beside_an_embedding(server: Server, tmp_path: Path) -> None:
    made = [read(CASES["lora_bias"].save(tmp_path / "a")), read(case("words", target_modules=["words"]).save(tmp_path / "b"))]
    assert "module words" in refusal(server, *made, extras="average")


def test_a_module_without_a_bias_of_lora_B_gets_zeros(server: Server, tmp_path: Path) -> None:
    made = [read(CASES["lora_bias"].save(tmp_path / "a")), read(case("down", target_modules=["down"]).save(tmp_path / "b"))]
    merged, _ = merge(server, *made, to=tmp_path / "out", weights=[1.0, 1.0], extras="average")
    assert torch.equal(merged.tensors[f"{PREFIX}down.lora_B.bias"], torch.zeros(12))


def test_what_overflows_the_type_of_the_result_fails_by_tensor(server: Server, tmp_path: Path) -> None:
    made = read(CASES["module"].save(tmp_path))
    name = f"{PREFIX}down.weight"
    huge = Made({**made.tensors, name: torch.full((12, 20), 1e6)}, made.config)
    job = server.merge(server.add(huge), weights=[1.0], dtype="float16", extras="average")
    assert job["state"] == "failed" and name in job["error"]["detail"]


def test_vllm_loads_nothing_beside_deltas(server: Server, tmp_path: Path) -> None:
    assert "vLLM" in refusal(server, read(CASES["module"].save(tmp_path)), extras="average", profile="vllm")


def test_a_bias_of_lora_B_that_no_flag_announces_is_no_bias_of_the_model(tmp_path: Path) -> None:
    made = read(CASES["lora_bias"].save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match=r"lora_B\.bias"):
        described(Made(made.tensors, {**made.config, "lora_bias": False, "bias": "all"}))


@pytest.mark.parametrize(("name", "is_exact"), [("module", False), ("lora_bias", True)])
def test_the_certificate_calls_a_sum_exact_and_a_mean_not(name: str, is_exact: bool, server: Server, tmp_path: Path) -> None:
    made = [read(CASES[name].save(tmp_path / str(seed), seed)) for seed in (3, 4)]
    _, report = merge(server, *made, to=tmp_path / "out", weights=[1.0, 1.0], extras="average")
    assert report["extras"]["exact"] is is_exact
