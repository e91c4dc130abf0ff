"""Packed matrices: what comes back, how large it is, and that codes survive bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import SEEDS, randn
from merge_algos.packing import BITS, GROUP, Field, join, pack, pack_rice, packed_bytes, rice_bits, rice_bytes, split

SHAPES = st.tuples(st.integers(0, 150), st.integers(0, 5))
ENCODINGS = ("bf16", *BITS)
every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)
every_width = pytest.mark.parametrize("encoding", BITS)


def value(field: Field) -> torch.Tensor:
    """What its bytes decode to, which is what it said they would."""
    data, layout = join([field])
    (decoded,) = split(layout, data).values()
    assert torch.equal(decoded, field.matrix) and decoded.stride() == field.matrix.stride() and len(data) == field.size_bytes
    return decoded.double()


@every_encoding
@given(shape=SHAPES, seed=SEEDS)
def test_the_size_of_a_field_is_known_beforehand(encoding: str, shape: tuple[int, int], seed: int) -> None:
    assert len(pack("X", randn(seed, *shape), encoding).data) == packed_bytes(shape[0] * shape[1], encoding)


@given(shape=SHAPES, seed=SEEDS)
def test_bf16_is_the_nearest_bfloat16(shape: tuple[int, int], seed: int) -> None:
    X = randn(seed, *shape)
    assert torch.equal(value(pack("X", X, "bf16")), X.bfloat16().double())


@every_width
@given(shape=SHAPES, seed=SEEDS)
def test_codes_times_a_scale_come_back_bit_for_bit(encoding: str, shape: tuple[int, int], seed: int) -> None:
    top = (1 << BITS[encoding] - 1) - 1
    codes = torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(seed)).double()
    flat = codes.mT.flatten()
    flat[::GROUP] = top  # each group reaches its end, so its scale is the common one
    codes = flat.reshape(shape[1], shape[0]).mT
    assert torch.equal(value(pack("X", codes / 8, encoding)), codes / 8)


@every_width
@given(seed=SEEDS, exponent=st.integers(-30, 30))
def test_no_entry_is_further_off_than_clipping_allows(encoding: str, seed: int, exponent: int) -> None:
    X = randn(seed, 100, 3) * 2.0**exponent
    top = (1 << BITS[encoding] - 1) - 1
    plain = sum(float((G - (G * top / m).round() * m / top).square().sum()) for G, m in _groups(X))
    assert (
        float((value(pack("X", X, encoding)) - X).square().sum()) <= 1.1 * plain
    )  # an fp16 scale below the exact one clips the largest entry a little


def _groups(X: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
    return [(G, float(G.abs().max())) for G in X.mT.flatten().split(GROUP)]


@every_encoding
def test_zeros_stay_zeros(encoding: str) -> None:
    assert not value(pack("X", torch.zeros(70, 2), encoding)).any()


@every_width
def test_a_group_far_below_another_keeps_its_precision(encoding: str) -> None:
    X = torch.cat([randn(1, GROUP, 1), 1e-6 * randn(2, GROUP, 1)])
    small = value(pack("X", X, encoding))[GROUP:]
    assert float((small - X[GROUP:]).norm() / X[GROUP:].norm()) < 0.2


@given(shape=SHAPES, seed=SEEDS, exponents=st.lists(st.integers(-12, 8), min_size=5, max_size=5))
def test_rice_codes_of_any_size_come_back_bit_for_bit(shape: tuple[int, int], seed: int, exponents: list[int]) -> None:
    steps = 2.0 ** torch.tensor(exponents[: shape[1]], dtype=torch.float64)
    codes = (randn(seed, *shape) * 1000 / steps).round()
    assert torch.equal(value(pack_rice("X", codes * steps, steps)), (codes * steps).float().double())


@given(shape=SHAPES, seed=SEEDS)
def test_the_size_of_rice_codes_is_counted_without_packing(shape: tuple[int, int], seed: int) -> None:
    X, steps = randn(seed, *shape), torch.full((shape[1],), 0.1, dtype=torch.float64)
    actual = len(pack_rice("X", X, steps).data)
    assert actual <= rice_bytes(rice_bits(X, steps)) <= actual + 12 if X.numel() else actual == 0


def test_rice_codes_of_a_gaussian_cost_little_more_than_its_entropy() -> None:
    X = randn(0, 4096, 4)
    step = torch.full((4,), 0.25, dtype=torch.float64)
    counts = np.unique((X / 0.25).round().numpy(), return_counts=True)[1] / X.numel()
    entropy = -float((counts * np.log2(counts)).sum())
    assert entropy <= 8 * len(pack_rice("X", X, step).data) / X.numel() < entropy + 0.15


def test_several_fields_lie_in_one_tensor() -> None:
    X, Y, Z = randn(0, 5, 3), randn(1, 65, 2), randn(2, 4, 0)
    fields = [pack("X", X, "int6"), pack_rice("Y", Y, torch.full((2,), 0.5)), pack("Z", Z, "bf16"), pack("W", X, "bf16")]
    data, layout = join(fields)
    matrices = split(layout, data)
    assert list(matrices) == ["X", "Y", "Z", "W"] and data.dtype == torch.uint8
    assert all(torch.equal(matrices[field.label].double(), value(field)) for field in fields)
