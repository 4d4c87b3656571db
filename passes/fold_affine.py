# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Fold products and sums with constants into the weights and bias of what computes the operand.

    conv(x, w, b) * f + s  ->  conv(x, w * f, b * f + s)        f, s: one number per channel

The same for conv_transpose and for matmul with a constant operand (one number per column). A
product with one number also folds through movements and through a product of two activations:

    reshape(matmul(x, w)) * f  ->  reshape(matmul(x, w * f))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.rewrite import (
    absorb,
    along_axis,
    bypass,
    constant_operand,
    float_constant,
    new_constant,
    only_use,
    producer_of,
    scalar,
)
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import Array

_LINEAR = ("conv", "conv_transpose", "matmul")
_MOVES = frozenset({"reshape", "transpose", "slice", "expand", "tile", "gather"})


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Fold mul, div, add and sub with constants into a preceding linear operator.

    Folding happens only where nothing else reads the value in between. New weights are computed
    in float64 and rounded once.
    """

    name: ClassVar[str] = "fold_affine"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was folded."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name in ("mul", "div", "add", "sub"):
                changed |= _fold(graph, node) or _fold_scalar(graph, node)
        return changed


def _fold(graph: Graph, node: Node) -> bool:
    found = constant_operand(node)
    if found is None:
        return False
    i, constant = found
    y = node.input(1 - i)
    linear = producer_of(y, *_LINEAR)
    data = float_constant(constant)
    if linear is None or data is None or node.output.shape != y.shape:
        return False
    axis = y.type.rank - 1 if linear.op.name == "matmul" else 1
    c = along_axis(data, y.type.rank, axis, y.shape[axis])
    if c is None:
        return False
    one, zero = np.ones_like(c), np.zeros_like(c)
    op = node.op.name
    if op == "mul":
        factor, shift = c, zero
    elif op == "add":
        factor, shift = one, c
    elif op == "sub":
        factor, shift = (one, -c) if i == 1 else (-one, c)
    elif i == 1 and c.all():
        factor, shift = 1.0 / c, zero
    else:
        return False
    return fold_into_producer(graph, node, factor, shift, axis)


def fold_into_producer(graph: Graph, node: Node, factor: Array, shift: Array, axis: int) -> bool:
    """Fold `y * factor + shift` into the linear node that computes operand y of `node`.

    Args:
        graph: The graph.
        node: The node that computes the product and the sum; erased on success.
        factor: Float64 [C], one per index of `axis`.
        shift: Float64 [C].
        axis: Axis of y along which they vary.

    Returns:
        Whether it was folded.
    """
    y = next(v for v in node.operands if not v.is_constant)
    linear = producer_of(y, *_LINEAR)
    if linear is None or not only_use(graph, y) or not _takes(linear, axis):
        return False
    bias = linear.optional(2)
    if bias is not None and float_constant(bias) is None:
        return False
    # Without constant weights it is a product of activations, and a constant sum may be a mask
    # of huge numbers: as a bias it would not fit an integer accumulator.
    if float_constant(linear.input(1)) is None:
        return False
    if (factor != 1.0).any():
        _scale_weight(graph, linear, factor)
    if bias is not None or shift.any():
        old = np.asarray(float_constant(bias), np.float64) if bias is not None else 0.0
        total = old * factor + shift
        like = bias if bias is not None else linear.input(0)
        name = bias.name if bias is not None else f"{linear.name}.bias"
        data = total.astype(like.dtype.numpy)
        graph.set_input(linear, 2, graph.constant(data, name, dtype=like.dtype))
    absorb(graph, node, linear)
    return True


def _takes(linear: Node, axis: int) -> bool:
    """Whether the node's weights can take factors along that axis of its result."""
    if linear.optional(3) is not None or linear.attrs.get("layout", "NCHW") != "NCHW":
        return False
    if any(linear.attrs.get(k) is not None for k in ("act_min", "act_max")):
        return False
    if linear.op.name != "matmul":
        return axis == 1
    rank = linear.output.type.rank
    # A vector operand leaves no axis of columns.
    return axis == rank - 1 and linear.input(1).type.rank >= 2


def _scale_weight(graph: Graph, linear: Node, factor: Array) -> None:
    """Multiply the constant weights by one factor per output channel."""
    w = linear.input(1)
    data = w.array()
    wide = data.astype(np.float64)
    if linear.op.name == "conv":
        scaled = wide * factor.reshape(-1, *(1,) * (data.ndim - 1))
    elif linear.op.name == "matmul":
        turned = bool(linear.attr("transpose_b"))
        scaled = wide * (factor[:, None] if turned else factor)
    else:
        # Weight [C, M / group, ...]: output channel m of group g is g * M / group + column.
        group = int(linear.attr("group"))
        split = wide.reshape(group, data.shape[0] // group, *data.shape[1:])
        shape = (group, 1, data.shape[1], *(1,) * (data.ndim - 2))
        scaled = (split * factor.reshape(shape)).reshape(data.shape)
    graph.set_input(linear, 1, new_constant(graph, w, scaled))


def _fold_scalar(graph: Graph, node: Node) -> bool:
    """Fold a product with one number through movements into a linear node with constants."""
    found = constant_operand(node)
    if found is None or node.op.name not in ("mul", "div"):
        return False
    i, constant = found
    number = scalar(constant)
    y = node.input(1 - i)
    if number is None or number == 0.0 or not np.isfinite(number) or node.output.shape != y.shape:
        return False
    if node.op.name == "div" and i == 0:
        return False
    linear = _linear_above(graph, y)
    if linear is None:
        return False
    factor = 1.0 / number if node.op.name == "div" else number
    channels = linear.output.shape[-1 if linear.op.name == "matmul" else 1]
    bias = linear.optional(2)
    _scale_weight(graph, linear, np.full(channels, factor))
    if bias is not None:
        scaled = np.asarray(float_constant(bias), np.float64) * factor
        graph.set_input(linear, 2, new_constant(graph, bias, scaled))
    bypass(graph, node, y)
    return True


def _linear_above(graph: Graph, value: Value) -> Node | None:
    """Return the linear node with constant weights from which only movements lead to the value."""
    while only_use(graph, value):
        node = value.producer
        if node is None:
            return None
        if node.op.name in _LINEAR:
            axis = node.output.type.rank - 1 if node.op.name == "matmul" else 1
            bias = node.optional(2)
            known = float_constant(node.input(1)) is not None
            if not _takes(node, axis) or (bias is not None and float_constant(bias) is None):
                return None
            if known:
                return node
            if node.op.name != "matmul" or bias is not None:
                return None
            # A product of two activations: the factor may go into either.
            found = _linear_above(graph, node.input(0))
            return found or _linear_above(graph, node.input(1))
        if node.op.name not in _MOVES:
            return None
        value = node.input(0)
    return None
