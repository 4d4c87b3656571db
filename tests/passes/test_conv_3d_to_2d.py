# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.canonicalize import canonicalize_passes
from qcompiler.passes.conv_3d_to_2d import Conv3dTo2d
from qcompiler.passmanager import PassContext, PassManager


@pytest.mark.parametrize(
    ("w", "attrs"),
    [
        ((5, 6, 3, 3, 3), "pads: ints = [1,1,1,1,1,1]"),
        ((5, 6, 1, 1, 1), "strides: ints = [1,1,1]"),
        ((5, 6, 1, 3, 3), "strides: ints = [2,1,2]"),
        ((5, 6, 3, 2, 1), "strides: ints = [2,1,2], pads: ints = [2,0,0,1,1,0]"),
        ((5, 6, 2, 2, 2), "dilations: ints = [3,2,1], pads: ints = [1,0,0,0,0,0]"),
        ((4, 3, 3, 3, 3), "pads: ints = [1,1,1,1,1,1], group: int = 2"),
        ((12, 1, 3, 3, 3), "pads: ints = [1,1,1,1,1,1], group: int = 6"),
        ((5, 6, 7, 2, 2), "strides: ints = [1,1,1]"),
    ],
)
def test_convolutions(
    load_text: Any, rewrite: Any, uniform: Any, w: tuple[int, ...], attrs: str
) -> None:
    text = f"(float[2,6,7,5,4] x) => (y) {{ y = Conv<{attrs}>(x, w, b) }}"
    graph = load_text(text, w=uniform(*w), b=uniform(w[0]))
    after = rewrite(Conv3dTo2d(), graph, atol=1e-4)
    conv = [n for n in after.nodes if n.op.name == "conv"]
    assert [n.input(0).type.rank for n in conv] == [4]
    assert conv[0].name == graph.nodes[0].name


@pytest.mark.parametrize(
    "pool",
    [
        "MaxPool<kernel_shape: ints = [2,2,2], strides: ints = [2,2,2]>(x)",
        "MaxPool<kernel_shape: ints = [1,3,2], strides: ints = [1,2,2]>(x)",
        "MaxPool<kernel_shape: ints = [3,3,3], strides: ints = [2,2,2], ceil_mode: int = 1,"
        " pads: ints = [1,1,1,1,1,1]>(x)",
        "AveragePool<kernel_shape: ints = [3,3,2], strides: ints = [2,1,1],"
        " pads: ints = [1,1,0,1,1,0]>(x)",
        "AveragePool<kernel_shape: ints = [3,3,2], strides: ints = [2,1,1],"
        " pads: ints = [1,1,0,1,1,0], count_include_pad: int = 1>(x)",
    ],
)
def test_poolings(load_text: Any, rewrite: Any, pool: str) -> None:
    graph = load_text(f"(float[2,3,7,5,4] x) => (y) {{ y = {pool} }}")
    after = rewrite(Conv3dTo2d(), graph)
    assert {n.input(0).type.rank for n in after.nodes if n.op.name.endswith("pool")} == {4}


def test_quantized_weights(load_text: Any, rewrite: Any) -> None:
    text = """(float[1,2,4,4,4] x) => (y) {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        v = DequantizeLinear<axis: int = 0>(w, sw)
        y = Conv(d, v)
    }"""
    graph = load_text(
        text,
        s=np.float32(0.02),
        z=np.uint8(120),
        w=np.arange(-81, 81).astype(np.int8).reshape(3, 2, 3, 3, 3),
        sw=np.float32([0.01, 0.02, 0.015]),
    )
    after = rewrite(Conv3dTo2d(), graph, atol=1e-4)
    conv = next(n for n in after.nodes if n.op.name == "conv")
    assert conv.input(1).producer.op.name == "dequantize"


def test_computed_weights_stay(load_text: Any, rewrite: Any) -> None:
    text = "(float[1,2,3,3,3] x, float[2,2,1,1,1] w) => (y) { y = Conv(x, w) }"
    rewrite(Conv3dTo2d(), load_text(text), modified=False)


def test_what_follows_cancels_the_moves_between(load_text: Any, uniform: Any) -> None:
    text = "(float[1,3,4,6,6] x) => (y) { a = Conv(x, w) r = Relu(a) y = Conv(r, v) }"
    graph = load_text(text, w=uniform(5, 3, 1, 3, 3), v=uniform(4, 5, 1, 1, 1))
    after = PassManager(canonicalize_passes()).run(graph, PassContext())
    assert [n.op.name for n in after.nodes if n.op.name in ("conv", "relu")] == [
        "conv",
        "relu",
        "conv",
    ]
    volumes = [n for n in after.nodes if n.op.name == "transpose" and n.output.type.rank == 5]
    assert len(volumes) == 2, "one before the first convolution, one after the last"
