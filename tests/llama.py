"""A Llama of two small layers, as a folder with a word tokenizer or as a GGUF: a causal language model that trains in seconds."""

from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
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


def write_llama_gguf(folder: Path, source: Path) -> Path:
    """The weights of `source` as llama.cpp keeps them, with a tokenizer of single letters."""
    model = LlamaForCausalLM.from_pretrained(source)
    config = model.config
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_letters(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        turned = _paired(tensor, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else tensor
        writer.add_tensor(names.get_name(name, (".weight",)), turned.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def _add_letters(writer: gguf.GGUFWriter, size: int) -> None:
    tokens = [*SPECIAL, "▁", *(chr(ord("a") + n) for n in range(size - len(SPECIAL) - 1))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([3, 3, 2, *[1] * (size - 3)])  # control, control, unknown, normal
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)


def _paired(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head as llama.cpp turns them: the two halves interleaved."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
