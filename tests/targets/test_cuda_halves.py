# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Which values turn to halves: those between half-precision products, and no others."""

from __future__ import annotations

import numpy as np

from qcompiler.ir import Graph, Value
from qcompiler.ops import Stage
from qcompiler.targets.cuda.halves import with_halves
from qcompiler.types import DType, TensorType

F16, F32 = DType.FLOAT16, DType.FLOAT32


def product(graph: Graph, x: Value, columns: int, name: str, *, half: bool = True) -> Value:
    w = graph.constant(np.ones((x.shape[-1], columns), np.float16 if half else np.float32))
    right = graph.add("cast", [w], {"to": "float32"}).output if half else w
    return graph.add("matmul", [x, right], name=name).output


def dtypes(graph: Graph) -> dict[str, str]:
    return {n.name: n.output.dtype.value for n in graph.nodes}


def test_values_between_products_are_halves() -> None:
    graph = Graph("net", Stage.INTEGER)
    x = graph.add_input("x", TensorType((4, 8), F32))
    a = product(graph, x, 16, "first")
    b = graph.add("gelu", [a], name="gelu").output
    c = graph.add("reshape", [b], {"shape": (8, 8)}, name="view").output
    d = product(graph, c, 8, "second")
    e = graph.add("exp", [d], name="wide").output
    graph.set_outputs([("y", product(graph, e, 4, "third"))])
    before = dtypes(graph)
    found = dtypes(with_halves(graph))
    assert found == {
        "first/half": "float16",  # the input, once
        "first": "float16",
        "gelu": "float16",
        "view": "float16",
        "second": "float32",  # exp reads it
        "wide": "float32",
        "third/half": "float16",
        "third": "float32",  # a result of the graph
    }
    assert dtypes(graph) == before  # the graph itself is left alone


def test_a_cast_serves_all_products_that_read_a_value() -> None:
    graph = Graph("net", Stage.INTEGER)
    x = graph.add_input("x", TensorType((4, 8), F32))
    heads = [product(graph, x, 8, f"head{i}") for i in range(3)]
    graph.set_outputs([(f"y{i}", v) for i, v in enumerate(heads)])
    assert sum(n.op.name == "cast" for n in with_halves(graph).nodes) == 1


def test_products_of_other_weights_stay_as_they_are() -> None:
    graph = Graph("net", Stage.INTEGER)
    x = graph.add_input("x", TensorType((4, 8), F32))
    half = product(graph, x, 8, "half")
    graph.set_outputs([("y", product(graph, half, 8, "float", half=False))])
    changed = with_halves(graph)
    assert dtypes(changed)["half"] == "float32"
    assert dtypes(changed)["float"] == "float32"


def test_a_graph_without_halves_is_returned_itself() -> None:
    graph = Graph("net", Stage.INTEGER)
    x = graph.add_input("x", TensorType((4, 8), F32))
    graph.set_outputs([("y", product(graph, x, 8, "float", half=False))])
    assert with_halves(graph) is graph


def test_values_that_no_half_product_touches_stay_float() -> None:
    """Scores of attention: both operands at run time, and no weights in half precision."""
    graph = Graph("net", Stage.INTEGER)
    x = graph.add_input("x", TensorType((4, 8), F32))
    a = graph.add("relu", [x], name="a").output
    b = graph.add("tanh", [a], name="b").output
    turned = graph.add("transpose", [b], {"perm": (1, 0)}, name="turned").output
    scores = graph.add("matmul", [b, turned], name="scores").output
    c = graph.add("gelu", [scores], name="c").output
    d = graph.add("relu", [c], name="d").output
    graph.set_outputs([("y", graph.add("neg", [d], name="y").output)])
    assert set(dtypes(with_halves(graph)).values()) == {"float32"}
    half = product(graph, x, 8, "half")
    graph.set_outputs([*graph.outputs, ("z", half)])
    assert dtypes(with_halves(graph))["c"] == "float32"
