# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Converters of normalizations, softmax, and the fused operators of ONNX Runtime's exports.

Source: ONNX operator changelog, opsets 7 to 28; ONNX Runtime contrib operators
(docs/ContribOperators.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcompiler.errors import ShapeError, UnsupportedOpError
from qcompiler.ir import Value
from qcompiler.onnx_import_context import OpContext, converter, normal_axis, reshape
from qcompiler.onnx_import_ops import scaled

Results = Sequence[Value] | None

# -------------------------------------------------------------------------------------- norms


@converter("BatchNormalization")
def _batch_norm(ctx: OpContext) -> Results:
    if ctx.attr("training_mode", 0) or any(ctx.wanted[1:]):
        raise UnsupportedOpError("it is in training mode; export the model for inference")
    operands = [ctx.input(i) for i in range(5)]
    epsilon = float(ctx.attr("epsilon", 1e-5))
    if ctx.version < 9 and not ctx.attr("spatial", 1):
        x, scale, bias, mean, var = operands
        std = ctx.emit("sqrt", ctx.emit("add", var, ctx.scalar(epsilon, var)))
        y = ctx.emit("div", ctx.emit("sub", x, mean), std)
        return [ctx.emit("add", ctx.emit("mul", y, scale), bias)]
    return [ctx.emit("batch_norm", *operands, epsilon=epsilon)]


@converter("InstanceNormalization")
def _instance_norm(ctx: OpContext) -> Results:
    epsilon = float(ctx.attr("epsilon", 1e-5))
    return [ctx.emit("instance_norm", ctx.input(0), ctx.input(1), ctx.input(2), epsilon=epsilon)]


@converter("GroupNormalization")
def _group_norm(ctx: OpContext) -> Results:
    """Normalise each group as one row; scale and bias follow per channel (per group: opset 18)."""
    x, scale, bias = ctx.input(0), ctx.input(1), ctx.input(2)
    groups = int(ctx.attr("num_groups"))
    if x.type.rank < 3 or groups < 1 or x.shape[1] % groups:
        raise ShapeError(f"{list(x.shape)} does not split into {groups} groups of channels")
    rows = reshape(ctx, x, (x.shape[0], groups, x.type.size // (x.shape[0] * groups)))
    epsilon = float(ctx.attr("epsilon", 1e-5))
    y = reshape(ctx, ctx.emit("layer_norm", rows, axis=2, epsilon=epsilon), x.shape)

    def per_channel(v: Value) -> Value:
        if v.type.size == groups and ctx.version < 21:
            wide = ctx.emit(
                "expand", reshape(ctx, v, (groups, 1)), shape=(groups, x.shape[1] // groups)
            )
            v = reshape(ctx, wide, (x.shape[1],))
        return reshape(ctx, v, (x.shape[1], *(1,) * (x.type.rank - 2)))

    return [ctx.emit("add", ctx.emit("mul", y, per_channel(scale)), per_channel(bias))]


@converter("MeanVarianceNormalization")
def _mean_variance_norm(ctx: OpContext) -> Results:
    x = ctx.input(0)
    axes = tuple(normal_axis(int(a), x.type.rank) for a in ctx.attr("axes") or (0, 2, 3))
    centered = ctx.emit("sub", x, ctx.emit("reduce_mean", x, axes=axes, keepdims=True))
    square = ctx.emit("mul", centered, centered)
    variance = ctx.emit("reduce_mean", square, axes=axes, keepdims=True)
    # Source: the function body of MeanVarianceNormalization-13.
    spread = ctx.emit("add", ctx.emit("sqrt", variance), ctx.scalar(1e-9, x))
    return [ctx.emit("div", centered, spread)]


@converter("LpNormalization")
def _lp_norm(ctx: OpContext) -> Results:
    x = ctx.input(0)
    axes = (ctx.axis(-1, x.type.rank),)
    op = "reduce_l1" if int(ctx.attr("p", 2)) == 1 else "reduce_l2"
    norm = ctx.emit(op, x, axes=axes, keepdims=True)
    # Where the norm is 0 the result is 0, not a quotient of zeros.
    safe = ctx.emit("where", ctx.emit("equal", norm, ctx.scalar(0, x)), ctx.scalar(1, x), norm)
    return [ctx.emit("div", x, safe)]


@converter("LayerNormalization")
def _layer_norm(ctx: OpContext) -> Results:
    if any(ctx.wanted[1:]):
        return None
    x = ctx.input(0)
    axis = ctx.axis(-1, x.type.rank)
    return [layer_norm(ctx, x, ctx.get(1), ctx.get(2), axis, float(ctx.attr("epsilon", 1e-5)))]


def layer_norm(
    ctx: OpContext, x: Value, scale: Value | None, bias: Value | None, axis: int, epsilon: float
) -> Value:
    """Emit layer_norm; scale and bias that only broadcast to the normalised shape stay outside."""
    shape = x.shape[axis:]

    def fits(v: Value | None) -> bool:
        return v is None or v.shape == shape

    def wide(v: Value | None) -> Value | None:
        if v is None or v.shape == shape or not v.is_constant or v.type.rank > len(shape):
            return v
        return ctx.emit("expand", v, shape=shape)

    scale, bias = wide(scale), wide(bias)
    if fits(scale) and fits(bias):
        return ctx.emit("layer_norm", x, scale, bias, axis=axis, epsilon=epsilon)
    y = ctx.emit("layer_norm", x, axis=axis, epsilon=epsilon)
    y = ctx.emit("mul", y, scale) if scale is not None else y
    return ctx.emit("add", y, bias) if bias is not None else y


@converter("Softmax", "LogSoftmax")
def _softmax(ctx: OpContext) -> Results:
    x = ctx.input(0)
    op = "softmax" if ctx.proto.op_type == "Softmax" else "log_softmax"
    if ctx.version >= 13:
        return [ctx.emit(op, x, axis=ctx.axis(-1, x.type.rank))]
    # Before opset 13 the operand counts as a matrix: axes before `axis` times axes from `axis`.
    raw = int(ctx.attr("axis", 1))
    axis = x.type.rank if raw == x.type.rank else normal_axis(raw, x.type.rank)
    if axis < x.type.rank and math.prod(x.shape[axis + 1 :]) == 1:
        return [ctx.emit(op, x, axis=axis)]
    flat = (math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return [reshape(ctx, ctx.emit(op, reshape(ctx, x, flat), axis=1), x.shape)]


# ----------------------------------------------------- fused operators of ONNX Runtime exports

_MS = "com.microsoft"


@converter("Gelu", "BiasGelu", "FastGelu", domain=_MS)
def _ms_gelu(ctx: OpContext) -> Results:
    x, bias = ctx.input(0), ctx.get(1)
    x = ctx.emit("add", x, bias) if bias is not None else x
    fast = ctx.proto.op_type == "FastGelu"
    return [ctx.emit("gelu", x, approximate="tanh" if fast else "none")]


@converter("QuickGelu", domain=_MS)
def _ms_quick_gelu(ctx: OpContext) -> Results:
    x = ctx.input(0)
    alpha = float(ctx.attr("alpha", 1.702))
    return [ctx.emit("mul", x, ctx.emit("sigmoid", scaled(ctx, x, alpha)))]


@converter("SkipLayerNormalization", domain=_MS)
def _ms_skip_layer_norm(ctx: OpContext) -> Results:
    if any(ctx.wanted[1:3]):
        return None
    total = ctx.emit("add", ctx.input(0), ctx.input(1))
    bias = ctx.get(4)
    total = ctx.emit("add", total, bias) if bias is not None else total
    epsilon = float(ctx.attr("epsilon", 1e-12))
    y = layer_norm(ctx, total, ctx.input(2), ctx.get(3), total.type.rank - 1, epsilon)
    return [y, y, y, total][: max(1, len(ctx.wanted))]


@converter("FusedMatMul", domain=_MS)
def _ms_matmul(ctx: OpContext) -> Results:
    a, b = ctx.input(0), ctx.input(1)
    if (
        ctx.attr("transBatchA", 0)
        or ctx.attr("transBatchB", 0)
        or min(a.type.rank, b.type.rank) < 2
    ):
        return None
    y = ctx.emit(
        "matmul",
        a,
        b,
        transpose_a=bool(ctx.attr("transA", 0)),
        transpose_b=bool(ctx.attr("transB", 0)),
    )
    return [scaled(ctx, y, float(ctx.attr("alpha", 1.0)))]
