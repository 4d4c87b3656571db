# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Quantized operators become integer kernels that agree with ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.driver import quantize_model

MS = "com.microsoft"


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[int]]],
    outputs: dict[str, int],
    constants: dict[str, Any],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info(n, t, None) for n, t in outputs.items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def runtime(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, feeds))


def operators(model: onnx.ModelProto) -> list[str]:
    return [n.op.name for n in quantize_model(model).graph.nodes]


def agree(
    model: onnx.ModelProto, feeds: dict[str, Any], lsb: int = 0, share: float = 1.0
) -> dict[str, Any]:
    """Compile, run, and compare: at most `lsb` apart, and `share` of the elements equal."""
    found = qcompiler.compile(model)(feeds)
    for got, want in zip(found.values(), runtime(model, feeds), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        if want.dtype.kind == "f":
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
            continue
        apart = np.abs(got.astype(np.int64) - want.astype(np.int64))
        assert apart.max() <= lsb
        assert (apart == 0).mean() >= share
    return found


def f32(x: float) -> Any:
    return np.float32(x)


@pytest.mark.parametrize("storage", [np.uint8, np.int8])
@pytest.mark.parametrize("zero", ["symmetric", "shifted", "per channel"])
def test_qlinear_conv(rng: np.random.Generator, storage: Any, zero: str) -> None:
    """Every weight grid: signed, unsigned around 128, and with a zero point per channel."""
    low, high = np.iinfo(storage).min, np.iinfo(storage).max
    middle = 0 if storage is np.int8 else 128
    w = rng.integers(low, high + 1, (6, 3, 3, 3)).astype(storage)
    if zero == "shifted":  # then all weights fit int8 around the zero point
        w = np.clip(w, middle - 110, middle + 110).astype(storage)
    w_zero = {
        "symmetric": np.full(6, middle, storage),
        "shifted": np.full(6, middle + 9, storage),
        "per channel": np.arange(middle - 3, middle + 3).astype(storage),
    }[zero]
    constants = {
        "xs": f32(0.02), "xz": np.uint8(120), "w": w,
        "ws": rng.uniform(0.001, 0.01, 6).astype(np.float32), "wz": w_zero,
        "ys": f32(0.05), "yz": np.uint8(100), "b": rng.integers(-999, 999, 6).astype(np.int32),
    }  # fmt: skip
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"]
    node = helper.make_node("QLinearConv", names, ["y"], pads=[1, 1, 1, 1])
    model = model_of(
        [node], {"x": (TensorProto.UINT8, [1, 3, 8, 8])}, {"y": TensorProto.UINT8}, constants
    )
    x = rng.integers(0, 256, (1, 3, 8, 8)).astype(np.uint8)
    # ONNX Runtime takes per-channel weight zero points only if they are equal.
    if zero == "per channel":
        reference = qcompiler.compile(model, target="reference")({"x": x})
        np.testing.assert_array_equal(qcompiler.compile(model)({"x": x})["y"], reference["y"])
    else:
        agree(model, {"x": x}, lsb=1, share=0.99)
    # Weights that int8 cannot hold around their zero points: a longer product.
    assert operators(model)[-1] == "qconv"
    assert (len(operators(model)) > 1) == (zero == "per channel")


def test_qlinear_matmul_and_qgemm(rng: np.random.Generator) -> None:
    constants = {
        "xs": f32(0.02), "xz": np.uint8(120), "w": rng.integers(-120, 120, (16, 8)).astype(np.int8),
        "ws": f32(0.004), "wz": np.int8(3), "ys": f32(0.1), "yz": np.uint8(128),
        "v": rng.integers(0, 256, (5, 8)).astype(np.uint8), "vz": np.uint8(128),
        "c": rng.integers(-999, 999, 5).astype(np.int32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QLinearMatMul", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["h"]),
        helper.make_node(
            "QGemm", ["h", "ys", "yz", "v", "ws", "vz", "c", "ys", "yz"], ["y"],
            domain=MS, transB=1, alpha=1.0,
        ),
        helper.make_node(
            "QGemm", ["h", "ys", "yz", "v", "ws", "vz"], ["z"], domain=MS, transB=1
        ),
    ]  # fmt: skip
    model = model_of(
        nodes,
        {"x": (TensorProto.UINT8, [4, 16])},
        {"y": TensorProto.UINT8, "z": TensorProto.FLOAT},
        constants,
    )
    agree(model, {"x": rng.integers(0, 256, (4, 16)).astype(np.uint8)}, lsb=1, share=0.95)
    assert operators(model) == ["qmatmul", "qmatmul", "qmatmul"]


GRID = ("s", "z")
UNARY = [
    ("QLinearSigmoid", {}, (np.float32(1 / 256), np.uint8(0))),
    ("QLinearLeakyRelu", {"alpha": 0.1}, (np.float32(0.03), np.uint8(20))),
    ("QLinearAveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}, None),
    ("QLinearAveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, None),
    ("QLinearAveragePool", {"kernel_shape": [2, 2], "channels_last": 1}, None),
    ("QLinearGlobalAveragePool", {"channels_last": 0}, None),
]


@pytest.mark.parametrize(("op", "attrs", "grid"), UNARY)
def test_qlinear_unary(
    rng: np.random.Generator, op: str, attrs: dict[str, Any], grid: tuple[Any, Any] | None
) -> None:
    ys, yz = grid or (np.float32(0.03), np.uint8(120))
    node = helper.make_node(op, ["x", "xs", "xz", "ys", "yz"], ["y"], domain=MS, **attrs)
    constants = {"xs": f32(0.04), "xz": np.uint8(125), "ys": ys, "yz": yz}
    model = model_of(
        [node], {"x": (TensorProto.UINT8, [1, 4, 6, 8])}, {"y": TensorProto.UINT8}, constants
    )
    x = rng.integers(0, 256, (1, 4, 6, 8)).astype(np.uint8)
    agree(model, {"x": x}, lsb=1, share=0.9)
    assert not {"quantize", "dequantize"} & set(operators(model))


@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul", "QLinearConcat"])
def test_qlinear_binary(rng: np.random.Generator, op: str) -> None:
    a, b, y = ["a", "as", "az"], ["b", "bs", "bz"], ["ys", "yz"]
    if op == "QLinearConcat":
        node = helper.make_node(op, [*y, *a, *b], ["y"], domain=MS, axis=1)
    else:
        node = helper.make_node(op, [*a, *b, *y], ["y"], domain=MS)
    constants = {
        "as": f32(0.02), "az": np.uint8(120), "bs": f32(0.05), "bz": np.uint8(90),
        "ys": f32(0.07), "yz": np.uint8(110),
    }  # fmt: skip
    inputs = {n: (TensorProto.UINT8, [2, 32]) for n in "ab"}
    model = model_of([node], inputs, {"y": TensorProto.UINT8}, constants)
    feeds = {n: rng.integers(0, 256, (2, 32)).astype(np.uint8) for n in "ab"}
    agree(model, feeds, lsb=1, share=0.9)
    assert not {"quantize", "dequantize"} & set(operators(model))


@pytest.mark.parametrize("depth", [40, 1500])
@pytest.mark.parametrize("computed_zero", [False, True])
def test_matmul_integer_is_exact(rng: np.random.Generator, depth: int, computed_zero: bool) -> None:
    """Long sums are cut into parts that float32 holds exactly."""
    constants = {
        "w": np.full((depth, 4), 255, np.uint8) if depth > 999 else rng.integers(
            0, 256, (depth, 4)).astype(np.uint8),
        "wz": np.uint8(128 if depth < 999 else 2), "xz": np.uint8(7),
    }  # fmt: skip
    inputs = {"x": (TensorProto.UINT8, [3, depth])}
    feeds = {"x": rng.integers(200, 256, (3, depth)).astype(np.uint8)}
    if computed_zero:
        del constants["xz"]
        inputs["xz"] = (TensorProto.UINT8, [])
        feeds["xz"] = np.asarray(9, np.uint8)
    node = helper.make_node("MatMulInteger", ["x", "w", "xz", "wz"], ["y"])
    model = model_of([node], inputs, {"y": TensorProto.INT32}, constants)
    agree(model, feeds)
    assert operators(model).count("qmatmul") == (1 if depth < 999 else 6)
    assert "matmul" not in operators(model)


@pytest.mark.parametrize("computed_zero", [False, True])
def test_conv_integer_is_exact(rng: np.random.Generator, computed_zero: bool) -> None:
    """Padding stands for zero, also where the zero point is computed."""
    constants = {
        "w": rng.integers(0, 256, (4, 40, 3, 3)).astype(np.uint8),
        "wz": np.uint8(128), "xz": np.uint8(7),
    }  # fmt: skip
    inputs = {"x": (TensorProto.UINT8, [1, 40, 6, 6])}
    feeds = {"x": rng.integers(0, 256, (1, 40, 6, 6)).astype(np.uint8)}
    if computed_zero:
        del constants["xz"]
        inputs["xz"] = (TensorProto.UINT8, [])
        feeds["xz"] = np.asarray(9, np.uint8)
    node = helper.make_node("ConvInteger", ["x", "w", "xz", "wz"], ["y"], pads=[1, 1, 1, 1])
    model = model_of([node], inputs, {"y": TensorProto.INT32}, constants)
    agree(model, feeds)
    assert "qconv" in operators(model)


def test_dynamic_quantization(rng: np.random.Generator) -> None:
    """What ONNX Runtime's dynamic quantizer writes, and its fused form."""
    constants = {
        "w": rng.integers(-127, 128, (24, 8)).astype(np.int8), "wz": np.int8(0), "ws": f32(0.01),
        "bias": rng.normal(size=8).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["t"]),
        helper.make_node("Mul", ["f", "t"], ["y"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node(
            "DynamicQuantizeMatMul", ["x", "w", "ws", "wz", "bias"], ["m"], domain=MS
        ),
        helper.make_node(
            "MatMulIntegerToFloat", ["q", "w", "s", "ws", "z", "wz", "bias"], ["n"], domain=MS
        ),
    ]  # fmt: skip
    outputs = dict.fromkeys("ydmns", TensorProto.FLOAT) | dict.fromkeys("qz", TensorProto.UINT8)
    model = model_of(nodes, {"x": (TensorProto.FLOAT, [2, 3, 24])}, outputs, constants)
    agree(model, {"x": rng.normal(size=(2, 3, 24)).astype(np.float32)})
    agree(model, {"x": np.zeros((2, 3, 24), np.float32)})
    assert "qmatmul" in operators(model)


def test_scales_computed_at_run_time(rng: np.random.Generator) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=1),
    ]
    inputs = {
        "x": (TensorProto.FLOAT, [2, 3, 4]),
        "s": (TensorProto.FLOAT, [3]),
        "z": (TensorProto.INT8, [3]),
    }
    model = model_of(nodes, inputs, {"q": TensorProto.INT8, "y": TensorProto.FLOAT}, {})
    feeds = {
        "x": rng.normal(size=(2, 3, 4)).astype(np.float32),
        "s": np.float32([0.01, 0.02, 0.3]),
        "z": np.int8([3, -4, 0]),
    }
    agree(model, feeds)


@pytest.mark.parametrize("shared", [False, True])
def test_an_integer_input_that_is_transposed_first(rng: np.random.Generator, shared: bool) -> None:
    """TensorFlow's layout before an int8 model: its scale belongs to the input, however it moves.

    Where something else reads the plain integers, they stay plain.
    """
    constants = {
        "s": f32(0.0513),
        "z": np.int8(3),
        "w": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        "sw": f32(0.0107),
        "zw": np.int8(0),
        "sy": f32(0.2173),
        "flat": np.asarray([2, 4, -1]),
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("DequantizeLinear", ["t", "s", "z"], ["f"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["v"]),
        helper.make_node("Conv", ["f", "v"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "sy", "z"], ["q"]),
        helper.make_node("Reshape", ["q", "flat"], ["y"]),
    ]
    outputs = {"y": TensorProto.INT8}
    if shared:
        nodes.append(helper.make_node("Cast", ["t"], ["plain"], to=TensorProto.INT32))
        outputs["plain"] = TensorProto.INT32
    model = model_of(nodes, {"x": (TensorProto.INT8, [2, 6, 6, 3])}, outputs, constants)
    used = operators(model)
    assert ("qconv" in used) == (not shared)
    assert ({"sub", "mul", "cast"} & set(used) == set()) == (not shared)
    compiled = qcompiler.compile(model)
    assert (compiled.inputs["x"].qparams is not None) == (not shared)
    x = rng.integers(-128, 128, (2, 6, 6, 3)).astype(np.int8)
    agree(model, {"x": x}, lsb=1, share=0.99)


@pytest.mark.parametrize("storage", [TensorProto.INT4, TensorProto.UINT4])
@pytest.mark.parametrize("op", ["MatMul", "Conv", "Transpose"])
def test_activations_in_four_bits(rng: np.random.Generator, storage: int, op: str) -> None:
    """Bytes hold the sixteen codes: products are integer, values beyond the range saturate."""
    low = -8 if storage == TensorProto.INT4 else 0
    shape = [4, 16] if op != "Conv" else [1, 4, 5, 5]
    weights = rng.integers(-127, 128, (16, 8) if op != "Conv" else (6, 4, 3, 3)).astype(np.int8)
    tensors = [
        helper.make_tensor("z", storage, [], [low + 6]),
        numpy_helper.from_array(f32(0.31), "s"),
        numpy_helper.from_array(weights, "w"),
        numpy_helper.from_array(f32(0.013), "sw"),
        numpy_helper.from_array(np.int8(0), "zw"),
        helper.make_tensor("zy", storage, [], [low + 7]),
        numpy_helper.from_array(f32(1.7), "sy"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["f"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["v"]),
    ]
    if op == "Transpose":
        nodes[1:] = [
            helper.make_node("Transpose", ["q"], ["t"], perm=[1, 0]),
            helper.make_node("DequantizeLinear", ["t", "s", "z"], ["y"]),
        ]
    else:
        nodes += [
            helper.make_node(op, ["f", "v"], ["c"]),
            helper.make_node("QuantizeLinear", ["c", "sy", "zy"], ["p"]),
            helper.make_node("DequantizeLinear", ["p", "sy", "zy"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        "four",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    if op != "Transpose":
        assert {"qmatmul", "qconv"} & set(operators(model))
    found = quantize_model(model).graph
    held = next(n.output.qparams for n in found.nodes if n.op.name == "quantize")
    assert held is not None
    assert (held.qmin, held.qmax) == (low, low + 15)
    x = {"x": (3 * rng.standard_normal(shape)).astype(np.float32)}
    found_y = qcompiler.compile(model)(x)["y"]
    step = 0.31 if op == "Transpose" else 1.7
    apart = np.abs(found_y - runtime(model, x)[0]) / step
    assert apart.max() <= 1.01  # one code, where a sum lies on a tie
    assert (apart < 0.01).mean() >= 0.97
