# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products without calibration: the graph says what is computed, and that is what it computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qcompiler import numerics
from qcompiler.errors import UsageError
from qcompiler.interpreter import known, run
from qcompiler.ir import Graph, Node
from qcompiler.ops import Stage
from qcompiler.passes.narrow_products import NarrowProducts, group_qparams
from qcompiler.passmanager import ModifiedInstrument, PassContext, PassManager, parse_pass
from qcompiler.plan import PrecisionPlan, precision_of, uniform
from qcompiler.types import Array, DType, PerGroup, Precision, TensorType


def net(rng: np.random.Generator, *, k: int = 64, transpose_b: bool = False) -> Graph:
    """Two products of one input, with and without bias, and an elementwise function."""
    graph = Graph("net")
    x = graph.add_input("x", TensorType((2, 5, k), DType.FLOAT32))
    w = graph.constant(rng.standard_normal((k, 24)).astype(np.float32), "w")
    v = graph.constant(rng.standard_normal((24, k) if transpose_b else (k, 24)).astype("f4"), "v")
    bias = graph.constant(rng.standard_normal(24).astype(np.float32), "bias")
    a = graph.add("matmul", [x, w, bias], name="one").output
    b = graph.add("matmul", [x, v], {"transpose_b": transpose_b}, name="two").output
    y = graph.add("tanh", [graph.add("sub", [a, b], name="sub").output], name="tanh").output
    graph.set_outputs([("y", y)])
    graph.stage = Stage.INTEGER
    return graph


def narrowed(
    graph: Graph, precision: str, narrow: NarrowProducts | None = None
) -> tuple[Graph, PrecisionPlan]:
    """The graph with everything at a precision."""
    plan = uniform(graph, precision)
    ctx = PassContext()
    ctx.put(plan)
    manager = PassManager(
        [narrow or NarrowProducts()], [ModifiedInstrument()], given=(PrecisionPlan,)
    )
    return manager.run(graph, ctx), plan


def products(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op.name in ("matmul", "dynamic_matmul", "conv")]


@pytest.mark.parametrize("transpose_b", [False, True])
def test_half_precision_rounds_weights_and_nothing_else(
    rng: np.random.Generator, transpose_b: bool
) -> None:
    graph = net(rng, transpose_b=transpose_b)
    half, _ = narrowed(graph, "fp16")
    x = rng.standard_normal((2, 5, 64)).astype(np.float32)
    for node in graph.nodes:
        if node.op.name == "matmul":
            rounded = node.input(1).array().astype(np.float16).astype(np.float32)
            graph.set_input(node, 1, graph.constant(rounded))
    np.testing.assert_array_equal(run(half, {"x": x})["y"], run(graph, {"x": x})["y"])
    assert [precision_of(n) for n in products(half)] == [Precision.FP16] * 2
    held = [v for v in half.constants() if v.dtype is DType.FLOAT16]
    assert [v.name for v in held] == ["w_1", "v_1"]


@pytest.mark.parametrize("precision", ["w8", "w4"])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_weights_in_groups_are_near_the_weights(
    rng: np.random.Generator, precision: str, transpose_b: bool, asymmetric: bool
) -> None:
    graph = net(rng, transpose_b=transpose_b)
    narrow = NarrowProducts(w8_group=16, w4_group=16, asymmetric=asymmetric)
    made, _ = narrowed(graph, precision, narrow)
    bits = int(precision[1])
    for before, after in zip(products(graph), products(made), strict=True):
        held = after.input(1).producer.input(0)
        axis = 1 if transpose_b and before.name == "two" else 0
        assert held.qparams.granularity == PerGroup(axis, 16)
        assert held.dtype.bits == bits
        assert held.qparams.is_symmetric != asymmetric
        w, got = before.input(1).array(), known(after.input(1))
        step = numerics.expanded(held.qparams, w.shape)[0]
        error = np.abs(got - w) / step
        assert np.median(error) < 0.5
        assert error.max() <= (0.5001 if bits == 8 or asymmetric else 4)
        assert precision_of(after) is Precision.parse(precision)
    x = rng.standard_normal((2, 5, 64)).astype(np.float32)
    assert run(made, {"x": x})["y"].shape == (2, 5, 24)


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_activations_are_quantized_once_for_all_products(
    rng: np.random.Generator, per: str
) -> None:
    graph = net(rng, transpose_b=True)
    precision = "w8a8-dynamic" if per == "row" else "w8a8-dynamic-tensor"
    made, plan = narrowed(graph, precision)
    assert [n.op.name for n in made.nodes].count("dynamic_quantize") == 1
    assert [precision_of(n).value for n in products(made)] == [precision] * 2
    assert [n.name for n in products(made)] == ["one", "two"]
    assert per in plan.reason("one")
    x = (rng.standard_normal((2, 5, 64)) * [[[1], [10], [0.1], [1], [1]]]).astype(np.float32)
    want, got = run(graph, {"x": x}), run(made, {"x": x})
    error = np.abs(got["y"] - want["y"])
    assert 0 < error.mean() < (0.02 if per == "row" else 0.2)


def test_only_products_with_weights_change(rng: np.random.Generator) -> None:
    graph = net(rng)
    plan = uniform(graph, "w4")
    assert plan.precision("one") is Precision.W4
    assert plan.precision("tanh") is Precision.FP32
    assert plan.reason("tanh") == "it has no weights to multiply: tanh"
    assert not plan.has_integers
    assert plan.has_narrow


def test_rows_of_a_table_are_read_in_half_precision(rng: np.random.Generator) -> None:
    graph = Graph("table")
    ids = graph.add_input("ids", TensorType((3,), DType.INT64))
    table = graph.constant(rng.standard_normal((10, 4)).astype(np.float32), "table")
    graph.set_outputs([("y", graph.add("gather", [table, ids], {"axis": 0}).output)])
    graph.stage = Stage.INTEGER
    made, _ = narrowed(graph, "fp16")
    got = run(made, {"ids": np.asarray([9, 0, 3])})["y"]
    want = table.array()[[9, 0, 3]].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.float32
    assert [n.op.name for n in made.nodes] == ["gather", "cast"]


Obstacle = Callable[[Graph], Node]


def vector(graph: Graph) -> Node:
    x = graph.add_input("x", TensorType((64,), DType.FLOAT32))
    return graph.add("matmul", [x, graph.constant(np.ones((64, 8), np.float32))])


def large(graph: Graph) -> Node:
    x = graph.add_input("x", TensorType((2, 64), DType.FLOAT32))
    return graph.add("matmul", [x, graph.constant(np.full((64, 8), 65520.0, np.float32))])


def not_finite(graph: Graph) -> Node:
    x = graph.add_input("x", TensorType((2, 64), DType.FLOAT32))
    return graph.add("matmul", [x, graph.constant(np.full((64, 8), np.inf, np.float32))])


def prime(graph: Graph) -> Node:
    x = graph.add_input("x", TensorType((2, 37), DType.FLOAT32))
    return graph.add("matmul", [x, graph.constant(np.ones((37, 8), np.float32))])


def computed(graph: Graph) -> Node:
    x = graph.add_input("x", TensorType((8, 8), DType.FLOAT32))
    return graph.add("matmul", [x, x])


def conv(graph: Graph, group: int = 1) -> Node:
    x = graph.add_input("x", TensorType((1, 32, 4, 4), DType.FLOAT32))
    w = graph.constant(np.ones((16, 32 // group, 1, 1), np.float32))
    attrs = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), "group": group}
    return graph.add("conv", [x, w], attrs)


@pytest.mark.parametrize(
    ("build", "precision", "obstacle"),
    [
        (vector, "w8", "not one of rows with a constant matrix"),
        (vector, "fp16", None),
        (large, "fp16", "leave the range of half precision"),
        (large, "w4", None),
        (not_finite, "w8", "NaN or infinity"),
        (not_finite, "fp16", "leave the range"),
        (prime, "w4", "37 weights along the summed axis"),
        (prime, "w8a8-dynamic", None),
        (computed, "w8", "not a constant matrix"),
        (computed, "fp16", "not a constant matrix"),
        (conv, "w4", None),
        (conv, "w8a8-dynamic", "for matrix products only"),
        (lambda g: conv(g, 2), "w8", "several groups"),
        (lambda g: conv(g, 2), "fp16", None),
    ],
)
def test_why_a_product_stays_float(build: Obstacle, precision: str, obstacle: str | None) -> None:
    graph = Graph("net")
    node = build(graph)
    graph.set_outputs([("y", node.output)])
    plan = uniform(graph, precision)
    if obstacle is None:
        assert plan.precision(node.name).value == precision
        return
    assert plan.precision(node.name) is Precision.FP32
    assert obstacle in plan.reason(node.name)
    with pytest.raises(UsageError, match="cannot have the precision"):
        plan.overridden(graph, {node.name: precision})


def test_the_text_form_and_a_group_of_nothing() -> None:
    narrow = NarrowProducts(w4_group=64, asymmetric=True)
    assert parse_pass(narrow.spec(), {narrow.name: NarrowProducts}) == narrow
    graph = net(np.random.default_rng(0))
    with pytest.raises(UsageError, match="at least one weight"):
        narrowed(graph, "w4", NarrowProducts(w4_group=0))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_of_a_group_does_not_depend_on_other_groups(
    rng: np.random.Generator, bits: int
) -> None:
    w: Array = rng.standard_normal((32, 6)).astype(np.float32)
    w[:16] *= 100
    q = group_qparams(w, 0, 16, bits)
    assert q.scale.shape == (2, 6)
    for half in range(2):
        part = w[16 * half : 16 * half + 16]
        np.testing.assert_array_equal(group_qparams(part, 0, 16, bits).scale[0], q.scale[half])
