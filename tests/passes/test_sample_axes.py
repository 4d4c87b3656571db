# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Copies that fill up a run never count, wherever its samples lie in a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.data import load_samples
from qcompiler.interpreter import run
from qcompiler.ir import Graph, Value
from qcompiler.onnx_import import load_onnx
from qcompiler.passes.calibrate import Calibrate, CalibrationSet, CalibrationTable
from qcompiler.passes.canonicalize import canonicalize_passes
from qcompiler.passes.recurrent_states import _operands
from qcompiler.passes.sample_axes import Filled, SampleAxes
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.types import Array, DType, TensorType

N, REAL = 6, 4


def start(*shape: int) -> tuple[Graph, Value]:
    g = Graph("net")
    return g, g.add_input("x", TensorType((N, *shape), DType.FLOAT32), 0)


def constant(g: Graph, *shape: int) -> Value:
    data = np.random.default_rng(len(g.nodes)).normal(size=shape).astype(np.float32)
    return g.constant(data, g.fresh("w"))


def one(g: Graph, name: str, operands: list[Value | None], **attrs: Any) -> Value:
    return g.add(name, operands, attrs).outputs[0]


def merged(g: Graph, x: Value) -> Value:
    """[N, 3, 4] -> [N * 3, 4] -> a product -> [4, N * 3]."""
    rows = one(g, "reshape", [x], shape=(N * 3, 4))
    y = one(g, "matmul", [rows, constant(g, 4, 5)], transpose_a=False, transpose_b=False)
    return one(g, "transpose", [y], perm=(1, 0))


def behind(g: Graph, x: Value) -> Value:
    """Samples as columns: [3, 4, N], added to a broadcast constant, and multiplied as columns."""
    y = one(g, "transpose", [x], perm=(1, 2, 0))
    y = one(g, "add", [y, constant(g, 3, 4, 1)])
    return one(g, "matmul", [constant(g, 7, 4), y], transpose_a=False, transpose_b=False)


def heads(g: Graph, x: Value) -> Value:
    """What attention does: rows and columns of every sample apart, then softmax and a sum."""
    y = one(g, "matmul", [x, x], transpose_a=False, transpose_b=True)
    y = one(g, "softmax", [y], axis=-1)
    y = one(g, "concat", [y, one(g, "slice", [x], starts=(0,), ends=(2,), axes=(2,), steps=(1,))],
            axis=2)  # fmt: skip
    return one(g, "reduce_mean", [y], axes=(1,), keepdims=False)


def images(g: Graph, x: Value) -> Value:
    """Frames as images of one channel."""
    y = one(g, "reshape", [x], shape=(N, 1, 3, 4))
    y = one(g, "conv", [y, constant(g, 2, 1, 3, 3)], strides=(1, 1), pads=(1, 1, 1, 1),
            dilations=(1, 1), group=1, layout="NCHW")  # fmt: skip
    y = one(g, "pad", [y], pads=(0, 0, 0, 1, 0, 0, 0, 0), mode="constant", value=0.0)
    return one(g, "reduce_max", [y], axes=(3,), keepdims=False)


def looked_up(g: Graph, x: Value) -> Value:
    """Samples choose rows of a table, which then lie in the middle."""
    index = one(g, "cast", [one(g, "clip", [x], min=0.0, max=2.0)], to="int64")
    y = one(g, "gather", [constant(g, 5, 3, 2), index], axis=1)
    return one(g, "expand", [one(g, "reshape", [y], shape=(1, 5, N, 12, 2))],
               shape=(2, 5, N, 12, 2))  # fmt: skip


@pytest.mark.parametrize("build", [merged, behind, heads, images, looked_up])
def test_what_is_cut_is_what_real_samples_made(
    build: Callable[[Graph, Value], Value], rng: np.random.Generator
) -> None:
    """Whatever fills up the run: the part that is kept stays the same, and is large enough."""
    g, x = start(3, 4)
    y = build(g, x)
    g.set_outputs([("y", y)])
    axes = SampleAxes(g, ["x"], N)
    assert axes.block(y) is not None
    a = rng.normal(size=(N, 3, 4)).astype(np.float32)
    b = a.copy()
    b[REAL:] += 1 + rng.random((N - REAL, 3, 4)).astype(np.float32)
    values: list[dict[str, Array]] = [{}, {}]
    for found, data in zip(values, (a, b), strict=True):
        run(g, {"x": data}, observe=lambda v, made, f=found: f.update({v.name: made}))
    for v in g.values():
        if v.is_constant or v is x:
            continue
        first, second = (axes.cut(v, f[v.name], REAL) for f in values)
        np.testing.assert_array_equal(first, second)
        assert first.size * N == values[0][v.name].size * REAL
        if v is y and build is not looked_up:
            assert not np.array_equal(values[0][v.name], values[1][v.name])


def test_samples_that_mix_are_not_cut() -> None:
    g, x = start(3, 4)
    mixed = [
        one(g, "reduce_mean", [x], axes=(0,), keepdims=True),
        one(g, "slice", [x], starts=(N - 1,), ends=(-N - 1,), axes=(0,), steps=(-1,)),
        one(g, "concat", [x, x], axis=0),
        one(
            g,
            "matmul",
            [constant(g, 2, N), one(g, "reshape", [x], shape=(N, 12))],
            transpose_a=False,
            transpose_b=False,
        ),
    ]
    axes = SampleAxes(g, ["x"], N)
    for v in mixed:
        assert axes.block(v) is None
        data = np.zeros(v.shape, np.float32)
        assert axes.cut(v, data, REAL) is data


def speech(steps: int) -> onnx.ModelProto:
    """Frames of one sequence -> a product per frame -> an LSTM along them -> a product."""
    rng = np.random.default_rng(0)
    weights = {
        "a": rng.normal(size=(8, 16)),
        "W": rng.normal(size=(1, 32, 16)) / 4,
        "R": rng.normal(size=(1, 32, 8)) / 4,
        "h": np.zeros((1, 1, 8)),
        "o": rng.normal(size=(8, 2)),
    }
    held = [numpy_helper.from_array(a.astype(np.float32), k) for k, a in weights.items()]
    held.append(numpy_helper.from_array(np.array([1]), "one"))
    held.append(numpy_helper.from_array(np.array([-1, 8]), "rows"))
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["f"]),
        helper.make_node("Relu", ["f"], ["g"]),
        helper.make_node("Unsqueeze", ["g", "one"], ["s"]),
        helper.make_node("LSTM", ["s", "W", "R", "", "", "h", "h"], ["Y"], "cell", hidden_size=8),
        helper.make_node("Reshape", ["Y", "rows"], ["z"]),
        helper.make_node("MatMul", ["z", "o"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 2])],
        held,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def calibrated(
    steps: int, frames: Array, observer: str
) -> tuple[Graph, CalibrationSet, CalibrationTable]:
    graph = load_onnx(speech(steps), input_shapes={"x": (steps, 8)})
    graph = PassManager(canonicalize_passes()).run(graph, PassContext())
    ctx = PassContext()
    ctx.put(CalibrationSet.of(load_samples({"x": frames}), graph))
    PassManager([Calibrate(observer=observer)], given=(CalibrationSet,)).run(graph, ctx)
    return graph, ctx.get(CalibrationSet), ctx.get(CalibrationTable)


@pytest.mark.parametrize("observer", ["mse", "percentile", "auto"])
def test_a_short_sequence_calibrates_like_its_own_length(observer: str) -> None:
    """The last frame is loud: were it repeated to the end, it would set every range."""
    frames = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    frames[-1] *= 30
    _, _, exact = calibrated(20, frames, observer)
    _, _, filled = calibrated(500, frames, observer)
    assert exact.tensors.keys() == filled.tensors.keys()
    for name, want in exact.tensors.items():
        found = filled.tensors[name]
        assert found.count == want.count
        np.testing.assert_allclose(found.range, want.range, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.mean, want.mean, rtol=1e-4, atol=1e-6)
    assert filled.states == exact.states


def test_a_second_run_that_is_nearly_empty_counts_once() -> None:
    frames = np.random.default_rng(1).normal(size=(21, 8)).astype(np.float32)
    _, _, table = calibrated(20, frames, "minmax")
    assert table.tensors["x"].count == 21 * 8
    assert {t.count for t in table.tensors.values()} <= {21 * 8, 21 * 16, 21 * 32}


def test_the_state_of_a_cell_is_tried_on_real_steps() -> None:
    frames = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    graph, samples, _ = calibrated(64, frames, "minmax")
    cell = next(n for n in graph.nodes if n.op.name == "lstm")
    assert [len(a) for a in _operands(graph, [cell], samples)[cell.input(0)]] == [20]


def test_a_full_run_is_taken_whole() -> None:
    frames = np.zeros((20, 8), np.float32)
    graph, samples, _ = calibrated(20, frames, "minmax")
    assert all(Filled(graph).axes(b) is None for b in samples)
