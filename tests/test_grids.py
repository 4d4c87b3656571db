# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Simpler quantizations say what the given ones say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.grids import found_grid, varying, without_blocks
from qcompiler.numerics import expanded
from qcompiler.ops.movement import reshaped_grid
from qcompiler.types import (
    Array,
    DType,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    QuantParams,
    TensorType,
)


def full(q: QuantParams, shape: tuple[int, ...]) -> list[Array]:
    return [np.broadcast_to(a, shape) for a in expanded(q, shape)]


def grid(scale: Array, zero: Array, by: Granularity) -> QuantParams:
    return QuantParams(scale, zero, DType.INT8, -128, 127, by)


@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    data=st.data(),
    seed=st.integers(0, 10**6),
)
def test_scales_in_blocks_become_the_fewest(
    shape: list[int], data: st.DataObject, seed: int
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    size = data.draw(st.integers(1, shape[axis] + 1))
    rng = np.random.default_rng(seed)
    by = [-(-d // size) if i == axis else d for i, d in enumerate(shape)]
    varied = [d if data.draw(st.booleans()) else 1 for d in by]
    scale = np.broadcast_to(rng.uniform(0.5, 1, varied).astype(np.float32), by)
    zero = np.broadcast_to(rng.integers(-9, 9, varied if seed % 2 else 1), by)
    q = grid(scale, zero, PerGroup(axis, size))
    want = full(q, tuple(shape))
    granularity, s, z = found_grid(*want)
    found = grid(s, z, granularity)
    simpler = without_blocks(q)
    for got in (found, simpler):
        for a, b in zip(full(got, tuple(shape)), want, strict=True):
            np.testing.assert_array_equal(a, b)
    axes = {*varying(want[0]), *varying(want[1])}
    assert isinstance(found.granularity, PerTensor) == (not axes)
    assert isinstance(found.granularity, PerAxis) == (len(axes) == 1)
    assert found.scale.size <= q.scale.size or len(axes) == 1
    assert simpler.scale.size <= q.scale.size


@pytest.mark.parametrize(
    ("axis", "shape", "want"),
    [
        (0, (2, 12), PerAxis(0)),
        (0, (6, 4), PerAxis(0)),
        (1, (6, 4), PerAxis(0)),
        (2, (6, 4), PerAxis(1)),
        (2, (2, 12), PerAxis(1)),
        (1, (2, 12), PerAxis(1)),
        (1, (2, 3, 2, 2), PerAxis(1)),
        (0, (3, 8), None),
        (2, (12, 2), None),
    ],
)
def test_reshapes_keep_scales_along_an_axis(
    axis: int, shape: tuple[int, ...], want: Granularity | None
) -> None:
    x = (2, 3, 4)
    scale = np.arange(1, x[axis] + 1).astype(np.float32)
    q = grid(scale, np.arange(x[axis]), PerAxis(axis))
    found = reshaped_grid(TensorType(x, DType.INT8, q), shape)
    assert (None if found is None else found.granularity) == want
    if found is not None:
        for a, b in zip(full(found, shape), full(q, x), strict=True):
            np.testing.assert_array_equal(a, b.reshape(shape))


def test_no_axis_has_the_scales_of_one_that_is_not_quantized_so() -> None:
    assert reshaped_grid(TensorType((2, 3), DType.FLOAT32), (6,)) is None
    q = grid(np.float32(1), np.int32(0), PerTensor())
    assert reshaped_grid(TensorType((2, 3), DType.INT8, q), (6,)) is None
