# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""LSTM, GRU and RNN: imported, exported and compiled, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.errors import ModelError, UnsupportedOpError
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.onnx_export import to_onnx
from qcompiler.onnx_import import load_onnx
from qcompiler.ort import Session
from qcompiler.types import Array

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, WIDTH, HIDDEN = 5, 2, 6, 8


def values(*shape: int) -> Array:
    rng = np.random.default_rng(sum(shape) + 7 * len(shape))
    return (rng.normal(0, 0.5, shape)).astype(np.float32)


def recurrent(
    op: str, *, given: tuple[str, ...] = ("B",), lens: Array | None = None, **attrs: Any
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of one node; X and the initial states are inputs, the rest is constant."""
    d = 2 if attrs.get("direction") == "bidirectional" else 1
    n = GATES[op] * HIDDEN
    first = bool(attrs.get("layout"))
    state = (BATCH, d, HIDDEN) if first else (d, BATCH, HIDDEN)
    feeds = {"X": values(BATCH, STEPS, WIDTH) if first else values(STEPS, BATCH, WIDTH)}
    constants = {"W": values(d, n, WIDTH), "R": values(d, n, HIDDEN)}
    optional = {"B": values(d, 2 * n), "P": values(d, 3 * HIDDEN)}
    constants |= {name: array for name, array in optional.items() if name in given}
    for name in ("h0", "c0"):
        if name in given:
            feeds[name] = values(*state)
    if lens is not None:
        constants["lens"] = lens
    order = ["X", "W", "R", "B", "lens", "h0", *(["c0", "P"] if op == "LSTM" else [])]
    names = [name if name in feeds or name in constants else "" for name in order]
    outputs = ["Y", "Y_h", *(["Y_c"] if op == "LSTM" else [])]
    node = helper.make_node(op, names, outputs, "cell", hidden_size=HIDDEN, **attrs)
    graph = helper.make_graph(
        [node],
        "net",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in feeds.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(a, k) for k, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return onnx.shape_inference.infer_shapes(model), feeds


def check(graph: Graph, feeds: dict[str, Array], want: dict[str, Array]) -> None:
    for name, array in run(graph, feeds).items():
        np.testing.assert_allclose(array, want[name], rtol=1e-4, atol=1e-6)


CASES: list[tuple[str, dict[str, Any]]] = [
    *((op, {}) for op in GATES),
    *((op, {"direction": "reverse", "given": ("B", "h0", "c0")}) for op in GATES),
    *((op, {"direction": "bidirectional", "given": ("B", "h0", "c0")}) for op in GATES),
    *((op, {"lens": np.asarray([5, 3], np.int32), "direction": "bidirectional"}) for op in GATES),
    *((op, {"clip": 0.3}) for op in GATES),
    ("LSTM", {"given": ("B", "P", "h0", "c0")}),
    ("LSTM", {"input_forget": 1, "given": ("B", "P")}),
    ("LSTM", {"activations": ["HardSigmoid", "Softsign", "Relu"], "activation_alpha": [0.3],
              "activation_beta": [0.4]}),
    ("GRU", {"linear_before_reset": 1, "direction": "bidirectional", "given": ("B", "h0")}),
    ("GRU", {"linear_before_reset": 1, "given": ()}),
    ("GRU", {"activations": ["HardSigmoid", "LeakyRelu"], "activation_alpha": [0.25, 0.1],
             "activation_beta": [0.45]}),
    ("RNN", {"activations": ["Affine"], "activation_alpha": [0.5], "activation_beta": [0.1]}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "options"), CASES)
def test_agrees_with_onnx_runtime(op: str, options: dict[str, Any]) -> None:
    model, feeds = recurrent(op, **options)
    want = Session(model.SerializeToString(), optimization="disabled").run(feeds)
    graph = load_onnx(model)
    check(graph, feeds, want)
    kinds = [n.op.name for n in graph.nodes]
    directions = 2 if options.get("direction") == "bidirectional" else 1
    assert kinds.count(op.lower()) == kinds.count("matmul") == directions
    written = to_onnx(graph)
    assert not any(n.op_type in ("MatMul", "Gemm") for n in written.graph.node)
    again = Session(written.SerializeToString(), optimization="disabled").run(feeds)
    for name, array in want.items():
        np.testing.assert_allclose(again[name], array, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("op", GATES)
def test_compiled_float(op: str) -> None:
    model, feeds = recurrent(op, direction="bidirectional", given=("B", "h0", "c0"))
    want = Session(model.SerializeToString(), optimization="disabled").run(feeds)
    compiled = qcompiler.compile(model, precision="fp32")
    for name, array in compiled(feeds).items():
        np.testing.assert_allclose(array, want[name], rtol=1e-4, atol=1e-6)


def test_the_gates_stay_where_something_else_reads_them() -> None:
    model, feeds = recurrent("LSTM")
    graph = load_onnx(model)
    gates = next(n for n in graph.nodes if n.op.name == "lstm").input(0)
    written = to_onnx(graph, extra_outputs=[gates.name])
    assert sum(n.op_type == "MatMul" for n in written.graph.node) == 1
    found = Session(written.SerializeToString(), optimization="disabled").run(feeds)
    kept = run(graph, feeds, keep=[gates])[gates.name]
    np.testing.assert_allclose(found[gates.name], kept, rtol=1e-5, atol=1e-6)


def test_batch_first() -> None:
    """ONNX Runtime refuses layout 1, so the same cell with time first is the reference."""
    for op in GATES:
        turned, feeds = recurrent(op, layout=1, given=("B", "h0", "c0"))
        plain, _ = recurrent(op, given=("B", "h0", "c0"))
        straight = {k: np.ascontiguousarray(v.swapaxes(0, 1)) for k, v in feeds.items()}
        want = Session(plain.SerializeToString(), optimization="disabled").run(straight)
        found = run(load_onnx(turned), feeds)
        np.testing.assert_allclose(found["Y"], want["Y"].transpose(2, 0, 1, 3), atol=1e-6)
        np.testing.assert_allclose(found["Y_h"], want["Y_h"].swapaxes(0, 1), atol=1e-6)


def test_refusals() -> None:
    model, _ = recurrent("RNN", activations=["Gumbel"])
    with pytest.raises(UnsupportedOpError, match="its activation Gumbel is not known"):
        load_onnx(model)
    model, _ = recurrent("LSTM", activations=["Tanh"])
    with pytest.raises(ModelError, match="1 activations, expected 3"):
        load_onnx(model)
    model, _ = recurrent("GRU")
    model.graph.node[0].attribute[0].i = 3
    with pytest.raises(ModelError, match="hidden_size is 3, R has 8 columns"):
        load_onnx(model)


def sequence_model(first: str, direction: str = "forward") -> onnx.ModelProto:
    """frames [T, 6] -> LSTM over T, its batch 1; the states are inputs."""
    values_of = {"W": values(1, 32, WIDTH), "R": values(1, 32, HIDDEN)}
    nodes = [
        helper.make_node("Unsqueeze", ["frames", "one"], ["X"]),
        helper.make_node(
            "LSTM",
            ["X", "W", "R", "", "", "h0", "c0"],
            ["Y", "hn", "cn"],
            hidden_size=HIDDEN,
            direction=direction,
        ),
        helper.make_node("Squeeze", ["Y", "both"], ["y"]),
    ]
    constants = {**values_of, "one": np.asarray([1]), "both": np.asarray([1, 2])}
    shapes: dict[str, list[int | str]] = {
        "frames": [first, WIDTH],
        "h0": [1, 1, HIDDEN],
        "c0": [1, 1, HIDDEN],
    }
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [first, HIDDEN]),
            *(
                helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, HIDDEN])
                for n in ("hn", "cn")
            ),
        ],
        [numpy_helper.from_array(a, k) for k, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


@pytest.mark.parametrize("steps", [None, 5])
def test_steps_are_no_batch(steps: int | None) -> None:
    """Samples along the time axis depend on each other, so a run must not be cut into runs."""
    shapes = None if steps is None else {"frames": (steps, WIDTH)}
    graph = load_onnx(sequence_model("T"), input_shapes=shapes)
    assert [v.batch_axis for v in (*graph.inputs, *graph.output_values)] == [None] * 6


def test_a_batch_beside_the_steps_stays_one() -> None:
    model, _ = recurrent("GRU", layout=1)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    graph = load_onnx(model)
    assert graph.inputs[0].shape == (1, STEPS, WIDTH)
    assert [v.batch_axis for v in (*graph.inputs, *graph.output_values)] == [0, 0, 0]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_one_artifact_serves_sequences_of_any_length(direction: str) -> None:
    """The loop ends with the used part, so the last states are those of the exact length."""
    model = sequence_model("T", direction)
    compiled = qcompiler.compile(model, precision="fp32", input_shapes={"frames": ((1, 20), WIDTH)})
    reference = Session(model.SerializeToString(), optimization="disabled")
    for steps in (1, 3, 8, 20):
        feeds = {
            "frames": values(steps, WIDTH),
            "h0": values(1, 1, HIDDEN),
            "c0": values(1, 1, HIDDEN) + 1,
        }
        want = reference.run(feeds)
        for name, array in compiled(feeds).items():
            np.testing.assert_allclose(array, want[name], rtol=1e-4, atol=1e-6)
