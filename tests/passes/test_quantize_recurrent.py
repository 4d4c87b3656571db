# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Quantized LSTM, GRU and RNN, from calibration to the compiled model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.driver import Quantized, assemble, build_graph, quantize_model
from qcompiler.errors import UsageError
from qcompiler.interpreter import run
from qcompiler.ir import Node
from qcompiler.onnx_export import to_onnx
from qcompiler.onnx_import import load_onnx
from qcompiler.ops import Stage
from qcompiler.ort import Session
from qcompiler.passes.calibrate import CalibrationTable
from qcompiler.passes.recurrent_states import state_steps
from qcompiler.plan import PrecisionPlan, integer_obstacle, uniform
from qcompiler.registry import get_target
from qcompiler.types import Array, DType, PerAxis, Precision

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, WIDTH, HIDDEN = 12, 10, 16


def network(
    op: str, *, forget: float = 0.0, scale: float = 1.0, **attrs: Any
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """x -> a recurrent layer -> a product; h and c come in and go out."""
    rng = np.random.default_rng(3)
    d = 2 if attrs.get("direction") == "bidirectional" else 1
    n = GATES[op] * HIDDEN
    bias = np.zeros((d, 2 * n), np.float32)
    if op == "LSTM":
        bias[:, 2 * HIDDEN : 3 * HIDDEN] = forget
    constants = {
        "W": rng.normal(0, 0.6, (d, n, WIDTH)).astype(np.float32) * np.float32(scale),
        # Columns of very different size: one scale for all of them would lose the small ones.
        "R": (rng.normal(0, 0.4, (d, n, HIDDEN)) * rng.uniform(0.05, 2, (d, n, 1))).astype("f4"),
        "B": bias,
        "out": rng.normal(0, 0.3, (HIDDEN * d, 4)).astype(np.float32),
        "shape": np.asarray([STEPS, 1, HIDDEN * d]),
    }
    state = (d, 1, HIDDEN)
    feeds = {"x": (STEPS, 1, WIDTH), "h": state, **({"c": state} if op == "LSTM" else {})}
    results = ["Y", "hn", *(["cn"] if op == "LSTM" else [])]
    operands = ["x", "W", "R", "B", "", "h", *(["c"] if op == "LSTM" else [])]
    nodes = [
        helper.make_node(op, operands, results, "cell", hidden_size=HIDDEN, **attrs),
        helper.make_node("Transpose", ["Y"], ["T"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["T", "shape"], ["S"]),
        helper.make_node("MatMul", ["S", "out"], ["y"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in feeds.items()],
        [onnx.ValueInfoProto(name=name) for name in ("y", *results[1:])],
        [numpy_helper.from_array(a, k) for k, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    samples = {
        k: rng.normal(0, 1 if k == "x" else 0.3, (6, *shape)).astype(np.float32)
        for k, shape in feeds.items()
    }
    return onnx.shape_inference.infer_shapes(model), samples


def sqnr(found: Array, want: Array) -> float:
    return float(10 * np.log10(np.mean(want**2) / np.mean((found - want) ** 2)))


def cell_of(result: Quantized, op: str) -> Node:
    return next(n for n in result.graph.nodes if n.op.name == op)


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("LSTM", {}),
        ("LSTM", {"direction": "bidirectional", "input_forget": 1}),
        ("GRU", {}),
        ("GRU", {"linear_before_reset": 1, "direction": "reverse"}),
        ("RNN", {"clip": 2.0}),
    ],
)
def test_every_cell_computes_in_integers(op: str, attrs: dict[str, Any]) -> None:
    model, samples = network(op, **attrs)
    backend = get_target("host")
    result = quantize_model(model, spec=backend.spec, calibration=samples)
    kinds = {n.op.name for n in result.graph.nodes}
    assert {f"q{op.lower()}", "qmatmul"} <= kinds
    assert op.lower() not in kinds
    compiled = assemble(build_graph(result.graph, backend), backend.spec, result)
    for k in range(2):
        feeds = {name: a[k] for name, a in samples.items()}
        exact = run(result.graph, feeds)
        want = Session(model.SerializeToString(), optimization="disabled").run(feeds)
        for name, array in compiled(feeds).items():
            # Bit for bit what the integer operators mean, and close to the float model.
            np.testing.assert_array_equal(array, exact[name])
            assert sqnr(array, want[name]) > 25


def test_scales_are_per_gate_and_unit() -> None:
    model, samples = network("LSTM")
    result = quantize_model(model, calibration=samples)
    cell = cell_of(result, "qlstm")
    q = cell.input(1).qparams
    assert q is not None
    assert (q.granularity, q.scale.shape) == (PerAxis(1), (4 * HIDDEN,))
    assert q.scale.max() > 10 * q.scale.min()
    y = cell.outputs[0]
    assert (y.dtype, [v.dtype for v in cell.outputs[1:]]) == (DType.UINT8, [DType.FLOAT32] * 2)
    named = next(name for name in result.plan if name.endswith("/lstm"))
    assert result.plan.precision(named) is Precision.W8A8
    # The head reads the loop's own 8 bits: nothing is quantized in between.
    assert not any(n.op.name in ("quantize", "requantize") and "Y" in n.name
                   for n in result.graph.nodes)  # fmt: skip


def test_the_state_is_carried_in_int16_where_that_costs_little() -> None:
    model, samples = network("LSTM")
    step = cell_of(quantize_model(model, calibration=samples), "qlstm").attr("carry")
    assert step is not None
    assert np.log2(step) == round(np.log2(step))
    # A forget gate that never forgets, and large inputs: the state grows far beyond what 16 bits
    # resolve next to the small changes that matter.
    model, samples = network("LSTM", forget=30.0, scale=0.1)
    samples["c"] *= np.float32(1e6)
    samples["c"][:, 0, 0, 1:] *= np.float32(1e-7)
    grown = cell_of(quantize_model(model, calibration=samples), "qlstm")
    assert grown.attr("carry") is None


def test_states_are_kept_with_the_calibration_table() -> None:
    table = CalibrationTable(states={"cell": 2.0**-11})
    assert CalibrationTable.from_json(table.to_json()).states == {"cell": 2.0**-11}
    assert CalibrationTable.from_json(CalibrationTable().to_json()).states == {}
    model, _ = network("RNN")
    assert state_steps(load_onnx(model), iter(())) == {}  # an Elman cell carries nothing


def test_obstacles() -> None:
    model, samples = network("LSTM", activations=["Sigmoid", "Tanh", "Relu"])
    graph = load_onnx(model)
    cell = next(n for n in graph.nodes if n.op.name == "lstm")
    assert "no table stands for relu" in str(integer_obstacle(cell))
    result = quantize_model(model, calibration=samples)
    assert result.plan.precision(cell.name) is Precision.FP32
    assert "no table stands for relu" in result.plan.reason(cell.name)
    with pytest.raises(UsageError, match="no table stands for relu"):
        uniform(graph).overridden(graph, {cell.name: "w8a8"})
    computed = helper.make_tensor_value_info("R", TensorProto.FLOAT, (1, 64, HIDDEN))
    model, _ = network("LSTM")
    model.graph.input.append(computed)
    del model.graph.initializer[1]
    cell = next(n for n in load_onnx(model).nodes if n.op.name == "lstm")
    assert "recurrent weights of lstm are computed" in str(integer_obstacle(cell))


def test_a_float_cell_between_integer_products() -> None:
    model, samples = network("GRU")
    graph = load_onnx(model)
    plan: PrecisionPlan = uniform(graph).overridden(graph, {"op:gru": "fp32"})
    result = quantize_model(model, calibration=samples, precision=plan)
    kinds = [n.op.name for n in result.graph.nodes]
    assert kinds.count("gru") == 1
    assert kinds.count("qmatmul") == 2


def test_exported_with_quantized_weights_and_states() -> None:
    model, samples = network("LSTM")
    result = quantize_model(model, calibration=samples, stage=Stage.QDQ)
    written = to_onnx(result.graph)
    kinds = [n.op_type for n in written.graph.node]
    assert kinds.count("LSTM") == 1
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(kinds)
    feeds = {name: a[0] for name, a in samples.items()}
    found = Session(written.SerializeToString(), optimization="disabled").run(feeds)
    want = Session(model.SerializeToString(), optimization="disabled").run(feeds)
    for name, array in want.items():
        assert sqnr(found[name], array) > 25
    again = quantize_model(written)  # read back, it computes in integers again
    assert "qlstm" in {n.op.name for n in again.graph.nodes}


@pytest.mark.parametrize("method", ["adaround", "gptq", "brecq", "correct_bias"])
def test_methods_go_around_cells(method: str) -> None:
    """They look at the products; a cell between them stays what it is."""
    model, samples = network("GRU")
    result = quantize_model(model, calibration=samples, methods=method)
    assert "qgru" in {n.op.name for n in result.graph.nodes}
    assert any(line.startswith(method) for line in result.log)
