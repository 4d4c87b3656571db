# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.fold_affine import FoldAffine

CONV = "(float[2,4,5,5] x) => (y) {{ c = Conv(x, w, k) y = {} }}"
DENSE = "(float[2,3,4] x) => (y) {{ c = MatMul(x, w) y = {} }}"


@pytest.mark.parametrize(
    "op",
    ["Mul(c, f)", "Mul(f, c)", "Div(c, f)", "Add(c, f)", "Add(f, c)", "Sub(c, f)", "Sub(f, c)"],
)
@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1,), ()])
def test_constants_after_a_convolution(
    load_text: Any, rewrite: Any, uniform: Any, op: str, shape: tuple[int, ...]
) -> None:
    constants = {"w": uniform(6, 4, 3, 3), "k": uniform(6), "f": uniform(*shape) + np.float32(3)}
    graph = rewrite(FoldAffine(), load_text(CONV.format(op), **constants), atol=1e-4)
    assert [(n.op.name, n.output.name) for n in graph.nodes] == [("conv", "y")]


@pytest.mark.parametrize("op", ["Mul(c, f)", "Add(c, f)", "Sub(f, c)"])
@pytest.mark.parametrize("shape", [(5,), (1, 1, 5), ()])
def test_constants_after_a_matrix_product(
    load_text: Any, rewrite: Any, uniform: Any, op: str, shape: tuple[int, ...]
) -> None:
    graph = load_text(DENSE.format(op), w=uniform(4, 5), f=uniform(*shape))
    assert [n.op.name for n in rewrite(FoldAffine(), graph).nodes] == ["matmul"]


def test_a_sum_is_the_bias(load_text: Any, rewrite: Any, uniform: Any, golden: Any) -> None:
    graph = load_text(
        DENSE.format("Add(c, f)"), w=np.ones((4, 5), np.float32), f=np.float32([1] * 5)
    )
    assert str(rewrite(FoldAffine(), graph)) == golden


def test_transposed_weights_and_grouped_transposed_convolution(
    load_text: Any, rewrite: Any, uniform: Any
) -> None:
    text = "(float[2,4] x) => (y) { c = Gemm<transB: int = 1>(x, w, k) y = Mul(c, f) }"
    graph = load_text(text, w=uniform(3, 4), k=uniform(3), f=uniform(3))
    assert len(rewrite(FoldAffine(), graph)) == 1
    text = "(float[1,4,3,3] x) => (y) { c = ConvTranspose<group: int = 2>(x, w) y = Mul(c, f) }"
    graph = load_text(text, w=uniform(4, 3, 2, 2), f=uniform(6, 1, 1))
    assert len(rewrite(FoldAffine(), graph)) == 1


def test_one_number_moves_through_movements(load_text: Any, rewrite: Any, uniform: Any) -> None:
    graph = load_text(
        """(float[2,6,8] x) => (y) {
            q = MatMul(x, wq)
            qb = Add(q, b)
            k = MatMul(x, wk)
            q4 = Reshape(qb, heads)
            qt = Transpose<perm: ints = [0,2,1,3]>(q4)
            k4 = Reshape(k, heads)
            kt = Transpose<perm: ints = [0,2,3,1]>(k4)
            s = MatMul(qt, kt)
            y = Div(s, root)
        }""",
        wq=uniform(8, 8),
        wk=uniform(8, 8),
        b=uniform(8),
        heads=np.int64([2, 6, 2, 4]),
        root=np.float32(2),
    )
    graph = rewrite(FoldAffine(), graph, atol=1e-4)
    assert [n.op.name for n in graph.nodes] == [
        "matmul", "matmul", "reshape", "transpose", "reshape", "transpose", "matmul",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "constants"),
    [
        # varies along another axis
        (CONV.format("Mul(c, f)"), {"w": (6, 4, 3, 3), "k": (6,), "f": (3, 1)}),
        # the result grows
        (DENSE.format("Add(c, f)"), {"w": (4, 1), "f": (5,)}),
        # somebody else reads the value in between
        ("(float[2,4] x) => (y, c) { c = MatMul(x, w) y = Add(c, f) }", {"w": (4, 5), "f": (5,)}),
        # no constant weights: a mask must not become a bias
        ("(float[2,4] x, float[4,5] w) => (y) { c = MatMul(x, w) y = Add(c, f) }", {"f": (5,)}),
        # no linear operator
        ("(float[2,4] x) => (y) { c = Relu(x) y = Mul(c, f) }", {"f": (4,)}),
        # a constant divided by the product
        (DENSE.format("Div(f, c)"), {"w": (4, 5), "f": (5,)}),
    ],
)
def test_what_does_not_fold_stays(
    load_text: Any, rewrite: Any, uniform: Any, text: str, constants: dict[str, Any]
) -> None:
    graph = load_text(text, **{k: uniform(*shape) for k, shape in constants.items()})
    rewrite(FoldAffine(), graph, modified=False, atol=1e-3)


def test_division_by_zero_stays(load_text: Any, rewrite: Any, uniform: Any) -> None:
    graph = load_text(DENSE.format("Div(c, f)"), w=uniform(4, 3), f=np.float32([1, 0, 1]))
    rewrite(FoldAffine(), graph, modified=False)
