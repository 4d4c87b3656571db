# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Kernels that move elements: concat, pad, slice, remap, gather, resize.

All work on any dtype and copy contiguous runs by vectors; quantized types keep their codes.

* `concat`: inputs in order, then the output.
* `pad`: constant padding.
* `strided`: y[i, j, ...] = x[start + step * i, ...]: slice, crop, expand (step 0).
* `remap`: y[i, j, ...] = x[map0[i], map1[j], ...] with constant maps (`pack_maps`): nearest resize,
  tile, reflecting pad, gather with constant indices.
* `gather`: rows of an axis by indices known at run time, as in an embedding; negative indices count
  from the end, and indices out of range are limited to it.
* `resize_linear`: bilinear float32 NHWC with constant positions (`pack_positions`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.layout import copy_run, raw, raw_dtype
from qcompiler.targets.kernels.simd import (
    ITEM_BYTES,
    loop,
    unravel,
    vector_spans,
    worth_threads,
)
from qcompiler.targets.kernels.tir import Buffer, Expr, PrimFuncBuilder
from qcompiler.targets.kernels.workload import FLOATS

__all__ = [
    "ConcatWorkload",
    "GatherWorkload",
    "PadWorkload",
    "RemapWorkload",
    "ResizeLinearWorkload",
    "StridedWorkload",
    "concat",
    "fill_run",
    "gather",
    "pack_maps",
    "pack_positions",
    "pad",
    "remap",
    "resize_linear",
    "strided",
]

Shape = tuple[int, ...]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class ConcatWorkload:
    """Concatenation along `axis`; buffers: the inputs, y."""

    shapes: tuple[Shape, ...]
    axis: int
    dtype: str

    @property
    def out_shape(self) -> Shape:
        """Shape of the output."""
        axis = self.axis % len(self.shapes[0])
        first = self.shapes[0]
        return (*first[:axis], sum(s[axis] for s in self.shapes), *first[axis + 1 :])


@dataclass(frozen=True, slots=True)
class PadWorkload:
    """Padding by a constant; buffers: x, y."""

    shape: Shape
    before: tuple[int, ...]
    after: tuple[int, ...]
    dtype: str
    value: float
    """In storage: the zero point, for quantized types."""

    @property
    def out_shape(self) -> Shape:
        """Shape of the output."""
        sizes = zip(self.shape, self.before, self.after, strict=True)
        return tuple(size + b + a for size, b, a in sizes)


@dataclass(frozen=True, slots=True)
class StridedWorkload:
    """`y[i...] = x[starts + steps * i]`; buffers: x, y."""

    shape: Shape
    """Of the input."""
    out_shape: Shape
    """Of the same rank."""
    starts: tuple[int, ...]
    steps: tuple[int, ...]
    """Negative steps go backwards, 0 repeats."""
    dtype: str


@dataclass(frozen=True, slots=True)
class RemapWorkload:
    """`y[i, j, ...] = x[maps[0][i], maps[1][j], ...]`; buffers: x, packed maps, y."""

    shape: Shape
    out_shape: Shape
    """Of the same rank."""
    mapped: tuple[bool, ...]
    """Which axes have a map; the others must have equal extents."""
    dtype: str


@dataclass(frozen=True, slots=True)
class GatherWorkload:
    """`take(data, indices, axis)`; buffers: data, indices, y."""

    shape: Shape
    """Of the data."""
    axis: int
    indices_shape: Shape
    indices_dtype: str
    """int32 or int64."""
    dtype: str

    @property
    def out_shape(self) -> Shape:
        """Shape of the output."""
        axis = self.axis % len(self.shape)
        return (*self.shape[:axis], *self.indices_shape, *self.shape[axis + 1 :])


@dataclass(frozen=True, slots=True)
class ResizeLinearWorkload:
    """Bilinear float32 `[N, H, W, C]`; buffers: x, places, weights, y."""

    n: int
    h: int
    w: int
    c: int
    out_h: int
    out_w: int


def _lanes(isa: Isa, dtype: str) -> int:
    return isa.vector_bits // 8 // ITEM_BYTES[dtype]


def _threads(shape: Sequence[int], dtype: str, per_item: float = 0.0) -> bool:
    return worth_threads(prod(shape) * (ITEM_BYTES[dtype] / 8.0 + per_item))


def concat(workload: ConcatWorkload, isa: Isa) -> Any:
    """Generate `concat`."""
    w = workload
    axis = w.axis % len(w.shapes[0])
    outer = prod(w.shapes[0][:axis])
    runs = [prod(shape[axis:]) for shape in w.shapes]
    lanes = _lanes(isa, w.dtype)
    threads = _threads(w.out_shape, w.dtype)
    with PrimFuncBuilder("concat") as builder:
        inputs = [builder.argument(f"x{i}", shape, w.dtype) for i, shape in enumerate(w.shapes)]
        y = builder.argument("y", w.out_shape, w.dtype)
        sources, target = [raw(x, w.dtype) for x in inputs], raw(y, w.dtype)
        # A single outer row of long runs is cut into pieces for the threads.
        pieces = 16 if threads and outer < 8 else 1
        with loop(outer * pieces, threads=threads) as flat:
            row, piece = unravel(flat, [outer, pieces])
            begin = 0
            for source, run in zip(sources, runs, strict=True):
                to = tir.bind(row * sum(runs) + begin)
                start = tir.bind(row * run)
                if pieces > 1 and run >= pieces * lanes:
                    size = -(-run // pieces)
                    shift = tir.bind(T.min(piece * size, run - size))
                    copy_run(target, to + shift, source, start + shift, size, lanes)
                elif pieces > 1:
                    with tir.when(piece == 0):
                        copy_run(target, to, source, start, run, lanes)
                else:
                    copy_run(target, to, source, start, run, lanes)
                begin += run
    return builder.finish()


def fill_run(target: Buffer, to: Expr, value: Expr, count: int, lanes: int) -> None:
    """Store one value `count` times by vectors of `lanes`."""
    dtype = tir.dtype_of(value)
    for offset, repetitions, width in vector_spans(count, lanes, overlap=True):
        with loop(repetitions) as k:
            tir.store(target, to + k * width + offset, tir.splat(value, dtype, width))


def pad(workload: PadWorkload, isa: Isa) -> Any:
    """Generate `pad`."""
    w = workload
    out = w.out_shape
    padded = [k for k in range(len(out)) if w.before[k] or w.after[k]]
    last = padded[-1] if padded else len(out) - 1
    inner = prod(out[last + 1 :])
    lanes = _lanes(isa, w.dtype)
    strides = [prod(w.shape[k + 1 :]) for k in range(len(out))]
    with PrimFuncBuilder("pad") as builder:
        x = builder.argument("x", w.shape, w.dtype)
        y = builder.argument("y", out, w.dtype)
        source, target = raw(x, w.dtype), raw(y, w.dtype)
        number = float(w.value) if w.dtype in FLOATS else int(w.value)
        value = tir.splat(number, raw_dtype(w.dtype), 1)
        run = out[last] * inner
        with loop(prod(out[:last]), threads=_threads(out, w.dtype)) as row:
            indices = unravel(row, out[:last])
            to = tir.bind(row * run)

            def copy(to: Expr = to, indices: list[Expr] = indices) -> None:
                start = tir.splat(0, "int32", 1)
                for k, index in enumerate(indices):
                    start = start + (index - w.before[k]) * strides[k]
                fill_run(target, to, value, w.before[last] * inner, lanes)
                held = w.before[last] * inner
                copy_run(
                    target,
                    tir.bind(to + held),
                    source,
                    tir.bind(start),
                    w.shape[last] * inner,
                    lanes,
                )
                held += w.shape[last] * inner
                fill_run(target, tir.bind(to + held), value, w.after[last] * inner, lanes)

            inside: Expr = None
            for k in padded[:-1]:
                here = T.And(indices[k] >= w.before[k], indices[k] < w.before[k] + w.shape[k])
                inside = here if inside is None else T.And(inside, here)
            if inside is None:
                copy()
            else:
                with T.If(inside):
                    with T.Then():
                        copy()
                    with T.Else():
                        fill_run(target, to, value, run, lanes)
    return builder.finish()


def strided(workload: StridedWorkload, isa: Isa) -> Any:
    """Generate a strided copy.

    Raises:
        CodegenError: an index would fall outside the input.
    """
    w = workload
    for k, (size, count) in enumerate(zip(w.shape, w.out_shape, strict=True)):
        ends = (w.starts[k], w.starts[k] + w.steps[k] * (count - 1))
        if min(ends) < 0 or max(ends) >= size:
            raise CodegenError(f"strided: axis {k} of {w} reads {ends[0]} to {ends[1]} of {size}")
    whole = [
        size == count and start == 0 and (step == 1 or size == 1)
        for size, count, start, step in zip(w.shape, w.out_shape, w.starts, w.steps, strict=True)
    ]
    with PrimFuncBuilder("strided") as builder:
        x = builder.argument("x", w.shape, w.dtype)
        y = builder.argument("y", w.out_shape, w.dtype)
        steps = [
            1 if count == 1 else step for step, count in zip(w.steps, w.out_shape, strict=True)
        ]
        _copy_mapped(
            isa, w.dtype, w.shape, w.out_shape, whole, steps, raw(x, w.dtype), raw(y, w.dtype),
            lambda axis, index: index * w.steps[axis] + w.starts[axis],
        )  # fmt: skip
    return builder.finish()


def _copy_mapped(
    isa: Isa,
    dtype: str,
    shape: Shape,
    out: Shape,
    whole: Sequence[bool],
    steps: Sequence[int | None],
    source: Buffer,
    target: Buffer,
    place: Callable[[int, Expr], Expr],
) -> None:
    """y[i...] = x[place(axis, i)...].

    Trailing axes that are copied whole form a run; so does the axis before them where its step is
    1.  `steps` is None where the places are not evenly spaced.
    """
    last = len(out) - 1
    while last >= 0 and whole[last]:
        last -= 1
    inner = prod(out[last + 1 :])
    lanes = _lanes(isa, dtype)
    strides = [prod(shape[k + 1 :]) for k in range(len(shape))]
    joined = last >= 0 and steps[last] == 1
    axes = range(last if joined else last + 1)
    count = inner * (out[last] if joined else 1)
    # Single elements one by one are the innermost loop.
    single = bool(axes) and not joined and inner == 1
    outer = [out[k] for k in axes][: -1 if single else None]
    with loop(prod(outer), threads=_threads(out, dtype, 1.0 if single else 0.0)) as flat:
        indices = unravel(flat, outer)
        start = tir.splat(0, "int32", 1)
        for k, index in enumerate(indices):
            start = start + place(k, index) * strides[k]
        if joined:
            start = start + place(last, tir.splat(0, "int32", 1)) * strides[last]
        start = tir.bind(start)
        if not single:
            copy_run(target, tir.bind(flat * count), source, start, count, lanes)
            return
        with loop(out[last]) as index:
            value = tir.load(source, start + place(last, index) * strides[last], 1)
            tir.store(target, flat * out[last] + index, value)


def pack_maps(maps: Sequence[Sequence[int] | None], workload: RemapWorkload) -> Array:
    """The maps of all axes that have one, joined; int32.

    Raises:
        CodegenError: a map has another length than its axis or leads outside the input.
    """
    parts = []
    for axis, table in enumerate(maps):
        if (table is not None) != workload.mapped[axis]:
            raise CodegenError(f"pack_maps: axis {axis} does not fit {workload}")
        if table is None:
            continue
        values = np.asarray(table, np.int32)
        if values.shape != (workload.out_shape[axis],):
            raise CodegenError(
                f"pack_maps: axis {axis} has {values.shape}, expected {workload.out_shape[axis]}"
            )
        if values.min() < 0 or values.max() >= workload.shape[axis]:
            raise CodegenError(f"pack_maps: axis {axis} leads outside {workload.shape[axis]}")
        parts.append(values)
    return np.concatenate(parts) if parts else np.zeros(1, np.int32)


def remap(workload: RemapWorkload, isa: Isa) -> Any:
    """Generate a copy with constant index maps.

    Raises:
        CodegenError: an axis without a map changes its extent.
    """
    w = workload
    for axis, (size, count) in enumerate(zip(w.shape, w.out_shape, strict=True)):
        if not w.mapped[axis] and size != count:
            raise CodegenError(f"remap: axis {axis} has no map and changes its extent: {w}")
    starts, length = [], 0
    for axis, mapped in enumerate(w.mapped):
        starts.append(length)
        length += w.out_shape[axis] if mapped else 0
    with PrimFuncBuilder("remap") as builder:
        x = builder.argument("x", w.shape, w.dtype)
        maps = builder.argument("maps", (max(length, 1),), "int32")
        y = builder.argument("y", w.out_shape, w.dtype)

        def place(axis: int, index: Expr) -> Expr:
            return maps[index + starts[axis]] if w.mapped[axis] else index

        whole = [not mapped for mapped in w.mapped]
        steps = [None if mapped else 1 for mapped in w.mapped]
        source, target = raw(x, w.dtype), raw(y, w.dtype)
        _copy_mapped(isa, w.dtype, w.shape, w.out_shape, whole, steps, source, target, place)
    return builder.finish()


def gather(workload: GatherWorkload, isa: Isa) -> Any:
    """Generate `gather`."""
    w = workload
    axis = w.axis % len(w.shape)
    size = w.shape[axis]
    outer, inner = prod(w.shape[:axis]), prod(w.shape[axis + 1 :])
    count = prod(w.indices_shape)
    lanes = _lanes(isa, w.dtype)
    with PrimFuncBuilder("gather") as builder:
        data = builder.argument("data", w.shape, w.dtype)
        indices = builder.argument("indices", w.indices_shape, w.indices_dtype)
        y = builder.argument("y", w.out_shape, w.dtype)
        source, target = raw(data, w.dtype), raw(y, w.dtype)
        picks = tir.flat(indices)
        with loop(outer * count, threads=_threads(w.out_shape, w.dtype, 1.0 / inner)) as flat:
            row, k = unravel(flat, [outer, count])
            index = tir.bind(tir.load(picks, k, 1))
            low = T.max(index, tir.splat(-size, w.indices_dtype, 1))
            high = tir.bind(T.min(low, tir.splat(size - 1, w.indices_dtype, 1)))
            place = tir.bind(tir.cast(high, "int32"))
            place = tir.bind(T.Select(place < 0, place + size, place))
            start = tir.bind((row * size + place) * inner)
            copy_run(target, tir.bind(flat * inner), source, start, inner, lanes)
    return builder.finish()


def pack_positions(
    rows: npt.NDArray[np.float64], columns: npt.NDArray[np.float64], workload: ResizeLinearWorkload
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Pack fractional source positions, one for each output row and column.

    Positions outside the input are limited to it.

    Returns:
        places: int32, lower and upper source row of each output row, then of each column.
        weights: float32, share of the upper one.
    """
    places, weights = [], []
    for position, size in ((rows, workload.h), (columns, workload.w)):
        held = np.clip(position, 0.0, size - 1.0)
        low = np.minimum(np.floor(held), size - 1).astype(np.int32)
        high = np.minimum(low + 1, size - 1).astype(np.int32)
        places += [low, high]
        weights.append((held - low).astype(np.float32))
    return np.concatenate(places), np.concatenate(weights)


def resize_linear(workload: ResizeLinearWorkload, isa: Isa) -> Any:
    """Generate a bilinear resize."""
    w = workload
    out = (w.n, w.out_h, w.out_w, w.c)
    lanes = isa.lanes()
    with PrimFuncBuilder("resize_linear") as builder:
        x = builder.argument("x", (w.n, w.h, w.w, w.c), "float32")
        places = builder.argument("places", (2 * (w.out_h + w.out_w),), "int32")
        weights = builder.argument("weights", (w.out_h + w.out_w,), "float32")
        y = builder.argument("y", out, "float32")
        source, target = tir.flat(x), tir.flat(y)
        with loop(w.n * w.out_h, threads=worth_threads(prod(out) * 8.0 / lanes)) as flat:
            image, oy = unravel(flat, [w.n, w.out_h])
            rows = [
                tir.bind((image * w.h + tir.load(places, oy + k * w.out_h, 1)) * w.w)
                for k in range(2)
            ]
            down = tir.bind(tir.load(weights, oy, 1))
            with loop(w.out_w) as ox:
                columns = [
                    tir.bind(tir.load(places, ox + (2 * w.out_h + k * w.out_w), 1))
                    for k in range(2)
                ]
                right = tir.bind(tir.load(weights, ox + w.out_h, 1))
                to = tir.bind((flat * w.out_w + ox) * w.c)
                starts = [[tir.bind((r + c) * w.c) for c in columns] for r in rows]
                for offset, count, width in vector_spans(w.c, lanes, overlap=True):
                    with loop(count) as k:
                        at = tir.bind(k * width + offset)
                        across = tir.splat(right, "float32", width)
                        lines = []
                        for left, other in starts:
                            a = tir.bind(tir.load(source, left + at, width))
                            b = tir.load(source, other + at, width)
                            lines.append(tir.bind(a + (b - a) * across))
                        value = lines[0] + (lines[1] - lines[0]) * tir.splat(down, "float32", width)
                        tir.store(target, to + at, value)
    return builder.finish()
