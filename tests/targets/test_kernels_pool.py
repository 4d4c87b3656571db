# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.errors import CodegenError
from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.targets.kernels.harness import build, run
from qcompiler.targets.kernels.pool import (
    Averaging,
    PoolWorkload,
    ReduceWorkload,
    average_pool,
    max_pool,
    pack_counts,
    reduce,
)
from qcompiler.targets.kernels.window import Window
from qcompiler.types import DType, QuantParams
from qcompiler.windows import Geometry, padded, taps

# The AVX-VNNI row adds only a dot product, so here it makes the code of the AVX2 row.
ROWS = [row for row in ISA_TABLE.values() if runnable(row) and row.name != "x86-avxvnni"]
LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-32768, 32767)}
F = np.float32
rows = pytest.mark.parametrize("isa", ROWS, ids=lambda row: row.name)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    kernel = tuple(draw(st.sampled_from([1, 2, 3, 3, 5, 7])) for _ in range(2))
    dilations = tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(2))
    return Geometry(
        tuple(
            (k - 1) * d + 1 + draw(st.integers(0, 9))
            for k, d in zip(kernel, dilations, strict=True)
        ),
        kernel,
        tuple(draw(st.integers(1, 3)) for _ in range(2)),
        tuple((draw(st.integers(0, k - 1)), draw(st.integers(0, k - 1))) for k in kernel),
        dilations,
        draw(st.booleans()),
    )


def window_of(g: Geometry, n: int) -> Window:
    (top, bottom), (left, right) = g.pads
    return Window(
        n, g.extents, g.outputs, g.kernel, g.strides, (top, left, bottom, right), g.dilations
    )


def draw_input(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype == "float32":
        return rng.normal(size=shape).astype(F)
    return rng.integers(*LIMITS[dtype], shape, endpoint=True).astype(dtype)


def qparams(rng: np.random.Generator, dtype: str, scale: float) -> QuantParams:
    low, high = LIMITS[dtype]
    zero = int(rng.integers(low, high, endpoint=True))
    return QuantParams(F(scale), zero, DType(dtype), low, high)


def averaging_of(source: QuantParams, out: str, target: QuantParams | None) -> Averaging:
    if target is None:
        return Averaging(source.z, out, source.s)
    return Averaging(source.z, out, source.s, target.s, target.z, target.qmin, target.qmax)


channels = st.sampled_from([1, 3, 16, 20, 64, 72])
seeds = st.integers(0, 2**31)


@rows
@settings(max_examples=6, deadline=None)
@given(g=geometries(), c=channels, dtype=st.sampled_from([*LIMITS, "float32"]), seed=seeds)
def test_max_pool(isa, g, c, dtype, seed):
    rng = np.random.default_rng(seed)
    w = PoolWorkload(window_of(g, 2), c, dtype)
    x = draw_input(rng, w.in_shape, dtype)
    lowest = -np.inf if dtype == "float32" else LIMITS[dtype][0]
    first = padded(x.transpose(0, 3, 1, 2), g, lowest)
    want = np.max([view for _, view in taps(first, g)], axis=0).transpose(0, 2, 3, 1)
    got = run(build(max_pool(w, isa), isa), x, shape=w.out_shape, dtype=dtype)
    np.testing.assert_array_equal(got, want)


@rows
@settings(max_examples=6, deadline=None)
@given(
    g=geometries(),
    c=channels,
    dtype=st.sampled_from([*LIMITS]),
    out=st.sampled_from([*LIMITS, "float32"]),
    include=st.booleans(),
    seed=seeds,
)
def test_quantized_average_pool_equals_the_definition(isa, g, c, dtype, out, include, seed):
    rng = np.random.default_rng(seed)
    source = qparams(rng, dtype, 0.31)
    target = None if out == "float32" else qparams(rng, out, 0.17)
    averaging = averaging_of(source, out, target)
    w = PoolWorkload(window_of(g, 1), c, dtype, averaging, include)
    x = draw_input(rng, w.in_shape, dtype)
    want = numerics.average_pool(
        x.transpose(0, 3, 1, 2), source, g, target, count_include_pad=include
    ).transpose(0, 2, 3, 1)
    library = build(average_pool(w, isa), isa)
    got = run(library, x, pack_counts(w), shape=w.out_shape, dtype=out)
    np.testing.assert_array_equal(got, want)


@rows
@settings(max_examples=3, deadline=None)
@given(g=geometries(), c=channels, seed=seeds)
def test_float_average_pool(isa, g, c, seed):
    rng = np.random.default_rng(seed)
    w = PoolWorkload(window_of(g, 1), c, "float32")
    x = draw_input(rng, w.in_shape, "float32")
    ones = PoolWorkload(window_of(g, 1), c, "uint8", Averaging(0, "float32", 1.0))
    # The integer kernel of the rounded input is the reference: it was checked above.
    coarse = np.rint(x * 20).clip(-100, 100)
    want = run(
        build(average_pool(ones, isa), isa), (coarse + 128).astype(np.uint8), pack_counts(ones),
        shape=w.out_shape, dtype="float32",
    )  # fmt: skip
    library = build(average_pool(w, isa), isa)
    got = run(library, (coarse + 128).astype(F), pack_counts(w), shape=w.out_shape, dtype="float32")
    np.testing.assert_allclose(got, want, rtol=1e-5)


@rows
@settings(max_examples=6, deadline=None)
@given(
    extents=st.tuples(
        st.integers(1, 3), st.integers(1, 300), st.sampled_from([1, 1, 3, 16, 40, 130])
    ),
    dtype=st.sampled_from([*LIMITS]),
    out=st.sampled_from([*LIMITS, "float32"]),
    seed=seeds,
)
def test_quantized_mean_equals_the_definition(isa, extents, dtype, out, seed):
    rng = np.random.default_rng(seed)
    source = qparams(rng, dtype, 0.31)
    target = None if out == "float32" else qparams(rng, out, 0.17)
    averaging = averaging_of(source, out, target)
    x = draw_input(rng, extents, dtype)
    outer, reduced, inner = extents
    w = ReduceWorkload("mean", extents, (outer, inner), outer, reduced, inner, dtype, averaging)
    got = run(build(reduce(w, isa), isa), x, shape=(outer, inner), dtype=out)
    want = numerics.reduce_mean(x, source, (1,), target, keepdims=False)
    np.testing.assert_array_equal(got, want)


@rows
@pytest.mark.parametrize("operation", ["mean", "sum", "max", "min"])
@pytest.mark.parametrize("extents", [(3, 100, 1), (2, 49, 72)])
def test_float_reductions(isa, operation, extents):
    x = np.random.default_rng(0).normal(size=extents).astype(F)
    outer, reduced, inner = extents
    w = ReduceWorkload(operation, extents, (outer, inner), outer, reduced, inner, "float32")
    got = run(build(reduce(w, isa), isa), x, shape=(outer, inner), dtype="float32")
    want = getattr(x.astype(np.float64), operation)(axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@rows
@pytest.mark.parametrize("operation", ["max", "min"])
def test_integer_extremes(isa, operation):
    x = draw_input(np.random.default_rng(0), (3, 77, 20), "int8")
    w = ReduceWorkload(operation, x.shape, (3, 20), 3, 77, 20, "int8")
    got = run(build(reduce(w, isa), isa), x, shape=(3, 20), dtype="int8")
    np.testing.assert_array_equal(got, getattr(x, operation)(axis=1))


def test_rejections():
    isa = ISA_TABLE["x86-64"]
    with pytest.raises(CodegenError, match="window: extents, strides and dilations must be >= 1"):
        Window(1, (4, 4), (4, 4), (3, 0))
    with pytest.raises(CodegenError, match="reduce: extents do not fit the shapes"):
        reduce(ReduceWorkload("max", (2, 3), (2,), 2, 4, 1, "int8"), isa)
    with pytest.raises(CodegenError, match="reduce: expected mean, sum, max or min, got 'prod'"):
        reduce(ReduceWorkload("prod", (2, 3), (2,), 2, 3, 1, "float32"), isa)
