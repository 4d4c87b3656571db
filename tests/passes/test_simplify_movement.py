# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.simplify_movement import SimplifyMovement

ONE = "(float[2,6,5,4] x) => (y) {{ {} }}"


@pytest.mark.parametrize(
    ("nodes", "constants", "left"),
    [
        ("a = Reshape(x, s) y = Reshape(a, t)", {"s": [2, 30, 4], "t": [-1, 4]}, ["reshape"]),
        (
            "a = Reshape(x, s) b = Reshape(a, t) y = Relu(b)",
            {"s": [12, 20], "t": [2, 6, 5, 4]},
            ["relu"],
        ),
        (
            "a = Transpose<perm: ints = [0,2,3,1]>(x) b = Transpose<perm: ints = [0,3,1,2]>(a)"
            " y = Relu(b)",
            {},
            ["relu"],
        ),
        (
            "a = Transpose<perm: ints = [0,2,3,1]>(x) y = Transpose<perm: ints = [1,0,2,3]>(a)",
            {},
            ["transpose"],
        ),
        (
            "a = Slice(x, one, four, axis1) y = Slice(a, zero, two, axis2)",
            {"one": [1], "four": [4], "axis1": [1], "zero": [0], "two": [2], "axis2": [2]},
            ["slice"],
        ),
        (
            "a = Slice(x, one, six, axis1, two) y = Slice(a, one, six, axis1, two)",
            {"one": [1], "six": [6], "axis1": [1], "two": [2]},
            ["slice"],
        ),
        (
            "a = MaxPool<kernel_shape: ints = [5,4]>(x) y = Transpose<perm: ints = [0,2,3,1]>(a)",
            {},
            ["max_pool", "reshape"],
        ),
    ],
)
def test_movements_join(
    load_text: Any, rewrite: Any, nodes: str, constants: dict[str, Any], left: list[str]
) -> None:
    graph = load_text(ONE.format(nodes), **{k: np.int64(v) for k, v in constants.items()})
    after = rewrite(SimplifyMovement(), graph)
    assert [n.op.name for n in after.nodes] == left
    assert after.outputs[0][0] == "y"


def test_a_slice_of_every_second_row_and_column(load_text: Any, rewrite: Any, golden: Any) -> None:
    graph = load_text(
        """(float[1,2,8,8] x) => (y) {
            a = Slice(x, zero, eight, h, two)
            b = Slice(a, zero, eight, w, two)
            y = Slice(b, zero, eight, w, two)
        }""",
        zero=np.int64([0]),
        eight=np.int64([8]),
        two=np.int64([2]),
        h=np.int64([2]),
        w=np.int64([3]),
    )
    assert str(rewrite(SimplifyMovement(), graph)) == golden


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Transpose<perm: ints = [1,0,2,3]>(x)",
        "a = Transpose<perm: ints = [0,2,3,1]>(x) b = Relu(a)"
        " y = Transpose<perm: ints = [0,3,1,2]>(b)",
        "y = Slice(x, last, first, axis, minus)",
        "a = Slice(x, last, first, axis, minus) y = Slice(a, last, first, axis, minus)",
    ],
)
def test_what_must_stay(load_text: Any, rewrite: Any, nodes: str) -> None:
    constants = {"last": [-1], "first": [-9], "axis": [1], "minus": [-1]}
    graph = load_text(ONE.format(nodes), **{k: np.int64(v) for k, v in constants.items()})
    rewrite(SimplifyMovement(), graph, modified=False)


def test_a_value_that_others_read_is_kept_for_them(load_text: Any, rewrite: Any) -> None:
    nodes = "a = Reshape(x, s) y = Reshape(a, t)"
    text = "(float[2,6] x) => (y, a) { " + nodes + " }"
    graph = load_text(text, s=np.int64([12]), t=np.int64([3, 4]))
    after = rewrite(SimplifyMovement(), graph)
    assert [n.input(0).name for n in after.nodes] == ["x", "x"]
