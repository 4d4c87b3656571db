# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Integer operators; `numerics` defines what they compute.

Result types are declared: their quantization decides the rounding, and its clamp range [qmin,
qmax] is the fused activation. A result without quantization is float32 where the operator allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler import numerics, numerics_grouped
from qcompiler.ops import _infer as c
from qcompiler.ops._base import (
    INTEGER_ONLY,
    REQUIRED,
    Attrs,
    EvalContext,
    OpDef,
    OpKind,
    register,
)
from qcompiler.ops.cast import operand_qparams
from qcompiler.ops.linear import (
    CONV_ATTRS,
    channels_first,
    check_residual,
    conv_geometry,
    conv_shape,
    matmul_columns,
    matmul_shape,
    optional_array,
    swapped,
    to_layout,
)
from qcompiler.ops.movement import pool_shape
from qcompiler.ops.reduce import POOL_ATTRS
from qcompiler.types import Array, DType, PerGroup, QuantParams, Shape, TensorType

Arrays = Sequence["Array | None"]


def _float(shape: Shape) -> tuple[TensorType, ...]:
    """Return the type of a result whose quantization is not declared yet."""
    return (TensorType(shape, DType.FLOAT32),)


def _operand(name: str, types: c.Types, i: int, operand: str) -> TensorType:
    """Return the type of an operand that must be quantized with one scale, 16 bits or less."""
    t = c.given(name, types, i, operand)
    c.quantized_per_tensor(name, t, operand)
    if t.dtype.bits > 16:
        raise c.fail(name, f"operand {operand!r} is {t}, expected 16 bits or less")
    return t


def _bias(name: str, types: c.Types, columns: int) -> None:
    bias = c.optional(types, 2)
    if bias is None:
        return
    if bias.dtype is not DType.INT32:
        raise c.fail(name, f"operand 'bias' is {bias}, expected int32")
    c.has_shape(name, bias, (columns,), "bias")


def _weights(name: str, types: c.Types, operand: str, columns: int, summed: int) -> None:
    """Check the weights: one scale, one per index of `columns`, or one per group along `summed`.

    With groups the bias is in float32, else in the accumulator's integers.
    """
    w = c.given(name, types, 1, operand)
    q = c.quantized(name, w, operand)
    bias = c.optional(types, 2)
    if not isinstance(q.granularity, PerGroup):
        c.quantized_weight(name, w, operand, columns)
        _bias(name, types, w.shape[columns])
        return
    if q.granularity.axis != summed or w.shape[summed] % q.granularity.group_size:
        raise c.fail(
            name, f"operand {operand!r} has {q.granularity} scales, expected groups along {summed}"
        )
    if not q.is_symmetric and name == "qconv":
        raise c.fail(name, f"operand {operand!r} has groups with zero points, expected none")
    if bias is not None:
        if bias.dtype is not DType.FLOAT32 or bias.qparams is not None:
            raise c.fail(name, f"operand 'bias' is {bias}, expected float32 beside groups")
        c.has_shape(name, bias, (w.shape[columns],), "bias")


def _register(name: str, inputs: tuple[str, ...], infer: Any, evaluate: Any, **row: Any) -> None:
    register(
        OpDef(name, inputs, infer, evaluate, stages=INTEGER_ONLY, declared=True, **row),
    )


def _residual(
    name: str, arrays: Arrays, ctx: EvalContext, target: QuantParams | None
) -> numerics.Residual | None:
    r = optional_array(arrays, 3)
    if r is None:
        return None
    if target is None:
        raise c.fail(name, "a float32 result takes no residual")
    return numerics.Residual(r, operand_qparams(name, ctx, 3))


# -------------------------------------------------------------------------------- qconv


def _qconv_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _operand("qconv", types, 0, "x")
    w = c.given("qconv", types, 1, "w")
    c.quantized("qconv", w, "w")
    shape = conv_shape("qconv", x, w, attrs)
    _weights("qconv", types, "w", 0, 1)
    q = c.quantized("qconv", w, "w")
    if isinstance(q.granularity, PerGroup) and attrs["group"] != 1:
        raise c.fail("qconv", "operand 'w' has scales in groups, expected group 1")
    if check_residual("qconv", types, 3, shape) is not None:
        _operand("qconv", types, 3, "residual")
    return _float(shape)


def _qconv(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x, w = np.asarray(arrays[0]), np.asarray(arrays[1])
    xq, wq = operand_qparams("qconv", ctx, 0), operand_qparams("qconv", ctx, 1)
    layout, group = str(attrs["layout"]), attrs["group"]
    target = ctx.outputs[0].qparams
    if isinstance(wq.granularity, PerGroup):
        return (_grouped_conv(x, w, arrays, attrs, ctx),)
    acc = numerics.accumulate_conv(
        channels_first(x, layout),
        w,
        xq.z,
        wq.zero_point,
        conv_geometry("qconv", x.shape, w.shape, attrs),
        int(group),  # type: ignore[arg-type]
        optional_array(arrays, 2),
    )
    scale = np.float64(xq.s) * wq.scale.astype(np.float64)
    if layout == "NCHW":
        scale = scale.reshape(-1, *(1,) * (w.ndim - 2))
    y = numerics.requantize(
        to_layout(acc, layout), scale, target, residual=_residual("qconv", arrays, ctx, target)
    )
    return (y,)


def _grouped_conv(x: Array, w: Array, arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> Array:
    """The convolution of weights with scales in groups of input channels."""
    xq, wq = operand_qparams("qconv", ctx, 0), operand_qparams("qconv", ctx, 1)
    target, layout = ctx.outputs[0].qparams, str(attrs["layout"])
    geometry = conv_geometry("qconv", x.shape, w.shape, attrs)
    parts = numerics_grouped.conv_parts(channels_first(x, layout), w, xq.z, wq.scale, geometry)
    residual = _residual("qconv", arrays, ctx, target)
    if residual is not None and layout == "NCHW":
        residual = numerics.Residual(np.moveaxis(residual.q, 1, -1), residual.qparams)
    y = numerics_grouped.grouped_result(
        parts, xq.s, target, bias=optional_array(arrays, 2), residual=residual
    )
    return y if layout == "NHWC" else np.ascontiguousarray(np.moveaxis(y, -1, 1))


_register(
    "qconv",
    ("x", "w", "bias?", "residual?"),
    _qconv_infer,
    _qconv,
    attrs=CONV_ATTRS,
    kind=OpKind.COMPUTE,
)


# ------------------------------------------------------------------------------ qmatmul


def _columns_axis(b: TensorType, attrs: Attrs) -> int:
    return b.rank - 2 if attrs["transpose_b"] else b.rank - 1


def _qmatmul_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    a = _operand("qmatmul", types, 0, "a")
    b = c.given("qmatmul", types, 1, "b")
    c.quantized("qmatmul", b, "b")
    shape = matmul_shape("qmatmul", a, b, attrs)
    q = c.quantized("qmatmul", b, "b")
    if isinstance(q.granularity, PerGroup):
        if b.rank != 2 or attrs["transpose_b"]:
            raise c.fail("qmatmul", f"operand 'b' is {b}, expected a matrix, not transposed")
        _weights("qmatmul", types, "b", 1, 0)
    else:
        c.quantized_weight("qmatmul", b, "b", _columns_axis(b, attrs) if b.rank > 1 else -1)
        _bias("qmatmul", types, matmul_columns(b, attrs))
    if check_residual("qmatmul", types, 3, shape) is not None:
        _operand("qmatmul", types, 3, "residual")
    return _float(shape)


def _qmatmul(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    aq, bq = operand_qparams("qmatmul", ctx, 0), operand_qparams("qmatmul", ctx, 1)
    a = swapped(np.asarray(arrays[0]), attrs["transpose_a"])
    b = swapped(np.asarray(arrays[1]), attrs["transpose_b"])
    target = ctx.outputs[0].qparams
    if isinstance(bq.granularity, PerGroup):
        y = numerics_grouped.grouped_result(
            numerics_grouped.matmul_parts(a, b, aq.z, bq.scale, bq.zero_point),
            aq.s,
            target,
            bias=optional_array(arrays, 2),
            residual=_residual("qmatmul", arrays, ctx, target),
        )
        return (y,)
    # One zero point per column, or one in all: both broadcast against [..., K, N].
    acc = numerics.accumulate_matmul(a, b, aq.z, bq.zero_point, optional_array(arrays, 2))
    scale = np.float64(aq.s) * bq.scale.astype(np.float64)
    y = numerics.requantize(
        acc.reshape(ctx.outputs[0].shape),
        scale,
        target,
        residual=_residual("qmatmul", arrays, ctx, target),
    )
    return (y,)


_register(
    "qmatmul",
    ("a", "b", "bias?", "residual?"),
    _qmatmul_infer,
    _qmatmul,
    attrs={"transpose_a": False, "transpose_b": False},
    kind=OpKind.COMPUTE,
)


# --------------------------------------------------------------------- qadd, qsub, qmul


def _binary(name: str) -> None:
    def infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
        a, b = _operand(name, types, 0, "a"), _operand(name, types, 1, "b")
        return _float(c.broadcast(name, a.shape, b.shape))

    def evaluate(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
        a, b = np.asarray(arrays[0]), np.asarray(arrays[1])
        aq, bq = operand_qparams(name, ctx, 0), operand_qparams(name, ctx, 1)
        target = ctx.outputs[0].qparams
        if name == "qmul":
            return (numerics.mul(a, aq, b, bq, target),)
        return (numerics.add(a, aq, b, bq, target, subtract=name == "qsub"),)

    _register(name, ("a", "b"), infer, evaluate, kind=OpKind.BINARY)


for _name in ("qadd", "qsub", "qmul"):
    _binary(_name)


# -------------------------------------------------------------------------------- table


def _table_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = c.given("table", types, 0, "x")
    c.quantized("table", x, "x")
    entries = c.given("table", types, 1, "entries")
    if x.dtype not in (DType.INT8, DType.UINT8):
        raise c.fail("table", f"operand 'x' is {x}, expected 8-bit integers")
    c.has_shape("table", entries, (256,), "entries")
    return (TensorType(x.shape, entries.dtype, entries.qparams),)


def _table(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    return (numerics.lookup(np.asarray(arrays[0]), np.asarray(arrays[1])),)


_register("table", ("x", "entries"), _table_infer, _table, kind=OpKind.UNARY)


# --------------------------------------------------------------------- pooling and means


def _qaverage_pool_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _operand("qaverage_pool", types, 0, "x")
    return _float(pool_shape("qaverage_pool", x, attrs))


def _qaverage_pool(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0])
    layout = str(attrs["layout"])
    kernel: Any = attrs["kernel"]
    g = c.geometry("qaverage_pool", attrs, c.spatial(x.shape, layout), tuple(kernel))
    y = numerics.average_pool(
        channels_first(x, layout),
        operand_qparams("qaverage_pool", ctx, 0),
        g,
        ctx.outputs[0].qparams,
        count_include_pad=bool(attrs["count_include_pad"]),
    )
    return (to_layout(y, layout),)


_register(
    "qaverage_pool",
    ("x",),
    _qaverage_pool_infer,
    _qaverage_pool,
    attrs=POOL_ATTRS,
    kind=OpKind.REDUCE,
)


def _qreduce_mean_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _operand("qreduce_mean", types, 0, "x")
    return _float(c.reduced("qreduce_mean", x.shape, attrs["axes"], attrs["keepdims"]))


def _qreduce_mean(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0])
    y = numerics.reduce_mean(
        x,
        operand_qparams("qreduce_mean", ctx, 0),
        c.axes_of("qreduce_mean", attrs["axes"], x.ndim),
        ctx.outputs[0].qparams,
        keepdims=bool(attrs["keepdims"]),
    )
    return (y,)


_register(
    "qreduce_mean",
    ("x",),
    _qreduce_mean_infer,
    _qreduce_mean,
    attrs={"axes": REQUIRED, "keepdims": True},
    kind=OpKind.REDUCE,
)


# ------------------------------------------------------------------------ softmax and norm


def _qsoftmax_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = c.given("qsoftmax", types, 0, "x")
    if x.dtype is not DType.FLOAT32 and (x.qparams is None or x.dtype.bits > 8):
        raise c.fail("qsoftmax", f"operand 'x' is {x}, expected float32 or 8-bit quantized values")
    c.axis_of("qsoftmax", attrs["axis"], x.rank)
    return _float(x.shape)


def _qsoftmax(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    axis: Any = attrs["axis"]
    t = ctx.inputs[0]
    q = None if t is None else t.qparams
    return (numerics.softmax(np.asarray(arrays[0]), q, int(axis), ctx.outputs[0].qparams),)


_register("qsoftmax", ("x",), _qsoftmax_infer, _qsoftmax, attrs={"axis": -1}, kind=OpKind.NORM)


def _qlayer_norm_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    name = "qlayer_norm"
    x = _operand(name, types, 0, "x")
    if x.rank < 1:
        raise c.fail(name, f"operand 'x' is {x}, expected rank 1 or more")
    for i, operand in ((1, "scale"), (2, "bias")):
        t = c.floating(name, c.given(name, types, i, operand), operand)
        c.has_shape(name, t, (x.shape[-1],), operand)
    return _float(x.shape)


def _qlayer_norm(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    epsilon: Any = attrs["epsilon"]
    y = numerics.layer_norm(
        np.asarray(arrays[0]),
        operand_qparams("qlayer_norm", ctx, 0),
        np.asarray(arrays[1]),
        np.asarray(arrays[2]),
        float(epsilon),
        ctx.outputs[0].qparams,
    )
    return (y,)


_register(
    "qlayer_norm",
    ("x", "scale", "bias"),
    _qlayer_norm_infer,
    _qlayer_norm,
    attrs={"epsilon": 1e-5},
    kind=OpKind.NORM,
)
