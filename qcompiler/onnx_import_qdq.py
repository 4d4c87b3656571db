# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Converters of quantized operators: scale and zero point move into the type.

QLinearConv and QLinearMatMul become the same three steps that a QDQ model spells out: dequantize
the operands, compute, quantize the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompiler.errors import ModelError, ShapeError, UnsupportedOpError, UsageError
from qcompiler.ir import Value
from qcompiler.onnx_import_context import OpContext, converter, normal_axis
from qcompiler.onnx_import_ops import conv, matmul
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


def _qparams(ctx: OpContext, at: int, shape: Shape, storage: DType, axis: int = 1) -> QuantParams:
    """Return the parameters from operands `at` (scale) and `at + 1` (zero point).

    Source: ONNX QuantizeLinear-21: a scalar is one scale, a vector one per index of `axis`,
    a tensor of the operand's rank one per block along `axis` (granularity PerGroup here).
    """
    scale = np.asarray(ctx.static(at, "scale"), np.float32)
    zero_point: Array = np.zeros(scale.shape, np.int32)
    if ctx.get(at + 1) is not None:
        zero_point = np.asarray(ctx.static(at + 1, "zero point"), np.int32)
    if zero_point.size not in (1, scale.size):
        raise ShapeError(f"{scale.size} scales and {zero_point.size} zero points do not fit")
    if zero_point.size == scale.size:
        zero_point = zero_point.reshape(scale.shape)
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
    return _checked(scale, zero_point, storage, granularity)


def _checked(
    scale: Array, zero_point: Array, storage: DType, granularity: Granularity
) -> QuantParams:
    try:
        return QuantParams(scale, zero_point, storage, storage.min, storage.max, granularity)
    except UsageError as error:
        raise ModelError(f"its quantization is not valid: {error.message}") from None


def _blocked(ctx: OpContext, shape: Shape, scale: Array, axis: int) -> Granularity:
    blocks = scale.shape[axis] if scale.ndim == len(shape) else 0
    size = int(ctx.attr("block_size", 0)) or (-(-shape[axis] // blocks) if blocks else 0)
    want = (*shape[:axis], -(-shape[axis] // size) if size else 0, *shape[axis + 1 :])
    if scale.shape != want:
        raise ShapeError(
            f"scales {list(scale.shape)} do not fit blocks along axis {axis} of {list(shape)}"
        )
    return PerGroup(axis, size)


@converter("QuantizeLinear")
def _quantize(ctx: OpContext) -> Results:
    zero_point = ctx.get(2)
    if zero_point is not None:
        storage = zero_point.dtype
    else:
        declared = int(ctx.attr("output_dtype", 0))
        storage = dtype_of(declared) if declared else DType.UINT8
    return [_quantized(ctx, ctx.input(0), 1, storage, int(ctx.attr("axis", 1)))]


def _quantized(ctx: OpContext, x: Value, at: int, storage: DType, axis: int = 1) -> Value:
    """Emit a quantize with the parameters from operands `at` and `at + 1`."""
    if not storage.is_integer:
        raise UnsupportedOpError(f"quantization to {storage.value} is not supported")
    if x.dtype is not DType.FLOAT32:
        x = ctx.emit("cast", x, to="float32")
    result = TensorType(x.shape, storage, _qparams(ctx, at, x.shape, storage, axis))
    return ctx.builder.emit("quantize", [x], {}, ctx.name, types=[result])[0]


@converter("DequantizeLinear")
def _dequantize(ctx: OpContext) -> Results:
    q, want = ctx.input(0), ctx.input(1).dtype
    y = _dequantized(ctx, q, 1, int(ctx.attr("axis", 1)))
    return [y if want is DType.FLOAT32 else ctx.emit("cast", y, to=want.value)]


def _dequantized(ctx: OpContext, q: Value, at: int, axis: int = 1) -> Value:
    """Emit a dequantize with the parameters from operands `at` and `at + 1`."""
    if not q.dtype.is_integer:
        raise UnsupportedOpError(f"dequantization of {q.dtype.value} is not supported")
    qparams = _qparams(ctx, at, q.shape, q.dtype, axis)
    if q.data is not None and q.qparams is None:
        return _constant(ctx, q, qparams)
    if q.producer is None and q.qparams is None and not q.uses:
        # A quantized graph input: its type takes the parameters.
        ctx.builder.graph.set_type(q, TensorType(q.shape, q.dtype, qparams))
    if q.qparams is not None and q.qparams.same_grid(qparams):
        return ctx.builder.emit("dequantize", [q], {}, ctx.name)[0]
    return _affine(ctx, q, qparams)


def _constant(ctx: OpContext, q: Value, qparams: QuantParams) -> Value:
    """Emit the dequantize of a constant that gets the parameters into its type."""
    name = ctx.builder.unique(f"{q.name}.quantized")
    stored = ctx.builder.graph.constant(q.array(), name, qparams)
    return ctx.builder.emit("dequantize", [stored], {}, ctx.name)[0]


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


@converter("QLinearConv")
def _qlinear_conv(ctx: OpContext) -> Results:
    """Operands: x, its scale and zero point; w, its; scale and zero point of y; int32 bias."""
    x, w = _dequantized(ctx, ctx.input(0), 1), _dequantized(ctx, ctx.input(3), 4, axis=0)
    bias = ctx.get(8)
    if bias is not None:
        # ONNX: the bias has scale x_scale * w_scale and no zero point.
        scale = np.asarray(ctx.static(1, "scale"), np.float64).reshape(()) * np.asarray(
            ctx.static(4, "scale"), np.float64
        ).reshape(-1)
        granularity: Granularity = PerAxis(0)
        if scale.size == 1:
            scale, granularity = scale.reshape(()), PerTensor()
        zero = np.zeros(scale.shape, np.int32)
        qparams = _checked(scale.astype(np.float32), zero, DType.INT32, granularity)
        if not bias.is_constant:
            raise UnsupportedOpError("its bias is computed at run time; it must be a constant")
        bias = _constant(ctx, bias, qparams)
    y = conv(ctx, x, w, bias)
    return [_quantized(ctx, y, 6, ctx.input(7).dtype)]


@converter("QLinearMatMul")
def _qlinear_matmul(ctx: OpContext) -> Results:
    """Operands: a, its scale and zero point; b, its; scale and zero point of y."""
    a = _dequantized(ctx, ctx.input(0), 1, axis=-2)
    b = _dequantized(ctx, ctx.input(3), 4, axis=-1)
    return [_quantized(ctx, matmul(ctx, a, b), 6, ctx.input(7).dtype)]
