# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Converters of ONNX operators that compute: elementwise, linear, pooling, norms, reductions.

Opset differences are handled where they arise. Source: ONNX operator changelog, opsets 7 to 28.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.errors import ShapeError, UnsupportedOpError
from qcompiler.ir import Value
from qcompiler.onnx_import_codes import as_float
from qcompiler.onnx_import_context import Converter, OpContext, converter, normal_axis, reshape
from qcompiler.onnx_import_tensors import dtype_of
from qcompiler.types import DType

Results = Sequence[Value] | None

# ------------------------------------------------------------------------------- elementwise


def _unary(onnx_op: str, op: str, **defaults: Any) -> Converter:
    def convert(ctx: OpContext) -> Results:
        attrs = {k: type(d)(ctx.attr(k, d)) for k, d in defaults.items()}
        return [ctx.emit(op, ctx.input(0), **attrs)]

    return converter(onnx_op)(convert)


_SAME_NAME = (
    *("Relu", "Sigmoid", "Tanh", "Erf", "Softplus", "Softsign", "Mish", "Sqrt", "Exp", "Log"),
    *("Reciprocal", "Neg", "Abs", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Tan", "Asin"),
    *("Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Not"),
)
for _name in _SAME_NAME:
    _unary(_name, _name.lower())
_unary("IsNaN", "isnan")
_unary("HardSwish", "hard_swish")
_unary("LeakyRelu", "leaky_relu", alpha=0.01)
_unary("HardSigmoid", "hard_sigmoid", alpha=0.2, beta=0.5)
_unary("Elu", "elu", alpha=1.0)
_unary("Celu", "celu", alpha=1.0)
_unary("Selu", "selu", alpha=1.67326319217681884765625, gamma=1.05070102214813232421875)
_unary("ThresholdedRelu", "thresholded_relu", alpha=1.0)
_unary("Gelu", "gelu", approximate="none")


@converter("IsInf")
def _isinf(ctx: OpContext) -> Results:
    return [
        ctx.emit(
            "isinf",
            ctx.input(0),
            detect_negative=bool(ctx.attr("detect_negative", 1)),
            detect_positive=bool(ctx.attr("detect_positive", 1)),
        )
    ]


@converter("Swish")
def _swish(ctx: OpContext) -> Results:
    x, alpha = ctx.input(0), float(ctx.attr("alpha", 1.0))
    if alpha == 1.0:
        return [ctx.emit("silu", x)]
    return [ctx.emit("mul", x, ctx.emit("sigmoid", ctx.emit("mul", x, ctx.scalar(alpha, x))))]


def _bound(value: Any, dtype: DType, lower: bool) -> float | int | None:
    """Return a clip bound, None where it does not restrict the dtype."""
    if value is None:
        return None
    if dtype.is_integer:
        return int(value)
    limit = float(np.finfo(np.float32).max)
    number = float(value)
    if (lower and number <= -limit) or (not lower and number >= limit):
        return None
    return number


@converter("Clip")
def _clip(ctx: OpContext) -> Results:
    x = ctx.input(0)
    if ctx.version < 11:
        lo, hi = ctx.attr("min"), ctx.attr("max")
    else:
        bounds = [ctx.get(1), ctx.get(2)]
        if any(b is not None and not b.is_constant for b in bounds):
            # ONNX: min first, then max, so that max wins where min > max.
            for op, b in zip(("max", "min"), bounds, strict=True):
                x = ctx.emit(op, x, b) if b is not None else x
            return [x]
        lo, hi = (None if b is None else b.array().reshape(-1)[0] for b in bounds)
    low, high = _bound(lo, x.dtype, True), _bound(hi, x.dtype, False)
    if low is None and high is None:
        return [x]
    if low == 0 and high is None:
        return [ctx.emit("relu", x)]
    return [ctx.emit("clip", x, min=low, max=high)]


_BINARY = {
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "div",
    "Equal": "equal",
    "Less": "less",
    "LessOrEqual": "less_or_equal",
    "Greater": "greater",
    "GreaterOrEqual": "greater_or_equal",
    "And": "and",
    "Or": "or",
    "Xor": "xor",
}


@converter(*_BINARY)
def _binary(ctx: OpContext) -> Results:
    return [ctx.emit(_BINARY[ctx.proto.op_type], ctx.input(0), ctx.input(1))]


@converter("Pow")
def _pow(ctx: OpContext) -> Results:
    """The result has the base's dtype; integers are raised in float64, which holds 53 bits."""
    x, by = ctx.input(0), ctx.input(1)
    if x.dtype.is_float:
        return [ctx.emit("pow", x, by if by.dtype is x.dtype else _as(ctx, by, x.dtype))]
    y = ctx.emit("pow", _as(ctx, x, DType.FLOAT64), _as(ctx, by, DType.FLOAT64))
    return [_as(ctx, y, x.dtype)]


def _as(ctx: OpContext, x: Value, dtype: DType) -> Value:
    return ctx.emit("cast", x, to=dtype.value)


@converter("PRelu")
def _prelu(ctx: OpContext) -> Results:
    x, slope = ctx.input(0), ctx.input(1)
    channels = (x.shape[1],) if x.type.rank > 1 else ()
    if slope.shape == channels and x.shape[-1] not in (1, *channels) and slope.type.size > 1:
        # Opset 6 has a slope per channel without saying the axes behind it.
        slope = reshape(ctx, slope, (*channels, *(1,) * (x.type.rank - 2)))
    return [ctx.emit("prelu", x, slope)]


@converter("Mod")
def _mod(ctx: OpContext) -> Results:
    return [ctx.emit("mod", ctx.input(0), ctx.input(1), fmod=int(ctx.attr("fmod", 0)))]


@converter("Sum", "Min", "Max", "Mean")
def _variadic(ctx: OpContext) -> Results:
    op = {"Sum": "add", "Mean": "add", "Min": "min", "Max": "max"}[ctx.proto.op_type]
    y = ctx.input(0)
    for i in range(1, len(ctx.inputs)):
        y = ctx.emit(op, y, ctx.input(i))
    if ctx.proto.op_type == "Mean" and len(ctx.inputs) > 1:
        y = ctx.emit("div", y, ctx.scalar(len(ctx.inputs), y))
    return [y]


@converter("Where")
def _where(ctx: OpContext) -> Results:
    return [ctx.emit("where", ctx.input(0), ctx.input(1), ctx.input(2))]


@converter("Cast")
def _cast(ctx: OpContext) -> Results:
    return _cast_to(ctx, dtype_of(int(ctx.attr("to"))))


@converter("CastLike")
def _cast_like(ctx: OpContext) -> Results:
    return _cast_to(ctx, ctx.input(1).dtype)


def _cast_to(ctx: OpContext, dtype: DType) -> Results:
    x = ctx.input(0)
    if x.dtype is dtype:
        return [x]
    if x.qparams is not None:  # the integers themselves, whatever they stand for
        x = ctx.emit("round", as_float(ctx, x))
    return [x if x.dtype is dtype else ctx.emit("cast", x, to=dtype.value)]


# ------------------------------------------------------------------------------------ linear


def window_pads(
    ctx: OpContext,
    extents: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[int, ...]:
    """Return explicit pads (begins, then ends) of a window, with `auto_pad` resolved.

    SAME: output = ceil(input / stride); an odd total puts the extra cell at the end (UPPER) or at
    the beginning (LOWER).
    """
    n = len(extents)
    mode = ctx.attr("auto_pad", "NOTSET") or "NOTSET"
    if mode == "NOTSET":
        return tuple(int(p) for p in ctx.attr("pads") or [0] * (2 * n))
    if mode == "VALID":
        return (0,) * (2 * n)
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise UnsupportedOpError(f"auto_pad {mode!r} is not defined by ONNX")
    small, large = [], []
    for extent, k, s, d in zip(extents, kernel, strides, dilations, strict=True):
        total = max((-(-extent // s) - 1) * s + (k - 1) * d + 1 - extent, 0)
        small.append(total // 2)
        large.append(total - total // 2)
    return tuple(small + large) if mode == "SAME_UPPER" else tuple(large + small)


def _per_axis(ctx: OpContext, name: str, n: int) -> tuple[int, ...]:
    value = tuple(int(v) for v in ctx.attr(name) or [1] * n)
    if len(value) != n:
        raise ShapeError(f"{name} {list(value)} should have {n} entries, one per spatial axis")
    return value


def _kernel_of(ctx: OpContext, x: Value, w: Value) -> tuple[int, ...]:
    """Return the spatial extents of a weight, checked against operand and `kernel_shape`."""
    if x.type.rank < 3 or w.type.rank != x.type.rank:
        raise ShapeError(
            f"data of shape {list(x.shape)} and weight of shape {list(w.shape)} should have the"
            " same rank, 3 or more"
        )
    kernel = w.shape[2:]
    declared = ctx.attr("kernel_shape")
    if declared and tuple(declared) != kernel:
        raise ShapeError(f"kernel_shape {list(declared)} differs from the weight's {list(kernel)}")
    return kernel


@converter("Conv")
def _conv(ctx: OpContext) -> Results:
    return [conv(ctx, ctx.input(0), ctx.input(1), ctx.get(2))]


def conv(ctx: OpContext, x: Value, w: Value, bias: Value | None) -> Value:
    """Emit a convolution with the attributes of the node."""
    kernel = _kernel_of(ctx, x, w)
    n = len(kernel)
    strides, dilations = _per_axis(ctx, "strides", n), _per_axis(ctx, "dilations", n)
    pads = window_pads(ctx, x.shape[2:], kernel, strides, dilations)
    return ctx.emit(
        "conv",
        x,
        w,
        bias,
        strides=strides,
        pads=pads,
        dilations=dilations,
        group=int(ctx.attr("group", 1)),
    )


@converter("ConvTranspose")
def _conv_transpose(ctx: OpContext) -> Results:
    x, w = ctx.input(0), ctx.input(1)
    kernel = _kernel_of(ctx, x, w)
    n = len(kernel)
    strides, dilations = _per_axis(ctx, "strides", n), _per_axis(ctx, "dilations", n)
    extra = tuple(int(v) for v in ctx.attr("output_padding") or [0] * n)
    mode = ctx.attr("auto_pad", "NOTSET") or "NOTSET"
    wanted = ctx.attr("output_shape")
    if wanted:
        wanted = [int(v) for v in wanted][-n:]
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [e * s for e, s in zip(x.shape[2:], strides, strict=True)]
    if wanted:
        begins, ends, more = [], [], list(extra)
        for i in range(n):
            full = strides[i] * (x.shape[2 + i] - 1) + extra[i] + (kernel[i] - 1) * dilations[i] + 1
            total = full - wanted[i]
            if total < 0:  # the wish is larger than what the kernel covers: pad the output
                more[i], total = more[i] - total, 0
            half = total // 2
            begins.append(half if mode == "SAME_UPPER" else total - half)
            ends.append(total - half if mode == "SAME_UPPER" else half)
        pads, extra = tuple(begins + ends), tuple(more)
    elif mode == "VALID":
        pads = (0,) * (2 * n)
    else:
        pads = tuple(int(p) for p in ctx.attr("pads") or [0] * (2 * n))
    return [
        ctx.emit(
            "conv_transpose",
            x,
            w,
            ctx.get(2),
            strides=strides,
            pads=pads,
            dilations=dilations,
            group=int(ctx.attr("group", 1)),
            output_padding=extra,
        )
    ]


@converter("MatMul")
def _matmul(ctx: OpContext) -> Results:
    return [matmul(ctx, ctx.input(0), ctx.input(1))]


def matmul(ctx: OpContext, a: Value, b: Value) -> Value:
    """Emit a matrix product with numpy's meaning; vectors become matrices and back."""
    if a.type.rank == 0 or b.type.rank == 0:
        raise ShapeError("the operands of a matrix product need at least one axis")
    vector_a, vector_b = a.type.rank == 1, b.type.rank == 1
    if vector_a:
        a = reshape(ctx, a, (1, *a.shape))
    if vector_b:
        b = reshape(ctx, b, (*b.shape, 1))
    y = ctx.emit("matmul", a, b)
    shape = list(y.shape)
    if vector_b:
        del shape[-1]
    if vector_a:
        del shape[-1 if vector_b else -2]
    return reshape(ctx, y, shape)


def scaled(ctx: OpContext, x: Value, factor: float) -> Value:
    """Emit a product with a number, or nothing where it is 1."""
    return x if factor == 1.0 else ctx.emit("mul", x, ctx.scalar(factor, x))


@converter("Gemm")
def _gemm(ctx: OpContext) -> Results:
    """Fold alpha and beta of alpha * A' B' + beta * C into constants; one row C is the bias."""
    a, b, c = ctx.input(0), ctx.input(1), ctx.get(2)
    if a.type.rank != 2 or b.type.rank != 2:
        raise ShapeError(f"operands {list(a.shape)} and {list(b.shape)} should be matrices")
    alpha, beta = float(ctx.attr("alpha", 1.0)), float(ctx.attr("beta", 1.0))
    turn = {
        "transpose_a": bool(ctx.attr("transA", 0)),
        "transpose_b": bool(ctx.attr("transB", 0)),
    }
    if a.is_constant and not b.is_constant:
        a = scaled(ctx, a, alpha)
    else:
        b = scaled(ctx, b, alpha) if b.is_constant else b
    after = 1.0 if a.is_constant or b.is_constant else alpha
    if c is not None and beta == 0.0:
        c = None
    if c is None:
        return [scaled(ctx, ctx.emit("matmul", a, b, **turn), after)]
    n = b.shape[0] if turn["transpose_b"] else b.shape[1]
    row = c.type.size in (1, n) and (c.type.rank == 0 or c.type.size == c.shape[-1])
    c = scaled(ctx, c, beta)
    if row and after == 1.0 and (c.is_constant or c.type.size == n):
        bias = reshape(ctx, c, (c.type.size,))
        bias = bias if bias.shape == (n,) else ctx.emit("expand", bias, shape=(n,))
        return [ctx.emit("matmul", a, b, bias, **turn)]
    return [ctx.emit("add", scaled(ctx, ctx.emit("matmul", a, b, **turn), after), c)]


# ------------------------------------------------------------------------------------ pooling


def _pool_attrs(ctx: OpContext, x: Value) -> dict[str, Any]:
    if x.type.rank < 3:
        raise ShapeError(f"data of shape {list(x.shape)} should have rank 3 or more")
    n = x.type.rank - 2
    kernel = tuple(int(k) for k in ctx.attr("kernel_shape") or ())
    if len(kernel) != n:
        raise ShapeError(f"kernel_shape {list(kernel)} should have {n} entries")
    strides, dilations = _per_axis(ctx, "strides", n), _per_axis(ctx, "dilations", n)
    return {
        "kernel": kernel,
        "strides": strides,
        "dilations": dilations,
        "pads": window_pads(ctx, x.shape[2:], kernel, strides, dilations),
        "ceil_mode": bool(ctx.attr("ceil_mode", 0)),
    }


def _without_ceil(x: Value, attrs: dict[str, Any]) -> dict[str, Any]:
    """Return equal attributes without ceil_mode where more padding at the end says the same.

    The window that hangs over the end sees elements that do not count, as padding does; runtimes
    disagree about corner cases of ceil_mode, and none about padding.
    """
    n = len(attrs["kernel"])
    pads, ends = attrs["pads"], []
    for i, (extent, k, s, d) in enumerate(
        zip(x.shape[2:], attrs["kernel"], attrs["strides"], attrs["dilations"], strict=True)
    ):
        reach = d * (k - 1) + 1
        room = extent + pads[i] + pads[n + i] - reach
        count = -(-room // s) + 1
        if (count - 1) * s >= extent + pads[i]:  # ONNX: a window must not start in the end padding
            count -= 1
        end = pads[n + i] + max(0, (count - 1) * s - room)
        if room < 0 or (extent + pads[i] + end - reach) // s + 1 != count or end >= k:
            return attrs
        ends.append(end)
    return {**attrs, "pads": (*pads[:n], *ends), "ceil_mode": False}


@converter("MaxPool")
def _max_pool(ctx: OpContext) -> Results:
    if any(ctx.wanted[1:]):
        return None
    x = ctx.input(0)
    attrs = _pool_attrs(ctx, x)
    if attrs["ceil_mode"]:
        attrs = _without_ceil(x, attrs)
    return [ctx.emit("max_pool", x, **attrs)]


@converter("AveragePool")
def _average_pool(ctx: OpContext) -> Results:
    return [average_pool(ctx, ctx.input(0))]


def average_pool(ctx: OpContext, x: Value, *, whole: bool = False) -> Value:
    """Emit an average pooling with the attributes of the node.

    Args:
        ctx: The node.
        x: Its data.
        whole: Where padding counts, a window that hangs over its end counts as a whole one.
    """
    attrs = _pool_attrs(ctx, x)
    attrs["count_include_pad"] = bool(ctx.attr("count_include_pad", 0))
    if attrs["ceil_mode"] and (whole or not attrs["count_include_pad"]):
        attrs = _without_ceil(x, attrs)
    return ctx.emit("average_pool", x, **attrs)


@converter("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(ctx: OpContext) -> Results:
    x = ctx.input(0)
    if x.type.rank < 3:
        raise ShapeError(f"data of shape {list(x.shape)} should have rank 3 or more")
    op = "reduce_mean" if ctx.proto.op_type == "GlobalAveragePool" else "reduce_max"
    return [ctx.emit(op, x, axes=tuple(range(2, x.type.rank)), keepdims=True)]


# --------------------------------------------------------------------------------- reductions

_REDUCE = {
    "ReduceMean": "reduce_mean",
    "ReduceSum": "reduce_sum",
    "ReduceMax": "reduce_max",
    "ReduceMin": "reduce_min",
    "ReduceProd": "reduce_prod",
    "ReduceL1": "reduce_l1",
    "ReduceL2": "reduce_l2",
    "ReduceSumSquare": "reduce_sum_square",
    "ReduceLogSum": "reduce_log_sum",
    "ReduceLogSumExp": "reduce_log_sum_exp",
}
_KEEPS_ELEMENTS = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"})


@converter(*_REDUCE)
def _reduce(ctx: OpContext) -> Results:
    x = ctx.input(0)
    axes = ctx.ints(1, "axes")
    if not axes:
        if ctx.attr("noop_with_empty_axes", 0):
            return [x] if ctx.proto.op_type in _KEEPS_ELEMENTS else None
        axes = tuple(range(x.type.rank))
    keepdims = bool(ctx.attr("keepdims", 1))
    if not axes:
        return [x] if ctx.proto.op_type in _KEEPS_ELEMENTS else None
    normal = tuple(sorted({normal_axis(a, x.type.rank) for a in axes}))
    op = _REDUCE[ctx.proto.op_type]
    if x.dtype is DType.BOOL and op in ("reduce_max", "reduce_min"):
        y = ctx.emit(op, ctx.emit("cast", x, to="uint8"), axes=normal, keepdims=keepdims)
        return [ctx.emit("cast", y, to="bool")]
    return [ctx.emit(op, x, axes=normal, keepdims=keepdims)]


@converter("ArgMax", "ArgMin")
def _arg(ctx: OpContext) -> Results:
    x = ctx.input(0)
    return [
        ctx.emit(
            ctx.proto.op_type.lower(),
            x,
            axis=ctx.axis(0, x.type.rank),
            keepdims=bool(ctx.attr("keepdims", 1)),
            select_last_index=bool(ctx.attr("select_last_index", 0)),
        )
    ]
