# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.passes.fold_weight_layout import FoldWeightLayout
from qcompiler.types import (
    DType,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    QuantParams,
    TensorType,
)

PASS = FoldWeightLayout()


def test_a_float_weight(load_text: Any, rewrite: Any, uniform: Any) -> None:
    text = "(float[2,4] x) => (y) { y = Gemm<transB: int = 1>(x, w) }"
    (node,) = rewrite(PASS, load_text(text, w=uniform(3, 4))).nodes
    assert node.input(1).shape == (4, 3)
    assert node.attr("transpose_b") is False


@pytest.mark.parametrize("how", ["attribute", "operator"])
@pytest.mark.parametrize(
    ("granularity", "scales", "expected"),
    [
        (PerTensor(), (), PerTensor()),
        (PerAxis(0), (3,), PerAxis(1)),
        (PerGroup(1, 2), (3, 2), PerGroup(0, 2)),
    ],
    ids=str,
)
def test_a_quantized_weight(
    rewrite: Any,
    uniform: Any,
    how: str,
    granularity: Granularity,
    scales: tuple[int, ...],
    expected: Granularity,
) -> None:
    q = QuantParams(
        np.abs(uniform(*scales)) + np.float32(0.1), np.int32(0), DType.INT8, -127, 127, granularity
    )
    graph = Graph("net", Stage.QDQ)
    x = graph.add_input("x", TensorType((2, 4), DType.FLOAT32))
    stored = graph.constant(np.arange(12, dtype=np.int8).reshape(3, 4), "w", q)
    w = graph.add("dequantize", [stored]).output
    if how == "operator":
        w = graph.add("transpose", [w], {"perm": (1, 0)}).output
    y = graph.add("matmul", [x, w], {"transpose_b": how == "attribute"}).output
    graph.set_outputs([("y", y)])
    after = rewrite(PASS, graph)
    assert [n.op.name for n in after.nodes] == ["dequantize", "matmul"]
    held = after.nodes[0].input(0)
    assert held.shape == (4, 3)
    assert held.qparams is not None
    assert held.qparams.granularity == expected


def test_activations_stay(load_text: Any, rewrite: Any) -> None:
    text = "(float[2,4] x, float[3,4] w) => (y) { y = Gemm<transB: int = 1>(x, w) }"
    rewrite(PASS, load_text(text), modified=False)


def test_a_weight_on_the_left(load_text: Any, rewrite: Any, uniform: Any) -> None:
    text = "(float[2,4,5] x) => (y) { y = MatMul(w, x) }"
    after = rewrite(PASS, load_text(text, w=uniform(3, 4)))
    assert [n.op.name for n in after.nodes] == ["transpose", "matmul", "transpose"]
    assert after.nodes[1].input(1).shape == (4, 3)


@pytest.mark.parametrize("turns", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_weight_on_the_left_with_bias(
    load_text: Any, rewrite: Any, uniform: Any, turns: tuple[int, int]
) -> None:
    ta, tb = turns
    x = "5,4" if tb else "4,5"
    w = uniform(4, 3) if ta else uniform(3, 4)
    text = f"(float[{x}] x) => (y) {{ y = Gemm<transA: int = {ta}, transB: int = {tb}>(w, x, b) }}"
    after = rewrite(PASS, load_text(text, w=w, b=uniform(5)))
    (product,) = (n for n in after.nodes if n.op.name == "matmul")
    assert product.input(1).is_constant


def test_a_transposed_activation(load_text: Any, rewrite: Any, uniform: Any) -> None:
    text = "(float[4,2] x) => (y) { y = Gemm<transA: int = 1, transB: int = 1>(x, w, b) }"
    after = rewrite(PASS, load_text(text, w=uniform(3, 4), b=uniform(3)))
    assert [n.op.name for n in after.nodes] == ["transpose", "matmul"]
    assert not after.nodes[1].attr("transpose_a")
