# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Write every clamp with constant bounds as one relu or clip.

min(x, c), max(x, c)                 ->  clip(x)
clip(relu(x)), relu(clip(x)), ...    ->  one clip
clip(x, 0, none)                     ->  relu(x)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.rewrite import bypass, constant_operand, only_use, scalar, supersede
from qcompiler.passmanager import Pass, PassContext

Bounds = tuple[float, float]


@dataclass(frozen=True)
class MergeClips(Pass):
    """Merge clamps in a row; a clamp that does nothing goes away."""

    name: ClassVar[str] = "merge_clips"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was merged."""
        del ctx
        changed = False
        for node in graph.nodes:
            changed |= _merge(graph, node)
        if changed:
            graph.sort()
        return changed


def _clamp(node: Node | None) -> tuple[Value, Bounds] | None:
    """Return (operand, bounds) if the node is a float clamp with lower <= upper."""
    if node is None or not all(v.dtype.is_float for v in node.operands):
        return None
    name = node.op.name
    low, high = -math.inf, math.inf
    if name == "relu":
        return node.input(0), (0.0, high)
    if name == "clip":
        low = low if node.attrs["min"] is None else float(node.attr("min"))
        high = high if node.attrs["max"] is None else float(node.attr("max"))
        return (node.input(0), (low, high)) if low <= high else None
    if name not in ("min", "max"):
        return None
    found = constant_operand(node)
    bound = scalar(found[1]) if found is not None else None
    if found is None or bound is None or math.isnan(bound):
        return None
    x = node.input(1 - found[0])
    if x.shape != node.output.shape:
        return None
    return x, ((low, bound) if name == "min" else (bound, high))


def _merge(graph: Graph, node: Node) -> bool:
    outer = _clamp(node)
    if outer is None:
        return False
    x, (low, high) = outer
    matched = [node]
    inner = _clamp(x.producer) if only_use(graph, x) else None
    if inner is not None and x.producer is not None:
        matched.insert(0, x.producer)
        x, (below, above) = inner
        low, high = min(max(below, low), high), min(max(above, low), high)
    if low == -math.inf and high == math.inf:
        bypass(graph, node, x)
        return True
    want = "relu" if (low, high) == (0.0, math.inf) else "clip"
    if inner is None and node.op.name == want:
        return False
    attrs = {}
    if want == "clip":
        attrs = {
            "min": None if low == -math.inf else low,
            "max": None if high == math.inf else high,
        }
    new = graph.add(want, [x], attrs, name=node.name, sources=node.sources)
    supersede(graph, node, new, *matched)
    return True
