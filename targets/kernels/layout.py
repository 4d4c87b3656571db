# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Transpose, with fast paths for changes of layout, alone and fused with the first quantize.

`transpose` serves any permutation up to any rank: neighbouring axes that stay neighbours are merged
first.  What is left is one of two things: the innermost axis stays innermost, then contiguous runs
are copied; or two axes exchange the innermost place, then square blocks of 128-bit vectors are
transposed in registers by unpack instructions (16 x 16 bytes, 8 x 8 int16, 4 x 4 float32).  Where
one of the two axes is short (NCHW with three channels), whole vectors are interleaved instead.

`quantize_nchw_to_nhwc` is the first operator of most networks: it quantizes float32 NCHW and stores
NHWC bytes in one pass, and may append channels that hold the zero point.

`depth_to_space` and `space_to_depth` are transposes of rank 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.simd import (
    ITEM_BYTES,
    loop,
    quantized,
    tail_widths,
    unravel,
    vector_spans,
    worth_threads,
)
from qcompiler.targets.kernels.tir import Buffer, Expr, PrimFuncBuilder

__all__ = [
    "QuantizeToNhwcWorkload",
    "TransposeWorkload",
    "copy_run",
    "depth_to_space",
    "quantize_nchw_to_nhwc",
    "raw",
    "raw_dtype",
    "space_to_depth",
    "transpose",
]

Shape = tuple[int, ...]

SHORT = 8
"""Longest axis that is interleaved as a whole."""


@dataclass(frozen=True, slots=True)
class TransposeWorkload:
    """`y = x.transpose(permutation)`; buffers: x, y."""

    shape: Shape
    """Of the input."""
    permutation: tuple[int, ...]
    dtype: str
    in_shape: Shape | None = None
    """How the input buffer is declared, where not as `shape`."""
    out_shape: Shape | None = None
    """How the output buffer is declared, where not as the permuted shape."""


@dataclass(frozen=True, slots=True)
class QuantizeToNhwcWorkload:
    """float32 `[N, C, H, W]` to `[N, H, W, out_channels]`; buffers: x, y.

    Channels beyond C hold the zero point.
    """

    n: int
    c: int
    h: int
    w: int
    scale: float
    zero_point: int
    dtype: str
    """uint8 or int8."""
    qmin: int
    qmax: int
    out_channels: int | None = None
    """At least C; None means C."""


def raw_dtype(dtype: str) -> str:
    """The dtype to move elements as."""
    return "uint8" if dtype == "bool" else dtype


def raw(buffer: Buffer, dtype: str) -> Buffer:
    """A one-dimensional view of a dense buffer for moving elements."""
    return tir.alias(buffer, (prod(int(d) for d in buffer.shape),), raw_dtype(dtype))


def copy_run(target: Buffer, to: Expr, source: Buffer, start: Expr, count: int, lanes: int) -> None:
    """Copy `count` neighbouring elements by vectors of `lanes`."""
    for offset, repetitions, width in vector_spans(count, lanes, overlap=True):
        with loop(repetitions) as k:
            at = k * width + offset
            tir.store(target, to + at, tir.load(source, start + at, width))


def _merged(shape: Shape, permutation: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Merge axes that stay neighbours: extents in input order, and the permutation of them."""
    order = [axis for axis in permutation if shape[axis] != 1]
    runs: list[list[int]] = []
    for axis in order:
        # Axes of extent 1 between two axes do not keep them apart.
        if (
            runs
            and all(shape[k] == 1 for k in range(runs[-1][-1] + 1, axis))
            and (axis > runs[-1][-1])
        ):
            runs[-1].append(axis)
        else:
            runs.append([axis])
    by_input = sorted(range(len(runs)), key=lambda k: runs[k][0])
    extents = [prod(shape[axis] for axis in runs[k]) for k in by_input]
    return extents, [by_input.index(k) for k in range(len(runs))]


def transpose(workload: TransposeWorkload, isa: Isa) -> Any:
    """Generate a transpose.

    Raises:
        CodegenError: `permutation` is not one of the axes of `shape`.
    """
    w = workload
    if sorted(w.permutation) != list(range(len(w.shape))):
        raise CodegenError(f"transpose: {w.permutation} does not permute the axes of {w.shape}")
    out = tuple(w.shape[axis] for axis in w.permutation)
    with PrimFuncBuilder("transpose") as builder:
        x = builder.argument("x", w.in_shape or w.shape, w.dtype)
        y = builder.argument("y", w.out_shape or out, w.dtype)
        _transpose(w, isa, raw(x, w.dtype), raw(y, w.dtype))
    return builder.finish()


def _transpose(w: TransposeWorkload, isa: Isa, x: Buffer, y: Buffer) -> None:
    extents, order = _merged(w.shape, w.permutation)
    item = ITEM_BYTES[w.dtype]
    lanes = isa.vector_bits // 8 // item
    threads = worth_threads(prod(w.shape) * item / 8.0)
    if order == sorted(order):  # nothing moves
        total = prod(w.shape)
        blocks = max(1, min(64, total // (lanes * 64))) if threads else 1
        size = total // blocks
        with loop(blocks, threads=threads) as k:
            copy_run(y, k * size, x, k * size, size, lanes)
        if total > blocks * size:
            rest = blocks * size
            zero = tir.splat(rest, "int32", 1)
            copy_run(y, zero, x, zero, total - rest, lanes)
        return
    strides = [prod(extents[k + 1 :]) for k in range(len(extents))]
    out_extents = [extents[k] for k in order]
    out_strides = {axis: prod(out_extents[k + 1 :]) for k, axis in enumerate(order)}
    innermost = len(extents) - 1
    if order[-1] == innermost:
        outer = order[:-1]
        with loop(prod(extents[a] for a in outer), threads=threads) as flat:
            indices = unravel(flat, [extents[a] for a in outer])
            start = _dot(indices, [strides[a] for a in outer])
            to = tir.bind(flat * extents[innermost])
            copy_run(y, to, x, tir.bind(start), extents[innermost], lanes)
        return
    a, b = innermost, order[-1]
    outer = [axis for axis in order if axis not in (a, b)]
    swap = _Swap(
        x, y, extents[a], extents[b], out_strides[a], strides[b], item, isa.vector_bits // 8
    )
    swap.emit(
        [extents[k] for k in outer],
        [strides[k] for k in outer],
        [out_strides[k] for k in outer],
        threads=threads,
    )


def _dot(indices: list[Expr], strides: list[int]) -> Expr:
    total = tir.splat(0, "int32", 1)
    for index, stride in zip(indices, strides, strict=True):
        total = total + index * stride
    return total


@dataclass(frozen=True, slots=True)
class _Swap:
    """y[a * to_stride + b] = x[b * from_stride + a] for a < a_size, b < b_size."""

    x: Buffer
    y: Buffer
    a_size: int
    b_size: int
    to_stride: int
    from_stride: int
    item: int
    """Bytes per element."""
    vector: int
    """Bytes per vector register."""

    def emit(
        self, extents: list[int], strides: list[int], out_strides: list[int], *, threads: bool
    ) -> None:
        """Loops over the other axes, then over blocks."""
        side = 16 // self.item
        outer = prod(extents)
        short_b = self.b_size <= SHORT and self.to_stride == self.b_size
        short_a = self.a_size <= SHORT and self.from_stride == self.a_size
        blocked = self.a_size >= side and self.b_size >= side
        lanes = self.vector // self.item
        if short_b and self.a_size >= lanes:
            spans = vector_spans(self.a_size, lanes, overlap=True)
        elif short_a and self.b_size >= lanes:
            spans = vector_spans(self.b_size, lanes, overlap=True)
        elif blocked:
            # A tile is a cache line wide and high, so every line is read and written once.
            tile = side * min(4, self.a_size // side)
            spans = [(0, -(-self.a_size // tile), tile)]
        else:
            spans = [(0, self.a_size, 1)]
        for offset, count, width in spans:
            with loop(outer * count, threads=threads) as flat:
                rest, k = (
                    (flat, tir.splat(0, "int32", 1))
                    if count == 1
                    else (tir.bind(T.floordiv(flat, count)), tir.bind(T.floormod(flat, count)))
                )
                indices = unravel(rest, extents)
                start = tir.bind(_dot(indices, strides))
                to = tir.bind(_dot(indices, out_strides))
                at = tir.bind(k * width + offset)
                if short_b and self.a_size >= lanes:
                    self._interleave(start, to, at, width)
                elif short_a and self.b_size >= lanes:
                    self._separate(start, to, at, width)
                elif blocked:
                    self._blocks(start, to, at, side, width)
                else:
                    with loop(self.b_size) as j:
                        value = tir.load(self.x, start + j * self.from_stride + at, 1)
                        tir.store(self.y, to + at * self.to_stride + j, value)

    def _interleave(self, start: Expr, to: Expr, at: Expr, lanes: int) -> None:
        rows = [
            tir.bind(tir.load(self.x, start + at + b * self.from_stride, lanes))
            for b in range(self.b_size)
        ]
        tir.store(self.y, to + at * self.b_size, interleaved(rows))

    def _separate(self, start: Expr, to: Expr, at: Expr, lanes: int) -> None:
        parts = [
            tir.bind(tir.load(self.x, start + at * self.a_size + k * lanes, lanes))
            for k in range(self.a_size)
        ]
        for a in range(self.a_size):
            picks = [lane * self.a_size + a for lane in range(lanes)]
            value = tir.shuffle(parts, picks) if len(parts) > 1 else parts[0]
            tir.store(self.y, to + at + a * self.to_stride, value)

    def _blocks(self, start: Expr, to: Expr, at: Expr, side: int, wide: int) -> None:
        """All blocks along b of one strip of `wide` elements along a."""
        first = tir.bind(T.min(at, self.a_size - wide))
        high = side * min(4, self.b_size // side)
        with (
            loop(-(-self.b_size // high)) as tile,
            loop(wide // side) as i,
            loop(high // side) as j,
        ):
            a = tir.bind(first + i * side)
            b = tir.bind(T.min(tile * high, self.b_size - high) + j * side)
            rows = [
                tir.bind(tir.load(self.x, start + a + (b + k) * self.from_stride, side))
                for k in range(side)
            ]
            for k, row in enumerate(square_transposed(rows)):
                tir.store(self.y, to + b + (a + k) * self.to_stride, row)


def interleaved(rows: list[Expr]) -> Expr:
    """Lane 0 of every row, then lane 1 of every row, and so on."""
    count, lanes = len(rows), tir.lanes_of(rows[0])
    picks = [row * lanes + lane for lane in range(lanes) for row in range(count)]
    return tir.shuffle(rows, picks) if count > 1 else rows[0]


def square_transposed(rows: list[Expr]) -> list[Expr]:
    """Transpose a square of vectors: log2(side) rounds of pairwise interleaving."""
    side = len(rows)
    half = side // 2
    low = [k // 2 + (k % 2) * side for k in range(side)]
    high = [half + k for k in low]
    for _ in range(side.bit_length() - 1):
        merged: list[Expr] = []
        for k in range(half):
            pair = [rows[k], rows[k + half]]
            merged += [tir.bind(tir.shuffle(pair, low)), tir.bind(tir.shuffle(pair, high))]
        rows = merged
    return rows


# Fused with the first quantize.


def quantize_nchw_to_nhwc(workload: QuantizeToNhwcWorkload, isa: Isa) -> Any:
    """Generate the quantizing change of layout.

    Raises:
        CodegenError: fewer output than input channels.
    """
    w = workload
    channels = w.c if w.out_channels is None else w.out_channels
    if channels < w.c:
        raise CodegenError(f"quantize_nchw_to_nhwc: {w.c} channels do not fit {channels}")
    area = w.h * w.w
    threads = worth_threads(w.n * w.c * area * 40.0 * 8 / isa.vector_bits)

    def codes(x: Buffer, at: Expr, lanes: int) -> Expr:
        scale = tir.splat(float(np.float32(w.scale)), "float32", lanes)
        real = tir.load(x, at, lanes) / scale
        return tir.bind(quantized(real, w.zero_point, w.qmin, w.qmax, w.dtype, isa))

    with PrimFuncBuilder("quantize_nchw_to_nhwc") as builder:
        source = builder.argument("x", (w.n, w.c, w.h, w.w), "float32")
        target = builder.argument("y", (w.n, w.h, w.w, channels), w.dtype)
        x, y = tir.flat(source), tir.flat(target)
        if area < 16 and channels > SHORT:
            _quantize_few_pixels(w, x, y, channels, codes)
        else:
            lanes = isa.vector_bits // 8 if channels <= SHORT else 16
            for offset, count, width in vector_spans(area, lanes, overlap=True):
                with loop(w.n * count, threads=threads) as flat:
                    image, k = unravel(flat, [w.n, count])
                    at = tir.bind(k * width + offset)
                    start = tir.bind(image * (w.c * area) + at)
                    to = tir.bind((image * area + at) * channels)
                    if channels <= SHORT:
                        zeros = [tir.splat(w.zero_point, w.dtype, width)] * (channels - w.c)
                        rows = [codes(x, start + c * area, width) for c in range(w.c)]
                        tir.store(y, to, interleaved(rows + zeros))
                    else:
                        _quantized_blocks(w, x, y, start, to, channels, codes)
    return builder.finish()


Codes = Callable[[Buffer, Expr, int], Expr]


def _quantize_few_pixels(
    w: QuantizeToNhwcWorkload, x: Buffer, y: Buffer, channels: int, codes: Codes
) -> None:
    """Few pixels of many channels, which are neighbours only where there is one pixel."""
    area = w.h * w.w
    lanes = 16 if area == 1 else 1
    with loop(w.n) as image, loop(area) as pixel:
        to = tir.bind((image * area + pixel) * channels)
        for offset, count, width in vector_spans(w.c, lanes, overlap=True):
            with loop(count) as k:
                channel = tir.bind(k * width + offset)
                value = codes(x, (image * w.c + channel) * area + pixel, width)
                tir.store(y, to + channel, value)
        if channels > w.c:
            with loop(channels - w.c) as k:
                tir.store(y, to + w.c + k, tir.splat(w.zero_point, w.dtype, 1))


def _quantized_blocks(
    w: QuantizeToNhwcWorkload,
    x: Buffer,
    y: Buffer,
    start: Expr,
    to: Expr,
    channels: int,
    codes: Codes,
) -> None:
    """16 pixels of every channel, in blocks of 16 channels."""
    area = w.h * w.w
    zeros = tir.splat(w.zero_point, w.dtype, 16)
    if channels < 16:
        rows = [codes(x, start + c * area, 16) if c < w.c else zeros for c in range(16)]
        for pixel, value in enumerate(square_transposed(rows)):
            for offset, lanes in tail_widths(channels):
                part = tir.shuffle([value], range(offset, offset + lanes))
                tir.store(y, to + (pixel * channels + offset), part)
        return
    full = w.c // 16
    if full:
        with loop(full) as block:
            first = block * 16
            rows = [codes(x, start + (first + c) * area, 16) for c in range(16)]
            for pixel, value in enumerate(square_transposed(rows)):
                tir.store(y, to + first + pixel * channels, value)
    # The last channels and the added ones, in blocks of which the last may overlap.
    for begin in range(full * 16, channels, 16):
        last = min(begin, channels - 16)
        rows = [
            codes(x, start + (last + c) * area, 16) if last + c < w.c else zeros for c in range(16)
        ]
        for pixel, value in enumerate(square_transposed(rows)):
            tir.store(y, to + (last + pixel * channels), value)


# Rearrangements that are transposes.


def depth_to_space(
    shape: Shape, block: int, dtype: str, *, mode: str = "DCR", layout: str = "NHWC"
) -> TransposeWorkload:
    """The transpose that is ONNX DepthToSpace on `shape`.

    Raises:
        CodegenError: the channels are no multiple of block * block, or a name is not known.
    """
    n, h, w, c = _nhwc(shape, layout)
    depth, rest = divmod(c, block * block)
    if rest or mode not in ("DCR", "CRD"):
        raise CodegenError(f"depth_to_space: cannot split {c} channels by {block} in mode {mode!r}")
    if layout == "NHWC":
        out = (n, h * block, w * block, depth)
        if mode == "DCR":
            return TransposeWorkload(
                (n, h, w, block, block, depth), (0, 1, 3, 2, 4, 5), dtype, shape, out
            )
        return TransposeWorkload(
            (n, h, w, depth, block, block), (0, 1, 4, 2, 5, 3), dtype, shape, out
        )
    out = (n, depth, h * block, w * block)
    if mode == "DCR":
        return TransposeWorkload(
            (n, block, block, depth, h, w), (0, 3, 4, 1, 5, 2), dtype, shape, out
        )
    return TransposeWorkload((n, depth, block, block, h, w), (0, 1, 4, 2, 5, 3), dtype, shape, out)


def space_to_depth(
    shape: Shape, block: int, dtype: str, *, layout: str = "NHWC"
) -> TransposeWorkload:
    """The transpose that is ONNX SpaceToDepth on `shape`.

    Raises:
        CodegenError: the block does not divide the spatial extents.
    """
    n, h, w, c = _nhwc(shape, layout)
    if h % block or w % block:
        raise CodegenError(f"space_to_depth: {block} does not divide {h} x {w}")
    high, wide = h // block, w // block
    if layout == "NHWC":
        return TransposeWorkload(
            (n, high, block, wide, block, c),
            (0, 1, 3, 2, 4, 5),
            dtype,
            shape,
            (n, high, wide, block * block * c),
        )
    return TransposeWorkload(
        (n, c, high, block, wide, block),
        (0, 3, 5, 1, 2, 4),
        dtype,
        shape,
        (n, block * block * c, high, wide),
    )


def _nhwc(shape: Shape, layout: str) -> tuple[int, int, int, int]:
    if len(shape) != 4 or layout not in ("NHWC", "NCHW"):
        raise CodegenError(f"expected rank 4 and layout NHWC or NCHW, got {shape} and {layout!r}")
    n, a, b, c = shape
    return (n, a, b, c) if layout == "NHWC" else (n, b, c, a)
