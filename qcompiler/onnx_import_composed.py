# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Converters of rarer operators, written in terms of common ones that have kernels.

Source: ONNX operators BitShift-11, Col2Im-18, CumProd-26, DFT-17 and -20, EyeLike-9 to -22,
Scatter-9, STFT-17.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from qcompiler.errors import ShapeError, UnsupportedOpError
from qcompiler.ir import Value
from qcompiler.onnx_import_context import (
    OpContext,
    check_folded_size,
    converter,
    normal_axis,
    reshape,
)
from qcompiler.onnx_import_tensors import dtype_of
from qcompiler.types import Array, DType, TensorType

Results = Sequence[Value] | None

# ----------------------------------------------------------------------------------- products


@converter("CumProd")
def _cumprod(ctx: OpContext) -> Results:
    """Multiply each element by the one 1, then 2, 4, ... before it: all before it after log2(n)."""
    x = ctx.input(0)
    axis = normal_axis(int(ctx.static(1, "axis").reshape(-1)[0]), x.type.rank)
    n = x.shape[axis]
    reverse = bool(ctx.attr("reverse", 0))
    y = _flipped(ctx, x, axis) if reverse else x
    if ctx.attr("exclusive", 0):
        y = _shifted(ctx, y, axis, 1)
    step = 1
    while step < n:
        y = ctx.emit("mul", y, _shifted(ctx, y, axis, step))
        step *= 2
    return [_flipped(ctx, y, axis) if reverse else y]


def _flipped(ctx: OpContext, x: Value, axis: int) -> Value:
    n = x.shape[axis]
    return ctx.emit("slice", x, starts=(n - 1,), ends=(-n - 1,), axes=(axis,), steps=(-1,))


def _shifted(ctx: OpContext, x: Value, axis: int, by: int) -> Value:
    """Move the elements of an axis to later indices; ones come in."""
    front = ctx.constant(
        np.ones((*x.shape[:axis], by, *x.shape[axis + 1 :]), x.dtype.numpy), dtype=x.dtype
    )
    n = x.shape[axis]
    if by >= n:
        return front
    rest = ctx.emit("slice", x, starts=(0,), ends=(n - by,), axes=(axis,), steps=(1,))
    return ctx.emit("concat", front, rest, axis=axis)


# ------------------------------------------------------------------------------------- Fourier


@converter("DFT")
def _dft(ctx: OpContext) -> Results:
    """Multiply by the matrix of the transform."""
    x = _real_or_complex(ctx, 0)
    rank = x.type.rank
    if ctx.get(2) is not None:
        axis = normal_axis(int(ctx.static(2, "axis").reshape(-1)[0]), rank)
    else:
        axis = normal_axis(int(ctx.attr("axis", 1 if ctx.version < 20 else -2)), rank)
    if axis == rank - 1:
        raise ShapeError("its axis is that of the real and imaginary parts")
    order = (*(a for a in range(rank) if a != axis and a != rank - 1), axis, rank - 1)
    moved = ctx.emit("transpose", x, perm=order) if order != tuple(range(rank)) else x
    length = None if ctx.get(1) is None else int(ctx.static(1, "length").reshape(-1)[0])
    inverse, onesided = bool(ctx.attr("inverse", 0)), bool(ctx.attr("onesided", 0))
    y = _transformed(ctx, moved, length, inverse, onesided, None)
    back = tuple(int(i) for i in np.argsort(order))
    return [ctx.emit("transpose", y, perm=back) if order != tuple(range(rank)) else y]


@converter("STFT")
def _stft(ctx: OpContext) -> Results:
    """Gather the frames and multiply them by the window and the matrix of the transform."""
    x = _real_or_complex(ctx, 0)
    if x.type.rank != 3:
        raise ShapeError(f"its signal {list(x.shape)} should have three axes")
    step = int(ctx.static(1, "frame_step").reshape(-1)[0])
    window = ctx.get(2)
    if ctx.get(3) is not None:
        size = int(ctx.static(3, "frame_length").reshape(-1)[0])
    elif window is not None:
        size = window.type.size
    else:
        raise ShapeError("neither a window nor a frame length is given")
    if step < 1 or not 1 <= size <= x.shape[1]:
        raise ShapeError(f"frames of {size} every {step} do not fit a signal of {x.shape[1]}")
    count = (x.shape[1] - size) // step + 1
    check_folded_size((count, size), DType.INT64, "the index of its frames")
    indices = np.arange(count)[:, None] * step + np.arange(size)
    frames = ctx.emit("gather", x, ctx.constant(indices.astype(np.int64)), axis=1)
    taps: Array | None = None
    if window is not None and window.data is not None:
        taps = np.asarray(window.data, np.float64).reshape(-1)
    elif window is not None:
        wide = window if window.dtype is x.dtype else ctx.emit("cast", window, to=x.dtype.value)
        frames = ctx.emit("mul", frames, reshape(ctx, wide, (size, 1)))
    return [_transformed(ctx, frames, None, False, bool(ctx.attr("onesided", 1)), taps)]


def _real_or_complex(ctx: OpContext, i: int) -> Value:
    x = ctx.input(i)
    if x.dtype is not DType.FLOAT32:
        raise UnsupportedOpError(f"transforms of {x.dtype.value} are not supported")
    if x.type.rank < 2 or x.shape[-1] not in (1, 2):
        raise ShapeError(f"the last axis of {list(x.shape)} should hold 1 or 2 parts of a number")
    return x


def _transformed(
    ctx: OpContext,
    x: Value,
    length: int | None,
    inverse: bool,
    onesided: bool,
    taps: Array | None,
) -> Value:
    """Transform along the last axis but one; the last holds the parts of complex numbers.

    Args:
        ctx: The node.
        x: [..., n, 1 or 2].
        length: Points of the transform; None: as many as there are.
        inverse: Whether the transform back is wanted.
        onesided: Forward: only the first half of the result; inverse: of the operand, whose
            other half is the mirrored conjugate, so that the result is real.
        taps: Window that the numbers are multiplied by.
    """
    n, parts = x.shape[-2:]
    points = length if length is not None else (2 * (n - 1) if inverse and onesided else n)
    if points < 1:
        raise ShapeError(f"it has {points} points, expected 1 or more")
    half = points // 2 + 1
    used = min(n, half if inverse and onesided else points)
    found = half if onesided and not inverse else points
    out_parts = 1 if inverse and onesided else 2
    check_folded_size((used * parts, found * out_parts), DType.FLOAT64, "its matrix")
    matrix = np.zeros((used, parts, found, out_parts))
    angle = 2 * np.pi * (np.outer(np.arange(used), np.arange(found)) % points) / points
    cos, sin = np.cos(angle), np.sin(angle) * (1 if inverse else -1)
    if inverse and onesided:  # each number but the first and the middle stands for two
        twice = np.full((used, 1), 2.0)
        twice[0] = 1
        if points % 2 == 0 and used == half:
            twice[-1] = 1
        cos, sin = cos * twice, sin * twice
    matrix[:, 0, :, 0] = cos
    if out_parts == 2:
        matrix[:, 0, :, 1] = sin
    if parts == 2:
        matrix[:, 1, :, 0] = -sin
        if out_parts == 2:
            matrix[:, 1, :, 1] = cos
    if inverse:
        matrix /= points
    if taps is not None:
        matrix *= taps.reshape(-1)[:used, None, None, None]
    if used < n:
        axis = x.type.rank - 2
        x = ctx.emit("slice", x, starts=(0,), ends=(used,), axes=(axis,), steps=(1,))
    flat = reshape(ctx, x, (*x.shape[:-2], used * parts))
    weights = ctx.constant(matrix.reshape(used * parts, -1).astype(np.float32))
    y = ctx.emit("matmul", flat, weights)
    return reshape(ctx, y, (*x.shape[:-2], found, out_parts))


# ------------------------------------------------------------------------------------- windows


@converter("Col2Im")
def _col2im(ctx: OpContext) -> Results:
    """Add up overlapping blocks: a transposed convolution with one 1 in every kernel."""
    x = ctx.input(0)
    image = [int(d) for d in ctx.static(1, "image shape").reshape(-1)]
    block = [int(d) for d in ctx.static(2, "block shape").reshape(-1)]
    n, size = len(block), int(np.prod(block))
    if len(image) != n or x.type.rank != 3 or min((size, *image)) < 1 or x.shape[1] % size:
        raise ShapeError(f"blocks {block} of an image {image} do not fit {list(x.shape)}")
    if n > 3 or not x.dtype.is_float:
        raise UnsupportedOpError(f"images of {n} axes of {x.dtype.value} are not supported")
    strides, dilations = (tuple(int(d) for d in ctx.attr(k) or [1] * n)
                          for k in ("strides", "dilations"))  # fmt: skip
    pads = tuple(int(p) for p in ctx.attr("pads") or [0] * (2 * n))
    reach = [d * (b - 1) + 1 for d, b in zip(dilations, block, strict=True)]
    room = [image[i] + pads[i] + pads[n + i] - reach[i] for i in range(n)]
    steps = [r // s + 1 for r, s in zip(room, strides, strict=True)]
    if min(room) < 0 or int(np.prod(steps)) != x.shape[2]:
        raise ShapeError(f"{x.shape[2]} blocks are given, the image {image} has {steps}")
    channels = x.shape[1] // size
    check_folded_size((channels * size, size), DType.FLOAT32, "its kernels")
    kernels = np.tile(np.eye(size).reshape(size, 1, *block), (channels, *(1,) * (n + 1)))
    blocks = reshape(ctx, x, (x.shape[0], x.shape[1], *steps))
    y = ctx.emit(
        "conv_transpose",
        blocks,
        ctx.constant(kernels.astype(x.dtype.numpy), dtype=x.dtype),
        None,
        strides=strides,
        pads=pads,
        dilations=dilations,
        group=channels,
        output_padding=tuple(r % s for r, s in zip(room, strides, strict=True)),
    )
    return [reshape(ctx, y, (x.shape[0], channels, *image))]


# ------------------------------------------------------------------------------------ elements


@converter("EyeLike")
def _eye_like(ctx: OpContext) -> Results:
    x = ctx.input(0)
    if x.type.rank != 2:
        raise ShapeError(f"its operand {list(x.shape)} should have two axes")
    declared = ctx.attr("dtype")
    dtype = x.dtype if declared is None else dtype_of(int(declared))
    check_folded_size(x.shape, dtype, "the constant result of EyeLike")
    ones = np.eye(x.shape[0], x.shape[1], int(ctx.attr("k", 0)))
    return [ctx.constant(ones.astype(dtype.numpy), dtype=dtype)]


@converter("BitShift")
def _bit_shift(ctx: OpContext) -> Results:
    """Shift to the left without a sign, by amounts in range; beyond it nothing is left."""
    x, by = ctx.input(0), ctx.input(1)
    if ctx.attr("direction") != "LEFT" or not x.dtype.value.startswith("int"):
        return None
    unsigned = "u" + x.dtype.value
    zero, width = ctx.scalar(0, by), ctx.scalar(x.dtype.bits, by)
    known = ctx.emit("and", ctx.emit("greater_or_equal", by, zero), ctx.emit("less", by, width))
    amount = ctx.emit("where", known, by, zero)
    node = onnx.helper.make_node("BitShift", ["x0", "x1"], ["y0"], direction="LEFT")
    wide = [ctx.emit("cast", v, to=unsigned) for v in (x, amount)]
    shape = np.broadcast_shapes(x.shape, by.shape)
    shifted = _opaque(ctx, node, wide, TensorType(shape, wide[0].dtype))
    y = ctx.emit("cast", shifted, to=x.dtype.value)
    return [ctx.emit("where", known, y, ctx.scalar(0, x))]


@converter("Scatter")
def _scatter(ctx: OpContext) -> Results:
    """The former name of ScatterElements."""
    x = ctx.input(0)
    node = onnx.helper.make_node(
        "ScatterElements", ["x0", "x1", "x2"], ["y0"], axis=ctx.axis(0, x.type.rank)
    )
    return [_opaque(ctx, node, [ctx.input(i) for i in range(3)], x.type)]


_OPSET = 18


def _opaque(
    ctx: OpContext, node: onnx.NodeProto, inputs: Sequence[Value], type: TensorType
) -> Value:
    data = node.SerializeToString(deterministic=True)
    attrs = {"node": data, "domain": "", "opset": _OPSET}
    return ctx.builder.emit("opaque", inputs, attrs, ctx.name, types=[type])[0]
