# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Operators that move or select elements; they work alike on plain and quantized tensors.

Operands and results of a quantized movement share scale, zero point and storage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qcompiler.errors import DataError
from qcompiler.grids import found_grid
from qcompiler.ops import _infer as c
from qcompiler.ops import _resize
from qcompiler.ops._base import REQUIRED, Attrs, EvalContext, OpDef, OpKind, register
from qcompiler.ops.linear import channels_first, to_layout
from qcompiler.types import Array, DType, PerAxis, PerGroup, QuantParams, Shape, TensorType
from qcompiler.windows import padded, taps

Arrays = Sequence["Array | None"]


def _moved(op: str, types: c.Types) -> TensorType:
    """Return the type of 'x', which may be plain or quantized with one scale."""
    x = c.given(op, types, 0, "x")
    if x.qparams is not None:
        c.quantized_per_tensor(op, x, "x")
    return x


def _move(name: str, infer: Any, evaluate: Any, attrs: dict[str, Any], **fields: Any) -> None:
    inputs = fields.pop("inputs", ("x",))
    register(OpDef(name, inputs, infer, evaluate, attrs, kind=OpKind.MOVEMENT, **fields))


# --------------------------------------------------------------------------------- max_pool


def _max_pool_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _moved("max_pool", types)
    c.numeric("max_pool", TensorType(x.shape, x.dtype), "x")
    return (x.with_shape(pool_shape("max_pool", x, attrs)),)


def pool_shape(op: str, x: TensorType, attrs: Attrs) -> Shape:
    """Return the result shape of a pooling."""
    layout = c.layout_of(op, attrs)
    if x.rank < 3:
        raise c.fail(op, f"operand 'x' is {x}, expected rank 3 or more")
    kernel = c.ints(op, attrs, "kernel", x.rank - 2, 1)
    g = c.geometry(op, attrs, c.spatial(x.shape, layout), kernel)
    return c.image_shape(x.shape[0], c.channels(x.shape, layout), g.outputs, layout)


def _max_pool(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0])
    layout = str(attrs["layout"])
    kernel: Any = attrs["kernel"]
    g = c.geometry("max_pool", attrs, c.spatial(x.shape, layout), tuple(kernel))
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    y: Array | None = None
    for _, view in taps(padded(channels_first(x, layout), g, lowest), g):
        y = view.copy() if y is None else np.maximum(y, view, out=y)
    return (to_layout(np.asarray(y), layout),)


_move(
    "max_pool",
    _max_pool_infer,
    _max_pool,
    {
        "kernel": REQUIRED,
        "strides": REQUIRED,
        "pads": REQUIRED,
        "dilations": REQUIRED,
        "ceil_mode": False,
        "layout": "NCHW",
    },
)


# ---------------------------------------------------------------------------- concat, split


def _concat_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _moved("concat", types)
    axis = c.axis_of("concat", attrs["axis"], x.rank)
    total = 0
    qparams = x.qparams
    for i in range(len(types)):
        t = c.given("concat", types, i, f"xs[{i}]")
        c.same_dtype("concat", x, t, f"xs[{i}]")
        rest, want = list(t.shape), list(x.shape)
        if t.rank != x.rank or rest[:axis] + rest[axis + 1 :] != want[:axis] + want[axis + 1 :]:
            raise c.fail("concat", f"operand {i} is {t}, expected {x} but for axis {axis}")
        if (t.qparams is None) != (qparams is None):
            raise c.fail("concat", f"operand {i} is {t}: all or no operands may be quantized")
        if t.qparams is not None and qparams is not None:
            if not t.qparams.same_grid(qparams):
                raise c.fail("concat", f"operand {i} is {t}, expected the quantization of {x}")
            qparams = _united(qparams, t.qparams)
        total += t.shape[axis]
    shape = (*x.shape[:axis], total, *x.shape[axis + 1 :])
    return (TensorType(shape, x.dtype, qparams),)


def _united(a: QuantParams, b: QuantParams) -> QuantParams:
    """Return the common grid with the union of both clamp ranges."""
    lo, hi = min(a.qmin, b.qmin), max(a.qmax, b.qmax)
    spread = None if a.spread is None or b.spread is None else max(a.spread, b.spread)
    return replace(a, qmin=lo, qmax=hi, spread=spread)


def _concat(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    axis: Any = attrs["axis"]
    return (np.concatenate([np.asarray(a) for a in arrays], axis=int(axis)),)


_move("concat", _concat_infer, _concat, {"axis": REQUIRED}, inputs=("x", "xs*"))


def _split_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _moved("split", types)
    axis = c.axis_of("split", attrs["axis"], x.rank)
    sizes: Any = attrs["sizes"]
    if any(s < 0 for s in sizes) or sum(sizes) != x.shape[axis]:
        raise c.fail("split", f"sizes {list(sizes)} do not add up to {x.shape[axis]} (x is {x})")
    return tuple(x.with_shape((*x.shape[:axis], s, *x.shape[axis + 1 :])) for s in sizes)


def _split(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    axis: Any = attrs["axis"]
    sizes: Any = attrs["sizes"]
    parts = np.split(np.asarray(arrays[0]), np.cumsum(sizes)[:-1], axis=int(axis))
    return tuple(np.ascontiguousarray(p) for p in parts)


_move("split", _split_infer, _split, {"axis": REQUIRED, "sizes": REQUIRED}, outputs=0)


# ------------------------------------------------------------------------------- slice, pad


def slices(op: str, shape: Shape, attrs: Attrs) -> tuple[slice, ...]:
    """Return one Python slice per axis.

    Negative starts and ends count from the end; a negative step runs down to the end exclusive,
    and an end of `-extent - 1` or less takes index 0 in. Source: ONNX Slice-13.
    """
    starts: Any = attrs["starts"]
    ends: Any = attrs["ends"]
    steps: Any = attrs["steps"]
    axes = c.axes_of(op, attrs["axes"], len(shape))
    if not len(starts) == len(ends) == len(steps) == len(axes):
        raise c.fail(op, "starts, ends, axes and steps differ in length")
    pick = [slice(0, n, 1) for n in shape]
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        n = shape[axis]
        start = start + n if start < 0 else start
        end = end + n if end < 0 else end
        if step > 0:
            start, end = min(max(start, 0), n), min(max(end, 0), n)
            pick[axis] = slice(start, max(start, end), step)
        elif step < 0:
            start, end = min(max(start, 0), n - 1), min(max(end, -1), n - 1)
            pick[axis] = slice(start, None if end < 0 else end, step) if n else slice(0, 0, 1)
        else:
            raise c.fail(op, f"step of axis {axis} is 0")
    return tuple(pick)


def _slice_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _moved("slice", types)
    pick = slices("slice", x.shape, attrs)
    shape = tuple(len(range(*s.indices(n))) for s, n in zip(pick, x.shape, strict=True))
    return (x.with_shape(shape),)


def _slice(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0])
    return (np.ascontiguousarray(x[slices("slice", x.shape, attrs)]),)


_move(
    "slice",
    _slice_infer,
    _slice,
    {"starts": REQUIRED, "ends": REQUIRED, "axes": REQUIRED, "steps": REQUIRED},
)

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "edge", "wrap": "wrap"}


def _pad_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _moved("pad", types)
    pads = c.ints("pad", attrs, "pads", 2 * x.rank, -(2**62))
    if attrs["mode"] not in _PAD_MODES:
        raise c.fail("pad", f"mode {attrs['mode']!r}, expected one of {', '.join(_PAD_MODES)}")
    shape = tuple(n + pads[i] + pads[x.rank + i] for i, n in enumerate(x.shape))
    if any(n < 0 for n in shape):
        raise c.fail("pad", f"pads {list(pads)} leave the shape {list(shape)} of {x}")
    if attrs["mode"] == "reflect":
        for i, n in enumerate(x.shape):
            if max(pads[i], pads[x.rank + i]) >= max(n, 1):
                raise c.fail("pad", f"reflecting pads {list(pads)} exceed the extents of {x}")
    return (x.with_shape(shape),)


def _pad(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0])
    pads: Any = attrs["pads"]
    n = x.ndim
    # Negative pads crop first; ONNX Pad-18.
    x = x[tuple(slice(max(0, -pads[i]), x.shape[i] + min(0, pads[n + i])) for i in range(n))]
    width = [(max(0, pads[i]), max(0, pads[n + i])) for i in range(n)]
    if attrs["mode"] != "constant":
        mode: Any = _PAD_MODES[str(attrs["mode"])]
        return (np.pad(x, width, mode=mode),)
    value: Any = attrs["value"]
    qparams = ctx.outputs[0].qparams
    if qparams is not None:
        value = int(np.clip(np.rint(value / qparams.s) + qparams.z, qparams.qmin, qparams.qmax))
    return (np.pad(x, width, constant_values=x.dtype.type(value)),)


_move("pad", _pad_infer, _pad, {"pads": REQUIRED, "mode": "constant", "value": 0.0})


# ------------------------------------------------------------------------------- mask_tail


def _mask_tail_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _moved("mask_tail", types)
    tail = c.given("mask_tail", types, 1, "tail")
    axis: Any = attrs["axis"]
    if not 0 <= axis < x.rank or tail.shape != (x.shape[axis],) or tail.dtype is not DType.FLOAT32:
        raise c.fail("mask_tail", f"tail is {tail}, expected float32 for axis {axis} of {x}")
    return (x,)


def _mask_tail(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    """0 (the zero point, in integers) wherever the tail is not 0 along the axis."""
    x, tail = np.asarray(arrays[0]), np.asarray(arrays[1])
    axis: Any = attrs["axis"]
    qparams = ctx.outputs[0].qparams
    zero = x.dtype.type(0 if qparams is None else qparams.z)
    used = (tail == 0).reshape(-1, *[1] * (x.ndim - 1 - axis))
    return (np.where(used, x, zero),)


_move(
    "mask_tail",
    _mask_tail_infer,
    _mask_tail,
    {"axis": REQUIRED},
    inputs=("x", "tail"),
)


# ---------------------------------------------------------------- reshape, transpose, expand


def reshaped_grid(x: TensorType, shape: Shape) -> QuantParams | None:
    """Return the quantization of a reshaped tensor with scales along an axis, or None.

    Its scales then are those of an axis, too: that of the same elements, or one that joins others.
    """
    q = x.qparams
    if q is None or not isinstance(q.granularity, PerAxis) or not x.size:
        return None
    at = tuple(-1 if i == q.granularity.axis else 1 for i in range(x.rank))
    scale, zero = (
        np.broadcast_to(a.reshape(at), x.shape).reshape(shape) for a in (q.scale, q.zero_point)
    )
    by, scale, zero = found_grid(scale, zero)
    if isinstance(by, PerGroup):
        return None
    return QuantParams(scale, zero, q.storage, q.qmin, q.qmax, by)


def _reshape_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = c.given("reshape", types, 0, "x")
    shape: Any = attrs["shape"]
    if any(d < 0 for d in shape) or math.prod(shape) != x.size:
        raise c.fail("reshape", f"{x} has {x.size} elements, shape {list(shape)} does not fit")
    q = reshaped_grid(x, tuple(shape))
    if q is None:
        q = _moved("reshape", types).qparams
    return (TensorType(tuple(shape), x.dtype, q),)


def _reshape(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    return (np.asarray(arrays[0]).reshape(ctx.outputs[0].shape),)


_move("reshape", _reshape_infer, _reshape, {"shape": REQUIRED})


def _transpose_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = c.given("transpose", types, 0, "x")
    perm: Any = attrs["perm"]
    if sorted(perm) != list(range(x.rank)):
        raise c.fail("transpose", f"perm {list(perm)} is no permutation of the axes of {x}")
    q = x.qparams
    if q is not None and not q.is_per_tensor:
        if not isinstance(q.granularity, PerAxis):
            raise c.fail("transpose", f"operand 'x' has {q.granularity} scales")
        axis = PerAxis(list(perm).index(q.granularity.axis))
        q = QuantParams(q.scale, q.zero_point, q.storage, q.qmin, q.qmax, axis)
    return (TensorType(tuple(x.shape[p] for p in perm), x.dtype, q),)


def _transpose(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    perm: Any = attrs["perm"]
    return (np.ascontiguousarray(np.asarray(arrays[0]).transpose(perm)),)


_move("transpose", _transpose_infer, _transpose, {"perm": REQUIRED})


def _expand_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _moved("expand", types)
    shape: Any = attrs["shape"]
    return (x.with_shape(c.broadcast("expand", x.shape, tuple(shape))),)


def _expand(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    return (np.ascontiguousarray(np.broadcast_to(np.asarray(arrays[0]), ctx.outputs[0].shape)),)


_move("expand", _expand_infer, _expand, {"shape": REQUIRED})


def _tile_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _moved("tile", types)
    repeats = c.ints("tile", attrs, "repeats", x.rank, 0)
    return (x.with_shape(tuple(n * r for n, r in zip(x.shape, repeats, strict=True))),)


def _tile(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    repeats: Any = attrs["repeats"]
    return (np.tile(np.asarray(arrays[0]), repeats),)


_move("tile", _tile_infer, _tile, {"repeats": REQUIRED})


# ----------------------------------------------------------------------------------- gather


def _gather_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _moved("gather", types)
    indices = c.plain("gather", c.given("gather", types, 1, "indices"), "indices")
    if not indices.dtype.is_integer:
        raise c.fail("gather", f"operand 'indices' is {indices}, expected integers")
    axis = c.axis_of("gather", attrs["axis"], x.rank)
    return (x.with_shape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])),)


def _gather(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x, indices = np.asarray(arrays[0]), np.asarray(arrays[1])
    axis: Any = attrs["axis"]
    n = x.shape[axis]
    if indices.size and (indices.min() < -n or indices.max() >= n):
        raise DataError(
            f"gather: indices {int(indices.min())}..{int(indices.max())} are outside the "
            f"{n} entries of axis {axis}"
        )
    return (np.take(x, indices.astype(np.int64), axis=int(axis)),)


_move("gather", _gather_infer, _gather, {"axis": 0}, inputs=("x", "indices"))


# ------------------------------------------------------------- depth_to_space, space_to_depth


def _depth_to_space_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    name = "depth_to_space"
    x = _moved(name, types)
    layout = c.layout_of(name, attrs)
    block: Any = attrs["blocksize"]
    if attrs["mode"] not in ("DCR", "CRD"):
        raise c.fail(name, f"mode {attrs['mode']!r}, expected DCR or CRD")
    if x.rank != 4 or block < 1 or c.channels(x.shape, layout) % (block * block):
        raise c.fail(name, f"{x} does not split into blocks of {block} x {block}")
    h, w = c.spatial(x.shape, layout)
    chans = c.channels(x.shape, layout) // (block * block)
    return (x.with_shape(c.image_shape(x.shape[0], chans, (h * block, w * block), layout)),)


def _depth_to_space(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    layout = str(attrs["layout"])
    block: Any = attrs["blocksize"]
    x = channels_first(np.asarray(arrays[0]), layout)
    n, chans, h, w = x.shape
    d = chans // (block * block)
    if attrs["mode"] == "DCR":
        y = x.reshape(n, block, block, d, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, d, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
    return (to_layout(y.reshape(n, d, h * block, w * block), layout),)


_move(
    "depth_to_space",
    _depth_to_space_infer,
    _depth_to_space,
    {"blocksize": REQUIRED, "mode": "DCR", "layout": "NCHW"},
)


def _space_to_depth_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    name = "space_to_depth"
    x = _moved(name, types)
    layout = c.layout_of(name, attrs)
    block: Any = attrs["blocksize"]
    extents = c.spatial(x.shape, layout)
    if x.rank != 4 or block < 1 or any(e % block for e in extents):
        raise c.fail(name, f"{x} does not split into blocks of {block} x {block}")
    chans = c.channels(x.shape, layout) * block * block
    extents = tuple(e // block for e in extents)
    return (x.with_shape(c.image_shape(x.shape[0], chans, extents, layout)),)


def _space_to_depth(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    layout = str(attrs["layout"])
    block: Any = attrs["blocksize"]
    x = channels_first(np.asarray(arrays[0]), layout)
    n, chans, h, w = x.shape
    y = x.reshape(n, chans, h // block, block, w // block, block).transpose(0, 3, 5, 1, 2, 4)
    return (to_layout(y.reshape(n, chans * block * block, h // block, w // block), layout),)


_move(
    "space_to_depth",
    _space_to_depth_infer,
    _space_to_depth,
    {"blocksize": REQUIRED, "layout": "NCHW"},
)


# ----------------------------------------------------------------------------------- resize


def _resize_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = _moved("resize", types)
    if attrs["mode"] != "nearest":
        c.floating("resize", x, "x")
    c.layout_of("resize", attrs)
    shape = c.ints("resize", attrs, "shape", x.rank, 1)
    scales: Any = attrs["scales"]
    problem = _resize.problem(attrs)
    if problem:
        raise c.fail("resize", problem)
    if len(scales) != x.rank or any(s <= 0 for s in scales):
        raise c.fail("resize", f"scales {scales!r}, expected {x.rank} positive numbers")
    return (x.with_shape(shape),)


def _resize_evaluate(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    return (_resize.resize(np.asarray(arrays[0]), attrs),)


_move(
    "resize",
    _resize_infer,
    _resize_evaluate,
    {
        "mode": "nearest",
        "coordinate_mode": "half_pixel",
        "nearest_mode": "round_prefer_floor",
        "cubic_coeff_a": -0.75,
        "exclude_outside": False,
        "extrapolation_value": 0.0,
        "antialias": False,
        "scales": REQUIRED,
        "shape": REQUIRED,
        "layout": "NCHW",
    },
)
