# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Window geometry against counting."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.windows import Geometry, correlate, counts, padded, taps, windows


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    rank = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilations = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    pads = tuple((draw(st.integers(0, k - 1)), draw(st.integers(0, k - 1))) for k in kernel)
    extents = tuple(
        max(1, d * (k - 1) + 1 - b - e) + draw(st.integers(0, 6))
        for k, d, (b, e) in zip(kernel, dilations, pads, strict=True)
    )
    strides = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    return Geometry(extents, kernel, strides, pads, dilations, draw(st.booleans()))


@given(g=geometries())
def test_windows_start_inside_and_hang_over_only_in_ceil_mode(g):
    for n, k, s, (b, e), d, o, hang in zip(
        g.extents, g.kernel, g.strides, g.pads, g.dilations, g.outputs, g.hang, strict=True
    ):
        span = d * (k - 1) + 1
        starts = [
            i
            for i in range(0, n + b + e, s)
            if i + span <= n + b + e
            or (g.ceil_mode and i < n + b and i - s + span < n + b + e and i > 0)
        ]
        assert o == len(starts)
        assert hang == max(0, starts[-1] + span - (n + b + e))
        assert g.ceil_mode or hang == 0


@given(g=geometries(), include=st.booleans())
def test_counts_are_the_elements_under_each_window(g, include):
    got = counts(g, include_pad=include)
    for at in np.ndindex(*g.outputs):
        total = 0
        for tap in itertools.product(*map(range, g.kernel)):
            place = [
                a * s + t * d for a, s, t, d in zip(at, g.strides, tap, g.dilations, strict=True)
            ]
            inside = [
                0 <= p < n + b + e if include else b <= p < n + b
                for p, n, (b, e) in zip(place, g.extents, g.pads, strict=True)
            ]
            total += all(inside)
        assert got[at] == total


@given(g=geometries())
def test_taps_and_windows_see_the_same_elements(g):
    x = np.arange(2 * 3 * np.prod(g.extents), dtype=np.int64).reshape(2, 3, *g.extents)
    view = windows(padded(x, g, -1), g)
    assert view.shape == (2, 3, *g.outputs, *g.kernel)
    for index, tap in taps(padded(x, g, -1), g):
        np.testing.assert_array_equal(view[(..., *index)], tap)


@given(g=geometries(), seed=st.integers(0, 2**32 - 1))
def test_depthwise_and_dense_correlation_agree(g, seed):
    r = np.random.default_rng(seed)
    x = padded(r.integers(-9, 9, (2, 4, *g.extents)).astype(np.float64), g, 0)
    w = r.integers(-9, 9, (8, 1, *g.kernel)).astype(np.float64)
    dense = np.zeros((8, 4, *g.kernel))
    for o in range(8):
        dense[o, o // 2] = w[o, 0]
    np.testing.assert_array_equal(correlate(x, w, g, 4), correlate(x, dense, g, 1))


def test_a_pointwise_window_is_recognised():
    assert Geometry((3,), (1,), (1,), ((0, 0),), (1,)).is_pointwise
    assert not Geometry((3,), (1,), (2,), ((0, 0),), (1,)).is_pointwise
    assert not Geometry((3,), (1,), (1,), ((1, 0),), (1,)).is_pointwise
