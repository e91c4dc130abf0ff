"""The kinds of adapter that are no delta, or none that their own file says: what PEFT calls them, why, and what to do.

A kind leaves this table for a file of its own in `kinds/` when it can be read exactly.
"""

from collections.abc import Mapping
from types import MappingProxyType

_CONVERT = "convert it to LoRA with peft.convert_to_lora, which measures what that costs"
_BASE = "merge it into its base and take a LoRA out of the difference"
_ALONE = "serve it as it is"

UNKNOWN = ("no adapter kind of that name is known here", "convert it to LoRA first")

_PROMPT = ("it is a prompt: vectors beside the input, and no change of a weight", _ALONE)
_BASIS = "where its numbers belong is drawn from a seed and not saved, and {} gives it full rank"

REFUSED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "PROMPT_TUNING": _PROMPT,
        "MULTITASK_PROMPT_TUNING": _PROMPT,
        "P_TUNING": _PROMPT,
        "PREFIX_TUNING": ("it is a prefix of keys and values, and no change of a weight", _ALONE),
        "CARTRIDGE": ("it is a cache of keys and values, and no change of a weight", _ALONE),
        "CPT": _PROMPT,
        "ADAPTION_PROMPT": ("it adds gated attention over a prompt, and changes no weight", _ALONE),
        "XLORA": ("a network decides at every token how much of each LoRA counts, so it is not one delta", "merge its LoRAs"),
        "POLY": ("a router picks a mixture of LoRAs per task, so it is not one delta", "merge one LoRA per task instead"),
        "LILY": ("a router mixes its B by the input, so it is not one delta", _ALONE),
        "SHADOW": ("it is a second network beside the model, and no change of a weight", _ALONE),
        "LN_TUNING": ("it holds whole trained normalisation layers, whose difference needs the base weights", _BASE),
        "TRAINABLE_TOKENS": ("it holds whole trained rows of the embedding, whose difference needs the base weights", _BASE),
        "BEFT": ("it trains biases, which are an update outside B A", _ALONE),
        "IA3": ("it rescales what layers give, biases included, so it is no change of the weights alone", _BASE),
        "ROAD": ("it rotates what layers give, biases included, so it is no change of the weights alone", _BASE),
        "PSOFT": ("it rotates in the frame of the base's SVD, whose signs differ between machines and are not saved", _BASE),
        "FROD": ("it is a whole weight in the base's own frame, so its delta needs the base weights", _BASE),
        "OSF": ("it is the trained part of the base's SVD, whose beginning is not saved", _BASE),
        "ADAMSS": ("which rows its blocks belong to follows from the base weights and is not saved", _CONVERT),
        "TINYLORA": ("which of its shared vectors a layer uses is not saved", _CONVERT),
        "FOURIERFT": (_BASIS.format("an inverse Fourier transform"), _CONVERT),
        "WAVEFT": (_BASIS.format("an inverse wavelet transform"), _CONVERT),
        "SHIRA": ("it is scattered over the whole matrix and has full rank", _CONVERT),
        "SUPERTUNING": ("it is scattered over the whole matrix and has full rank", _CONVERT),
        "C3A": ("its blocks are circulant, so it has full rank", _CONVERT),
        # names that PEFT does not know (any more), but files on the Hub bear
        "NOLA": ("the random matrices that it mixes are not saved", _CONVERT),
        "DORA": ("it rescales the whole weight, so its delta needs the base weights", _BASE),
        "SVFT": ("it is in the frame of the base's SVD, which is not saved", _BASE),
    }
)
