# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Export: every operator of stages FLOAT and QDQ in ONNX Runtime, names, opsets, regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import pytest
from outside_models import each_model, model_graph, noise

from qcompiler.errors import UnsupportedOpError, UsageError
from qcompiler.interpreter import run
from qcompiler.ir import Graph, Node, Value
from qcompiler.onnx_export import node_to_onnx, subgraph_to_onnx, to_onnx
from qcompiler.onnx_export_ops import WRITERS
from qcompiler.onnx_import import load_onnx
from qcompiler.ops import Stage, all_ops
from qcompiler.ort import Session
from qcompiler.types import Array, DType, PerAxis, PerGroup, QuantParams, TensorType


def uniform(*shape: int) -> Array:
    return np.random.default_rng(sum(shape) + len(shape)).uniform(-2, 2, shape).astype(np.float32)


def in_ort(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    onnx.checker.check_model(model, full_check=True)
    return Session(model.SerializeToString(), optimization="disabled").run(feeds)


@dataclass
class Case:
    op: str
    operands: Sequence[Array | None]
    attrs: dict[str, Any] = field(default_factory=dict)
    constant: tuple[int, ...] = ()
    id: str = ""


RECURRENT = {"lstm": 3, "gru": 2, "rnn": 1}
X = uniform(2, 6, 7, 5)
POSITIVE = np.abs(X) + 0.1
WINDOW = {"strides": (1, 2), "pads": (1, 0, 1, 1), "dilations": (1, 1)}
POOL = {"kernel": (2, 3), "strides": (1, 2), "pads": (1, 0, 0, 1), "dilations": (1, 1)}
RESIZE = {"scales": (1.0, 1.0, 1.5, 2.0), "shape": (2, 6, 10, 10)}

CASES = [
    *(Case(op, [X]) for op in (
        "relu", "sigmoid", "tanh", "erf", "softplus", "softsign", "exp", "neg", "abs", "floor",
        "ceil", "round", "sign", "sin", "cos", "tan", "atan", "sinh", "cosh", "asinh", "isnan",
        "hard_swish", "hard_sigmoid", "elu", "selu", "celu", "leaky_relu", "thresholded_relu",
        "silu", "mish", "gelu", "isinf", "softmax", "log_softmax")),
    *(Case(op, [POSITIVE]) for op in ("sqrt", "log", "reciprocal")),
    *(Case(op, [X / 3]) for op in ("asin", "acos", "atanh")),
    Case("acosh", [POSITIVE + 1]),
    Case("gelu", [X], {"approximate": "tanh"}, id="tanh"),
    Case("clip", [X], {"min": -0.5, "max": 1.0}),
    Case("clip", [X], {"max": 1.0}, id="max"),
    Case("not", [X > 0]),
    *(Case(op, [X, uniform(6, 1, 1)]) for op in ("add", "sub", "mul", "div", "min", "max")),
    Case("pow", [POSITIVE, uniform(5)]),
    Case("mod", [X, POSITIVE], {"fmod": 1}),
    *(Case(op, [X, X[:1]]) for op in
      ("equal", "less", "less_or_equal", "greater", "greater_or_equal")),
    *(Case(op, [X > 0, X > 1]) for op in ("and", "or", "xor")),
    Case("prelu", [X, uniform(6, 1, 1)]),
    Case("prelu", [uniform(5), X], id="wide-slope"),
    Case("where", [X > 0, X, uniform(5)]),
    Case("cast", [X], {"to": "int32"}),
    Case("conv", [X, uniform(4, 6, 3, 2), uniform(4)], WINDOW, (1, 2)),
    Case("conv", [X, uniform(6, 1, 3, 2)], {**WINDOW, "group": 6}, (1,), id="depthwise"),
    Case("conv_transpose", [X, uniform(6, 4, 3, 3), uniform(4)],
         {"strides": (2, 2), "pads": (1, 0, 0, 1), "dilations": (1, 1), "output_padding": (1, 0)},
         (1, 2)),
    Case("matmul", [uniform(2, 3, 4), uniform(4, 5)]),
    Case("matmul", [uniform(3, 4), uniform(4, 5), uniform(5)], {}, (1, 2), id="gemm"),
    Case("matmul", [uniform(4, 3), uniform(5, 4)], {"transpose_a": True, "transpose_b": True},
         id="turned"),
    Case("matmul", [uniform(2, 4, 3), uniform(2, 5, 4), uniform(5)],
         {"transpose_a": True, "transpose_b": True}, (2,), id="turned-3d-bias"),
    Case("max_pool", [X], POOL),
    Case("average_pool", [X], POOL),
    Case("average_pool", [X], {**POOL, "count_include_pad": True}, id="include"),
    Case("average_pool", [X], {**POOL, "dilations": (2, 1)}, id="dilated"),
    *(Case(op, [POSITIVE], {"axes": (1, 3), "keepdims": keep}, id=str(keep))
      for op in ("reduce_mean", "reduce_sum", "reduce_max", "reduce_min", "reduce_prod",
                 "reduce_l1", "reduce_l2", "reduce_sum_square", "reduce_log_sum",
                 "reduce_log_sum_exp")
      for keep in (True, False)),
    *(Case(op, [X], {"axes": (2, 3)}, id="global") for op in ("reduce_mean", "reduce_max")),
    *(Case(op, [X], {"axis": 1, "keepdims": False, "select_last_index": True})
      for op in ("argmax", "argmin")),
    Case("cumsum", [X], {"axis": 1, "exclusive": True, "reverse": True}),
    Case("layer_norm", [X, uniform(5), uniform(5)], {"axis": 3}),
    Case("layer_norm", [X], {"axis": 2}, id="plain"),
    Case("layer_norm", [X, None, uniform(5)], {"axis": -1}, id="bias-only"),
    Case("instance_norm", [X, uniform(6), uniform(6)], {"epsilon": 1e-3}),
    Case("batch_norm", [X, uniform(6), uniform(6), uniform(6), np.abs(uniform(6)) + 0.5]),
    Case("concat", [X, X[:, :2]], {"axis": 1}),
    Case("split", [X], {"axis": 1, "sizes": (1, 2, 3)}),
    Case("slice", [X], {"starts": (1, -1), "ends": (4, -9), "axes": (1, 2), "steps": (2, -2)}),
    *(Case("pad", [X], {"pads": (0, 0, 1, 2, 0, 1, 0, 1), "mode": m, "value": v}, id=m)
      for m, v in (("constant", 1.5), ("reflect", 0.0), ("edge", 0.0), ("wrap", 0.0))),
    Case("pad", [X], {"pads": (0, 0, -1, 2, 0, 0, 0, 1)}, id="crop"),
    Case("reshape", [X], {"shape": (12, 35)}),
    Case("transpose", [X], {"perm": (0, 3, 1, 2)}),
    Case("expand", [X[:, :1]], {"shape": (2, 6, 7, 5)}),
    Case("tile", [X], {"repeats": (1, 2, 1, 3)}),
    Case("gather", [X, np.asarray([[0, 2], [-1, 1]])], {"axis": 1}),
    Case("depth_to_space", [uniform(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    *(Case("mask_tail", [X, np.where(np.arange(X.shape[axis]) < 3, 0, -1e30).astype(np.float32)],
           {"axis": axis}, id=str(axis)) for axis in (1, 3)),
    Case("space_to_depth", [uniform(1, 2, 4, 6)], {"blocksize": 2}),
    *(Case("resize", [X], {**RESIZE, "mode": m, "coordinate_mode": c}, id=f"{m}-{c}")
      for m in ("nearest", "linear", "cubic") for c in ("half_pixel", "align_corners")),
    Case("resize", [X], {**RESIZE, "mode": "linear", "scales": (1.0, 1.0, 11 / 7, 2.0),
                         "shape": (2, 6, 11, 10)}, id="sizes"),
    Case("resize", [X], {"mode": "linear", "antialias": True, "scales": (1.0, 1.0, 0.5, 0.5),
                         "shape": (2, 6, 3, 2)}, id="antialias"),
    Case("resize", [X], {**RESIZE, "coordinate_mode": "half_pixel_symmetric"}, id="symmetric"),
    *(Case(op, [uniform(3, 2, gates * 4), uniform(4, gates * 4), *[uniform(2, 4)] * states, *more],
           {"activations": ",".join(functions), "alphas": (0.3,) * len(functions),
            "betas": (0.4,) * len(functions), **attrs}, constant=(1,), id=id)
      for op, gates, states in (("lstm", 4, 2), ("gru", 3, 1), ("rnn", 1, 1))
      for id, functions, more, attrs in (
          ("plain", ("sigmoid", "tanh", "tanh")[3 - RECURRENT[op]:], (), {}),
          ("reverse", ("hard_sigmoid", "softsign", "tanh")[:RECURRENT[op]], (),
           {"reverse": True, "clip": 0.6}),
          ("lens", ("tanh", "relu", "elu")[:RECURRENT[op]], (np.asarray([3, 1], np.int32),), {}),
      )),
    Case("lstm", [uniform(3, 2, 16), uniform(4, 16), uniform(2, 4), uniform(2, 4), None,
                  uniform(3, 4)],
         {"activations": "sigmoid,tanh,tanh", "alphas": (0.0,) * 3, "betas": (0.0,) * 3,
          "input_forget": True}, constant=(1,), id="peephole"),
    Case("gru", [uniform(3, 2, 12), uniform(4, 12), uniform(2, 4), None, uniform(4)],
         {"activations": "sigmoid,tanh", "alphas": (0.0,) * 2, "betas": (0.0,) * 2,
          "linear_before_reset": True}, constant=(1,), id="linear_before_reset"),
]  # fmt: skip


def graph_of(case: Case) -> tuple[Graph, dict[str, Array]]:
    graph = Graph("net")
    feeds: dict[str, Array] = {}
    operands: list[Value | None] = []
    for i, a in enumerate(case.operands):
        if a is None:
            operands.append(None)
        elif i in case.constant:
            operands.append(graph.constant(a, f"c{i}"))
        else:
            feeds[f"x{i}"] = a
            operands.append(graph.add_input(f"x{i}", TensorType(a.shape, DType.of(a.dtype))))
    node = graph.add(case.op, operands, case.attrs, name="node")
    graph.set_outputs((v.name, v) for v in node.outputs)
    return graph, feeds


def check(graph: Graph, model: onnx.ModelProto, feeds: Mapping[str, Array]) -> None:
    got, want = in_ort(model, feeds), run(graph, feeds)
    assert list(got) == list(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("opset", [None, 20])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.id}")
def test_operator(case: Case, opset: int | None) -> None:
    graph, feeds = graph_of(case)
    model = to_onnx(graph, opset=opset)
    check(graph, model, feeds)
    back = load_onnx(model)
    for name, array in run(graph, feeds).items():
        np.testing.assert_allclose(run(back, feeds)[name], array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.id}")
def test_operator_alone_in_plain_form(case: Case) -> None:
    graph, feeds = graph_of(case)
    check(graph, node_to_onnx(graph.nodes[0]), feeds)


def test_every_operator_before_integers_can_be_written() -> None:
    rows = {row.name for row in all_ops() if row.stages != frozenset({Stage.INTEGER})}
    assert rows <= set(WRITERS)
    covered = {case.op for case in CASES} | {"quantize", "dequantize", "requantize", "opaque"}
    covered |= {"dynamic_quantize", "dynamic_matmul"}
    assert rows <= covered


@pytest.mark.parametrize("per", ["row", "tensor", "block"])
@pytest.mark.parametrize("opset", [17, 21])
def test_activations_quantized_at_run_time(per: str, opset: int) -> None:
    graph = Graph("net", Stage.QDQ)
    unit = QuantParams(np.float32(1), np.int32(0), DType.INT8, -127, 127)
    x = graph.add_input("x", TensorType((2, 3, 32), DType.FLOAT32))
    shape = {"row": (2, 3, 1), "tensor": (), "block": (2, 3, 4)}[per]
    types = [TensorType(x.shape, DType.INT8, unit), TensorType(shape, DType.FLOAT32)]
    attrs = {"per": per, "block": 8 if per == "block" else 0}
    ints, scale = graph.add("dynamic_quantize", [x], attrs, types=types).outputs
    groups: Any = PerAxis(1)
    if per == "block":
        opset, groups = 21, PerGroup(0, 8)
    rng = np.random.default_rng(0)
    steps = rng.uniform(0.01, 0.1, (4, 5) if per == "block" else 5).astype(np.float32)
    points = rng.integers(-8, 8, steps.shape) * (per == "block")
    grid = QuantParams(steps, points, DType.INT8, -8, 7, groups)
    w = graph.constant(rng.integers(-8, 8, (32, 5)).astype(np.int8), "w", grid)
    bias, residual = graph.constant(uniform(5), "b"), graph.constant(uniform(2, 3, 5), "r")
    y = graph.add("dynamic_matmul", [ints, w, scale]).output
    z = graph.add("dynamic_matmul", [ints, w, scale, bias, residual], {"act_min": 0.0}).output
    graph.set_outputs([("q", ints), ("s", scale), ("y", y), ("z", z)])
    feeds = {"x": uniform(2, 3, 32)}
    got, want = in_ort(to_onnx(graph, opset=opset), feeds), run(graph, feeds)
    for name in ("q", "s"):
        np.testing.assert_array_equal(got[name], want[name])
    for name in ("y", "z"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------- whole graphs


def small() -> tuple[Graph, dict[str, Array]]:
    """x -> conv -> relu -> y, with names."""
    graph = Graph("net")
    x = graph.add_input("x", TensorType(X.shape, DType.FLOAT32))
    w = graph.constant(uniform(4, 6, 3, 2), "w")
    conv = graph.add("conv", [x, w], WINDOW, name="conv", names=["c"])
    relu = graph.add("relu", [conv.output], name="act", names=["r"])
    graph.set_outputs([("y", relu.output)])
    return graph, {"x": X}


def test_names_survive() -> None:
    graph, _ = small()
    model = to_onnx(graph)
    assert [(n.name, list(n.input), list(n.output)) for n in model.graph.node] == [
        ("conv", ["x", "w"], ["c"]),
        ("act", ["c"], ["y"]),
    ]
    assert [t.name for t in model.graph.initializer] == ["w"]
    assert [i.version for i in model.opset_import] == [17]


def test_inner_values_can_be_asked_for() -> None:
    graph, feeds = small()
    got = in_ort(to_onnx(graph, extra_outputs=["r", "c", "x", "w", "c"]), feeds)
    assert list(got) == ["y", "r", "c", "x", "w"]
    np.testing.assert_array_equal(got["r"], got["y"])
    np.testing.assert_array_equal(np.maximum(got["c"], 0), got["y"])
    with pytest.raises(UsageError, match="has no value named 'q'"):
        to_onnx(graph, extra_outputs=["q"])


def test_a_result_may_be_an_input_a_constant_or_shared() -> None:
    graph = Graph("net")
    x = graph.add_input("x", TensorType((2, 2), DType.FLOAT32))
    y = graph.add("neg", [x], names=["n"]).output
    c = graph.constant(uniform(3), "c")
    graph.set_outputs([("a", x), ("b", y), ("d", y), ("n", y), ("c", c), ("x", x)])
    feeds = {"x": uniform(2, 2)}
    check(graph, to_onnx(graph), feeds)


def test_a_result_name_that_another_value_has_gets_its_own_tensor() -> None:
    graph = Graph("net")
    x = graph.add_input("x", TensorType((2, 2), DType.FLOAT32))
    n = graph.add("neg", [x], names=["n"]).output
    y = graph.add("relu", [n], names=["y"]).output
    graph.set_outputs([("z", n), ("y", y)])
    check(graph, to_onnx(graph), {"x": uniform(2, 2)})
    graph.set_outputs([("n", y), ("y", n)])
    check(graph, to_onnx(graph), {"x": uniform(2, 2)})
    graph.set_outputs([("x", y)])
    with pytest.raises(UsageError, match="result 'x' has the name of an input"):
        to_onnx(graph)


def test_the_opset_follows_the_operators() -> None:
    graph, _ = graph_of(Case("pad", [X], {"pads": (0, 0, 1, 1, 0, 0, 1, 1), "mode": "wrap"}))
    assert to_onnx(graph).opset_import[0].version == 19
    with pytest.raises(UsageError, match="opset 17 does not fit; 19 to 28 do"):
        to_onnx(graph, opset=17)
    graph, _ = small()
    assert to_onnx(graph, opset=23).opset_import[0].version == 23
    with pytest.raises(UsageError, match="opset 16 does not fit; 17 to 28 do"):
        to_onnx(graph, opset=16)


def test_integer_graphs_are_refused() -> None:
    graph, _ = small()
    graph.stage = Stage.INTEGER
    with pytest.raises(UsageError, match="is at stage integer; ONNX is written at float and qdq"):
        to_onnx(graph)


# ------------------------------------------------------------------------------------ quantized


def qdq(q: QuantParams, data: Array, w: Array | None = None) -> tuple[Graph, dict[str, Array]]:
    graph = Graph("net", Stage.QDQ)
    x = graph.add_input("x", TensorType(data.shape, DType.FLOAT32))
    quantized = graph.add("quantize", [x], types=[TensorType(data.shape, q.storage, q)], name="q")
    y = graph.add("dequantize", [quantized.output], name="d").output
    if w is not None:
        y = graph.add("matmul", [y, graph.constant(w, "w")]).output
    graph.set_outputs([("y", y)])
    return graph, {"x": data}


@pytest.mark.parametrize(
    ("storage", "qmin", "qmax", "zero", "opset"),
    [
        (DType.UINT8, 0, 255, 100, 17),
        (DType.INT8, -128, 127, -3, 17),
        (DType.INT8, -63, 63, 0, 17),
        (DType.UINT8, 100, 200, 100, 17),
        (DType.INT16, -32768, 32767, 5, 21),
        (DType.UINT16, 0, 65535, 30000, 21),
    ],
)
def test_quantize_and_dequantize(
    storage: DType, qmin: int, qmax: int, zero: int, opset: int
) -> None:
    scale = np.float32(0.02 if storage.bits == 8 else 1e-4)
    q = QuantParams(scale, np.int32(zero), storage, qmin, qmax)
    graph, feeds = qdq(q, X)
    model = to_onnx(graph)
    assert model.opset_import[0].version == opset
    got, want = in_ort(model, feeds), run(graph, feeds)
    np.testing.assert_array_equal(got["y"], want["y"])


def test_scales_per_channel() -> None:
    q = QuantParams(
        np.float32([0.01, 0.02, 0.03, 0.04, 0.05, 0.06]),
        np.int32([0, 1, 2, 3, -4, 5]),
        DType.INT8,
        -128,
        127,
        PerAxis(1),
    )
    graph, feeds = qdq(q, X)
    np.testing.assert_array_equal(in_ort(to_onnx(graph), feeds)["y"], run(graph, feeds)["y"])


def test_weights_stay_integers_and_bias_is_int32() -> None:
    rng = np.random.default_rng(3)
    graph = Graph("net", Stage.QDQ)
    x = graph.add_input("x", TensorType((3, 4), DType.FLOAT32))
    zeros = np.zeros(5, np.int32)
    scale = np.abs(uniform(5)) * 0.01 + 0.01
    wq = QuantParams(scale, zeros, DType.INT8, -127, 127, PerAxis(1))
    bq = QuantParams(scale * 0.02, zeros, DType.INT32, -(2**31), 2**31 - 1, PerAxis(0))
    w = graph.constant(rng.integers(-127, 128, (4, 5), np.int8), "w", wq)
    b = graph.constant(rng.integers(-9999, 9999, 5, np.int32), "b", bq)
    operands = [x, graph.add("dequantize", [w]).output, graph.add("dequantize", [b]).output]
    y = graph.add("matmul", operands, name="fc").output
    graph.set_outputs([("y", y)])
    model = to_onnx(graph)
    held = {t.name: t.data_type for t in model.graph.initializer}
    assert (held["w"], held["b"]) == (onnx.TensorProto.INT8, onnx.TensorProto.INT32)
    assert [n.op_type for n in model.graph.node] == ["DequantizeLinear", "DequantizeLinear", "Gemm"]
    check(graph, model, {"x": uniform(3, 4)})
    back = load_onnx(model)
    assert [n.op.name for n in back.nodes] == ["dequantize", "dequantize", "matmul"]


def test_blocked_four_bit_weights() -> None:
    data = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    q = QuantParams(
        np.abs(uniform(2, 4)), np.zeros((2, 4), np.int32), DType.INT4, -8, 7, PerGroup(0, 2)
    )
    graph = Graph("net", Stage.QDQ)
    x = graph.add_input("x", TensorType((3, 4), DType.FLOAT32))
    w = graph.add("dequantize", [graph.constant(data, "w", q)]).output
    graph.set_outputs([("y", graph.add("matmul", [x, w]).output)])
    model = to_onnx(graph)
    assert model.opset_import[0].version == 21
    assert {t.name: t.data_type for t in model.graph.initializer}["w"] == onnx.TensorProto.INT4
    assert in_ort(model, {"x": uniform(3, 4)})["y"].shape == (3, 4)
    back = load_onnx(model)
    np.testing.assert_allclose(
        run(back, {"x": uniform(3, 4)})["y"], run(graph, {"x": uniform(3, 4)})["y"], rtol=1e-6
    )


def test_movements_on_quantized_tensors_and_requantize() -> None:
    a = QuantParams(np.float32(0.02), np.int32(100), DType.UINT8, 0, 255)
    b = QuantParams(np.float32(0.05), np.int32(80), DType.UINT8, 0, 255)
    graph = Graph("net", Stage.QDQ)
    x = graph.add_input("x", TensorType(X.shape, DType.FLOAT32))
    q = graph.add("quantize", [x], types=[TensorType(X.shape, DType.UINT8, a)]).output
    q = graph.add("pad", [q], {"pads": (0, 0, 1, 1, 0, 0, 1, 1), "value": 0.5}).output
    q = graph.add("max_pool", [q], POOL).output
    q = graph.add("reshape", [q], {"shape": (2, q.type.size // 2)}).output
    q = graph.add("requantize", [q], types=[TensorType(q.shape, DType.UINT8, b)]).output
    graph.set_outputs([("q", q), ("y", graph.add("dequantize", [q]).output)])
    got, want = in_ort(to_onnx(graph), {"x": X}), run(graph, {"x": X})
    # Requantizing by one multiplier and by two float steps may round a tie apart: 1 LSB.
    assert np.abs(got["q"].astype(int) - want["q"].astype(int)).max() <= 1


# ---------------------------------------------------------------------------- nodes and regions


def test_one_node_takes_its_operands_as_inputs() -> None:
    graph, feeds = small()
    model = node_to_onnx(graph.node("conv"))
    assert [i.name for i in model.graph.input] == ["x"]
    assert [o.name for o in model.graph.output] == ["c"]
    np.testing.assert_allclose(
        np.maximum(in_ort(model, feeds)["c"], 0), run(graph, feeds)["y"], rtol=1e-5, atol=1e-5
    )


def test_a_region_returns_what_others_read() -> None:
    graph, feeds = small()
    conv, act = graph.nodes
    c = conv.output
    tail = graph.add("add", [act.output, c], name="sum")
    graph.set_outputs([("y", tail.output)])
    model = subgraph_to_onnx([conv, act])
    assert [i.name for i in model.graph.input] == ["x"]
    assert [o.name for o in model.graph.output] == ["c", "r"]
    model = subgraph_to_onnx([act, tail], [c], [tail.output])
    assert [i.name for i in model.graph.input] == ["c"]
    first = in_ort(node_to_onnx(conv), feeds)
    np.testing.assert_allclose(
        in_ort(model, first)[tail.output.name], run(graph, feeds)["y"], rtol=1e-5, atol=1e-5
    )


def fused(op: str, layout: str) -> tuple[Graph, Node, dict[str, Array]]:
    """A float node with residual and activation clamp, as the integer stage makes them."""
    graph = Graph("net", Stage.INTEGER)
    x = np.ascontiguousarray(np.moveaxis(X, 1, -1)) if layout == "NHWC" else X
    v = graph.add_input("x", TensorType(x.shape, DType.FLOAT32))
    attrs: dict[str, Any] = {"act_min": -0.5, "act_max": 1.0}
    if op == "conv":
        attrs.update(WINDOW, layout=layout)
        operands = [v, graph.constant(uniform(4, 6, 3, 2), "w"), graph.constant(uniform(4), "b")]
    else:
        operands = [v, graph.constant(uniform(5, 3), "w"), graph.constant(uniform(3), "b")]
    shape = graph.add(op, operands, attrs, name="probe").output.shape
    graph.eliminate_dead()
    r = graph.add_input("r", TensorType(shape, DType.FLOAT32))
    node = graph.add(op, [*operands, r], attrs, name="node")
    graph.set_outputs([("y", node.output)])
    return graph, node, {"x": x, "r": uniform(*shape)}


@pytest.mark.parametrize(("op", "layout"), [("conv", "NCHW"), ("conv", "NHWC"), ("matmul", "")])
def test_fused_float_nodes_are_written_out(op: str, layout: str) -> None:
    graph, node, feeds = fused(op, layout)
    got = in_ort(node_to_onnx(node), feeds)
    np.testing.assert_allclose(got[node.output.name], run(graph, feeds)["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("max_pool", POOL),
        ("average_pool", POOL),
        ("depth_to_space", {"blocksize": 1}),
        ("space_to_depth", {"blocksize": 1}),
        ("resize", {"scales": (1.0, 2.0, 1.5, 1.0), "shape": (2, 14, 7, 6), "mode": "linear"}),
    ],
)
def test_channels_last_operators_are_written_between_transposes(
    op: str, attrs: dict[str, Any]
) -> None:
    graph = Graph("net", Stage.INTEGER)
    x = np.ascontiguousarray(np.moveaxis(X, 1, -1))
    v = graph.add_input("x", TensorType(x.shape, DType.FLOAT32))
    node = graph.add(op, [v], {**attrs, "layout": "NHWC"})
    graph.set_outputs([("y", node.output)])
    got = in_ort(node_to_onnx(node), {"x": x})
    np.testing.assert_allclose(
        got[node.output.name], run(graph, {"x": x})["y"], rtol=1e-4, atol=1e-5
    )


def test_integer_operators_have_no_onnx_form() -> None:
    q = QuantParams(np.float32(0.02), np.int32(0), DType.INT8, -128, 127)
    t = TensorType((2, 2), DType.INT8, q)
    graph = Graph("net", Stage.INTEGER)
    v = graph.add_input("x", t)
    node = graph.add("qadd", [v, v], types=[t], name="sum")
    with pytest.raises(UnsupportedOpError, match="qadd has no ONNX form") as caught:
        node_to_onnx(node)
    assert caught.value.node == "sum"


def topk(opset: int) -> onnx.ModelProto:
    node = onnx.helper.make_node("TopK", ["x", "k"], ["v", "i"], axis=1, name="top")
    return one_node(node, opset)


def one_node(node: onnx.NodeProto, opset: int) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(
        [node],
        "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, X.shape)],
        [onnx.helper.make_empty_tensor_value_info(n) for n in node.output],
        [onnx.numpy_helper.from_array(np.asarray([2]), n) for n in node.input[1:]],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    model.ir_version = 10
    return model


@pytest.mark.parametrize("opset", [10, 11, 17])
def test_opaque_nodes_are_written_where_they_mean_the_same(opset: int) -> None:
    graph = load_onnx(topk(opset))
    for model in (to_onnx(graph), node_to_onnx(graph.nodes[0])):
        assert model.opset_import[0].version == 17
        got, want = in_ort(model, {"x": X}), run(graph, {"x": X})
        for name in ("v", "i"):
            np.testing.assert_array_equal(got[name], want[name])


def test_opaque_nodes_that_changed_their_meaning_are_refused() -> None:
    node = onnx.helper.make_node("Hardmax", ["x"], ["y"], name="hard")
    graph = load_onnx(one_node(node, 11))
    with pytest.raises(UnsupportedOpError, match=r"has the model's versions of Hard"):
        to_onnx(graph)
    assert node_to_onnx(graph.nodes[0]).opset_import[0].version == 11


# ---------------------------------------------------------------------------------- real models


@each_model
def test_real_models_survive_import_and_export(path: Path, rng: np.random.Generator) -> None:
    graph = model_graph(path)
    feeds = noise(graph, rng)
    want = Session(path, optimization="disabled").run(feeds)
    model = to_onnx(graph)
    got = in_ort(model, feeds)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
