# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products of 16-bit integers become sums of products of their bytes.

Before -> after, for activations q of scale s around z with q - z = 256 h + l, 0 <= l <= 255:

    s (q - z) w  ->  (256 s) h w + s l w

and the same for weights, whose low byte has a sign. Each product is exact in int32; scaled, they
are added in float32, so that every target gives the same bits. A product in float32 would round
sums of 16 by 8 bits, in an order that targets choose.
"""

from __future__ import annotations

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.fuse_moves import dequantized, params, succeed
from qcompiler.types import Array, DType, PerAxis, QuantParams, TensorType

_SIXTEEN = (DType.INT16, DType.UINT16)
_EIGHT = (DType.INT8, DType.UINT8)
_WEIGHTS = (*_EIGHT, DType.INT4, DType.UINT4)
_BYTE = 256


def split_sixteen_bits(graph: Graph) -> bool:
    """Rewrite products of 16-bit activations, or by 16-bit constant weights."""
    halves: dict[Value, tuple[Value, Value]] = {}
    changed = False
    for node in graph.nodes:
        if node.op.name not in ("conv", "matmul") or node.optional(3) is not None:
            continue
        if node.attr("act_min") is not None or node.attr("act_max") is not None:
            continue
        x, w = dequantized(node.input(0)), dequantized(node.input(1))
        if x is None or w is None or x.is_constant or not w.is_constant or w.type.rank < 2:
            continue
        if not _splits(x) and w.dtype not in _SIXTEEN:
            continue
        weights = _weights(graph, w)
        if weights is None or not (_splits(x) or x.dtype in _EIGHT):
            continue
        if _splits(x) and x not in halves:
            halves[x] = _halves(graph, x, node)
        activations = halves[x] if _splits(x) else (node.input(0),)
        _rewrite(graph, node, activations, weights or (node.input(1),))
        changed = True
    if changed:
        graph.eliminate_dead()
        graph.sort()
    return changed


def _splits(x: Value) -> bool:
    """Whether activations are of 16 bits, and within 16 bits with a sign around their zero."""
    q = params(x)
    if x.dtype not in _SIXTEEN or not q.is_per_tensor:
        return False
    return q.qmin - q.z >= DType.INT16.min and q.qmax - q.z <= DType.INT16.max


def _weights(graph: Graph, w: Value) -> tuple[Value, ...] | None:
    """Return the dequantized bytes of 16-bit weights, nothing for narrower ones; None: neither."""
    q = params(w)
    if w.dtype in _WEIGHTS:
        return ()
    if w.dtype not in _SIXTEEN or not (q.is_per_tensor or isinstance(q.granularity, PerAxis)):
        return None
    shape = [1] * w.type.rank
    if isinstance(q.granularity, PerAxis):
        shape[q.granularity.axis] = -1
    around = w.array().astype(np.int32) - q.zero_point.reshape(shape)
    if around.size and (around.min() < DType.INT16.min or around.max() > DType.INT16.max):
        return None
    high = np.clip((around + 128) >> 8, DType.INT8.min, DType.INT8.max)
    low = around - _BYTE * high  # a few are beyond 127: `fuse_wide` sees to these
    storage = DType.INT8 if low.size == 0 or low.max() <= DType.INT8.max else DType.INT16

    def held(data: Array, storage: DType, scale: Array) -> Value:
        grid = QuantParams(
            scale, np.zeros_like(q.zero_point), storage, storage.min, storage.max, q.granularity
        )
        stored = graph.constant(data.astype(storage.numpy), f"{w.name}_byte", grid)
        return graph.add("dequantize", [stored], before=graph.nodes[0]).output

    return held(high, DType.INT8, q.scale * np.float32(_BYTE)), held(low, storage, q.scale)


def _halves(graph: Graph, x: Value, before: Node) -> tuple[Value, Value]:
    """Return the dequantized high and low bytes of activations."""
    q = params(x)

    def step(op: str, *operands: Value) -> Value:
        return graph.add(op, list(operands), before=before).output

    def number(value: float) -> Value:
        return graph.constant(np.asarray(value, np.float32), f"{x.name}_byte")

    def held(real: Value, grid: QuantParams) -> Value:
        types = [TensorType(x.shape, grid.storage, grid)]
        return step("dequantize", graph.add("quantize", [real], types=types, before=before).output)

    scale = np.float32(q.s)
    whole = step("round", step("div", step("dequantize", x), number(scale)))  # q - z, exact
    high = step("floor", step("mul", whole, number(1 / _BYTE)))
    low = step("sub", whole, step("mul", high, number(_BYTE)))
    zero = np.int32(0)
    upper = QuantParams(scale * np.float32(_BYTE), zero, DType.INT8, -128, 127)
    lower = QuantParams(scale, zero, DType.UINT8, 0, 255)
    return (
        held(step("mul", high, number(upper.s)), upper),
        held(step("mul", low, number(lower.s)), lower),
    )


def _rewrite(
    graph: Graph, node: Node, activations: tuple[Value, ...], weights: tuple[Value, ...]
) -> None:
    """Put the sum of the products of all bytes in the place of a product."""
    out, total = node.output, None
    made = node
    for x in activations:
        for w in weights:
            last = x is activations[-1] and w is weights[-1]  # the finest scale takes the bias
            made = graph.add(
                node.op.name,
                [x, w, node.optional(2) if last else None],
                dict(node.attrs),
                types=[out.type],
                before=node,
                sources=node.sources,
            )
            if total is None:
                total = made.output
                continue
            made = graph.add(
                "add", [total, made.output], types=[out.type], before=node, sources=node.sources
            )
            total = made.output
    graph.replace_node(node, made.output)
    succeed(made, node, out)
