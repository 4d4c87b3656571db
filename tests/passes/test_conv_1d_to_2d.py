# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.passes.conv_1d_to_2d import Conv1dTo2d
from qcompiler.passes.simplify_movement import SimplifyMovement
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.types import DType, PerAxis, QuantParams, TensorType

PASS = Conv1dTo2d()


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        ("Conv<pads: ints = [1,2], strides: ints = [2]>(x, w, k)", {"w": (6, 4, 3), "k": (6,)}),
        ("Conv<dilations: ints = [2], group: int = 4>(x, w)", {"w": (4, 1, 3)}),
        ("ConvTranspose<strides: ints = [3], output_padding: ints = [1]>(x, w)", {"w": (4, 2, 3)}),
        ("MaxPool<kernel_shape: ints = [3], strides: ints = [2], pads: ints = [1,0]>(x)", {}),
        ("AveragePool<kernel_shape: ints = [4], strides: ints = [2]>(x)", {}),
    ],
)
def test_windows(
    load_text: Any, rewrite: Any, uniform: Any, node: str, weights: dict[str, Any]
) -> None:
    graph = load_text(
        f"(float[2,4,9] x) => (y) {{ y = {node} }}", **{k: uniform(*s) for k, s in weights.items()}
    )
    after = rewrite(PASS, graph)
    assert [n.op.name for n in after.nodes] == ["reshape", graph.nodes[0].op.name, "reshape"]
    assert after.nodes[1].name == graph.nodes[0].name
    assert after.outputs[0][1].name == "y"


def test_reshapes_between_convolutions_cancel(
    load_text: Any, rewrite: Any, uniform: Any, golden: Any
) -> None:
    graph = load_text(
        """(float[1,4,8] x) => (y) {
            a = Conv<pads: ints = [1,1]>(x, w1)
            b = Relu(a)
            c = Conv<pads: ints = [1,1]>(b, w2)
            d = Add(c, x2)
            e = Mul(d, s)
            f = Add(b, e)
            g = Relu(f)
            y = Conv(g, w1)
        }""",
        w1=uniform(4, 4, 3),
        w2=uniform(4, 4, 3),
        x2=uniform(1, 4, 1),
        s=np.float32(0.5),
    )
    after = rewrite(PASS, graph)
    after = PassManager([SimplifyMovement()]).run(after, PassContext())
    names = [n.op.name for n in after.nodes]
    assert names.count("reshape") == 2
    assert names[0] == names[-1] == "reshape"
    lines = str(after).splitlines()
    assert "\n".join(line for line in lines if "const" not in line) + "\n" == golden


def test_quantized_weights_keep_their_scales(uniform: Any, rewrite: Any) -> None:
    q = QuantParams(np.float32([0.1, 0.2, 0.3]), np.zeros(3), DType.INT8, -127, 127, PerAxis(0))
    graph = Graph("net", Stage.QDQ)
    x = graph.add_input("x", TensorType((1, 4, 9), DType.FLOAT32))
    stored = graph.constant(np.arange(24, dtype=np.int8).reshape(3, 4, 2), "w", q)
    w = graph.add("dequantize", [stored]).output
    attrs = {"strides": (1,), "pads": (0, 0), "dilations": (1,)}
    graph.set_outputs([("y", graph.add("conv", [x, w], attrs).output)])
    after = rewrite(PASS, graph)
    (source,) = [n for n in after.nodes if n.op.name == "dequantize"]
    assert source.input(0).shape == (3, 4, 1, 2)
    assert source.input(0).qparams == q


def test_two_and_three_axes_stay(load_text: Any, rewrite: Any, uniform: Any) -> None:
    graph = load_text("(float[1,4,5,5] x) => (y) { y = Conv(x, w) }", w=uniform(2, 4, 3, 3))
    rewrite(PASS, graph, modified=False)
    graph = load_text("(float[1,2,4,4,4] x) => (y) { y = Conv(x, w) }", w=uniform(2, 2, 3, 3, 3))
    rewrite(PASS, graph, modified=False)
