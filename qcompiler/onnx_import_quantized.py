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
from qcompiler.onnx_import_context import OpContext, converter, normal_axis, reshape
from qcompiler.onnx_import_ops import average_pool, conv, matmul
from qcompiler.onnx_import_qdq import (
    as_float,
    as_integers,
    checked,
    constant_dequantized,
    dequantized,
    quantized,
    unit_grid,
)
from qcompiler.types import (
    Array,
    DType,
    Granularity,
    PerAxis,
    PerTensor,
    TensorType,
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
    x, w = dequantized(ctx, ctx.input(0), 1), dequantized(ctx, ctx.input(3), 4, axis=0)
    bias = _bias(ctx, 8, 1, 4)
    y = conv(ctx, x, w, bias)
    return [quantized(ctx, y, 6, _storage(ctx, 7, 0))]


def _bias(ctx: OpContext, at: int, x_scale: int, w_scale: int, alpha: float = 1.0) -> Value | None:
    """Return the int32 bias, whose scale is x_scale * w_scale and its zero point 0, as floats."""
    bias = ctx.get(at)
    if bias is None:
        return None
    if not bias.is_constant:
        raise UnsupportedOpError("its bias is computed at run time; it must be a constant")
    scale = np.asarray(ctx.static(x_scale, "scale"), np.float64).reshape(()) * np.asarray(
        ctx.static(w_scale, "scale"), np.float64
    ).reshape(-1)
    granularity: Granularity = PerAxis(bias.type.rank - 1)
    if scale.size == 1:
        scale, granularity = scale.reshape(()), PerTensor()
    zero = np.zeros(scale.shape, np.int32)
    qparams = checked((scale * alpha).astype(np.float32), zero, DType.INT32, granularity)
    return constant_dequantized(ctx, bias, qparams)


@converter("QLinearMatMul")
def _qlinear_matmul(ctx: OpContext) -> Results:
    """Operands: a, its scale and zero point; b, its; scale and zero point of y."""
    a = dequantized(ctx, ctx.input(0), 1, axis=-2)
    b = dequantized(ctx, ctx.input(3), 4, axis=-1)
    return [quantized(ctx, matmul(ctx, a, b), 6, _storage(ctx, 7, 0))]


@converter("QGemm", domain=_MS)
def _qgemm(ctx: OpContext) -> Results:
    """Operands: a, scale, zero point; b, its; int32 c; scale and zero point of y, if quantized."""
    turned = bool(ctx.attr("transB", 0))
    alpha = float(ctx.attr("alpha", 1.0))
    a = dequantized(ctx, ctx.input(0), 1)
    stored = ctx.input(3).is_constant
    b = dequantized(ctx, ctx.input(3), 4, 0 if turned else 1, alpha if stored else 1.0)
    if alpha != 1.0 and not stored:
        a = ctx.emit("mul", a, ctx.scalar(alpha, a))
    c = _bias(ctx, 6, 1, 4, alpha)
    columns = b.shape[0 if turned else 1]
    row = c is not None and c.shape in ((columns,), (1, columns))
    y = ctx.emit(
        "matmul",
        a,
        b,
        reshape(ctx, c, (columns,)) if row and c is not None else None,
        transpose_a=bool(ctx.attr("transA", 0)),
        transpose_b=turned,
    )
    if c is not None and not row:
        y = ctx.emit("add", y, c)
    return [y if ctx.get(7) is None else quantized(ctx, y, 7, _storage(ctx, 8, 0))]


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


def _zero_of(ctx: OpContext, v: Value, at: int, axis: int) -> Array:
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


def _on_grid(ctx: OpContext, v: Value, zero: Array) -> Value:
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
            if (
                own.is_per_tensor
                and own.z == grid.z
                and (own.qmin, own.qmax)
                == (
                    grid.qmin,
                    grid.qmax,
                )
            ):
                whole = ctx.emit("div", made.input(0), ctx.constant(own.scale))
                types = [TensorType(v.shape, v.dtype, grid)]
                held = ctx.builder.emit("quantize", [whole], {}, ctx.name, types=types)[0]
                return ctx.builder.emit("dequantize", [held], {}, ctx.name)[0]
        if v.qparams is None and v.dtype.bits == 8:
            # A computed tensor: quantizing its numbers by the grid of scale 1 gives them back.
            real = ctx.emit("sub", as_float(ctx, v), ctx.constant(zero.astype(np.float32)))
            types = [TensorType(v.shape, v.dtype, grid)]
            held = ctx.builder.emit("quantize", [real], {}, ctx.name, types=types)[0]
            return ctx.builder.emit("dequantize", [held], {}, ctx.name)[0]
    return ctx.emit("sub", as_float(ctx, v), ctx.constant(zero.astype(np.float32)))


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


def _matmul_int(ctx: OpContext, a: Value, b: Value, a_zero: Array, b_zero: Array) -> Value:
    """Return the exact int32 product of (a - a_zero) and (b - b_zero)."""
    depth = a.shape[-1]
    if b.type.rank < 1 or b.shape[-2 if b.type.rank > 1 else -1] != depth:
        raise ShapeError(f"cannot multiply {list(a.shape)} by {list(b.shape)}")
    axis_b = max(b.type.rank - 2, 0)
    wide_a = _spread(a, a_zero).max()
    wide_b = _spread(b, b_zero)
    bound = np.broadcast_to(
        wide_b * wide_a,
        tuple(depth if i == axis_b else d for i, d in enumerate(wide_b.shape)),
    )
    fa, fb = _on_grid(ctx, a, a_zero), _on_grid(ctx, b, b_zero)
    total: Value | None = None
    for run in _parts(bound, axis_b, "its inner axis"):
        part = matmul(ctx, _cut(ctx, fa, a.type.rank - 1, run), _cut(ctx, fb, axis_b, run))
        part = ctx.emit("cast", part, to="int32")
        total = part if total is None else ctx.emit("add", total, part)
    if total is None:
        raise ShapeError(f"the product of {list(a.shape)} and {list(b.shape)} sums nothing")
    return total


def _product_of(ctx: OpContext, a: Value, b: Value, a_at: int, b_at: int) -> Value:
    """Return MatMulInteger's product; zero points computed at run time are taken off afterwards.

    (a - za) (b - zb) = a (b - zb) - za * column sums of (b - zb), all in integers.
    """
    za = ctx.get(a_at)
    b_zero = ctx.get(b_at)
    if b_zero is not None and not b_zero.is_constant:
        raise UnsupportedOpError("the zero point of its second operand is computed at run time")
    zb = _zero_of(ctx, b, b_at, b.type.rank - 1)
    if za is None or za.is_constant:
        return _matmul_int(ctx, a, b, _zero_of(ctx, a, a_at, max(a.type.rank - 2, 0)), zb)
    y = _matmul_int(ctx, a, b, np.zeros((1,) * a.type.rank, np.int64), zb)
    if b.data is not None:
        sums = (b.data.astype(np.int64) - zb).sum(axis=max(b.type.rank - 2, 0), keepdims=True)
        columns = ctx.constant(sums.astype(np.int32))
    else:
        wide = ctx.emit("sub", _int32(ctx, b), ctx.constant(zb.astype(np.int32)))
        columns = ctx.emit("reduce_sum", wide, axes=(max(b.type.rank - 2, 0),), keepdims=True)
    z = ctx.emit("cast", za, to="int32") if za.qparams is None else _int32(ctx, za)
    if z.type.size > 1 and z.type.rank == 1:
        z = reshape(ctx, z, (z.type.size, 1))
    elif z.type.size == 1:
        z = reshape(ctx, z, ())
    off = ctx.emit("mul", z, columns)
    if off.type.rank > y.type.rank:
        off = reshape(ctx, off, off.shape[off.type.rank - y.type.rank :])
    return ctx.emit("sub", y, off)


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
    x, w, zx = ctx.input(0), ctx.input(1), ctx.get(2)
    w_zero = ctx.get(3)
    if w_zero is not None and not w_zero.is_constant:
        raise UnsupportedOpError("the zero point of its weights is computed at run time")
    zw = _zero_of(ctx, w, 3, 0)
    known = zx is None or zx.is_constant
    x_zero = _zero_of(ctx, x, 2, 1) if known else np.zeros((1,) * x.type.rank, np.int64)
    y = _conv_int(ctx, x, w, x_zero, zw)
    if known or zx is None:
        return [y]
    # Padding counts nothing: what the zero point adds is its product with a convolution of ones.
    ones = ctx.constant(np.ones((1, *x.shape[1:]), np.float32))
    wide = _on_grid(ctx, w, zw)
    if w.data is not None:  # plain numbers: what follows from constants is computed here
        wide = ctx.constant((w.data.astype(np.int64) - zw).astype(np.float32))
    shift = ctx.emit("cast", conv(ctx, ones, wide, None), to="int32")
    z = reshape(ctx, _int32(ctx, zx), ())
    return [ctx.emit("sub", y, ctx.emit("mul", z, shift))]


def _conv_int(ctx: OpContext, x: Value, w: Value, x_zero: Array, w_zero: Array) -> Value:
    """Return the exact int32 convolution of x - x_zero with w - w_zero."""
    group = int(ctx.attr("group", 1))
    wide = np.broadcast_to(_spread(w, w_zero), w.shape) * _spread(x, x_zero).max()
    bound = wide.reshape(*w.shape[:2], -1).sum(axis=2)
    runs = _parts(bound, 1, "its window")
    if len(runs) > 1 and group > 1:
        raise UnsupportedOpError("its groups sum more products than are exact in float32")
    fx, fw = _on_grid(ctx, x, x_zero), _on_grid(ctx, w, w_zero)
    total: Value | None = None
    for run in runs:
        part = conv(ctx, _cut(ctx, fx, 1, run) if group == 1 else fx, _cut(ctx, fw, 1, run), None)
        part = ctx.emit("cast", part, to="int32")
        total = part if total is None else ctx.emit("add", total, part)
    if total is None:
        raise ShapeError(f"a convolution of {list(x.shape)} by {list(w.shape)} sums nothing")
    return total


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
    zb = _zero_of(ctx, b, 3, b.type.rank - 1)
    if b.data is None:
        raise UnsupportedOpError("its second operand is computed at run time")
    y = _matmul_int(ctx, q, b, np.zeros((1,) * a.type.rank, np.int64), zb)
    sums = (b.data.astype(np.int64) - zb).sum(axis=-2, keepdims=True)
    off = ctx.emit("mul", ctx.emit("cast", point, to="int32"), ctx.constant(sums.astype(np.int32)))
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
    a_scale = reshape(ctx, a_scale, ()) if a_scale.type.size == 1 else a_scale
    b_scale = reshape(ctx, b_scale, ()) if b_scale.type.size == 1 else b_scale
    out = ctx.emit("mul", ctx.emit("cast", y, to="float32"), ctx.emit("mul", a_scale, b_scale))
    return out if bias is None else ctx.emit("add", out, bias)
