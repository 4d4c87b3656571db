# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of operators against exact fractions and slow integer loops."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from exact_arithmetic import any_qparams, clamp, exact, f32, qparams
from hypothesis import given
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.errors import UsageError
from qcompiler.types import DType, QuantParams
from qcompiler.windows import Geometry

# ------------------------------------------------------------------------------ accumulators


def slow_conv(x, w, xz, wz, g: Geometry, group: int, bias):
    """Convolution by Python integers, wrapped to int32 at the end."""
    n, _, *extents = x.shape
    o = w.shape[0]
    y = np.zeros((n, o, *g.outputs), np.int32)
    per = o // group
    for index in np.ndindex(n, o, *g.outputs):
        b, out, *at = index
        acc = 0 if bias is None else int(bias[out])
        for ci, *tap in itertools.product(range(w.shape[1]), *map(range, g.kernel)):
            place = [
                a * s + t * d - p[0]
                for a, s, t, d, p in zip(at, g.strides, tap, g.dilations, g.pads, strict=True)
            ]
            if all(0 <= p < e for p, e in zip(place, extents, strict=True)):
                c = out // per * w.shape[1] + ci
                v = int(x[(b, c, *place)]) - xz
                acc += v * (int(w[(out, ci, *tap)]) - int(np.broadcast_to(wz, o)[out]))
        y[index] = (acc + 2**31) % 2**32 - 2**31
    return y


@st.composite
def conv_cases(draw: st.DrawFn):
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    small = 5 if rank < 3 else 3
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilations = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    strides = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    pads = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(rank))
    extents = tuple(
        draw(st.integers(max(1, d * (k - 1) + 1 - b - e), max(1, d * (k - 1) + 1) + small))
        for k, d, (b, e) in zip(kernel, dilations, pads, strict=True)
    )
    group = draw(st.sampled_from([1, 1, 2, 3]))
    chans = group * draw(st.integers(1, 2))
    outs = group * draw(st.integers(1, 2))
    g = Geometry(extents, kernel, strides, pads, dilations)
    return g, group, chans, outs


@given(case=conv_cases(), seed=st.integers(0, 2**32 - 1), extreme=st.booleans())
def test_conv_accumulators_equal_integer_loops(case, seed, extreme):
    g, group, chans, outs = case
    r = np.random.default_rng(seed)
    x = r.integers(0, 256, (2, chans, *g.extents)).astype(np.uint8)
    w = r.integers(-128, 128, (outs, chans // group, *g.kernel)).astype(np.int8)
    if extreme:
        x = np.where(x < 128, 0, 255).astype(np.uint8)
        w = np.where(w < 0, -128, 127).astype(np.int8)
    xz, wz = int(r.integers(0, 256)), r.integers(-128, 128, outs).astype(np.int32)
    bias = r.integers(-(2**31), 2**31, outs).astype(np.int32) if seed % 2 else None
    got = numerics.accumulate_conv(x, w, xz, wz, g, group, bias)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, slow_conv(x, w, xz, wz, g, group, bias))


@given(
    m=st.integers(1, 4),
    k=st.integers(1, 40),
    n=st.integers(1, 4),
    wide=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_matmul_accumulators_equal_integer_loops(m, k, n, wide, seed):
    r = np.random.default_rng(seed)
    dtype = np.int16 if wide else np.uint8
    info = np.iinfo(dtype)
    a = r.integers(info.min, info.max + 1, (2, m, k)).astype(dtype)
    b = r.integers(info.min, info.max + 1, (k, n)).astype(dtype)
    az, bz = int(r.integers(info.min, info.max + 1)), r.integers(info.min, info.max + 1, n)
    bias = r.integers(-(2**31), 2**31, n).astype(np.int32)
    got = numerics.accumulate_matmul(a, b, az, bz, bias)
    exactly = (a.astype(object) - az) @ (b.astype(object) - bz) + bias.astype(object)
    expected = (exactly + 2**31) % 2**32 - 2**31
    assert (got == expected).all()


def test_accumulators_stay_exact_beyond_the_float32_integers():
    # The sum of these products is odd and above 2**24: float32 could not hold it.
    k = 4097
    a = np.full((1, k), 255, np.uint8)
    b = np.full((k, 1), 127, np.int8)
    assert numerics.accumulate_matmul(a, b, 0, 0)[0, 0] == 255 * 127 * k
    a16 = np.full((1, 3), -32768, np.int16)
    b16 = np.full((3, 1), -32768, np.int16)
    assert numerics.accumulate_matmul(a16, b16, 0, 0)[0, 0] == 3 * 2**30 - 2**32


# -------------------------------------------------------------- elementwise, means, softmax


def one_code(draw: st.DrawFn, q: QuantParams) -> int:
    return draw(st.integers(q.storage.min, q.storage.max))


@given(data=st.data(), aq=any_qparams(), bq=any_qparams(), y=any_qparams(), subtract=st.booleans())
def test_add_is_the_formula_in_exact_arithmetic(data, aq, bq, y, subtract):
    a, b = one_code(data.draw, aq), one_code(data.draw, bq)
    ma = exact(np.float32(np.float64(aq.s) / np.float64(y.s)))
    mb = exact(np.float32(np.float64(bq.s) / np.float64(y.s)))
    ta, tb = f32((a - aq.z) * ma), f32((b - bq.z) * mb)
    expected = clamp(round(f32(ta - tb if subtract else ta + tb)) + y.z, y)
    arrays = np.array([a], aq.storage.numpy), aq, np.array([b], bq.storage.numpy), bq
    assert int(numerics.add(*arrays, y, subtract=subtract)[0]) == expected
    real = numerics.add(*arrays, None, subtract=subtract)
    ta, tb = f32((a - aq.z) * exact(aq.s)), f32((b - bq.z) * exact(bq.s))
    assert exact(real[0]) == f32(ta - tb if subtract else ta + tb)


@given(data=st.data(), aq=any_qparams(), bq=any_qparams(), y=any_qparams())
def test_mul_is_the_formula_in_exact_arithmetic(data, aq, bq, y):
    a, b = one_code(data.draw, aq), one_code(data.draw, bq)
    product = ((a - aq.z) * (b - bq.z) + 2**31) % 2**32 - 2**31
    m = exact(np.float32(np.float64(aq.s) * np.float64(bq.s) / np.float64(y.s)))
    expected = clamp(round(f32(f32(Fraction(product)) * m)) + y.z, y)
    got = numerics.mul(np.array([a], aq.storage.numpy), aq, np.array([b], bq.storage.numpy), bq, y)
    assert int(got[0]) == expected


def test_average_pool_counts_per_window(rng):
    x = rng.integers(0, 256, (1, 2, 5, 5)).astype(np.uint8)
    xq, y = qparams(0.3, 11), qparams(0.2, 20)
    g = Geometry((5, 5), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1))
    for include in (False, True):
        got = numerics.average_pool(x, xq, g, y, count_include_pad=include)
        for c, i, j in np.ndindex(2, 3, 3):
            rows = range(max(0, 2 * i - 1), min(5, 2 * i + 2))
            cols = range(max(0, 2 * j - 1), min(5, 2 * j + 2))
            acc = sum(int(x[0, c, p, q]) - 11 for p in rows for q in cols)
            count = 9 if include else len(rows) * len(cols)
            m = np.float32(np.float64(xq.s) / (np.float64(y.s) * count))
            expected = clamp(round(f32(Fraction(acc) * exact(m))) + 20, y)
            assert int(got[0, c, i, j]) == expected


def test_average_pool_of_nothing_but_padding_is_zero():
    x = np.full((1, 1, 1), 200, np.uint8)
    g = Geometry((1,), (1,), (1,), ((1, 1),), (1,))
    y = numerics.average_pool(x, qparams(1.0, 0), g, qparams(1.0, 5), count_include_pad=False)
    assert y.tolist() == [[[5, 205, 5]]]


def test_reduce_mean_is_one_multiplier(rng):
    x = rng.integers(-128, 128, (2, 7, 7, 3)).astype(np.int8)
    xq, y = qparams(0.05, 4, DType.INT8), qparams(0.01, 100)
    got = numerics.reduce_mean(x, xq, (1, 2), y, keepdims=False)
    m = np.float32(np.float64(xq.s) / (np.float64(y.s) * 49))
    for n, c in np.ndindex(2, 3):
        acc = sum(int(v) - 4 for v in x[n, :, :, c].reshape(-1))
        assert int(got[n, c]) == clamp(round(f32(Fraction(acc) * exact(m))) + 100, y)


def test_softmax_table_holds_the_exponentials():
    table = numerics.softmax_table(0.1)
    assert table.dtype == np.int32
    assert table[0] == 2**20
    assert table.tolist() == [round(math.exp(-0.1 * d) * 2**20) for d in range(256)]


@pytest.mark.parametrize("storage", [DType.UINT8, DType.INT8])
def test_softmax_is_the_formula_and_close_to_the_real_one(rng, storage):
    xq = qparams(0.08, storage.min + 60, storage)
    y = qparams(1 / 256, 0)
    x = rng.integers(storage.min, storage.max + 1, (4, 50)).astype(storage.numpy)
    got = numerics.softmax(x, xq, -1, y)
    table = numerics.softmax_table(xq.s)
    for row, out in zip(x, got, strict=True):
        t = [int(table[int(row.max()) - int(v)]) for v in row]
        r = f32(exact(np.float32(256.0)) / f32(Fraction(sum(t))))
        assert out.tolist() == [clamp(round(f32(f32(Fraction(v)) * r)), y) for v in t]
    reals = np.exp(numerics.dequantize(x, xq).astype(np.float64))
    reals /= reals.sum(axis=1, keepdims=True)
    assert np.abs(got / 256 - reals).max() <= 0.51 / 256 + 1e-4


def test_softmax_of_a_long_uniform_row_does_not_overflow():
    x = np.zeros((1, 5000), np.uint8)
    real = numerics.softmax(x, qparams(0.1, 0), -1, None)
    np.testing.assert_allclose(real, 1 / 5000, rtol=1e-6)


@pytest.mark.parametrize("storage", [DType.UINT8, DType.INT8, DType.INT16])
def test_layer_norm_is_the_formula_and_close_to_the_real_one(rng, storage):
    depth = 96
    x = rng.integers(storage.min, storage.max + 1, (3, depth)).astype(storage.numpy)
    x[2] = storage.max  # no variance at all
    xq, y = qparams(0.01, 3, storage), qparams(0.03, 120)
    gamma = rng.normal(size=depth).astype(np.float32)
    beta = rng.normal(size=depth).astype(np.float32)
    real = numerics.layer_norm(x, xq, gamma, beta, 1e-5, None)
    for row, out in zip(x, real, strict=True):
        c1 = sum(int(v) for v in row)
        spread = depth * sum(int(v) ** 2 for v in row) - c1 * c1
        s2 = exact(np.float32(np.float64(xq.s) ** 2 / depth**2))
        v = f32(f32(f32(Fraction(spread)) * s2) + exact(np.float32(1e-5)))
        root = np.float32(1) / np.sqrt(np.float32(float(v)))
        k = f32(exact(root) * exact(np.float32(np.float64(xq.s) / depth)))
        for j in range(depth):
            t = f32(f32(Fraction(depth * int(row[j]) - c1)) * k)
            expected = f32(f32(t * exact(gamma[j])) + exact(beta[j]))
            assert exact(out[j]) == expected
    np.testing.assert_array_equal(
        numerics.layer_norm(x, xq, gamma, beta, 1e-5, y), numerics.quantize(real, y)
    )
    f = numerics.dequantize(x, xq).astype(np.float64)
    d = f - f.mean(axis=1, keepdims=True)
    ideal = d / np.sqrt((d * d).mean(axis=1, keepdims=True) + 1e-5) * gamma + beta
    np.testing.assert_allclose(real, ideal, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", [DType.UINT8, DType.INT8])
def test_table_equals_the_function_on_every_code(storage):
    xq, y = qparams(0.05, storage.min + 128, storage), qparams(0.02, 3)
    entries = numerics.table_entries(np.tanh, xq, y)
    codes = numerics.codes(storage)
    assert len(codes) == 256
    expected = numerics.quantize(np.tanh(numerics.dequantize(codes, xq)), y)
    np.testing.assert_array_equal(numerics.lookup(codes, entries), expected)
    assert numerics.table_entries(np.tanh, xq, None).dtype == np.float32


def test_tables_of_wide_storage_are_refused():
    with pytest.raises(UsageError, match="int16 has too many values for a table"):
        numerics.codes(DType.INT16)
