# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""An average pooling whose one window is the whole image is a mean over the spatial axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Node
from qcompiler.passes.rewrite import supersede
from qcompiler.passmanager import Pass, PassContext


@dataclass(frozen=True)
class RecognizeGlobalPool(Pass):
    """Replace average_pool over everything, without padding, by reduce_mean with kept axes."""

    name: ClassVar[str] = "recognize_global_pool"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was replaced."""
        del ctx
        changed = False
        for node in graph.nodes:
            if _is_global(node):
                axes = tuple(range(2, node.output.type.rank))
                new = graph.add(
                    "reduce_mean",
                    [node.input(0)],
                    {"axes": axes, "keepdims": True},
                    name=node.name,
                    before=node,
                    sources=node.sources,
                )
                supersede(graph, node, new)
                changed = True
        return changed


def _is_global(node: Node) -> bool:
    if node.op.name != "average_pool" or node.attr("layout") != "NCHW":
        return False
    dense = all(d == 1 for d in node.attr("dilations")) and not any(node.attr("pads"))
    return dense and node.attr("kernel") == node.input(0).shape[2:]
