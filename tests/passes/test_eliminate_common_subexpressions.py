# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions

PASS = EliminateCommonSubexpressions()


def test_equal_nodes_and_constants_become_one(load_text: Any, rewrite: Any, golden: Any) -> None:
    graph = load_text(
        """(float[2,3] x) => (float[2,3] y, float[2,3] z) {
            a = Add(x, c)
            b = Add(x, d)
            e = Relu(a)
            f = Relu(b)
            y = Mul(e, f)
            z = Neg(f)
        }""",
        c=np.float32([1, 2, 3]),
        d=np.float32([1, 2, 3]),
    )
    after = rewrite(PASS, graph)
    assert [n.op.name for n in after.nodes] == ["add", "relu", "mul", "neg"]
    assert after.nodes[0].sources == ("Add_0", "Add_1")
    assert str(after) == golden


def test_equal_results_may_be_two_outputs(load_text: Any, rewrite: Any) -> None:
    graph = load_text("(float[N,3] x) => (float[N,3] y, float[N,3] z) { y = Relu(x) z = Relu(x) }")
    after = rewrite(PASS, graph)
    assert len(after) == 1
    assert [v.batch_axis for v in after.output_values] == [0, 0]


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Softmax<axis: int = 0>(x) b = Softmax<axis: int = 1>(x)",  # other attributes
        "a = Sub(x, w) b = Sub(w, x)",  # other order
        "a = Relu(x) b = Neg(x)",
    ],
)
def test_different_nodes_stay(load_text: Any, rewrite: Any, nodes: str) -> None:
    graph = load_text(f"(float[2,3] x, float[2,3] w) => (float[2,3] a, float[2,3] b) {{ {nodes} }}")
    rewrite(PASS, graph, modified=False)


def test_equal_bytes_of_another_shape_or_dtype_stay(load_text: Any, rewrite: Any) -> None:
    graph = load_text(
        "(float[2,2] x) => (float[2,2] y) { a = Add(x, c) b = Add(a, d) y = Where(e, b, x) }",
        c=np.zeros((1, 2), np.float32),
        d=np.zeros(2, np.float32),
        e=np.zeros(2, bool),
    )
    rewrite(PASS, graph, modified=False)
