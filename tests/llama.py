"""A Llama of two small layers with a word tokenizer, as a folder: a causal language model that trains in seconds."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("one", "two", "three", "red", "green", "blue", "is", "a", "colour", "number", "not")
LLAMA_TEXTS = ("red is a colour", "two is a number", "green is not a number at all", "three is not a colour")
SPECIAL = ("<s>", "</s>", "<unk>")


def write_llama(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    vocabulary = {word: n for n, word in enumerate((*SPECIAL, *WORDS, "at", "all"))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
