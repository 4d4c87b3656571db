# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Signed and unsigned activations: the grid moves by 128, no real value and no result changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompiler.driver import quantize_model
from qcompiler.interpreter import run
from qcompiler.ir import Graph, Value
from qcompiler.ops import Stage
from qcompiler.passes.signed_activations import SignedActivations
from qcompiler.passes.signedness import shifted
from qcompiler.passes.unsigned_activations import UnsignedActivations
from qcompiler.passmanager import Pass, PassContext, PassManager
from qcompiler.types import DType, QuantParams, TensorType

MODELS = Path(__file__).parents[2] / "models"
PASSES = {"int8": SignedActivations(), "uint8": UnsignedActivations()}


def shape(graph: Graph, shaping: Pass) -> Graph:
    return PassManager([shaping]).run(graph, PassContext())


def activations(graph: Graph) -> list[Value]:
    return [
        v
        for node in graph.nodes
        for v in node.outputs
        if v.type.is_quantized and v.dtype.bits == 8 and not graph.is_output(v)
    ]


@pytest.mark.parametrize("wanted", PASSES)
@pytest.mark.parametrize("name", ["digits_cnn", "digits_hybrid"])
def test_a_model_keeps_its_results(name: str, wanted: str) -> None:
    folder = MODELS / name
    calibration = dict(np.load(folder / "calib.npz"))
    graph = quantize_model(folder / "model.onnx", calibration=calibration).graph
    feeds = {
        v.name: a[:1] if (a := calibration[v.name]).ndim == v.type.rank else a[0]
        for v in graph.inputs
    }
    before = run(graph, feeds)
    other = next(dtype for dtype in PASSES if dtype != wanted)
    # There and back: each pass finds something to do after the other one.
    for dtype in (wanted, other, wanted):
        graph = shape(graph, PASSES[dtype])
        after = run(graph, feeds)
        for key, array in before.items():
            np.testing.assert_array_equal(after[key], array)
    held = {v.dtype.value for v in activations(graph)}
    assert held == {wanted} if wanted == "int8" else wanted in held


@pytest.mark.parametrize("wanted", PASSES)
@pytest.mark.parametrize("dtype", [DType.INT8, DType.UINT8])
def test_inputs_results_constants_and_tables(dtype: DType, wanted: str) -> None:
    """Inputs and results keep their types; constants and table entries move."""
    low, high = dtype.min, dtype.max
    scale, zero = np.asarray(0.1, np.float32), np.asarray(low + 100, np.int32)
    q = QuantParams(scale, zero, dtype, low, high)
    entries = np.arange(low, high + 1)[::-1].astype(dtype.numpy)
    other = np.arange(low, high + 1).astype(dtype.numpy)
    graph = Graph("g", Stage.INTEGER)
    x = graph.add_input("x", TensorType((256,), dtype, q))
    t = graph.add("table", [x, graph.constant(entries, "entries")], types=[x.type])
    s = graph.add("qadd", [t.output, graph.constant(other, "c", q)], types=[x.type])
    graph.set_outputs([("t", t.output), ("s", s.output)])
    feeds = {"x": other}
    before = run(graph, feeds)
    types = [v.type for v in graph.output_values]
    after_graph = shape(graph, PASSES[wanted])
    after = run(after_graph, feeds)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    assert [v.type for v in after_graph.output_values] == types
    assert [v.dtype for v in after_graph.inputs] == [dtype]
    assert {v.dtype.value for v in activations(after_graph)} <= {wanted}


def test_a_moved_grid_keeps_its_spread() -> None:
    q = QuantParams(np.float32(0.5), np.int32(3), DType.INT8, -128, 127, spread=20.0)
    moved = shifted(TensorType((2, 3), DType.INT8, q), DType.UINT8).qparams
    assert moved is not None
    assert (moved.z, moved.qmin, moved.qmax, moved.spread) == (131, 0, 255, 20.0)
