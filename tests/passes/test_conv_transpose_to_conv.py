# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.canonicalize import canonicalize_passes
from qcompiler.passes.conv_transpose_to_conv import ConvTransposeToConv
from qcompiler.passmanager import PassContext, PassManager

ONE = "(float[{}] x) => (y) {{ y = ConvTranspose<{}>(x, w, b) }}"


@pytest.mark.parametrize(
    ("x", "w", "attrs"),
    [
        ("1,6,5,4", (6, 4, 2, 2), "strides: ints = [2,2]"),
        ("1,6,5,4", (6, 4, 4, 4), "strides: ints = [2,2], pads: ints = [1,1,1,1]"),
        (
            "2,6,5,4",
            (6, 4, 3, 3),
            "strides: ints = [2,2], pads: ints = [1,1,1,1], output_padding: ints = [1,1]",
        ),
        ("1,6,5,4", (6, 4, 3, 3), "strides: ints = [2,2], pads: ints = [1,0,1,2]"),
        ("1,6,5,4", (6, 4, 3, 2), "strides: ints = [3,2]"),
        ("1,6,5,4", (6, 4, 2, 2), "strides: ints = [3,3], output_padding: ints = [2,1]"),
        ("1,6,5,4", (6, 4, 3, 3), "strides: ints = [1,1], pads: ints = [1,1,1,1]"),
        ("1,6,5,4", (6, 4, 3, 3), "strides: ints = [2,2], dilations: ints = [2,3]"),
        ("1,6,5,4", (6, 2, 4, 4), "strides: ints = [2,2], group: int = 3"),
        ("1,6,5,4", (6, 1, 4, 4), "strides: ints = [2,2], group: int = 6"),
        ("1,6,5,4", (6, 2, 3, 4), "strides: ints = [1,2], group: int = 2"),
        ("1,6,5,4", (6, 4, 1, 4), "strides: ints = [1,2], pads: ints = [0,1,0,1]"),
        ("1,6,1,1", (6, 4, 7, 7), "strides: ints = [1,1]"),
        ("1,6,1,1", (6, 4, 4, 4), "pads: ints = [1,1,1,0]"),
        ("1,6,9", (6, 4, 8), "strides: ints = [4], pads: ints = [2,2]"),
        ("1,6,3,2,4", (6, 4, 3, 2, 2), "strides: ints = [2,2,1]"),
        ("1,6,5,4", (6, 4, 2, 2), "pads: ints = [2,1,3,1]"),
        ("1,6,5,4", (6, 4, 2, 3), "strides: ints = [2,2], pads: ints = [5,3,0,4]"),
    ],
)
def test_equals_the_transposed_convolution(
    load_text: Any, rewrite: Any, uniform: Any, x: str, w: tuple[int, ...], attrs: str
) -> None:
    group = int(attrs.rsplit("= ", 1)[-1]) if "group" in attrs else 1
    graph = load_text(ONE.format(x, attrs), w=uniform(*w), b=uniform(w[1] * group))
    after = rewrite(ConvTransposeToConv(), graph, atol=1e-4)
    names = [n.op.name for n in after.nodes]
    assert names.count("conv") == 1
    assert "conv_transpose" not in names
    conv = next(n for n in after.nodes if n.op.name == "conv")
    assert conv.name == graph.nodes[0].name


def test_needs_as_few_taps_as_possible(load_text: Any, rewrite: Any, uniform: Any) -> None:
    attrs = "strides: ints = [2,2], pads: ints = [1,1,1,1]"
    graph = load_text(ONE.format("1,6,5,4", attrs), w=uniform(6, 4, 4, 4), b=uniform(4))
    after = rewrite(ConvTransposeToConv(), graph)
    assert [n.op.name for n in after.nodes] == ["conv", "depth_to_space", "slice"]
    assert after.nodes[0].input(1).shape == (16, 6, 2, 2)


@pytest.mark.parametrize(
    "attrs",
    [
        "group: int = 1",
        "strides: ints = [2,2], pads: ints = [1,0,0,1]",
        "strides: ints = [2,3], dilations: ints = [3,2]",
        "strides: ints = [2,1], group: int = 2",
    ],
)
def test_weights_that_are_computed_are_moved(load_text: Any, rewrite: Any, attrs: str) -> None:
    text = f"(float[1,4,4,3] x, float[4,3,2,2] w) => (y) {{ y = ConvTranspose<{attrs}>(x, w) }}"
    graph = load_text(text)
    after = rewrite(ConvTransposeToConv(), graph, atol=1e-5)
    (conv,) = [n for n in after.nodes if n.op.name == "conv"]
    assert conv.name == graph.nodes[0].name


@pytest.mark.parametrize("axis", [None, 1])
def test_quantized_weights(load_text: Any, rewrite: Any, uniform: Any, axis: int | None) -> None:
    text = """(float[1,6,5,4] x) => (y) {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        v = DequantizeLinear<axis: int = 1>(w, sw)
        c = DequantizeLinear<axis: int = 0>(b, sb)
        y = ConvTranspose<strides: ints = [2,2], pads: ints = [1,1,1,1]>(d, v, c)
    }"""
    scales = np.float32(0.01) if axis is None else np.float32([0.01, 0.02, 0.015])
    graph = load_text(
        text,
        s=np.float32(0.02),
        z=np.uint8(120),
        w=np.arange(-144, 144).astype(np.int8).reshape(6, 3, 4, 4),
        sw=scales,
        b=np.int32([100, -200, 300]),
        sb=(scales * np.float32(0.02)).astype(np.float32),
    )
    after = rewrite(ConvTransposeToConv(), graph, atol=1e-4)
    conv = next(n for n in after.nodes if n.op.name == "conv")
    assert conv.input(1).producer.op.name == "dequantize"
    assert "conv_transpose" not in {n.op.name for n in after.nodes}


def test_the_rest_of_canonicalization_takes_it(load_text: Any, uniform: Any) -> None:
    """A clamp joins the convolution in front of the interleaving."""
    text = """(float[1,6,5,4] x) => (y) {
        t = ConvTranspose<strides: ints = [2,2]>(x, w)
        n = BatchNormalization(t, g, b, m, v)
        y = Relu(n)
    }"""
    four = {k: np.abs(uniform(4)) + 0.5 for k in "gbmv"}
    graph = load_text(text, w=uniform(6, 4, 2, 2), **four)
    after = PassManager(canonicalize_passes()).run(graph, PassContext())
    assert [n.op.name for n in after.nodes] == ["conv", "relu", "depth_to_space"]
