"""Two stored models side by side: tensors by name, whichever file holds them, and which of them an adapter can hold."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from app import base_models
from app.adapters import TORCH_DTYPES, read_json, read_rows
from app.errors import BadBase
from app.recipe import Recipe
from app.services import Services
from merge_algos.errors import IncomparableTensor
from merge_algos.extract import Extract, Pair, as_matrix, pair_up, reasons_against
from merge_algos.merge import build_any
from storage.base_files import CONFIG, GGUF
from storage.digest import Digest
from storage.errors import NoBaseModel
from storage.manifest import BaseManifest
from storage.tensors import TensorFile, TensorInfo, open_tensors

TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})  # their linear layers are `Conv1D`


@dataclass(frozen=True, slots=True, eq=False)
class OpenModel:
    """One model, its weights open. files: tensor -> the file that holds it."""

    which: Literal["base", "tuned"]
    manifest: BaseManifest
    config: Mapping[str, Any]
    files: Mapping[str, TensorFile]

    def info(self, tensor: str) -> TensorInfo:
        return self.files[tensor].header.tensors[tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {tensor: self.info(tensor).shape for tensor in self.files}

    def rows(self, tensor: str, device: str) -> Callable[[int, int], Tensor]:
        d_in = as_matrix(self.info(tensor).shape)[1]
        return lambda start, stop: read_rows(self.files[tensor], tensor, start, stop, d_in).to(device)


@dataclass(frozen=True, slots=True, eq=False)
class OpenPair:
    """Both models, of the same tensors. shapes: of all, in natural order.  reasons: why one is no module, None where it is."""

    base: OpenModel
    tuned: OpenModel
    shapes: Mapping[str, tuple[int, ...]]
    reasons: Mapping[str, str | None]

    def pair(self, tensor: str, device: str) -> Pair:
        rows = (model.rows(tensor, device) for model in (self.base, self.tuned))
        return Pair(tensor, as_matrix(self.shapes[tensor]), *rows)

    def has_difference(self, tensor: str) -> bool:
        """Whether it is made of floats; if not, it must be the same in both models, to the byte. Raises IncomparableTensor."""
        types = [model.info(tensor).dtype for model in (self.base, self.tuned)]
        if all(dtype in TORCH_DTYPES for dtype in types):
            return True
        chunks = [model.files[tensor].chunks(tensor) for model in (self.base, self.tuned)]
        if types[0] != types[1] or any(own != other for own, other in zip(*chunks, strict=True)):
            raise IncomparableTensor(tensor, f"its types {' and '.join(types)} have no exact difference")
        return False

    @property
    def dtypes(self) -> frozenset[str]:
        """Of everything that may become a module."""
        modules = [tensor for tensor, reason in self.reasons.items() if reason is None]
        return frozenset(model.info(tensor).dtype for model in (self.base, self.tuned) for tensor in modules)


@contextmanager
def open_pair(services: Services, recipe: Recipe, inputs: Sequence[Digest]) -> Iterator[OpenPair]:
    """inputs: the manifests of base and tuned.

    Raises BlobNotFound, NoBaseModel for weights in GGUF, BadBase for transposed ones, and what `pair_up` and
    `reasons_against` raise.
    """
    with ExitStack() as stack:
        base, tuned = _plain(services, inputs[0], "base", stack), _plain(services, inputs[1], "tuned", stack)
        shapes = pair_up(base.shapes, tuned.shapes)
        yield OpenPair(base, tuned, shapes, reasons_against(shapes, _vocabulary(base.config), method_of(recipe)))


def method_of(recipe: Recipe) -> Extract:
    """Raises InvalidParams."""
    lists = {name: tuple(value) for name, value in recipe.parameters.items() if isinstance(value, list)}
    return build_any(Extract, {**recipe.parameters, **lists})


def _plain(services: Services, digest: Digest, which: Literal["base", "tuned"], stack: ExitStack) -> OpenModel:
    """Raises BadBase for a model whose linear layers are stored transposed."""
    model = open_model(services, digest, which, stack)
    if model.config.get("model_type") in TRANSPOSED:
        raise BadBase(f"the linear layers of a {model.config['model_type']} are stored transposed, which is not extracted from")
    return model


def open_model(services: Services, digest: Digest, which: Literal["base", "tuned"], stack: ExitStack) -> OpenModel:
    """One model of safetensors files, open until the stack is closed.

    Raises BlobNotFound, NoBaseModel for weights in GGUF, IncomparableTensor for a tensor in two files.
    """
    manifest = base_models.read(services, digest)
    if GGUF in manifest.files:
        raise NoBaseModel(manifest.source, "weights in a GGUF are quantised, so nothing exact comes of them; use safetensors")
    config = read_json(services.blobs, manifest.files[CONFIG].digest)
    paths = [services.blobs.path(part.digest) for name, part in manifest.files.items() if name.endswith(".safetensors")]
    files: dict[str, TensorFile] = {}
    for file in [stack.enter_context(open_tensors(path)) for path in paths]:
        for tensor in file.header.tensors:
            if files.setdefault(tensor, file) is not file:
                raise IncomparableTensor(tensor, f"two files of the {which} model hold it")
    return OpenModel(which, manifest, config, files)


def _vocabulary(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Sizes of vocabularies, also of the parts of a model that has several."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    sizes = (part.get("vocab_size") for part in parts)
    return tuple(size for size in sizes if isinstance(size, int) and size > 0)
