# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Bring arithmetic with constants into few forms, so that later patterns are few too.

x + 0, x * 1, x ^ 1, cast to its own dtype     ->  x
x - c, x / c                                   ->  x + (-c), x * (1 / c)
x ^ 2, x ^ 0.5, x ^ -1                         ->  x * x, sqrt(x), 1 / x
(x * a) * b, (x + a) + b                       ->  x * (a * b), x + (a + b)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.rewrite import (
    bypass,
    constant_operand,
    float_constant,
    only_use,
    producer_of,
    scalar,
    supersede,
)
from qcompiler.passmanager import Pass, PassContext


@dataclass(frozen=True)
class SimplifyArithmetic(Pass):
    """Rewrite arithmetic with constant operands; floats only, each constant rounded once."""

    name: ClassVar[str] = "simplify_arithmetic"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was rewritten."""
        del ctx
        changed = False
        while _sweep(graph):  # each rule shrinks the graph or leaves a form that no rule takes
            changed = True
            graph.sort()
        return changed


def _sweep(graph: Graph) -> bool:
    changed = False
    for node in graph.nodes:
        rewrite = _RULES.get(node.op.name)
        if rewrite is not None:
            changed |= rewrite(graph, node)
    return changed


def _replace(graph: Graph, node: Node, op: str, *inputs: Value, inner: Node | None = None) -> bool:
    new = graph.add(op, inputs, name=node.name, sources=node.sources)
    supersede(graph, node, new, *([inner] if inner is not None else []))
    return True


def _constant(graph: Graph, like: Value, data: object, what: str) -> Value:
    held = np.asarray(data, like.dtype.numpy)
    return graph.constant(held, f"{like.name}.{what}", dtype=like.dtype)


def _neutral(graph: Graph, node: Node, i: int, number: float) -> bool:
    """Drop the node if its constant operand i holds nothing but the neutral number."""
    x, c = node.input(1 - i), node.input(i)
    if node.output.type != x.type or x.is_constant or not (c.array() == number).all():
        return False
    bypass(graph, node, x)
    return True


def _joined(graph: Graph, node: Node, i: int) -> bool:
    """Join the constants of two equal operators in a row: (x o a) o b -> x o (a o b)."""
    x, b = node.input(1 - i), node.input(i)
    inner = producer_of(x, node.op.name)
    found = constant_operand(inner) if inner is not None else None
    if inner is None or found is None or not only_use(graph, x):
        return False
    j, a = found
    if a.dtype is not b.dtype or not a.dtype.is_float:
        return False
    wide = np.multiply if node.op.name == "mul" else np.add
    data = wide(a.array().astype(np.float64), b.array().astype(np.float64))
    if data.shape not in (a.shape, b.shape):
        return False  # joining would make a larger constant than either
    joined = _constant(graph, b, data, "joined")
    return _replace(graph, node, node.op.name, inner.input(1 - j), joined, inner=inner)


def _add(graph: Graph, node: Node) -> bool:
    found = constant_operand(node)
    if found is None or float_constant(found[1]) is None:
        return False
    return _neutral(graph, node, found[0], 0.0) or _joined(graph, node, found[0])


def _mul(graph: Graph, node: Node) -> bool:
    found = constant_operand(node)
    if found is None or float_constant(found[1]) is None:
        return False
    return _neutral(graph, node, found[0], 1.0) or _joined(graph, node, found[0])


def _sub(graph: Graph, node: Node) -> bool:
    found = constant_operand(node)
    data = float_constant(found[1]) if found is not None else None
    if found is None or data is None or found[0] != 1:
        return False
    if _neutral(graph, node, 1, 0.0):
        return True
    return _replace(
        graph, node, "add", node.input(0), _constant(graph, found[1], -data, "negative")
    )


def _div(graph: Graph, node: Node) -> bool:
    found = constant_operand(node)
    data = float_constant(found[1]) if found is not None else None
    if found is None or data is None:
        return False
    i, c = found
    if i == 0:
        if scalar(c) != 1.0 or node.output.shape != node.input(1).shape:
            return False
        return _replace(graph, node, "reciprocal", node.input(1))
    if _neutral(graph, node, 1, 1.0):
        return True
    with np.errstate(all="ignore"):
        inverse = (1.0 / data.astype(np.float64)).astype(c.dtype.numpy)
    if not np.isfinite(inverse).all() or not inverse.all():
        return False  # dividing by 0 or by a number whose inverse is lost must stay as it is
    return _replace(graph, node, "mul", node.input(0), _constant(graph, c, inverse, "inverse"))


def _pow(graph: Graph, node: Node) -> bool:
    x, exponent = node.input(0), scalar(node.input(1))
    if exponent is None or not x.dtype.is_float or x.shape != node.output.shape or x.is_constant:
        return False
    if exponent == 1.0:
        bypass(graph, node, x)
        return True
    if exponent == 2.0:
        return _replace(graph, node, "mul", x, x)
    op = {0.5: "sqrt", -1.0: "reciprocal"}.get(exponent)
    return op is not None and _replace(graph, node, op, x)


def _cast(graph: Graph, node: Node) -> bool:
    if node.input(0).type != node.output.type:
        return False
    bypass(graph, node, node.input(0))
    return True


_RULES = {"add": _add, "mul": _mul, "sub": _sub, "div": _div, "pow": _pow, "cast": _cast}
