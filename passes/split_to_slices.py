# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""split(x) => one slice per result, so that each result has a kernel and a lifetime of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Value
from qcompiler.passmanager import Pass, PassContext


@dataclass(frozen=True)
class SplitToSlices(Pass):
    """Replace every split by slices."""

    name: ClassVar[str] = "split_to_slices"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether there was a split."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name != "split":
                continue
            axis = node.attr("axis") % node.input(0).type.rank
            start = 0
            results: list[Value] = []
            for v in node.outputs:
                end = start + v.shape[axis]
                piece = graph.add(
                    "slice",
                    [node.input(0)],
                    {"starts": (start,), "ends": (end,), "axes": (axis,), "steps": (1,)},
                    types=[v.type],
                    name=f"{node.name}_{len(results)}",
                    before=node,
                    sources=node.sources,
                )
                results.append(piece.output)
                start = end
            graph.replace_node(node, *results)
            changed = True
        graph.eliminate_dead()  # pieces that nothing reads
        return changed
