# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Bring the axes of a reduction together, as the reducing kernels want them.

reduce_mean(x[A, B, C, D], axes = (1, 3))
->  reshape(reduce_mean(transpose(x)[A, C, B, D], axes = (2, 3)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Node
from qcompiler.passes.rewrite import supersede
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import TensorType

_REDUCTIONS = frozenset({"qreduce_mean", "reduce_mean", "reduce_sum", "reduce_max", "reduce_min"})


@dataclass(frozen=True)
class ContiguousReductions(Pass):
    """Transpose what is reduced over axes that have others between them."""

    name: ClassVar[str] = "contiguous_reductions"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was rewritten."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name in _REDUCTIONS:
                changed |= _gather(graph, node)
        if changed:
            graph.sort()
        return changed


def _gather(graph: Graph, node: Node) -> bool:
    x, out = node.input(0), node.output
    rank = x.type.rank
    axes = sorted({a % rank for a in node.attr("axes")})
    if not axes or all(x.shape[a] == 1 or a in axes for a in range(axes[0], axes[-1])):
        return False
    kept = [a for a in range(rank) if a not in axes]
    moved = graph.add(
        "transpose", [x], {"perm": (*kept, *axes)}, name=f"{node.name}/gather", sources=node.sources
    )
    reduced = graph.add(
        node.op.name,
        [moved.output],
        {**node.attrs, "axes": tuple(range(len(kept), rank)), "keepdims": False},
        types=[TensorType(tuple(x.shape[a] for a in kept), out.dtype, out.qparams)],
        name=f"{node.name}/gathered",
        sources=node.sources,
    )
    shape = {"shape": out.shape}
    last = graph.add("reshape", [reduced.output], shape, name=f"{node.name}/shape")
    name, own = node.name, last.name
    supersede(graph, node, last, node)
    last.name, reduced.name = own, name
    return True
