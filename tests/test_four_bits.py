# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.four_bits import in_bytes, outside, packed, unpacked
from qcompiler.types import DType, PerAxis, QuantParams

I4, U4 = DType.INT4, DType.UINT4
fours = pytest.mark.parametrize("four", [I4, U4])


def dropped(value: int, four: DType) -> int:
    """The integer of 4 bits whose difference from a value is a multiple of 16."""
    (found,) = [c for c in range(four.min, four.max + 1) if (value - c) % 16 == 0]
    return found


@fours
@given(value=st.integers(-(2**63), 2**63 - 1))
def test_casts_of_integers_drop_the_higher_bits(four: DType, value: int) -> None:
    (got,) = numerics.low_bits(np.array([value]), four)
    assert got == dropped(value, four)
    assert got.dtype == four.numpy
    if value >= 0:
        assert numerics.low_bits(np.array([value], np.uint64), four)[0] == got


@fours
@given(value=st.floats(width=64))
def test_casts_of_floats_are_those_of_their_integral_parts(four: DType, value: float) -> None:
    with np.errstate(over="ignore"):
        arrays = [np.array([value]), np.array([value], "f4"), np.array([value], "f2")]
    for x in arrays:
        (real,) = x.tolist()
        want = dropped(math.trunc(real), four) if math.isfinite(real) else 0
        assert numerics.low_bits(x, four)[0] == want


@fours
@given(size=st.integers(0, 9), seed=st.integers(0, 99))
def test_two_to_a_byte_and_back(four: DType, size: int, seed: int) -> None:
    a = np.random.default_rng(seed).integers(four.min, four.max, size, endpoint=True)
    held = a.astype(four.numpy)
    raw = packed(held)
    assert len(raw) == (size + 1) // 2
    back = unpacked(np.frombuffer(raw, np.uint8), four, size)
    assert back.dtype == four.numpy
    np.testing.assert_array_equal(back, a)


def test_what_four_bits_cannot_hold() -> None:
    a = np.array([[0, 7], [8, -9]], np.int8)
    assert outside(a, I4) == (8, (1, 0))
    assert outside(a[:1], I4) is None
    assert outside(-a[:1], U4) == (-7, (0, 1))
    assert outside(a[:0], I4) is None
    assert outside(a, DType.INT8) is None
    assert in_bytes(a) is a


def test_integers_stay_on_the_same_scales() -> None:
    """Of any granularity; the range of the target clamps them."""
    scales = np.float32([0.1, 3, 1e-20])
    eight = QuantParams(scales, [1, 2, 3], DType.INT8, -128, 127, PerAxis(1))
    four = QuantParams(scales, [1, 2, 3], I4, -8, 6, PerAxis(1))
    q = np.array([[-128, -8, -1], [6, 7, 127]], np.int8)
    np.testing.assert_array_equal(numerics.rescale(q, eight, four), np.clip(q, -8, 6))
    assert eight.same_map(four)
    assert not eight.same_grid(four)
    assert not eight.same_map(QuantParams(scales, [1, 2, 4], I4, -8, 7, PerAxis(1)))
