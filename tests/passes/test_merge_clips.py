# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.merge_clips import MergeClips

ONE = "(float[2,3] x) => (y) {{ {} }}"
NUMBERS = {"zero": 0.0, "six": 6.0, "one": 1.0, "minus": -1.0, "inf": np.inf}


@pytest.mark.parametrize(
    ("nodes", "left", "bounds"),
    [
        ("y = Max(x, zero)", "relu", (0, None)),
        ("y = Min(six, x)", "clip", (None, 6)),
        ("a = Relu(x) y = Min(a, six)", "clip", (0, 6)),
        ("a = Min(x, six) y = Max(a, zero)", "clip", (0, 6)),
        ("a = Relu(x) y = Relu(a)", "relu", (0, None)),
        ("a = Clip(x, minus, one) y = Relu(a)", "clip", (0, 1)),
        ("a = Relu(x) y = Clip(a, minus, one)", "clip", (0, 1)),
        ("a = Clip(x, one, six) y = Min(a, zero)", "clip", (0, 0)),
        ("a = Max(x, minus) b = Max(a, zero) y = Min(b, one)", "clip", (0, 1)),
    ],
)
def test_one_clamp_is_left(
    load_text: Any, rewrite: Any, nodes: str, left: str, bounds: tuple[Any, Any]
) -> None:
    graph = load_text(ONE.format(nodes), **{k: np.float32(v) for k, v in NUMBERS.items()})
    after = rewrite(MergeClips(), graph, {"x": np.float32([[-9, -0.5, 0], [0.5, 5, 9]])})
    (node,) = after.nodes
    assert (node.op.name, node.output.name) == (left, "y")
    if left == "clip":
        assert (node.attrs["min"], node.attrs["max"]) == bounds


def test_a_clamp_that_does_nothing_goes(load_text: Any, rewrite: Any) -> None:
    graph = load_text(ONE.format("a = Min(x, inf) y = Neg(a)"), inf=np.float32(np.inf))
    assert [n.op.name for n in rewrite(MergeClips(), graph).nodes] == ["neg"]


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Relu(x)",
        "y = Clip(x, minus, one)",
        "y = Max(x, x)",
        "y = Max(x, row)",  # one bound per column
        "y = Max(x, wide)",  # the result has more elements
        "y = Clip(x, one, minus)",  # the bounds cross: everything becomes -1
    ],
)
def test_what_must_stay(load_text: Any, rewrite: Any, nodes: str) -> None:
    constants = {k: np.float32(v) for k, v in NUMBERS.items()}
    constants |= {"row": np.float32([0, 1, 2]), "wide": np.zeros((1, 1, 1, 1), np.float32)}
    rewrite(MergeClips(), load_text(ONE.format(nodes), **constants), modified=False)


def test_a_clamped_value_that_others_read_stays(load_text: Any, rewrite: Any) -> None:
    text = "(float[2,3] x) => (y, a) { a = Relu(x) y = Min(a, six) }"
    after = rewrite(MergeClips(), load_text(text, six=np.float32(6)))
    assert [n.op.name for n in after.nodes] == ["relu", "clip"]
