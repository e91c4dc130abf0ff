"""Models of a few real layers, and adapters on them as PEFT saves them: random, and nowhere zero."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel, PreTrainedModel

SEED = 3
STD = 0.3


class Zoo(nn.Module):
    """Every layer that PEFT's kinds adapt; each output is one number per input, and all are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.square = nn.Linear(12, 12)
        self.image = nn.Conv2d(4, 6, 3, padding=1)
        self.wide = nn.Conv2d(6, 4, (3, 2))
        self.point = nn.Conv2d(6, 4, 1)
        self.series = nn.Conv1d(4, 6, 3)
        self.volume = nn.Conv3d(4, 6, (2, 3, 1))
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """ids: (n, length), pixels: (n, 4, 8, 8)."""
        hidden = self.words(ids)
        hidden = hidden + self.square(hidden) + self.down(torch.tanh(self.up(hidden)))
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        image = torch.tanh(self.image(pixels))
        parts = [hidden, self.wide(image), self.point(image), self.series(pixels.flatten(2)), self.volume(pixels[..., None])]
        return torch.stack([part.flatten(1).sum(1) for part in parts], 1)


class Experts(nn.Module):
    """Experts as one parameter each, declared in an order that no sorting gives: (experts, d_out, d_in) or transposed."""

    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = ((3, 8, 10), (3, 10, 8)) if is_transposed else ((3, 10, 8), (3, 8, 10))
        self.up_proj = nn.Parameter(torch.randn(up) * STD)
        self.down_proj = nn.Parameter(torch.randn(down) * STD)

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, 8), of which every expert sees all."""
        flip = (lambda W: W) if self.is_transposed else (lambda W: W.mT)
        return (torch.tanh(x @ flip(self.up_proj)) @ flip(self.down_proj)).sum(0)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.first = Experts(is_transposed=False)
        self.second = Experts(is_transposed=True)
        self.gate = nn.Linear(8, 8)

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        hidden = self.words(ids).mean(1)
        hidden = hidden + self.first(hidden)
        return self.gate(hidden) + self.second(hidden)


def zoo() -> nn.Module:
    torch.manual_seed(0)
    return Zoo().eval()


def mixture() -> nn.Module:
    torch.manual_seed(0)
    return Mixture().eval()


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaModel(LlamaConfig(vocab_size=11, num_hidden_layers=2, **shape)).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2)).eval()


@dataclass(frozen=True, eq=False)
class Case:
    """An adapter of a kind. prepare: what training would have done beside filling the factors.

    guided: its file does not say all shapes, so that it is merged with an adapter of weight 0 that does.  names: of a module as
    its file has it -> as the model has it, where these differ.  twice: modules whose delta PEFT 0.21.2 adds twice when it merges.
    """

    kind: str
    label: str
    model: Callable[[], nn.Module]
    config: Callable[[], PeftConfig]
    prepare: Callable[[PeftModel], None] = field(default=lambda model: None)
    guided: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    twice: tuple[str, ...] = ()
    saves_embeddings: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.label}"

    def save(self, directory: Path, seed: int = SEED) -> Path:
        """The adapter's directory, every trained number drawn at random."""
        model = quietly(lambda: get_peft_model(self.model(), self.config()))
        self.prepare(model)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=STD, generator=generator)
        quietly(lambda: model.save_pretrained(directory, save_embedding_layers=self.saves_embeddings))
        return directory

    def through_peft(self, directory: Path) -> Tensor:
        """The forward pass, float64, of the base with the adapter in this directory."""
        return forward(quietly(lambda: PeftModel.from_pretrained(self.model().double(), directory)).double())

    def through_base(self) -> Tensor:
        return forward(self.model().double())

    def deltas(self, directory: Path) -> dict[str, Tensor]:
        """Weight of the base -> how it differs, float64, after PEFT has merged the directory's adapter into it."""
        base = {name: tensor.clone() for name, tensor in self.model().double().state_dict().items()}
        loaded = quietly(lambda: PeftModel.from_pretrained(self.model().double(), directory)).double()
        merged = quietly(loaded.merge_and_unload).state_dict()
        found = {name: merged[name] - tensor for name, tensor in base.items()}
        return {name: delta for name, delta in found.items() if bool(delta.any())}


def quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def forward(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(11, (3, 5), generator=generator)
    pixels = torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        if isinstance(inner, PreTrainedModel):
            return model(input_ids=ids).last_hidden_state
        return model(ids=ids, pixels=pixels)


def as_matrices(weights: Mapping[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    """Differences of a base's weights -> the same by module, (d_out, d_in)."""
    matrices = {}
    for name, delta in weights.items():
        module, _, parameter = name.rpartition(".")
        owner = base.get_submodule(module)
        if isinstance(owner, nn.MultiheadAttention) or parameter == "weight":
            turned = isinstance(owner, nn.Embedding) or type(owner).__name__ == "Conv1D"
            matrices[module] = delta.mT if turned else delta.flatten(1)
        else:
            assert isinstance(owner, Experts)
            for expert, one in enumerate(delta):
                matrices[f"{name}[{expert}]"] = one.mT if owner.is_transposed else one
    return matrices
