# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Converters of ONNX operators that make, move or select elements.

Operands that steer them (shapes, axes, pads...) become attributes; they must be constants by the
time the operator is imported. Source: ONNX operator changelog, opsets 7 to 28.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qcompiler.errors import ShapeError, UnsupportedOpError
from qcompiler.ir import Value
from qcompiler.onnx_import_context import (
    OpContext,
    check_folded_size,
    converter,
    normal_axis,
    reshape,
)
from qcompiler.onnx_import_qdq import takes_on
from qcompiler.ops import AttrValue
from qcompiler.ops._resize import weights
from qcompiler.types import Array, DType

Results = Sequence[Value] | None

# -------------------------------------------------------------------- constants and shapes


@converter("Constant")
def _constant(ctx: OpContext) -> Results:
    for key, dtype in (("value_float", np.float32), ("value_floats", np.float32)):
        if key in ctx.attrs:
            return [ctx.constant(np.asarray(ctx.attrs[key], dtype))]
    for key in ("value_int", "value_ints"):
        if key in ctx.attrs:
            return [ctx.constant(np.asarray(ctx.attrs[key], np.int64))]
    if "sparse_value" in ctx.attrs:
        return [ctx.constant(*_dense(ctx))]
    if "value" not in ctx.attrs:
        raise UnsupportedOpError("constants of element type string are not supported")
    data, exact = ctx.tensor(ctx.attrs["value"], "value")
    return [ctx.constant(data, dtype=exact)]


def _dense(ctx: OpContext) -> tuple[Array, str, DType]:
    """Return a sparse constant as a dense array. Source: ONNX SparseTensorProto."""
    sparse = ctx.attrs["sparse_value"]
    values, dtype = ctx.tensor(sparse.values, "sparse_value")
    indices, _ = ctx.tensor(sparse.indices, "sparse_value")
    shape = tuple(int(d) for d in sparse.dims)
    check_folded_size(shape, dtype, "a sparse constant")
    data = np.zeros(math.prod(shape), dtype.numpy)
    if indices.ndim == 2:
        weights = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        indices = indices @ np.asarray(weights, np.int64)
    if indices.size and (indices.min() < 0 or indices.max() >= data.size):
        raise ShapeError(f"a sparse constant has entries outside its shape {list(shape)}")
    data[indices] = values
    return data.reshape(shape), "const", dtype


@converter("Shape")
def _shape(ctx: OpContext) -> Results:
    shape = ctx.input(0).shape
    start, end = int(ctx.attr("start", 0)), ctx.attr("end")
    return [ctx.constant(np.asarray(shape[start : None if end is None else int(end)], np.int64))]


@converter("Size")
def _size(ctx: OpContext) -> Results:
    return [ctx.constant(np.asarray(ctx.input(0).type.size, np.int64))]


@converter("ConstantOfShape")
def _constant_of_shape(ctx: OpContext) -> Results:
    shape = tuple(int(d) for d in ctx.static(0, "shape").reshape(-1))
    fill, dtype = np.zeros(1, np.float32), DType.FLOAT32
    if "value" in ctx.attrs:
        fill, dtype = ctx.tensor(ctx.attrs["value"], "value")
    check_folded_size(shape, dtype, "the result of ConstantOfShape")
    return [ctx.constant(np.full(shape, fill.reshape(-1)[0], dtype.numpy), dtype=dtype)]


@converter("Identity")
def _identity(ctx: OpContext) -> Results:
    return [ctx.input(0)]


@converter("Dropout")
def _dropout(ctx: OpContext) -> Results:
    training = ctx.get(2)
    if training is not None and ctx.static(2, "training_mode").any():
        raise UnsupportedOpError("it is in training mode; export the model for inference")
    x = ctx.input(0)
    if not any(ctx.wanted[1:]):
        return [x]
    mask = DType.BOOL if ctx.version >= 10 else x.dtype
    check_folded_size(x.shape, mask, "the mask of Dropout")
    return [x, ctx.constant(np.ones(x.shape, mask.numpy), dtype=mask)]


# ------------------------------------------------------------------------------- reshaping


@converter("Reshape")
def _reshape(ctx: OpContext) -> Results:
    x = ctx.input(0)
    wish = [int(d) for d in ctx.static(1, "shape").reshape(-1)]
    if not ctx.attr("allowzero", 0):
        if any(d == 0 and i >= x.type.rank for i, d in enumerate(wish)):
            raise ShapeError(f"shape {wish} copies an extent that {list(x.shape)} does not have")
        wish = [x.shape[i] if d == 0 else d for i, d in enumerate(wish)]
    if wish.count(-1) > 1:
        raise ShapeError(f"shape {wish} leaves several extents open")
    if -1 in wish:
        rest = math.prod(d for d in wish if d != -1)
        if rest == 0 or x.type.size % rest:
            raise ShapeError(f"cannot reshape {list(x.shape)} to {wish}")
        wish[wish.index(-1)] = x.type.size // rest
    return [reshape(ctx, x, wish)]


@converter("Flatten")
def _flatten(ctx: OpContext) -> Results:
    x = ctx.input(0)
    raw = int(ctx.attr("axis", 1))
    axis = x.type.rank if raw == x.type.rank else normal_axis(raw, x.type.rank)
    return [reshape(ctx, x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))]


@converter("Squeeze")
def _squeeze(ctx: OpContext) -> Results:
    x = ctx.input(0)
    axes = ctx.ints(1, "axes")
    if axes is None:
        return [reshape(ctx, x, [d for d in x.shape if d != 1])]
    gone = {normal_axis(a, x.type.rank) for a in axes}
    if any(x.shape[a] != 1 for a in gone):
        raise ShapeError(f"cannot squeeze axes {sorted(gone)} of shape {list(x.shape)}")
    return [reshape(ctx, x, [d for i, d in enumerate(x.shape) if i not in gone])]


@converter("Unsqueeze")
def _unsqueeze(ctx: OpContext) -> Results:
    x = ctx.input(0)
    axes = ctx.ints(1, "axes") or ()
    rank = x.type.rank + len(axes)
    new = {normal_axis(a, rank) for a in axes}
    if len(new) != len(axes):
        raise ShapeError(f"axes {list(axes)} are not distinct")
    old = iter(x.shape)
    return [reshape(ctx, x, [1 if i in new else next(old) for i in range(rank)])]


@converter("Transpose")
def _transpose(ctx: OpContext) -> Results:
    x = ctx.input(0)
    perm = tuple(int(p) for p in ctx.attr("perm") or range(x.type.rank)[::-1])
    if perm == tuple(range(x.type.rank)):
        return [x]
    return [ctx.emit("transpose", x, perm=perm)]


@converter("Expand")
def _expand(ctx: OpContext) -> Results:
    x = ctx.input(0)
    wish = tuple(int(d) for d in ctx.static(1, "shape").reshape(-1))
    rank = max(x.type.rank, len(wish))
    mine = (1,) * (rank - x.type.rank) + x.shape
    theirs = (1,) * (rank - len(wish)) + wish
    if any(a != b and 1 not in (a, b) for a, b in zip(mine, theirs, strict=True)):
        raise ShapeError(f"cannot expand {list(x.shape)} to {list(wish)}")
    shape = tuple(b if a == 1 else a for a, b in zip(mine, theirs, strict=True))
    return [x if shape == x.shape else ctx.emit("expand", x, shape=shape)]


@converter("Tile")
def _tile(ctx: OpContext) -> Results:
    x = ctx.input(0)
    repeats = tuple(int(r) for r in ctx.static(1, "repeats").reshape(-1))
    return [x if set(repeats) <= {1} else ctx.emit("tile", x, repeats=repeats)]


# ------------------------------------------------------------------- joining and selecting


@converter("Concat")
def _concat(ctx: OpContext) -> Results:
    operands = [ctx.input(i) for i in range(len(ctx.inputs))]
    axis = ctx.axis(1, operands[0].type.rank)
    full = [v for v in operands if v.type.rank <= axis or v.shape[axis] != 0] or operands[:1]
    grids = [v.qparams for v in full if v.qparams is not None]
    for v in full if grids else ():
        if v.qparams is None:  # as a cache that the model extends by what it quantizes
            takes_on(ctx, v, grids[0])
    return [full[0] if len(full) == 1 else ctx.emit("concat", *full, axis=axis)]


@converter("Split")
def _split(ctx: OpContext) -> Results:
    x = ctx.input(0)
    axis = ctx.axis(0, x.type.rank)
    extent, count = x.shape[axis], len(ctx.wanted)
    sizes = ctx.ints(1, "split")
    if sizes is None:
        if ctx.version < 18 and extent % count:
            raise ShapeError(f"axis {axis} of {list(x.shape)} does not split into {count}")
        chunk = -(-extent // count)
        sizes = tuple(max(0, min(chunk, extent - i * chunk)) for i in range(count))
    if len(sizes) != count or sum(sizes) != extent:
        raise ShapeError(f"cannot split axis {axis} of {list(x.shape)} into {list(sizes)}")
    if count == 1:
        return [x]
    return ctx.builder.emit("split", [x], {"axis": axis, "sizes": sizes}, ctx.name)


@converter("Slice")
def _slice(ctx: OpContext) -> Results:
    x = ctx.input(0)
    starts, ends = ctx.ints(1, "starts"), ctx.ints(2, "ends")
    if starts is None or ends is None or len(starts) != len(ends):
        raise ShapeError("starts and ends must be given and have the same length")
    axes = ctx.ints(3, "axes") or tuple(range(len(starts)))
    steps = ctx.ints(4, "steps") or (1,) * len(starts)
    if not len(axes) == len(steps) == len(starts):
        raise ShapeError("starts, ends, axes and steps differ in length")
    picked: dict[int, tuple[int, int, int]] = {}
    for start, end, raw, step in zip(starts, ends, axes, steps, strict=True):
        axis = normal_axis(raw, x.type.rank)
        extent = x.shape[axis]
        if step == 0:
            raise ShapeError(f"the step of axis {axis} is 0")
        if axis in picked:
            raise ShapeError(f"axis {axis} is sliced twice")
        first, last, _ = slice(start, end, step).indices(extent)
        # With a negative step, `-1` would mean the last index: before index 0 is -extent - 1.
        picked[axis] = (first, last if last >= 0 else -extent - 1, step)
    kept = {a: p for a, p in sorted(picked.items()) if p != (0, x.shape[a], 1)}
    if not kept:
        return [x]
    return [
        ctx.emit(
            "slice",
            x,
            starts=tuple(p[0] for p in kept.values()),
            ends=tuple(p[1] for p in kept.values()),
            axes=tuple(kept),
            steps=tuple(p[2] for p in kept.values()),
        )
    ]


@converter("Gather")
def _gather(ctx: OpContext) -> Results:
    x, indices = ctx.input(0), ctx.input(1)
    axis = ctx.axis(0, x.type.rank)
    if indices.data is not None and indices.type.size == 1 and x.data is None:
        # One known index is a slice, which needs no table of indices.
        i = int(indices.data.reshape(-1)[0])
        if not -x.shape[axis] <= i < x.shape[axis]:
            raise ShapeError(f"index {i} is outside axis {axis} of {list(x.shape)}")
        i %= x.shape[axis]
        y = ctx.emit("slice", x, starts=(i,), ends=(i + 1,), axes=(axis,), steps=(1,))
        return [reshape(ctx, y, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))]
    return [ctx.emit("gather", x, indices, axis=axis)]


@converter("Pad")
def _pad(ctx: OpContext) -> Results:
    x = ctx.input(0)
    pads = ctx.ints(1, "pads") or ()
    mode = ctx.attr("mode", "constant") or "constant"
    value: float = 0.0
    filler: Value | None = None
    if ctx.version < 11:
        value = float(ctx.attr("value", 0.0))
    elif ctx.get(2) is not None:
        fill = ctx.known(2)
        if fill is None:
            filler = ctx.input(2)
        elif fill.size:
            value = fill.reshape(-1)[0].item()
    rank = x.type.rank
    if ctx.get(3) is not None:
        axes = [normal_axis(int(a), rank) for a in ctx.static(3, "axes").reshape(-1)]
        if len(pads) != 2 * len(axes):
            raise ShapeError(f"pads {list(pads)} should have {2 * len(axes)} entries")
        full = [0] * (2 * rank)
        for k, a in enumerate(axes):
            full[a], full[rank + a] = pads[k], pads[len(axes) + k]
        pads = tuple(full)
    if len(pads) != 2 * rank:
        raise ShapeError(f"pads {list(pads)} should have {2 * rank} entries")
    crop = [a for a in range(rank) if pads[a] < 0 or pads[rank + a] < 0]
    if crop:
        x = ctx.emit(
            "slice",
            x,
            starts=tuple(max(0, -pads[a]) for a in crop),
            ends=tuple(x.shape[a] + min(0, pads[rank + a]) for a in crop),
            axes=tuple(crop),
            steps=(1,) * len(crop),
        )
        pads = tuple(max(0, p) for p in pads)
    if not any(pads):
        return [x]
    y = ctx.emit("pad", x, pads=pads, mode=mode, value=float(value))
    if filler is None or mode != "constant":
        return [y]
    inside = np.pad(np.ones(x.shape, bool), list(zip(pads[:rank], pads[rank:], strict=True)))
    return [ctx.emit("where", ctx.constant(inside), y, reshape(ctx, filler, (1,) * rank))]


@converter("CumSum")
def _cumsum(ctx: OpContext) -> Results:
    x = ctx.input(0)
    axis = normal_axis(int(ctx.static(1, "axis").reshape(-1)[0]), x.type.rank)
    return [
        ctx.emit(
            "cumsum",
            x,
            axis=axis,
            exclusive=bool(ctx.attr("exclusive", 0)),
            reverse=bool(ctx.attr("reverse", 0)),
        )
    ]


# ---------------------------------------------------------------------------------- images


@converter("DepthToSpace")
def _depth_to_space(ctx: OpContext) -> Results:
    return [
        ctx.emit(
            "depth_to_space",
            ctx.input(0),
            blocksize=int(ctx.attr("blocksize")),
            mode=str(ctx.attr("mode", "DCR")),
        )
    ]


@converter("SpaceToDepth")
def _space_to_depth(ctx: OpContext) -> Results:
    x, block = ctx.input(0), int(ctx.attr("blocksize"))
    if ctx.attr("mode", "DCR") == "DCR" or x.type.rank != 4 or block < 1:
        return [ctx.emit("space_to_depth", x, blocksize=block)]
    # CRD (opset 28): channels outermost, then the place inside the block.
    n, c, h, w = x.shape
    if h % block or w % block:
        raise ShapeError(f"blocks of {block} do not divide data of shape {list(x.shape)}")
    y = reshape(ctx, x, (n, c, h // block, block, w // block, block))
    y = ctx.emit("transpose", y, perm=(0, 1, 3, 5, 2, 4))
    return [reshape(ctx, y, (n, c * block * block, h // block, w // block))]


@converter("Upsample")
def _upsample(ctx: OpContext) -> Results:
    x = ctx.input(0)
    raw = ctx.attr("scales", ()) if ctx.version < 9 else ctx.static(1, "scales").reshape(-1)
    return [_legacy_resize(ctx, x, [float(s) for s in raw])]


def _legacy_resize(ctx: OpContext, x: Value, scales: Sequence[float]) -> Value:
    """Upsample and Resize-10: cell i of the result reads the input at i / scale.

    ONNX leaves the rounding of `nearest` open; ONNX Runtime rounds down where the axis grows and
    up where it shrinks, so that axes of both kinds take two steps.
    """
    mode = str(ctx.attr("mode", "nearest"))
    mode = {"bilinear": "linear", "trilinear": "linear"}.get(mode, mode)
    if len(scales) != x.type.rank:
        raise ShapeError(f"scales {list(scales)} should have {x.type.rank} entries")
    steps = [("floor", list(scales))]
    if mode == "nearest" and min(scales) < 1:
        grow, shrink = [max(s, 1.0) for s in scales], [min(s, 1.0) for s in scales]
        steps = [("ceil", shrink), ("floor", grow)]
    for nearest_mode, factors in steps:
        if any(f != 1.0 for f in factors):
            x = ctx.emit(
                "resize",
                x,
                mode=mode,
                coordinate_mode="asymmetric",
                nearest_mode=nearest_mode,
                scales=tuple(factors),
                shape=tuple(math.floor(d * f) for d, f in zip(x.shape, factors, strict=True)),
            )
    return x


@converter("Resize")
def _resize(ctx: OpContext) -> Results:
    x = ctx.input(0)
    if ctx.version < 11:
        return [_legacy_resize(ctx, x, [float(s) for s in ctx.static(1, "scales").reshape(-1)])]
    coordinate_mode = str(ctx.attr("coordinate_transformation_mode", "half_pixel"))
    if coordinate_mode == "tf_crop_and_resize":
        return None
    axes = [normal_axis(int(a), x.type.rank) for a in ctx.attr("axes") or range(x.type.rank)]
    scales, shape = _resize_target(ctx, x, axes)
    if shape == x.shape:
        return [x]
    attrs: dict[str, AttrValue] = {
        "mode": str(ctx.attr("mode", "nearest")),
        "coordinate_mode": coordinate_mode,
        "nearest_mode": str(ctx.attr("nearest_mode", "round_prefer_floor")),
        "cubic_coeff_a": float(ctx.attr("cubic_coeff_a", -0.75)),
        "exclude_outside": bool(ctx.attr("exclude_outside", 0)),
        "extrapolation_value": float(ctx.attr("extrapolation_value", 0.0)),
        "antialias": bool(ctx.attr("antialias", 0)),
        "scales": scales,
        "shape": shape,
    }
    wanted = (d * s for d, s in zip(x.shape, scales, strict=True))
    fractional = any(abs(w - n) > 1e-4 for w, n in zip(wanted, shape, strict=True))
    if coordinate_mode == "align_corners" and fractional and attrs["mode"] != "nearest":
        return [_resampled(ctx, x, attrs, scales, shape)]
    return [ctx.emit("resize", x, **attrs)]


def _resampled(
    ctx: OpContext,
    x: Value,
    attrs: Mapping[str, AttrValue],
    scales: Sequence[float],
    shape: Sequence[int],
) -> Value:
    """Resize by a matrix per axis: corners are aligned with a size that is no whole number."""
    for a, (scale, extent) in enumerate(zip(scales, shape, strict=True)):
        if scale == 1 and extent == x.shape[a]:
            continue
        matrix = weights(x.shape[a], extent, scale, attrs, scale * x.shape[a])
        if x.dtype is not DType.FLOAT32:
            raise UnsupportedOpError(f"corners of {x.dtype.value} are not aligned")
        last = x.type.rank - 1
        order = tuple(last if i == a else a if i == last else i for i in range(last + 1))
        turned = ctx.emit("transpose", x, perm=order) if a != last else x
        y = ctx.emit("matmul", turned, ctx.constant(matrix.T.astype(np.float32)))
        x = ctx.emit("transpose", y, perm=order) if a != last else y
    return x


def _resize_target(
    ctx: OpContext, x: Value, axes: Sequence[int]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return (scales, shape) with one entry per axis, from the `scales` or `sizes` operand."""
    scales, shape = [1.0] * x.type.rank, list(x.shape)
    given = ctx.get(2)
    if given is not None and given.type.size:
        wish = [float(s) for s in ctx.static(2, "scales").reshape(-1)]
        _check_count(wish, axes, "scales")
        for a, s in zip(axes, wish, strict=True):
            scales[a], shape[a] = s, math.floor(x.shape[a] * s)
        return tuple(scales), tuple(shape)
    if ctx.get(3) is None:
        raise ShapeError("neither scales nor sizes are given")
    sizes = [int(s) for s in ctx.static(3, "sizes").reshape(-1)]
    _check_count(sizes, axes, "sizes")
    policy = str(ctx.attr("keep_aspect_ratio_policy", "stretch"))
    if policy == "stretch":
        for a, n in zip(axes, sizes, strict=True):
            scales[a], shape[a] = n / x.shape[a], n
        return tuple(scales), tuple(shape)
    pick = min if policy == "not_larger" else max
    common = pick(n / x.shape[a] for a, n in zip(axes, sizes, strict=True))
    for a in axes:
        scales[a], shape[a] = common, math.floor(common * x.shape[a] + 0.5)
    return tuple(scales), tuple(shape)


def _check_count(values: Sequence[float], axes: Sequence[int], what: str) -> None:
    if len(values) != len(axes):
        raise ShapeError(f"{what} {list(values)} should have {len(axes)} entries")
