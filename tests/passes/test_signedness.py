# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Signed and unsigned activations: the grid moves by 128, no real value and no result changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from built_models import executor

from qcompiler.driver import build_graph, quantize_model
from qcompiler.interpreter import run
from qcompiler.ir import Graph, Value
from qcompiler.ops import Stage
from qcompiler.passes.signed_activations import SignedActivations
from qcompiler.passes.signedness import shifted
from qcompiler.passes.unsigned_activations import UnsignedActivations
from qcompiler.passmanager import Pass, PassContext, PassManager
from qcompiler.registry import get_target
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


@pytest.mark.parametrize("wanted", PASSES)
def test_sixteen_bits_are_signed(rng: np.random.Generator, wanted: str) -> None:
    """CPU kernels read and write int16: uint16 inside of a model moves by 32768."""
    kind = DType.UINT16
    grids = [
        QuantParams(np.float32(s), np.int32(z), kind, 0, 65535)
        for s, z in ((1e-4, 0), (2e-4, 65535), (3e-4, 30000))
    ]
    small = QuantParams(np.float32(0.02), np.int32(7), DType.UINT8, 0, 255)
    graph = Graph("g", Stage.INTEGER)
    x, y = (
        graph.add_input(n, TensorType((5, 64), kind, q))
        for n, q in zip("xy", grids[:2], strict=True)
    )
    b = graph.add_input("b", TensorType((5, 64), DType.UINT8, small))
    s = graph.add("qadd", [x, y], types=[TensorType((5, 64), kind, grids[2])]).output
    held = graph.constant(rng.integers(0, 65536, 64).astype(np.uint16), "c", grids[0])
    m = graph.add("qmul", [s, held], types=[TensorType((5, 64), kind, grids[1])]).output
    r = graph.add("requantize", [m], types=[TensorType((5, 64), kind, grids[0])]).output
    entries = graph.constant(rng.integers(0, 65536, 256).astype(np.uint16), "e", grids[2])
    t = graph.add("table", [b, entries], types=[TensorType((5, 64), kind, grids[2])]).output
    w = QuantParams(np.float32(0.01), np.int32(0), DType.INT8, -128, 127)
    weights = graph.constant(rng.integers(-128, 128, (64, 9)).astype(np.int8), "w", w)
    p = graph.add("qmatmul", [b, weights], types=[TensorType((5, 9), kind, grids[2])]).output
    graph.set_outputs([("r", r), ("t", t), ("f", graph.add("dequantize", [p]).output), ("p", p)])
    feeds = {
        v.name: rng.integers(0, v.dtype.max + 1, v.shape).astype(v.dtype.numpy) for v in (x, y, b)
    }
    want = run(graph, feeds)
    moved = shape(graph, PASSES[wanted])
    inside = [v for n in moved.nodes for v in n.outputs if not moved.is_output(v)]
    assert kind not in [v.dtype for v in inside]
    assert [v.dtype for v in moved.output_values] == [v.dtype for v in graph.output_values]
    compiled = executor(build_graph(graph, get_target("host")))
    found = compiled.run([feeds[v.name] for v in graph.inputs])
    after = run(moved, feeds)
    for (name, _), array in zip(graph.outputs, found, strict=True):
        np.testing.assert_array_equal(after[name], want[name])
        np.testing.assert_array_equal(array, want[name])


def test_a_moved_grid_keeps_its_spread() -> None:
    q = QuantParams(np.float32(0.5), np.int32(3), DType.INT8, -128, 127, spread=20.0)
    moved = shifted(TensorType((2, 3), DType.INT8, q), DType.UINT8).qparams
    assert moved is not None
    assert (moved.z, moved.qmin, moved.qmax, moved.spread) == (131, 0, 255, 20.0)
