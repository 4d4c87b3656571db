# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Scales that are computed leave products of codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.factors_behind import FactorsBehind

_HEAD = """q = QuantizeLinear(x, one, z)
    d = DequantizeLinear(q, one, z)
    p = QuantizeLinear(w, one, z)
    v = DequantizeLinear(p, one, z)
"""


def _graph(load_text: Any, inputs: str, body: str, **constants: Any) -> Any:
    text = f"({inputs}) => (y) {{ {_HEAD} {body} }}"
    return load_text(text, one=np.float32(1), z=np.uint8(7), **constants)


@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        ("float[3,4] x, float[4,5] w, float s", "a = Mul(d, s) y = MatMul(a, v)"),
        ("float[3,4] x, float[4,5] w, float[1] s", "a = Mul(s, d) y = MatMul(a, v)"),
        ("float[3,4] x, float[4,5] w, float[3,1] s", "a = Mul(d, s) y = MatMul(a, v)"),
        ("float[3,4] x, float[4,5] w, float[5] s", "b = Mul(v, s) y = MatMul(d, b)"),
        (
            "float[3,4] x, float[4,5] w, float s, float[5] t",
            "a = Mul(d, s) b = Mul(v, t) y = Gemm(a, b, c)",
        ),
        (
            "float[4,3] x, float[5,4] w, float[3] s, float[5,1] t",
            "a = Mul(d, s) b = Mul(v, t) y = Gemm<transA: int = 1, transB: int = 1>(a, b, c)",
        ),
        (
            "float[3,4] x, float[5,4] w, float s",
            "a = Mul(v, s) t = Transpose<perm: ints = [1,0]>(a) y = MatMul(d, t)",
        ),
        (
            "float[2,4,5,5] x, float[5,4,3,3] w, float[2,1,1,1] s, float[5,1,1,1] t",
            "a = Mul(d, s) b = Mul(v, t) y = Conv(a, b, c)",
        ),
        (
            "float[2,4,5,5] x, float[4,5,3,3] w, float s, float[1,5,1,1] t",
            "a = Mul(d, s) b = Mul(v, t) y = ConvTranspose(a, b, c)",
        ),
    ],
)
def test_factors_move(load_text: Any, rewrite: Any, inputs: str, body: str) -> None:
    given = {"c": np.arange(5).astype(np.float32)} if "c)" in body else {}
    graph = _graph(load_text, inputs, body, **given)
    after = rewrite(FactorsBehind(), graph, atol=1e-2)
    (product,) = [n for n in after.nodes if n.op.name in ("matmul", "conv", "conv_transpose")]
    for at in (0, 1):
        v = product.input(at)
        while v.producer.op.name in ("transpose", "reshape"):
            v = v.producer.input(0)
        assert v.producer.op.name == "dequantize"
    assert product.name in {n.name for n in graph.nodes}


@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        # What is summed has no one scale.
        ("float[3,4] x, float[4,5] w, float[4] s", "a = Mul(d, s) y = MatMul(a, v)"),
        ("float[3,4] x, float[4,5] w, float[4,1] s", "b = Mul(v, s) y = MatMul(d, b)"),
        ("float[1,4,5,5] x, float[5,4,3,3] w, float[4,1,1] s", "a = Mul(d, s) y = Conv(a, v)"),
        # Not along the columns that a group has.
        (
            "float[1,4,5,5] x, float[4,5,3,3] w, float[1,5,1,1] s",
            "b = Mul(v, s) y = ConvTranspose<group: int = 2>(d, b)",
        ),
        # The factor has the larger shape.
        ("float[1,4] x, float[4,5] w, float[3,1] s", "a = Mul(d, s) y = MatMul(a, v)"),
        # The other operand is no code: the product is one of floats all the same.
        ("float[3,4] x, float[4,5] w, float s", "a = Mul(d, s) y = MatMul(a, w)"),
        ("float[3,4] x, float[4,5] w", "y = MatMul(d, v)"),
    ],
)
def test_factors_that_stay(load_text: Any, rewrite: Any, inputs: str, body: str) -> None:
    rewrite(FactorsBehind(), _graph(load_text, inputs, body), modified=False)
