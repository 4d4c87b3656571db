# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights in fewer bits become the float32 numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qcompiler.ir import Graph
from qcompiler.numerics import quantize
from qcompiler.ops import Stage
from qcompiler.passes.narrow_products import group_qparams
from qcompiler.passes.widen_weights import WidenWeights
from qcompiler.types import DType, TensorType


@pytest.mark.parametrize("form", ["half", "groups", "float"])
def test_weights_become_constants(
    rewrite: Callable[..., Graph], rng: np.random.Generator, form: str
) -> None:
    graph = Graph("net", Stage.INTEGER)
    x = graph.add_input("x", TensorType((3, 32), DType.FLOAT32))
    w = rng.standard_normal((32, 8)).astype(np.float32)
    held = graph.constant(w, "w")
    if form == "half":
        held = graph.constant(w.astype(np.float16), "w")
        held = graph.add("cast", [held], {"to": "float32"}).output
    if form == "groups":
        q = group_qparams(w, 0, 16, 4)
        held = graph.add("dequantize", [graph.constant(quantize(w, q), "w", q)]).output
    graph.set_outputs([("y", graph.add("matmul", [x, held]).output)])
    after = rewrite(WidenWeights(), graph, modified=form != "float", atol=0)
    assert [n.op.name for n in after.nodes] == ["matmul"]
    assert after.nodes[0].input(1).is_constant


def test_what_is_computed_stays(rewrite: Callable[..., Graph]) -> None:
    graph = Graph("net", Stage.INTEGER)
    x = graph.add_input("x", TensorType((3, 3), DType.FLOAT16))
    wide = graph.add("cast", [x], {"to": "float32"}).output
    graph.set_outputs([("y", graph.add("matmul", [wide, wide]).output)])
    rewrite(WidenWeights(), graph, modified=False)
