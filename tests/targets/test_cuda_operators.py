# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Every other CUDA kernel on the emulated GPU: integers equal, floats within rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_emulator import emulator

from qcompiler.errors import DataError, UnsupportedByTargetError
from qcompiler.interpreter import run
from qcompiler.ir import Graph, Value
from qcompiler.ops import Stage, all_ops
from qcompiler.targets.base import VIEWS
from qcompiler.targets.cuda import backend, blocked, lower_maps, lower_rows, lowering
from qcompiler.types import DType, PerAxis, PerGroup, QuantParams, TensorType

needs_emulator = pytest.mark.skipif(
    emulator.skip_reason() is not None, reason=emulator.skip_reason() or ""
)
Array = np.ndarray[Any, np.dtype[Any]]
U8, I8, U16, I16 = DType.UINT8, DType.INT8, DType.UINT16, DType.INT16
I4, U4 = DType.INT4, DType.UINT4
F32, F16 = DType.FLOAT32, DType.FLOAT16
I32, I64, BOOL, F64 = DType.INT32, DType.INT64, DType.BOOL, DType.FLOAT64


def q(
    dtype: DType, scale: float, zero: int, lo: int | None = None, hi: int | None = None
) -> QuantParams:
    return QuantParams(
        np.float32(scale), np.int32(zero), dtype, dtype.min if lo is None else lo,
        dtype.max if hi is None else hi,
    )  # fmt: skip


class Net:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.graph = Graph("net", Stage.INTEGER)
        self.feeds: dict[str, Array] = {}
        self.results: list[tuple[str, Value]] = []

    def feed(self, data: Array, qparams: QuantParams | None = None) -> Value:
        dtype = qparams.storage if qparams is not None else DType.of(data.dtype)
        v = self.graph.add_input(f"x{len(self.feeds)}", TensorType(data.shape, dtype, qparams))
        self.feeds[v.name] = np.array(data)
        return v

    def codes(self, shape: tuple[int, ...], qparams: QuantParams) -> Value:
        lo, hi = qparams.storage.min, qparams.storage.max
        data = self.rng.integers(lo, hi, shape, endpoint=True).astype(qparams.storage.numpy)
        return self.feed(data, qparams)

    def real(self, shape: tuple[int, ...], scale: float = 1.0, dtype: DType = F32) -> Value:
        return self.feed((self.rng.standard_normal(shape) * scale).astype(dtype.numpy))

    def whole(self, shape: tuple[int, ...], lo: int, hi: int, dtype: DType = I64) -> Value:
        return self.feed(self.rng.integers(lo, hi, shape).astype(dtype.numpy))

    def constant(self, data: Array, qparams: QuantParams | None = None) -> Value:
        return self.graph.constant(np.asarray(data), "c", qparams)

    def add(
        self, op: str, *operands: Value | None, out: TensorType | None = None, **attrs: Any
    ) -> Value:
        types = None if out is None else [out]
        v = self.graph.add(op, list(operands), attrs, types=types).output
        self.results.append((f"y{len(self.results)}_{op}", v))
        return v

    def run(self, **settings: str) -> tuple[dict[str, Array], dict[str, Array]]:
        self.graph.set_outputs(self.results)
        expected = run(self.graph, self.feeds)
        got = emulator.run_graph(self.graph, self.feeds, **settings)
        return got, {name: expected[name] for name, _ in self.results}

    def check(self, rtol: float | None = None, **settings: str) -> None:
        """Compare with the interpreter: floats with a tolerance if one is given, else exactly."""
        got, expected = self.run(**settings)
        close = [n for n, v in self.results if rtol is not None and v.dtype.is_float]
        exact = {n: a for n, a in expected.items() if n not in close}
        assert emulator.differences(got, exact) == []
        assert emulator.far_results(got, expected, close, rtol or 0.0) == []


@needs_emulator
@pytest.mark.parametrize("order", ["0", "1"])
def test_integer_elementwise(rng: np.random.Generator, order: str) -> None:
    net = Net(rng)
    a, b = net.codes((2, 5, 7, 12), q(U8, 0.03, 117)), net.codes((2, 5, 7, 12), q(I8, 0.011, -9))
    row, scalar = net.codes((12,), q(U8, 0.5, 3)), net.codes((), q(I8, 0.2, 1))
    column = net.codes((2, 1, 7, 1), q(I16, 0.001, -100))
    t = (2, 5, 7, 12)
    net.add("qadd", a, b, out=TensorType(t, U8, q(U8, 0.02, 30, 30)))
    net.add("qsub", a, row, out=TensorType(t, I8, q(I8, 0.25, 0)))
    net.add("qmul", b, column, out=TensorType(t, U8, q(U8, 0.01, 128)))
    net.add("qadd", scalar, b, out=TensorType(t, F32))
    net.add("qmul", a, b, out=TensorType(t, F32))
    net.add("requantize", a, out=TensorType(t, I8, q(I8, 0.06, -20, -100, 90)))
    net.add("requantize", b, out=TensorType(t, I16, q(I16, 0.0001, 7)))
    net.add("dequantize", a)
    net.add("dequantize", column)
    weights = net.constant(
        rng.integers(-128, 128, (3, 4)).astype(np.int8),
        QuantParams(rng.uniform(0.1, 1, 4), np.arange(4), I8, -128, 127, PerAxis(1)),
    )
    net.add("dequantize", weights)
    net.add("table", a, net.constant(rng.integers(0, 256, 256).astype(np.uint8), q(U8, 1, 0)))
    net.add("table", b, net.constant(rng.standard_normal(256).astype(np.float32)))
    net.check(order=order)


@needs_emulator
def test_quantize_rounds_ties_to_even_and_saturates(rng: np.random.Generator) -> None:
    net = Net(rng)
    ties = (np.arange(-600, 600) / 2).astype(np.float32)
    odd = np.array([np.nan, np.inf, -np.inf, 1e38, -1e38, 0.0, -0.0, 1e-40], np.float32)
    x = net.feed(np.concatenate([ties, odd, rng.standard_normal(500).astype(np.float32) * 99]))
    for k, target in enumerate((q(U8, 1.0, 128), q(I8, 0.3, -7, -100), q(I16, 0.004, 55))):
        del k
        net.add("quantize", x, out=TensorType(x.shape, target.storage, target))
    net.add("quantize", net.real((4, 9), dtype=F16), out=TensorType((4, 9), U8, q(U8, 0.02, 99)))
    net.check()


@needs_emulator
def test_four_bits(rng: np.random.Generator) -> None:
    """Casts drop bits; a tensor of 4 bits lies in bytes, in movement, sums and products."""
    net = Net(rng)
    odd = np.array([np.nan, np.inf, -np.inf, 3e38, -9.0, 8.0, 15.9, 2.0**28 + 32], np.float32)
    x = net.feed(np.concatenate([odd, rng.standard_normal(92).astype(np.float32) * 1e4]))
    for v in (
        x,
        net.real((9, 5), 1e9, F64),
        net.whole((9, 5), -(10**9), 10**9),
        net.codes((9, 5), q(I8, 1, 0)),
    ):
        plain = v if v.qparams is None else net.feed(net.feeds[v.name])
        for to in ("int4", "uint4"):
            net.add("cast", plain, to=to)
    for four, eight, zero in ((I4, I8, -3), (U4, U8, 9)):
        code = net.codes((4, 16), q(four, 0.2, zero))
        wide = net.add(
            "requantize", code,
            out=TensorType((4, 16), eight, q(eight, 0.2, zero, four.min, four.max)),
        )  # fmt: skip
        net.add("dequantize", code)
        net.add("transpose", wide, perm=(1, 0))
        net.add("requantize", wide, out=TensorType((4, 16), four, q(four, 0.3, 1)))
        net.add("qadd", wide, wide, out=TensorType((4, 16), eight, q(eight, 0.4, 2, 0, 6)))
    net.check()


@needs_emulator
@pytest.mark.parametrize("held", [I4, U4, I8, U8, I16])
def test_scales_along_an_axis(rng: np.random.Generator, held: DType) -> None:
    net = Net(rng)
    for granularity, scales in ((PerAxis(1), (12,)), (PerGroup(1, 5), (4, 3, 6))):
        zero = rng.integers(held.min, held.max + 1, scales)
        scale = rng.uniform(0.1, 2, scales).astype(np.float32)
        grid = QuantParams(scale, zero, held, held.min + 1, held.max - 1, granularity)
        x = net.real((4, 12, 6), 2.0 * held.max)
        x = net.add("quantize", x, out=TensorType((4, 12, 6), held, grid))
        net.add("dequantize", x)
    net.check()


@needs_emulator
def test_pooling(rng: np.random.Generator) -> None:
    net = Net(rng)
    window: dict[str, Any] = {"layout": "NHWC", "dilations": (1, 1)}
    a, b = net.codes((2, 9, 8, 12), q(U8, 0.03, 17)), net.codes((1, 6, 7, 5), q(I8, 0.01, -9))
    f = net.real((1, 6, 7, 5))
    for x, kernel, strides, pads in (
        (a, (3, 3), (2, 2), (1, 1, 1, 1)),
        (net.real((1, 4, 4, 8), dtype=F16), (2, 2), (2, 2), (0, 0, 0, 0)),
        (net.codes((1, 4, 4, 8), q(U16, 0.01, 40000)), (2, 2), (2, 2), (0, 0, 0, 0)),
    ):
        net.add("max_pool", x, kernel=kernel, strides=strides, pads=pads, **window)
    hanging: dict[str, Any] = {**window, "ceil_mode": True}
    net.add("max_pool", b, kernel=(2, 3), strides=(1, 2), pads=(0, 1, 0, 1), **hanging)
    wide: dict[str, Any] = {"layout": "NHWC", "dilations": (2, 1)}
    net.add("max_pool", f, kernel=(3, 2), strides=(1, 1), pads=(1, 0, 1, 0), **wide)
    shape = (2, 5, 4, 12)
    for include in (False, True):
        net.add(
            "qaverage_pool",
            a,
            kernel=(3, 3),
            strides=(2, 2),
            pads=(1, 1, 1, 1),
            count_include_pad=include,
            out=TensorType(shape, I8, q(I8, 0.02, -4)),
            **window,
        )
        net.add(
            "average_pool",
            f,
            kernel=(3, 3),
            strides=(2, 2),
            pads=(1, 1, 1, 1),
            count_include_pad=include,
            **window,
        )
    net.add(
        "qaverage_pool",
        b,
        kernel=(6, 7),
        strides=(1, 1),
        pads=(0, 0, 0, 0),
        out=TensorType((1, 1, 1, 5), F32),
        **window,
    )
    net.check(rtol=1e-6)


@needs_emulator
def test_reductions(rng: np.random.Generator) -> None:
    net = Net(rng)
    a = net.codes((2, 7, 7, 40), q(U8, 0.03, 17))
    for axes, keepdims, shape, target in (
        ((1, 2), False, (2, 40), q(U8, 0.01, 9)),
        ((3,), True, (2, 7, 7, 1), None),
        ((0, 1, 2, 3), True, (1, 1, 1, 1), q(I8, 0.01, 0)),
    ):
        out = TensorType(shape, F32 if target is None else target.storage, target)
        net.add("qreduce_mean", a, axes=axes, keepdims=keepdims, out=out)
    net.add("reduce_max", a, axes=(1,), keepdims=False)
    net.add("reduce_min", net.codes((3, 20), q(U16, 0.01, 40000)), axes=(1,), keepdims=False)
    f = net.real((3, 50, 33))
    for name in ("reduce_mean", "reduce_sum", "reduce_max", "reduce_min", "reduce_l1", "reduce_l2",
                 "reduce_sum_square"):  # fmt: skip
        net.add(name, f, axes=(1,), keepdims=False)
        net.add(name, f, axes=(2,), keepdims=True)
    net.add("reduce_prod", net.real((2, 6)), axes=(1,), keepdims=False)
    net.add("reduce_log_sum", net.add("abs", f), axes=(2,), keepdims=False)
    net.add("reduce_sum", net.whole((4, 9), -50, 50), axes=(1,), keepdims=False)
    net.add("reduce_mean", net.real((2, 40), dtype=F16), axes=(1,), keepdims=False)
    net.check(rtol=2e-3)


@needs_emulator
def test_softmax_and_norms(rng: np.random.Generator) -> None:
    net = Net(rng)
    a = net.codes((2, 3, 70), q(U8, 0.07, 17))
    s = net.real((2, 3, 300), 8.0)
    masked = rng.standard_normal((2, 9)).astype(np.float32)
    masked[0, 3:] = -np.inf
    masked[1, :] = -np.inf
    for axis, x in ((-1, a), (1, a), (2, s), (1, net.feed(masked))):
        net.add("qsoftmax", x, axis=axis, out=TensorType(x.shape, U8, q(U8, 1 / 256, 0)))
        net.add("qsoftmax", x, axis=axis, out=TensorType(x.shape, F32))
    gamma, beta = (net.constant(rng.standard_normal(70).astype(np.float32)) for _ in range(2))
    flat = net.feed(np.full((2, 70), 40, np.uint8), q(U8, 0.07, 17))
    for x in (a, flat, net.codes((3, 70), q(I16, 0.001, 5))):
        net.add(
            "qlayer_norm", x, gamma, beta, epsilon=1e-5, out=TensorType(x.shape, I8, q(I8, 0.03, 4))
        )
        net.add("qlayer_norm", x, gamma, beta, epsilon=1e-5, out=TensorType(x.shape, F32))
    net.check()


@needs_emulator
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_products_of_activations_quantized_at_run_time(rng: np.random.Generator, per: str) -> None:
    net = Net(rng)
    x = rng.standard_normal((2, 5, 70)).astype(np.float32) * 3
    x[0, 1] = 0.0
    x[1, 2, 3:5] = np.nan, np.inf
    for storage, zero in ((I8, 0), (U8, 128)):
        value = net.feed(x)
        target = TensorType(x.shape, storage, q(storage, 1.0, zero))
        scales = TensorType((2, 5, 1) if per == "row" else (), F32)
        node = net.graph.add("dynamic_quantize", [value], {"per": per}, types=[target, scales])
        net.results += [(f"q{storage.value}", node.outputs[0]), (f"s{zero}", node.outputs[1])]
        weights = net.constant(
            rng.integers(-127, 128, (70, 33)).astype(np.int8),
            QuantParams(rng.uniform(0.001, 0.02, 33), np.zeros(33), I8, -127, 127, PerAxis(1)),
        )
        bias = net.constant(rng.standard_normal(33).astype(np.float32))
        left, scale = node.outputs
        net.add("dynamic_matmul", left, weights, scale)
        net.add("dynamic_matmul", left, weights, scale, bias, net.real((2, 5, 33)), act_min=0.0)
    net.check()


@needs_emulator
@pytest.mark.parametrize("size", [16, 32])
def test_products_of_weights_in_blocks(rng: np.random.Generator, size: int) -> None:
    net = Net(rng)
    t = (2, 5, 33)
    x = rng.standard_normal((2, 5, 96)).astype(np.float32) * rng.choice([0.01, 1, 9], (2, 5, 96))
    blocks = 96 // size
    grid = QuantParams(
        rng.uniform(0.001, 0.02, (blocks, 33)), rng.integers(-8, 8, (blocks, 33)), I8, -8, 7,
        PerGroup(0, size),
    )  # fmt: skip
    weights = net.constant(rng.integers(-8, 8, (96, 33)).astype(np.int8), grid)
    bias = net.constant(rng.standard_normal(33).astype(np.float32))
    for storage, zero in ((I8, 0), (U8, 128)):
        types = [
            TensorType(x.shape, storage, q(storage, 1.0, zero)),
            TensorType((2, 5, blocks), F32),
        ]
        attrs = {"per": "block", "block": size}
        node = net.graph.add("dynamic_quantize", [net.feed(x.astype("f4"))], attrs, types=types)
        net.results += [(f"q{storage.value}", node.outputs[0]), (f"s{zero}", node.outputs[1])]
        left, scale = node.outputs
        net.add("dynamic_matmul", left, weights, scale)
        net.add("dynamic_matmul", left, weights, scale, bias, net.real(t), act_min=0.0)
        fixed = net.codes((2, 5, 96), q(storage, 0.02, zero + 5))
        net.add("qmatmul", fixed, weights, bias, out=TensorType(t, F32))
        net.add("qmatmul", fixed, weights, out=TensorType(t, U8, q(U8, 0.05, 100)))
        other = net.codes(t, q(I8, 0.03, -7))
        net.add("qmatmul", fixed, weights, bias, other, out=TensorType(t, I8, q(I8, 0.04, 3)))
    net.check()


CONVS: list[tuple[tuple[int, int], dict[str, Any], int]] = [
    ((1, 1), {"strides": (1, 1), "pads": (0, 0, 0, 0)}, 16),
    ((1, 1), {"strides": (2, 2), "pads": (0, 0, 0, 0)}, 8),
    ((3, 3), {"strides": (1, 1), "pads": (1, 1, 1, 1)}, 16),
    ((3, 3), {"strides": (2, 1), "pads": (0, 1, 2, 0)}, 48),
    ((2, 3), {"strides": (1, 2), "pads": (2, 0, 0, 3), "dilations": (2, 3)}, 24),
    ((1, 3), {"strides": (1, 1), "pads": (0, 0, 0, 2)}, 48),
]


@needs_emulator
@pytest.mark.parametrize("at_once", [1 << 26, 5000])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("kernel", "window", "size"), CONVS)
def test_convolutions_of_weights_in_blocks(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    kernel: tuple[int, int],
    window: dict[str, Any],
    size: int,
    bits: int,
    at_once: int,
) -> None:
    """Codes at both ends; with little memory, ranges of blocks follow each other."""
    monkeypatch.setattr(blocked, "MOST_BYTES", at_once)
    net = Net(rng)
    limit = 1 << (bits - 1)
    grid = QuantParams(
        rng.uniform(0.001, 0.02, (21, 48 // size, *kernel)),
        np.zeros((21, 48 // size, *kernel)), I8, -limit, limit - 1, PerGroup(1, size),
    )  # fmt: skip
    codes = rng.integers(-limit, limit, (21, 48, *kernel)).astype(np.int8)
    codes[:4] = -limit
    weights = net.constant(codes, grid)
    bias = net.constant(rng.standard_normal(21).astype(np.float32))
    attrs: dict[str, Any] = {"dilations": (1, 1), "group": 1, "layout": "NHWC", **window}
    for storage, zero in ((I8, -128), (U8, 130)):
        x = net.codes((2, 7, 8, 48), q(storage, 0.02, zero))
        t = net.add("qconv", x, weights, bias, out=None, **attrs).type
        net.add("qconv", x, weights, out=TensorType(t.shape, U8, q(U8, 0.1, 100, 20)), **attrs)
        other = net.codes(t.shape, q(I8, 0.03, -7))
        out = TensorType(t.shape, I8, q(I8, 0.08, 3))
        net.add("qconv", x, weights, bias, other, out=out, **attrs)
    net.check()


@needs_emulator
def test_ranges_of_blocks_of_a_matrix(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "MOST_BYTES", 3000)
    net = Net(rng)
    zero = rng.integers(-128, 128, (8, 33))
    grid = QuantParams(rng.uniform(0.001, 0.02, (8, 33)), zero, I8, -128, 127, PerGroup(0, 8))
    weights = net.constant(rng.integers(-128, 128, (64, 33)).astype(np.int8), grid)
    a = net.codes((2, 5, 64), q(U8, 0.02, 255))
    net.add("qmatmul", a, weights, out=TensorType((2, 5, 33), F32))
    types = [TensorType((2, 5, 64), I8, q(I8, 1.0, 0)), TensorType((2, 5, 8), F32)]
    attrs = {"per": "block", "block": 8}
    node = net.graph.add("dynamic_quantize", [net.real((2, 5, 64))], attrs, types=types)
    net.add("dynamic_matmul", node.outputs[0], weights, node.outputs[1])
    net.check()


@needs_emulator
def test_float_rows(rng: np.random.Generator) -> None:
    net = Net(rng)
    f = net.real((4, 10, 70), 3.0)
    gamma, beta = (net.constant(rng.standard_normal(70).astype(np.float32)) for _ in range(2))
    net.add("softmax", f, axis=-1)
    net.add("softmax", f, axis=1)
    net.add("log_softmax", f, axis=2)
    net.add("layer_norm", f, gamma, beta)
    net.add("layer_norm", f, axis=1)
    small = [net.constant(rng.uniform(0.5, 2, 10).astype(np.float32)) for _ in range(4)]
    net.add("instance_norm", f, *small[:2])
    net.add("batch_norm", f, *small)
    net.add("cumsum", f, axis=1)
    net.add("cumsum", net.whole((3, 6), -9, 9), axis=1, exclusive=True, reverse=True)
    for op in ("argmax", "argmin"):
        net.add(op, f, axis=2, keepdims=False)
        net.add(op, net.whole((5, 20), 0, 4), axis=1, select_last_index=op == "argmax")
    net.check(rtol=1e-5)


@needs_emulator
def test_float_elementwise(rng: np.random.Generator) -> None:
    net = Net(rng)
    x, wide = net.real((3, 4, 10)), net.real((3, 4, 10), 20.0)
    for name in sorted(lower_maps._UNARY):
        if name in ("log", "sqrt", "acosh"):
            net.add(name, net.feed(rng.uniform(1, 9, (7,)).astype(np.float32)))
        elif name in ("asin", "acos", "atanh"):
            net.add(name, net.feed(rng.uniform(-0.9, 0.9, (7,)).astype(np.float32)))
        else:
            net.add(name, wide if name in ("sigmoid", "tanh", "mish", "hard_sigmoid") else x)
    for approximate in ("none", "tanh"):
        net.add("gelu", wide, approximate=approximate)
    for name in ("relu", "neg", "abs", "sign"):
        net.add(name, x)
        if name != "relu":
            net.add(name, net.whole((9,), -5, 5))
    net.add("clip", x, min=-0.5, max=0.25)
    net.add("clip", net.whole((9,), -5, 5), min=-2, max=3)
    net.add("relu", net.feed(np.array([np.nan, -1, 1], np.float32)))
    row = net.real((10,))
    for name in ("add", "sub", "mul", "div", "max", "min", "prelu", "pow"):
        left = net.add("abs", x) if name == "pow" else x
        net.add(name, left, row)
    net.add("add", net.real((3, 1, 10)), net.real((1, 4, 1)))
    net.add("mul", net.real((6,), dtype=F16), net.real((6,), dtype=F16))
    net.add("add", net.real((6,), dtype=F64), net.real((6,), dtype=F64))
    net.check(rtol=1e-5)


@needs_emulator
def test_integers_and_flags(rng: np.random.Generator) -> None:
    net = Net(rng)
    a, b = net.whole((4, 6), -20, 20), net.whole((4, 6), -5, 5)
    for name in ("add", "sub", "mul", "div", "max", "min"):
        net.add(name, a, b)
    for fmod in (0, 1):
        net.add("mod", a, net.whole((4, 6), 1, 7), fmod=fmod)
        net.add("mod", net.real((9,)), net.feed(np.full(9, 0.3, np.float32)), fmod=fmod)
    less = net.add("less", a, b)
    for name in ("equal", "greater", "less_or_equal", "greater_or_equal"):
        net.add(name, a, b)
    other = net.add("equal", a, net.whole((1, 6), -1, 2))
    for name in ("and", "or", "xor"):
        net.add(name, less, other)
    net.add("not", less)
    net.add("where", less, a, b)
    net.add("where", less, net.real((4, 6)), net.real((6,)))
    odd = net.feed(np.array([np.nan, np.inf, -np.inf, 0, 1], np.float32))
    net.add("isnan", odd)
    net.add("isinf", odd)
    net.add("isinf", odd, detect_negative=False)
    f = net.real((5, 5), 30.0)
    for to in ("int64", "int32", "int8", "float16", "float64", "bool"):
        net.add("cast", f, to=to)
    net.add("cast", a, to="float32")
    net.add("cast", a, to="uint8")
    net.add("cast", less, to="float32")
    net.check(rtol=1e-6)


@needs_emulator
@pytest.mark.parametrize("order", ["0", "1"])
def test_movement(rng: np.random.Generator, order: str) -> None:
    net = Net(rng)
    g = q(U8, 0.03, 17)
    a = net.codes((2, 6, 8, 12), g)
    f = net.real((2, 6, 8, 12))
    for x in (a, f):
        net.add("transpose", x, perm=(0, 3, 1, 2))
        net.add("transpose", x, perm=(3, 1, 0, 2))
        net.add("slice", x, starts=(1, -2), ends=(6, -9), axes=(1, 2), steps=(2, -3))
        net.add("slice", x, starts=(4,), ends=(12,), axes=(3,), steps=(1,))
        net.add("tile", x, repeats=(1, 2, 1, 3))
        for mode in ("constant", "reflect", "edge", "wrap"):
            net.add("pad", x, pads=(0, 1, 2, 0, 0, 3, -1, 4), mode=mode)
        net.add(
            "concat", x, x, net.codes((2, 6, 8, 5), g) if x is a else net.real((2, 6, 8, 5)), axis=3
        )
        net.add("concat", x, x, axis=1)
        for mode in ("DCR", "CRD"):
            net.add("depth_to_space", x, blocksize=2, mode=mode, layout="NHWC")
        net.add("space_to_depth", x, blocksize=2, layout="NHWC")
        for coordinate in ("half_pixel", "asymmetric", "align_corners"):
            net.add(
                "resize",
                x,
                shape=(2, 9, 20, 12),
                scales=(1.0, 1.5, 2.5, 1.0),
                layout="NHWC",
                coordinate_mode=coordinate,
            )
    nchw = net.codes((1, 8, 3, 5), g)
    for mode in ("DCR", "CRD"):
        net.add("depth_to_space", nchw, blocksize=2, mode=mode)
    net.add("space_to_depth", net.codes((1, 3, 4, 6), g), blocksize=2)
    net.add("expand", net.codes((3, 1), g), shape=(2, 3, 5))
    net.add("pad", f, pads=(0, 0, 1, 0, 0, 0, 0, 0), value=2.5)
    table = net.constant(rng.standard_normal((50, 16)).astype(np.float32))
    net.add("gather", table, net.whole((2, 7), -50, 50), axis=0)
    net.add("gather", a, net.whole((3,), 0, 8, I32), axis=2)
    net.add("gather", a, net.feed(np.array(5)), axis=3)
    net.check(order=order)


@needs_emulator
def test_an_index_outside_of_its_table_is_an_error(rng: np.random.Generator) -> None:
    net = Net(rng)
    table = net.constant(rng.standard_normal((5, 4)).astype(np.float32))
    net.add("gather", table, net.feed(np.array([1, 5])), axis=0)
    net.graph.set_outputs(net.results)
    with emulator.driver_environment():
        executor = emulator.executor(net.graph)
        with pytest.raises(DataError, match="outside of the table"):
            executor.run([np.array([1, 5])])
        # and the next run is not affected
        (good,) = executor.run([np.array([1, -5])])
    assert np.array_equal(good, table.array()[[1, 0]])


# ------------------------------------------------------------------------------ without a GPU


def test_all_refusals_come_in_one_message(rng: np.random.Generator) -> None:
    net = Net(rng)
    x = net.real((2, 3, 4, 5))
    net.add("resize", x, mode="linear", shape=(2, 3, 8, 10), scales=(1.0, 1.0, 2.0, 2.0))
    net.add("max_pool", x, kernel=(2, 2), strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1))
    net.add("exp", net.real((3,), dtype=F64))
    net.graph.set_outputs(net.results)
    with pytest.raises(UnsupportedByTargetError) as caught:
        backend.make("cuda-sm80").lower(net.graph)
    text = str(caught.value)
    assert "resize (resize): no kernel interpolates (linear)" in text
    assert "not an image with channels last" in text
    assert "exp (exp): no kernel takes float64" in text
    assert "compile for a CPU target" in text


def test_every_operator_is_supported_or_named_here() -> None:
    """Operators without a CUDA kernel are these and no others."""
    made = backend.make("cuda-sm80")
    del made
    assert lower_maps is not None
    assert lower_rows is not None
    missing = {op.name for op in all_ops()} - set(lowering._ROWS) - VIEWS - {"split"}
    assert missing <= {
        "opaque", "conv_transpose", "reduce_log_sum_exp", "mask_tail",
        "lstm", "gru", "rnn", "qlstm", "qgru", "qrnn",
    }, missing  # fmt: skip
