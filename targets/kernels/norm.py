# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Softmax and layer normalization, of quantized integers (exact) and of float32.

Every kernel works row by row; rows are shared out to threads.  Buffers: the input, the packed
constants (`qsoftmax`: the table of `pack_softmax`; layer norms: gamma and beta, float32 `[D]`), the
output.

qsoftmax: d = max(x) - x, S = sum T[d] with T[d] = rint(exp(-s_x * d) * 2**20), r = f32(1 / s_y) /
f32(S), y = clamp(rint(f32(T[d]) * r) + zero_point).  On AVX-512 rows T is held as three planes of
bytes in registers and looked up by word permutes (see `pointwise`); other rows load from memory.

qlayer_norm: c1 = sum q, c2 = sum q * q, V = D * c2 - c1 * c1 (int64), v = f32(V) * f32(s**2 / D**2)
+ epsilon, t = f32(D * q - c1) * (1 / sqrt(v) * f32(s / D)), y = t * gamma + beta, each operation
rounded by itself, then quantized by a division.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.fmath import exp
from qcompiler.targets.kernels.interleave import in_order, interleave, narrowed
from qcompiler.targets.kernels.lanes import lane_channels
from qcompiler.targets.kernels.pointwise import permute_look_up
from qcompiler.targets.kernels.simd import (
    STACK_BYTES,
    exact_mul,
    loop,
    quantized,
    reduce_lanes,
    settle,
    stack,
    vector_spans,
    workspace,
    worth_threads,
)
from qcompiler.targets.kernels.tir import Buffer, Expr, PrimFuncBuilder

__all__ = [
    "FloatLayerNormWorkload",
    "FloatSoftmaxWorkload",
    "QLayerNormWorkload",
    "QSoftmaxWorkload",
    "float_layer_norm",
    "float_softmax",
    "pack_softmax",
    "qlayer_norm",
    "qsoftmax",
    "softmax_shape",
]

Shape = tuple[int, ...]
Array = npt.NDArray[Any]

ROWS_PER_TASK = 8
"""Rows that share one work area."""


@dataclass(frozen=True, slots=True)
class QSoftmaxWorkload:
    """Softmax of 8-bit values along `axis`; buffers: x, packed table, y."""

    shape: Shape
    axis: int
    in_dtype: str
    """uint8 or int8."""
    out_scale: float
    """s_y; 1 for a float32 output."""
    dtype: str
    """Of the output: uint8, int8, int16 or float32."""
    zero_point: int = 0
    qmin: int = 0
    qmax: int = 0


@dataclass(frozen=True, slots=True)
class QLayerNormWorkload:
    """Layer norm of integers over the last axis; buffers: x, gamma, beta, y."""

    shape: Shape
    in_dtype: str
    """uint8, int8 or int16."""
    in_scale: float
    epsilon: float
    dtype: str
    """Of the output: uint8, int8, int16 or float32."""
    scale: float = 1.0
    zero_point: int = 0
    qmin: int = 0
    qmax: int = 0


@dataclass(frozen=True, slots=True)
class FloatSoftmaxWorkload:
    """float32 softmax along `axis`; buffers: x, y."""

    shape: Shape
    axis: int = -1


@dataclass(frozen=True, slots=True)
class FloatLayerNormWorkload:
    """float32 layer norm over the last axis; buffers: x, gamma, beta, y."""

    shape: Shape
    epsilon: float


@dataclass(frozen=True)
class FloatInstanceNormWorkload:
    """float32 instance norm of [N, C, ...] over all axes from 2 on; buffers: x, scale, bias, y."""

    shape: Shape
    epsilon: float


def _around(shape: Shape, axis: int) -> tuple[int, int, int]:
    """Elements before, along and after `axis`."""
    axis %= len(shape)
    return prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])


def _f32(value: float) -> float:
    return float(np.float32(value))


# Softmax of integers.


def _in_registers(workload: QSoftmaxWorkload, isa: Isa) -> bool:
    _, depth, inner = _around(workload.shape, workload.axis)
    x86_512 = isa.mtriple.startswith("x86_64") and isa.vector_bits == 512
    return x86_512 and inner == 1 and depth >= 64


def softmax_shape(workload: QSoftmaxWorkload, isa: Isa) -> tuple[Shape, str]:
    """Shape and dtype of the packed table."""
    return ((3, 128), "int16") if _in_registers(workload, isa) else ((256,), "int32")


def pack_softmax(table: Array, workload: QSoftmaxWorkload, isa: Isa) -> Array:
    """Pack T, int32 [256] of values up to 2**20: as it is, or as three planes of bytes.

    Raises:
        CodegenError: the table has another shape.
    """
    if table.shape != (256,):
        raise CodegenError(f"pack_softmax: expected 256 entries, got shape {table.shape}")
    entries = table.astype(np.int32)
    if not _in_registers(workload, isa):
        return entries
    planes = np.stack([(entries >> (8 * k)) & 255 for k in range(3)]).astype(np.uint16)
    words: Array = (planes[:, :128] | (planes[:, 128:] << 8)).view(np.int16)
    return words


def qsoftmax(workload: QSoftmaxWorkload, isa: Isa) -> Any:
    """Generate `qsoftmax`."""
    w = workload
    outer, depth, inner = _around(w.shape, w.axis)
    shape, table_dtype = softmax_shape(w, isa)
    with PrimFuncBuilder("qsoftmax") as builder:
        argument = builder.argument("x", w.shape, w.in_dtype)
        table = builder.argument("table", shape, table_dtype)
        output = builder.argument("y", w.shape, w.dtype)
        x = tir.alias(argument, (prod(w.shape),), "uint8")
        kernel = _QSoftmax(w, isa, x, tir.flat(table), tir.flat(output), depth)
        if inner > 1:
            threads = worth_threads(4.0 * prod(w.shape))
            place = stack if depth * 4 <= STACK_BYTES else workspace
            with loop(outer, threads=threads) as o:
                area = place(depth, "int32")
                row = replace(kernel, x=place(depth, "uint8"), y=place(depth, w.dtype))
                with loop(inner) as i:
                    base = tir.bind(o * (depth * inner) + i)
                    with loop(depth) as k:
                        tir.store(row.x, k, tir.load(x, base + k * inner, 1))
                    row.row(tir.bind(0), area)
                    with loop(depth) as k:
                        tir.store(kernel.y, base + k * inner, tir.load(row.y, k, 1))
        else:
            cost = 0.4 if _in_registers(w, isa) else 2.0
            threads = worth_threads(cost * prod(w.shape))
            run = ROWS_PER_TASK if outer >= 4 * ROWS_PER_TASK else 1
            room = -(-depth // 64) * 64 if _in_registers(w, isa) else depth
            small = room * 4 <= STACK_BYTES
            with loop(-(-outer // run), threads=threads) as chunk:
                area = stack(room, "int32") if small else workspace(room, "int32")
                with loop(run) as r:
                    row = tir.bind(T.min(chunk * run + r, outer - 1))
                    kernel.row(tir.bind(row * depth), area)
    return builder.finish()


@dataclass(frozen=True, slots=True)
class _QSoftmax:
    """One softmax under construction."""

    w: QSoftmaxWorkload
    isa: Isa
    x: Buffer
    """The input's bytes."""
    table: Buffer
    y: Buffer
    depth: int

    def _codes(self, at: Expr, lanes: int) -> Expr:
        """Codes as uint8, in the order of their values."""
        value = tir.load(self.x, at, lanes)
        if self.w.in_dtype == "int8":
            value = T.bitwise_xor(value, tir.splat(128, "uint8", lanes))
        return tir.bind(value)

    def _factor(self, total: Expr) -> Expr:
        """R = f32(1 / s_y) / f32(S)."""
        inverse = _f32(1.0 / np.float64(self.w.out_scale))
        return tir.bind(tir.splat(inverse, "float32", 1) / tir.cast(total, "float32"))

    def _output(self, value: Expr, factor: Expr) -> Expr:
        """Outputs of T values in channel order."""
        w = self.w
        real = exact_mul(
            tir.cast(value, "float32"), tir.splat(factor, "float32", tir.lanes_of(value))
        )
        if w.dtype == "float32":
            return real
        return quantized(real, w.zero_point, w.qmin, w.qmax, w.dtype, self.isa)

    def row(self, base: Expr, area: Buffer) -> None:
        """A contiguous row; `area` holds its T values."""
        top = self._largest(base)
        if _in_registers(self.w, self.isa):
            total = self._look_up_in_registers(base, area, top)
            factor = self._factor(total)
            self._finish_packed(base, area, factor)
            return
        with loop(self.depth) as k:
            distance = tir.cast(top - self._codes(base + k, 1), "int32")
            tir.store(area, k, self.table[distance])
        lanes = self.isa.lanes() * 2
        wide = stack(1, "int64")
        tir.store(wide, 0, tir.splat(0, "int64", 1))
        for offset, count, width in vector_spans(self.depth, lanes, overlap=False):
            partial = self._sum_of(area, offset, count, width)
            tir.store(wide, 0, tir.load(wide, 0, 1) + partial)
        factor = self._factor(tir.load(wide, 0, 1))
        lanes = self.isa.vector_bits // 8
        for offset, count, width in vector_spans(self.depth, lanes, overlap=True):
            with loop(count) as k:
                at = tir.bind(k * width + offset)
                value = tir.bind(tir.load(area, at, width))
                tir.store(self.y, base + at, self._output(value, factor))

    def _sum_of(self, area: Buffer, offset: int, count: int, width: int) -> Expr:
        """The int64 sum of `count` vectors of T values."""
        # A lane of int32 holds 2047 values of at most 2**20.
        dtype = "int32" if count < 2048 else "int64"
        acc = stack(width, dtype)
        tir.store(acc, 0, tir.splat(0, dtype, width))
        with loop(count) as k:
            value = tir.cast(tir.load(area, k * width + offset, width), dtype)
            tir.store(acc, 0, tir.load(acc, 0, width) + value)
        total = tir.load(acc, 0, width)
        if count * width >= 2048:
            total = tir.cast(total, "int64")
        return tir.cast(reduce_lanes("add", total), "int64")

    def _largest(self, base: Expr) -> Expr:
        lanes = self.isa.vector_bits // 8
        best = stack(1, "uint8")
        tir.store(best, 0, tir.splat(0, "uint8", 1))
        for offset, count, width in vector_spans(self.depth, lanes, overlap=True):
            acc = stack(width, "uint8")
            tir.store(acc, 0, self._codes(base + offset, width))
            if count > 1:
                with tir.serial(1, count) as k:
                    value = self._codes(base + k * width + offset, width)
                    tir.store(acc, 0, T.max(tir.load(acc, 0, width), value))
            part = reduce_lanes("max", tir.load(acc, 0, width))
            tir.store(best, 0, T.max(tir.load(best, 0, 1), part))
        return tir.bind(tir.load(best, 0, 1))

    # The form with the table in registers: vectors of 64, T values in packed order.

    def _look_up_in_registers(self, base: Expr, area: Buffer, top: Expr) -> Expr:
        spans = vector_spans(self.depth, 64, overlap=True)
        dtype = "int32" if spans[0][1] < 512 else "int64"
        acc = stack(16, dtype)
        tir.store(acc, 0, tir.splat(0, dtype, 16))
        zeros = tir.splat(0, "uint8", 64)
        for offset, count, _ in spans:
            # The overlapping last vector: its first lanes have been counted before.
            slot = -(-offset // 64) * 64
            counted = slot - offset
            with loop(count) as k:
                at = tir.bind(k * 64 + offset)
                distance = tir.bind(tir.splat(top, "uint8", 64) - self._codes(base + at, 64))
                planes = [permute_look_up(self.table, [distance], p * 128)[0] for p in range(3)]
                planes = [settle(plane) for plane in planes]
                parts = interleave([*planes, zeros])
                total: Expr = None
                for part, value in enumerate(parts):
                    tir.store(area, k * 64 + (slot + part * 16), value)
                    if counted:
                        keep = lane_channels(64)[part] >= counted
                        mask = _lane_mask(keep)
                        value = T.bitwise_and(value, mask)
                    total = value if total is None else total + value
                tir.store(acc, 0, tir.load(acc, 0, 16) + tir.cast(total, dtype))
        return reduce_lanes("add", tir.cast(tir.load(acc, 0, 16), "int64"))

    def _finish_packed(self, base: Expr, area: Buffer, factor: Expr) -> None:
        w = self.w
        spread = tir.bind(tir.splat(factor, "float32", 16))
        for offset, count, _ in vector_spans(self.depth, 64, overlap=True):
            with loop(count) as k:
                at = tir.bind(k * 64 + offset)
                slot = k * 64 + -(-offset // 64) * 64
                parts = [tir.load(area, slot + part * 16, 16) for part in range(4)]
                reals = [exact_mul(tir.cast(part, "float32"), spread) for part in parts]
                if w.dtype == "float32":
                    tir.store(self.y, base + at, in_order(reals))
                    continue
                low, high = float(w.qmin - w.zero_point), float(w.qmax - w.zero_point)
                whole = [tir.round_to_int32(self.isa, tir.clamp(v, low, high)) for v in reals]
                zero = tir.splat(w.zero_point, "int32", 1) if w.zero_point else None
                tir.store(self.y, base + at, narrowed(self.isa, whole, zero, w.dtype))


def _lane_mask(keep: Array) -> Expr:
    """Lanes of -1 and 0."""
    ones, zeros = tir.splat(-1, "int32", 16), tir.splat(0, "int32", 16)
    return tir.shuffle([ones, zeros], [0 if flag else 16 for flag in keep])


# Layer norm of integers.


def qlayer_norm(workload: QLayerNormWorkload, isa: Isa) -> Any:
    """Generate `qlayer_norm`."""
    w = workload
    depth = w.shape[-1]
    rows = prod(w.shape[:-1])
    with PrimFuncBuilder("qlayer_norm") as builder:
        x = builder.argument("x", w.shape, w.in_dtype)
        gamma = builder.argument("gamma", (depth,), "float32")
        beta = builder.argument("beta", (depth,), "float32")
        y = builder.argument("y", w.shape, w.dtype)
        kernel = _QLayerNorm(w, isa, tir.flat(x), gamma, beta, tir.flat(y), depth)
        with loop(rows, threads=worth_threads(prod(w.shape) * 32.0 / isa.vector_bits)) as row:
            kernel.row(tir.bind(row * depth))
    return builder.finish()


@dataclass(frozen=True, slots=True)
class _QLayerNorm:
    """One layer norm under construction."""

    w: QLayerNormWorkload
    isa: Isa
    x: Buffer
    gamma: Buffer
    beta: Buffer
    y: Buffer
    depth: int

    def row(self, base: Expr) -> None:
        """One row."""
        w, depth = self.w, self.depth
        c1, c2 = self._sums(base)
        scale = np.float64(w.in_scale)
        square = tir.cast(c1, "int64") * tir.cast(c1, "int64")
        spread = c2 * tir.splat(depth, "int64", 1) - square
        k1 = tir.splat(_f32(scale * scale / np.float64(depth * depth)), "float32", 1)
        v = exact_mul(tir.cast(spread, "float32"), k1)
        v = tir.bind(v + tir.splat(_f32(w.epsilon), "float32", 1))
        r = tir.bind(tir.splat(1.0, "float32", 1) / T.sqrt(v))
        factor = tir.bind(r * tir.splat(_f32(scale / np.float64(depth)), "float32", 1))
        lanes = self.isa.lanes() * (4 if w.in_dtype != "int16" else 2)
        for offset, count, width in vector_spans(depth, lanes, overlap=True):
            with loop(count) as k:
                at = tir.bind(k * width + offset)
                self._outputs(base, at, width, c1, factor)

    def _outputs(self, base: Expr, at: Expr, lanes: int, c1: Expr, factor: Expr) -> None:
        w = self.w
        q = tir.load(self.x, base + at, lanes)
        if w.in_dtype != "int16" and self.depth < 1 << 15:
            # Below 2**24 float32 arithmetic is exact, fused or not.
            scaled = tir.cast(q, "float32") * tir.splat(float(self.depth), "float32", lanes)
            t = scaled - tir.splat(tir.cast(c1, "float32"), "float32", lanes)
        else:
            scaled = tir.cast(q, "int32") * tir.splat(self.depth, "int32", lanes)
            t = tir.cast(scaled - tir.splat(c1, "int32", lanes), "float32")
        t = t * tir.splat(factor, "float32", lanes)
        real = exact_mul(t, tir.load(self.gamma, at, lanes)) + tir.load(self.beta, at, lanes)
        if w.dtype != "float32":
            real = real / tir.splat(_f32(w.scale), "float32", lanes)
            real = quantized(real, w.zero_point, w.qmin, w.qmax, w.dtype, self.isa)
        tir.store(self.y, base + at, real)

    def _sums(self, base: Expr) -> tuple[Expr, Expr]:
        """c1 as int32 and c2 as int64."""
        wide = self.w.in_dtype == "int16"
        # Sums of squares of 8-bit values fit int32 up to this depth.
        square = "int32" if not wide and self.depth < 33_000 else "int64"
        c1, c2 = stack(1, "int32"), stack(1, "int64")
        tir.store(c1, 0, tir.splat(0, "int32", 1))
        tir.store(c2, 0, tir.splat(0, "int64", 1))
        lanes = self.isa.vector_bits // 16
        madd = self.isa.intrinsic("madd_i16", self.isa.vector_bits)
        for offset, count, width in vector_spans(self.depth, lanes, overlap=False):
            pairs = madd is not None and width == lanes
            half = width // 2 if pairs else width
            sums, squares = stack(half, "int32"), stack(half, square)
            tir.store(sums, 0, tir.splat(0, "int32", half))
            tir.store(squares, 0, tir.splat(0, square, half))
            with loop(count) as k:
                q = tir.load(self.x, base + k * width + offset, width)
                if pairs:
                    q = tir.bind(tir.cast(q, "int16"))
                    dtype = tir.vector("int32", half)
                    one = tir.intrinsic(dtype, str(madd), q, tir.splat(1, "int16", width))
                    two = tir.intrinsic(dtype, str(madd), q, q)
                    if square == "int64":  # two squares of -2**15 make 2**31: unsigned
                        two = tir.reinterpret(two, "uint32", half)
                else:
                    one = tir.bind(tir.cast(q, "int32"))
                    two = one * one
                tir.store(sums, 0, tir.load(sums, 0, half) + one)
                tir.store(squares, 0, tir.load(squares, 0, half) + tir.cast(two, square))
            part = reduce_lanes("add", tir.load(sums, 0, half))
            tir.store(c1, 0, tir.load(c1, 0, 1) + part)
            part = tir.cast(reduce_lanes("add", tir.load(squares, 0, half)), "int64")
            tir.store(c2, 0, tir.load(c2, 0, 1) + part)
        return tir.bind(tir.load(c1, 0, 1)), tir.bind(tir.load(c2, 0, 1))


# Float32.


def _fold(
    count: int,
    lanes: int,
    operation: str,
    start: float,
    value: Callable[[Expr, int], Expr],
) -> Expr:
    """Fold `value(offset, width)` over `count` elements into a scalar."""
    combine: Callable[[Expr, Expr], Expr] = T.max if operation == "max" else (lambda a, b: a + b)
    total = stack(1, "float32")
    tir.store(total, 0, tir.splat(start, "float32", 1))
    for offset, repetitions, width in vector_spans(count, lanes, overlap=operation == "max"):
        acc = stack(width, "float32")
        tir.store(acc, 0, tir.splat(start, "float32", width))
        with loop(repetitions) as k:
            at = tir.bind(k * width + offset)
            tir.store(acc, 0, combine(tir.load(acc, 0, width), value(at, width)))
        part = reduce_lanes(operation, tir.load(acc, 0, width))
        tir.store(total, 0, combine(tir.load(total, 0, 1), part))
    return tir.bind(tir.load(total, 0, 1))


def float_softmax(workload: FloatSoftmaxWorkload, isa: Isa) -> Any:
    """Generate a float32 softmax: subtract the maximum, exponentiate, divide by the sum."""
    w = workload
    outer, depth, inner = _around(w.shape, w.axis)
    lanes = isa.lanes() * 4
    threads = worth_threads(prod(w.shape) * 20.0 / isa.lanes())
    with PrimFuncBuilder("softmax") as builder:
        arguments = [builder.argument(name, w.shape, "float32") for name in ("x", "y")]
        x, y = (tir.flat(argument) for argument in arguments)
        with loop(outer, threads=threads) as o:
            base = tir.bind(o * (depth * inner))
            if inner == 1:
                _softmax_row(x, y, base, depth, lanes)
            else:
                for offset, count, width in vector_spans(inner, isa.lanes() * 2, overlap=True):
                    with loop(count) as i:
                        start = tir.bind(base + i * width + offset)
                        _softmax_columns(x, y, start, depth, inner, width)
    return builder.finish()


def _softmax_row(x: Buffer, y: Buffer, base: Expr, depth: int, lanes: int) -> None:
    lowest = float("-inf")
    top = _fold(depth, lanes, "max", lowest, lambda at, n: tir.load(x, base + at, n))

    def exponential(at: Expr, width: int) -> Expr:
        value = tir.load(x, base + at, width) - tir.splat(top, "float32", width)
        value = exp(value)
        tir.store(y, base + at, value)
        return value

    total = _fold(depth, lanes, "add", 0.0, exponential)
    inverse = tir.bind(tir.splat(1.0, "float32", 1) / total)
    # No overlap: the outputs are read and written in place.
    for offset, count, width in vector_spans(depth, lanes, overlap=False):
        with loop(count) as k:
            at = tir.bind(base + k * width + offset)
            tir.store(y, at, tir.load(y, at, width) * tir.splat(inverse, "float32", width))


def _softmax_columns(x: Buffer, y: Buffer, start: Expr, depth: int, inner: int, lanes: int) -> None:
    top, total = stack(lanes, "float32"), stack(lanes, "float32")
    tir.store(top, 0, tir.load(x, start, lanes))
    with loop(depth) as k:
        value = tir.load(x, start + k * inner, lanes)
        tir.store(top, 0, T.max(tir.load(top, 0, lanes), value))
    tir.store(total, 0, tir.splat(0.0, "float32", lanes))
    with loop(depth) as k:
        at = tir.bind(start + k * inner)
        value = exp(tir.load(x, at, lanes) - tir.load(top, 0, lanes))
        tir.store(total, 0, tir.load(total, 0, lanes) + value)
        tir.store(y, at, value)
    inverse = tir.bind(tir.splat(1.0, "float32", lanes) / tir.load(total, 0, lanes))
    with loop(depth) as k:
        at = tir.bind(start + k * inner)
        tir.store(y, at, tir.load(y, at, lanes) * inverse)


def float_layer_norm(workload: FloatLayerNormWorkload, isa: Isa) -> Any:
    """Generate a float32 layer norm: mean, then variance of the differences."""
    return _float_norm("layer_norm", workload.shape, workload.shape[-1], 1, workload.epsilon, isa)


def float_instance_norm(workload: FloatInstanceNormWorkload, isa: Isa) -> Any:
    """Generate a float32 instance norm: as a layer norm of every plane, scaled by channel."""
    channels, plane = workload.shape[1], prod(workload.shape[2:])
    return _float_norm("instance_norm", workload.shape, plane, channels, workload.epsilon, isa)


def _float_norm(
    name: str, shape: Shape, depth: int, channels: int, epsilon: float, isa: Isa
) -> Any:
    """Generate the norm of rows of `depth` elements.

    Scale and bias hold one number per element of a row; for an instance norm one per row, counted
    modulo `channels`.
    """
    by_row = name == "instance_norm"
    lanes = isa.lanes() * 4
    threads = worth_threads(prod(shape) * 6.0 / isa.lanes())
    with PrimFuncBuilder(name) as builder:
        source = builder.argument("x", shape, "float32")
        gamma = builder.argument("gamma", (channels if by_row else depth,), "float32")
        beta = builder.argument("beta", (channels if by_row else depth,), "float32")
        output = builder.argument("y", shape, "float32")
        x, y = tir.flat(source), tir.flat(output)
        with loop(prod(shape) // depth, threads=threads) as row:
            base = tir.bind(row * depth)
            one = tir.splat(1.0 / depth, "float32", 1)
            total = _fold(depth, lanes, "add", 0.0, lambda at, n: tir.load(x, base + at, n))
            mean = tir.bind(total * one)

            def square(at: Expr, width: int, base: Expr = base, mean: Expr = mean) -> Expr:
                value = tir.load(x, base + at, width) - tir.splat(mean, "float32", width)
                value = tir.bind(value)
                return value * value

            variance = _fold(depth, lanes, "add", 0.0, square) * one
            variance = variance + tir.splat(_f32(epsilon), "float32", 1)
            factor = tir.bind(tir.splat(1.0, "float32", 1) / T.sqrt(variance))
            if by_row:
                channel = tir.bind(row % channels)
                factor = tir.bind(factor * tir.load(gamma, channel, 1))
                shift = tir.bind(tir.load(beta, channel, 1))
            for offset, count, width in vector_spans(depth, lanes, overlap=True):
                with loop(count) as k:
                    at = tir.bind(k * width + offset)
                    value = tir.load(x, base + at, width) - tir.splat(mean, "float32", width)
                    value = value * tir.splat(factor, "float32", width)
                    if by_row:
                        value = value + tir.splat(shift, "float32", width)
                    else:
                        value = value * tir.load(gamma, at, width) + tir.load(beta, at, width)
                    tir.store(y, base + at, value)
    return builder.finish()
