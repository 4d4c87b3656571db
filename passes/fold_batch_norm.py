# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Turn batch normalization with known statistics into a product and a sum per channel.

    batch_norm(x, scale, bias, mean, var)  ->  x * f + (bias - mean * f),  f = scale / sqrt(var + e)

`fold_affine` then moves both into a preceding convolution or matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Node
from qcompiler.passes.fold_affine import fold_into_producer
from qcompiler.passes.rewrite import float_constant, supersede
from qcompiler.passmanager import Pass, PassContext


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch_norm into what computes its operand, or write it as mul and add.

    The factors are computed in float64 and rounded once.
    """

    name: ClassVar[str] = "fold_batch_norm"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was folded."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name == "batch_norm":
                changed |= _fold(graph, node)
        if changed:
            graph.sort()
        return changed


def _fold(graph: Graph, node: Node) -> bool:
    arrays = [float_constant(v) for v in node.inputs[1:]]
    x = node.input(0)
    if x.is_constant or any(a is None for a in arrays):
        return False
    scale, bias, mean, var = (np.asarray(a, np.float64) for a in arrays)
    epsilon = float(node.attr("epsilon"))
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(var + epsilon)
    shift = bias - mean * factor
    if not (np.isfinite(factor).all() and np.isfinite(shift).all()):
        return False  # broken statistics: leave them visible
    if fold_into_producer(graph, node, factor, shift, axis=1):
        return True
    shape = (-1, *(1,) * (x.type.rank - 2))
    base = node.input(1).name
    f = graph.constant(factor.astype(x.dtype.numpy).reshape(shape), f"{base}.factor", dtype=x.dtype)
    s = graph.constant(shift.astype(x.dtype.numpy).reshape(shape), f"{base}.shift", dtype=x.dtype)
    product = graph.add("mul", [x, f], name=f"{node.name}/mul", sources=node.sources)
    total = graph.add("add", [product.output, s], name=f"{node.name}/add", sources=node.sources)
    supersede(graph, node, total, node)
    return True
