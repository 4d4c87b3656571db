# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Clamp before moving, where the kernel that computes the values can clamp them for free.

    relu(depth_to_space(conv(x)))  ->  depth_to_space(relu(conv(x)))

The same for clip, and for every movement that gives only elements it got, max_pool included: a
clamp keeps order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import OpKind
from qcompiler.passes.rewrite import bypass, only_use
from qcompiler.passmanager import Pass, PassContext

_MOVES = frozenset(
    {"depth_to_space", "space_to_depth", "reshape", "transpose", "slice", "max_pool"}
)


@dataclass(frozen=True)
class HoistClamps(Pass):
    """Move relu and clip up to the product whose result they clamp, past movements."""

    name: ClassVar[str] = "hoist_clamps"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was moved."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name in ("relu", "clip"):
                changed |= _hoist(graph, node)
        if changed:
            graph.sort()
        return changed


def _hoist(graph: Graph, node: Node) -> bool:
    moves = _moves_of_product(graph, node.input(0))
    if not moves:
        return False
    new = graph.add(
        node.op.name,
        [moves[-1].input(0)],
        node.attrs,
        name=node.name,
        names=[f"{node.output.name}/unmoved"],
        sources=node.sources,
    )
    graph.set_input(moves[-1], 0, new.output)
    for move in moves:  # what they give is clamped now
        move.output.name = graph.fresh(f"{move.output.name}/clamped")
    name, meaning = node.name, node.output.name
    bypass(graph, node, moves[0].output)
    new.name, moves[0].output.name = name, meaning
    return True


def _moves_of_product(graph: Graph, value: Value) -> list[Node]:
    """Return the movements between a value and the product it comes from, the last one first.

    Empty where there is none, or where anything else reads a value on the way.
    """
    moves: list[Node] = []
    while only_use(graph, value):
        p = value.producer
        if p is None or (p.op.kind is not OpKind.COMPUTE and p.op.name not in _MOVES):
            return []
        if p.op.kind is OpKind.COMPUTE:
            return moves
        moves.append(p)
        value = p.input(0)
    return []
