# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.fold_pad import FoldPad

SPATIAL = np.int64([0, 0, 1, 2, 0, 0, 0, 1])
ONE = "(float[2,4,6,6] x) => (y) {{ p = {} y = {} }}"
POOL = "<kernel_shape: ints = [3,3]>(p)"


def test_into_a_convolution(load_text: Any, rewrite: Any, uniform: Any, golden: Any) -> None:
    text = ONE.format("Pad(x, pads)", "Conv<pads: ints = [1,1,1,1]>(p, w)")
    graph = load_text(text, pads=SPATIAL, w=np.ones((1, 4, 3, 3), np.float32))
    after = rewrite(FoldPad(), graph)
    assert after.nodes[0].attr("pads") == (2, 3, 1, 2)
    assert after.nodes[0].sources == ("Pad_0", "Conv_0")
    assert str(after) == golden


@pytest.mark.parametrize(
    ("pad", "pool"),
    [
        ("Pad(x, pads)", "AveragePool" + POOL),
        (
            "Pad(x, pads, zero)",
            "AveragePool<kernel_shape: ints = [3,3], pads: ints = [1,1,1,1],"
            " count_include_pad: int = 1>(p)",
        ),
        ("Pad(x, pads, lowest)", "MaxPool" + POOL),
    ],
)
def test_into_poolings(load_text: Any, rewrite: Any, pad: str, pool: str) -> None:
    graph = load_text(
        ONE.format(pad, pool), pads=SPATIAL, zero=np.float32(0), lowest=np.float32(-np.inf)
    )
    assert len(rewrite(FoldPad(), graph)) == 1


def test_zeros_before_a_maximum_of_nothing_negative(load_text: Any, rewrite: Any) -> None:
    text = "(float[2,4,6,6] x) => (y) { r = Relu(x) p = Pad(r, pads) y = MaxPool" + POOL + " }"
    after = rewrite(FoldPad(), load_text(text, pads=SPATIAL))
    assert [n.op.name for n in after.nodes] == ["relu", "max_pool"]


@pytest.mark.parametrize(
    ("pad", "window"),
    [
        ("Pad(x, pads, one)", "Conv(p, w)"),
        ("Pad(x, outside)", "Conv(p, v)"),
        ('Pad<mode: string = "edge">(x, pads)', "Conv(p, w)"),
        ("Pad(x, pads, one)", "AveragePool" + POOL),
        ("Pad(x, pads)", "AveragePool<kernel_shape: ints = [3,3], pads: ints = [1,1,1,1]>(p)"),
        ("Pad(x, pads)", "MaxPool" + POOL),  # a zero would win over negative elements
        ("Pad(x, far, lowest)", "MaxPool" + POOL),  # a window of nothing but padding
        ("Pad(x, pads)", "Relu(p)"),
    ],
)
def test_what_must_stay(load_text: Any, rewrite: Any, uniform: Any, pad: str, window: str) -> None:
    graph = load_text(
        ONE.format(pad, window),
        pads=SPATIAL,
        outside=np.int64([0, 1, 1, 1, 0, 0, 0, 0]),
        far=np.int64([0, 0, 3, 0, 0, 0, 0, 0]),
        one=np.float32(1),
        lowest=np.float32(-np.inf),
        w=uniform(2, 4, 3, 3),
        v=uniform(2, 5, 3, 3),
    )
    rewrite(FoldPad(), graph, modified=False, atol=1e-4)
