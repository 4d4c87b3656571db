# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Infinities in attention masks: as inputs, as constants, in calibration data, in calls."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.driver import assemble, build_graph, quantize_model
from qcompiler.errors import CalibrationError, DataError
from qcompiler.infinite import mask_values, names_of, takes_infinity
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.registry import get_target
from qcompiler.runtime import CompiledModel
from qcompiler.types import Array, DType, TensorType

DEPTH, HEADS, LENGTH = 32, 2, 16
KINDS = ("input", "where", "trilu", "keep")
Feeds = dict[str, Array]


def attention(kind: str, rng: np.random.Generator) -> onnx.ModelProto:
    """One attention layer whose mask is an input, two kinds of constant, or a boolean input."""
    half = DEPTH // HEADS
    weights = {
        name: (rng.standard_normal((DEPTH, DEPTH)) / DEPTH**0.5).astype(np.float32)
        for name in ("wq", "wk", "wv", "wo", "wz")
    }
    constants: Feeds = {
        **weights,
        "heads": np.array([0, LENGTH, HEADS, half]),
        "whole": np.array([0, LENGTH, DEPTH]),
        "scale": np.array(half**0.5, np.float32),
        "least": np.array(-np.inf, np.float32),
        "full": np.full((LENGTH, LENGTH), -np.inf, np.float32),
        "one": np.array(1),
        "causal": np.tril(np.ones((1, 1, LENGTH, LENGTH), bool)),
    }
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", LENGTH, DEPTH])]
    nodes = []
    for a in "qkv":
        nodes += [
            helper.make_node("MatMul", ["x", f"w{a}"], [f"{a}1"]),
            helper.make_node("Reshape", [f"{a}1", "heads"], [f"{a}2"]),
            helper.make_node(
                "Transpose", [f"{a}2"], [a], perm=[0, 2, 3, 1] if a == "k" else [0, 2, 1, 3]
            ),
        ]
    nodes.append(helper.make_node("MatMul", ["q", "k"], ["products"]))
    nodes.append(helper.make_node("Div", ["products", "scale"], ["scores"]))
    masked = {
        "input": [helper.make_node("Add", ["scores", "mask"], ["masked"])],
        "where": [helper.make_node("Where", ["causal", "scores", "least"], ["masked"])],
        "trilu": [
            helper.make_node("Trilu", ["full", "one"], ["above"], upper=1),
            helper.make_node("Add", ["scores", "above"], ["masked"]),
        ],
        "keep": [helper.make_node("Where", ["keep", "scores", "least"], ["masked"])],
    }
    if kind == "input":
        inputs.append(
            helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["N", 1, LENGTH, LENGTH])
        )
    if kind == "keep":
        inputs.append(helper.make_tensor_value_info("keep", TensorProto.BOOL, ["N", 1, 1, LENGTH]))
    nodes += [
        *masked[kind],
        helper.make_node("Softmax", ["masked"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["joint"]),
        helper.make_node("Transpose", ["joint"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "whole"], ["merged"]),
        helper.make_node("MatMul", ["merged", "wo"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "wz"], ["y"]),
    ]
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "attention",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", LENGTH, DEPTH])],
        [numpy_helper.from_array(a, n) for n, a in constants.items() if n in read],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def samples(kind: str, count: int, rng: np.random.Generator) -> Feeds:
    found: Feeds = {"x": rng.standard_normal((count, LENGTH, DEPTH)).astype(np.float32)}
    if kind == "input":
        hidden = rng.random((count, 1, LENGTH, LENGTH)) < 0.3
        hidden[..., 0] = False
        found["mask"] = np.where(hidden, np.float32(-np.inf), np.float32(0))
    if kind == "keep":
        found["keep"] = rng.random((count, 1, 1, LENGTH)) < 0.7
        found["keep"][..., 0] = True
    return found


def built(model: onnx.ModelProto, precision: str, calibration: Feeds) -> CompiledModel:
    """Compile without measuring whether integers pay off."""
    backend = get_target("host")
    result = quantize_model(model, spec=backend.spec, precision=precision, calibration=calibration)
    return assemble(build_graph(result.graph, backend), backend.spec, result)


@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_attention(kind: str, precision: str) -> None:
    rng = np.random.default_rng(5)
    model = attention(kind, rng)
    artifact = built(model, precision, samples(kind, 16, rng))
    feeds = samples(kind, 3, rng)
    want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    found = artifact(feeds)["y"]
    error = np.linalg.norm(found - want) / np.linalg.norm(want)
    assert error < (1e-5 if precision == "fp32" else 0.05)
    products = [n for n in artifact.artifact.plan["nodes"].values() if n["precision"] == "w8a8"]
    assert len(products) >= 7 if precision == "w8a8" else not products


def test_what_is_masked_has_no_influence() -> None:
    """-inf is no large number: what it hides may be anything, and the codes do not change."""
    rng = np.random.default_rng(6)
    artifact = built(attention("input", rng), "w8a8", samples("input", 16, rng))
    one = samples("input", 1, rng)
    one["mask"][..., 9:] = -np.inf
    other = {**one, "x": one["x"].copy()}
    other["x"][:, 9:] = 2.5
    a, b = artifact(one)["y"], artifact(other)["y"]
    assert np.array_equal(a[:, :9], b[:, :9])
    hidden = {**one, "mask": np.full_like(one["mask"], -np.inf)}
    assert np.isfinite(artifact(hidden)["y"]).all()


def test_nan_is_refused_and_infinity_where_it_is_multiplied(tmp_path) -> None:
    rng = np.random.default_rng(7)
    artifact = built(attention("input", rng), "w8a8", samples("input", 8, rng))
    artifact.save(tmp_path / "m.qcm")
    loaded = qcompiler.load(tmp_path / "m.qcm")
    assert {n: i.infinite for n, i in loaded.inputs.items()} == {"x": False, "mask": True}
    feeds = samples("input", 2, rng)
    assert np.isfinite(loaded(feeds)["y"]).all()
    wrong = {**feeds, "mask": feeds["mask"].copy()}
    wrong["mask"][1, 0, 2, 3] = np.nan
    with pytest.raises(DataError, match=r"'mask' holds 1 values that are NaN, the first at index"):
        loaded(wrong)
    wrong = {**feeds, "x": feeds["x"].copy()}
    wrong["x"][0, 0, 0] = -np.inf
    with pytest.raises(DataError, match=r"NaN or infinite.*only a softmax or a comparison"):
        loaded(wrong)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mask", np.nan, "'mask' holds NaN, first at index"),
        ("x", -np.inf, "'x' holds NaN or infinity, first at index"),
    ],
)
def test_calibration_data(name: str, value: float, message: str) -> None:
    rng = np.random.default_rng(8)
    wrong = samples("input", 4, rng)
    wrong[name][(1,) + (0,) * (wrong[name].ndim - 1)] = value
    with pytest.raises(CalibrationError, match=message):
        quantize_model(attention("input", rng), precision="w8a8", calibration=wrong)


def graph_of(shape: tuple[int, ...] = (2, 4)) -> Graph:
    g = Graph("g", Stage.FLOAT)
    for name in ("x", "m"):
        g.add_input(name, TensorType(shape, DType.FLOAT32), 0)
    return g


def test_an_input_that_more_than_a_softmax_reads_is_no_mask() -> None:
    g = graph_of()
    x, m = g.inputs
    scores = g.add("add", [x, m]).output
    shares = g.add("softmax", [scores], {"axis": -1}).output
    g.set_outputs([("y", shares)])
    assert names_of(mask_values(g), g) == takes_infinity(g) == {"x", "m"}
    g.set_outputs([("y", shares), ("scores", scores)])
    assert not mask_values(g)  # a result: it may be quantized where that is asked for
    assert takes_infinity(g) == {"x", "m"}
    w = g.constant(np.ones((4, 3), np.float32), "w")
    g.set_outputs([("y", shares), ("z", g.add("matmul", [m, w]).output)])
    assert names_of(mask_values(g), g) == {"x"}
    assert takes_infinity(g) == {"x"}


def test_a_comparison_ends_an_infinity_and_a_mean_does_not() -> None:
    g = graph_of()
    x, m = g.inputs
    g.set_outputs(
        [
            ("a", g.add("isinf", [x]).output),
            ("b", g.add("reduce_mean", [m], {"axes": (1,)}).output),
        ]
    )
    assert takes_infinity(g) == {"x"}


def test_a_row_of_infinities_may_be_looked_for() -> None:
    g = graph_of()
    x, m = g.inputs
    scores = g.add("add", [x, m]).output
    top = g.add("reduce_max", [scores], {"axes": (1,)}).output
    least = g.constant(np.float32(-np.inf), "least")
    g.set_outputs(
        [
            ("y", g.add("softmax", [scores], {"axis": -1}).output),
            ("hidden", g.add("equal", [top, least]).output),
        ]
    )
    assert names_of(mask_values(g), g) == takes_infinity(g) == {"x", "m"}
