"""The ranks that an adapter is written with, so that the servers a profile is for load it."""

from collections.abc import Mapping

from app.recipe import Profile
from merge_algos.errors import InvalidRank

# what vLLM takes as `max_lora_rank` (vllm/config/lora.py); an adapter of one of them wastes no memory there
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def shipped_ranks(own: Mapping[str, int], profile: Profile) -> dict[str, int]:
    """Module -> rank in the file, not below its own. Raises InvalidRank where vLLM serves none so high.

    PEFT knows no rank 0, so a module that cancelled out is shipped as one pair of zeros.
    """
    ranks = {module: max(rank, 1) for module, rank in own.items()}
    match profile:
        case "compact":
            return ranks
        case "portable":
            return dict.fromkeys(ranks, max(ranks.values()))
        case "vllm":
            return dict.fromkeys(ranks, served_rank(max(ranks.values())))


def served_rank(rank: int) -> int:
    """The smallest rank of vLLM's that holds this one. Raises InvalidRank."""
    for served in VLLM_RANKS:
        if rank <= served:
            return served
    raise InvalidRank(rank, f"profile vllm goes up to {VLLM_RANKS[-1]}; ask for a lower rank, or for another profile")
