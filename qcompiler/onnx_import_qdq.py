# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Converters of QuantizeLinear and DequantizeLinear: scale and zero point move into the type.

A scale or zero point that is computed at run time leaves plain integers, scaled by arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qcompiler.errors import ShapeError, UnsupportedOpError
from qcompiler.grids import without_blocks
from qcompiler.ir import Node, Value
from qcompiler.numerics import spread_out
from qcompiler.onnx_import_codes import (
    affine,
    as_float,
    as_integers,
    checked,
    constant_dequantized,
    less,
    on_grid,
)
from qcompiler.onnx_import_context import OpContext, converter, normal_axis, reshape
from qcompiler.onnx_import_tensors import dtype_of
from qcompiler.types import (
    Array,
    DType,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    QuantParams,
    Shape,
    TensorType,
)

Results = Sequence[Value] | None


def static_qparams(
    ctx: OpContext, at: int, shape: Shape, storage: DType, axis: int = 1
) -> QuantParams:
    """Return the parameters from operands `at` (scale) and `at + 1` (zero point).

    Source: ONNX QuantizeLinear-21: a scalar is one scale, a vector one per index of `axis`,
    a tensor of the operand's rank one per block along `axis` (granularity PerGroup here).
    """
    return without_blocks(_grid(ctx, *_numbers(ctx, at), shape, storage, axis))


def _numbers(ctx: OpContext, at: int) -> tuple[Array, Array]:
    """Return scales and zero points, of one shape unless there is one zero point in all."""
    scale = np.asarray(ctx.static(at, "scale"), np.float32)
    zero_point: Array = np.zeros(scale.shape, np.int32)
    if ctx.get(at + 1) is not None:
        zero_point = np.asarray(ctx.static(at + 1, "zero point"), np.int32)
    if zero_point.size not in (1, scale.size):
        raise ShapeError(f"{scale.size} scales and {zero_point.size} zero points do not fit")
    if zero_point.size == scale.size:
        zero_point = zero_point.reshape(scale.shape)
    return scale, zero_point


def _grid(
    ctx: OpContext, scale: Array, zero_point: Array, shape: Shape, storage: DType, axis: int
) -> QuantParams:
    granularity: Granularity = PerTensor()
    if scale.size == 1:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    elif scale.ndim == 1:
        axis = normal_axis(axis, len(shape))
        granularity = PerAxis(axis)
        if scale.size != shape[axis]:
            raise ShapeError(f"{scale.size} scales do not fit axis {axis} of {list(shape)}")
    else:
        granularity = _blocked(ctx, shape, scale, normal_axis(axis, len(shape)))
    return checked(scale, zero_point, storage, granularity)


def _blocked(ctx: OpContext, shape: Shape, scale: Array, axis: int) -> Granularity:
    blocks = scale.shape[axis] if scale.ndim == len(shape) else 0
    size = int(ctx.attr("block_size", 0)) or (-(-shape[axis] // blocks) if blocks else 0)
    want = (*shape[:axis], -(-shape[axis] // size) if size else 0, *shape[axis + 1 :])
    if scale.shape != want:
        raise ShapeError(
            f"scales {list(scale.shape)} do not fit blocks along axis {axis} of {list(shape)}"
        )
    return PerGroup(axis, size)


def is_static(ctx: OpContext, at: int) -> bool:
    """Whether scale and zero point at `at` are known at compile time."""
    return all(v is None or v.is_constant for v in (ctx.get(at), ctx.get(at + 1)))


def _run_time_grid(
    ctx: OpContext, at: int, shape: Shape, axis: int
) -> tuple[Value, Value | None, Shape]:
    """Return (scale, zero point, shape) as float32, to broadcast against data of that shape.

    Blocks become an axis of their own, which must divide the data evenly.
    """
    scale, zero = ctx.input(at), ctx.get(at + 1)
    inner, wide = shape, shape
    if scale.type.size == 1:
        wide = ()
    elif scale.type.rank == 1:
        axis = normal_axis(axis, len(shape))
        wide = tuple(d if i == axis else 1 for i, d in enumerate(shape))
    else:
        axis = normal_axis(axis, len(shape))
        blocks = scale.shape[axis] if scale.type.rank == len(shape) else 0
        if not blocks or shape[axis] % blocks:
            raise UnsupportedOpError("its scales are computed, and its blocks are not all full")
        inner = (*shape[:axis], blocks, shape[axis] // blocks, *shape[axis + 1 :])
        wide = (*scale.shape[: axis + 1], 1, *scale.shape[axis + 1 :])

    def laid_out(v: Value) -> Value:
        v = v if v.dtype is DType.FLOAT32 else ctx.emit("cast", v, to="float32")
        return reshape(ctx, v, wide if v.type.size > 1 else ())

    return laid_out(scale), None if zero is None else laid_out(zero), inner


def _by_arithmetic(ctx: OpContext, x: Value, at: int, storage: DType, axis: int) -> Value:
    """Quantize with a scale or zero point that is computed at run time."""
    scale, zero, inner = _run_time_grid(ctx, at, x.shape, axis)
    t = ctx.emit("round", ctx.emit("div", reshape(ctx, x, inner), scale))
    t = ctx.emit("add", t, zero) if zero is not None else t
    return as_integers(ctx, reshape(ctx, t, x.shape), storage)


@converter("QuantizeLinear")
def _quantize(ctx: OpContext) -> Results:
    zero_point = ctx.get(2)
    if zero_point is not None:
        storage = zero_point.dtype
    else:
        declared = int(ctx.attr("output_dtype", 0))
        storage = dtype_of(declared) if declared else DType.UINT8
    return [quantized(ctx, ctx.input(0), 1, storage, int(ctx.attr("axis", 1)))]


def quantized(ctx: OpContext, x: Value, at: int, storage: DType, axis: int = 1) -> Value:
    """Emit a quantize with the parameters from operands `at` and `at + 1`."""
    if not storage.is_integer:
        raise UnsupportedOpError(f"quantization to {storage.value} is not supported")
    if x.dtype is not DType.FLOAT32:
        x = ctx.emit("cast", x, to="float32")
    if not is_static(ctx, at):
        return _by_arithmetic(ctx, x, at, storage, axis)
    grid = static_qparams(ctx, at, x.shape, storage, axis)
    result = TensorType(x.shape, storage, grid)
    return ctx.builder.emit("quantize", [x], {}, ctx.name, types=[result])[0]


@converter("DequantizeLinear")
def _dequantize(ctx: OpContext) -> Results:
    q, want = ctx.input(0), ctx.input(1).dtype
    y = dequantized(ctx, q, 1, int(ctx.attr("axis", 1)))
    return [y if want is DType.FLOAT32 else ctx.emit("cast", y, to=want.value)]


def dequantized(ctx: OpContext, q: Value, at: int, axis: int = 1, factor: float = 1.0) -> Value:
    """Emit a dequantize with the parameters from operands `at` and `at + 1`.

    Args:
        ctx: The node.
        q: What is dequantized.
        at: Operand of its scale.
        axis: Axis of scales per index or block.
        factor: What the result is multiplied by.
    """
    if not q.dtype.is_integer:
        raise UnsupportedOpError(f"dequantization of {q.dtype.value} is not supported")
    if not is_static(ctx, at):
        scale, zero, inner = _run_time_grid(ctx, at, q.shape, axis)
        if inner == q.shape and q.dtype.bits <= 8:  # a product multiplies the codes
            given = ctx.get(at + 1)
            point = np.zeros(()) if given is None else given.data
            if zero is None or (point is not None and point.size == 1):
                x = on_grid(ctx, q, np.asarray(point, np.int64).reshape(()))
            else:
                x = less(ctx, q, zero)
        else:
            x = reshape(ctx, as_float(ctx, q), inner)
            x = ctx.emit("sub", x, zero) if zero is not None else x
        x = reshape(ctx, ctx.emit("mul", x, scale), q.shape)
        return x if factor == 1.0 else ctx.emit("mul", x, ctx.scalar(factor, x))
    if q.data is not None and q.qparams is None:
        q, qparams = _constant(ctx, q, at, axis)
    else:
        qparams = static_qparams(ctx, at, q.shape, q.dtype, axis)
    if factor != 1.0:
        scaled = (qparams.scale.astype(np.float64) * factor).astype(np.float32)
        qparams = checked(scaled, qparams.zero_point, q.dtype, qparams.granularity)
    if q.data is not None and q.qparams is None:
        return constant_dequantized(ctx, q, qparams)
    takes_on(ctx, q, qparams)
    if q.qparams is not None and q.qparams.same_grid(qparams):
        return ctx.builder.emit("dequantize", [q], {}, ctx.name)[0]
    return affine(ctx, q, qparams)


def _constant(ctx: OpContext, q: Value, at: int, axis: int) -> tuple[Value, QuantParams]:
    """Return a constant and its parameters; by scales above 0, where the model has others."""
    scale, zero = _numbers(ctx, at)
    if (scale > 0).all() or not np.isfinite(scale).all():
        return q, without_blocks(_grid(ctx, scale, zero, q.shape, q.dtype, axis))
    zero = np.broadcast_to(zero, scale.shape)
    grid = _grid(ctx, np.ones_like(scale), zero, q.shape, q.dtype, axis)
    g = grid.granularity
    codes, scale, zero = with_positive_scales(
        q.array(), scale, zero, q.dtype, lambda values: spread_out(values, g, q.shape)
    )
    grid = _grid(ctx, scale, zero, q.shape, q.dtype, axis)
    return ctx.builder.constant(codes, f"{q.name}.turned", q.dtype), without_blocks(grid)


def with_positive_scales(
    codes: Array, scale: Array, zero: Array, storage: DType, spread: Callable[[Array], Array]
) -> tuple[Array, Array, Array]:
    """Return codes, scales and zero points of the same reals with every scale above 0.

    Quantizers write negative scales so that the wider side of a range meets the one code that the
    other side lacks. With m the sum of the least and greatest code, s (q - z) is
    -s ((m - q) - (m - z)). What has the scale 0 is 0.

    Args:
        codes: Integers.
        scale: float32.
        zero: Zero points, of the shape of `scale`.
        storage: What the codes are held in.
        spread: Makes a value per scale broadcast against the codes.
    """
    mirror = storage.min + storage.max
    turned = np.where(spread(scale < 0), mirror - codes.astype(np.int64), codes)
    zero = np.where(scale < 0, mirror - zero.astype(np.int64), zero).astype(np.int32)
    turned = np.where(spread(scale == 0), spread(zero), turned)
    scale = np.where(scale == 0, np.float32(1), np.abs(scale)).astype(np.float32)
    return turned.astype(codes.dtype), scale, zero


_MOVES = frozenset({"transpose", "reshape", "slice", "gather", "expand", "tile", "concat"})


def takes_on(ctx: OpContext, q: Value, qparams: QuantParams) -> bool:
    """Give a plain graph input, and what movement made of it up to q, its quantization.

    Returns:
        Whether that was done: not where something reads its integers as they are.
    """
    moved = _moved_input(ctx, q, qparams)
    graph = ctx.builder.graph
    for v in moved:
        if v.data is None:
            graph.set_type(v, TensorType(v.shape, v.dtype, qparams))
            continue
        held = graph.constant(v.data, ctx.builder.unique(f"{v.name}.quantized"), qparams)
        for node, i in list(v.uses):
            graph.set_input(node, i, held)
    return bool(moved)


def _moved_input(ctx: OpContext, q: Value, qparams: QuantParams) -> list[Value]:
    """Return plain graph inputs, constants beside them, and what movement made of them up to q.

    None where something reads these integers as they are, or has read them already.
    """
    chain: dict[Value, None] = {}
    stack = [q]
    while stack:
        v = stack.pop()
        if v in chain:
            continue
        chain[v] = None
        node = v.producer
        if node is not None:
            if node.op.name not in _MOVES or not qparams.is_per_tensor:
                return []
            stack += node.operands if node.op.name == "concat" else [node.input(0)]
    alone = all(
        v.qparams is None
        and v.dtype is qparams.storage
        and v.name not in ctx.builder.plain
        and all(_moves_on(n, i, chain) for n, i in v.uses)
        for v in chain
    )
    given = any(v.producer is None and not v.is_constant for v in chain)
    return list(chain) if alone and given else []


def _moves_on(node: Node, i: int, chain: Mapping[Value, None]) -> bool:
    """Whether a node moves operand `i` to where a chain leads."""
    return (i == 0 or node.op.name == "concat") and all(v in chain for v in node.outputs)
