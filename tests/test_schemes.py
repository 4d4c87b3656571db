# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Every quantization scheme: symmetric and asymmetric; per tensor, per axis and per group.

Each is checked against its definition element by element, in exact arithmetic, and the rules that
scales must keep are checked by the verifier.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.errors import UsageError
from qcompiler.ir import Graph
from qcompiler.numerics import (
    Scheme,
    choose_weight_qparams,
    dequantize,
    expanded,
    quantize,
    storage_range,
)
from qcompiler.ops import Stage
from qcompiler.types import Array, DType, PerAxis, PerGroup, PerTensor, QuantParams, TensorType
from qcompiler.verifier import problems

STORAGE = {
    "symmetric": [DType.INT4, DType.INT8, DType.UINT8, DType.INT16],
    "asymmetric": [DType.UINT4, DType.INT4, DType.UINT8, DType.INT8],
}


@st.composite
def weights(draw: st.DrawFn) -> tuple[Array, int | None, int | None]:
    """An array, and the axis and group size of its scales."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=6))
    w = draw(hnp.arrays(np.float32, shape, elements=st.floats(-64, 64, width=32)))
    axis = draw(st.none() | st.integers(0, len(shape) - 1))
    if axis is None:
        return w, None, None
    sizes = [s for s in range(1, shape[axis] + 1) if shape[axis] % s == 0]
    return w, axis, draw(st.none() | st.sampled_from(sizes))


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@given(case=weights(), data=st.data())
def test_a_scheme_is_what_it_says(
    scheme: Scheme, case: tuple[Array, int | None, int | None], data: st.DataObject
) -> None:
    w, axis, group = case
    storage = data.draw(st.sampled_from(STORAGE[scheme]))
    narrow = scheme == "symmetric"
    q = choose_weight_qparams(
        w, axis=axis, group_size=group, storage=storage, scheme=scheme, narrow_range=narrow
    )
    want = PerTensor() if axis is None else PerAxis(axis)
    assert q.granularity == (want if group is None else PerGroup(axis or 0, group))
    codes = quantize(w, q)
    reals = dequantize(codes, q)
    assert codes.dtype == storage.numpy
    low, high = storage_range(storage, narrow_range=narrow)
    assert (q.qmin, q.qmax) == (low, high)
    if scheme == "symmetric":
        assert (q.zero_point == (0 if storage.min else 1 << (storage.bits - 1))).all()
    for index in np.ndindex(*w.shape):
        at: tuple[int, ...] = ()
        if axis is not None:
            at = (index[axis],)
        if axis is not None and group is not None:
            at = tuple(i // group if d == axis else i for d, i in enumerate(index))
        scale, zero = q.scale[at], int(q.zero_point[at])
        code = int(codes[index])
        assert low <= code <= high
        assert reals[index] == np.float32(code - zero) * scale
        # Within half a step: ranges were chosen to cover every element.
        error = abs(Fraction(float(w[index])) - (code - zero) * Fraction(float(scale)))
        assert error <= Fraction(float(scale)) * Fraction(51, 100) + Fraction(1, 1 << 120)
        if w[index] == 0:
            assert reals[index] == 0


@given(case=weights())
def test_scales_of_groups_of_everything_are_those_of_the_axis_reduced(
    case: tuple[Array, int | None, int | None],
) -> None:
    """One group along an axis holds all of it: a scale for each index of the other axes."""
    w, axis, _ = case
    axis = axis or 0
    q = choose_weight_qparams(w, axis=axis, group_size=w.shape[axis])
    top = np.abs(w.astype(np.float64)).max(axis=axis, keepdims=True) / 127
    scale = np.where(top < 2.0**-126, np.where(top > 0, 2.0**-126, 1.0), top)
    np.testing.assert_array_equal(q.scale, scale.astype(np.float32))


def test_the_last_group_may_be_shorter() -> None:
    scale = np.float32([[1, 2], [3, 4]])
    q = QuantParams(scale, np.int32([[0, 1], [2, 3]]), DType.INT8, -128, 127, PerGroup(1, 3))
    data = np.full((2, 5), 10, np.int8)
    factors, zeros = expanded(q, data.shape)
    np.testing.assert_array_equal(factors, [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]])
    np.testing.assert_array_equal(zeros, [[0, 0, 0, 1, 1], [2, 2, 2, 3, 3]])
    np.testing.assert_array_equal(dequantize(data, q), [[10, 10, 10, 18, 18], [24, 24, 24, 28, 28]])
    np.testing.assert_array_equal(quantize(dequantize(data, q), q), data)


def found(data: Array, q: QuantParams) -> list[str]:
    graph = Graph("g", Stage.QDQ)
    held = graph.constant(data.astype(q.storage.numpy), "w", q)
    graph.set_outputs([("y", graph.add("dequantize", [held]).output)])
    return problems(graph, Stage.QDQ)


def int8(scale: Array, granularity: PerAxis | PerGroup) -> QuantParams:
    return QuantParams(scale, np.int32(0), DType.INT8, -128, 127, granularity)


@pytest.mark.parametrize(
    ("q", "problem"),
    [
        (int8(np.ones(3, "f4"), PerAxis(1)), None),
        (int8(np.ones(2, "f4"), PerAxis(1)), "scales have shape [2], expected [3]"),
        (int8(np.ones(3, "f4"), PerAxis(2)), "axis 2 is outside a tensor of rank 2"),
        (int8(np.ones((4, 2), "f4"), PerGroup(1, 2)), None),
        (int8(np.ones((2, 3), "f4"), PerGroup(0, 2)), None),
        (int8(np.ones((4, 3), "f4"), PerGroup(0, 2)), "shape [4, 3], expected [2, 3]"),
        (int8(np.ones(3, "f4"), PerGroup(0, 4)), "shape [3], expected [1, 3]"),
    ],
)
def test_scales_that_do_not_fit_are_found(q: QuantParams, problem: str | None) -> None:
    got = found(np.zeros((4, 3)), q)
    assert (not got) if problem is None else problem in got[0]


def test_integers_beyond_their_storage_are_found() -> None:
    four = QuantParams(np.float32(1), np.int32(0), DType.INT4, -8, 7)
    assert not found(np.asarray([[-8, 7]]), four)
    assert "[-9, 7] do not fit int4" in found(np.asarray([[-9, 7]]), four)[0]


def test_a_group_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one element"):
        int8(np.ones((1, 1), "f4"), PerGroup(0, 0))


def test_groups_of_a_product_of_integers_run_along_what_it_sums() -> None:
    graph = Graph("g", Stage.INTEGER)
    unit = QuantParams(np.float32(1), np.int32(0), DType.UINT8, 0, 255)
    x = graph.add_input("x", TensorType((2, 4), DType.UINT8, unit))
    w = graph.constant(np.zeros((4, 4), np.int8), "w", int8(np.ones((4, 2), "f4"), PerGroup(1, 2)))
    node = graph.add("qmatmul", [x, w], types=[TensorType((2, 4), DType.FLOAT32)])
    graph.set_outputs([("y", node.output)])
    (problem,) = problems(graph, Stage.INTEGER)
    assert "has per_group(1,2) scales, expected groups along 0" in problem
