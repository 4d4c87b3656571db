# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Integers of a model as numbers: on the grids that they come with, or on one of scale 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompiler.errors import ModelError, UnsupportedOpError, UsageError
from qcompiler.ir import Value
from qcompiler.numerics import expanded
from qcompiler.onnx_import_context import OpContext, reshape
from qcompiler.types import (
    Array,
    DType,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    QuantParams,
    TensorType,
)


def checked(
    scale: Array, zero_point: Array, storage: DType, granularity: Granularity
) -> QuantParams:
    """Return parameters that use the whole range of the storage.

    Raises:
        ModelError: A scale or zero point that no quantization can have.
    """
    try:
        return QuantParams(scale, zero_point, storage, storage.min, storage.max, granularity)
    except UsageError as error:
        raise ModelError(f"its quantization is not valid: {error.message}") from None


def constant_dequantized(ctx: OpContext, q: Value, qparams: QuantParams) -> Value:
    """Emit the dequantize of a constant that gets the parameters into its type."""
    name = ctx.builder.unique(f"{q.name}.quantized")
    stored = ctx.builder.graph.constant(q.array(), name, qparams)
    return ctx.builder.emit("dequantize", [stored], {}, ctx.name)[0]


def unit_grid(storage: DType, zero_point: int) -> QuantParams:
    """Return the parameters under which an integer q stands for q - zero_point."""
    one, zero = np.asarray(1, np.float32), np.asarray(zero_point, np.int32)
    return checked(one, zero, storage, PerTensor())


def as_integers(ctx: OpContext, x: Value, storage: DType) -> Value:
    """Round and clamp floats to integers, held on the grid of scale 1 that integer kernels take."""
    grid = unit_grid(storage, 0)
    return ctx.builder.emit(
        "quantize", [x], {}, ctx.name, types=[TensorType(x.shape, storage, grid)]
    )[0]


def as_float(ctx: OpContext, q: Value) -> Value:
    """Return stored integers as float32, whatever they stand for."""
    if q.qparams is None:
        return ctx.emit("cast", q, to="float32")
    return affine(ctx, q, unit_grid(q.dtype, 0))


def affine(ctx: OpContext, q: Value, qparams: QuantParams) -> Value:
    """Dequantize integers that carry other parameters, or none, by their numbers."""
    g, inner = qparams.granularity, q.shape
    scale, zero = expanded(qparams, q.shape)
    if isinstance(g, PerGroup) and q.shape[g.axis] % g.group_size == 0:
        # Blocks become an axis of their own, so that the scales need not be repeated.
        blocks = q.shape[g.axis] // g.group_size
        inner = (*q.shape[: g.axis], blocks, g.group_size, *q.shape[g.axis + 1 :])
        scale, zero = (np.expand_dims(v, g.axis + 1) for v in (qparams.scale, qparams.zero_point))
    if q.qparams is not None:
        if q.qparams.same_grid(qparams):
            return ctx.builder.emit("dequantize", [q], {}, ctx.name)[0]
        if not q.qparams.is_per_tensor:
            raise UnsupportedOpError("its operand is quantized with other parameters")
        # q = x / s + z with the operand's own s and z, then s' * (q - z').
        x = ctx.builder.emit("dequantize", [q], {}, ctx.name)[0]
        own = q.qparams
        factor = scale.astype(np.float64) / own.s
        shift = (own.z - zero) * scale.astype(np.float64)
        y = ctx.emit("mul", reshape(ctx, x, inner), ctx.constant(factor.astype(np.float32)))
        y = ctx.emit("add", y, ctx.constant(shift.astype(np.float32)))
        return reshape(ctx, y, q.shape)
    wide = reshape(ctx, ctx.emit("cast", q, to="int32"), inner)
    wide = ctx.emit("sub", wide, ctx.constant(zero.astype(np.int32)))
    y = ctx.emit("mul", ctx.emit("cast", wide, to="float32"), ctx.constant(scale))
    return reshape(ctx, y, q.shape)


def shaped(ctx: OpContext, v: Value, wide: tuple[int, ...]) -> Value:
    """Return a vector in the shape that broadcasts along the right axis; -1 is its extent."""
    if v.type.rank != 1:
        return v
    return reshape(ctx, v, tuple(v.type.size if d < 0 else d for d in wide))


def _spread(v: Value, zero: Array) -> Array:
    """Return the greatest |q - zero point| of an operand: per element if constant, else overall."""
    if v.data is not None:
        return np.abs(v.data.astype(np.int64) - zero)
    span = max(
        abs(int(v.dtype.min) - int(zero.max())),
        abs(int(v.dtype.max) - int(zero.min())),
        abs(int(v.dtype.min) - int(zero.min())),
        abs(int(v.dtype.max) - int(zero.max())),
    )
    return np.full((1,) * max(v.type.rank, 1), span, np.int64)


def zero_of(ctx: OpContext, v: Value, at: int, axis: int) -> Array:
    """Return a constant zero point, laid out to broadcast against its operand along `axis`."""
    if ctx.get(at) is None:
        return np.zeros((1,) * v.type.rank, np.int64)
    zero = np.asarray(ctx.static(at, "zero point"), np.int64)
    if zero.size == 1:
        return zero.reshape((1,) * v.type.rank)
    if zero.ndim != 1:
        return zero
    shape = [1] * v.type.rank
    shape[axis] = -1
    return zero.reshape(shape)


def on_grid(ctx: OpContext, v: Value, zero: Array) -> Value:
    """Return v - zero as float32, through a quantized value of scale 1 where that exists."""
    if v.data is not None and v.qparams is None:
        if zero.size == 1 or max(zero.shape) == zero.size:
            granularity: Granularity = PerTensor()
            flat: Array = zero.reshape(-1).astype(np.int32)
            if flat.size > 1:
                granularity = PerAxis(zero.shape.index(flat.size))
            else:
                flat = flat.reshape(())
            ones = np.ones(flat.shape, np.float32)
            return constant_dequantized(ctx, v, checked(ones, flat, v.dtype, granularity))
        return ctx.constant((v.data - zero).astype(np.float32))
    if zero.size == 1:
        grid = unit_grid(v.dtype, int(zero.reshape(())))
        if v.producer is None and v.qparams is None and not v.uses:
            ctx.builder.graph.set_type(v, TensorType(v.shape, v.dtype, grid))
        if v.qparams is not None and v.qparams.same_grid(grid):
            return ctx.builder.emit("dequantize", [v], {}, ctx.name)[0]
        made = v.producer
        if v.qparams is not None and made is not None and made.op.name == "quantize":
            # The same codes on the grid of scale 1: x / s is what the other grid rounds, too.
            own = v.qparams
            ranges = (own.qmin, own.qmax), (grid.qmin, grid.qmax)
            if own.is_per_tensor and own.z == grid.z and ranges[0] == ranges[1]:
                whole = ctx.emit("div", made.input(0), ctx.constant(own.scale))
                types = [TensorType(v.shape, v.dtype, grid)]
                held = ctx.builder.emit("quantize", [whole], {}, ctx.name, types=types)[0]
                return ctx.builder.emit("dequantize", [held], {}, ctx.name)[0]
        if v.dtype.bits <= 16:
            # Quantizing computed numbers by the grid of scale 1 gives them back.
            real = ctx.emit("sub", as_float(ctx, v), ctx.constant(zero.astype(np.float32)))
            types = [TensorType(v.shape, v.dtype, grid)]
            held = ctx.builder.emit("quantize", [real], {}, ctx.name, types=types)[0]
            return ctx.builder.emit("dequantize", [held], {}, ctx.name)[0]
    return ctx.emit("sub", as_float(ctx, v), ctx.constant(zero.astype(np.float32)))


@dataclass(frozen=True, slots=True)
class Operand:
    """One side of an integer product.

    Attributes:
        real: q - zero point as float32, behind a dequantize of scale 1.
        spread: Greatest absolute values; they broadcast against `real`.
    """

    real: Value
    spread: Array


def operand(ctx: OpContext, v: Value, at: int, axis: int) -> Operand:
    """Return an operand less the zero point that operand `at` holds, which may be computed.

    Codes less a computed zero point are integers of 16 bits around zero.
    """
    z = ctx.get(at)
    if z is None or z.is_constant:
        zero = zero_of(ctx, v, at, axis)
        return Operand(on_grid(ctx, v, zero), _spread(v, zero))
    shape = tuple(-1 if i == axis else 1 for i in range(v.type.rank))
    real = less(ctx, v, shaped(ctx, as_float(ctx, z), shape))
    span = v.dtype.max - v.dtype.min
    return Operand(real, np.full((1,) * max(v.type.rank, 1), span, np.int64))


def less(ctx: OpContext, v: Value, zero: Value) -> Value:
    """Return 8-bit codes less zero points in floats, through integers of 16 bits."""
    codes = as_integers(ctx, ctx.emit("sub", as_float(ctx, v), zero), DType.INT16)
    return ctx.builder.emit("dequantize", [codes], {}, ctx.name)[0]


def as_it_is(ctx: OpContext, v: Value) -> Operand:
    """Return an operand around the zero point 0, whatever it has."""
    zero = np.zeros((1,) * v.type.rank, np.int64)
    return Operand(on_grid(ctx, v, zero), _spread(v, zero))
