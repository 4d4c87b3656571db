# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Pooling and reductions: max_pool, average pools, means over spatial axes.

Windowed kernels are NHWC and vectorised over channels; the buffers are the input, for averages the
packed table of `pack_counts` (one number for each output position), and the output.

`reduce` folds the middle axis of `[outer, reduced, inner]`, which covers any run of neighbouring
axes: the spatial axes of NHWC have inner = C, those of NCHW inner = 1.

Integer averages: acc = sum(x - zero_point) in int32 over the taps inside, then
`clamp(rint(f32(acc) * M) + out_zero_point, qmin, qmax)` with M = f32(s_in / (s_out * count)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.simd import (
    ITEM_BYTES,
    STORAGE_RANGE,
    exact_mul,
    loop,
    quantized,
    reduce_lanes,
    stack,
    vector_spans,
    worth_threads,
)
from qcompiler.targets.kernels.tir import Buffer, Expr, PrimFuncBuilder
from qcompiler.targets.kernels.window import Pixel, Window, sweep

__all__ = [
    "Averaging",
    "PoolWorkload",
    "ReduceWorkload",
    "average_pool",
    "max_pool",
    "pack_counts",
    "reduce",
]


@dataclass(frozen=True, slots=True)
class Averaging:
    """How the sums of a quantized average become outputs."""

    zero_point: int
    """Of the input."""
    dtype: str
    """Of the output: uint8, int8, int16, or float32 (then not rounded to an integer)."""
    scale: float
    """Of the input."""
    out_scale: float = 1.0
    out_zero_point: int = 0
    qmin: int = 0
    qmax: int = 0

    def factors(self, count: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """The multiplier for each count."""
        exact = np.float64(self.scale) / (np.float64(self.out_scale) * count)
        return np.asarray(exact, np.float32)


@dataclass(frozen=True, slots=True)
class PoolWorkload:
    """A pooling window over `[N, H, W, C]`; the output extents say what ceil_mode chose."""

    window: Window
    channels: int
    dtype: str
    """Of the input: uint8, int8, int16, float32 or float16."""
    averaging: Averaging | None = None
    """For quantized averages."""
    count_include_pad: bool = False
    """Averages divide by all taps in the declared padding too."""
    float_out: str | None = None
    """Dtype of a float average where it is not the input's; it is computed in float32."""

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of the input."""
        return (self.window.n, *self.window.size, self.channels)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output."""
        return (self.window.n, *self.window.out, self.channels)

    @property
    def out_dtype(self) -> str:
        """Dtype of the output."""
        given = self.float_out or self.dtype
        return given if self.averaging is None else self.averaging.dtype


@dataclass(frozen=True, slots=True)
class ReduceWorkload:
    """Fold `[outer, reduced, inner]` over the middle axis."""

    operation: str
    """"mean" (quantized with `averaging`, else float32), "sum", "max" or "min"."""
    in_shape: tuple[int, ...]
    """As the buffer is declared; its elements are outer * reduced * inner."""
    out_shape: tuple[int, ...]
    outer: int
    reduced: int
    inner: int
    dtype: str
    """Of the input: a float, folded in float32, or 8- or 16-bit for "max", "min" and quantized
    means."""
    averaging: Averaging | None = field(default=None)
    float_out: str | None = None
    """Dtype of a float result where it is not the input's."""

    @property
    def out_dtype(self) -> str:
        """Dtype of the output."""
        given = self.float_out or self.dtype
        return given if self.averaging is None else self.averaging.dtype


def _lowest(dtype: str) -> float:
    return STORAGE_RANGE[dtype][0] if dtype in STORAGE_RANGE else float("-inf")


def _highest(dtype: str) -> float:
    return STORAGE_RANGE[dtype][1] if dtype in STORAGE_RANGE else float("inf")


def _channel_lanes(isa: Isa, dtype: str) -> int:
    """Lanes of one register of `dtype`."""
    return isa.vector_bits // 8 // ITEM_BYTES[dtype]


# Windows.


def max_pool(workload: PoolWorkload, isa: Isa) -> Any:
    """Generate `max_pool`; taps outside the input do not count."""
    w = workload
    lanes = _channel_lanes(isa, w.dtype)

    def emit(x: Buffer, y: Buffer, pixel: Pixel, channel: Expr, width: int) -> None:
        def tap(place: Expr) -> Expr:
            return tir.load(x, place * w.channels + channel, width)

        if pixel.interior:
            best: list[Expr] = []
            for index, places in pixel.unrolled():
                values = [tap(place) for place in places]
                best = [
                    tir.bind(value if index == 0 else T.max(best[i], value))
                    for i, value in enumerate(values)
                ]
        else:
            slot = stack(width, w.dtype)
            tir.store(slot, 0, tir.splat(_lowest(w.dtype), w.dtype, width))
            with pixel.looped() as (_, place):
                tir.store(slot, 0, T.max(tir.load(slot, 0, width), tap(place)))
            best = [tir.load(slot, 0, width)]
        for output, value in zip(pixel.outputs, best, strict=True):
            tir.store(y, output * w.channels + channel, value)

    with PrimFuncBuilder("max_pool") as builder:
        x = builder.argument("x", w.in_shape, w.dtype)
        y = builder.argument("y", w.out_shape, w.dtype)
        flat_x, flat_y = tir.flat(x), tir.flat(y)
        taps = prod(w.window.kernel)
        threads = worth_threads(prod(w.out_shape) / lanes * taps)
        _sweep_channels(
            w, lanes, threads, lambda pixel, c, width: emit(flat_x, flat_y, pixel, c, width)
        )
    return builder.finish()


def _sweep_channels(
    w: PoolWorkload, lanes: int, threads: bool, emit: Callable[[Pixel, Expr, int], None]
) -> None:
    def pixels(pixel: Pixel) -> None:
        for offset, count, width in vector_spans(w.channels, lanes, overlap=True):
            with loop(count) as index:
                emit(pixel, tir.bind(index * width + offset), width)

    sweep(w.window, pixels, tile=2, threads=threads)


def pack_counts(workload: PoolWorkload) -> npt.NDArray[np.float32]:
    """The packed constant of an average pool, one number for each output position [OH * OW].

    Quantized: the multiplier.  Float: the count.  A window with no tap at all counts as one.
    """
    w = workload.window
    count = w.count_padded if workload.count_include_pad else w.count_inside
    high = np.array([count(0, y) for y in range(w.out[0])], np.float64)
    wide = np.array([count(1, x) for x in range(w.out[1])], np.float64)
    counts = np.outer(high, wide).reshape(-1)
    safe = np.maximum(counts, 1.0)
    if workload.averaging is None:
        return safe.astype(np.float32)
    return workload.averaging.factors(safe)


def average_pool(workload: PoolWorkload, isa: Isa) -> Any:
    """Generate an average pool: quantized where the workload has `averaging`, else float32."""
    w = workload
    quantizing = w.averaging is not None
    acc_dtype = "int32" if quantizing else "float32"
    lanes = _channel_lanes(isa, "uint8" if ITEM_BYTES[w.dtype] == 1 else "int16")
    if not quantizing:
        lanes = isa.lanes() * 2
    positions = prod(w.window.out)
    with PrimFuncBuilder("average_pool") as builder:
        x = builder.argument("x", w.in_shape, w.dtype)
        table = builder.argument("counts", (positions,), "float32")
        y = builder.argument("y", w.out_shape, w.out_dtype)
        flat_x, flat_y = tir.flat(x), tir.flat(y)
        zero = 0 if w.averaging is None else w.averaging.zero_point

        def emit(pixel: Pixel, channel: Expr, width: int) -> None:
            def tap(place: Expr) -> Expr:
                return tir.cast(tir.load(flat_x, place * w.channels + channel, width), acc_dtype)

            nothing = tir.splat(0, acc_dtype, width)
            if pixel.interior:
                sums = [nothing] * pixel.count
                for _, places in pixel.unrolled():
                    sums = [
                        tir.bind(total + tap(place))
                        for total, place in zip(sums, places, strict=True)
                    ]
                inside: Expr = tir.splat(prod(w.window.kernel), "int32", 1)
            else:
                slot = stack(width, acc_dtype)
                tir.store(slot, 0, nothing)
                with pixel.looped() as (_, place):
                    tir.store(slot, 0, tir.load(slot, 0, width) + tap(place))
                sums = [tir.bind(tir.load(slot, 0, width))]
                _, y_begin, y_end = w.window.taps(0, pixel.row)
                _, x_begin, x_end = w.window.taps(1, pixel.column)
                inside = (y_end - y_begin) * (x_end - x_begin)
            for output, total in zip(pixel.outputs, sums, strict=True):
                factor = tir.load(table, T.floormod(output, positions), 1)
                factors = tir.splat(factor, "float32", width)
                if w.averaging is None:
                    value = tir.cast(total / factors, w.out_dtype)
                else:
                    if zero:
                        total = total - tir.splat(inside * zero, "int32", width)
                    value = _averaged(isa, total, factors, w.averaging)
                tir.store(flat_y, output * w.channels + channel, value)

        work = prod(w.out_shape) / lanes * prod(w.window.kernel) * 4
        _sweep_channels(w, lanes, worth_threads(work), emit)
    return builder.finish()


def _averaged(isa: Isa, acc: Expr, factors: Expr, averaging: Averaging) -> Expr:
    value = exact_mul(tir.cast(acc, "float32"), factors)
    a = averaging
    if a.dtype == "float32":
        return value
    return quantized(value, a.out_zero_point, a.qmin, a.qmax, a.dtype, isa)


# Reductions.


def reduce(workload: ReduceWorkload, isa: Isa) -> Any:
    """Generate a reduction.

    Raises:
        CodegenError: the extents do not multiply to the shapes, or the operation is not known.
    """
    w = workload
    if prod(w.in_shape) != w.outer * w.reduced * w.inner or prod(w.out_shape) != w.outer * w.inner:
        raise CodegenError(f"reduce: extents do not fit the shapes: {w}")
    if w.operation not in ("mean", "sum", "max", "min"):
        raise CodegenError(f"reduce: expected mean, sum, max or min, got {w.operation!r}")
    with PrimFuncBuilder(f"reduce_{w.operation}") as builder:
        x = builder.argument("x", w.in_shape, w.dtype)
        y = builder.argument("y", w.out_shape, w.out_dtype)
        fold = _Fold(w, isa, tir.flat(x), tir.flat(y))
        if w.inner == 1:
            fold.contiguous()
        else:
            fold.strided()
    return builder.finish()


@dataclass(frozen=True, slots=True)
class _Fold:
    """One reduction under construction."""

    w: ReduceWorkload
    isa: Isa
    x: Buffer
    y: Buffer

    @property
    def acc_dtype(self) -> str:
        """Dtype of the running value."""
        given = "float32" if self.w.dtype == "float16" else self.w.dtype
        return "int32" if self.w.averaging is not None else given

    def start(self, lanes: int) -> Expr:
        """The neutral value."""
        neutral = {"max": _lowest(self.w.dtype), "min": _highest(self.w.dtype)}
        return tir.splat(neutral.get(self.w.operation, 0), self.acc_dtype, lanes)

    def step(self, acc: Expr, value: Expr) -> Expr:
        """Fold `value` in."""
        value = tir.cast(value, self.acc_dtype)
        if self.w.operation == "max":
            return T.max(acc, value)
        if self.w.operation == "min":
            return T.min(acc, value)
        return acc + value

    def finish(self, acc: Expr) -> Expr:
        """The output."""
        lanes = tir.lanes_of(acc)
        a = self.w.averaging
        if a is not None:
            if a.zero_point:
                acc = acc - tir.splat(a.zero_point * self.w.reduced, "int32", lanes)
            factor = float(a.factors(np.asarray(float(self.w.reduced))))
            return _averaged(self.isa, acc, tir.splat(factor, "float32", lanes), a)
        if self.w.operation == "mean":
            acc = acc / tir.splat(float(self.w.reduced), "float32", lanes)
        return tir.cast(acc, self.w.out_dtype)

    def strided(self) -> None:
        """Vectors along the inner axis, a loop along the reduced one."""
        w = self.w
        lanes = min(_channel_lanes(self.isa, w.dtype), self.isa.vector_bits // 8)
        if self.acc_dtype == "float32":
            lanes = self.isa.lanes() * 2
        cycles = 1.5 * prod(w.in_shape) * ITEM_BYTES[self.acc_dtype] * 8 / self.isa.vector_bits
        threads = worth_threads(cycles)
        for offset, count, width in vector_spans(w.inner, lanes, overlap=True):
            with loop(w.outer * count, threads=threads) as flat:
                outer = tir.bind(T.floordiv(flat, count))
                channel = tir.bind(T.floormod(flat, count) * width + offset)
                acc = stack(width, self.acc_dtype)
                tir.store(acc, 0, self.start(width))
                with loop(w.reduced) as k:
                    value = tir.load(self.x, (outer * w.reduced + k) * w.inner + channel, width)
                    tir.store(acc, 0, self.step(tir.load(acc, 0, width), value))
                total = tir.bind(tir.load(acc, 0, width))
                tir.store(self.y, outer * w.inner + channel, self.finish(total))

    def contiguous(self) -> None:
        """Vectors along the reduced axis, folded at the end of each row."""
        w = self.w
        lanes = self.isa.vector_bits // 8 if self.acc_dtype == "int32" else self.isa.lanes() * 4
        kind = "add" if w.operation in ("mean", "sum") else w.operation
        threads = worth_threads(prod(w.in_shape) / lanes * 6 + w.outer * 20)
        with loop(w.outer, threads=threads) as row:
            base = tir.bind(row * w.reduced)
            total = stack(1, self.acc_dtype)
            tir.store(total, 0, self.start(1))
            for offset, count, width in vector_spans(w.reduced, lanes, overlap=kind != "add"):
                acc = stack(width, self.acc_dtype)
                tir.store(acc, 0, self.start(width))
                with loop(count) as k:
                    value = tir.load(self.x, base + k * width + offset, width)
                    tir.store(acc, 0, self.step(tir.load(acc, 0, width), value))
                part = reduce_lanes(kind, tir.load(acc, 0, width))
                tir.store(total, 0, self.step(tir.load(total, 0, 1), part))
            tir.store(self.y, row, self.finish(tir.bind(tir.load(total, 0, 1))))
