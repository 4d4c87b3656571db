# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.passes.eliminate_dead import EliminateDead
from qcompiler.passes.fold_constants import FoldConstants
from qcompiler.types import DType, PerAxis, QuantParams, TensorType


def with_constants(uniform: Any) -> Graph:
    graph = Graph("net")
    x = graph.add_input("x", TensorType((2, 4), DType.FLOAT32))
    a, b = graph.constant(uniform(2, 4), "a"), graph.constant(uniform(4), "b")
    total = graph.add("add", [a, b], names=["sum"]).output
    first, second = graph.add("split", [total], {"axis": 1, "sizes": (1, 3)}).outputs
    y = graph.add("mul", [x, graph.add("relu", [first]).output]).output
    graph.set_outputs([("y", y), ("second", second)])
    return graph


def test_nodes_of_constants_are_evaluated(uniform: Any, rewrite: Any) -> None:
    graph = rewrite(FoldConstants(), with_constants(uniform))
    assert [n.op.name for n in graph.nodes] == ["mul"]
    assert graph.outputs[1][1].is_constant


def test_the_limit_holds(uniform: Any, rewrite: Any) -> None:
    graph = Graph("net")
    big = graph.constant(uniform(1, 1), "big")
    graph.set_outputs([("y", graph.add("expand", [big], {"shape": (1024, 512)}).output)])
    rewrite(FoldConstants(max_mb=1), graph, modified=False)
    rewrite(FoldConstants(max_mb=2), graph)


def test_results_without_elements_are_constants(load_text: Any, rewrite: Any) -> None:
    text = """(float[2,4] x) => (float[2,4] y, z) {
        s = Slice(x, zero, zero, zero)  z = Relu(s)  y = Concat<axis: int = 0>(z, x)
    }"""
    graph = rewrite(FoldConstants(), load_text(text, zero=np.array([0])))
    assert not graph.nodes
    assert graph.outputs[1][1].is_constant


def test_nothing_to_fold(load_text: Any, rewrite: Any) -> None:
    rewrite(
        FoldConstants(), load_text("(float[2] x) => (float[2] y) { y = Relu(x) }"), modified=False
    )


def test_a_quantized_constant_keeps_its_dequantize(uniform: Any, rewrite: Any) -> None:
    q = QuantParams(np.float32([0.1, 0.2]), np.int32([0, 0]), DType.INT8, -127, 127, PerAxis(1))
    graph = Graph("net", Stage.QDQ)
    w = graph.constant(uniform(3, 2), "w")
    held = graph.add("quantize", [w], types=[TensorType((3, 2), DType.INT8, q)]).output
    turned = graph.add("transpose", [held], {"perm": (1, 0)}).output
    x = graph.add_input("x", TensorType((4, 2), DType.FLOAT32))
    y = graph.add("matmul", [x, graph.add("dequantize", [turned]).output]).output
    graph.set_outputs([("y", y)])
    graph = rewrite(FoldConstants(), graph)
    assert [n.op.name for n in graph.nodes] == ["dequantize", "matmul"]
    stored = graph.nodes[0].input(0)
    assert stored.qparams is not None
    assert stored.qparams.granularity == PerAxis(0)


def test_dead_nodes_go_and_inputs_stay(uniform: Any, rewrite: Any) -> None:
    graph = with_constants(uniform)
    unused = graph.add_input("unused", TensorType((3,), DType.FLOAT32))
    graph.add("relu", [graph.add("neg", [unused]).output])
    after = rewrite(EliminateDead(), graph)
    assert len(after) == len(graph) - 2
    assert [v.name for v in after.inputs] == ["x", "unused"]
    rewrite(EliminateDead(), after, modified=False)


@pytest.mark.parametrize("text", ["fold_constants{max_mb=3}"])
def test_text_form(text: str) -> None:
    assert FoldConstants(max_mb=3).spec() == text
