"""What the metadata of an adapter file says, as trainers of image models write it. All of it is text from strangers."""

import json
from collections.abc import Mapping
from typing import Any

from merge_algos.errors import UnsupportedAdapter

# kohya-ss/sd-scripts and the tools after it; modelspec is Stability AI's standard for single files
_BASE_MODEL = ("ss_base_model_version", "ss_sd_model_name", "modelspec.architecture")
_UNSAID = frozenset({"", "none", "unknown", "null"})
_ADAPTER = "lora_adapter_metadata"
_MAX_CHARS = 500


def base_model_of(metadata: Mapping[str, str]) -> str:
    """The base model as the file names it; empty where it does not."""
    named = [metadata.get(key, "") for key in _BASE_MODEL]
    configs = (adapter_config(metadata) or {}).items()
    named += [value for key, value in configs if key.endswith("base_model_name_or_path") and isinstance(value, str)]
    clean = (_clean(text.removesuffix("/lora")) for text in named)
    return next((text for text in clean if text.lower() not in _UNSAID), "")


def adapter_config(metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    """diffusers' own LoRA configs, keys beginning with the component (`unet.r`); None where the file has none.

    Raises UnsupportedAdapter if it is no JSON object.
    """
    text = metadata.get(_ADAPTER)
    if not text:
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise UnsupportedAdapter(f"metadata {_ADAPTER}", "it is not a JSON object", "check how the adapter was saved")
    return parsed


def _clean(text: str) -> str:
    # JSON can write half a character, which no file can hold
    return text.encode(errors="ignore").decode().strip()[:_MAX_CHARS]
