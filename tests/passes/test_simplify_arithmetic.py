# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.simplify_arithmetic import SimplifyArithmetic

ONE = "(float[2,3] x) => (y) {{ {} }}"


@pytest.mark.parametrize(
    ("nodes", "constants", "left"),
    [
        ("a = Add(x, c) y = Relu(a)", {"c": np.zeros(3)}, ["relu"]),
        ("a = Sub(x, c) y = Relu(a)", {"c": np.zeros(())}, ["relu"]),
        ("a = Mul(c, x) y = Relu(a)", {"c": np.ones((1, 1))}, ["relu"]),
        ("a = Div(x, c) y = Relu(a)", {"c": np.ones(3)}, ["relu"]),
        ("a = Pow(x, c) y = Relu(a)", {"c": np.asarray(1.0)}, ["relu"]),
        ("y = Sub(x, c)", {"c": np.asarray([1.0, 2.0, 3.0])}, ["add"]),
        ("y = Div(x, c)", {"c": np.asarray([1.0, 2.0, 3.0])}, ["mul"]),
        ("y = Pow(x, c)", {"c": np.asarray(2.0)}, ["mul"]),
        ("a = Abs(x) y = Pow(a, c)", {"c": np.asarray(0.5)}, ["abs", "sqrt"]),
        ("y = Pow(x, c)", {"c": np.asarray(-1.0)}, ["reciprocal"]),
        ("y = Div(c, x)", {"c": np.asarray(1.0)}, ["reciprocal"]),
        ("a = Mul(x, c) y = Mul(d, a)", {"c": np.asarray(0.5), "d": np.ones(3) * 3}, ["mul"]),
        ("a = Add(x, c) y = Add(a, d)", {"c": np.ones(3), "d": np.ones((1, 3))}, ["add"]),
        (
            "a = Sub(x, c) b = Add(a, d) y = Relu(b)",
            {"c": np.ones(3), "d": np.ones(3) * 2},
            ["add", "relu"],
        ),
    ],
)
def test_forms(
    load_text: Any, rewrite: Any, nodes: str, constants: dict[str, Any], left: list[str]
) -> None:
    graph = load_text(ONE.format(nodes), **{k: np.float32(v) for k, v in constants.items()})
    after = rewrite(SimplifyArithmetic(), graph)
    assert [n.op.name for n in after.nodes] == left
    assert after.outputs[0][1].name == "y"


def test_a_printed_example(load_text: Any, rewrite: Any, golden: Any) -> None:
    graph = load_text(
        ONE.format("a = Div(x, c) y = Mul(a, d)"), c=np.float32([1, 2, 4]), d=np.float32(3)
    )
    assert str(rewrite(SimplifyArithmetic(), graph)) == golden


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ("y = Add(x, c)", {"c": np.ones(3)}),
        ("y = Add(x, c)", {"c": np.zeros((4, 1, 1))}),  # nothing is added, but the shape grows
        ("y = Mul(x, c)", {"c": np.asarray([1.0, 1.0, 2.0])}),
        ("y = Sub(c, x)", {"c": np.zeros(3)}),
        ("y = Div(x, c)", {"c": np.asarray([1.0, 0.0, 1.0])}),
        ("y = Div(x, c)", {"c": np.asarray(1e-42)}),  # its inverse is infinite
        ("y = Div(c, x)", {"c": np.asarray(2.0)}),
        ("y = Pow(x, c)", {"c": np.asarray(3.0)}),
        ("y = Pow(x, c)", {"c": np.asarray([2.0, 2.0, 1.0])}),
        ("a = Add(x, c) y = Add(a, d)", {"c": np.ones((2, 1)), "d": np.ones(3)}),
    ],
)
def test_what_must_stay(
    load_text: Any, rewrite: Any, nodes: str, constants: dict[str, Any]
) -> None:
    graph = load_text(ONE.format(nodes), **{k: np.float32(v) for k, v in constants.items()})
    rewrite(SimplifyArithmetic(), graph, modified=False)


def test_integers_are_left_alone(load_text: Any, rewrite: Any) -> None:
    graph = load_text("(int64[3] x) => (y) { y = Div(x, c) }", c=np.int64([2]))
    rewrite(SimplifyArithmetic(), graph, modified=False)
