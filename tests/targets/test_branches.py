# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Branches at run time: what is guarded, and that the branch not taken costs nothing."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

import qcompiler
from qcompiler.ir import Graph
from qcompiler.onnx_import import load_onnx
from qcompiler.ort import Session
from qcompiler.targets.branches import guards_of, in_order
from qcompiler.types import Array


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)


BRANCHES = """
    net (float[64, 64] x, float s, bool late) => (float[64, 64] y, float[64, 64] kept)
    <float zero = {0.0}> {
        shared = Tanh(x)
        kept = Abs(x)
        flag = Greater(s, zero)
        y = If(flag) <
            then_branch = g () => (float[64, 64] a) {
                b = MatMul(shared, x)
                c = If(late) <
                    then_branch = gg () => (float[64, 64] d) { d = Cos(b) },
                    else_branch = gh () => (float[64, 64] e) { e = MatMul(b, b) }
                >
                a = Add(c, kept)
            },
            else_branch = h () => (float[64, 64] f) { f = MatMul(x, shared) }
        >
    }
"""


def guard_names(graph: Graph) -> dict[str, list[tuple[str, bool]]]:
    return {
        n.op.name + n.output.name: [(g.condition.name, g.when) for g in guards]
        for n, guards in guards_of(graph).items()
        if n.op.name != "reshape"
    }


def test_only_what_a_branch_alone_reads_is_guarded() -> None:
    graph = load_onnx(parse(BRANCHES))
    found = guard_names(graph)
    then, other = [("flag", True)], [("flag", False)]
    assert found == {
        "matmulb": then,
        "cosd": [("late", True), ("flag", True)],
        "matmule": [("late", False), ("flag", True)],
        "wherec": then,
        "adda": then,
        "matmulf": other,
    }
    # Conditions are computed before what they guard.
    order = {n: i for i, n in enumerate(in_order(graph, guards_of(graph)))}
    assert len(order) == len(graph.nodes)
    for node, guards in guards_of(graph).items():
        for g in guards:
            assert g.condition.producer is None or order[g.condition.producer] < order[node]


def test_a_mask_is_no_branch() -> None:
    graph = load_onnx(
        parse("""
        net (float[2, 3] x, bool[2, 3] mask) => (float[2, 3] y) {
            a = Exp(x)
            b = Neg(x)
            y = Where(mask, a, b)
        }
    """)
    )
    assert guards_of(graph) == {}


@pytest.mark.parametrize("s", [1.0, -1.0])
@pytest.mark.parametrize("late", [True, False])
def test_every_way_through(s: float, late: bool) -> None:
    model = parse(BRANCHES)
    x = np.random.default_rng(1).normal(0, 0.3, (64, 64)).astype(np.float32)
    feeds: dict[str, Array] = {"x": x, "s": np.asarray(s, np.float32), "late": np.asarray(late)}
    want = Session(model.SerializeToString(), optimization="disabled").run(feeds)
    compiled = qcompiler.compile(model, precision="fp32")
    for _ in range(2):  # what an earlier call left in the buffers must not matter
        for name, array in compiled(feeds).items():
            np.testing.assert_allclose(array, want[name], rtol=1e-4, atol=1e-5)
        compiled({**feeds, "s": -feeds["s"], "late": ~feeds["late"]})


def test_integer_branches() -> None:
    model = parse("""
        net (float[8, 32] x, float s) => (float[8, 32] y) <float zero = {0.0}> {
            flag = Greater(s, zero)
            y = If(flag) <
                then_branch = g () => (float[8, 32] a) { a = MatMul(x, w) },
                else_branch = h () => (float[8, 32] b) { b = MatMul(x, v) }
            >
        }
    """)
    rng = np.random.default_rng(2)
    for name in ("w", "v"):
        array = rng.normal(0, 0.3, (32, 32)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    samples = {
        "x": rng.normal(0, 1, (16, 8, 32)).astype(np.float32),
        "s": rng.normal(0, 1, 16).astype(np.float32),
    }
    compiled = qcompiler.compile(model, calibration=samples)
    assert {p["precision"] for p in compiled.plan["nodes"].values()} >= {"w8a8"}
    for k in range(4):
        feeds = {name: a[k] for name, a in samples.items()}
        want = Session(model.SerializeToString(), optimization="disabled").run(feeds)["y"]
        error = compiled(feeds)["y"] - want
        assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(want**2))


def test_the_branch_not_taken_costs_nothing() -> None:
    model = parse("""
        net (float[384, 384] x, bool flag) => (float[384, 384] y) {
            y = If(flag) <
                then_branch = g () => (float[384, 384] a) {
                    b = MatMul(x, x)  c = MatMul(b, x)  d = MatMul(c, x)  a = MatMul(d, x)
                },
                else_branch = h () => (float[384, 384] f) { f = Neg(x) }
            >
        }
    """)
    compiled = qcompiler.compile(model, precision="fp32")
    x = np.full((384, 384), 0.01, np.float32)

    def products(flag: bool) -> float:
        profile = compiled.profile({"x": x, "flag": np.asarray(flag)}, runs=7)
        return sum(seconds for symbol, seconds in profile if "matmul" in symbol)

    assert products(True) > 10 * products(False)
