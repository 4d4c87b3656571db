# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Converters of QuantizeLinear and DequantizeLinear: scale and zero point move into the type."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompiler.errors import ModelError, ShapeError, UnsupportedOpError, UsageError
from qcompiler.ir import Value
from qcompiler.onnx_import_context import OpContext, converter, normal_axis
from qcompiler.onnx_import_tensors import dtype_of
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

Results = Sequence[Value] | None


def _qparams(ctx: OpContext, x: Value, storage: DType) -> QuantParams:
    """Return the parameters from operands 1 and 2.

    Source: ONNX QuantizeLinear-21: a scalar is one scale, a vector one per index of `axis`,
    a tensor of x's rank one per block along `axis` (granularity PerGroup here).
    """
    scale = np.asarray(ctx.static(1, "scale"), np.float32)
    zero_point: Array = np.zeros(scale.shape, np.int32)
    if ctx.get(2) is not None:
        zero_point = np.asarray(ctx.static(2, "zero point"), np.int32)
    if zero_point.size != scale.size:
        raise ShapeError(f"{scale.size} scales and {zero_point.size} zero points do not fit")
    zero_point = zero_point.reshape(scale.shape)
    granularity: Granularity = PerTensor()
    if scale.size == 1:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    else:
        axis = normal_axis(int(ctx.attr("axis", 1)), x.type.rank)
        if scale.ndim == 1:
            granularity = PerAxis(axis)
            if scale.size != x.shape[axis]:
                raise ShapeError(f"{scale.size} scales do not fit axis {axis} of {list(x.shape)}")
        else:
            granularity = _blocked(ctx, x, scale, axis)
    try:
        return QuantParams(scale, zero_point, storage, storage.min, storage.max, granularity)
    except UsageError as error:
        raise ModelError(f"its quantization is not valid: {error.message}") from None


def _blocked(ctx: OpContext, x: Value, scale: Array, axis: int) -> Granularity:
    blocks = scale.shape[axis] if scale.ndim == x.type.rank else 0
    size = int(ctx.attr("block_size", 0)) or (-(-x.shape[axis] // blocks) if blocks else 0)
    want = (*x.shape[:axis], -(-x.shape[axis] // size) if size else 0, *x.shape[axis + 1 :])
    if scale.shape != want:
        raise ShapeError(
            f"scales {list(scale.shape)} do not fit blocks along axis {axis} of {list(x.shape)}"
        )
    return PerGroup(axis, size)


@converter("QuantizeLinear")
def _quantize(ctx: OpContext) -> Results:
    x, zero_point = ctx.input(0), ctx.get(2)
    if zero_point is not None:
        storage = zero_point.dtype
    else:
        declared = int(ctx.attr("output_dtype", 0))
        storage = dtype_of(declared) if declared else DType.UINT8
    if not storage.is_integer:
        raise UnsupportedOpError(f"quantization to {storage.value} is not supported")
    if x.dtype is not DType.FLOAT32:
        x = ctx.emit("cast", x, to="float32")
    result = TensorType(x.shape, storage, _qparams(ctx, x, storage))
    return ctx.builder.emit("quantize", [x], {}, ctx.name, types=[result])


@converter("DequantizeLinear")
def _dequantize(ctx: OpContext) -> Results:
    q, want = ctx.input(0), ctx.input(1).dtype
    if not q.dtype.is_integer:
        raise UnsupportedOpError(f"dequantization of {q.dtype.value} is not supported")
    qparams = _qparams(ctx, q, q.dtype)
    if q.data is not None and q.qparams is None:
        q = _constant(ctx, q, qparams)
    elif q.producer is None and q.qparams is None and not q.uses:
        # A quantized graph input: its type takes the parameters.
        ctx.builder.graph.set_type(q, TensorType(q.shape, q.dtype, qparams))
    if q.qparams is not None and q.qparams.same_grid(qparams):
        (y,) = ctx.builder.emit("dequantize", [q], {}, ctx.name)
    else:
        y = _affine(ctx, q, qparams)
    return [y if want is DType.FLOAT32 else ctx.emit("cast", y, to=want.value)]


def _constant(ctx: OpContext, q: Value, qparams: QuantParams) -> Value:
    """Return the constant with the parameters in its type; ready for a dequantize."""
    name = ctx.builder.unique(f"{q.name}.quantized")
    return ctx.builder.graph.constant(q.array(), name, qparams)


def _affine(ctx: OpContext, q: Value, qparams: QuantParams) -> Value:
    """Dequantize integers that carry other parameters, or none, by their numbers."""
    if isinstance(qparams.granularity, PerGroup):
        raise UnsupportedOpError("blocked dequantization of a computed tensor is not supported")
    if isinstance(qparams.granularity, PerAxis):
        shape = [1] * q.type.rank
        shape[qparams.granularity.axis] = -1
    else:
        shape = []
    scale, zero = qparams.scale.reshape(shape), qparams.zero_point.reshape(shape)
    if q.qparams is not None:
        if not q.qparams.is_per_tensor:
            raise UnsupportedOpError("its operand is quantized with other parameters")
        # q = x / s + z with the operand's own s and z, then s' * (q - z').
        x = ctx.builder.emit("dequantize", [q], {}, ctx.name)[0]
        own = q.qparams
        factor = scale.astype(np.float64) / own.s
        shift = (own.z - zero) * scale.astype(np.float64)
        y = ctx.emit("mul", x, ctx.constant(factor.astype(np.float32)))
        return ctx.emit("add", y, ctx.constant(shift.astype(np.float32)))
    wide = ctx.emit("sub", ctx.emit("cast", q, to="int32"), ctx.constant(zero.astype(np.int32)))
    return ctx.emit("mul", ctx.emit("cast", wide, to="float32"), ctx.constant(scale))
