# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Fold explicit padding of the spatial axes into the window operator that reads it.

conv(pad(x, p), pads=q)          ->  conv(x, pads=p+q)
average_pool(pad(x, p), pads=0)  ->  average_pool(x, pads=p, count_include_pad)
max_pool(pad(x, p))              ->  max_pool(x, pads=p)     if the padding can never win
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Node, Value
from qcompiler.ops._base import AttrValue
from qcompiler.passes.rewrite import merged_sources
from qcompiler.passmanager import Pass, PassContext

_NOT_NEGATIVE = frozenset({"relu", "sigmoid", "hard_sigmoid", "softmax", "abs", "sqrt", "exp"})
_WINDOWS = ("conv", "average_pool", "max_pool")


@dataclass(frozen=True)
class FoldPad(Pass):
    """Fold constant padding into convolutions and poolings."""

    name: ClassVar[str] = "fold_pad"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was folded."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name in _WINDOWS:
                changed |= _fold(graph, node)
        if changed:
            graph.eliminate_dead()
        return changed


def _fold(graph: Graph, node: Node) -> bool:
    pad = node.input(0).producer
    if pad is None or pad.op.name != "pad" or pad.attr("mode") != "constant":
        return False
    x, pads, rank = pad.input(0), pad.attr("pads"), pad.output.type.rank
    outside = (0, 1, rank, rank + 1)
    if node.attrs["layout"] != "NCHW" or any(pads[i] for i in outside) or min(pads) < 0:
        return False
    extra = (*pads[2:rank], *pads[rank + 2 :])
    own = node.attr("pads")
    attrs: dict[str, AttrValue] = {"pads": tuple(a + b for a, b in zip(own, extra, strict=True))}
    value = float(pad.attr("value"))
    if node.op.name == "conv":
        valid = value == 0.0
    elif node.op.name == "average_pool":
        # The pad's zeros count; the pool's own would have to count as well.
        valid = value == 0.0 and not node.attr("ceil_mode")
        valid = valid and (not any(own) or bool(node.attr("count_include_pad")))
        attrs["count_include_pad"] = True
    else:
        valid = not node.attr("ceil_mode") and _never_wins(node, x, value, extra)
    if not valid:
        return False
    graph.set_input(node, 0, x)
    graph.set_attrs(node, **attrs)
    node.sources = merged_sources(pad, node)
    return True


def _never_wins(pool: Node, x: Value, value: float, extra: tuple[int, ...]) -> bool:
    """Whether the maximum over a window is the same without the padding.

    So it is for padding with minus infinity, and for zeros beside elements that are never
    negative. Every window must hold an element of x: its padding is narrower than itself.
    """
    kernel, dilations, own = pool.attr("kernel"), pool.attr("dilations"), pool.attr("pads")
    n = len(kernel)
    reach = [kernel[i] if dilations[i] == 1 else 1 for i in range(n)]
    if any(extra[i] + own[i] >= reach[i % n] for i in range(2 * n)):
        return False
    if value == -math.inf:
        return True
    return value == 0.0 and _not_negative(x)


def _not_negative(x: Value) -> bool:
    node = x.producer
    while node is not None and node.op.name in ("max_pool", "reshape", "transpose", "slice"):
        node = node.input(0).producer
    if node is None:
        return False
    if node.op.name == "clip":
        return node.attrs["min"] is not None and float(node.attr("min")) >= 0.0
    return node.op.name in _NOT_NEGATIVE
