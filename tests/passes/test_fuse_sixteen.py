# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products of 16-bit integers are sums of products of their bytes, and as exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.onnx_export import to_onnx
from qcompiler.ops import Stage
from qcompiler.passes.fuse import Fuse
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.types import DType, PerAxis, QuantParams, TensorType

WINDOW = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1)}


def grid(dtype: DType, scale: Any, zero: Any = 0, axis: int | None = None) -> QuantParams:
    scale = np.asarray(scale, np.float32)
    points = np.broadcast_to(np.asarray(zero, np.int32), scale.shape)
    if axis is None:
        return QuantParams(scale, points, dtype, dtype.min, dtype.max)
    return QuantParams(scale, points, dtype, dtype.min, dtype.max, PerAxis(axis))


def network(
    op: str, activations: QuantParams, kind: DType, zero: int, rng: np.random.Generator
) -> Graph:
    """Two products of one quantized input, the second with a bias."""
    graph = Graph("net", Stage.QDQ)
    shape = (1, 6, 5, 5) if op == "conv" else (2, 3, 40)
    x = graph.add_input("x", TensorType(shape, DType.FLOAT32))
    types = [TensorType(shape, activations.storage, activations)]
    real = graph.add("dequantize", [graph.add("quantize", [x], types=types).output]).output
    for name in ("a", "b"):
        extents = (7, 6, 3, 3) if op == "conv" else (40, 7)
        codes = rng.integers(kind.min, kind.max + 1, extents)
        codes.reshape(-1)[:4] = kind.min, kind.max, kind.max, zero
        steps = rng.uniform(0.5, 1, 7) / kind.max
        axis = 0 if op == "conv" else 1
        w = graph.constant(codes.astype(kind.numpy), "w", grid(kind, steps, zero, axis))
        bias = graph.constant(rng.standard_normal(7).astype(np.float32), "c")
        operands = [real, graph.add("dequantize", [w]).output, bias if name == "b" else None]
        attrs = WINDOW if op == "conv" else {}
        y = graph.add(op, operands, attrs).output
        graph.set_outputs([*graph.outputs, (name, y)])
    return graph


WEIGHTS = [
    (DType.INT8, 0), (DType.UINT8, 120), (DType.INT4, 0), (DType.INT16, 0), (DType.UINT16, 32768),
    (DType.INT16, -32768), (DType.UINT16, 65535), (DType.UINT16, 1000),
]  # fmt: skip
ACTIVATIONS = [
    (DType.INT16, 0), (DType.INT16, -32768), (DType.INT16, 1023), (DType.UINT16, 32768),
    (DType.UINT16, 0), (DType.UINT16, 65535), (DType.UINT8, 77),
]  # fmt: skip
PAIRS = [
    (stored, point, kind, zero)
    for stored, point in ACTIVATIONS
    for kind, zero in WEIGHTS
    if 16 in (stored.bits, kind.bits)
]


@pytest.mark.parametrize("op", ["conv", "matmul"])
@pytest.mark.parametrize(("stored", "point", "kind", "zero"), PAIRS)
def test_products_of_bytes(op: str, stored: DType, point: int, kind: DType, zero: int) -> None:
    rng = np.random.default_rng(kind.bits)
    activations = grid(stored, 8.0 / (stored.max - stored.min), point)
    graph = network(op, activations, kind, zero, rng)
    x = rng.standard_normal(graph.inputs[0].shape).astype(np.float32) * 2
    x.reshape(-1)[:3] = 100, -100, 0  # both ends, and the zero point
    feeds = {"x": x}
    want = run(graph, feeds)
    model = to_onnx(graph)
    graph = PassManager([Fuse()]).run(graph, PassContext())
    names = [n.op.name for n in graph.nodes]
    bytes_of = [1 + (dtype.bits == 16) for dtype in (stored, kind)]
    assert names.count(f"q{op}") == 2 * bytes_of[0] * bytes_of[1]
    assert op not in names
    assert names.count("floor") == (stored.bits == 16)  # both read the same halves
    got = run(graph, feeds)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=3e-6 * np.abs(array).max())
    if (kind, zero) in ((DType.INT8, 0), (DType.UINT16, 1000)):
        compiled = qcompiler.compile(model)(feeds)
        same = qcompiler.compile(model, target="reference")(feeds)
        for name, array in same.items():
            np.testing.assert_array_equal(compiled[name], array)


def test_sums_are_exact() -> None:
    """Where float32 sums would round: 16 by 8 bits, 2000 of them."""
    rng = np.random.default_rng(1)
    graph = Graph("net", Stage.QDQ)
    q = grid(DType.INT16, 1.0)
    x = graph.add_input("x", TensorType((4, 2000), DType.INT16, q))
    codes = rng.integers(-128, 128, (2000, 9)).astype(np.int8)
    w = graph.constant(codes, "w", grid(DType.INT8, 1.0))
    operands = [graph.add("dequantize", [v]).output for v in (x, w)]
    graph.set_outputs([("y", graph.add("matmul", operands).output)])
    graph = PassManager([Fuse()]).run(graph, PassContext())
    data = rng.integers(-32768, 32768, (4, 2000)).astype(np.int16)
    exact = data.astype(np.int64) @ codes.astype(np.int64)
    high, low = data.astype(np.int64) >> 8, data.astype(np.int64) & 255
    parts = [(256 * (high @ codes)).astype(np.float32), (low @ codes).astype(np.float32)]
    got = run(graph, {"x": data})["y"]
    np.testing.assert_array_equal(got, parts[0] + parts[1])
    assert np.abs(got - exact).max() <= 2**-22 * np.abs(exact).max()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        (DType.INT16, DType.INT16), (DType.UINT16, DType.INT16), (DType.INT16, DType.UINT8),
        (DType.INT8, DType.UINT16),
    ],
)  # fmt: skip
def test_products_of_two_activations(left: DType, right: DType, turned: bool) -> None:
    """Scores of attention, say: both sides become bytes."""
    rng = np.random.default_rng(2)
    graph = Graph("net", Stage.QDQ)
    shapes = {"a": (2, 3, 5, 40), "b": (2, 3, 7, 40) if turned else (2, 3, 40, 7)}
    operands, feeds = [], {}
    for (name, shape), kind in zip(shapes.items(), (left, right), strict=True):
        x = graph.add_input(name, TensorType(shape, DType.FLOAT32))
        q = grid(kind, 8.0 / (kind.max - kind.min), kind.min + (kind.max - kind.min) // 3)
        made = graph.add("quantize", [x], types=[TensorType(shape, kind, q)])
        operands.append(graph.add("dequantize", [made.output]).output)
        feeds[name] = (rng.standard_normal(shape) * 3).astype(np.float32)
        feeds[name].reshape(-1)[:2] = 100, -100
    graph.set_outputs([("y", graph.add("matmul", operands, {"transpose_b": turned}).output)])
    want, model = run(graph, feeds)["y"], to_onnx(graph)
    fused = PassManager([Fuse()]).run(graph, PassContext())
    names = [n.op.name for n in fused.nodes]
    assert names.count("qmatmul") == (left.bits // 8) * (right.bits // 8)
    assert "matmul" not in names
    np.testing.assert_allclose(run(fused, feeds)["y"], want, atol=3e-6 * np.abs(want).max())
    compiled = qcompiler.compile(model)(feeds)["y"]
    same = qcompiler.compile(model, target="reference")(feeds)["y"]
    np.testing.assert_array_equal(compiled, same)


@pytest.mark.parametrize("op", ["conv", "matmul"])
def test_a_bias_beyond_the_finest_accumulator_is_added_as_a_float(op: str) -> None:
    rng = np.random.default_rng(3)
    graph = network(op, grid(DType.INT16, 1e-7), DType.INT16, 0, rng)
    feeds = {"x": rng.standard_normal(graph.inputs[0].shape).astype(np.float32) * 1e-3}
    want = run(graph, feeds)["b"]
    fused = PassManager([Fuse()]).run(graph, PassContext())
    names = [n.op.name for n in fused.nodes]
    assert op not in names
    assert names.count("add") == 2 * 3 + 1
    np.testing.assert_allclose(run(fused, feeds)["b"], want, rtol=1e-6)


def test_weights_that_no_integer_product_takes_are_not_split() -> None:
    """A scale per row of K: there is no one scale of a sum."""
    graph = Graph("net", Stage.QDQ)
    x = graph.add_input("x", TensorType((4, 6), DType.INT16, grid(DType.INT16, 1.0)))
    q = grid(DType.INT16, np.arange(1, 7), 0, 0)
    w = graph.constant(np.ones((6, 3), np.int16), "w", q)
    operands = [graph.add("dequantize", [v]).output for v in (x, w)]
    graph.set_outputs([("y", graph.add("matmul", operands).output)])
    fused = PassManager([Fuse()]).run(graph, PassContext())
    assert [n.op.name for n in fused.nodes] == ["dequantize", "matmul"]


def test_a_scale_without_a_high_byte_stays() -> None:
    """256 times it is no float32."""
    graph = Graph("net", Stage.QDQ)
    x = graph.add_input("x", TensorType((4, 6), DType.INT16, grid(DType.INT16, 3e36)))
    w = graph.constant(np.ones((6, 3), np.int8), "w", grid(DType.INT8, 1.0))
    operands = [graph.add("dequantize", [v]).output for v in (x, w)]
    graph.set_outputs([("y", graph.add("matmul", operands).output)])
    fused = PassManager([Fuse()]).run(graph, PassContext())
    assert "qmatmul" not in [n.op.name for n in fused.nodes]
