"""What has no exact delta of its own is refused: by kind, flag or tensor, with the reason and what the user can do."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftType
from torch import nn

from kind_cases import CASES, CONVOLUTIONS, LINEAR
from making import PREFIX, Made
from merge_algos import formats
from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats import kinds
from merge_algos.formats.refused import REFUSED
from merge_algos.formats.spec import AdapterSpec
from test_kinds import read
from tiny import Case, llama, zoo

READ = {peft_type for kind in kinds.registry().values() for peft_type in kind.peft_types}
ATTENTION = ["q_proj", "v_proj"]


def described(made: Made) -> AdapterSpec:
    return formats.describe(made.config, {name: tuple(tensor.shape) for name, tensor in made.tensors.items()})


def saved(tmp_path: Path, config: Callable[[], PeftConfig], model: Callable[[], nn.Module] = zoo) -> Made:
    return read(Case("", "", model, config).save(tmp_path))


# --- kinds


@pytest.mark.parametrize("peft_type", [each.value for each in PeftType])
def test_every_kind_that_peft_knows_is_read_or_has_a_reason_of_its_own(peft_type: str) -> None:
    assert (peft_type in READ) != (peft_type in REFUSED)


def test_nothing_is_both_read_and_refused() -> None:
    assert not READ & REFUSED.keys()


@pytest.mark.parametrize("peft_type", REFUSED)
def test_a_refused_kind_is_named_with_its_reason_and_a_remedy(peft_type: str) -> None:
    with pytest.raises(UnsupportedAdapter) as refused:
        described(Made({"prompt_embeddings": torch.ones(2, 3)}, {"peft_type": peft_type}))
    said = refused.value
    assert (said.subject, said.reason, said.remedy) == (f"peft_type {peft_type!r}", *REFUSED[peft_type])


REAL: dict[str, Callable[[], PeftConfig]] = {
    "IA3": lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=[]),
    "ROAD": lambda: peft.RoadConfig(target_modules=LINEAR, group_size=4),
    "FOURIERFT": lambda: peft.FourierFTConfig(target_modules=LINEAR, n_frequency=20),
    "SHIRA": lambda: peft.ShiraConfig(target_modules=LINEAR, r=1, random_seed=1),
    "C3A": lambda: peft.C3AConfig(target_modules=LINEAR, block_size=4),
    "TINYLORA": lambda: peft.TinyLoraConfig(target_modules=LINEAR, r=2, u=2),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["square"]),
}


@pytest.mark.parametrize("peft_type", REAL)
def test_a_real_adapter_of_a_refused_kind_is_refused_by_name(peft_type: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapter, match=f"peft_type '{peft_type}'"):
        described(saved(tmp_path, REAL[peft_type]))


PROMPTS: dict[str, Callable[[], PeftConfig]] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2),
}


@pytest.mark.parametrize("peft_type", PROMPTS)
def test_a_real_prompt_is_refused_by_name(peft_type: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapter, match=f"peft_type '{peft_type}'"):
        described(saved(tmp_path, PROMPTS[peft_type], llama))


# --- variants and flags of kinds that are read

VARIANTS: dict[str, tuple[Callable[[], PeftConfig], str, Callable[[], nn.Module]]] = {
    "KaSA": (lambda: peft.LoraConfig(target_modules=LINEAR, kasa_config=peft.KasaConfig()), "kasa_config", zoo),
    "activated": (lambda: peft.LoraConfig(target_modules=LINEAR, alora_invocation_tokens=[1]), "alora_invocation_tokens", zoo),
    "PiSSA by a sketch": (
        lambda: peft.LoraConfig(target_modules=LINEAR, init_lora_weights="pissa_niter_4"),
        "pissa_niter_4",
        zoo,
    ),
    "VeRA without projections": (lambda: peft.VeraConfig(target_modules=LINEAR, r=2, save_projection=False), "tensor A", zoo),
    "PVeRA without projections": (lambda: peft.PveraConfig(target_modules=LINEAR, r=2, save_projection=False), "tensor A", zoo),
    "PVeRA that samples": (
        lambda: peft.PveraConfig(target_modules=LINEAR, r=2, sample_at_inference=True),
        "sample_at_inference",
        zoo,
    ),
    "RandLoRA without bases": (lambda: peft.RandLoraConfig(target_modules=LINEAR, r=2, save_projection=False), "tensor A", zoo),
    "UniLoRA without indices": (lambda: peft.UniLoraConfig(target_modules=LINEAR, theta_d_length=9), "save_indices=True", zoo),
    "LoHa core of a Conv1d": (
        lambda: peft.LoHaConfig(target_modules=["series"], r=2, use_effective_conv2d=True),
        "module series",
        zoo,
    ),
    "LoKr core of a Conv1d": (
        lambda: peft.LoKrConfig(target_modules=["series"], r=1, use_effective_conv2d=True),
        "module series",
        zoo,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_that_its_file_does_not_say_in_full_is_refused_by_name(variant: str, tmp_path: Path) -> None:
    config, named, model = VARIANTS[variant]
    with pytest.raises(UnsupportedAdapter, match=named) as refused:
        described(saved(tmp_path, config, model))
    assert len(refused.value.reason) > 10 and len(refused.value.remedy) > 10


def test_a_grouped_convolution_is_refused_by_name(tmp_path: Path) -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Conv2d(4, 6, 3, groups=2)

    made = saved(tmp_path, lambda: peft.LoraConfig(target_modules=["image"], r=4), Grouped)
    with pytest.raises(UnsupportedAdapter, match=r"module image: lora_B of 2 groups"):
        described(made)


# --- no tensor is left over


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_unknown_tensor_refuses_the_adapter_naming_it(case: Case, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match=r"tensor base_model\.model\.up\.novelty"):
        described(Made({**made.tensors, f"{PREFIX}up.novelty": torch.ones(2)}, made.config))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_belongs_to_a_module(case: Case, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    assert {name for module in described(made).modules for name in module.tensors.values()} == made.tensors.keys()


SPARE = r"model\..*\.randlora_[AB]$|velora_embed|monteclora_sampler"  # copies, and what only training used


@pytest.mark.parametrize("case", [case for case in CASES if case.kind != "MiSS"], ids=str)  # whose modules are one tensor each
def test_an_adapter_that_lacks_a_tensor_is_refused(case: Case, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    for name in made.tensors:
        rest = {other: tensor for other, tensor in made.tensors.items() if other != name}
        if re.search(SPARE, name):
            assert described(Made(rest, made.config)).modules
        else:
            with pytest.raises((UnsupportedAdapter, ShapeMismatch)):
                described(Made(rest, made.config))


@pytest.mark.parametrize("case", [case for case in CASES if case.config().peft_type not in {"LORA", "MISS"}], ids=str)
def test_tensors_of_another_kind_are_refused(case: Case, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    with pytest.raises((UnsupportedAdapter, ShapeMismatch)):
        described(Made(made.tensors, {**made.config, "peft_type": "MISS", "init_weights": True}))


FLAGS: Mapping[str, Any] = {"lora_bias": True, "modules_to_save": ["head"], "a_flag_of_the_future": 3}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_flag_that_no_kind_reads_is_refused_by_name(case: Case, flag: str, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match=flag):
        described(Made(made.tensors, {**made.config, flag: FLAGS[flag]}))


def test_the_convolutions_of_the_zoo_are_all_proven() -> None:
    assert {name for name, module in zoo().named_children() if "Conv" in type(module).__name__} == set(CONVOLUTIONS)
