"""Which devices this machine offers, and which of them were asked for."""

from collections.abc import Sequence

import torch

from app.errors import InvalidField


def available(wanted: str) -> Sequence[str]:
    """wanted: `auto` (every GPU, else the CPU), `cpu`, or `cuda:0,cuda:1`. Raises InvalidField for a GPU that is not there."""
    present = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if wanted == "auto":
        return tuple(present) or ("cpu",)
    chosen = tuple(dict.fromkeys(wanted.split(",")))
    missing = [device for device in chosen if device != "cpu" and device not in present]
    if missing:
        raise InvalidField("BRAID_DEVICES", f"{', '.join(missing)} is not on this machine; it has {', '.join([*present, 'cpu'])}")
    return chosen
