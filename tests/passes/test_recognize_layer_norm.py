# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from qcompiler.passes.recognize_layer_norm import RecognizeLayerNorm
from qcompiler.passes.simplify_arithmetic import SimplifyArithmetic
from qcompiler.passmanager import PassContext, PassManager

PREPARE = (SimplifyArithmetic(), EliminateCommonSubexpressions())
ONE = "(float[2,3,8] x) => (y) {{ {} }}"
MEAN = "mu = ReduceMean<axes: ints = [-1]>(x) "
TORCH = (
    MEAN
    + """
    d = Sub(x, mu) d2 = Pow(d, two) v = ReduceMean<axes: ints = [-1]>(d2)
    ve = Add(v, eps) sd = Sqrt(ve) n = Div(d, sd)
"""
)
DEVIATION = (
    MEAN
    + """
    d = Sub(x, mu) d2 = Mul(d, d) v = ReduceMean<axes: ints = [-1]>(d2) ve = Add(v, eps)
"""
)
SCALED = "m = Mul(n, g) y = Add(m, b)"


def constants(uniform: Any, shape: tuple[int, ...] = (8,)) -> dict[str, Any]:
    return {
        "two": np.float32(2),
        "one": np.float32(1),
        "half": np.float32(0.5),
        "minus_half": np.float32(-0.5),
        "eps": np.float32(1e-5),
        "g": uniform(*shape),
        "b": uniform(*shape),
    }


@pytest.mark.parametrize(
    "nodes",
    [
        TORCH + SCALED,
        # the difference computed twice, as older PyTorch writes it
        MEAN + "d = Sub(x, mu) e = Sub(x, mu) d2 = Mul(e, e) v = ReduceMean<axes: ints = [-1]>(d2)"
        " ve = Add(eps, v) sd = Pow(ve, half) n = Div(d, sd) m = Mul(g, n) y = Add(b, m)",
        # times the inverse deviation
        DEVIATION +
        " sd = Sqrt(ve) r = Reciprocal(sd) n = Mul(r, d) m = Mul(n, g) y = Add(m, b)",
        DEVIATION +
        " sd = Sqrt(ve) r = Div(one, sd) n = Mul(d, r) m = Mul(n, g) y = Add(m, b)",
        # TensorFlow: x * r + (b - mu * r)
        DEVIATION +
        " sd = Sqrt(ve) i = Reciprocal(sd) r = Mul(i, g) xr = Mul(x, r) mr = Mul(mu, r)"
        " rest = Sub(b, mr) y = Add(xr, rest)",
        # Keras 3: x * r + (-mu * r + b)
        DEVIATION +
        " sd = Sqrt(ve) i = Reciprocal(sd) r = Mul(i, g) nm = Neg(mu) mr = Mul(nm, r)"
        " rest = Add(mr, b) xr = Mul(x, r) y = Add(xr, rest)",
    ],
)  # fmt: skip
def test_written_out_forms(load_text: Any, rewrite: Any, uniform: Any, nodes: str) -> None:
    graph = load_text(ONE.format(nodes), **constants(uniform))
    graph = PassManager(PREPARE).run(graph, PassContext())
    (node,) = rewrite(RecognizeLayerNorm(), graph).nodes
    assert (node.op.name, node.output.name) == ("layer_norm", "y")
    assert (node.attr("axis"), node.attr("epsilon")) == (2, pytest.approx(1e-5))
    assert len(node.inputs) == 3


def test_a_printed_example(load_text: Any, rewrite: Any, golden: Any) -> None:
    known = constants(lambda *shape: np.ones(shape, np.float32))
    graph = PassManager(PREPARE).run(load_text(ONE.format(TORCH + SCALED), **known), PassContext())
    assert str(rewrite(RecognizeLayerNorm(), graph)) == golden


def test_without_scale_and_bias_and_over_two_axes(
    load_text: Any, rewrite: Any, uniform: Any
) -> None:
    nodes = TORCH.replace("[-1]", "[1,2]") + "y = Relu(n)"
    graph = load_text(ONE.format(nodes), **constants(uniform))
    graph = PassManager(PREPARE).run(graph, PassContext())
    norm, _ = rewrite(RecognizeLayerNorm(), graph).nodes
    assert (norm.attr("axis"), len(norm.inputs)) == (1, 1)


def test_scale_and_bias_behind_the_operator_move_in(
    load_text: Any, rewrite: Any, uniform: Any
) -> None:
    nodes = "n = LayerNormalization(x, one) m = Mul(n, g) y = Add(m, b)"
    known = constants(uniform, (1, 1, 8))
    graph = load_text(ONE.format(nodes), **{**known, "one": np.float32([2])})
    rewrite(RecognizeLayerNorm(), graph, modified=False)  # it has a scale already
    nodes = "n = LayerNormalization(x, full) y = Add(n, b)"
    graph = load_text(ONE.format(nodes), full=uniform(8), **constants(uniform, (1, 1, 8)))
    (norm,) = rewrite(RecognizeLayerNorm(), graph).nodes
    assert norm.input(2).shape == (8,)


@pytest.mark.parametrize(
    "nodes",
    [
        TORCH.replace("[-1]", "[1]") + SCALED,  # not the last axes
        TORCH.replace("[-1]>(d2)", "[1,2]>(d2)") + SCALED,  # other axes for the variance
        TORCH.replace("Pow(d, two)", "Abs(d)") + SCALED,
        TORCH.replace("Div(d, sd)", "Div(x, sd)") + SCALED,
        TORCH.replace("Add(v, eps)", "Add(v, g)") + SCALED,
    ],
)
def test_other_arithmetic_stays(load_text: Any, rewrite: Any, uniform: Any, nodes: str) -> None:
    graph = load_text(ONE.format(nodes), **{**constants(uniform), "g": np.abs(uniform(8)) + 1})
    graph = PassManager(PREPARE).run(graph, PassContext())
    rewrite(RecognizeLayerNorm(), graph, modified=False)


def test_a_scale_per_row_stays_outside(load_text: Any, rewrite: Any, uniform: Any) -> None:
    graph = load_text(ONE.format(TORCH + SCALED), **constants(uniform, (3, 1)))
    graph = PassManager(PREPARE).run(graph, PassContext())
    after = rewrite(RecognizeLayerNorm(), graph)
    assert [n.op.name for n in after.nodes] == ["layer_norm", "mul", "add"]
