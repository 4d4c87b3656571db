# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.recognize_activations import RecognizeActivations

ONE = "(float[2,9] x) => (y) {{ {} }}"
NUMBERS = {
    "half": 0.5,
    "one": 1.0,
    "two": 2.0,
    "three": 3.0,
    "six": 6.0,
    "zero": 0.0,
    "root2": np.sqrt(2),
    "inverse_root2": np.sqrt(0.5),
    "k": 0.044715,
    "s": np.sqrt(2 / np.pi),
    "sk": np.sqrt(2 / np.pi) * 0.044715,
    "a": 1.702,
}
TANH_FORM = """
    x3 = Pow(x, three) kx = Mul(x3, k) in = Add(x, kx) sc = Mul(in, s) t = Tanh(sc) g = Add(t, one)
"""


@pytest.mark.parametrize(
    ("nodes", "op", "attrs"),
    [
        # GELU as PyTorch writes it, and in four other associations
        ("d = Div(x, root2) e = Erf(d) g = Add(e, one) m = Mul(x, g) y = Mul(m, half)",
         "gelu", "none"),
        ("d = Mul(x, inverse_root2) e = Erf(d) g = Add(one, e) h = Mul(half, x) y = Mul(h, g)",
         "gelu", "none"),
        ("d = Div(x, root2) e = Erf(d) g = Add(e, one) h = Mul(g, half) y = Mul(x, h)",
         "gelu", "none"),
        ("d = Div(x, root2) e = Erf(d) g = Add(e, one) m = Mul(x, g) y = Div(m, two)",
         "gelu", "none"),
        ("d = Mul(x, inverse_root2) e = Erf(d) h = Mul(e, half) g = Add(h, half) y = Mul(x, g)",
         "gelu", "none"),
        (TANH_FORM + "h = Mul(x, half) y = Mul(h, g)", "gelu", "tanh"),
        (TANH_FORM + "h = Mul(g, half) y = Mul(h, x)", "gelu", "tanh"),
        ("q = Mul(x, x) c = Mul(q, sk) b = Add(c, s) u = Mul(x, b) t = Tanh(u) g = Add(t, one)"
         " h = Mul(x, half) y = Mul(h, g)", "gelu", "tanh"),
        ("q = Sigmoid(x) y = Mul(x, q)", "silu", None),
        ("n = Neg(x) e = Exp(n) d = Add(e, one) y = Div(x, d)", "silu", None),
        ("b = Add(x, three) c = Clip(b, zero, six) m = Mul(x, c) y = Div(m, six)",
         "hard_swish", None),
        ("b = Add(x, three) c = Clip(b, zero, six) d = Div(c, six) y = Mul(d, x)",
         "hard_swish", None),
        ("h = HardSigmoid<alpha: float = 0.16666667, beta: float = 0.5>(x) y = Mul(x, h)",
         "hard_swish", None),
        ("p = Softplus(x) t = Tanh(p) y = Mul(t, x)", "mish", None),
        ("e = Exp(x) p = Add(one, e) l = Log(p) t = Tanh(l) y = Mul(x, t)", "mish", None),
        ("n = Neg(x) e = Exp(n) d = Add(e, one) y = Reciprocal(d)", "sigmoid", None),
        ("e = Exp(x) p = Add(one, e) y = Log(p)", "softplus", None),
        ("u = Abs(x) d = Add(u, one) y = Div(x, d)", "softsign", None),
    ],
)  # fmt: skip
def test_written_out_forms(
    load_text: Any, rewrite: Any, nodes: str, op: str, attrs: str | None
) -> None:
    graph = load_text(ONE.format(nodes), **{k: np.float32(v) for k, v in NUMBERS.items()})
    (node,) = rewrite(RecognizeActivations(), graph).nodes
    assert (node.op.name, node.output.name) == (op, "y")
    assert node.attrs.get("approximate") == attrs
    assert set(node.sources) == {n.name for n in graph.nodes}


def test_the_operand_may_itself_be_scaled(load_text: Any, rewrite: Any, golden: Any) -> None:
    nodes = "b = Mul(x, three) q = Sigmoid(b) y = Mul(b, q)"
    graph = load_text(ONE.format(nodes), **{k: np.float32(v) for k, v in NUMBERS.items()})
    assert str(rewrite(RecognizeActivations(), graph)) == golden


def test_what_others_read_stays(load_text: Any, rewrite: Any) -> None:
    text = "(float[2,9] x) => (y, q) { q = Sigmoid(x) y = Mul(x, q) }"
    after = rewrite(RecognizeActivations(), load_text(text))
    assert sorted(n.op.name for n in after.nodes) == ["sigmoid", "silu"]


@pytest.mark.parametrize(
    "nodes",
    [
        "u = Mul(x, a) q = Sigmoid(u) y = Mul(x, q)",  # quick GELU is another function
        "d = Div(x, root2) e = Erf(d) g = Add(e, one) y = Mul(x, g)",  # twice GELU
        "q = Sigmoid(x) y = Mul(q, q)",
        "q = Sigmoid(x) y = Mul(z, q)",  # two tensors
        "q = Sigmoid(x) r = Mul(x, row) y = Mul(r, q)",  # one number per column
        "y = Mul(x, half)",
        "y = Sigmoid(x)",
    ],
)
def test_other_functions_stay(load_text: Any, rewrite: Any, nodes: str) -> None:
    constants = {k: np.float32(v) for k, v in NUMBERS.items()}
    constants["row"] = np.arange(9, dtype=np.float32)
    text = "(float[2,9] x, float[2,9] z) => (y) { " + nodes + " }"
    rewrite(RecognizeActivations(), load_text(text, **constants), modified=False)
