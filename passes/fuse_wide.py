# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights that 8 bits with a sign do not hold around their zero point become a longer product.

Before -> after, for unsigned weights w with zero point z, so that -255 <= w - z <= 255:

    x (w - z) -> [x, x'] [a, b],  a + b = w - z,  both int8

`b` is what exceeds int8, and x' are the channels of x (the rows of w) where it is not 0: a few of
them, unless the zero point is far from the middle. The sum is the same integer, so the kernel's
result is too; a group of a grouped convolution repeats all of its channels.
"""

from __future__ import annotations

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import expanded
from qcompiler.passes.fuse_moves import dequantized, params, succeed
from qcompiler.types import Array, DType, PerAxis, QuantParams, TensorType

_NARROW = (DType.INT8, DType.UINT8)


def split_wide_weights(graph: Graph) -> bool:
    """Rewrite products between 8-bit activations and weights that int8 does not hold."""
    changed = False
    for node in graph.nodes:
        if node.op.name not in ("conv", "matmul"):
            continue
        x, w = dequantized(node.input(0)), dequantized(node.input(1))
        if x is None or w is None or not w.is_constant or x.is_constant:
            continue
        q = params(w)
        if x.dtype not in _NARROW or not params(x).is_per_tensor or w.type.rank < 2:
            continue
        if not q.is_per_tensor and q.granularity != PerAxis(columns_axis(node, w)):
            continue
        if w.dtype not in _NARROW and not nearly_narrow(w):
            continue
        terms = int8_terms(w.array().astype(np.int32) - expanded(q, w.shape)[1])
        if len(terms) > 1:
            _rewrite(graph, node, x, w, terms)
            changed = True
    if changed:
        graph.eliminate_dead()
    return changed


def columns_axis(node: Node, w: Value) -> int:
    """Return the axis of the weights that the columns of the result come from."""
    if node.op.name == "conv":
        return 0
    return w.type.rank - (2 if node.attr("transpose_b") else 1)


def nearly_narrow(w: Value) -> bool:
    """Whether 16-bit weights are low bytes of wider ones (see `fuse_sixteen`)."""
    return w.dtype is DType.INT16 and bool(np.abs(w.array().astype(np.int32)).max() <= 255)


def int8_terms(around: Array) -> list[Array]:
    """Return int8 tensors whose sum is a tensor of integers; as few as there are."""
    rest = around
    terms: list[Array] = []
    while not terms or rest.any():
        term = np.clip(rest, DType.INT8.min, DType.INT8.max).astype(np.int8)
        terms.append(term)
        rest = rest - term
    return terms


def _rewrite(graph: Graph, node: Node, x: Value, w: Value, terms: list[Array]) -> None:
    """Put a product with more to sum over in the place of one."""
    rank = w.type.rank
    if node.op.name == "conv":
        at = 1 if node.attr("layout") == "NCHW" else x.type.rank - 1
        summed, groups = 1, int(node.attr("group"))
    else:
        at = x.type.rank - (2 if node.attr("transpose_a") else 1)
        summed, groups = rank - (1 if node.attr("transpose_b") else 2), 1
    indices, parts = _chosen(terms, summed, groups)
    sources = node.sources

    def quantized(op: str, inputs: list[Value], attrs: dict[str, int], extent: int) -> Value:
        shape = (*x.shape[:at], extent, *x.shape[at + 1 :])
        made = graph.add(
            op, inputs, attrs, types=[TensorType(shape, x.dtype, x.qparams)], before=node,
            sources=sources,
        )  # fmt: skip
        return made.output

    where = graph.constant(indices, f"{w.name}_rows")
    more = x
    if indices.size != x.shape[at] or (indices != np.arange(indices.size)).any():
        more = quantized("gather", [x, where], {"axis": at}, indices.size)
    wide = more
    if groups == 1:
        wide = quantized("concat", [x, more], {"axis": at}, x.shape[at] + indices.size)
    q = params(w)
    grid = QuantParams(
        q.scale, np.zeros_like(q.zero_point), DType.INT8, DType.INT8.min, DType.INT8.max,
        q.granularity,
    )  # fmt: skip
    held = graph.constant(np.concatenate(parts, axis=summed), w.name, grid)
    replace_product(graph, node, wide, held)


def replace_product(graph: Graph, node: Node, x: Value, w: Value) -> None:
    """Put the same product of other quantized activations and weights in the place of one."""
    operands = [
        graph.add("dequantize", [v], before=node, sources=node.sources).output for v in (x, w)
    ]
    out = node.output
    made = graph.add(
        node.op.name,
        [*operands, *node.inputs[2:]],
        dict(node.attrs),
        types=[out.type],
        before=node,
        sources=node.sources,
    )
    graph.replace_node(node, made.output)
    succeed(made, node, out)


def _chosen(terms: list[Array], summed: int, groups: int) -> tuple[Array, list[Array]]:
    """Return which channels are read again (of a grouped product: all that are read), and weights.

    The weights are to be joined along the summed axis.
    """
    extent = terms[0].shape[summed]
    if groups > 1:
        own = np.arange(groups * extent).reshape(groups, extent)
        return np.tile(own, (1, len(terms))).reshape(-1), terms
    indices, parts = [], [terms[0]]
    for term in terms[1:]:
        others = tuple(i for i in range(term.ndim) if i != summed)
        found = np.flatnonzero(term.any(axis=others))
        indices.append(found)
        parts.append(np.take(term, found, axis=summed))
    return np.concatenate(indices), parts
