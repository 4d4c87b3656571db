# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Recurrent cells written out step by step, or as the body of a Loop or Scan, are quantized."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.driver import quantize_model
from qcompiler.ort import Session
from qcompiler.types import Array

STEPS, BATCH, WIDTH, HIDDEN = 6, 4, 8, 16
RNG = np.random.default_rng(11)
WEIGHTS = {
    name: (RNG.standard_normal(shape) / 3).astype(np.float32)
    for name, shape in {
        "w": (WIDTH, 4 * HIDDEN), "r": (HIDDEN, 4 * HIDDEN), "b": (4 * HIDDEN,),
        "gw": (WIDTH, 3 * HIDDEN), "gr": (HIDDEN, 3 * HIDDEN), "gb": (3 * HIDDEN,),
    }.items()
}  # fmt: skip


def lstm(x: str, h: str, c: str, to: str, h2: str, c2: str) -> list[onnx.NodeProto]:
    """One step of an LSTM cell as exporters write it: a product of each operand, then gates."""
    node, p = helper.make_node, f"{to}_"
    gates = [f"{p}{k}" for k in "iofg"]
    return [
        node("MatMul", [x, "w"], [f"{p}xw"], f"{p}input"),
        node("MatMul", [h, "r"], [f"{p}hr"], f"{p}state"),
        node("Add", [f"{p}xw", f"{p}hr"], [f"{p}s"]),
        node("Add", [f"{p}s", "b"], [f"{p}t"]),
        node("Split", [f"{p}t"], gates, axis=-1, num_outputs=4),
        *(node("Sigmoid", [g], [f"{g}_y"]) for g in gates[:3]),
        node("Tanh", [gates[3]], [f"{gates[3]}_y"]),
        node("Mul", [f"{p}f_y", c], [f"{p}kept"]),
        node("Mul", [f"{p}i_y", f"{p}g_y"], [f"{p}new"]),
        node("Add", [f"{p}kept", f"{p}new"], [c2]),
        node("Tanh", [c2], [f"{p}tanh"]),
        node("Mul", [f"{p}o_y", f"{p}tanh"], [h2]),
    ]


def gru(x: str, h: str, to: str, h2: str) -> list[onnx.NodeProto]:
    node, p = helper.make_node, f"{to}_"
    return [
        node("MatMul", [x, "gw"], [f"{p}xw"], f"{p}input"),
        node("Add", [f"{p}xw", "gb"], [f"{p}xb"]),
        node("MatMul", [h, "gr"], [f"{p}hr"], f"{p}state"),
        node("Split", [f"{p}xb"], [f"{p}xz", f"{p}xr", f"{p}xn"], axis=-1, num_outputs=3),
        node("Split", [f"{p}hr"], [f"{p}hz", f"{p}hh", f"{p}hn"], axis=-1, num_outputs=3),
        node("Add", [f"{p}xz", f"{p}hz"], [f"{p}z0"]),
        node("Sigmoid", [f"{p}z0"], [f"{p}z"]),
        node("Add", [f"{p}xr", f"{p}hh"], [f"{p}r0"]),
        node("Sigmoid", [f"{p}r0"], [f"{p}rr"]),
        node("Mul", [f"{p}rr", f"{p}hn"], [f"{p}n0"]),
        node("Add", [f"{p}xn", f"{p}n0"], [f"{p}n1"]),
        node("Tanh", [f"{p}n1"], [f"{p}n"]),
        node("Sub", [h, f"{p}n"], [f"{p}d"]),
        node("Mul", [f"{p}z", f"{p}d"], [f"{p}e"]),
        node("Add", [f"{p}n", f"{p}e"], [h2]),
    ]


def info(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model_of(form: str, cell: str) -> onnx.ModelProto:
    """x [steps, batch, width] -> y [steps, batch, hidden], all states of the cell."""
    node = helper.make_node
    state = ["h0", "c0"] if cell == "lstm" else ["h0"]
    constants: dict[str, Array] = dict(WEIGHTS)
    constants |= {s: np.zeros((BATCH, HIDDEN), np.float32) for s in state}
    if form == "steps":
        nodes = [node("Split", ["x"], [f"x{t}" for t in range(STEPS)], axis=0, num_outputs=STEPS)]
        constants["first"] = np.asarray([0])
        for t in range(STEPS):
            nodes.append(node("Squeeze", [f"x{t}", "first"], [f"v{t}"]))
            after = [f"{s[0]}{t + 1}" for s in state]
            before = [f"{s[0]}{t}" for s in state]
            make = lstm if cell == "lstm" else gru
            nodes += make(f"v{t}", *before, f"t{t}", *after)
            nodes.append(node("Unsqueeze", [after[0], "first"], [f"u{t}"]))
        nodes.append(node("Concat", [f"u{t}" for t in range(STEPS)], ["y"], axis=0))
    else:
        body_state = [f"{s[0]}_in" for s in state]
        out_state = [f"{s[0]}_out" for s in state]
        step = (lstm if cell == "lstm" else gru)("v", *body_state, "t", *out_state)
        carried = [info(n, BATCH, HIDDEN) for n in body_state]
        results = [info(n, BATCH, HIDDEN) for n in (*out_state, "each")]
        step.append(node("Identity", [out_state[0]], ["each"]))
        finals = [f"{s}_last" for s in state]
        if form == "scan":
            body = helper.make_graph(step, "body", [*carried, info("v", BATCH, WIDTH)], results)
            nodes = [node("Scan", [*state, "x"], [*finals, "y"], body=body, num_scan_inputs=1)]
        else:
            flag = helper.make_tensor_value_info("go", TensorProto.BOOL, [])
            again = helper.make_tensor_value_info("again", TensorProto.BOOL, [])
            index = helper.make_tensor_value_info("i", TensorProto.INT64, [])
            step = [
                node("Identity", ["go"], ["again"]),
                node("Gather", ["x", "i"], ["v"], axis=0),
                *step,
            ]
            body = helper.make_graph(step, "body", [index, flag, *carried], [again, *results])
            constants |= {"trips": np.asarray(STEPS), "yes": np.asarray(True)}
            nodes = [node("Loop", ["trips", "yes", *state], [*finals, "y"], body=body)]
    graph = helper.make_graph(
        nodes, "cell", [info("x", STEPS, BATCH, WIDTH)], [info("y", STEPS, BATCH, HIDDEN)],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def samples(count: int, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((count, STEPS, BATCH, WIDTH)).astype(np.float32)}


CASES = [(form, cell) for cell in ("lstm", "gru") for form in ("steps", "scan", "loop")]


@pytest.mark.parametrize(("form", "cell"), CASES)
def test_every_product_is_an_integer_one(form: str, cell: str) -> None:
    graph = quantize_model(model_of(form, cell), calibration=samples(16, 1)).graph
    names = [n.op.name for n in graph.nodes]
    # The first state is zero: its product is a constant.
    assert names.count("qmatmul") == 2 * STEPS - 1
    assert "matmul" not in names
    # One scale per column of the recurrent weights, so per gate and unit.
    columns = (4 if cell == "lstm" else 3) * HIDDEN
    scales = {
        n.input(1).qparams.scale.size
        for n in graph.nodes
        if n.op.name == "qmatmul" and n.input(1).qparams is not None
    }
    assert scales == {columns}
    # The gates are tables (those of the first step, without a state, stay in floats).
    assert names.count("table") >= 3 * (STEPS - 1)


@pytest.mark.parametrize(
    ("form", "cell"),
    [CASES[0], *(pytest.param(*c, marks=pytest.mark.slow) for c in CASES[1:])],
)
def test_the_artifact_agrees_with_float(form: str, cell: str) -> None:
    model = model_of(form, cell)
    compiled = qcompiler.compile(model, calibration=samples(32, 1))
    x = samples(1, 2)["x"][0]
    want = Session(model.SerializeToString(), optimization="disabled").run({"x": x})["y"]
    got = compiled({"x": x})["y"]
    noise = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert noise < 0.05
    kernels = [k["kernel"] for k in compiled.report["nodes"]]
    assert "interpreter" not in kernels
