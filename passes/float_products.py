# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Why products of quantized operands stay float: one reason each, for the plan and its log."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompiler.grids import varying
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import expanded
from qcompiler.ops import OpKind
from qcompiler.passes.fuse_moves import dequantized, params
from qcompiler.passes.fuse_patterns import is_volume
from qcompiler.plan import summed_axis
from qcompiler.types import DType, PerGroup

_PRODUCTS = ("conv", "matmul", "conv_transpose")
_NARROW = (DType.INT8, DType.UINT8, DType.INT16, DType.UINT16, DType.INT4, DType.UINT4)


@dataclass
class FloatProducts:
    """Reasons of the products of a quantized model that stay float.

    Attributes:
        reasons: By name of the node.
    """

    reasons: dict[str, str] = field(default_factory=dict)


def float_products(graph: Graph) -> FloatProducts:
    """Return why products of quantized activations have no integer form.

    Products of weights alone that are quantized are float because the model says no more.
    """
    found = FloatProducts()
    for node in graph.nodes:
        if node.op.name not in _PRODUCTS:
            continue
        reason = _reason(node)
        if reason is not None:
            found.reasons[node.name] = reason
    return found


def _reason(node: Node) -> str | None:
    moved = _moved(node)
    if moved is not None:
        return moved
    x, w = dequantized(node.input(0)), dequantized(node.input(1))
    one = x if x is not None else w
    if one is None or (w is None and node.input(0).is_constant):
        return None
    if x is None or w is None:
        if one is w and w.is_constant:
            return None  # weights alone are quantized
        which = ("left operand", "right operand") if node.op.name == "matmul" else (
            "activations", "weights")  # fmt: skip
        return f"its {which[x is not None]} {'is' if node.op.name == 'matmul' else 'are'} float"
    if x.is_constant:
        return "its left operand is a constant"
    for v in (x, w):
        if v.dtype not in _NARROW:
            return f"it multiplies {v.dtype.value}"
    for what, at, v in (("weights", 1, w), ("activations", 0, x)):
        if _along_sum(node, at, v):
            by = params(v).granularity
            if isinstance(by, PerGroup) and at == 1 and by.axis == _summed(node, at, v):
                break
            given = f"in blocks along axis {by.axis}" if isinstance(by, PerGroup) else (
                f"along axis {getattr(by, 'axis', 0)}")  # fmt: skip
            name = what if w.is_constant else ("right operand" if at else "left operand")
            verb = "has" if not w.is_constant else "have"
            return f"its {name} {verb} scales {given}: what is summed has no one scale"
    if isinstance(params(w).granularity, PerGroup):
        return "its weights have a scale each: no integers are summed"
    if is_volume(node) or node.op.name == "conv_transpose":
        return "its windows have no form of two axes"
    if not w.is_constant:
        return "its zero points differ, and sums of its codes exceed what float32 holds"
    return "its weights exceed 16 bits when their zero points are taken off"


def _moved(node: Node) -> str | None:
    """Return why codes that are moved between a dequantize and a product are floats, or None."""
    product = node.op.name == "matmul"
    names = ("left operand has", "right operand has") if product else (
        "activations have", "weights have")  # fmt: skip
    for at, name in enumerate(names):
        v, moves = node.input(at), []
        while v.producer is not None and v.producer.op.kind is OpKind.MOVEMENT:
            moves.append(v.producer.op.name)
            v = v.producer.input(0)
        held = dequantized(v)
        if moves and held is not None and not params(held).is_per_tensor:
            by = params(held).granularity
            scales = "in blocks along" if isinstance(by, PerGroup) else "along"
            return (
                f"its {name} scales {scales} axis {getattr(by, 'axis', 0)}, "
                f"which lie along none after a {moves[0]}"
            )
    return None


def _summed(node: Node, at: int, v: Value) -> int:
    """Return the axis of channels, or K, of an operand."""
    if node.op.name == "conv_transpose":
        return 1 - at
    if node.op.name == "conv":
        return 1
    if at == 1:
        return summed_axis(node) + v.type.rank - 2
    return v.type.rank - (2 if node.attr("transpose_a") else 1)


def _along_sum(node: Node, at: int, v: Value) -> bool:
    """Whether the scales or zero points of an operand differ for what one sum adds up."""
    if v.type.rank < 2:
        return False
    q, axis = params(v), _summed(node, at, v)
    axes = {axis} if node.op.name == "matmul" else {axis, *range(2, v.type.rank)}
    for a in expanded(q, v.shape):
        full = np.broadcast_to(a, v.shape)
        if node.op.name == "conv" and at == 0:  # channels of one group are summed
            group = int(node.attr("group"))
            full = full.reshape(full.shape[0] * group, -1, *full.shape[2:])
        if axes & set(varying(full)):
            return True
    return False
