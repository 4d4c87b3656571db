# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Bring constant weights of matrix products to the right, in the order [K, N].

matmul(w, x, bias)                       ->  transpose(matmul(x', w')) + bias
matmul(a, w, transpose_a)                ->  matmul(a', w)
matmul(a, w, transpose_b)                ->  matmul(a, w')
matmul(a, dequantize(q), transpose_b)    ->  matmul(a, dequantize(q'))
transpose(dequantize(q))                 ->  dequantize(q')
reshape(dequantize(q))                   ->  dequantize(q')
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.grids import found_grid
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import expanded
from qcompiler.passes.rewrite import merged_sources, producer_of, supersede
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import PerAxis, PerGroup, QuantParams


@dataclass(frozen=True)
class FoldWeightLayout(Pass):
    """Transpose constant weights at compile time, quantized ones included."""

    name: ClassVar[str] = "fold_weight_layout"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was folded."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name == "transpose":
                changed |= _fold_transpose(graph, node)
            elif node.op.name == "reshape":
                changed |= _fold_reshape(graph, node)
            elif node.op.name == "matmul":
                node, turned = _constant_right(graph, node)
                changed |= turned
                if node.attr("transpose_b"):
                    changed |= _fold_matmul(graph, node)
        if changed:
            graph.eliminate_dead()
            graph.sort()
        return changed


def _stored(value: Value) -> Value | None:
    """Return the constant itself, or the quantized constant that is dequantized."""
    node = producer_of(value, "dequantize")
    stored = node.input(0) if node is not None else value
    return stored if stored.is_constant else None


def _transposed(graph: Graph, value: Value, perm: Sequence[int]) -> Value:
    """Return a transposed copy of a stored weight."""
    q = value.qparams
    if q is not None and not q.is_per_tensor:
        g = q.granularity
        scale, zero = q.scale, q.zero_point
        if isinstance(g, PerAxis):
            g = PerAxis(list(perm).index(g.axis))
        elif isinstance(g, PerGroup):
            g = PerGroup(list(perm).index(g.axis), g.group_size)
            scale, zero = scale.transpose(perm), zero.transpose(perm)
        q = QuantParams(scale, zero, q.storage, q.qmin, q.qmax, g)
    data = np.ascontiguousarray(value.array().transpose(perm))
    return graph.constant(data, value.name, q, value.dtype)


def _last_two_swapped(graph: Graph, value: Value, near: Node) -> Value:
    """Return a value with its last two axes swapped; a stored constant is swapped in place."""
    rank = value.type.rank
    perm = (*range(rank - 2), rank - 1, rank - 2)
    stored = _stored(value)
    if stored is None:
        return graph.add("transpose", [value], {"perm": perm}, before=near).output
    new = _transposed(graph, stored, perm)
    if stored is value or value.producer is None:
        return new
    source = value.producer
    return graph.add(
        "dequantize", [new], name=source.name, before=near, sources=source.sources
    ).output


def _constant_right(graph: Graph, node: Node) -> tuple[Node, bool]:
    """Give a product with one constant operand the form that kernels pack: a @ constant.

    Returns:
        The product, and whether anything changed.
    """
    a, b = node.input(0), node.input(1)
    turn_a, turn_b = bool(node.attr("transpose_a")), bool(node.attr("transpose_b"))
    if a.type.rank < 2 or b.type.rank < 2 or node.optional(3) is not None:
        return node, False
    if _stored(b) is not None:
        if not turn_a:
            return node, False
        graph.set_input(node, 0, _last_two_swapped(graph, a, node))
        graph.set_attrs(node, transpose_a=False)
        return node, True
    if _stored(a) is None:
        return node, False
    x = b if turn_b else _last_two_swapped(graph, b, node)
    w = a if turn_a else _last_two_swapped(graph, a, node)
    product = graph.add("matmul", [x, w], before=node, sources=node.sources)
    rank = product.output.type.rank
    perm = (*range(rank - 2), rank - 1, rank - 2)
    new = graph.add("transpose", [product.output], {"perm": perm}, before=node)
    bias = node.optional(2)
    if bias is not None:
        new = graph.add("add", [new.output, bias], before=node)
    supersede(graph, node, new)
    return product, True


def _fold_matmul(graph: Graph, node: Node) -> bool:
    b = node.input(1)
    stored = _stored(b)
    if stored is None:
        return False
    perm = [*range(b.type.rank - 2), b.type.rank - 1, b.type.rank - 2]
    new = _transposed(graph, stored, perm)
    if stored is not b and b.producer is not None:
        source = b.producer
        new = graph.add("dequantize", [new], name=source.name, sources=source.sources).output
    graph.set_input(node, 1, new)
    graph.set_attrs(node, transpose_b=False)
    return True


def _fold_transpose(graph: Graph, node: Node) -> bool:
    x = node.input(0)
    stored = _stored(x)
    if stored is None or stored is x:
        return False
    new = graph.add(
        "dequantize",
        [_transposed(graph, stored, node.attr("perm"))],
        name=node.name,
        sources=merged_sources(node),
    )
    supersede(graph, node, new)
    return True


def _fold_reshape(graph: Graph, node: Node) -> bool:
    """Reshape a quantized constant whose scales then are those of an axis, or of blocks."""
    stored = _stored(node.input(0))
    q = stored.qparams if stored is not None else None
    if stored is None or q is None or q.is_per_tensor or not stored.type.size:
        return False
    shape = node.output.shape
    scale, zero = (
        np.broadcast_to(a, stored.shape).reshape(shape) for a in expanded(q, stored.shape)
    )
    by, scale, zero = found_grid(scale, zero)
    held = graph.constant(
        np.ascontiguousarray(stored.array().reshape(shape)),
        stored.name,
        QuantParams(scale, zero, q.storage, q.qmin, q.qmax, by),
        stored.dtype,
    )
    new = graph.add("dequantize", [held], name=node.name, sources=merged_sources(node))
    supersede(graph, node, new)
    return True
