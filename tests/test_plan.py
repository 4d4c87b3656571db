# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Precision plans: the uniform plan's reasons, overrides, the JSON form."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qcompiler.errors import UsageError
from qcompiler.ir import Graph
from qcompiler.plan import Decision, PrecisionPlan, uniform
from qcompiler.printer import digest
from qcompiler.types import UNCALIBRATED, DType, Precision, TensorType


def network() -> Graph:
    g = Graph("net")
    x = g.add_input("x", TensorType((2, 4), DType.FLOAT32))
    w = g.constant(np.ones((4, 4), np.float32), "w")
    a = g.add("matmul", [x, w], name="layer1.fc").output
    b = g.add("relu", [a], name="layer1.act").output
    c = g.add("matmul", [b, g.add("transpose", [b], {"perm": (1, 0)}, name="t").output], name="mm")
    d = g.add("log_softmax", [c.output], name="out").output
    e = g.add("matmul", [w, g.add("transpose", [x], {"perm": (1, 0)}, name="xt").output], name="wx")
    g.set_outputs([("y", d), ("z", e.output)])
    return g


def test_uniform_says_why():
    g = network()
    plan = uniform(g)
    assert plan.graph == digest(g)
    assert plan.nodes["layer1.fc"] == Decision(
        Precision.W8A8, "weights and activations are known: int8"
    )
    assert plan.reason("mm") == "both operands are known: int8"
    assert plan.nodes["out"] == Decision(
        Precision.FP32, "operator has no integer form: log_softmax"
    )
    assert plan.nodes["wx"] == Decision(Precision.FP32, "the left operand of matmul is a constant")
    assert uniform(g, "w4a8").reason("layer1.fc").endswith("int4 weights, int8 activations")


@pytest.mark.parametrize("op", ["sqrt", "exp", "square"])
def test_functions_of_many_magnitudes_stay_float(op):
    g = Graph("net")
    x = g.add_input("x", TensorType((2, 4), DType.FLOAT32))
    y = g.add("mul", [x, x], name="f") if op == "square" else g.add(op, [x], name="f")
    g.set_outputs([("y", y.output)])
    assert uniform(g).reason("f").startswith("its results span too many magnitudes for 8 bits")


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        ("fp32", "fp32 was asked for"),
        ("fp16", "weights held in float16"),
        ("w4", "weights held in int4 by groups, computed in float32"),
        ("w8a8-dynamic", "activations quantized per row at run time"),
        ("w8a8-dynamic-tensor", "activations quantized per tensor at run time"),
    ],
)
def test_plans_without_calibration_have_no_integers(precision, reason):
    graph = Graph("net")
    x = graph.add_input("x", TensorType((2, 16), DType.FLOAT32))
    node = graph.add("matmul", [x, graph.constant(np.ones((16, 4), np.float32))], name="fc")
    graph.set_outputs([("y", node.output)])
    plan = uniform(graph, precision)
    assert not plan.has_integers
    assert plan.has_narrow == (precision != "fp32")
    assert plan.precision("fc").value == precision
    assert plan.reason("fc") == reason


def test_widths_of_precisions():
    bits = {p.value: (p.weight_bits, p.activation_bits) for p in Precision}
    assert bits["w4a8"] == (4, 8)
    assert bits["w8a8-dynamic"] == bits["w8a8-dynamic-tensor"] == (8, 8)
    assert bits["w8"] == (8, 32)
    assert bits["w4"] == (4, 32)
    assert bits["fp16"] == (16, 32)
    assert bits["fp32"] == (32, 32)
    assert [p for p in Precision if p.is_integer and p in UNCALIBRATED] == []


def test_nodes_that_a_plan_does_not_name_are_float():
    assert PrecisionPlan().precision("anything") is Precision.FP32
    assert PrecisionPlan().reason("anything") == ""


@pytest.mark.parametrize("selector", ["layer1.fc", "layer1.*", "op:matmul"])
def test_overrides(selector):
    g = network()
    plan = uniform(g, "fp32").overridden(g, {"layer1.fc": "w4a8"}).overridden(g, {selector: "fp32"})
    assert plan.nodes["layer1.fc"] == Decision(Precision.FP32, f"asked for by {selector!r}")
    assert plan.nodes["t"] == uniform(g, "fp32").nodes["t"]


def test_override_that_selects_nothing():
    g = network()
    with pytest.raises(UsageError, match=r"no node is selected by 'nix\*', 'op:conv'"):
        uniform(g).overridden(g, {"nix*": "fp32", "op:conv": "fp32"})


def test_override_of_an_operator_without_integer_form():
    g = network()
    with pytest.raises(UsageError, match=r"'out' cannot have the precision w8a8: operator has no"):
        uniform(g).overridden(g, {"out": "w8a8"})


def test_unknown_precision():
    with pytest.raises(UsageError, match="unknown precision 'w3a3'"):
        uniform(network(), "w3a3")


def test_json(tmp_path):
    plan = uniform(network())
    plan.save(tmp_path / "p.json")
    again = PrecisionPlan.load(tmp_path / "p.json")
    assert again == plan
    assert again.digest() == plan.digest()
    assert again.digest() != plan.overridden(network(), {"t": "fp32"}).digest()
    made = dataclasses.replace(plan, methods="equalize,gptq")
    made.save(tmp_path / "p.json")
    assert PrecisionPlan.load(tmp_path / "p.json") == made
    assert made.overridden(network(), {"t": "fp32"}).methods == "equalize,gptq"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the precision plan"),
        ("[]", "a precision plan is a JSON object"),
        ('{"format": 2, "nodes": {}}', "precision plan of format 2, expected 1"),
        ('{"format": 1, "nodes": {"a": {}}}', "node 'a' has no 'precision'"),
        ('{"format": 1, "nodes": {"a": {"precision": "x"}}}', "unknown precision 'x'"),
        ('{"format": 1, "nodes": {}, "methods": ["gptq"]}', "'methods' is .'gptq'., expected a"),
    ],
)
def test_damaged_plans(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        PrecisionPlan.load(tmp_path / "p.json")


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="cannot read the precision plan"):
        PrecisionPlan.load(tmp_path / "none.json")
