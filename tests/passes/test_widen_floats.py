# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.interpreter import run
from qcompiler.passes.widen_floats import WidenFloats
from qcompiler.passmanager import ModifiedInstrument, PassContext, PassManager
from qcompiler.types import DType

PASS = WidenFloats()


def widened(graph: Any) -> Any:
    after = PassManager([PASS], [ModifiedInstrument()]).run(graph, PassContext())
    assert PASS.run(after, PassContext()) is False
    return after


def test_half_precision_lives_at_the_interface_only(
    load_text: Any, uniform: Any, golden: Any
) -> None:
    graph = load_text(
        """(float16[N,4] x, float[N,3] r) => (float16[N,3] y, int64[N] i, float[N,3] z) {
            c = MatMul(x, w)
            d = Relu(c)
            i = ArgMax<axis: int = 1, keepdims: int = 0>(d)
            f = Cast<to: int = 1>(d)
            z = Add(f, r)
            h = Cast<to: int = 10>(z)
            y = Mul(h, d)
        }""",
        w=np.ones((4, 3), np.float16),
    )
    after = widened(graph)
    computing = [n for n in after.nodes if n.op.name != "cast"]
    assert all(v.dtype is not DType.FLOAT16 for n in computing for v in (*n.operands, *n.outputs))
    assert [v.dtype for v in after.output_values] == [DType.FLOAT16, DType.INT64, DType.FLOAT32]
    assert [v.batch_axis for v in after.output_values] == [0, 0, 0]
    assert {n.name for n in computing} == {"MatMul_0", "Relu_0", "ArgMax_0", "Add_0", "Mul_0"}
    assert [v.name for v in after.output_values] == ["y", "i", "z"]
    feeds = {"x": uniform(1, 4).astype(np.float16), "r": uniform(1, 3)}
    want, got = run(graph, feeds), run(after, feeds)
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_allclose(got[name], array, rtol=5e-3, atol=5e-3)
    assert str(after) == golden


def test_opaque_nodes_keep_their_dtypes(load_text: Any, uniform: Any) -> None:
    graph = load_text(
        """(float16[3,4] x) => (float16[3,4] y, float16[3,4] s) {
            a = Relu(x)
            s = Hardmax(a)
            y = Add(s, a)
        }"""
    )
    after = widened(graph)
    (opaque,) = [n for n in after.nodes if n.op.name == "opaque"]
    assert opaque.input(0).dtype is opaque.output.dtype is DType.FLOAT16
    assert after.outputs[1][1] is opaque.output
    after.verify()


def test_an_input_that_is_an_output_stays(load_text: Any) -> None:
    graph = load_text(
        "(float16[3] x) => (float16[3] x2, float16[3] y) { x2 = Identity(x) y = Neg(x) }"
    )
    after = widened(graph)
    assert after.outputs[0][1] is after.inputs[0]


def test_bfloat16_constants(load_text: Any, uniform: Any) -> None:
    graph = load_text(
        """(float[2,3] x) => (float[2,3] y) {
            h = Cast<to: int = 16>(w)
            g = Cast<to: int = 16>(x)
            m = Mul(g, h)
            y = Cast<to: int = 1>(m)
        }""",
        w=np.float32([1, 2, 3]),
    )
    after = widened(graph)
    assert [n.op.name for n in after.nodes] == ["mul", "cast"]
    x = uniform(2, 3)
    np.testing.assert_allclose(run(after, {"x": x})["y"], x * np.float32([1, 2, 3]))


def test_float32_and_float64_are_left_alone(load_text: Any, rewrite: Any) -> None:
    rewrite(PASS, load_text("(float[3] x) => (float[3] y) { y = Neg(x) }"), modified=False)
    rewrite(PASS, load_text("(double[3] x) => (double[3] y) { y = Neg(x) }"), modified=False)
    graph = load_text("(float16[3] x) => (float[3] y) { y = Cast<to: int = 1>(x) }")
    rewrite(PASS, graph, modified=False)
