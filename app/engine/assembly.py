"""What every adapter that is made here has in common: the type of its modules, and one file of all their factors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from app import adapters
from app.recipe import Recipe
from merge_algos.formats.spec import AdapterSpec, Layer
from merge_algos.formats.together import agreed_replication
from merge_algos.formats.written import config_for
from storage.blobs import BlobStore
from storage.digest import Descriptor
from storage.tensor_writer import TensorSpec
from storage.tensors import open_tensors

_RECIPE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def shipped_dtype(recipe: Recipe, dtypes: Iterable[str]) -> torch.dtype:
    """dtypes: of the inputs, as safetensors names them."""
    return _RECIPE_DTYPES.get(recipe.dtype) or adapters.widest(dtypes)


def plain_config(
    base_model: str, specs: Sequence[AdapterSpec], ranks: Mapping[str, int], layers: Mapping[str, Layer]
) -> dict[str, Any]:
    """`adapter_config.json` of a plain LoRA made of these adapters: what they agree on, and one scaling."""
    config = config_for(
        base_model=base_model,
        revision=adapters.agreed([spec.revision for spec in specs]),
        task_type=adapters.agreed([spec.task_type for spec in specs]),
        fan_in_fan_out=any(spec.fan_in_fan_out for spec in specs),
        ranks=ranks,
        layers=layers,
    )
    replication = agreed_replication(specs)
    return {**config, "layer_replication": replication} if replication else config


def put_weights(
    blobs: BlobStore,
    shards: Sequence[adapters.Shard],
    shapes: Mapping[str, tuple[int, int]],
    layers: Mapping[str, Layer],
    ranks: Mapping[str, int],
    beside: Mapping[TensorSpec, Callable[[], Tensor]] = MappingProxyType({}),
) -> Descriptor:
    """Stream the factors of all shards into one file, each padded with zeros to its rank, and other tensors beside them."""
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(blobs.path(shard.tensors.digest))) for shard in shards]
        where = {name: file for file in files for name in file.header.tensors}
        factor = lambda name: adapters.read_tensor(where[name], name)  # noqa: E731
        dtype = lambda name: where[name].header.tensors[name].dtype  # noqa: E731
        return adapters.put_adapter(blobs, shapes, layers, ranks, factor, dtype, beside)
