# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Fusion of products that stay float: bias, residual addition and clamp join the product.

Before -> after:  clip(add(conv(x, w), r), 0, 6) -> conv(x, w, residual=r) {act_min=0 act_max=6}
"""

from __future__ import annotations

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.fuse_moves import clamp_bounds
from qcompiler.passes.regions import is_epilogue, single_use
from qcompiler.types import Array, DType

_PRODUCTS = ("conv", "matmul")
_FLOAT_RESULTS = {"conv": 3, "matmul": 3, "dynamic_matmul": 4}
"""Products that add in float32, and which operand is their residual."""


def absorb_bias(graph: Graph) -> bool:
    """Make the constant addition after a product its bias: add(conv(x, w), c) -> conv(x, w, c)."""
    changed = False
    for node in graph.nodes:
        if node.op.name not in _PRODUCTS or node.optional(3) is not None:
            continue
        if node.attr("act_min") is not None or node.attr("act_max") is not None:
            continue
        out = node.output
        if not single_use(graph, out) or out.uses[0][0].op.name != "add":
            continue
        add = out.uses[0][0]
        constant = add.input(1 - out.uses[0][1])
        bias = node.optional(2)
        if not constant.is_constant or (bias is not None and not bias.is_constant):
            continue
        vector = _bias_vector(node, constant, add.output.shape)
        if vector is None:
            continue
        if bias is not None:
            vector = bias.array() + vector
        graph.set_input(node, 2, graph.constant(vector, constant.name))
        node.sources = tuple(dict.fromkeys((*node.sources, *add.sources)))
        name = add.output.name
        graph.replace_node(add, out)
        out.name = name
        changed = True
    return changed


def _bias_vector(node: Node, constant: Value, shape: tuple[int, ...]) -> Array | None:
    """Return the constant as one number per output channel, or None where it is not that."""
    if shape != node.output.shape or constant.dtype is not DType.FLOAT32:
        return None
    axis = 1 if node.op.name == "conv" else len(shape) - 1
    if node.op.name == "conv" and node.attr("layout") != "NCHW":
        axis = len(shape) - 1
    if node.op.name == "matmul" and node.input(1).type.rank < 2:
        return None
    full = (1,) * (len(shape) - constant.type.rank) + constant.shape
    if any(d != 1 for i, d in enumerate(full) if i != axis):
        return None
    return np.ascontiguousarray(np.broadcast_to(constant.array().reshape(-1), (shape[axis],)))


def fuse_float(graph: Graph) -> bool:
    """Let residual additions and clamps join float products."""
    changed = False
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op.name == "add":
            changed |= _residual(graph, node, order)
    for node in graph.nodes:
        if node.op.name in _FLOAT_RESULTS:
            changed |= _clamp(graph, node)
    if changed:
        graph.sort()
    return changed


def _residual(graph: Graph, add: Node, order: dict[Node, int]) -> bool:
    a, b = add.input(0), add.input(1)
    best: tuple[int, Node, Value] | None = None
    for v, other in ((a, b), (b, a)):
        p = v.producer
        at = None if p is None else _FLOAT_RESULTS.get(p.op.name)
        if p is None or at is None or p.optional(at) is not None:
            continue
        if p.attr("act_min") is not None or p.attr("act_max") is not None:
            continue
        if not single_use(graph, v) or other.is_constant or other is v:
            continue
        if not v.shape == other.shape == add.output.shape or other.type.is_quantized:
            continue
        if other.dtype is not v.dtype:
            continue
        if best is None or order[p] > best[0]:
            best = (order[p], p, other)
    if best is None:
        return False
    _, node, other = best
    graph.set_input(node, _FLOAT_RESULTS[node.op.name], other)
    _absorb(graph, node, add)
    return True


def _clamp(graph: Graph, node: Node) -> bool:
    out = node.output
    if not single_use(graph, out) or not is_epilogue(out.uses[0][0]):
        return False
    if node.attr("act_min") is not None or node.attr("act_max") is not None:
        return False
    clamp = out.uses[0][0]
    lo, hi = clamp_bounds(clamp)
    graph.set_attrs(node, act_min=lo, act_max=hi)
    _absorb(graph, node, clamp)
    return True


def _absorb(graph: Graph, node: Node, tail: Node) -> None:
    """Let `node` give the result of `tail`, which it now computes."""
    node.sources = tuple(dict.fromkeys((*node.sources, *tail.sources)))
    out, name = node.output, tail.output.name
    graph.replace_uses(tail.output, out)
    # `tail` itself still reads `out`; it is dead now.
    for i, v in enumerate(tail.inputs):
        if v is not None:
            graph.set_input(tail, i, out)
    graph.erase(tail)
    out.name = name
