# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Recognize layer normalization that a model writes out.

    d = x - mean(x)
    d / sqrt(mean(d * d) + epsilon) * scale + bias   ->  layer_norm(x, scale, bias)

and the form of Keras and TensorFlow, with r = scale / sqrt(mean(d * d) + epsilon):

    x * r + (bias - mean(x) * r)   ->  layer_norm(x, scale, bias)

Squares, roots and quotients are expected as `simplify_arithmetic` leaves them; equal
subexpressions should have been merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.rewrite import (
    absorb,
    constant_operand,
    float_constant,
    only_use,
    producer_of,
    scalar,
    supersede,
)
from qcompiler.passmanager import Pass, PassContext


@dataclass(frozen=True)
class RecognizeLayerNorm(Pass):
    """Replace written-out layer normalization over trailing axes."""

    name: ClassVar[str] = "recognize_layer_norm"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was recognized."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name in ("div", "mul"):
                changed |= _centered_form(graph, node)
            elif node.op.name == "add":
                changed |= _folded_form(graph, node)
        for node in graph.nodes:
            if node.op.name == "layer_norm":
                changed |= _take_scale_and_bias(graph, node)
        if changed:
            graph.eliminate_dead()
            graph.sort()
        return changed


def _pairs(node: Node | None, op: str) -> Iterator[tuple[Value, Value]]:
    """Yield the operands of a commutative node in both orders."""
    if node is not None and node.op.name == op:
        a, b = node.input(0), node.input(1)
        yield a, b
        yield b, a


def _mean_of(value: Value) -> tuple[Value, int] | None:
    """Return (x, axis) if the value is the mean of x over all axes from `axis`, kept as 1."""
    node = producer_of(value, "reduce_mean")
    if node is None or not node.attr("keepdims"):
        return None
    x = node.input(0)
    axes = sorted(int(a) % x.type.rank for a in node.attr("axes"))
    if not axes or axes != list(range(axes[0], x.type.rank)):
        return None
    return x, axes[0]


def _centered(value: Value) -> tuple[Value, int] | None:
    """Return (x, axis) if the value is x - mean(x)."""
    node = producer_of(value, "sub")
    if node is None:
        return None
    mean = _mean_of(node.input(1))
    return mean if mean is not None and mean[0] is node.input(0) else None


def _deviation(value: Value) -> tuple[Value, int, float] | None:
    """Return (x, axis, epsilon) if the value is sqrt(mean((x - mean(x))^2) + epsilon)."""
    root = producer_of(value, "sqrt")
    total = producer_of(root.input(0), "add") if root is not None else None
    found = constant_operand(total) if total is not None else None
    epsilon = scalar(found[1]) if found is not None else None
    if total is None or found is None or epsilon is None:
        return None
    variance = _mean_of(total.input(1 - found[0]))
    if variance is None:
        return None
    squares, axis = variance
    square = producer_of(squares, "mul")
    if square is None or square.input(0) is not square.input(1):
        return None
    centered = _centered(square.input(0))
    if centered is None or centered[1] != axis:
        return None
    return centered[0], axis, epsilon


def _inverse_deviation(value: Value) -> tuple[Value, int, float] | None:
    """Return (x, axis, epsilon) if the value is 1 / deviation."""
    node = producer_of(value, "reciprocal")
    if node is not None:
        return _deviation(node.input(0))
    node = producer_of(value, "div")
    if node is not None and scalar(node.input(0)) == 1.0:
        return _deviation(node.input(1))
    return None


def _centered_form(graph: Graph, node: Node) -> bool:
    """Replace (x - mean) / deviation."""
    tried = [(node.input(0), _deviation(node.input(1)))] if node.op.name == "div" else []
    tried += [(d, _inverse_deviation(r)) for d, r in _pairs(node, "mul")]
    for d, spread in tried:
        centered = _centered(d)
        if spread is None or centered is None or centered != spread[:2]:
            continue
        x, axis, epsilon = spread
        new = graph.add(
            "layer_norm",
            [x],
            {"axis": axis, "epsilon": epsilon},
            name=node.name,
            sources=node.sources,
        )
        supersede(graph, node, new, *_above(node, x))
        return True
    return False


def _above(root: Node, x: Value) -> list[Node]:
    """Return the nodes between x and the root, inner ones first."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        for v in node.operands:
            if v is not x and v.producer is not None and v.producer not in found:
                visit(v.producer)
        if node is not root:
            found.setdefault(node)

    visit(root)
    return list(found)


def _folded_form(graph: Graph, node: Node) -> bool:
    """Replace x * r + (bias - mean * r), with r = 1 / deviation, times a constant scale or not."""
    for product, rest in _pairs(node, "add"):
        for x, r in _pairs(producer_of(product, "mul"), "mul"):
            factor, scale = r, None
            spread = _inverse_deviation(r)
            if spread is None:
                for inverse, gamma in _pairs(producer_of(r, "mul"), "mul"):
                    found = _inverse_deviation(inverse)
                    if found is not None and float_constant(gamma) is not None:
                        spread, scale = found, gamma
            if spread is None or spread[0] is not x:
                continue
            axis = spread[1]
            minus = _minus_mean_times(rest, x, axis, factor)
            if minus is None:
                continue
            bias = minus[0]
            if not all(_fits(v, x, axis) for v in (scale, bias) if v is not None):
                continue
            operands = [x, *(_shaped(graph, v, x, axis) for v in (scale, bias))]
            attrs = {"axis": axis, "epsilon": spread[2]}
            new = graph.add("layer_norm", operands, attrs, name=node.name, sources=node.sources)
            supersede(graph, node, new, *_above(node, x))
            return True
    return False


def _minus_mean_times(
    value: Value, x: Value, axis: int, factor: Value
) -> tuple[Value | None] | None:
    """Return (bias,) if the value is bias - mean(x) * factor, with a constant bias or none."""

    def is_product(v: Value, negated: bool) -> bool:
        for a, b in _pairs(producer_of(v, "mul"), "mul"):
            mean: Value | None = a
            if negated:
                neg = producer_of(a, "neg")
                mean = neg.input(0) if neg is not None else None
            if b is factor and mean is not None and _mean_of(mean) == (x, axis):
                return True
        neg = producer_of(v, "neg")
        return negated and neg is not None and is_product(neg.input(0), False)

    if is_product(value, True):
        return (None,)
    sub = producer_of(value, "sub")
    if sub is not None and is_product(sub.input(1), False) and sub.input(0).is_constant:
        return (sub.input(0),)
    for a, b in _pairs(producer_of(value, "add"), "add"):
        if is_product(a, True) and b.is_constant:
            return (b,)
    return None


def _fits(value: Value, x: Value, axis: int) -> bool:
    """Whether a constant varies only along the normalised axes of x."""
    data = float_constant(value)
    if data is None or value.dtype is not x.dtype or value.type.rank > x.type.rank:
        return False
    full = (1,) * (x.type.rank - value.type.rank) + value.shape
    return all(n == 1 for n in full[:axis]) and all(
        n in (1, m) for n, m in zip(full[axis:], x.shape[axis:], strict=True)
    )


def _shaped(graph: Graph, value: Value | None, x: Value, axis: int) -> Value | None:
    """Return a constant in exactly the shape of the normalised axes."""
    shape = x.shape[axis:]
    if value is None or value.shape == shape:
        return value
    data = value.array().reshape((1,) * (x.type.rank - value.type.rank) + value.shape)
    full = np.broadcast_to(data.reshape(data.shape[axis:]), shape)
    return graph.constant(np.ascontiguousarray(full), value.name, dtype=value.dtype)


def _take_scale_and_bias(graph: Graph, node: Node) -> bool:
    """Move a constant product, then a constant sum, into the layer_norm."""
    x, axis = node.input(0), int(node.attr("axis")) % node.input(0).type.rank
    changed = False
    for op, i in (("mul", 1), ("add", 2)):
        y = node.output
        if not only_use(graph, y):
            break
        if node.optional(i) is not None:
            continue
        user = y.users[0]
        found = constant_operand(user)
        blocked = op == "mul" and node.optional(2) is not None
        if user.op.name != op or found is None or blocked or not _fits(found[1], x, axis):
            continue
        graph.set_input(node, i, _shaped(graph, found[1], x, axis))
        absorb(graph, user, node)
        changed = True
    return changed
