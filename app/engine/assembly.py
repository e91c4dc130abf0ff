"""What every adapter that is made here has in common: the type and rank of its modules, and one file of all their factors."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch

from app import adapters
from app.recipe import Recipe
from merge_algos.formats import peft
from merge_algos.merge import ModuleReport
from storage.blobs import BlobStore
from storage.digest import Descriptor
from storage.tensor_writer import TensorSpec
from storage.tensors import TensorFile, open_tensors

_RECIPE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def shipped_dtype(recipe: Recipe, dtypes: Iterable[str]) -> torch.dtype:
    """dtypes: of the inputs, as safetensors names them."""
    return _RECIPE_DTYPES.get(recipe.dtype) or adapters.widest(dtypes)


def shipped_ranks(recipe: Recipe, reports: Sequence[ModuleReport]) -> dict[str, int]:
    """Module -> rank in the file. PEFT knows no rank 0, so a module that cancelled out is shipped as one pair of zeros."""
    own = {report.module: max(report.rank_out, 1) for report in reports}
    return own if recipe.profile == "compact" else dict.fromkeys(own, max(own.values()))


def put_weights(blobs: BlobStore, shards: Sequence[adapters.Shard], ranks: Mapping[str, int]) -> Descriptor:
    """Stream the factors of all shards into one file, each padded with zeros to its rank."""
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(blobs.path(shard.tensors.digest))) for shard in shards]
        where = {name: file for file in files for name in file.header.tensors}
        padded = {name: r for module, r in ranks.items() for name in peft.factor_names(module)}
        specs = [_padded_spec(where[name], name, r) for name, r in padded.items()]
        tensor = lambda name: adapters.padded(name, adapters.read_tensor(where[name], name), padded[name])  # noqa: E731
        return adapters.put_tensors(blobs, specs, tensor)


def _padded_spec(file: TensorFile, name: str, r: int) -> TensorSpec:
    info = file.header.tensors[name]
    return TensorSpec(name, info.dtype, (r, info.shape[1]) if peft.is_lora_A(name) else (info.shape[0], r))
