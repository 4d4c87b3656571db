# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights whose groups have whole multiples of one scale per column become int8 weights.

Before -> after, for codes c of groups with scales f s, f from 1 to 16 and s one per column:

    product(x, dequantize(c; f s), b)  ->  product(x, dequantize(f c; s), dequantize(b32))

The reals are the same; the product's integers are summed whole and scaled once per column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.factors import folded
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import quantize_bias
from qcompiler.ops import Stage
from qcompiler.passes.fuse_moves import dequantized, params
from qcompiler.passes.weights import bias_qparams
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import DType, PerGroup


@dataclass(frozen=True)
class FoldFactors(Pass):
    """Rewrite products of quantized activations by such weights."""

    name: ClassVar[str] = "fold_factors"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.QDQ, Stage.QDQ)

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether something changed."""
        del ctx
        return fold_factors(graph)


def fold_factors(graph: Graph) -> bool:
    """The pass as a function; imported models need it between steps of `fuse`."""
    made: dict[tuple[Value, int], Value | None] = {}
    changed = False
    for node in graph.nodes:
        if node.op.name not in ("conv", "matmul"):
            continue
        x, w = dequantized(node.input(0)), dequantized(node.input(1))
        if x is None or w is None or not w.is_constant or w.type.rank < 2:
            continue
        if not isinstance(params(w).granularity, PerGroup) or not params(x).is_per_tensor:
            continue
        transposed = node.op.name == "matmul" and node.attr("transpose_b")
        axis = w.type.rank - (2 if transposed else 1) if node.op.name == "matmul" else 0
        if (w, axis) not in made:
            found = folded(w.array(), params(w), axis)
            held = None if found is None else graph.constant(found[0], w.name, found[1])
            made[w, axis] = held
        whole = made[w, axis]
        if whole is not None and _bias(graph, node, x, whole):
            real = graph.add("dequantize", [whole], before=node, sources=node.sources)
            graph.set_input(node, 1, real.output)
            changed = True
    if changed:
        graph.eliminate_dead()
    return changed


def _bias(graph: Graph, node: Node, x: Value, w: Value) -> bool:
    """Quantize the constant float bias of a product; whether its sums can take the bias."""
    bias = node.optional(2)
    if bias is None or not bias.is_constant or bias.dtype is not DType.FLOAT32:
        return True
    found = quantize_bias(bias.array(), params(x).s, params(w).scale)
    if found.clamped:
        return False
    held = graph.constant(found.q, f"{bias.name}_q", bias_qparams(params(x).s, params(w)))
    real = graph.add("dequantize", [held], before=node, sources=node.sources)
    graph.set_input(node, 2, real.output)
    return True
