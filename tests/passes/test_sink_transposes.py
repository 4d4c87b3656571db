# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.canonicalize import canonicalize_passes
from qcompiler.passes.sink_transposes import SinkTransposes
from qcompiler.passmanager import PassContext, PassManager

FIRST, LAST = "Transpose<perm: ints = [0,3,1,2]>", "Transpose<perm: ints = [0,2,3,1]>"
HEAD = f"(float[1,6,5,3] x) => (y) {{ f = {FIRST}(x) c = Conv(f, w) l = {LAST}(c) "


def ops(graph: Any) -> list[str]:
    return [n.op.name for n in graph.nodes]


@pytest.mark.parametrize(
    "text",
    [
        "y = Relu(l) }",
        "y = Mul(l, v) }",
        "y = Sub(v, l) }",
        "y = Add(l, image) }",
        "y = Mul(l, two) }",
        "m = Relu(l) a = Add(m, l) y = Concat<axis: int = -1>(a, m) }",
        "y = Softmax<axis: int = 3>(l) }",
        "y = Pad(l, pads) }",
        "a, b = Split<axis: int = 3>(l) y = Mul(a, b) }",
        "y = ReduceMean<axes: ints = [1,2]>(l) }",
        "y = ReduceMean<axes: ints = [1,2], keepdims: int = 0>(l) }",
        "q = QuantizeLinear(l, s, z) y = DequantizeLinear(q, s, z) }",
    ],
)
def test_transposes_sink(load_text: Any, rewrite: Any, uniform: Any, text: str) -> None:
    graph = load_text(
        HEAD + text,
        w=uniform(4, 3, 2, 2),
        v=uniform(4),
        image=uniform(1, 5, 4, 4),
        two=np.float32(2),
        pads=np.int64([0, 1, 2, 0, 0, 0, 1, 3]),
        s=np.float32(0.1),
        z=np.uint8(128),
    )
    after = rewrite(SinkTransposes(), graph)
    assert "transpose" not in ops(after)[2:-1]


@pytest.mark.parametrize(
    "text",
    [
        "y = LayerNormalization(l, v) }",
        "y = Add(l, z) }",
        "y = Flatten(l) }",
        "y = ReduceMean<axes: ints = [1], keepdims: int = 0>(l) }",
    ],
)
def test_what_must_stay(load_text: Any, rewrite: Any, uniform: Any, text: str) -> None:
    head = HEAD.replace("(float[1,6,5,3] x)", "(float[1,6,5,3] x, float[1,5,4,4] z)")
    graph = load_text(head + text, w=uniform(4, 3, 2, 2), v=uniform(4))
    rewrite(SinkTransposes(), graph, modified=False)


def test_padding_comes_next_to_the_convolution(load_text: Any, rewrite: Any, uniform: Any) -> None:
    text = f"(float[1,6,5,3] x) => (y) {{ p = Pad(x, pads) f = {FIRST}(p) y = Conv(f, w) }}"
    pads = np.int64([0, 1, 2, 0, 0, 0, 1, 0])
    after = rewrite(SinkTransposes(), load_text(text, w=uniform(4, 3, 2, 2), pads=pads))
    assert ops(after) == ["transpose", "pad", "conv"]


def test_an_exported_channels_last_block(load_text: Any, uniform: Any) -> None:
    """Bias, normalization and activation end up in the convolutions."""
    text = f"""(float[1,6,5,3] x) => (y) {{
        f = {FIRST}(x)  c = Conv(f, w)  l = {LAST}(c)
        a = Add(l, v)  m = Mul(a, v)  r = Clip(m, zero, six)
        g = {FIRST}(r)  d = Conv(g, u)  k = {LAST}(d)
        b = Add(k, v)  y = Add(b, r)
    }}"""
    constants = {"w": uniform(4, 3, 2, 2), "u": uniform(4, 4, 1, 1), "v": uniform(4)}
    graph = load_text(text, zero=np.float32(0), six=np.float32(6), **constants)
    after = PassManager(canonicalize_passes()).run(graph, PassContext())
    assert ops(after) == ["transpose", "conv", "clip", "conv", "add", "transpose"]
