"""Which files make a base model, and under which names: ours, never the ones a repository or a directory gives.

Weights are read from safetensors or GGUF only. Python files, pickles and whatever else lies beside them stay where they are.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from storage.errors import NoBaseModel, PickleOnly

CONFIG, WEIGHTS, INDEX, GGUF = "config.json", "model.safetensors", "model.safetensors.index.json", "model.gguf"
PLAIN = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
_SHARD = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors")
_GGUF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,200}\.gguf")
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)")
_MOST_SHARDS = 1000


def choose(names: Collection[str], source: str) -> dict[str, str]:
    """Our name -> theirs, of every file of a folder that belongs to the base model in it; `source` is for the sentence.

    One whole safetensors file goes before shards, and both before a GGUF. Raises PickleOnly or NoBaseModel.
    """
    weights = _safetensors(names, source) or _gguf(names, source)
    if not weights:
        raise _without_weights(names, source)
    if GGUF not in weights and CONFIG not in names:
        raise NoBaseModel(source, f"it has no {CONFIG} beside its weights")
    return {name: name for name in PLAIN if name in names} | weights


def is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))


def own_name(name: str) -> str:
    """The same name, made of our own characters. Raises NoBaseModel if no file of a base model is called so."""
    shard = _SHARD.fullmatch(name)
    if shard is not None:
        return _shard(int(shard[1]), int(shard[2]))
    for known in (*PLAIN, WEIGHTS, INDEX, GGUF):
        if name == known:
            return known
    raise NoBaseModel("the manifest", f"{name[:100]!r} is no file of one")


def require_index_of(weight_map: object, names: Collection[str], source: str) -> None:
    """Raises NoBaseModel unless the index of the shards names these files alone: readers follow it from file to file."""
    if not isinstance(weight_map, Mapping) or not all(isinstance(file, str) for file in weight_map.values()):
        raise NoBaseModel(source, f"the weight_map of {INDEX} is not an object of file names")
    foreign = sorted(set(weight_map.values()) - set(names))
    if foreign:
        raise NoBaseModel(source, f"{INDEX} names {foreign[0][:100]!r}, which is none of its shards")


def _safetensors(names: Collection[str], source: str) -> dict[str, str]:
    if WEIGHTS in names:
        return {WEIGHTS: WEIGHTS}
    shards = [(int(match[1]), int(match[2])) for match in map(_SHARD.fullmatch, names) if match]
    if not shards:
        return {}
    expected = _whole_set([total for _, total in shards], source)
    missing = [name for name in (*expected, INDEX) if name not in names]
    if missing:
        raise NoBaseModel(source, f"{missing[0]} is missing from its shards")
    return {name: name for name in (INDEX, *expected)}


def _whole_set(totals: Sequence[int], source: str) -> tuple[str, ...]:
    total = max(totals)
    if len(set(totals)) > 1 or not 1 <= total <= _MOST_SHARDS:
        raise NoBaseModel(source, f"its shards are not one set of 1 to {_MOST_SHARDS} files")
    return tuple(_shard(number, total) for number in range(1, total + 1))


def _shard(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def _gguf(names: Collection[str], source: str) -> dict[str, str]:
    found = sorted(name for name in names if name.endswith(".gguf"))
    if len(found) > 1:
        listed = ", ".join(found[:5])[:200]
        raise NoBaseModel(source, f"it has {len(found)} GGUF files ({listed}); put one in a folder of its own")
    if found and _GGUF.fullmatch(found[0]) is None:
        raise NoBaseModel(source, "the name of its GGUF file is not plain: letters, digits and . _ + = - are")
    return {GGUF: found[0]} if found else {}


def _without_weights(names: Collection[str], source: str) -> PickleOnly | NoBaseModel:
    pickles = sorted(name for name in names if _PICKLE.fullmatch(name))
    if pickles:
        return PickleOnly(source, pickles[0])
    return NoBaseModel(source, f"it has neither {WEIGHTS}, nor shards of it, nor one .gguf")
