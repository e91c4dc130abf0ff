"""The base model's weight of a module: which tensor it is, and how it is laid out as the module's delta."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.adapters import TORCH_DTYPES, read_tensor
from app.errors import BadBase
from app.extract.models import TRANSPOSED, OpenModel, open_model
from app.services import Services
from merge_algos import formats
from merge_algos.errors import ShapeMismatch
from merge_algos.formats.spec import FLAT, AdapterSpec, Layer, ModuleSpec, Shape, check_finite
from storage.digest import Digest

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True, eq=False)
class BaseWeights:
    """A base model, or the tensors of one that an adapter needs. transposed: whether its linear layers may be `Conv1D`."""

    model: OpenModel
    transposed: bool

    def completed(self, module: ModuleSpec) -> ModuleSpec:
        """The module with a shape, after a look at the header. Raises BadBase, and ShapeMismatch naming the tensor."""
        tensor = tensor_of(module, self.model.files)
        stored = self.model.info(tensor).shape
        module = _seen(module, stored)
        if module.shape is None:
            return formats.completed(module, _delta_shape(tensor, stored, module.layer, self.transposed))
        if _layout(stored, module, self.transposed) is None:
            raise ShapeMismatch(f"{tensor} of the base model", module.layer.weight_shape(module.shape), stored)
        return module

    def weight(self, module: ModuleSpec, device: str) -> Tensor:
        """(d_out, d_in) float32. module: as `completed` gives it. Raises BadBase, NonFiniteTensor."""
        tensor = tensor_of(module, self.model.files)
        info = self.model.info(tensor)
        if info.dtype not in TORCH_DTYPES:
            raise BadBase(f"{tensor} is of type {info.dtype}, which is quantised; use the model before it was")
        stored = read_tensor(self.model.files[tensor], tensor)
        check_finite(f"{tensor} of the base model", stored)
        matrix = stored.flatten(1).T if _layout(info.shape, module, self.transposed) == "transposed" else stored.flatten(1)
        return matrix.to(device, torch.float32)


@contextmanager
def open_weights(services: Services, base: Digest, spec: AdapterSpec) -> Iterator[BaseWeights]:
    """base: a manifest.  spec: of the adapter that its weights are read for.

    Raises BlobNotFound, NoBaseModel for weights in GGUF, IncomparableTensor for a tensor in two files.
    """
    with ExitStack() as stack:
        model = open_model(services, base, "base", stack)
        yield BaseWeights(model, spec.fan_in_fan_out or model.config.get("model_type") in TRANSPOSED)


def completed(spec: AdapterSpec, weights: BaseWeights) -> AdapterSpec:
    """The adapter with the shapes that its file does not say, and every weight that it needs looked for.

    Raises BadBase naming module and tensor, ShapeMismatch naming the tensor.
    """
    modules = [weights.completed(module) if depends(module) else module for module in spec.modules]
    return replace(spec, modules=tuple(modules))


def depends(module: ModuleSpec) -> bool:
    """Whether the base model must say something of this module."""
    return module.needs_base or module.shape is None


def tensor_of(module: ModuleSpec, tensors: Collection[str]) -> str:
    """The module's weight among these: by its name, else the only one that differs in what stands before the module's path.

    PEFT names modules as the model class does that it wrapped; checkpoints may be of the class within, or of one around it.
    Raises BadBase naming module and tensor.
    """
    wanted = f"{module.name}{_WEIGHT}"
    if module.layer.kind == "expert":
        raise BadBase(f"module {module.name[:200]} is one expert of several, whose weights are not read from a base model")
    if wanted in tensors:
        return wanted
    found = [tensor for tensor in tensors if tensor.endswith(_WEIGHT) and _is_tail(tensor, wanted)]
    if len(found) == 1:
        return found[0]
    several = f"{found[0][:200]} and {found[1][:200]} could be it" if found else "nothing there is called so"
    raise BadBase(f"module {module.name[:200]} of the adapter needs {wanted[:200]}, but {several}")


def needed(spec: AdapterSpec, tensors: Collection[str]) -> tuple[str, ...]:
    """The tensors that an adapter needs of these, sorted. Raises BadBase, as `tensor_of`."""
    return tuple(sorted({tensor_of(module, tensors) for module in spec.modules if depends(module)}))


def _is_tail(tensor: str, wanted: str) -> bool:
    return tensor.endswith(f".{wanted}") or wanted.endswith(f".{tensor}")


def _seen(module: ModuleSpec, stored: tuple[int, ...]) -> ModuleSpec:
    """The module with the layer that its base weight shows it to be, where its own file does not tell."""
    if module.layer == FLAT and len(stored) > 2:
        return replace(module, layer=Layer("conv", stored[2:]))
    return module


def _delta_shape(tensor: str, stored: tuple[int, ...], layer: Layer, transposed: bool) -> Shape:
    """Of a module whose file says none. Raises ShapeMismatch for a tensor that is no such layer's."""
    if layer.kind == "conv" and stored[2:] == layer.kernel:
        return stored[0], stored[1] * layer.size
    if len(stored) != 2:
        raise ShapeMismatch(f"{tensor} of the base model", (1, 1), stored)
    d_out, d_in = stored
    return (d_in, d_out) if transposed or layer.kind == "embedding" else (d_out, d_in)


def _layout(stored: tuple[int, ...], module: ModuleSpec, transposed: bool) -> str | None:
    """How the stored tensor holds the delta's matrix: "rows" or "transposed"; None where it cannot be this module's weight."""
    assert module.shape is not None
    d_out, d_in = module.shape
    if module.layer.kind == "embedding":
        return "transposed" if stored == (d_in, d_out) else None
    if transposed and module.layer.kind in {"linear", "flat"} and stored == (d_in, d_out):
        return "transposed"
    flat = (stored[0], torch.Size(stored[1:]).numel()) if len(stored) > 1 else None
    same = stored == module.layer.weight_shape(module.shape) or (module.layer.kind == "flat" and flat == module.shape)
    return "rows" if same else None
