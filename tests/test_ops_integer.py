# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Integer operators against integer loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import ours, qp, u8, windows

from qcompiler import numerics
from qcompiler.ops import Stage
from qcompiler.types import DType, PerAxis, QuantParams, TensorType


@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_qconv_is_the_accumulator_and_the_epilogue(data, seed):
    kernel, strides, pads, dilations, extents = data.draw(windows(2))
    group = data.draw(st.sampled_from([1, 2]))
    r = np.random.default_rng(seed)
    chans, outs = 2 * group, 3 * group
    x = r.integers(0, 256, (2, chans, *extents)).astype(np.uint8)
    w = r.integers(-128, 128, (outs, chans // group, *kernel)).astype(np.int8)
    bias = r.integers(-(10**5), 10**5, outs).astype(np.int32)
    xq = qp(0.02, 131)
    sw = r.uniform(0.001, 0.1, outs).astype(np.float32)
    wq = QuantParams(sw, r.integers(-3, 4, outs), DType.INT8, -128, 127, PerAxis(0))
    attrs = {"strides": strides, "pads": pads, "dilations": dilations, "group": group}
    # The same accumulators from a float64 convolution, exact at this size.
    reals = x.astype(np.float64) - xq.z, w - wq.zero_point.reshape(-1, 1, 1, 1).astype(np.float64)
    acc = ours("conv", list(reals), attrs)[0] + bias.reshape(-1, 1, 1)
    res = r.integers(0, 256, acc.shape).astype(np.uint8)
    rq, yq = qp(0.3, 77), qp(0.5, 100).clamped(100, 220)
    m = (np.float64(xq.s) * sw.astype(np.float64) / yq.s).astype(np.float32).reshape(-1, 1, 1)
    t = acc.astype(np.int32).astype(np.float32) * m
    tr = (res.astype(np.int32) - 77).astype(np.float32) * np.float32(np.float64(rq.s) / yq.s)
    expected = np.clip(np.rint(t + tr).astype(np.int64) + 100, 100, 220).astype(np.uint8)
    types = [xq, wq, None, rq]
    got = ours(
        "qconv",
        [x, w, bias, res],
        attrs,
        qparams=types,
        result=u8(*acc.shape, q=yq),
        stage=Stage.INTEGER,
    )
    np.testing.assert_array_equal(got[0], expected)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    expected = np.ascontiguousarray(np.moveaxis(expected, 1, -1))
    got = ours(
        "qconv",
        [last, w, bias, np.ascontiguousarray(np.moveaxis(res, 1, -1))],
        {**attrs, "layout": "NHWC"},
        qparams=types,
        result=u8(*expected.shape, q=yq),
        stage=Stage.INTEGER,
    )
    np.testing.assert_array_equal(got[0], expected)
    real = ours("qconv", [x, w, bias], attrs, qparams=types, stage=Stage.INTEGER)[0]
    factor = (np.float64(xq.s) * sw.astype(np.float64)).astype(np.float32).reshape(-1, 1, 1)
    np.testing.assert_array_equal(real, acc.astype(np.float32) * factor)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_qmatmul_with_constant_weights(transpose, signed, rng):
    storage = DType.INT8 if signed else DType.UINT8
    a = rng.integers(storage.min, storage.max + 1, (2, 3, 40)).astype(storage.numpy)
    b = rng.integers(-128, 128, (40, 5)).astype(np.int8)
    bias = rng.integers(-1000, 1000, 5).astype(np.int32)
    aq, yq = qp(0.02, storage.min + 100, storage), qp(0.4, 128)
    sw = rng.uniform(0.001, 0.1, 5).astype(np.float32)
    axis = 0 if transpose else 1
    bq = QuantParams(sw, np.zeros(5, int), DType.INT8, -128, 127, PerAxis(axis))
    acc = (a.astype(np.int64) - aq.z) @ b.astype(np.int64) + bias
    m = (np.float64(aq.s) * sw.astype(np.float64) / yq.s).astype(np.float32)
    t = np.rint(acc.astype(np.int32).astype(np.float32) * m).astype(np.int64)
    weights = np.ascontiguousarray(b.T) if transpose else b
    got = ours(
        "qmatmul",
        [a, weights, bias],
        {"transpose_b": transpose},
        qparams=[aq, bq],
        result=u8(2, 3, 5, q=yq),
        stage=Stage.INTEGER,
    )
    np.testing.assert_array_equal(got[0], np.clip(t + 128, 0, 255).astype(np.uint8))


def test_qmatmul_of_two_activations_broadcasts(rng):
    a = rng.integers(0, 256, (2, 1, 3, 16)).astype(np.uint8)
    b = rng.integers(0, 256, (4, 5, 16)).astype(np.uint8)
    aq, bq, yq = qp(0.02, 128), qp(0.03, 99), qp(0.2, 111)
    acc = (a.astype(np.int64) - 128) @ (np.swapaxes(b, 1, 2).astype(np.int64) - 99)
    m = np.float32(np.float64(aq.s) * np.float64(bq.s) / yq.s)
    t = np.rint(acc.astype(np.float32) * m).astype(np.int64) + 111
    got = ours(
        "qmatmul",
        [a, b],
        {"transpose_b": True},
        qparams=[aq, bq],
        result=u8(2, 4, 3, 5, q=yq),
        stage=Stage.INTEGER,
    )
    np.testing.assert_array_equal(got[0], np.clip(t, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", ["qadd", "qsub", "qmul"])
def test_integer_binary_operators_broadcast(name, rng):
    a = rng.integers(0, 256, (2, 3, 4)).astype(np.uint8)
    b = rng.integers(-(2**15), 2**15, (3, 1)).astype(np.int16)
    aq, bq, yq = qp(0.02, 128), qp(0.0003, 5, DType.INT16), qp(0.05, 128)
    if name == "qmul":
        want = numerics.mul(a, aq, b, bq, yq)
    else:
        want = numerics.add(a, aq, b, bq, yq, subtract=name == "qsub")
    got = ours(name, [a, b], qparams=[aq, bq], result=u8(2, 3, 4, q=yq), stage=Stage.INTEGER)
    np.testing.assert_array_equal(got[0], want)
    fa, fb = numerics.dequantize(a, aq), numerics.dequantize(b, bq)
    real = {"qadd": fa + fb, "qsub": fa - fb, "qmul": fa * fb}[name]
    inside = np.abs(real) < 6
    assert np.abs(numerics.dequantize(got[0], yq) - real)[inside].max() <= 0.0251


@pytest.mark.parametrize("storage", [DType.UINT8, DType.INT8])
def test_table_looks_every_code_up(storage, rng):
    xq, yq = qp(0.05, storage.min + 128, storage), qp(0.01, 10)
    x = numerics.codes(storage)
    for entries, result in (
        (rng.integers(0, 256, 256).astype(np.uint8), TensorType((256,), DType.UINT8, yq)),
        (rng.normal(size=256).astype(np.float32), TensorType((256,), DType.FLOAT32)),
    ):
        got = ours("table", [x, entries], qparams=[xq, None], result=result, stage=Stage.INTEGER)
        np.testing.assert_array_equal(got[0], entries)


def test_integer_pooling_equals_numerics_in_both_layouts(rng):
    x = rng.integers(0, 256, (2, 3, 7, 6)).astype(np.uint8)
    xq, yq = qp(0.05, 30), qp(0.06, 40)
    attrs = {
        "kernel": (3, 2),
        "strides": (2, 2),
        "pads": (1, 1, 1, 0),
        "dilations": (1, 1),
        "ceil_mode": True,
        "count_include_pad": False,
    }
    real = ours("average_pool", [numerics.dequantize(x, xq)], attrs)[0]
    shape = real.shape
    first = ours(
        "qaverage_pool", [x], attrs, qparams=[xq], result=u8(*shape, q=yq), stage=Stage.INTEGER
    )[0]
    assert np.abs(numerics.dequantize(first, yq) - real).max() <= 0.0301
    last = ours(
        "qaverage_pool",
        [np.ascontiguousarray(x.transpose(0, 2, 3, 1))],
        {**attrs, "layout": "NHWC"},
        qparams=[xq],
        result=u8(shape[0], *shape[2:], shape[1], q=yq),
        stage=Stage.INTEGER,
    )[0]
    np.testing.assert_array_equal(last.transpose(0, 3, 1, 2), first)
    mean = ours(
        "qreduce_mean",
        [x],
        {"axes": (2, 3), "keepdims": False},
        qparams=[xq],
        result=u8(2, 3, q=yq),
        stage=Stage.INTEGER,
    )[0]
    np.testing.assert_array_equal(mean, numerics.reduce_mean(x, xq, (2, 3), yq, keepdims=False))


def test_integer_softmax_and_layer_norm_call_numerics(rng):
    x = rng.integers(0, 256, (2, 5, 8)).astype(np.uint8)
    xq, yq = qp(0.05, 30), qp(1 / 256, 0)
    got = ours(
        "qsoftmax", [x], {"axis": 1}, qparams=[xq], result=u8(2, 5, 8, q=yq), stage=Stage.INTEGER
    )
    np.testing.assert_array_equal(got[0], numerics.softmax(x, xq, 1, yq))
    gamma, beta = rng.normal(size=(2, 8)).astype(np.float32)
    yq = qp(0.03, 120)
    got = ours(
        "qlayer_norm",
        [x, gamma, beta],
        {"epsilon": 1e-3},
        qparams=[xq],
        result=u8(2, 5, 8, q=yq),
        stage=Stage.INTEGER,
    )
    np.testing.assert_array_equal(got[0], numerics.layer_norm(x, xq, gamma, beta, 1e-3, yq))
