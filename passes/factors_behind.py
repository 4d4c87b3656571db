# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Move scales that are computed at run time behind the products of the codes that they scale.

    matmul(mul(dequantize(a), s), mul(dequantize(b), t))  ->  mul(matmul(a', b'), s, t)

with a' and b' the dequantized codes: the product is one of integers then. A scale may be one in
all, or one per row, column, image or output channel: what one sum adds up has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.rewrite import continued, producer_of
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import DType, Shape

_PRODUCTS = frozenset({"conv", "matmul", "conv_transpose"})


@dataclass(frozen=True)
class FactorsBehind(Pass):
    """Rewrite products of codes with computed scales."""

    name: ClassVar[str] = "factors_behind"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether a scale was moved."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name in _PRODUCTS and node.optional(3) is None:
                changed |= _rewrite(graph, node)
        if changed:
            graph.eliminate_dead()
            graph.sort()
        return changed


@dataclass(frozen=True, slots=True)
class _Scaled:
    """An operand.

    Attributes:
        codes: The dequantized codes.
        moves: What moves their reals to where the product reads them, in order.
        factor: Their scale, and its shape beside the result; None where their type has it.
        shape: That shape.
    """

    codes: Value
    moves: tuple[Node, ...]
    factor: Value | None = None
    shape: Shape = ()


def _rewrite(graph: Graph, node: Node) -> bool:
    sides = [_scaled(node, at) for at in (0, 1)]
    found = [s for s in sides if s is not None]
    if len(found) < 2 or all(s.factor is None for s in found):
        return False

    def add(op: str, *values: Value | None, **attrs: Any) -> Value:
        name = f"{node.name}/scale"
        return graph.add(op, values, attrs, name=name, sources=node.sources).output

    for at, side in enumerate(found):
        if side.factor is not None:
            v = side.codes
            for move in side.moves:
                v = add(move.op.name, v, **dict(move.attrs))
            graph.set_input(node, at, v)
    bias = node.optional(2)
    if bias is not None:
        graph.set_input(node, 2, None)

    def behind(y: Value) -> Value:
        for side in found:
            if side.factor is not None:
                s = side.factor
                s = s if s.shape == side.shape else add("reshape", s, shape=side.shape)
                y = add("mul", y, s)
        if bias is not None:
            along = bias.shape
            if node.op.name != "matmul":
                along = (bias.type.size, *(1,) * (y.type.rank - 2))
            y = add("add", y, bias if along == bias.shape else add("reshape", bias, shape=along))
        return y

    continued(graph, node, behind, "unscaled")
    return True


def _scaled(node: Node, at: int) -> _Scaled | None:
    """Return what an operand is, or None where that is no codes, or its scale cannot be moved."""
    v, moves = node.input(at), []
    while (move := producer_of(v, "transpose", "reshape")) is not None:
        moves.append(move)
        v = move.input(0)
    back = tuple(reversed(moves))
    if producer_of(v, "dequantize") is not None:
        return _Scaled(v, back)
    times = producer_of(v, "mul")
    if times is None:
        return None
    codes, factor = times.operands
    if producer_of(codes, "dequantize") is None:
        codes, factor = factor, codes
    if producer_of(codes, "dequantize") is None or codes.shape != v.shape:
        return None
    if factor.is_constant or factor.dtype is not DType.FLOAT32:
        return None
    shape = _beside(node, at, factor, codes.type.rank)
    if shape is None or (moves and factor.type.size != 1):
        return None
    return _Scaled(codes, back, factor, shape)


def _beside(node: Node, at: int, factor: Value, rank: int) -> Shape | None:
    """Return the shape in which scales of an operand multiply the result; None if they cannot."""
    if factor.type.size == 1:
        return ()
    full: Shape = (*(1,) * (rank - factor.type.rank), *factor.shape)
    if node.op.name == "matmul":
        turned = bool(node.attr("transpose_b" if at else "transpose_a"))
        if rank < 2 or full[-1 if (at == 0) != turned else -2] > 1:
            return None
        return (*full[:-2], full[-1], full[-2]) if turned else full
    axis = int(at == 1 and node.op.name == "conv_transpose")
    if full[axis] != factor.type.size or (axis and node.attr("group") != 1):
        return None
    return (full[axis], *(1,) * (rank - 1 - at))
