# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Convolution, transposed convolution and matrix product on floats."""

from __future__ import annotations

from collections.abc import Sequence
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
from qcompiler.types import Array, Shape, TensorType
from qcompiler.windows import Geometry, correlate, padded

Arrays = Sequence["Array | None"]

CONV_ATTRS = {
    "strides": REQUIRED,
    "pads": REQUIRED,
    "dilations": REQUIRED,
    "group": 1,
    "layout": "NCHW",
}


def optional_array(arrays: Arrays, i: int) -> Array | None:
    """Return operand `i`, or None where it is omitted."""
    return arrays[i] if i < len(arrays) else None


def channels_first(x: Array, layout: str) -> Array:
    """Return a view of a batched image with channels on axis 1."""
    return x if layout == "NCHW" else np.moveaxis(x, -1, 1)


def to_layout(x: Array, layout: str) -> Array:
    """Return a channels-first batched image in a layout, contiguous."""
    return np.ascontiguousarray(x if layout == "NCHW" else np.moveaxis(x, 1, -1))


# ------------------------------------------------------------------------------ convolution


def conv_geometry(op: str, x: Shape, w: Shape, attrs: Attrs) -> Geometry:
    """Return the window geometry of a convolution."""
    return c.geometry(op, attrs, c.spatial(x, c.layout_of(op, attrs)), w[2:])


def conv_shape(op: str, x: TensorType, w: TensorType, attrs: Attrs) -> Shape:
    """Return the result shape of a convolution after checking its operands' shapes."""
    layout = c.layout_of(op, attrs)
    if x.rank < 3:
        raise c.fail(op, f"operand 'x' is {x}, expected rank 3 or more")
    if w.rank != x.rank:
        raise c.fail(op, f"operand 'w' is {w}, expected rank {x.rank} like 'x' ({x})")
    group: Any = attrs["group"]
    chans, out_chans = c.channels(x.shape, layout), w.shape[0]
    if group < 1 or w.shape[1] * group != chans:
        raise c.fail(
            op, f"'x' has {chans} channels, 'w' expects {w.shape[1]} x group {group} (w is {w})"
        )
    if out_chans % group:
        raise c.fail(op, f"'w' has {out_chans} outputs, not a multiple of group {group}")
    g = conv_geometry(op, x.shape, w.shape, attrs)
    return c.image_shape(x.shape[0], out_chans, g.outputs, layout)


def check_residual(op: str, types: c.Types, i: int, shape: Shape) -> TensorType | None:
    """Require that the residual operand, if given, has the result's shape; return its type."""
    residual = c.optional(types, i)
    if residual is not None:
        c.has_shape(op, residual, shape, "residual")
    return residual


def _check_bias(op: str, types: c.Types, x: TensorType, columns: int) -> None:
    """Require that the bias, if given, is `[columns]` in the dtype of `x`."""
    bias = c.optional(types, 2)
    if bias is not None:
        c.same_dtype(op, x, c.plain(op, bias, "bias"), "bias")
        c.has_shape(op, bias, (columns,), "bias")


def _check_float_residual(op: str, types: c.Types, x: TensorType, shape: Shape) -> None:
    residual = check_residual(op, types, 3, shape)
    if residual is not None:
        c.same_dtype(op, x, c.plain(op, residual, "residual"), "residual")


def _conv_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = c.floating("conv", c.given("conv", types, 0, "x"), "x")
    w = c.floating("conv", c.given("conv", types, 1, "w"), "w")
    c.same_dtype("conv", x, w, "w")
    shape = conv_shape("conv", x, w, attrs)
    _check_bias("conv", types, x, w.shape[0])
    _check_float_residual("conv", types, x, shape)
    return (TensorType(shape, x.dtype),)


def finish(y: Array, residual: Array | None, attrs: Attrs) -> Array:
    """Apply a fused residual and activation clamp (the clamp acts after the residual)."""
    if residual is not None:
        y = y + residual
    if attrs["act_min"] is not None:
        y = np.maximum(y, y.dtype.type(attrs["act_min"]))
    if attrs["act_max"] is not None:
        y = np.minimum(y, y.dtype.type(attrs["act_max"]))
    return y


def _conv(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x, w = np.asarray(arrays[0]), np.asarray(arrays[1])
    layout = str(attrs["layout"])
    group: Any = attrs["group"]
    g = conv_geometry("conv", x.shape, w.shape, attrs)
    y = correlate(padded(channels_first(x, layout), g, 0), w, g, int(group))
    bias = optional_array(arrays, 2)
    if bias is not None:
        y = y + bias.reshape(-1, *(1,) * len(g.kernel))
    y = finish(to_layout(y, layout), optional_array(arrays, 3), attrs)
    return (y.astype(x.dtype, copy=False),)


register(
    OpDef(
        "conv",
        ("x", "w", "bias?", "residual?"),
        _conv_infer,
        _conv,
        {**CONV_ATTRS, "act_min": None, "act_max": None},
        kind=OpKind.COMPUTE,
    )
)


# ------------------------------------------------------------------- transposed convolution


def _conv_transpose_outputs(x: Shape, w: Shape, attrs: Attrs) -> tuple[Shape, Shape]:
    """Return (uncropped extents, result extents) of a transposed convolution."""
    name = "conv_transpose"
    n = len(x) - 2
    strides = c.ints(name, attrs, "strides", n, 1)
    pads = c.ints(name, attrs, "pads", 2 * n, 0)
    dilations = c.ints(name, attrs, "dilations", n, 1)
    extra = c.ints(name, attrs, "output_padding", n, 0)
    full = tuple(
        (x[2 + i] - 1) * strides[i] + extra[i] + (w[2 + i] - 1) * dilations[i] + 1 for i in range(n)
    )
    outs = tuple(full[i] - pads[i] - pads[n + i] for i in range(n))
    if any(o < 1 for o in outs):
        raise c.fail(name, f"pads {list(pads)} leave nothing of the extents {list(full)}")
    return full, outs


def _conv_transpose_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    name = "conv_transpose"
    x = c.floating(name, c.given(name, types, 0, "x"), "x")
    w = c.floating(name, c.given(name, types, 1, "w"), "w")
    c.same_dtype(name, x, w, "w")
    if x.rank < 3 or w.rank != x.rank:
        raise c.fail(name, f"'x' is {x} and 'w' is {w}, expected equal ranks of 3 or more")
    group: Any = attrs["group"]
    if w.shape[0] != x.shape[1] or group < 1 or x.shape[1] % group:
        raise c.fail(
            name, f"'x' has {x.shape[1]} channels, 'w' expects {w.shape[0]}, group is {group}"
        )
    _check_bias(name, types, x, w.shape[1] * group)
    _, outs = _conv_transpose_outputs(x.shape, w.shape, attrs)
    return (TensorType((x.shape[0], w.shape[1] * group, *outs), x.dtype),)


def _conv_transpose(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x, w = np.asarray(arrays[0]), np.asarray(arrays[1])
    group: Any = attrs["group"]
    strides: Any = attrs["strides"]
    pads: Any = attrs["pads"]
    dilations: Any = attrs["dilations"]
    full, outs = _conv_transpose_outputs(x.shape, w.shape, attrs)
    n, chans, extents = x.shape[0], x.shape[1], x.shape[2:]
    out_chans = w.shape[1] * group
    xs = x.reshape(n, group, chans // group, -1)
    ws = w.reshape(group, chans // group, w.shape[1], *w.shape[2:])
    y = np.zeros((n, out_chans, *full), x.dtype)
    for index in np.ndindex(*w.shape[2:]):
        at: tuple[Any, ...] = (slice(None), slice(None), slice(None), *index)
        tap = ws[at].transpose(0, 2, 1)
        part = np.matmul(tap[None], xs).reshape(n, out_chans, *extents)
        pick: tuple[slice, ...] = (slice(None), slice(None))
        pick += tuple(
            slice(i * d, i * d + (e - 1) * s + 1, s)
            for i, d, e, s in zip(index, dilations, extents, strides, strict=True)
        )
        y[pick] += part
    crop: tuple[slice, ...] = (slice(None), slice(None))
    crop += tuple(slice(p, p + o) for p, o in zip(pads[: len(outs)], outs, strict=True))
    y = y[crop]
    bias = optional_array(arrays, 2)
    if bias is not None:
        y = y + bias.reshape(-1, *(1,) * len(outs))
    return (np.ascontiguousarray(y),)


register(
    OpDef(
        "conv_transpose",
        ("x", "w", "bias?"),
        _conv_transpose_infer,
        _conv_transpose,
        {
            "strides": REQUIRED,
            "pads": REQUIRED,
            "dilations": REQUIRED,
            "group": 1,
            "output_padding": REQUIRED,
        },
        kind=OpKind.COMPUTE,
    )
)


# --------------------------------------------------------------------------- matrix product


def matmul_shape(op: str, a: TensorType, b: TensorType, attrs: Attrs) -> Shape:
    """Return the result shape of a matrix product (numpy's rules, after the transposes)."""
    for t, flag, name in ((a, "transpose_a", "a"), (b, "transpose_b", "b")):
        if t.rank < (2 if attrs[flag] else 1):
            raise c.fail(op, f"operand {name!r} is {t}: its rank is too small")
    sa, sb = list(a.shape), list(b.shape)
    if attrs["transpose_a"]:
        sa[-2:] = sa[:-3:-1]
    if attrs["transpose_b"]:
        sb[-2:] = sb[:-3:-1]
    inner_a, inner_b = sa[-1], sb[0] if len(sb) == 1 else sb[-2]
    if inner_a != inner_b:
        raise c.fail(op, f"inner extents {inner_a} and {inner_b} differ (a is {a}, b is {b})")
    lead = c.broadcast(op, tuple(sa[:-2]), tuple(sb[:-2]))
    tail = ([sa[-2]] if len(sa) > 1 else []) + ([sb[-1]] if len(sb) > 1 else [])
    return (*lead, *tail)


def matmul_columns(b: TensorType, attrs: Attrs) -> int:
    """Return the extent N of the second operand (1 for a vector)."""
    if b.rank == 1:
        return 1
    return b.shape[-2] if attrs["transpose_b"] else b.shape[-1]


def _matmul_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    a = c.floating("matmul", c.given("matmul", types, 0, "a"), "a")
    b = c.floating("matmul", c.given("matmul", types, 1, "b"), "b")
    c.same_dtype("matmul", a, b, "b")
    shape = matmul_shape("matmul", a, b, attrs)
    _check_bias("matmul", types, a, matmul_columns(b, attrs))
    _check_float_residual("matmul", types, a, shape)
    return (TensorType(shape, a.dtype),)


def swapped(a: Array, swap: Any) -> Array:
    """Return the array with its last two axes swapped if asked."""
    return np.swapaxes(a, -1, -2) if swap else a


def _matmul(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    a = swapped(np.asarray(arrays[0]), attrs["transpose_a"])
    b = swapped(np.asarray(arrays[1]), attrs["transpose_b"])
    y = np.asarray(np.matmul(a, b))
    bias = optional_array(arrays, 2)
    if bias is not None:
        y = np.asarray(y + bias)
    y = finish(y, optional_array(arrays, 3), attrs)
    return (y.reshape(ctx.outputs[0].shape).astype(a.dtype, copy=False),)


register(
    OpDef(
        "matmul",
        ("a", "b", "bias?", "residual?"),
        _matmul_infer,
        _matmul,
        {"transpose_a": False, "transpose_b": False, "act_min": None, "act_max": None},
        kind=OpKind.COMPUTE,
    )
)
