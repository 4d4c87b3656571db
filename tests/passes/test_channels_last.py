# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The channels-last layout: same meaning, few transposes."""

from __future__ import annotations

from collections import Counter

import numpy as np

from qcompiler.ir import Graph
from qcompiler.passes.channels_last import ChannelsLast
from qcompiler.passes.split_to_slices import SplitToSlices

from .conftest import LoadText, Rewrite


def ops(graph: Graph) -> Counter[str]:
    return Counter(n.op.name for n in graph.nodes)


def test_a_chain_keeps_two_transposes(
    load_text: LoadText, rewrite: Rewrite, rng: np.random.Generator
) -> None:
    graph = load_text(
        """(float[2,5,8,6] x) => (float[2,7,4,3] y) {
            a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
            r = Relu(a)
            s = Mul(r, k)
            c = Conv(s, v)
            d = Add(c, r)
            y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d)
        }""",
        w=rng.standard_normal((7, 5, 3, 3)).astype(np.float32),
        b=rng.standard_normal(7).astype(np.float32),
        k=rng.standard_normal((7, 1, 1)).astype(np.float32),
        v=rng.standard_normal((7, 7, 1, 1)).astype(np.float32),
    )
    after = rewrite(ChannelsLast(), graph)
    assert ops(after)["transpose"] == 2
    assert all(n.attrs.get("layout", "NHWC") == "NHWC" for n in after.nodes)


def test_axes_move_along(load_text: LoadText, rewrite: Rewrite, rng: np.random.Generator) -> None:
    graph = load_text(
        """(float[1,4,6,6] x) => (float[1,6] y) {
            a = Conv(x, w)
            b = Softmax<axis = 1>(a)
            c = Concat<axis = 1>(a, b)
            p = Pad(c, pads)
            s = Slice(p, starts, ends, axes)
            y = ReduceMean<axes = [2, 3], keepdims = 0>(s)
        }""",
        w=rng.standard_normal((4, 4, 1, 1)).astype(np.float32),
        pads=np.array([0, 1, 0, 2, 0, 1, 1, 0]),
        starts=np.array([2]),
        ends=np.array([8]),
        axes=np.array([1]),
    )
    after = rewrite(ChannelsLast(), graph)
    assert ops(after)["transpose"] == 1  # of the input only


def test_flatten_is_absorbed_by_the_matrix(
    load_text: LoadText, rewrite: Rewrite, rng: np.random.Generator
) -> None:
    graph = load_text(
        """(float[3,2,4,5] x) => (float[3,6] y) {
            a = Conv(x, w)
            f = Flatten(a)
            y = Gemm<transB = 1>(f, m)
        }""",
        w=rng.standard_normal((3, 2, 1, 1)).astype(np.float32),
        m=rng.standard_normal((6, 60)).astype(np.float32),
    )
    after = rewrite(ChannelsLast(), graph)
    assert ops(after) == Counter({"transpose": 1, "conv": 1, "reshape": 1, "matmul": 1})


def test_one_channel_needs_no_transpose(
    load_text: LoadText, rewrite: Rewrite, rng: np.random.Generator
) -> None:
    graph = load_text(
        """(float[1,1,9,9] x) => (float[1,1,7,7] y) { y = Conv(x, w) }""",
        w=rng.standard_normal((1, 1, 3, 3)).astype(np.float32),
    )
    after = rewrite(ChannelsLast(), graph)
    assert "transpose" not in ops(after)


def test_nothing_to_do(load_text: LoadText, rewrite: Rewrite) -> None:
    graph = load_text("(float[2,3] x) => (float[2,3] y) { y = Exp(x) }")
    rewrite(ChannelsLast(), graph, modified=False)


def test_resize_extents_follow_the_layout(
    load_text: LoadText, rewrite: Rewrite, rng: np.random.Generator
) -> None:
    graph = load_text(
        """(float[1,3,4,5] x) => (float[1,3,8,15] y) {
            a = Conv(x, w)
            y = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric",
                       nearest_mode = "floor">(a, , scales)
        }""",
        w=rng.standard_normal((3, 3, 1, 1)).astype(np.float32),
        scales=np.array([1, 1, 2, 3], np.float32),
    )
    after = rewrite(ChannelsLast(), graph)
    assert ops(after)["transpose"] == 2


def test_split_becomes_slices(load_text: LoadText, rewrite: Rewrite) -> None:
    graph = load_text(
        """(float[2,6] x) => (float[2,2] a, float[2,4] b) { a, b = Split<axis = 1>(x, sizes) }""",
        sizes=np.array([2, 4]),
    )
    after = rewrite(SplitToSlices(), graph)
    assert ops(after) == Counter({"slice": 2})
