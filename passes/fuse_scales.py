# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Scales that do not vary along what a product sums over move behind it.

Before -> after, for codes q with scales S and zero points Z along a row, a batch or a channel:

    (S (q - Z)) w + b  ->  S ((q - z) w - (Z - z) sum(w)) + b,   z: one zero point in all

The product in the middle is one of integers on a grid of scale 1. Where S varies along the columns
alone (channels of a depthwise convolution) it joins the scales of the weights, and what zero points
add joins the integer bias: there is nothing to compute behind the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompiler.grids import found_grid, varying
from qcompiler.interpreter import known
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import centred, dequantize, expanded, quantize_bias
from qcompiler.passes.free_bias import added_bias
from qcompiler.passes.fuse_grids import Grids, regrid
from qcompiler.passes.fuse_moves import adder, dequantized, params, succeed
from qcompiler.passes.fuse_parts import few_matrices
from qcompiler.passes.fuse_patterns import is_plain
from qcompiler.plan import summed_axis
from qcompiler.types import (
    Array,
    DType,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    QuantParams,
)

_NARROW = (DType.INT8, DType.UINT8)
_ACTIVATIONS = (*_NARROW, DType.INT16, DType.UINT16)
_WEIGHTS = (*_ACTIVATIONS, DType.INT4, DType.UINT4)


@dataclass(frozen=True, slots=True)
class _Behind:
    """What one operand leaves to be done behind the product.

    Attributes:
        scale: Factors that broadcast against the result.
        shift: Zero points less the one that stays, in the layout of the operand's scales, with as
            many axes as the operand; None where there is one zero point.
        zero: The one that stays.
        whole: Whether an operand of one scale leaves that behind.
    """

    scale: Array
    shift: Array | None
    zero: int
    whole: bool = False


def move_scales(graph: Graph) -> bool:
    """Rewrite products of operands with several scales that can be moved behind them."""
    made: Grids = {}
    changed = False
    for node in graph.nodes:
        if not is_plain(node) or (node.op.name == "conv" and node.attr("layout") != "NCHW"):
            continue
        x, w = dequantized(node.input(0)), dequantized(node.input(1))
        if x is None or w is None or x.is_constant or w.type.rank < 2 or x.type.rank < 2:
            continue
        if (
            x.dtype not in _ACTIVATIONS
            or w.dtype not in _WEIGHTS
            or 0 in (x.type.size, w.type.size)
        ):
            continue
        changed = _moved(graph, node, x, w, made) or changed
    if changed:
        graph.eliminate_dead()
        graph.sort()
    return changed


def _moved(graph: Graph, node: Node, x: Value, w: Value, made: Grids) -> bool:
    if w.is_constant:
        w = _by_columns(graph, node, w)
    elif node.op.name == "conv":
        return False
    left, right = _behind(node, 0, x), _behind(node, 1, w)
    if left is None or right is None:
        return False
    stays = _stays(node, w)
    if params(x).is_per_tensor and (params(w).is_per_tensor or stays):
        if w is not dequantized(node.input(1)):
            graph.set_input(node, 1, _dequantized(graph, node, w))
            return True
        return False
    if node.op.name == "conv":
        return _conv(graph, node, x, w, left, made)
    # Weights are codes less their zero points, if 16 bits hold that.
    around = stays or (w.is_constant and _fits(w))
    if not around:  # sums of codes are exact where the codes are on a grid of scale 1
        if not _sums_exactly(node, x, w, left, right):
            return False
        left, right = _summed_exactly(x, left, right), _summed_exactly(w, right, left)
    a = regrid(graph, node, x, left.zero, left.shift is not None, made, always=left.whole)
    if stays:
        b = _dequantized(graph, node, w)
    elif w.is_constant:
        b = _plain_weights(graph, node, w, None if around else right.zero)
    else:
        b = regrid(graph, node, w, right.zero, right.shift is not None, made, always=right.whole)
    y = graph.add("matmul", [a, b], dict(node.attrs), before=node, sources=node.sources).output
    if around:
        if left.shift is not None:
            y = _less(graph, node, y, _turned(node, 0, left.shift) * _sums(node, w, stays))
    else:
        y = _less_sums(graph, node, y, (a, b), (left.shift, right.shift))
    y = _times(graph, node, y, left.scale)
    if not stays:
        y = _times(graph, node, y, right.scale)
    _finish(graph, node, y)
    return True


def _stays(node: Node, w: Value) -> bool:
    """Whether kernels take the scales of constant weights as they are: by column, or by block."""
    if not w.is_constant:
        return False
    by, columns = params(w).granularity, 0
    if isinstance(by, PerGroup) and by.axis == _summed(node, w):
        return node.op.name == "conv" or w.type.rank == 2 or few_matrices(w)
    if node.op.name == "matmul":
        columns = w.type.rank - (2 if node.attr("transpose_b") else 1)
        if w.type.rank > 2 and few_matrices(w):
            return not _along_sum(node, w)
        if w.type.rank > 2:
            return isinstance(by, PerTensor)
    return isinstance(by, PerTensor) or by == PerAxis(columns)


def _along_sum(node: Node, w: Value) -> bool:
    """Whether scales or zero points vary along what is summed."""
    axis = _summed(node, w)
    return any(axis in varying(np.broadcast_to(a, w.shape)) for a in expanded(params(w), w.shape))


def _summed(node: Node, w: Value) -> int:
    """Return the axis of the weights that a product sums over."""
    return summed_axis(node) + (w.type.rank - 2 if node.op.name == "matmul" else 0)


def _by_columns(graph: Graph, node: Node, w: Value) -> Value:
    """Return constant weights whose blocks are equal along all but the columns by column."""
    q = params(w)
    if not isinstance(q.granularity, PerGroup) or q.granularity.axis == _summed(node, w):
        return w
    scale, zero = (np.broadcast_to(a, w.shape) for a in expanded(q, w.shape))
    by, scale, zero = found_grid(scale, zero)
    if isinstance(by, PerGroup):
        return w
    grid = QuantParams(scale, zero, q.storage, q.qmin, q.qmax, by)
    return graph.constant(w.array(), w.name, grid)


def _behind(node: Node, at: int, v: Value) -> _Behind | None:
    """Return what an operand leaves behind a product; None where scales vary along its sum."""
    q = params(v)
    if (not v.is_constant and q.is_per_tensor) or (at == 1 and _stays(node, v)):
        return _Behind(np.ones((), np.float32), None, 0)
    scale, zero = (_least(np.broadcast_to(a, v.shape)) for a in expanded(q, v.shape))
    if node.op.name == "conv":
        found = _by_result(node, v, scale) if at == 0 else None
        if found is None or _by_result(node, v, zero) is None:
            return None
        scale = found
    else:
        turned = bool(node.attr("transpose_b" if at else "transpose_a"))
        summed = v.type.rank - (1 if (at == 0) != turned else 2)
        if scale.shape[summed] > 1 or zero.shape[summed] > 1:
            return None
        scale = scale.swapaxes(-1, -2) if turned else scale
    if zero.size == 1:
        return _Behind(scale, None, int(zero.reshape(())))
    middle = int(np.clip(np.median(zero), v.dtype.min, v.dtype.max))
    return _Behind(scale, zero - middle, middle)


def _least(a: Array) -> Array:
    """Return a tensor that broadcasts to the same one, of extent 1 where it does not vary."""
    axes = varying(a)
    return a[tuple(slice(None) if i in axes else slice(0, 1) for i in range(a.ndim))]


def _by_result(node: Node, x: Value, a: Array) -> Array | None:
    """Return numbers of images and channels per image and channel of the result, or None.

    None where they vary along the window, or within a group of channels: those are summed over.
    """
    if any(n > 1 for n in a.shape[2:]):
        return None
    if a.shape[1] == 1:
        return a
    groups = int(node.attr("group"))
    apart = a.reshape(a.shape[0], groups, -1)
    if (apart != apart[:, :, :1]).any():
        return None
    columns = node.output.shape[1] // groups
    each = np.repeat(apart[:, :, 0], columns, axis=1)
    return each.reshape(*each.shape, *(1,) * (a.ndim - 2))


# -------------------------------------------------------------------------------- operands


def _dequantized(graph: Graph, node: Node, v: Value) -> Value:
    return graph.add("dequantize", [v], before=node, sources=node.sources).output


def _plain_weights(graph: Graph, node: Node, w: Value, point: int | None) -> Value:
    """Return constant weights of scale 1: in integers around zero, or as codes around a point."""
    q, data = params(w), w.array()
    if point is not None:
        grid = QuantParams(np.float32(1), np.int32(point), q.storage, q.qmin, q.qmax)
        return _dequantized(graph, node, graph.constant(data, w.name, grid))
    zero = expanded(q, w.shape)[1]
    around = centred(data, zero)
    storage = DType.INT8
    if around.size and (around.min() < storage.min or around.max() > storage.max):
        storage = DType.INT16
    grid = QuantParams(np.float32(1), np.int32(0), storage, storage.min, storage.max)
    held = graph.constant(around.astype(storage.numpy), w.name, grid)
    return _dequantized(graph, node, held)


def _fits(w: Value) -> bool:
    """Whether constant weights less their zero points have 16 bits."""
    around = centred(w.array(), expanded(params(w), w.shape)[1])
    kind = DType.INT16
    return bool(kind.min <= around.min(initial=0) and around.max(initial=0) <= kind.max)


def _turned(node: Node, at: int, a: Array) -> Array:
    """Return numbers of an operand of a matrix product in the order of its rows and columns."""
    turned = bool(node.attr("transpose_b" if at else "transpose_a"))
    return a.swapaxes(-1, -2) if turned else a


def _sums(node: Node, w: Value, stays: bool) -> Array:
    """Return what ones times the weights are, before the scale that goes behind the product."""
    q = params(w)
    if stays:
        reals = dequantize(w.array(), q).astype(np.float64)
    else:
        reals = centred(w.array(), expanded(q, w.shape)[1]).astype(np.float64)
    sums = reals.sum(axis=_summed(node, w), keepdims=True)
    return np.asarray(sums).reshape((*w.shape[:-2], 1, -1))


def _summed_exactly(v: Value, own: _Behind, other: _Behind) -> _Behind:
    """Return what an operand leaves behind if the other one's zero points multiply its sums."""
    q = params(v)
    if other.shift is None or not q.is_per_tensor or q.s == 1:
        return own
    return _Behind(np.full((1,) * v.type.rank, q.s), None, q.z, whole=True)


def _sums_exactly(node: Node, x: Value, w: Value, left: _Behind, right: _Behind) -> bool:
    """Whether float32 holds the sums of codes that the other side's zero points multiply."""
    depth = x.shape[-2 if node.attr("transpose_a") else -1]
    summed = [params(v) for v, other in ((x, right), (w, left)) if other.shift is not None]
    return all(depth * (q.qmax - q.qmin) < 1 << 24 for q in summed)


def _less_sums(
    graph: Graph,
    node: Node,
    y: Value,
    operands: tuple[Value, Value],
    shifts: tuple[Array | None, Array | None],
) -> Value:
    """Return (a - A) (b - B) for y = a b: less A sum(b - B) and sum(a) B, of exact sums."""
    step = adder(graph, node)

    def number(a: Array) -> Value:
        return graph.constant(a.astype(np.float32), f"{node.output.name}_zero")

    for at in (1, 0):
        v, other = operands[at], shifts[1 - at]
        if other is None:
            continue
        turned = bool(node.attr("transpose_b" if at else "transpose_a"))
        axis = v.type.rank - (1 if (at == 0) != turned else 2)
        sums = step("reduce_sum", v, axes=(axis,), keepdims=True)
        if at == 1 and shifts[1] is not None:
            sums = step("sub", sums, number(shifts[1] * np.float64(v.shape[axis])))
        if turned:
            sums = step("reshape", sums, shape=(*sums.shape[:-2], *sums.shape[:-3:-1]))
        off = step("mul", sums, number(_turned(node, 1 - at, other)))
        y = step("sub", y, off)
    return y


# ---------------------------------------------------------------------------------- results


def _times(graph: Graph, node: Node, y: Value, scale: Array) -> Value:
    if scale.size == 1 and float(scale.reshape(())) == 1.0:
        return y
    factor = graph.constant(scale.astype(np.float32), f"{node.output.name}_scale")
    return graph.add("mul", [y, factor], before=node, sources=node.sources).output


def _less(graph: Graph, node: Node, y: Value, shift: Array) -> Value:
    off = graph.constant(shift.astype(np.float32), f"{node.output.name}_zero")
    return graph.add("sub", [y, off], before=node, sources=node.sources).output


def _finish(graph: Graph, node: Node, y: Value) -> None:
    """Put a value, and the bias of a product, in the place of the product."""
    bias, out = node.optional(2), node.output
    if bias is not None:
        reals = known(bias)
        assert reals is not None  # `is_plain` looked
        y = added_bias(graph, node, y, graph.constant(reals, bias.name))
    last = y.producer
    assert last is not None
    product = next(n for n in _before(last) if n.op.name == node.op.name)
    name = last.name
    graph.replace_node(node, y)
    succeed(last, node, out)
    if product is not last:  # plans know the product by its name
        last.name, product.name = name, last.name


def _before(node: Node) -> list[Node]:
    """Return a node and what it comes from along first operands."""
    found = [node]
    while (made := found[-1].input(0).producer) is not None and len(found) < 8:
        found.append(made)
    return found


def _conv(
    graph: Graph,
    node: Node,
    x: Value,
    w: Value,
    left: _Behind,
    made: Grids,
) -> bool:
    """Rewrite a convolution of activations with scales per image or per channel."""
    if not _stays(node, w):
        return False
    q = params(w)
    by_channel = left.scale.shape[0] == 1 and not isinstance(q.granularity, PerGroup)
    shifts = left.shift is not None
    if by_channel and shifts:
        by_channel = left.shift is not None and left.shift.shape[0] == 1
    pads, attrs = (), dict(node.attrs)
    if shifts and any(node.attr("pads")):
        rank, around = x.type.rank - 2, node.attr("pads")
        pads = (0, 0, *around[:rank], 0, 0, *around[rank:])
        attrs["pads"] = (0,) * (2 * rank)
    read = regrid(graph, node, x, left.zero, left.shift is not None, made, pads=pads)
    shift = None if left.shift is None else _by_result(node, x, left.shift)
    if by_channel:
        columns = w.shape[0]
        factor = np.broadcast_to(left.scale.reshape(-1), (columns,)).astype(np.float64)
        old = np.broadcast_to(q.scale, (columns,))
        zero = np.broadcast_to(q.zero_point, (columns,))
        grid = QuantParams(
            (old * factor).astype(np.float32), zero, q.storage, q.qmin, q.qmax, PerAxis(0)
        )
        w = graph.constant(w.array(), w.name, grid)
        bias = _bias(graph, node, w, shift)
        if bias is not None or (node.optional(2) is None and shift is None):
            real = _dequantized(graph, node, w)
            new = graph.add(
                "conv",
                [read, real, bias],
                attrs,
                types=[node.output.type],
                before=node,
                sources=node.sources,
            )
            out = node.output
            graph.replace_node(node, new.output)
            succeed(new, node, out)
            return True
        left = _Behind(np.ones((), np.float32), left.shift, left.zero)
    operands = [read, _dequantized(graph, node, w)]
    y = graph.add("conv", operands, attrs, before=node, sources=node.sources).output
    if shift is not None:
        reals = dequantize(w.array(), params(w)).astype(np.float64)
        real = reals.reshape(w.shape[0], -1).sum(axis=1)
        y = _less(graph, node, y, shift * real.reshape(-1, *(1,) * (x.type.rank - 2)))
    _finish(graph, node, _times(graph, node, y, left.scale))
    return True


def _bias(graph: Graph, node: Node, w: Value, shift: Array | None) -> Value | None:
    """Return the bias of a convolution whose activations have scale 1, less what is shifted.

    None where there is neither, or 32 bits do not hold it.
    """
    bias = node.optional(2)
    if bias is None and shift is None:
        return None
    q = params(w)
    ints = np.zeros(w.shape[0], np.int64)
    if bias is not None:
        reals = known(bias)
        assert reals is not None  # `is_plain` looked
        found = quantize_bias(reals, 1.0, q.scale)
        if found.clamped:
            return None
        ints += found.q
    if shift is not None:
        around = centred(w.array(), expanded(q, w.shape)[1]).astype(np.int64)
        ints -= shift.reshape(-1) * around.reshape(w.shape[0], -1).sum(axis=1)
    kind = DType.INT32
    if ints.min() < kind.min or ints.max() > kind.max:
        return None
    ints = ints.astype(np.int32)
    by: Granularity = PerAxis(0)
    grid = QuantParams(q.scale, np.zeros_like(q.zero_point), kind, kind.min, kind.max, by)
    name = bias.name if bias is not None else f"{node.output.name}_bias"
    return _dequantized(graph, node, graph.constant(ints, name, grid))
