# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Activations quantized at run time: scales, integers and products as they are defined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.errors import ShapeError
from qcompiler.ir import Graph
from qcompiler.numerics import MIN_SCALE
from qcompiler.numerics_dynamic import (
    Per,
    blocked_result,
    blocked_weights,
    dynamic_quantize,
    dynamic_result,
    dynamic_scale,
)
from qcompiler.types import Array, DType, PerAxis, PerGroup, QuantParams, TensorType

floats = st.floats(-(2.0**100), 2.0**100, width=32)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3), elements=floats)


@given(x=matrices, per=st.sampled_from(["row", "tensor"]))
def test_integers_stand_for_the_reals_within_half_a_step(x: Array, per: Per) -> None:
    q, s = dynamic_quantize(x, per, 0, np.int8)
    assert q.shape == x.shape
    assert s.shape == ((*x.shape[:-1], 1) if per == "row" else ())
    assert q.min() >= -127
    error = np.abs(q.astype(np.float64) * s - x.astype(np.float64))
    assert (error <= 0.5001 * s.astype(np.float64)).all()
    largest = np.abs(x) == np.abs(x).max(axis=-1 if per == "row" else None, keepdims=True)
    assert (np.abs(q[largest & (np.abs(x) > 1e-30)]) == 127).all()


@given(x=matrices, zero_point=st.integers(0, 255))
def test_a_zero_point_only_shifts(x: Array, zero_point: int) -> None:
    plain, s = dynamic_quantize(x, "row", 0, np.int32)
    moved, t = dynamic_quantize(x, "row", zero_point, np.int32)
    np.testing.assert_array_equal(moved, plain + zero_point)
    np.testing.assert_array_equal(s, t)


def test_rows_of_zeros_and_of_nan_get_the_least_scale() -> None:
    x = np.asarray([[0, 0], [np.nan, np.nan], [np.nan, 2]], np.float32)
    q, s = dynamic_quantize(x, "row", 0, np.int8)
    assert s[0] == s[1] == np.float32(MIN_SCALE)
    assert s[2] == np.float32(2) / np.float32(127)
    np.testing.assert_array_equal(q, [[0, 0], [-127, -127], [-127, 127]])
    assert dynamic_scale(x, "tensor") == s[2]


def test_the_result_is_rounded_after_each_product() -> None:
    acc = np.asarray([[16777217, -3]], np.int32)
    row, column = np.float32([[0.1]]), np.float32([0.3, 0.7])
    got = dynamic_result(acc, row, column)
    scale = np.float32(row[0, 0] * column[0])
    assert got[0, 0] == np.float32(np.float32(16777216) * scale)
    assert got.dtype == np.float32


@given(
    blocks=st.integers(1, 4), size=st.integers(1, 8), seed=st.integers(0, 2**32 - 1),
    zero_point=st.sampled_from([0, 128]),
)  # fmt: skip
def test_blocks_are_rows_of_their_own(blocks: int, size: int, seed: int, zero_point: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3, blocks * size)).astype(np.float32)
    q, s = dynamic_quantize(x, "block", zero_point, np.uint8, size)
    rows, t = dynamic_quantize(x.reshape(2, 3, blocks, size), "row", zero_point, np.uint8)
    np.testing.assert_array_equal(q, rows.reshape(x.shape))
    np.testing.assert_array_equal(s, t[..., 0])


@pytest.mark.parametrize("storage", [DType.INT4, DType.UINT4, DType.INT8, DType.UINT8])
@pytest.mark.parametrize("biased", [False, True])
def test_products_in_blocks_add_up_in_order(storage: DType, biased: bool) -> None:
    rng = np.random.default_rng(storage.bits)
    n, k, size = 5, 12, 4
    codes = rng.integers(storage.min, storage.max + 1, (n, k))
    zero = rng.integers(storage.min, storage.max + 1, (n, k // size))
    scale = rng.uniform(0.01, 0.1, (n, k // size)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if biased else None
    a, own = dynamic_quantize(rng.standard_normal((3, k)), "block", 128, np.uint8, size)
    grid = QuantParams(scale, zero, storage, storage.min, storage.max, PerGroup(1, size))
    held, q = blocked_weights(codes, grid)
    assert held.dtype == np.int8
    assert q.granularity == PerGroup(0, size)
    got = blocked_result(a, held, 128, q.zero_point, own, q.scale, bias)
    for i in range(3):
        for j in range(n):
            t = np.float32(0) if bias is None else bias[j]
            for g in range(k // size):
                at = slice(g * size, (g + 1) * size)
                acc = int(((a[i, at].astype(int) - 128) * (codes[j, at] - zero[j, g])).sum())
                t = np.float32(t + np.float32(acc) * np.float32(own[i, g] * scale[j, g]))
            assert got[i, j] == t
    other = QuantParams(scale.T, zero.T, storage, storage.min, storage.max, PerGroup(0, size))
    same, again = blocked_weights(codes.T, other)
    np.testing.assert_array_equal(same, held)
    assert again == q


UNIT = QuantParams(np.float32(1), np.int32(0), DType.INT8, -127, 127)


GROUPS = QuantParams(
    np.ones((2, 2), np.float32), np.ones((2, 2), np.int32), DType.INT8, -127, 127, PerGroup(0, 2)
)


def product(graph: Graph, **changes: TensorType) -> None:
    """Add a product of [3, 4] by [4, 2] with some operand of another type."""
    columns = QuantParams(
        np.full(2, 0.1, np.float32), np.zeros(2, np.int32), DType.INT8, -127, 127, PerAxis(1)
    )
    types = {
        "a": TensorType((3, 4), DType.INT8, UNIT),
        "b": TensorType((4, 2), DType.INT8, columns),
        "scale": TensorType((3, 1), DType.FLOAT32),
        "bias": TensorType((2,), DType.FLOAT32),
        "residual": TensorType((3, 2), DType.FLOAT32),
        **changes,
    }
    graph.add("dynamic_matmul", [graph.add_input(name, t) for name, t in types.items()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": TensorType((3, 4), DType.FLOAT32)}, "expected a quantized tensor"),
        (
            {"a": TensorType((3, 4), DType.INT16, QuantParams(
                np.float32(1), np.int32(0), DType.INT16, -127, 127))},
            "8-bit integers of scale 1",
        ),
        ({"b": TensorType((4, 2), DType.INT8)}, "expected a quantized tensor"),
        ({"b": TensorType((1, 4, 2), DType.INT8, UNIT)}, "expected an int8 matrix"),
        (
            {"b": TensorType((4, 2), DType.INT8, QuantParams(
                np.float32(1), np.int32(3), DType.INT8, -127, 127))},
            "has zero points",
        ),
        ({"scale": TensorType((3,), DType.FLOAT32)}, "one float32 per row"),
        ({"b": TensorType((4, 2), DType.INT8, GROUPS)}, "one float32 per 2 neighbours per row"),
        (
            {"b": TensorType((4, 2), DType.INT8, QuantParams(
                np.ones((4, 1), "f4"), np.zeros((4, 1)), DType.INT8, -127, 127, PerGroup(1, 2)))},
            "expected groups along 0",
        ),
        ({"bias": TensorType((2,), DType.INT32)}, "'bias' is int32"),
        ({"bias": TensorType((3,), DType.FLOAT32)}, "expected \\[2\\]"),
        ({"residual": TensorType((3, 1), DType.FLOAT32)}, "'residual' has shape"),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_are_refused(changes: dict[str, TensorType], message: str) -> None:
    product(Graph("fits"))
    with pytest.raises(ShapeError, match=message):
        product(Graph("wrong"), **changes)


def test_how_rows_are_quantized_is_checked() -> None:
    graph = Graph("g")
    x = graph.add_input("x", TensorType((2, 3), DType.FLOAT32))
    with pytest.raises(ShapeError, match="expected 'row', 'tensor' or 'block'"):
        graph.add("dynamic_quantize", [x], {"per": "column"})
    for block in (0, 2):
        with pytest.raises(ShapeError, match=f"blocks of {block} do not divide rows of 3"):
            graph.add("dynamic_quantize", [x], {"per": "block", "block": block})
    half = graph.add_input("h", TensorType((2, 3), DType.FLOAT16))
    with pytest.raises(ShapeError, match="float32 of rank 1"):
        graph.add("dynamic_quantize", [half])
