# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Models whose weights alone are quantized keep them so, and agree with ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.driver import quantize_model
from qcompiler.errors import UnsupportedOpError
from qcompiler.types import DType, PerAxis, PerGroup, Precision

Array = np.ndarray[Any, np.dtype[Any]]


def model_of(
    nodes: list[onnx.NodeProto], shape: list[int], constants: dict[str, Any], opset: int = 21
) -> onnx.ModelProto:
    """A model from the float32 input x to the float32 output y."""
    tensors = [
        a if isinstance(a, onnx.TensorProto) else numpy_helper.from_array(np.asarray(a), n)
        for n, a in constants.items()
    ]
    graph = helper.make_graph(
        nodes,
        "narrow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def runtime(model: onnx.ModelProto, x: Array) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


def nbits(
    rng: np.random.Generator, k: int, n: int, bits: int, block: int, asymmetric: bool, **more: Any
) -> tuple[onnx.ModelProto, Array]:
    """A MatMulNBits of random weights, and the weights."""
    blocks = -(-k // block)
    codes = rng.integers(0, 1 << bits, (n, blocks * block)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.1, (n, blocks)).astype(np.float32)
    zero = np.full((n, blocks), 1 << (bits - 1), np.uint8)
    if asymmetric:
        zero = rng.integers(0, 1 << bits, zero.shape).astype(np.uint8)

    def packed(a: Array) -> Array:
        if bits == 8:
            return a
        even = np.pad(a, ((0, 0), (0, a.shape[1] % 2)))
        return np.asarray(even[:, ::2] | even[:, 1::2] << 4)

    constants = {
        "b": packed(codes).reshape(n, blocks, -1),
        "scales": scale.reshape(-1),
        "bias": rng.standard_normal(n).astype(np.float32),
    }
    inputs = ["x", "b", "scales", "zeros" if asymmetric else "", "", "bias"]
    if asymmetric:
        constants["zeros"] = packed(zero).reshape(-1)
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block, **more}
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **attributes)
    wide = (codes.astype(np.int32) - np.repeat(zero, block, 1)) * np.repeat(scale, block, 1)
    return model_of([node], [2, 3, k], constants), wide[:, :k].astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_matmul_nbits(rng: np.random.Generator, bits: int, block: int, asymmetric: bool) -> None:
    model, w = nbits(rng, 128, 24, bits, block, asymmetric)
    x = rng.standard_normal((2, 3, 128)).astype(np.float32)
    result = quantize_model(model)
    (held,) = [v for v in result.graph.constants() if v.qparams is not None]
    assert held.qparams is not None
    assert isinstance(held.qparams.granularity, PerGroup)
    assert held.qparams.granularity.group_size == block
    signed, unsigned = (DType.INT4, DType.UINT4) if bits == 4 else (DType.INT8, DType.UINT8)
    assert held.dtype is (unsigned if asymmetric else signed)
    assert [d.precision for d in result.plan.nodes.values() if d.precision is not Precision.FP32]
    compiled = qcompiler.compile(model)
    got = compiled({"x": x})["y"]
    bias = numpy_helper.to_array(model.graph.initializer[2])
    np.testing.assert_allclose(got, x @ w.T + bias, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got, runtime(model, x), rtol=1e-3, atol=2e-2)
    reference = qcompiler.compile(model, target="reference")({"x": x})["y"]
    np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-4)
    assert sum(a.nbytes for a in compiled.artifact.params.arrays) < 128 * 24 * 4 / 2


@pytest.mark.parametrize("bits", [4, 8])
def test_an_accuracy_level_is_leave_that_is_not_taken(rng: np.random.Generator, bits: int) -> None:
    """Level 4 lets activations be int8: the result stays that of float32, within theirs."""
    model, w = nbits(rng, 128, 24, bits, 32, False)
    coarse = onnx.ModelProto()
    coarse.CopyFrom(model)
    coarse.graph.node[0].attribute.append(helper.make_attribute("accuracy_level", 4))
    x = rng.standard_normal((2, 3, 128)).astype(np.float32)
    exact = x @ w.T + numpy_helper.to_array(model.graph.initializer[2])
    got, plain = (qcompiler.compile(m)({"x": x})["y"] for m in (coarse, model))
    np.testing.assert_array_equal(got, plain)
    theirs = runtime(coarse, x)
    assert np.abs(got - exact).max() <= 1e-5 * np.abs(exact).max()
    assert np.abs(got - theirs).max() <= 0.02 * np.abs(exact).max()


def test_a_last_block_that_is_not_full(rng: np.random.Generator) -> None:
    model, w = nbits(rng, 72, 24, 4, 32, True)
    x = rng.standard_normal((2, 3, 72)).astype(np.float32)
    got = qcompiler.compile(model)({"x": x})["y"]
    bias = numpy_helper.to_array(model.graph.initializer[2])
    np.testing.assert_allclose(got, x @ w.T + bias, rtol=1e-4, atol=1e-3)


def test_forms_that_are_refused(rng: np.random.Generator) -> None:
    model, _ = nbits(rng, 64, 24, 4, 32, False)
    model.graph.node[0].attribute.remove(
        next(a for a in model.graph.node[0].attribute if a.name == "bits")
    )
    model.graph.node[0].attribute.append(helper.make_attribute("bits", 2))
    with pytest.raises(UnsupportedOpError, match="weights of 2 bits"):
        quantize_model(model)
    model, _ = nbits(rng, 64, 24, 4, 32, False)
    model.graph.node[0].input[4] = "order"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(64, np.int32), "order"))
    with pytest.raises(UnsupportedOpError, match="g_idx"):
        quantize_model(model)
    model, _ = nbits(rng, 64, 24, 4, 32, False)
    model.graph.node[0].input[3] = "zeros"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((24, 2), "f4"), "zeros"))
    with pytest.raises(UnsupportedOpError, match="zero points are not integers"):
        quantize_model(model)
    model, _ = nbits(rng, 64, 24, 4, 32, False)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros(7, np.uint8), "b"))
    with pytest.raises(Exception, match="packed bytes do not hold"):
        quantize_model(model)


@pytest.mark.parametrize("scales", ["blocks", "columns", "one", "rows"])
def test_weights_behind_dequantize_linear_stay_quantized(
    rng: np.random.Generator, scales: str
) -> None:
    """Only scales along the other axis (rows of K) make floats of the weights."""
    codes = rng.integers(-8, 8, (64, 24)).astype(np.int8)
    shape = {"blocks": (4, 24), "columns": (24,), "one": (), "rows": (64,)}[scales]
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float32)
    attributes: dict[str, Any] = {"blocks": {"axis": 0, "block_size": 16}, "rows": {"axis": 0}}.get(
        scales, {"axis": 1}
    )
    four = helper.make_tensor("w", TensorProto.INT4, codes.shape, codes.reshape(-1).tolist())
    constants: dict[str, Any] = {"w": four if scales == "blocks" else codes, "s": scale}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wide"], **attributes),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    model = model_of(nodes, [5, 64], constants)
    graph = quantize_model(model).graph
    held = [v.qparams.granularity for v in graph.constants() if v.qparams is not None]
    if scales == "rows":
        assert held == []
    else:
        assert len(held) == 1
        assert isinstance(held[0], PerGroup) == (scales == "blocks")
        assert isinstance(held[0], PerAxis) == (scales == "columns")
    x = rng.standard_normal((5, 64)).astype(np.float32)
    got = qcompiler.compile(model)({"x": x})["y"]
    np.testing.assert_allclose(got, runtime(model, x), rtol=1e-5, atol=1e-4)
