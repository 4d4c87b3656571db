# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Remove and join operators that only move elements.

reshape, transpose, slice, pad, expand, tile, concat that change nothing   ->  their operand
reshape(reshape(x)), transpose(transpose(x)), slice(slice(x))              ->  one of them
transpose that keeps the order of the elements in memory                   ->  reshape
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Node
from qcompiler.ops._base import AttrValue
from qcompiler.passes.rewrite import bypass, merged_sources, producer_of, supersede
from qcompiler.passmanager import Pass, PassContext

_IDENTITY = frozenset({"reshape", "slice", "pad", "expand", "tile", "concat", "resize"})


@dataclass(frozen=True)
class SimplifyMovement(Pass):
    """Remove and join movements, to a fixed point."""

    name: ClassVar[str] = "simplify_movement"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was rewritten."""
        del ctx
        changed = False
        for node in graph.nodes:  # in topological order, so that one sweep reaches chains
            changed |= _identity(graph, node) or _joined(graph, node)
        if changed:
            graph.eliminate_dead()
            graph.sort()
        return changed


def _identity(graph: Graph, node: Node) -> bool:
    if len(node.outputs) != 1 or len(node.operands) != 1 or node.input(0).type != node.output.type:
        return False
    same = node.op.name in _IDENTITY and not _reorders(node)
    still = node.op.name == "transpose" and node.attr("perm") == tuple(range(node.output.type.rank))
    if not (same or still):
        return False
    bypass(graph, node, node.input(0))
    return True


def _reorders(node: Node) -> bool:
    """Whether a node of equal operand and result shape may still change the elements."""
    if node.op.name == "slice":
        return any(s != 1 for s in node.attr("steps"))
    if node.op.name == "pad":
        return any(p != 0 for p in node.attr("pads"))
    return node.op.name == "resize" and any(s != 1.0 for s in node.attr("scales"))


def _joined(graph: Graph, node: Node) -> bool:
    name = node.op.name
    if name not in ("reshape", "transpose", "slice"):
        return False
    if name == "transpose" and _keeps_order(node):
        _replace(graph, node, node, "reshape", {"shape": node.output.shape})
        return True
    inner = producer_of(node.input(0), name)
    if inner is None:
        return False
    attrs: dict[str, AttrValue] | None
    if name == "reshape":
        attrs = {"shape": node.output.shape}
    elif name == "transpose":
        perm = inner.attr("perm")
        attrs = {"perm": tuple(perm[p] for p in node.attr("perm"))}
    else:
        attrs = _sliced_twice(inner, node)
    if attrs is None:
        return False
    _replace(graph, node, inner, name, attrs)
    return True


def _replace(graph: Graph, node: Node, inner: Node, op: str, attrs: dict[str, AttrValue]) -> None:
    """Replace `node` by an operator on the operand of `inner`, or by that operand."""
    x = inner.input(0)
    if op in ("reshape", "transpose") and x.type == node.output.type:
        still = op == "reshape" or attrs["perm"] == tuple(range(x.type.rank))
        if still:
            bypass(graph, node, x)
            return
    new = graph.add(op, [x], attrs, name=node.name, sources=merged_sources(inner, node))
    supersede(graph, node, new, inner)


def _keeps_order(node: Node) -> bool:
    """Whether a transpose moves only axes of extent 1, and the type allows a reshape."""
    x = node.input(0)
    q = x.qparams
    if q is not None and not q.is_per_tensor:
        return False
    moved = [p for p in node.attr("perm") if x.shape[p] != 1]
    return moved == sorted(moved)


def _sliced_twice(inner: Node, outer: Node) -> dict[str, AttrValue] | None:
    """Return the attributes of one slice that does the work of two, where all steps go forward."""
    x = inner.input(0)
    picked: dict[int, tuple[int, int, int]] = {}
    for node in (inner, outer):
        shape = node.input(0).shape
        rows = zip(*(node.attr(k) for k in ("starts", "ends", "axes", "steps")), strict=True)
        for start, end, axis, step in rows:
            if step < 1:
                return None
            first, last, _ = slice(start, end, step).indices(shape[axis])
            begin, stride = 0, 1
            if axis in picked:
                begin, _, stride = picked[axis]
            count = len(range(first, last, step))
            low = begin + first * stride
            picked[axis] = (low, low + max(0, (count - 1) * step * stride + 1), step * stride)
            if count == 0:
                return None
    rows_out = [(*picked[a], a) for a in sorted(picked)]
    if any(end > x.shape[a] for _, end, _, a in rows_out):
        return None
    return {
        "starts": tuple(r[0] for r in rows_out),
        "ends": tuple(r[1] for r in rows_out),
        "axes": tuple(r[3] for r in rows_out),
        "steps": tuple(r[2] for r in rows_out),
    }
