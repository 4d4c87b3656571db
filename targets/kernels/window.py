# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Loops over the output of a sliding window, split into interior and border.

Where every tap of an output lies in the input, the taps are unrolled and neighbouring outputs share
a tile; elsewhere one output at a time loops over the taps that are inside.  The split along the
columns is static; along the rows it is one branch for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import CodegenError
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.simd import loop, unravel
from qcompiler.targets.kernels.tir import Expr

__all__ = ["Pixel", "Window", "sweep"]

MAX_UNROLLED = 200
"""Most taps, over all outputs of a tile, that are unrolled."""


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding window over NHWC; pairs are (height, width)."""

    n: int
    size: tuple[int, int]
    """Input extents."""
    out: tuple[int, int]
    """Output extents."""
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Top, left, bottom, right."""
    dilations: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        sizes = (self.n, *self.size, *self.out, *self.kernel, *self.strides, *self.dilations)
        if min(sizes) < 1 or min(self.pads) < 0:
            raise CodegenError(f"window: extents, strides and dilations must be >= 1: {self}")

    def interior(self, axis: int) -> tuple[int, int]:
        """The outputs [begin, end) along `axis` all of whose taps lie in the input."""
        stride, pad = self.strides[axis], self.pads[axis]
        reach = (self.kernel[axis] - 1) * self.dilations[axis]
        begin = min(-(-pad // stride), self.out[axis])
        end = (self.size[axis] - 1 - reach + pad) // stride + 1
        return begin, max(begin, min(end, self.out[axis]))

    def taps(self, axis: int, output: Expr) -> tuple[Expr, Expr, Expr]:
        """Position of the first tap, and the taps [begin, end) of an output that are inside."""
        kernel, dilation, pad = self.kernel[axis], self.dilations[axis], self.pads[axis]
        first = tir.bind(output * self.strides[axis] - pad)
        begin = tir.bind(T.max(T.floordiv(dilation - 1 - first, dilation), 0))
        inside = T.floordiv(self.size[axis] - first + dilation - 1, dilation)
        return first, begin, tir.bind(T.max(T.min(inside, kernel), begin))

    def count_inside(self, axis: int, output: int) -> int:
        """How many taps of an output along `axis` lie in the input."""
        start = output * self.strides[axis] - self.pads[axis]
        taps = (start + k * self.dilations[axis] for k in range(self.kernel[axis]))
        return sum(0 <= tap < self.size[axis] for tap in taps)

    def count_padded(self, axis: int, output: int) -> int:
        """How many taps of an output along `axis` lie in the input or in its declared padding."""
        start = output * self.strides[axis] - self.pads[axis]
        end = self.size[axis] + self.pads[axis + 2]
        return sum(start + k * self.dilations[axis] < end for k in range(self.kernel[axis]))


@dataclass(frozen=True, slots=True)
class Pixel:
    """Outputs (image, row, column ... column + count) and how to visit their taps."""

    window: Window
    image: Expr
    row: Expr
    column: Expr
    count: int
    """Neighbouring outputs; 1 in the border."""
    interior: bool

    @property
    def outputs(self) -> list[Expr]:
        """Flat index of each output pixel."""
        high, wide = self.window.out
        first = (self.image * high + self.row) * wide + self.column
        return [first + i for i in range(self.count)]

    def unrolled(self) -> list[tuple[int, list[Expr]]]:
        """In the interior: for each tap, its index and the input pixel of each output."""
        w = self.window
        base = tir.bind(
            (self.image * w.size[0] + self.row * w.strides[0] - w.pads[0]) * w.size[1]
            + self.column * w.strides[1]
            - w.pads[1]
        )
        taps = []
        for ky in range(w.kernel[0]):
            for kx in range(w.kernel[1]):
                offset = ky * w.dilations[0] * w.size[1] + kx * w.dilations[1]
                places = [base + offset + i * w.strides[1] for i in range(self.count)]
                taps.append((ky * w.kernel[1] + kx, places))
        return taps

    @contextmanager
    def looped(self) -> Iterator[tuple[Expr, Expr]]:
        """In the border: a loop over the taps inside; gives the tap's index and input pixel."""
        w = self.window
        top, y_begin, y_end = w.taps(0, self.row)
        left, x_begin, x_end = w.taps(1, self.column)
        with tir.serial(y_begin, y_end) as ky, tir.serial(x_begin, x_end) as kx:
            y = top + ky * w.dilations[0]
            x = left + kx * w.dilations[1]
            place = (self.image * w.size[0] + y) * w.size[1] + x
            yield ky * w.kernel[1] + kx, place


def sweep(window: Window, emit: Callable[[Pixel], None], *, tile: int, threads: bool) -> None:
    """Call `emit` in loops that cover the output, `tile` interior columns at a time."""
    w = window
    (top, bottom), (left, right) = w.interior(0), w.interior(1)
    taps = w.kernel[0] * w.kernel[1]
    tile = min(tile, max(1, MAX_UNROLLED // taps), max(1, right - left))
    unroll = taps <= MAX_UNROLLED and right > left and bottom > top

    def border(image: Expr, row: Expr, begin: int, end: int) -> None:
        if end > begin:
            with loop(end - begin) as x:
                emit(Pixel(w, image, row, tir.bind(x + begin), 1, interior=False))

    def inner(image: Expr, row: Expr) -> None:
        border(image, row, 0, left)
        with loop(-(-(right - left) // tile)) as t:
            column = tir.bind(T.min(t * tile + left, right - tile))
            emit(Pixel(w, image, row, column, tile, interior=True))
        border(image, row, right, w.out[1])

    with loop(w.n * w.out[0], threads=threads) as flat:
        image, row = unravel(flat, [w.n, w.out[0]])
        if not unroll:
            border(image, row, 0, w.out[1])
        elif (top, bottom) == (0, w.out[0]):
            inner(image, row)
        else:
            with T.If(T.And(row >= top, row < bottom)):
                with T.Then():
                    inner(image, row)
                with T.Else():
                    border(image, row, 0, w.out[1])
