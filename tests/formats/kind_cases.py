"""An adapter of every kind that is read, and of every variant of it: the proofs that docs/kinds.md counts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import peft
from peft import PeftModel
from torch import nn

from tiny import Case, gpt2, llama, mixture, zoo

LINEAR = ["up", "down", "square"]
CONVOLUTIONS = ["image", "wide", "point", "series", "volume"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BLOCKS = {"target_modules_bd_a": ["up"], "target_modules_bd_b": ["down"], "nblocks": 2, "match_strict": False}
EXPERTS = ["first.up_proj", "first.down_proj", "second.up_proj", "second.down_proj"]
WRAPPED = {
    "first.base_layer": "first.up_proj",
    "first": "first.down_proj",
    "second.base_layer": "second.up_proj",
    "second": "second.down_proj",
}


def lora(label: str, model: Any = zoo, **config: Any) -> Case:
    return Case("LoRA", label, model, lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))


def loha(label: str, **config: Any) -> Case:
    return Case("LoHa", label, zoo, lambda: peft.LoHaConfig(**{"target_modules": LINEAR, "r": 2, "alpha": 3, **config}))


def lokr(label: str, **config: Any) -> Case:
    return Case("LoKr", label, zoo, lambda: peft.LoKrConfig(**{"target_modules": LINEAR, "r": 2, "alpha": 3, **config}))


def linear(kind: str, label: str, make: Any, *, guided: bool = False, model: Any = zoo, **config: Any) -> Case:
    targets = {zoo: LINEAR, llama: ATTENTION, gpt2: ["c_attn", "c_fc"]}[model]
    return Case(kind, label, model, lambda: make(**{"target_modules": targets, "r": 4, **config}), guided=guided)


def adalora(label: str, model: Any = zoo, *, pruned: bool = False, **config: Any) -> Case:
    made = lambda: peft.AdaLoraConfig(**{"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 6, **config})  # noqa: E731
    return Case("AdaLoRA", label, model, made, _prune if pruned else lambda model: None)


def _prune(model: PeftModel) -> None:
    """As at the end of its training: a mask for every layer, one of which keeps nothing."""
    masks = {"up": [True, False, True, True], "down": [False] * 4, "square": [False, True, False, False]}
    model.peft_config["default"].rank_pattern = {f"{name}.lora_E": mask for name, mask in masks.items()}


def _of_experts(case: Case) -> Case:
    return replace(case, model=mixture, names=WRAPPED)


CASES = (
    lora("linear layers", target_modules=LINEAR),
    lora("rsLoRA", target_modules=LINEAR, use_rslora=True),
    lora("patterns", target_modules=LINEAR, rank_pattern={"up": 2}, alpha_pattern={"down": 5, "^square": 1}),
    lora("all-linear of a language model", llama, target_modules="all-linear"),
    lora("layers_to_transform", llama, target_modules=ATTENTION, layers_to_transform=[1], layers_pattern="layers"),
    lora("exclude_modules", llama, target_modules=ATTENTION, exclude_modules=r".*layers\.0.*q_proj"),
    lora("EVA, LoRA-FA, gaussian: how it began", target_modules=LINEAR, init_lora_weights="gaussian"),
    lora("VeLoRA: how it trained", target_modules=LINEAR, velora_config={"num_groups": 4}),
    lora("MonteCLoRA at the mean", target_modules=LINEAR, monteclora_config=peft.MontecloraConfig(num_samples=2)),
    lora("BD-LoRA", target_modules=LINEAR, use_bdlora=BLOCKS),
    lora("fan_in_fan_out, fused qkv", gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    replace(lora("fused qkv of torch's attention", target_modules=["attention"]), twice=("attention.out_proj",)),
    lora("Conv1d, Conv2d and Conv3d", target_modules=CONVOLUTIONS),
    lora("convolutions, rsLoRA and patterns", target_modules=CONVOLUTIONS, use_rslora=True, rank_pattern={"image": 7}),
    lora("embeddings", target_modules=["words"]),
    lora("embedding of a language model", llama, target_modules=["embed_tokens", "q_proj"]),
    lora("embeddings of a transposed model", gpt2, target_modules=["wte", "c_attn"], fan_in_fan_out=True),
    _of_experts(lora("experts", target_modules=[], target_parameters=EXPERTS, r=2)),
    _of_experts(lora("experts and modules", target_modules=["gate", "words"], target_parameters=EXPERTS, r=3, use_rslora=True)),
    adalora("whole", target_modules=LINEAR),
    adalora("pruned", target_modules=LINEAR, pruned=True),
    adalora("no alpha", target_modules=LINEAR, lora_alpha=-1),
    adalora("transposed", gpt2, target_modules=["c_attn"], fan_in_fan_out=True),
    loha("linear layers"),
    loha("r^2 above the smaller side", r=5),
    loha("patterns", rank_pattern={"up": 1}, alpha_pattern={"down": 7}),
    loha("Tucker cores", target_modules=["up", "image"], use_effective_conv2d=True),
    loha("Tucker cores, r^2 above the smaller side", target_modules=["image"], use_effective_conv2d=True, r=3),
    lokr("one side factored"),
    lokr("both sides factored", decompose_both=True, r=1),
    lokr("both sides whole", r=12),
    lokr("a factor of its own", decompose_factor=2, rank_pattern={"up": 1}),
    lokr("convolutions, whole", target_modules=["image", "wide", "point", "series"], r=8),
    lokr("Tucker core", target_modules=["image"], r=1, use_effective_conv2d=True),
    linear("VeRA", "saved projections", peft.VeraConfig, guided=True),
    linear("VeRA", "a language model", peft.VeraConfig, guided=True, model=llama),
    linear("VeRA", "transposed", peft.VeraConfig, guided=True, model=gpt2, fan_in_fan_out=True),
    linear("PVeRA", "saved projections", peft.PveraConfig, guided=True),
    linear("MiSS", "default", peft.MissConfig, guided=True),
    linear("MiSS", "r does not divide the input", peft.MissConfig, guided=True, r=5),
    linear("MiSS", "mini", peft.MissConfig, guided=True, init_weights="mini", mini_r=2),
    linear("RandLoRA", "saved bases", peft.RandLoraConfig, guided=True),
    linear("RandLoRA", "r does not divide the sides", peft.RandLoraConfig, guided=True, r=5),
    linear("RandLoRA", "sparse bases", peft.RandLoraConfig, guided=True, model=llama, sparse=True),
    linear("VB-LoRA", "logits", peft.VBLoRAConfig, num_vectors=9, vector_length=4, topk=3),
    linear("VB-LoRA", "top-k weights", peft.VBLoRAConfig, num_vectors=9, vector_length=4, save_only_topk_weights=True),
    linear("VB-LoRA", "transposed", peft.VBLoRAConfig, model=gpt2, num_vectors=300, vector_length=8, save_only_topk_weights=True),
    linear("DeLoRA", "linear layers", peft.DeloraConfig, rank_pattern={"up": 2}),
    linear("GraLoRA", "blocks", peft.GraloraConfig, gralora_k=2, alpha=5),
    linear("GraLoRA", "hybrid", peft.GraloraConfig, gralora_k=4, hybrid_r=3),
    linear("UniLoRA", "saved indices", peft.UniLoraConfig, theta_d_length=30, save_indices=True),
)


def guide(case: Case) -> Case:
    """A plain LoRA of the same layers, which says their shapes."""
    config = case.config()
    transposed = {"fan_in_fan_out": True} if case.model is gpt2 else {}
    return lora("guide", case.model, target_modules=list(config.target_modules), r=2, **transposed)


def shapes(model: nn.Module) -> Mapping[str, tuple[int, int]]:
    """Module -> (d_out, d_in) of its linear layers."""
    weights = {name: module.weight for name, module in model.named_modules() if getattr(module, "weight", None) is not None}
    turned = {name: type(model.get_submodule(name)).__name__ == "Conv1D" for name in weights}
    return {name: tuple(w.mT.shape if turned[name] else w.shape) for name, w in weights.items() if w.ndim == 2}


def rotating(kind: str, label: str, make: Any, model: Any = zoo, **config: Any) -> Case:
    targets = {zoo: ["down", "square"], llama: ATTENTION, gpt2: ["c_attn", "c_fc"]}[model]
    return Case(kind, label, model, lambda: make(**{"target_modules": targets, **config}))


def hira(label: str, model: Any = zoo, **config: Any) -> Case:
    return Case("HiRA", label, model, lambda: peft.HiraConfig(**{"r": 3, **config}))


def deft(label: str, model: Any = zoo, **config: Any) -> Case:
    return Case("DEFT", label, model, lambda: peft.DeftConfig(**{"r": 3, "target_modules": LINEAR, **config}))


def peanut(label: str, **config: Any) -> Case:
    return Case("PEANuT", label, zoo, lambda: peft.PeanutConfig(**{"r": 3, "target_modules": LINEAR, **config}))


def glora(label: str, model: Any = llama, **config: Any) -> Case:
    return Case("GLoRA", label, model, lambda: peft.GloraConfig(**{"r": 3, "target_modules": ATTENTION, **config}))


# whose delta depends on the base model's weight
GROUNDED = (
    lora("DoRA", target_modules=LINEAR, use_dora=True),
    lora("DoRA, rsLoRA and patterns", target_modules=LINEAR, use_dora=True, use_rslora=True, rank_pattern={"up": 2}),
    lora("DoRA of convolutions", target_modules=CONVOLUTIONS, use_dora=True),
    lora("DoRA of embeddings", target_modules=["words"], use_dora=True),
    lora("DoRA of a transposed model", gpt2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
    lora("DoRA of a language model", llama, target_modules=ATTENTION, use_dora=True),
    lora("PiSSA", target_modules=LINEAR, init_lora_weights="pissa"),
    lora("PiSSA, rsLoRA and patterns", target_modules=LINEAR, init_lora_weights="pissa", use_rslora=True, rank_pattern={"up": 2}),
    lora("PiSSA of a transposed model", gpt2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="pissa"),
    lora("PiSSA beside an embedding", llama, target_modules=["q_proj", "embed_tokens"], init_lora_weights="pissa"),
    lora("PiSSA and DoRA at once", target_modules=LINEAR, init_lora_weights="pissa", use_dora=True),
    lora("OLoRA", target_modules=LINEAR, init_lora_weights="olora"),
    lora("OLoRA of a transposed model", gpt2, target_modules=["attn.c_proj"], fan_in_fan_out=True, init_lora_weights="olora"),
    lora("OLoRA and DoRA at once", target_modules=LINEAR, init_lora_weights="olora", use_dora=True, use_rslora=True),
    hira("linear layers", target_modules=LINEAR),
    hira("convolutions", target_modules=CONVOLUTIONS),
    hira("embeddings", target_modules=["words"]),
    hira("transposed", gpt2, target_modules=["c_attn"], fan_in_fan_out=True),
    rotating("HRA", "linear layers", peft.HRAConfig, r=4),
    rotating("HRA", "an odd number, Gram-Schmidt", peft.HRAConfig, r=3, apply_GS=True),
    rotating("HRA", "a convolution", peft.HRAConfig, r=3, target_modules=["image", "point"]),
    rotating("HRA", "a language model", peft.HRAConfig, llama, r=4),
    rotating("OFT", "series", peft.OFTConfig, oft_block_size=4),
    rotating("OFT", "two terms", peft.OFTConfig, oft_block_size=4, num_cayley_neumann_terms=2),
    rotating("OFT", "three terms", peft.OFTConfig, oft_block_size=4, num_cayley_neumann_terms=3),
    rotating("OFT", "seven terms", peft.OFTConfig, oft_block_size=4, num_cayley_neumann_terms=7),
    rotating("OFT", "Cayley transform", peft.OFTConfig, oft_block_size=4, use_cayley_neumann=False),
    rotating("OFT", "constrained", peft.OFTConfig, oft_block_size=4, coft=True, eps=0.5),
    rotating("OFT", "shared block", peft.OFTConfig, oft_block_size=4, block_share=True, use_cayley_neumann=False),
    rotating("OFT", "a convolution", peft.OFTConfig, oft_block_size=4, target_modules=["image", "point"]),
    rotating("OFT", "an embedding", peft.OFTConfig, oft_block_size=4, target_modules=["words", "square"]),
    rotating("OFT", "a language model", peft.OFTConfig, llama, oft_block_size=8),
    rotating("MiSS", "bat", peft.MissConfig, r=4, init_weights="bat"),
    rotating("MiSS", "bat, a language model", peft.MissConfig, llama, r=8, init_weights="bat"),
    deft("ReLU"),
    deft("QR, alpha", decomposition_method="qr", alpha=5, r=4),
    deft("more than the outputs", r=14, target_modules=["down", "square"]),
    deft("PaRa", para=True),
    deft("PaRa by QR", llama, para=True, decomposition_method="qr", target_modules=ATTENTION),
    deft("a transposed model", gpt2, target_modules=["c_attn"], fan_in_fan_out=True),
    peanut("no depth"),
    peanut("two layers", depth=2, act_fn="tanh", scaling=0.7),
    *(peanut(f"{name}, a layer", depth=1, act_fn=name) for name in ("gelu", "leaky_relu", "linear", "sigmoid", "silu", "swish")),
    glora("factors"),
    glora("one number per output", config_A_B="vector"),
    glora("one number", config_A_B="constant"),
    glora("layers with biases, which stay", zoo, target_modules=LINEAR, config_C="none", config_D_E="none"),
    rotating("BOFT", "one factor", peft.BOFTConfig, boft_block_size=4),
    rotating("BOFT", "two factors", peft.BOFTConfig, boft_block_size=2, boft_n_butterfly_factor=2),
    rotating("BOFT", "four factors", peft.BOFTConfig, llama, boft_block_size=2, boft_n_butterfly_factor=4),
    rotating(
        "BOFT",
        "a convolution, two factors",
        peft.BOFTConfig,
        boft_block_size=2,
        boft_n_butterfly_factor=2,
        target_modules=["image"],
    ),
    rotating("BOFT", "a convolution", peft.BOFTConfig, boft_block_num=2, boft_block_size=0, target_modules=["image", "point"]),
    rotating("BOFT", "a language model", peft.BOFTConfig, llama, boft_block_size=8),
)
