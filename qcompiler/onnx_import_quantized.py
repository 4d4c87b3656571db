# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Converters of operators that compute on quantized tensors, ONNX's and ONNX Runtime's.

QLinear operators become the three steps that a QDQ model spells out: dequantize the operands,
compute, quantize the result; the fuse pass makes integer operators of them. ConvInteger and
MatMulInteger are products on grids of scale 1, in parts small enough to be exact in float32.

Source: ONNX operators, opset 10 to 21; ONNX Runtime contrib operators (docs/ContribOperators.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qcompiler.errors import ShapeError, UnsupportedOpError
from qcompiler.ir import Value
from qcompiler.onnx_import_codes import (
    Operand,
    as_float,
    as_integers,
    as_it_is,
    checked,
    constant_dequantized,
    operand,
    shaped,
    zero_of,
)
from qcompiler.onnx_import_context import OpContext, converter, normal_axis, reshape
from qcompiler.onnx_import_ops import average_pool, conv, matmul
from qcompiler.onnx_import_qdq import dequantized, is_static, quantized
from qcompiler.types import (
    Array,
    DType,
    Granularity,
    PerAxis,
    PerTensor,
)

Results = Sequence[Value] | None

_MS = "com.microsoft"
_EXACT = 1 << 24  # float32 holds every integer up to here


def _storage(ctx: OpContext, at: int, like: int) -> DType:
    """Return the dtype of a result: its zero point's, else that of operand `like`."""
    zero_point = ctx.get(at)
    return (zero_point if zero_point is not None else ctx.input(like)).dtype


# ------------------------------------------------------------------------------ QLinear products


@converter("QLinearConv")
def _qlinear_conv(ctx: OpContext) -> Results:
    """Operands: x, its scale and zero point; w, its; scale and zero point of y; int32 bias."""
    if is_static(ctx, 1) and is_static(ctx, 4):
        x, w = dequantized(ctx, ctx.input(0), 1), dequantized(ctx, ctx.input(3), 4, axis=0)
        y = conv(ctx, x, w, _bias(ctx, 8, 1, 4))
    else:
        y = _conv_of(ctx, ctx.input(0), ctx.input(3), 2, 5)
        wide = (-1, *(1,) * (y.type.rank - 2))
        bias, scale = ctx.get(8), ctx.input(4)
        if bias is not None:
            y = ctx.emit("add", y, shaped(ctx, bias, wide))
        y = _scaled_product(ctx, y, ctx.input(1), shaped(ctx, scale, wide), None)
    return [quantized(ctx, y, 6, _storage(ctx, 7, 0))]


def _bias(ctx: OpContext, at: int, x_scale: int, w_scale: int, alpha: float = 1.0) -> Value | None:
    """Return the int32 bias, whose scale is x_scale * w_scale and its zero point 0, as floats."""
    bias = ctx.get(at)
    if bias is None:
        return None
    scale = np.asarray(ctx.static(x_scale, "scale"), np.float64).reshape(()) * np.asarray(
        ctx.static(w_scale, "scale"), np.float64
    ).reshape(-1)
    granularity: Granularity = PerAxis(bias.type.rank - 1)
    if scale.size == 1:
        scale, granularity = scale.reshape(()), PerTensor()
    scale = (scale * alpha).astype(np.float32)
    if not bias.is_constant:
        return ctx.emit("mul", ctx.emit("cast", bias, to="float32"), ctx.constant(scale))
    zero = np.zeros(scale.shape, np.int32)
    return constant_dequantized(ctx, bias, checked(scale, zero, DType.INT32, granularity))


@converter("QLinearMatMul")
def _qlinear_matmul(ctx: OpContext) -> Results:
    """Operands: a, its scale and zero point; b, its; scale and zero point of y."""
    if is_static(ctx, 1) and is_static(ctx, 4):
        a = dequantized(ctx, ctx.input(0), 1, axis=-2)
        b = dequantized(ctx, ctx.input(3), 4, axis=-1)
        y = matmul(ctx, a, b)
    else:
        y = _product_of(ctx, ctx.input(0), ctx.input(3), 2, 5)
        scale = shaped(ctx, ctx.input(1), (-1, 1))
        y = _scaled_product(ctx, y, scale, ctx.input(4), None)
    return [quantized(ctx, y, 6, _storage(ctx, 7, 0))]


@converter("QGemm", domain=_MS)
def _qgemm(ctx: OpContext) -> Results:
    """Operands: a, scale, zero point; b, its; int32 c; scale and zero point of y, if quantized."""
    flipped, turned = bool(ctx.attr("transA", 0)), bool(ctx.attr("transB", 0))
    alpha = float(ctx.attr("alpha", 1.0))
    if is_static(ctx, 1) and is_static(ctx, 4):
        y = _gemm(ctx, flipped, turned, alpha)
    else:
        a, b = (
            ctx.emit("transpose", v, perm=(1, 0)) if t else v
            for v, t in ((ctx.input(0), flipped), (ctx.input(3), turned))
        )
        y, c = _product_of(ctx, a, b, 2, 5), ctx.get(6)
        y = y if c is None else ctx.emit("add", y, c)
        scale = (
            ctx.input(4)
            if alpha == 1.0
            else ctx.emit("mul", ctx.input(4), ctx.scalar(alpha, ctx.input(4)))
        )
        y = _scaled_product(ctx, y, ctx.input(1), scale, None)
    return [y if ctx.get(7) is None else quantized(ctx, y, 7, _storage(ctx, 8, 0))]


def _gemm(ctx: OpContext, flipped: bool, turned: bool, alpha: float) -> Value:
    """Return QGemm's product of scales that are known, plus the bias."""
    a, b = ctx.input(0), ctx.input(3)
    stored = b.is_constant
    left = dequantized(ctx, a, 1)
    right = dequantized(ctx, b, 4, 0 if turned else 1, alpha if stored else 1.0)
    c, columns = _bias(ctx, 6, 1, 4, alpha), right.shape[0 if turned else 1]
    row = None
    if c is not None and c.shape in ((columns,), (1, columns)) and (stored or alpha == 1.0):
        row, c = reshape(ctx, c, (columns,)), None
    y = ctx.emit("matmul", left, right, row, transpose_a=flipped, transpose_b=turned)
    if alpha != 1.0 and not stored:
        y = ctx.emit("mul", y, ctx.scalar(alpha, y))
    return y if c is None else ctx.emit("add", y, c)


# --------------------------------------------------------------------- other QLinear operators


@converter("QLinearAdd", "QLinearMul", domain=_MS)
def _qlinear_binary(ctx: OpContext) -> Results:
    """Operands: a, its scale and zero point; b, its; scale and zero point of the result."""
    op = {"QLinearAdd": "add", "QLinearMul": "mul"}[ctx.proto.op_type]
    a, b = dequantized(ctx, ctx.input(0), 1), dequantized(ctx, ctx.input(3), 4)
    return [quantized(ctx, ctx.emit(op, a, b), 6, _storage(ctx, 7, 0))]


def _qlinear_unary(name: str, compute: Callable[[OpContext, Value], Value]) -> None:
    """Operands: x, its scale and zero point, scale and zero point of the result."""

    def convert(ctx: OpContext) -> Results:
        y = compute(ctx, dequantized(ctx, ctx.input(0), 1))
        return [quantized(ctx, y, 3, _storage(ctx, 4, 0))]

    converter(name, domain=_MS)(convert)


def _channels_first(
    compute: Callable[[OpContext, Value], Value],
) -> Callable[[OpContext, Value], Value]:
    """Turn an operator of channels-first data into one that obeys `channels_last`."""

    def turned(ctx: OpContext, x: Value) -> Value:
        if not ctx.attr("channels_last", 0):
            return compute(ctx, x)
        n = x.type.rank
        x = ctx.emit("transpose", x, perm=(0, n - 1, *range(1, n - 1)))
        return ctx.emit("transpose", compute(ctx, x), perm=(0, *range(2, n), 1))

    return turned


def _global_mean(ctx: OpContext, x: Value) -> Value:
    return ctx.emit("reduce_mean", x, axes=tuple(range(2, x.type.rank)), keepdims=True)


def _softmax(ctx: OpContext, x: Value) -> Value:
    if int(ctx.attr("opset", 13)) < 13:
        raise UnsupportedOpError("its softmax is that of an opset before 13")
    return ctx.emit("softmax", x, axis=ctx.axis(-1, x.type.rank))


_qlinear_unary("QLinearSigmoid", lambda ctx, x: ctx.emit("sigmoid", x))
_qlinear_unary(
    "QLinearLeakyRelu",
    lambda ctx, x: ctx.emit("leaky_relu", x, alpha=float(ctx.attr("alpha", 0.01))),
)
# ONNX Runtime divides by the whole kernel where padding counts, even beyond the padding.
_qlinear_unary(
    "QLinearAveragePool", _channels_first(lambda ctx, x: average_pool(ctx, x, whole=True))
)
_qlinear_unary("QLinearGlobalAveragePool", _channels_first(_global_mean))
_qlinear_unary("QLinearSoftmax", _softmax)


@converter("QLinearConcat", domain=_MS)
def _qlinear_concat(ctx: OpContext) -> Results:
    """Operands: scale and zero point of the result, then tensor, scale, zero point of each."""
    if len(ctx.inputs) < 5 or len(ctx.inputs) % 3 != 2:
        raise ShapeError(f"{len(ctx.inputs)} operands are not a grid and groups of three")
    parts = [dequantized(ctx, ctx.input(i), i + 1) for i in range(2, len(ctx.inputs), 3)]
    axis = normal_axis(int(ctx.attr("axis", 0)), parts[0].type.rank)
    return [quantized(ctx, ctx.emit("concat", *parts, axis=axis), 0, _storage(ctx, 1, 2))]


# ------------------------------------------------------------------- products to int32 results


def _parts(bound: Array, axis: int, what: str) -> list[tuple[int, int]]:
    """Cut the axis that a product sums over into runs whose sums stay exact in float32.

    Args:
        bound: Greatest absolute sum per index of `axis`, and per result along the other axes.
        axis: The axis.
        what: Name for messages.
    """
    runs, start = [], 0
    n = bound.shape[axis]
    per = np.moveaxis(bound, axis, 0).reshape(n, -1)
    total = np.zeros(per.shape[1], np.int64)
    for k in range(n):
        if int(per[k].max()) > _EXACT:
            raise UnsupportedOpError(f"{what} sums more products than are exact in float32")
        if int((total + per[k]).max()) > _EXACT:
            runs.append((start, k))
            start, total = k, np.zeros_like(total)
        total = total + per[k]
    return [*runs, (start, n)]


def _cut(ctx: OpContext, v: Value, axis: int, run: tuple[int, int]) -> Value:
    if run == (0, v.shape[axis]):
        return v
    return ctx.emit("slice", v, starts=(run[0],), ends=(run[1],), axes=(axis,), steps=(1,))


def _matmul_int(ctx: OpContext, a: Operand, b: Operand) -> Value:
    """Return the exact int32 product of two operands."""
    shape, other, rank = a.real.shape, b.real.shape, b.real.type.rank
    depth = shape[-1]
    if rank < 1 or other[-2 if rank > 1 else -1] != depth:
        raise ShapeError(f"cannot multiply {list(shape)} by {list(other)}")
    axis_b = max(rank - 2, 0)
    bound = np.broadcast_to(
        b.spread * a.spread.max(),
        tuple(depth if i == axis_b else d for i, d in enumerate(b.spread.shape)),
    )
    total: Value | None = None
    for run in _parts(bound, axis_b, "its inner axis"):
        left, right = _cut(ctx, a.real, len(shape) - 1, run), _cut(ctx, b.real, axis_b, run)
        part = ctx.emit("cast", matmul(ctx, left, right), to="int32")
        total = part if total is None else ctx.emit("add", total, part)
    if total is None:
        raise ShapeError(f"the product of {list(shape)} and {list(other)} sums nothing")
    return total


def _product_of(ctx: OpContext, a: Value, b: Value, a_at: int, b_at: int) -> Value:
    """Return MatMulInteger's product; zero points computed at run time are taken off afterwards.

    (a - za) (b - zb) = a (b - zb) - za * column sums of (b - zb), all in integers.
    """
    za, right = ctx.get(a_at), operand(ctx, b, b_at, b.type.rank - 1)
    if za is None or za.is_constant:
        return _matmul_int(ctx, operand(ctx, a, a_at, max(a.type.rank - 2, 0)), right)
    y = _matmul_int(ctx, as_it_is(ctx, a), right)
    columns = _column_sums(ctx, b, b_at, right)
    z = ctx.emit("cast", za, to="int32") if za.qparams is None else _int32(ctx, za)
    if z.type.size > 1 and z.type.rank == 1:
        z = reshape(ctx, z, (z.type.size, 1))
    elif z.type.size == 1:
        z = reshape(ctx, z, ())
    off = ctx.emit("mul", z, columns)
    if off.type.rank > y.type.rank:
        off = reshape(ctx, off, off.shape[off.type.rank - y.type.rank :])
    return ctx.emit("sub", y, off)


def _column_sums(ctx: OpContext, b: Value, at: int, right: Operand) -> Value:
    """Return the int32 sums of the columns of a right operand less its zero point."""
    axis, zero = max(b.type.rank - 2, 0), ctx.get(at)
    if b.data is not None and (zero is None or zero.is_constant):
        codes = b.data.astype(np.int64) - zero_of(ctx, b, at, b.type.rank - 1)
        return ctx.constant(codes.sum(axis=axis, keepdims=True).astype(np.int32))
    wide = ctx.emit("cast", right.real, to="int32")
    return ctx.emit("reduce_sum", wide, axes=(axis,), keepdims=True)


def _int32(ctx: OpContext, v: Value) -> Value:
    """Return stored integers of up to 16 bits as int32."""
    return ctx.emit("cast", as_float(ctx, v) if v.qparams is not None else v, to="int32")


@converter("MatMulInteger")
def _matmul_integer(ctx: OpContext) -> Results:
    """Operands: a, b, zero point of a, zero point of b."""
    return [_product_of(ctx, ctx.input(0), ctx.input(1), 2, 3)]


@converter("ConvInteger")
def _conv_integer(ctx: OpContext) -> Results:
    """Operands: x, w, zero point of x, zero point of w."""
    return [_conv_of(ctx, ctx.input(0), ctx.input(1), 2, 3)]


def _conv_of(ctx: OpContext, x: Value, w: Value, x_at: int, w_at: int) -> Value:
    """Return ConvInteger's product; zero points at `x_at` and `w_at` may be computed."""
    zx, zw, right = ctx.get(x_at), ctx.get(w_at), operand(ctx, w, w_at, 0)
    known = w.data is not None and (zw is None or zw.is_constant)
    if zx is None or zx.is_constant or not known:
        return _conv_int(ctx, operand(ctx, x, x_at, 1), right)
    y = _conv_int(ctx, as_it_is(ctx, x), right)
    # Padding counts nothing: what the zero point adds is its product with a convolution of ones.
    ones = ctx.constant(np.ones((1, *x.shape[1:]), np.float32))
    codes = np.asarray(w.data, np.int64) - zero_of(ctx, w, w_at, 0)
    wide = ctx.constant(codes.astype(np.float32))  # what follows from constants is computed here
    shift = ctx.emit("cast", conv(ctx, ones, wide, None), to="int32")
    z = reshape(ctx, _int32(ctx, zx), ())
    return ctx.emit("sub", y, ctx.emit("mul", z, shift))


def _conv_int(ctx: OpContext, x: Operand, w: Operand) -> Value:
    """Return the exact int32 convolution of two operands."""
    group, shape = int(ctx.attr("group", 1)), w.real.shape
    wide = np.broadcast_to(w.spread, shape) * x.spread.max()
    bound = wide.reshape(*shape[:2], -1).sum(axis=2)
    total: Value | None = None
    for run in _parts(bound, 1, "its window"):
        left = _channels(ctx, x.real, group, run)
        part = conv(ctx, left, _cut(ctx, w.real, 1, run), None)
        part = ctx.emit("cast", part, to="int32")
        total = part if total is None else ctx.emit("add", total, part)
    if total is None:
        raise ShapeError(f"a convolution of {list(x.real.shape)} by {list(shape)} sums nothing")
    return total


def _channels(ctx: OpContext, x: Value, group: int, run: tuple[int, int]) -> Value:
    """Cut a run of channels out of every group."""
    n, c, *rest = x.shape
    if group == 1:
        return _cut(ctx, x, 1, run)
    if c % group or run == (0, c // group):
        return x
    apart = _cut(ctx, reshape(ctx, x, (n, group, c // group, *rest)), 2, run)
    return reshape(ctx, apart, (n, group * (run[1] - run[0]), *rest))


# ---------------------------------------------------------------------- dynamic quantization


def _dynamic(ctx: OpContext, x: Value) -> tuple[Value, Value, Value]:
    """Return (uint8 data, float32 scale, zero point as float32) of DynamicQuantizeLinear-11.

    scale = (max(0, max x) - min(0, min x)) / 255; zero point = round(clamp(-min / scale));
    y = clamp(round(x / scale) + zero point).
    """
    axes = tuple(range(x.type.rank))
    zero = ctx.scalar(0.0, x)
    low, high = zero, zero
    if axes:
        low = ctx.emit("min", ctx.emit("reduce_min", x, axes=axes, keepdims=False), zero)
        high = ctx.emit("max", ctx.emit("reduce_max", x, axes=axes, keepdims=False), zero)
    else:
        low, high = ctx.emit("min", x, zero), ctx.emit("max", x, zero)
    scale = ctx.emit("div", ctx.emit("sub", high, low), ctx.scalar(255.0, x))
    # All zero: any scale serves; ONNX Runtime says 1.
    scale = ctx.emit("where", ctx.emit("equal", scale, zero), ctx.scalar(1.0, x), scale)
    point = ctx.emit("div", ctx.emit("neg", low), scale)
    point = ctx.emit("round", ctx.emit("clip", point, min=0.0, max=255.0))
    t = ctx.emit("add", ctx.emit("round", ctx.emit("div", x, scale)), point)
    return as_integers(ctx, t, DType.UINT8), scale, point


@converter("DynamicQuantizeLinear")
def _dynamic_quantize(ctx: OpContext) -> Results:
    y, scale, point = _dynamic(ctx, ctx.input(0))
    return [y, scale, ctx.emit("cast", point, to="uint8")]


@converter("DynamicQuantizeMatMul", domain=_MS)
def _dynamic_matmul(ctx: OpContext) -> Results:
    """Operands: a in floats; b in 8 bits, its scale, its zero point; bias in floats."""
    a, b = ctx.input(0), ctx.input(1)
    q, scale, point = _dynamic(ctx, a)
    right = operand(ctx, b, 3, b.type.rank - 1)
    y = _matmul_int(ctx, as_it_is(ctx, q), right)
    sums = _column_sums(ctx, b, 3, right)
    off = ctx.emit("mul", ctx.emit("cast", point, to="int32"), sums)
    if off.type.rank > y.type.rank:
        off = reshape(ctx, off, off.shape[off.type.rank - y.type.rank :])
    return [_scaled_product(ctx, ctx.emit("sub", y, off), scale, ctx.input(2), ctx.get(4))]


@converter("MatMulIntegerToFloat", domain=_MS)
def _matmul_to_float(ctx: OpContext) -> Results:
    """Operands: a, b, scale of a, scale of b, zero point of a, zero point of b, bias."""
    y = _product_of(ctx, ctx.input(0), ctx.input(1), 4, 5)
    return [_scaled_product(ctx, y, ctx.input(2), ctx.input(3), ctx.get(6))]


def _scaled_product(
    ctx: OpContext, y: Value, a_scale: Value, b_scale: Value, bias: Value | None
) -> Value:
    a_scale, b_scale = (
        ctx.emit("cast", v, to="float32") if v.dtype is not DType.FLOAT32 else v
        for v in (reshape(ctx, v, ()) if v.type.size == 1 else v for v in (a_scale, b_scale))
    )
    out = ctx.emit("mul", ctx.emit("cast", y, to="float32"), ctx.emit("mul", a_scale, b_scale))
    return out if bias is None else ctx.emit("add", out, bias)
