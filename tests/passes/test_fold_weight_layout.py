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
