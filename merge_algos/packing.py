"""Matrices as few bytes: what a codec has decided to keep, packed so that decoding needs the bytes and a short layout.

A field is one matrix in one of these encodings, each laid out column by column, because a column has one magnitude:

`bf16`              two bytes an entry, the unit in which budgets are counted
`int8 int6 int4`    symmetric codes in groups of 64, one fp16 scale each, relative to one fp32 factor of the field
`rice`              codes of unlimited range, one step per column, entropy coded

Golomb-Rice codes (Rice and Plaunt 1971) cost about 0.1 bit more than the entropy of Gaussian codes, need no table (columns
are short, and a Huffman table of each would cost more than it saves), and both of their planes decode without a loop.
Everything is integer arithmetic on codes, so the same codes give the same bytes anywhere. A field knows its size and its
decoded matrix before it has any bytes: most fields are only ever compared with others.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Layout = Sequence[Sequence[Any]]  # [field name, encoding, rows, columns], in the order of the bytes, which JSON keeps of a list

GROUP = 64
BITS = {"int8": 8, "int6": 6, "int4": 4}
_CLIPS = {8: (1.0, 0.97), 6: (1.0, 0.95, 0.9, 0.85), 4: (1.0, 0.93, 0.86, 0.8, 0.74, 0.68)}
_LARGEST_SCALE = 2.0**14  # of fp16's 65504: leaves 2^28 below before a scale loses bits
_RICE_HEADER_BYTES = 4  # length of the unary plane
_SAMPLED_ROWS = 512  # of long columns, for the choice of a Rice parameter
_INT32 = 2**30  # codes below it survive a sign bit and a doubling
COLUMN_BITS = 24  # a bf16 step and the Rice parameter


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """One packed matrix. shape: (rows, columns).  matrix: as decoding will give it, float32.  write: makes its bytes."""

    label: str
    encoding: str
    shape: tuple[int, int]
    size_bytes: int
    matrix: Tensor
    write: Callable[[], Array]

    @property
    def data(self) -> Array:
        """1-D uint8, of `size_bytes`."""
        return self.write()


def join(fields: Sequence[Field]) -> tuple[Tensor, list[list[Any]]]:
    """All bytes as one 1-D uint8 tensor, and the layout that `split` needs."""
    joined = np.concatenate([np.zeros(0, np.uint8), *(field.data for field in fields)])
    return torch.from_numpy(joined), [[field.label, field.encoding, *field.shape] for field in fields]


def split(layout: Layout, data: Tensor) -> dict[str, Tensor]:
    """The matrices of `join`, float32, by name."""
    rest: Array = data.cpu().numpy()
    matrices = {}
    for label, encoding, rows, columns in layout:
        decoded, rest = _decode(encoding, (rows, columns), rest)
        matrices[label] = _laid_out(torch.from_numpy(decoded.reshape(columns, rows).astype(np.float32)).mT)
    return matrices


def pack(label: str, X: Tensor, encoding: str) -> Field:
    """X (rows, columns) as `bf16` or one of the grouped integers. Its size is `packed_bytes` of the shape."""
    shape = (X.shape[0], X.shape[1])
    size = packed_bytes(X.numel(), encoding)
    if encoding == "bf16":
        narrow = X.detach().cpu().to(torch.bfloat16)
        return Field(label, encoding, shape, size, _laid_out(narrow.float()), partial(_raw, narrow))
    grouped = Groups.of(_columns(X).ravel(), BITS[encoding])
    matrix = grouped.entries.reshape(shape[1], shape[0]).astype(np.float32)
    return Field(label, encoding, shape, size, _laid_out(torch.from_numpy(matrix).mT), grouped.write)


def packed_bytes(entries: int, encoding: str) -> int:
    """Size of a field of `bf16` or grouped integers."""
    if encoding == "bf16":
        return 2 * entries
    return (4 + 2 * -(-entries // GROUP) + -(-entries * BITS[encoding] // 8)) if entries else 0


def pack_rice(label: str, X: Tensor, steps: Tensor) -> Field:
    """X (rows, columns) rounded to multiples of each column's step. steps: (columns,), positive; stored as bf16."""
    shape = (X.shape[0], X.shape[1])
    codes, stored = _rice_codes(X, steps)
    zigzag = _zigzag(codes)
    parameters = _rice_parameters(zigzag[:: max(1, shape[0] // _SAMPLED_ROWS)])
    matrix = _laid_out((codes * stored.double()).float())
    return Field(label, "rice", shape, _rice_size(zigzag, parameters), matrix, partial(_rice, zigzag, parameters, stored))


def rice_bits(X: Tensor, steps: Tensor) -> Array:
    """(columns,): what `pack_rice` spends on each column, without packing anything."""
    zigzag = _zigzag(_rice_codes(X, steps)[0])
    bits: Array = _rice_spent(zigzag, _rice_parameters(zigzag)).numpy()
    return bits + COLUMN_BITS


def rice_bytes(bits: Array) -> int:
    """Size of a field of these columns."""
    return _RICE_HEADER_BYTES + -(-int(bits.sum()) // 8) + 1 if len(bits) else 0


def _laid_out(X: Tensor) -> Tensor:
    """Row by row, to the last stride: products round by how a matrix lies, and what was measured must be what comes back."""
    return X.clone(memory_format=torch.contiguous_format)


def _columns(X: Tensor) -> Array:
    """(columns, rows), float64: column by column."""
    return np.ascontiguousarray(X.detach().cpu().double().numpy().T)


def _bytes(values: Array) -> Array:
    return np.frombuffer(values.tobytes(), np.uint8).copy()  # a view would be read-only, which torch warns of


def _take(data: Array, dtype: str, count: int) -> tuple[Array, Array]:
    size = np.dtype(dtype).itemsize * count
    return np.frombuffer(data[:size].tobytes(), dtype), data[size:]


def _from_bf16(bits: Array) -> Array:
    return (bits.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _raw(narrow: Tensor) -> Array:
    return _bytes(narrow.mT.contiguous().view(torch.int16).numpy().astype("<i2"))


def _decode(encoding: str, shape: tuple[int, int], data: Array) -> tuple[Array, Array]:
    """The entries of the first field in `data`, column by column, and the bytes behind it."""
    entries = shape[0] * shape[1]
    if encoding == "bf16":
        bits, rest = _take(data, "<i2", entries)
        return _from_bf16(bits), rest
    return _unrice(shape, data) if encoding == "rice" else _ungrouped(entries, BITS[encoding], data)


# Groups


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Entries column by column in groups of 64. codes: (entries,) int8.  scales: (groups,) fp16.  factor: (1,) fp32."""

    bits: int
    codes: Array
    scales: Array
    factor: Array

    @classmethod
    def of(cls, flat: Array, bits: int) -> "Groups":
        """flat: (entries,) float64."""
        groups = np.pad(flat, (0, -len(flat) % GROUP)).reshape(-1, GROUP)
        factor = _factor(groups, bits)
        scales = _best_scales(groups.astype(np.float32), bits, factor)
        return cls(bits, _codes(groups, bits, _steps(scales, factor)).astype(np.int8).ravel()[: len(flat)], scales, factor)

    @property
    def entries(self) -> Array:
        """(entries,) float64, as they decode."""
        entries: Array = self.codes * np.repeat(_steps(self.scales, self.factor)[:, 0], GROUP)[: len(self.codes)]
        return entries

    def write(self) -> Array:
        if not len(self.codes):
            return np.zeros(0, np.uint8)
        return np.concatenate([_bytes(self.factor), _bytes(self.scales), _to_bits(self.codes, self.bits)])


def _ungrouped(entries: int, bits: int, data: Array) -> tuple[Array, Array]:
    if not entries:
        return np.zeros(0), data
    factor, data = _take(data, "<f4", 1)
    scales, data = _take(data, "<f2", -(-entries // GROUP))
    size = -(-entries * bits // 8)
    codes = _from_bits(data[:size], entries, bits)
    steps = np.repeat(_steps(scales, factor)[:, 0], GROUP)[:entries]
    return codes * steps, data[size:]


def _factor(groups: Array, bits: int) -> Array:
    """(1,) fp32: what fp16 scales are multiples of. A power of two, so that a group's codes are those it would have alone."""
    largest = float(np.abs(groups).max(initial=0.0))
    return np.array([2.0 ** max(math.ceil(math.log2(largest / _qmax(bits) / _LARGEST_SCALE)), -126) if largest else 1.0], "<f4")


def _best_scales(groups: Array, bits: int, factor: Array) -> Array:
    """(groups,) fp16: of a few clippings of each group's largest entry the one with the least squared error."""
    largest = np.abs(groups).max(1) / _qmax(bits) / factor.astype(np.float64)
    best, least = np.zeros(len(groups), "<f2"), np.full(len(groups), np.inf)
    for clip in _CLIPS[bits]:
        scales = (clip * largest).astype("<f2")
        steps = _steps(scales, factor).astype(np.float32)
        missed = groups - _codes(groups, bits, steps) * steps
        error = np.einsum("ge,ge->g", missed, missed)
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best.astype("<f2")


def _steps(scales: Array, factor: Array) -> Array:
    """(groups, 1) float64."""
    return (scales.astype(np.float64) * factor.astype(np.float64))[:, None]


def _codes(groups: Array, bits: int, steps: Array) -> Array:
    """Nearest codes, whole numbers of the groups' type; a group of zeros has step 0 and codes 0."""
    codes = groups / np.where(steps > 0, steps, np.inf)
    np.rint(codes, out=codes)
    return np.clip(codes, -_qmax(bits), _qmax(bits), out=codes)


def _qmax(bits: int) -> int:
    return (1 << bits - 1) - 1


def _to_bits(codes: Array, bits: int) -> Array:
    """Two's complement of `bits` (up to 8) bits each, without gaps."""
    octets = codes.astype(np.int8).view(np.uint8)
    return octets if bits == 8 else np.packbits(np.unpackbits(octets[:, None], axis=1)[:, 8 - bits :])


def _from_bits(data: Array, entries: int, bits: int) -> Array:
    if bits == 8:
        return data.view(np.int8).astype(np.float64)
    planes = np.zeros((entries, 8), np.uint8)
    planes[:, :bits] = np.unpackbits(data)[: entries * bits].reshape(entries, bits)
    # the sign bit comes first, so shifting down from the top extends it
    return (np.packbits(planes, axis=1)[:, 0].view(np.int8) >> 8 - bits).astype(np.float64)


# Rice


def _rice_codes(X: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns), whole numbers, of what is nearest; and the steps, bf16 as they are stored."""
    stored = steps.detach().cpu().to(torch.bfloat16)
    codes = (X.detach().cpu().double() * stored.double().reciprocal()).round_()
    return codes.to(torch.int32 if float(codes.abs().amax() if codes.numel() else 0) < _INT32 else torch.int64), stored


def _zigzag(codes: Tensor) -> Tensor:
    """0, -1, 1, -2, 2 .. as 0, 1, 2, 3, 4 .."""
    return (codes << 1) ^ (codes >> (8 * codes.element_size() - 1))


def _rice_parameters(zigzag: Tensor) -> Tensor:
    """(columns,): of each column of (rows, columns) the parameter that needs fewest bits."""
    mean = zigzag.sum(0).double() / max(1, len(zigzag))
    guess = (mean + 1).log2().floor().to(zigzag.dtype)  # within one of the best for any distribution met
    tried = [(guess + more).clamp(min=0) for more in (0, -1, 1)]
    spent = torch.stack([_rice_spent(zigzag, parameters) for parameters in tried])
    return torch.stack(tried).gather(0, spent.argmin(0, keepdim=True))[0]


def _rice_spent(zigzag: Tensor, parameters: Tensor) -> Tensor:
    """(columns,): bits of the codes alone."""
    return (zigzag >> parameters).sum(0) + len(zigzag) * (1 + parameters.long())


def _rice_size(zigzag: Tensor, parameters: Tensor) -> int:
    """Of what `_rice` writes."""
    if not zigzag.numel():
        return 0
    low = len(zigzag) * int(parameters.sum())
    unary = int(_rice_spent(zigzag, parameters).sum()) - low
    return _RICE_HEADER_BYTES + len(parameters) * COLUMN_BITS // 8 + -(-low // 8) + -(-unary // 8)


def _rice(zigzag: Tensor, parameters: Tensor, steps: Tensor) -> Array:
    if not zigzag.numel():
        return np.zeros(0, np.uint8)
    columns, low = zigzag.mT.contiguous().numpy(), parameters.numpy()
    unary = _unary((columns >> low[:, None]).ravel())
    header = [_bytes(np.array([len(unary)], "<u4")), _bytes(steps.view(torch.int16).numpy().astype("<i2")), low.astype(np.uint8)]
    return np.concatenate([*header, _remainders(columns, low), unary])


def _unrice(shape: tuple[int, int], data: Array) -> tuple[Array, Array]:
    rows, columns = shape
    if not rows * columns:
        return np.zeros(0), data
    (size,), data = _take(data, "<u4", 1)
    steps, data = _take(data, "<i2", columns)
    parameters, data = data[:columns].astype(np.int64), data[columns:]
    low, data = _from_remainders(rows, parameters, data)
    high = _from_unary(data[:size], rows * columns).reshape(columns, rows)
    zigzag = (high << parameters[:, None]) | low
    codes = (zigzag >> 1) ^ -(zigzag & 1)
    return (codes * _from_bf16(steps)[:, None]).ravel(), data[size:]


def _unary(counts: Array) -> Array:
    """As many ones as each count says, then a zero."""
    bits = np.ones(int(counts.sum()) + len(counts), np.uint8)
    bits[np.cumsum(counts + 1) - 1] = 0
    return np.packbits(bits)


def _from_unary(data: Array, entries: int) -> Array:
    ends = np.flatnonzero(np.unpackbits(data) == 0)[:entries]
    return np.diff(ends, prepend=-1) - 1


def _remainders(zigzag: Array, parameters: Array) -> Array:
    """The low bits: for each bit position a plane of all columns whose parameter is larger."""
    planes = [(zigzag[parameters > bit] >> bit & 1).astype(np.uint8).ravel() for bit in range(int(parameters.max(initial=0)))]
    return np.packbits(np.concatenate([np.zeros(0, np.uint8), *planes]))


def _from_remainders(rows: int, parameters: Array, data: Array) -> tuple[Array, Array]:
    size = -(-int(parameters.sum()) * rows // 8)
    most = int(parameters.max(initial=0))
    narrow = np.int32 if most < 31 else np.int64  # half the memory to pass through
    bits: Array = np.unpackbits(data[:size])
    low = np.zeros((len(parameters), rows), narrow)
    for bit in range(most):
        wide = parameters > bit
        count = int(wide.sum()) * rows
        plane: Array = np.left_shift(bits[:count].reshape(-1, rows), bit, dtype=narrow)
        if count == low.size:
            low |= plane
        else:
            low[wide] |= plane
        bits = bits[count:]
    return low, data[size:]
