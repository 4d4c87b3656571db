# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Integer products with weights in groups: their definition, and what operators refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.driver import quantize_model
from qcompiler.errors import ShapeError
from qcompiler.interpreter import run
from qcompiler.ir import Graph, Node
from qcompiler.numerics import dequantize, quantize
from qcompiler.numerics_grouped import conv_parts, grouped_result, matmul_parts
from qcompiler.onnx_import import load_onnx
from qcompiler.ops import Stage
from qcompiler.passes.narrow_products import group_qparams, in_bytes
from qcompiler.plan import integer_group, precision_of, uniform
from qcompiler.targets.kernels.factored import factored_weights
from qcompiler.types import DType, PerAxis, PerGroup, Precision, QuantParams, TensorType
from qcompiler.windows import Geometry

MODEL = str(Path(__file__).resolve().parent.parent / "models" / "digits_cnn")


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([1, 4, 16]))
def test_groups_are_added_in_order_each_step_rounded(seed: int, groups: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (3, groups * size)).astype(np.uint8)
    b = rng.integers(-8, 8, (groups * size, 5)).astype(np.int8)
    scale = rng.uniform(0.001, 1, (groups, 5)).astype(np.float32)
    bias = rng.standard_normal(5).astype(np.float32)
    got = grouped_result(matmul_parts(a, b, 7, scale), 0.5, None, bias=bias)
    t = np.broadcast_to(bias, (3, 5))
    for j in range(groups):
        run_ = slice(j * size, (j + 1) * size)
        acc = (a[:, run_].astype(np.int64) - 7) @ b[run_].astype(np.int64)
        t = t + acc.astype(np.float32) * (np.float32(0.5) * scale[j])
    np.testing.assert_array_equal(got, t)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]), st.integers(1, 2))
def test_a_convolution_is_near_that_of_its_reals(seed: int, kernel: int, stride: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (2, 8, 5, 6)).astype(np.uint8)
    w = rng.integers(-8, 8, (3, 8, kernel, kernel)).astype(np.int8)
    scale = rng.uniform(0.01, 1, (3, 2, kernel, kernel)).astype(np.float32)
    pad = kernel // 2
    g = Geometry((5, 6), (kernel, kernel), (stride, stride), ((pad, pad),) * 2, (1, 1))
    got = grouped_result(conv_parts(x, w, 128, scale, g), 0.25, None)
    q = QuantParams(scale, np.int32(0), DType.INT8, -8, 7, PerGroup(1, 4))
    graph = Graph("real")
    real = graph.add_input("x", TensorType(x.shape, DType.FLOAT32))
    held = graph.constant(dequantize(w, q), "w")
    attrs = {"strides": (stride, stride), "pads": (pad,) * 4, "dilations": (1, 1)}
    graph.set_outputs([("y", graph.add("conv", [real, held], attrs).output)])
    reals = ((x.astype(np.float32) - 128) * np.float32(0.25)).astype(np.float32)
    want = np.moveaxis(run(graph, {"x": reals})["y"], 1, -1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)


def test_the_plan_and_the_graph_say_which_products_have_groups() -> None:
    graph = load_onnx(f"{MODEL}/model.onnx")
    plan = uniform(graph, "w4a8-group")
    for node in graph.nodes:
        if node.op.name in ("conv", "matmul"):
            grouped = integer_group(node) is not None
            assert plan.precision(node.name) is (
                Precision.W4A8_GROUP if grouped else Precision.W4A8
            )
    calibration = dict(np.load(f"{MODEL}/calib.npz"))
    result = quantize_model(f"{MODEL}/model.onnx", calibration=calibration, precision="w4a8-group")
    found = {n.name: n for n in result.graph.nodes if n.op.name in ("qconv", "qmatmul")}
    grouped_nodes = [n for n in found.values() if precision_of(n) is Precision.W4A8_GROUP]
    assert grouped_nodes
    for node in grouped_nodes:
        assert result.plan.precision(node.name) is Precision.W4A8_GROUP
        held, bias = node.input(1), node.optional(2)
        assert held.qparams.granularity == PerAxis(0 if node.op.name == "qconv" else 1)
        rows = np.moveaxis(held.array(), 1 if node.op.name == "qconv" else 0, -1)
        assert factored_weights(rows, 4) is not None
        assert bias is None or bias.dtype is DType.INT32


def test_zero_points_of_groups_are_taken_from_the_weights() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 256, (3, 12)), rng.integers(-128, 128, (12, 5))
    zero, scale = rng.integers(-128, 128, (3, 5)), rng.uniform(0.1, 1, (3, 5)).astype(np.float32)
    moved = b - np.repeat(zero, 4, axis=0)
    for (got, own), (want, same) in zip(
        matmul_parts(a, b, 17, scale, zero), matmul_parts(a, moved, 17, scale), strict=True
    ):
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(own, same)


UNIT = QuantParams(np.float32(0.1), np.int32(3), DType.UINT8, 0, 255)


def weights(
    scale_shape: tuple[int, ...], granularity: PerGroup | PerAxis, zero: int = 0
) -> QuantParams:
    ones = np.ones(scale_shape, np.float32)
    return QuantParams(ones, np.int32(zero), DType.INT8, -8, 7, granularity)


def product(op: str, q: QuantParams, bias: DType, **attrs: object) -> Node:
    graph = Graph("g", Stage.INTEGER)
    if op == "qconv":
        x = graph.add_input("x", TensorType((1, 8, 4, 4), DType.UINT8, UNIT))
        group = int(attrs.get("group", 1))
        w = graph.constant(np.zeros((8, 8 // group, 1, 1), np.int8), "w", q)
        attrs = {"strides": (1, 1), "pads": (0,) * 4, "dilations": (1, 1), **attrs}
    else:
        x = graph.add_input("x", TensorType((2, 8), DType.UINT8, UNIT))
        w = graph.constant(np.zeros((8, 8), np.int8), "w", q)
    b = graph.constant(np.zeros(8, bias.numpy), "b")
    return graph.add(op, [x, w, b], attrs)


@pytest.mark.parametrize(
    ("op", "q", "bias", "attrs", "message"),
    [
        ("qmatmul", weights((2, 8), PerGroup(0, 4)), DType.FLOAT32, {}, None),
        ("qconv", weights((8, 2, 1, 1), PerGroup(1, 4)), DType.FLOAT32, {}, None),
        ("qmatmul", weights((8, 2), PerGroup(1, 4)), DType.FLOAT32, {}, "groups along 0"),
        ("qmatmul", weights((3, 8), PerGroup(0, 3)), DType.FLOAT32, {}, "groups along 0"),
        ("qmatmul", weights((2, 8), PerGroup(0, 4), 1), DType.FLOAT32, {}, None),
        (
            "qconv",
            weights((8, 2, 1, 1), PerGroup(1, 4), 1),
            DType.FLOAT32,
            {},
            "with zero points",
        ),
        ("qmatmul", weights((2, 8), PerGroup(0, 4)), DType.INT32, {}, "float32 beside groups"),
        (
            "qmatmul",
            weights((8, 2), PerGroup(1, 4)),
            DType.FLOAT32,
            {"transpose_b": True},
            "not transposed",
        ),
        ("qconv", weights((8, 1, 1, 1), PerGroup(1, 4)), DType.FLOAT32, {"group": 2}, "group 1"),
    ],
)
def test_operands(
    op: str, q: QuantParams, bias: DType, attrs: dict[str, object], message: str | None
) -> None:
    if message is None:
        assert product(op, q, bias, **attrs).output.dtype is DType.FLOAT32
        return
    with pytest.raises(ShapeError, match=message):
        product(op, q, bias, **attrs)


def test_groups_held_in_bytes_are_the_same_grid() -> None:
    w = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    four = group_qparams(w, 0, 16, 4)
    byte = in_bytes(four)
    np.testing.assert_array_equal(quantize(w, four), quantize(w, byte))
    assert (four.storage, byte.storage) == (DType.INT4, DType.INT8)
