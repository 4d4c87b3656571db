# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products of 16-bit integers become sums of products of their bytes.

Before -> after, for activations q = 256 h + l of scale s around z = 256 zh + zl, 0 <= l, zl <= 255:

    s (q - z) w  ->  (256 s) (h - zh) w + s (l - zl) w

and the same for weights, constant or not; the low byte of constant ones has a sign where it can.
Each product is exact in int32; scaled, they are added in float32, so that every target gives the
same bits. A product in float32 would round sums of 16 by 8 bits, in an order that targets choose.
"""

from __future__ import annotations

import math

import numpy as np

from qcompiler.interpreter import known
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import expanded
from qcompiler.passes.fuse_moves import dequantized, params, succeed
from qcompiler.passes.fuse_patterns import is_plain
from qcompiler.plan import summed_axis
from qcompiler.types import Array, DType, PerAxis, PerGroup, QuantParams, TensorType

_SIXTEEN = (DType.INT16, DType.UINT16)
_EIGHT = (DType.INT8, DType.UINT8)
_WEIGHTS = (*_EIGHT, DType.INT4, DType.UINT4)
_BYTE = 256


def split_sixteen_bits(graph: Graph) -> bool:
    """Rewrite products with an operand of 16 bits, whose other one has 16 bits or less."""
    halves: dict[Value, tuple[Value, ...]] = {}
    changed = False
    for node in graph.nodes:
        if not is_plain(node):
            continue
        x, w = dequantized(node.input(0)), dequantized(node.input(1))
        if x is None or w is None or w.type.rank < 2:
            continue
        if x.dtype not in _SIXTEEN and w.dtype not in _SIXTEEN:
            continue
        if not _is_activation(x) or not _multiplies(node, w):
            continue
        left, right = (_bytes(graph, node, at, halves) for at in (0, 1))
        _rewrite(graph, node, left, right)
        changed = True
    if changed:
        graph.eliminate_dead()
        graph.sort()
    return changed


def _is_activation(x: Value) -> bool:
    """Whether a value computed at run time has one scale, and 16 bits or less."""
    q = params(x)
    found = not x.is_constant and x.dtype in (*_EIGHT, *_SIXTEEN) and q.is_per_tensor
    return found and _has_bytes(q)


def _multiplies(node: Node, w: Value) -> bool:
    """Whether the right operand of a product has a form that integer products take."""
    if not w.is_constant:
        return node.op.name == "matmul" and _is_activation(w)
    q, axis = params(w), summed_axis(node)
    if w.dtype not in (*_WEIGHTS, *_SIXTEEN) or not _has_bytes(q):
        return False
    if isinstance(q.granularity, PerGroup):
        if node.op.name == "conv":
            return q.granularity.axis == axis and node.attr("group") == 1
        return q.granularity.axis == axis and w.type.rank == 2 and not node.attr("transpose_a")
    columns = 0
    if node.op.name == "matmul":
        columns = w.type.rank - (2 if node.attr("transpose_b") else 1)
    return q.is_per_tensor or q.granularity == PerAxis(columns)


def _has_bytes(q: QuantParams) -> bool:
    """Whether the scale of a high byte is a number."""
    return q.storage not in _SIXTEEN or bool((q.scale <= np.finfo(np.float32).max / _BYTE).all())


def _bytes(
    graph: Graph, node: Node, at: int, halves: dict[Value, tuple[Value, ...]]
) -> tuple[Value, ...]:
    """Return an operand as dequantized values of 8 bits or less, the high byte first."""
    real = node.input(at)
    held = dequantized(real)
    if held is None or held.dtype not in _SIXTEEN:
        return (real,)
    if held.is_constant:
        return _constant_bytes(graph, node, held)
    if held not in halves:
        halves[held] = _halves(graph, held, node)
    return halves[held]


def _constant_bytes(graph: Graph, node: Node, w: Value) -> tuple[Value, Value]:
    """Return the dequantized bytes of 16-bit weights."""
    q = params(w)
    data = w.array().astype(np.int32)
    around = data - expanded(q, w.shape)[1]

    def held(data: Array, storage: DType, scale: Array, zero: Array) -> Value:
        grid = QuantParams(scale, zero, storage, storage.min, storage.max, q.granularity)
        stored = graph.constant(data.astype(storage.numpy), f"{w.name}_byte", grid)
        return graph.add("dequantize", [stored], before=graph.nodes[0]).output

    wide = q.scale * np.float32(_BYTE)
    short = DType.INT16.min <= around.min(initial=0) and around.max(initial=0) <= DType.INT16.max
    high = np.clip((around + 128) >> 8, DType.INT8.min, DType.INT8.max)
    low = around - _BYTE * high  # a few are beyond 127: later rewrites see to these
    narrow = low.max(initial=0) <= DType.INT8.max
    # Kernels take the zero points of a matrix in blocks, so none of its rows need be read again.
    if short and (narrow or node.op.name == "conv" or not isinstance(q.granularity, PerGroup)):
        none = np.zeros_like(q.zero_point)
        storage = DType.INT8 if narrow else DType.INT16
        return held(high, DType.INT8, wide, none), held(low, storage, q.scale, none)
    upper = DType.INT8 if q.storage is DType.INT16 else DType.UINT8
    return (
        held(data >> 8, upper, wide, q.zero_point >> 8),
        held(data & 255, DType.UINT8, q.scale, q.zero_point & 255),
    )


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

    scale, zero = np.float32(q.s), q.z & 255
    whole = step("round", step("div", step("dequantize", x), number(scale)))  # q - z, exact
    above = step("add", whole, number(zero)) if zero else whole
    high = step("floor", step("mul", above, number(1 / _BYTE)))
    low = step("sub", whole, step("mul", high, number(_BYTE)))
    kind = DType.INT8 if q.storage is DType.INT16 else DType.UINT8
    upper = QuantParams(scale * np.float32(_BYTE), np.int32(q.z >> 8), kind, kind.min, kind.max)
    lower = QuantParams(scale, np.int32(zero), DType.UINT8, 0, 255)
    return (
        held(step("mul", high, number(upper.s)), upper),
        held(step("mul", low, number(lower.s)), lower),
    )


def _rewrite(graph: Graph, node: Node, left: tuple[Value, ...], right: tuple[Value, ...]) -> None:
    """Put the sum of the products of all bytes in the place of a product."""
    out, bias = node.output, node.optional(2)
    inside = bias is None or _takes_bias(node, left[-1], right[-1], bias)
    total: Value | None = None

    def made(op: str, *operands: Value | None) -> Node:
        attrs = dict(node.attrs) if op == node.op.name else {}
        return graph.add(
            op, list(operands), attrs, types=[out.type], before=node, sources=node.sources
        )

    for x in left:
        for w in right:
            last = x is left[-1] and w is right[-1]  # the finest scale takes the bias
            new = made(node.op.name, x, w, bias if last and inside else None)
            new = new if total is None else made("add", total, new.output)
            total = new.output
    if not inside and bias is not None and total is not None:
        reals = known(bias)
        assert reals is not None  # `is_plain` looked
        if node.op.name == "conv" and node.attr("layout") == "NCHW":
            reals = reals.reshape(-1, *(1,) * (out.type.rank - 2))
        new = made("add", total, graph.constant(reals, bias.name))
    graph.replace_node(node, new.output)
    succeed(new, node, out)


def _takes_bias(node: Node, x: Value, w: Value, bias: Value) -> bool:
    """Whether a bias fits the accumulator of the product with the finest scale, and leaves room."""
    left, right, reals = dequantized(x), dequantized(w), known(bias)
    assert left is not None  # both are bytes
    assert right is not None
    assert reals is not None  # `is_plain` looked
    if isinstance(params(right).granularity, PerGroup):
        return True  # it is added as a float
    if node.op.name == "conv":
        depth = math.prod(right.shape[1:])
    else:
        depth = x.shape[-2 if node.attr("transpose_a") else -1]
    scale = np.float64(params(left).s) * params(right).scale.astype(np.float64)
    sums = np.abs(reals.astype(np.float64)) / scale + float(depth) * 255 * 255
    return bool((sums < 1 << 31).all())
