# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Pooling, reductions, softmax and normalizations on floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qcompiler.ops import _infer as c
from qcompiler.ops._base import (
    REQUIRED,
    Attrs,
    EvalContext,
    OpDef,
    OpKind,
    register,
)
from qcompiler.ops.linear import channels_first, optional_array, to_layout
from qcompiler.ops.movement import pool_shape
from qcompiler.types import Array, DType, TensorType
from qcompiler.windows import counts, padded, taps

Arrays = Sequence["Array | None"]
ReduceFn = Callable[[Array, "tuple[int, ...]", bool], Array]

POOL_ATTRS = {
    "kernel": REQUIRED,
    "strides": REQUIRED,
    "pads": REQUIRED,
    "dilations": REQUIRED,
    "ceil_mode": False,
    "count_include_pad": False,
    "layout": "NCHW",
}


# ---------------------------------------------------------------------------------- pooling


def _average_pool_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = c.floating("average_pool", c.given("average_pool", types, 0, "x"), "x")
    return (x.with_shape(pool_shape("average_pool", x, attrs)),)


def _average_pool(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0])
    layout = str(attrs["layout"])
    kernel: Any = attrs["kernel"]
    g = c.geometry("average_pool", attrs, c.spatial(x.shape, layout), tuple(kernel))
    total: Array | None = None
    for _, view in taps(padded(channels_first(x, layout), g, 0), g):
        total = view.copy() if total is None else np.add(total, view, out=total)
    count = counts(g, include_pad=bool(attrs["count_include_pad"])).astype(x.dtype)
    with np.errstate(all="ignore"):  # a window of padding only: 0 / 0, as in ONNX Runtime
        y = np.asarray(total) / count
    return (to_layout(y, layout),)


register(
    OpDef(
        "average_pool",
        ("x",),
        _average_pool_infer,
        _average_pool,
        POOL_ATTRS,
        kind=OpKind.REDUCE,
    )
)


# ------------------------------------------------------------------------------- reductions


def _reduce_type(name: str, types: c.Types, attrs: Attrs) -> TensorType:
    x = c.given(name, types, 0, "x")
    if name in ("reduce_max", "reduce_min") and x.qparams is not None:
        c.quantized_per_tensor(name, x, "x")  # keeps order, so the integers reduce alike
    elif name in ("reduce_max", "reduce_min"):
        c.plain(name, x, "x")
    else:
        c.numeric(name, x, "x")
    return x.with_shape(c.reduced(name, x.shape, attrs["axes"], attrs["keepdims"]))


def _reduction(name: str, fn: ReduceFn) -> None:
    def infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
        return (_reduce_type(name, types, attrs),)

    def evaluate(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
        x = np.asarray(arrays[0])
        axes = c.axes_of(name, attrs["axes"], x.ndim)
        with np.errstate(all="ignore"):  # ONNX defines NaN and infinity as results
            y = np.asarray(fn(x, axes, bool(attrs["keepdims"])))
        return (y.astype(x.dtype, copy=False),)

    register(
        OpDef(
            name,
            ("x",),
            infer,
            evaluate,
            {"axes": REQUIRED, "keepdims": True},
            kind=OpKind.REDUCE,
        )
    )


def _mean(x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    if x.dtype.kind == "f":
        return np.asarray(np.mean(x, axis=axes, keepdims=keepdims, dtype=x.dtype))
    count = math.prod(x.shape[a] for a in axes)
    total = np.asarray(np.sum(x, axis=axes, keepdims=keepdims, dtype=np.int64))
    return np.asarray(np.trunc(total / count))


def _log_sum_exp(x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    top = np.max(x, axis=axes, keepdims=True)
    top = np.where(np.isfinite(top), top, x.dtype.type(0))
    y = np.log(np.sum(np.exp(x - top), axis=axes, keepdims=True)) + top
    return np.asarray(y if keepdims else np.squeeze(y, axis=axes))


def _sum(x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    return np.asarray(np.sum(x, axis=axes, keepdims=keepdims, dtype=x.dtype))


_reduction("reduce_mean", _mean)
_reduction("reduce_sum", _sum)
_reduction("reduce_max", lambda x, axes, keep: np.asarray(np.max(x, axis=axes, keepdims=keep)))
_reduction("reduce_min", lambda x, axes, keep: np.asarray(np.min(x, axis=axes, keepdims=keep)))
_reduction(
    "reduce_prod",
    lambda x, axes, keep: np.asarray(np.prod(x, axis=axes, keepdims=keep, dtype=x.dtype)),
)
_reduction("reduce_l1", lambda x, axes, keep: _sum(np.abs(x), axes, keep))
_reduction("reduce_l2", lambda x, axes, keep: np.sqrt(_sum(x * x, axes, keep)))
_reduction("reduce_sum_square", lambda x, axes, keep: _sum(x * x, axes, keep))
_reduction("reduce_log_sum", lambda x, axes, keep: np.log(_sum(x, axes, keep)))
_reduction("reduce_log_sum_exp", _log_sum_exp)


# -------------------------------------------------------------------- argmax, argmin, cumsum


def _arg(name: str, largest: bool) -> None:
    def infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
        x = c.given(name, types, 0, "x")
        if x.qparams is not None:
            c.quantized_per_tensor(name, x, "x")
        axes = (c.axis_of(name, attrs["axis"], x.rank),)
        return (TensorType(c.reduced(name, x.shape, axes, attrs["keepdims"]), DType.INT64),)

    def evaluate(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
        x = np.asarray(arrays[0])
        axis = c.axis_of(name, attrs["axis"], x.ndim)
        pick = np.argmax if largest else np.argmin
        if attrs["select_last_index"]:
            y = x.shape[axis] - 1 - pick(np.flip(x, axis), axis=axis)
        else:
            y = pick(x, axis=axis)
        if attrs["keepdims"]:
            y = np.expand_dims(y, axis)
        return (np.asarray(y, np.int64),)

    attrs = {"axis": 0, "keepdims": True, "select_last_index": False}
    register(OpDef(name, ("x",), infer, evaluate, attrs))


_arg("argmax", largest=True)
_arg("argmin", largest=False)


def _cumsum_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = c.numeric("cumsum", c.given("cumsum", types, 0, "x"), "x")
    c.axis_of("cumsum", attrs["axis"], x.rank)
    return (x,)


def _cumsum(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0])
    axis = c.axis_of("cumsum", attrs["axis"], x.ndim)
    x = np.flip(x, axis) if attrs["reverse"] else x
    y = np.cumsum(x, axis=axis, dtype=x.dtype)
    if attrs["exclusive"]:
        y = np.roll(y, 1, axis)
        y[(slice(None),) * axis + (slice(0, 1),)] = 0
    return (np.ascontiguousarray(np.flip(y, axis) if attrs["reverse"] else y),)


register(
    OpDef(
        "cumsum",
        ("x",),
        _cumsum_infer,
        _cumsum,
        {"axis": REQUIRED, "exclusive": False, "reverse": False},
    )
)


# ----------------------------------------------------------------------------------- softmax


def _axis_infer(name: str) -> Callable[[c.Types, Attrs], tuple[TensorType, ...]]:
    def infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
        x = c.floating(name, c.given(name, types, 0, "x"), "x")
        c.axis_of(name, attrs["axis"], x.rank)
        return (x,)

    return infer


def _softmax(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0])
    axis: Any = attrs["axis"]
    e = np.exp(x - np.max(x, axis=int(axis), keepdims=True))
    return (e / np.sum(e, axis=int(axis), keepdims=True),)


def _log_softmax(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0])
    axis: Any = attrs["axis"]
    d = x - np.max(x, axis=int(axis), keepdims=True)
    return (d - np.log(np.sum(np.exp(d), axis=int(axis), keepdims=True)),)


for _name, _fn in (("softmax", _softmax), ("log_softmax", _log_softmax)):
    register(OpDef(_name, ("x",), _axis_infer(_name), _fn, {"axis": -1}, kind=OpKind.NORM))


# ---------------------------------------------------------------------------- normalizations


def _layer_norm_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    name = "layer_norm"
    x = c.floating(name, c.given(name, types, 0, "x"), "x")
    axis = c.axis_of(name, attrs["axis"], x.rank)
    for i, operand in ((1, "scale"), (2, "bias")):
        t = c.optional(types, i)
        if t is None:
            continue
        c.same_dtype(name, x, c.plain(name, t, operand), operand)
        if c.broadcast(name, t.shape, x.shape[axis:]) != x.shape[axis:]:
            raise c.fail(name, f"{operand!r} is {t}, expected shape {list(x.shape[axis:])}")
    return (x,)


def _layer_norm(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0])
    axes = tuple(range(c.axis_of("layer_norm", attrs["axis"], x.ndim), x.ndim))
    y = _normalized(x, axes, attrs)
    scale, bias = optional_array(arrays, 1), optional_array(arrays, 2)
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    return (y.astype(x.dtype, copy=False),)


def _normalized(x: Array, axes: tuple[int, ...], attrs: Attrs) -> Array:
    """Return (x - mean) / sqrt(variance + epsilon) over axes."""
    epsilon: Any = attrs["epsilon"]
    d = x - np.mean(x, axis=axes, keepdims=True, dtype=x.dtype)
    var = np.mean(d * d, axis=axes, keepdims=True, dtype=x.dtype)
    return np.asarray(d / np.sqrt(var + x.dtype.type(epsilon)))


register(
    OpDef(
        "layer_norm",
        ("x", "scale?", "bias?"),
        _layer_norm_infer,
        _layer_norm,
        {"axis": -1, "epsilon": 1e-5},
        kind=OpKind.NORM,
    )
)


def _per_channel_infer(
    name: str, operands: tuple[str, ...], least_rank: int
) -> Callable[[c.Types, Attrs], tuple[TensorType, ...]]:
    def infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
        x = c.floating(name, c.given(name, types, 0, "x"), "x")
        if x.rank < least_rank:
            raise c.fail(name, f"operand 'x' is {x}, expected rank {least_rank} or more")
        for i, operand in enumerate(operands, 1):
            t = c.plain(name, c.given(name, types, i, operand), operand)
            c.same_dtype(name, x, t, operand)
            c.has_shape(name, t, (x.shape[1],), operand)
        return (x,)

    return infer


def _channel(arrays: Arrays, i: int, rank: int) -> Array:
    return np.asarray(arrays[i]).reshape(-1, *(1,) * (rank - 2))


def _instance_norm(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0])
    y = _normalized(x, tuple(range(2, x.ndim)), attrs)
    return (y * _channel(arrays, 1, x.ndim) + _channel(arrays, 2, x.ndim),)


def _batch_norm(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0])
    epsilon: Any = attrs["epsilon"]
    scale, bias, mean, var = (_channel(arrays, i, x.ndim) for i in range(1, 5))
    factor = scale / np.sqrt(var + x.dtype.type(epsilon))
    return ((x - mean) * factor + bias,)


register(
    OpDef(
        "instance_norm",
        ("x", "scale", "bias"),
        _per_channel_infer("instance_norm", ("scale", "bias"), 3),
        _instance_norm,
        {"epsilon": 1e-5},
        kind=OpKind.NORM,
    )
)
register(
    OpDef(
        "batch_norm",
        ("x", "scale", "bias", "mean", "var"),
        _per_channel_infer("batch_norm", ("scale", "bias", "mean", "var"), 2),
        _batch_norm,
        {"epsilon": 1e-5},
        kind=OpKind.NORM,
    )
)
