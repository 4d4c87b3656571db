# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Models whose weights alone are quantized keep them so, and agree with ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from block_models import runtime
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


def nbits(
    rng: np.random.Generator,
    k: int,
    n: int,
    bits: int,
    block: int,
    asymmetric: bool,
    turned: bool = False,
    **more: Any,
) -> tuple[onnx.ModelProto, Array]:
    """A MatMulNBits of random weights, and the weights.

    Half of the scales are negative where ranges are `turned`, as ONNX Runtime's quantizer does it:
    the wider side of a range meets the code that the other side lacks.
    """
    blocks = -(-k // block)
    codes = rng.integers(0, 1 << bits, (n, blocks * block)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.1, (n, blocks)).astype(np.float32)
    if turned:
        scale[::2] *= -1
        scale[1, 0] = 0
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
@pytest.mark.parametrize("turned", [False, True])
def test_matmul_nbits(
    rng: np.random.Generator, bits: int, block: int, asymmetric: bool, turned: bool
) -> None:
    model, w = nbits(rng, 128, 24, bits, block, asymmetric, turned)
    x = rng.standard_normal((2, 3, 128)).astype(np.float32)
    result = quantize_model(model)
    (held,) = [v for v in result.graph.constants() if v.qparams is not None]
    assert held.qparams is not None
    assert isinstance(held.qparams.granularity, PerGroup)
    assert held.qparams.granularity.group_size == block
    signed, unsigned = (DType.INT4, DType.UINT4) if bits == 4 else (DType.INT8, DType.UINT8)
    assert held.dtype is (unsigned if asymmetric or turned else signed)
    assert [d.precision for d in result.plan.nodes.values() if d.precision is not Precision.FP32]
    compiled = qcompiler.compile(model)
    got = compiled({"x": x})["y"]
    bias = numpy_helper.to_array(model.graph.initializer[2])
    np.testing.assert_allclose(got, x @ w.T + bias, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got, runtime(model, x), rtol=1e-3, atol=2e-2)
    reference = qcompiler.compile(model, target="reference")({"x": x})["y"]
    np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-4)
    assert sum(a.nbytes for a in compiled.artifact.params.arrays) < 128 * 24 * 4 / 2
    sizes = [a.size for a in compiled.artifact.params.arrays if a.dtype == np.int8]
    assert (128 // block * 32 in sizes) is asymmetric  # weights around 0 have no zero points


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_accuracy_level_4_multiplies_integers(
    rng: np.random.Generator, bits: int, block: int, asymmetric: bool, turned: bool
) -> None:
    """It lets activations be int8 in the blocks of the weights, as ONNX Runtime has them."""
    model, w = nbits(rng, 200, 24, bits, block, asymmetric, turned, accuracy_level=4)
    result = quantize_model(model)
    (product,) = [n for n in result.graph.nodes if n.op.name == "dynamic_matmul"]
    assert not [n for n in result.graph.nodes if n.op.name == "matmul"]
    wanted = Precision.W4A8_GROUP if bits == 4 else Precision.W8A8_DYNAMIC
    assert result.plan.precision(product.name) is wanted
    x = rng.standard_normal((2, 3, 200)).astype(np.float32)
    x *= rng.choice(np.float32([0.01, 1, 30]), x.shape)
    exact = x @ w.T + numpy_helper.to_array(model.graph.initializer[2])
    compiled = qcompiler.compile(model)
    got = compiled({"x": x})["y"]
    np.testing.assert_array_equal(got, qcompiler.compile(model, target="reference")({"x": x})["y"])
    off = np.abs(exact).max()
    assert 0 < np.abs(got - exact).max() <= 0.02 * off  # activations were quantized
    np.testing.assert_allclose(got, runtime(model, x), atol=1e-5 * off)
    floats = 4 * -(-200 // block) * block * 32  # of whole blocks and whole vectors
    held = sum(a.nbytes for a in compiled.artifact.params.arrays)
    assert held < floats * (bits / 32 + 10 / 4 / block) + 512


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


@pytest.mark.parametrize("form", ["MatMulNBits", "DequantizeLinear"])
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_quantized_where_it_is_asked_for(
    rng: np.random.Generator, form: str, bits: int
) -> None:
    """A model that says nothing of its activations keeps them in floats, unless told otherwise."""
    if form == "MatMulNBits":
        model, w = nbits(rng, 128, 24, bits, 32, True)
        bias = numpy_helper.to_array(model.graph.initializer[2])
    else:
        storage = TensorProto.UINT4 if bits == 4 else TensorProto.UINT8
        codes, zero = (rng.integers(0, 1 << bits, (n, 24)) for n in (128, 4))
        scale = rng.uniform(0.01, 0.1, (4, 24)).astype(np.float32)
        scale[1] *= -1
        bias = rng.standard_normal(24).astype(np.float32)
        nodes = [
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], axis=0, block_size=32),
            helper.make_node("MatMul", ["x", "f"], ["t"]),
            helper.make_node("Add", ["t", "c"], ["y"]),
        ]
        model = model_of(nodes, [2, 3, 128], {"s": scale, "c": bias})
        for name, values in (("w", codes), ("z", zero)):
            flat = values.reshape(-1).tolist()
            model.graph.initializer.append(helper.make_tensor(name, storage, values.shape, flat))
        w = ((codes - np.repeat(zero, 32, 0)) * np.repeat(scale, 32, 0)).astype(np.float32).T
    x = rng.standard_normal((2, 3, 128)).astype(np.float32)
    exact = x @ w.T + bias
    scale_of = np.abs(exact).max()
    np.testing.assert_allclose(qcompiler.compile(model)({"x": x})["y"], exact, atol=1e-5 * scale_of)
    compiled = qcompiler.compile(model, precision="w8a8-dynamic")
    assert [d["precision"] for d in compiled.plan["nodes"].values()].count("fp32") == 0
    got = compiled({"x": x})["y"]
    assert 1e-4 * scale_of < np.abs(got - exact).max() <= 0.02 * scale_of
    same = qcompiler.compile(model, precision="w8a8-dynamic", target="reference")({"x": x})["y"]
    np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize(
    "kind", [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8]
)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("stored", [np.uint8, np.int8])
def test_quantized_activations_and_weights_in_blocks_multiply_as_integers(
    rng: np.random.Generator, kind: int, asymmetric: bool, stored: Any
) -> None:
    storage = DType(TensorProto.DataType.Name(kind).lower())
    codes = rng.integers(storage.min, storage.max + 1, (96, 24))
    zero = np.full((3, 24), (storage.min + storage.max + 1) // 2)
    if asymmetric:
        zero = rng.integers(storage.min, storage.max + 1, zero.shape)
    scale = (rng.uniform(0.5, 1, (3, 24)) / storage.max).astype(np.float32)
    point = stored(13)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "t", "p"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "t", "p"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], axis=0, block_size=32),
        helper.make_node("MatMul", ["a", "f"], ["y"]),
    ]
    model = model_of(nodes, [2, 3, 96], {"s": scale, "t": np.float32(0.02), "p": point})
    for name, values in (("w", codes), ("z", zero)):
        flat = values.reshape(-1).tolist()
        model.graph.initializer.append(helper.make_tensor(name, kind, values.shape, flat))
    result = quantize_model(model)
    assert [n.op.name for n in result.graph.nodes] == ["quantize", "qmatmul"]
    x = rng.standard_normal((2, 3, 96)).astype(np.float32)
    got = qcompiler.compile(model)({"x": x})["y"]
    np.testing.assert_array_equal(got, qcompiler.compile(model, target="reference")({"x": x})["y"])
    theirs = runtime(model, x)
    np.testing.assert_allclose(got, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("qdq", [False, True])
@pytest.mark.parametrize("level", [None, 4])
def test_models_of_the_quantizer(
    rng: np.random.Generator, symmetric: bool, qdq: bool, level: int | None
) -> None:
    """ONNX Runtime's own weights in blocks, with scales below 0: one node and a pair of them."""
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    weights = {f"w{i}": rng.standard_normal((96, 40)).astype(np.float32) for i in range(2)}
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in weights]
    nodes.append(helper.make_node("Add", [f"y{name}" for name in weights], ["y"]))
    form = quantizer.QuantFormat.QDQ if qdq else quantizer.QuantFormat.QOperator
    made = quantizer.MatMulNBitsQuantizer(
        model_of(nodes, [5, 96], weights), block_size=32, is_symmetric=symmetric,
        accuracy_level=level, quant_format=form,
    )  # fmt: skip
    made.process()
    model = made.model.model
    held = [numpy_helper.to_array(i) for i in model.graph.initializer if "scale" in i.name]
    assert bool(min(a.min() for a in held) < 0) is symmetric
    x = rng.standard_normal((5, 96)).astype(np.float32)
    result = quantize_model(model)
    integer = level == 4 and not qdq
    names = [n.op.name for n in result.graph.nodes]
    assert names.count("dynamic_quantize") == integer  # both products read the same integers
    assert names.count("dynamic_matmul" if integer else "matmul") == 2
    got, theirs = qcompiler.compile(model)({"x": x})["y"], runtime(model, x)
    np.testing.assert_allclose(got, theirs, atol=1e-5 * np.abs(theirs).max())
