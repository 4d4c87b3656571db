# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Exact integer Winograd F(2x2, 3x3) for 3x3 convolutions of stride 1.

With the integer transforms::

    V = Bt d B          of each 4x4 patch d of stored u8:      |V| <= 4 * 255 = 1020
    U = 2G g (2G)t      of each 3x3 filter g, at compile time: |U| <= 9 * 128 = 1152
    M = sum over channels of U * V, for each of the 16 positions
    4 * conv = At M A   for each 2x2 patch of outputs

every step is a ring operation, so it may wrap modulo 2**32 as long as the result fits: 4 * 255 *
128 * 9 * C < 2**31 holds for C <= 1827.  A 2x2 patch takes 16 products for each channel pair of
input and output in place of 36, and `vpmaddwd` does 16 in one instruction.  `smlal` by element does
four: as many products in a count of instructions as chains of 8-bit `smlal`, and so the same gain.

A task (some rows of 2x2 patches) copies its input rows, padded with the zero point, into a work
area, transforms them to V, then for each 16 output channels multiplies into M and transforms back,
straight into the epilogue.  V of a task stays within level 2, M of 16 channels within level 1.

Hot loop as LLVM 22 emits it (AVX2, 6 patches x 2 vectors, one channel pair): 12 `vpmaddwd`,
12 `vpaddd`, 6 broadcasts, 2 loads, no vector on the stack.

Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4.1,
with G doubled to stay in integers.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.bands import copy_elements, fill_elements
from qcompiler.targets.kernels.epilogue import EpilogueWriter
from qcompiler.targets.kernels.macro import Accumulators
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    cast,
    intrinsic,
    load,
    maximum,
    minimum,
    own_function,
    parallel,
    reinterpret,
    scratch,
    serial,
    shuffle,
    splat,
    store,
    when,
)
from qcompiler.targets.kernels.winograd_plan import NV, WinogradPlan, takes_pairs
from qcompiler.targets.kernels.workload import ConvWorkload

__all__ = ["WinogradKernel"]

_CHANNELS = 16
"""Channels that the input transform takes at a time."""


@dataclass(frozen=True, slots=True)
class WinogradKernel:
    """One kernel under construction; buffers are one-dimensional."""

    isa: Isa
    workload: ConvWorkload
    plan: WinogradPlan
    a: Buffer
    constants: dict[str, Buffer]
    writer: EpilogueWriter
    name: str

    def emit(self) -> None:
        """The loop over tasks."""
        w, plan = self.workload, self.plan
        with parallel(w.n * plan.tasks * plan.splits) as task:
            part = bind(task % plan.splits * plan.blocks)
            outer = bind(task // plan.splits)
            image = bind(outer // plan.tasks)
            first = bind(outer % plan.tasks * plan.rows)
            rows = bind(minimum(plan.rows, plan.patch_rows - first))
            tiles = bind((rows * plan.patch_cols + (plan.mt - 1)) // plan.mt)
            v = scratch(16 * plan.patches * w.c, "int16")
            self._transform_inputs(self._copy_band(image, first, rows), v, rows)
            m = scratch(16 * plan.patches * plan.columns, "int32")
            with serial(part, minimum(part + plan.blocks, w.co // plan.columns)) as block:
                with (
                    serial(16) as position,
                    serial(tiles) as tile,
                    own_function(f"{self.name}_tile"),
                ):
                    self._multiply(v, m, block, position, tile)
                with (
                    serial(rows) as row,
                    serial(plan.patch_cols) as col,
                    own_function(f"{self.name}_out"),
                ):
                    at = bind(row * plan.patch_cols + col)
                    self._transform_outputs(m, at, image, first + row, col, block)

    def _copy_band(self, image: Expr, first: Expr, rows: Expr) -> Buffer:
        """The input rows of a task, padded, in the signedness that the row multiplies."""
        w, plan = self.workload, self.plan
        pitch = plan.band_width * w.c
        band = scratch((2 * plan.rows + 2) * pitch, self.isa.a_dtype)
        fill = bind(cast(load(self.constants["scalars"], 0, 1), self.isa.a_dtype))
        top, left = w.pads[0], min(w.pads[1], plan.band_width) * w.c
        inside = max(0, min(w.w, plan.band_width - w.pads[1])) * w.c
        with serial(2 * rows + 2) as row:
            at = bind(2 * first + row - top)
            target = bind(row * pitch)
            with when(at < 0):
                fill_elements(band, target, fill, pitch)
            with when(at >= w.h):
                fill_elements(band, target, fill, pitch)
            with when(maximum(0, at) == minimum(at, w.h - 1)):
                fill_elements(band, target, fill, left)
                start = bind((image * w.h + at) * (w.w * w.c))
                copy_elements(band, target + left, self.a, start, inside)
                fill_elements(band, target + (left + inside), fill, pitch - left - inside)
        return band

    def _transform_inputs(self, band: Buffer, v: Buffer, rows: Expr) -> None:
        """V = Bt d B, laid out [position, patch, channel]."""
        w, plan = self.workload, self.plan
        pitch = plan.band_width * w.c
        with (
            serial(rows) as row,
            serial(plan.patch_cols) as col,
            serial(w.c // _CHANNELS) as chunk,
            own_function(f"{self.name}_in"),
        ):
            start = bind(2 * row * pitch + 2 * col * w.c + chunk * _CHANNELS)
            target = bind((row * plan.patch_cols + col) * w.c + chunk * _CHANNELS)
            d = [
                [
                    bind(cast(load(band, start + (i * pitch + j * w.c), _CHANNELS), "int16"))
                    for j in range(4)
                ]
                for i in range(4)
            ]
            columns = [_input_transform([d[i][j] for i in range(4)]) for j in range(4)]
            for i in range(4):
                for j, value in enumerate(_input_transform([columns[k][i] for k in range(4)])):
                    store(v, target + (4 * i + j) * (plan.patches * w.c), value)

    def _multiply(self, v: Buffer, m: Buffer, block: Expr, position: Expr, tile: Expr) -> None:
        """M of `mt` patches and the columns of a block, at one position."""
        w, plan = self.workload, self.plan
        lanes, mt = plan.lanes, plan.mt
        acc = Accumulators(mt, NV, lanes, "int32")
        for i in range(mt):
            for n in range(NV):
                acc.put(i, n, splat(0, "int32", lanes))
        words = NV * 2 * lanes
        a_index = bind((position * plan.patches + tile * mt) * w.c)
        w_index = bind((block * 16 + position) * (w.c // 2 * words))
        if takes_pairs(self.isa):
            self._by_pairs(acc, v, a_index, w_index)
        else:
            self._by_element(acc, v, a_index, w_index)
        target = bind((position * plan.patches + tile * mt) * plan.columns)
        for i in range(mt):
            for n in range(NV):
                store(m, target + (i * plan.columns + n * lanes), acc.get(i, n))

    def _by_pairs(self, acc: Accumulators, v: Buffer, a_index: Expr, w_index: Expr) -> None:
        """Products of pairs of channels, each pair in every lane."""
        w, mt, lanes = self.workload, self.plan.mt, self.plan.lanes
        weight, words = self.constants["weight"], NV * 2 * lanes
        madd = str(self.isa.intrinsic("madd_i16", 32 * lanes))
        with serial(w.c // 2) as pair:
            filters = [
                bind(load(weight, w_index + pair * words + n * 2 * lanes, 2 * lanes))
                for n in range(NV)
            ]
            for i in range(mt):
                both = reinterpret(load(v, a_index + pair * 2 + i * w.c, 2), "int32", 1)
                values = bind(reinterpret(splat(both, "int32", lanes), "int16", 2 * lanes))
                for n in range(NV):
                    product = intrinsic(f"int32x{lanes}", madd, values, filters[n])
                    acc.put(i, n, acc.get(i, n) + product)

    def _by_element(self, acc: Accumulators, v: Buffer, a_index: Expr, w_index: Expr) -> None:
        """Products of one channel at a time, which is one element of a register of eight."""
        w, mt, lanes = self.workload, self.plan.mt, self.plan.lanes
        weight, words = self.constants["weight"], NV * lanes
        mul = str(self.isa.intrinsic("mul_s16", 32 * lanes))
        with serial(w.c // 8) as block:
            values = [bind(load(v, a_index + block * 8 + i * w.c, 8)) for i in range(mt)]
            for k in range(8):
                at = w_index + (block * 8 + k) * words
                filters = [bind(load(weight, at + n * lanes, lanes)) for n in range(NV)]
                for i in range(mt):
                    element = bind(shuffle([values[i]], [k] * lanes))
                    for n in range(NV):
                        product = intrinsic(f"int32x{lanes}", mul, filters[n], element)
                        acc.put(i, n, acc.get(i, n) + product)

    def _transform_outputs(
        self, m: Buffer, patch: Expr, image: Expr, row: Expr, col: Expr, block: Expr
    ) -> None:
        """The 2x2 outputs of one patch, through the epilogue."""
        w, plan = self.workload, self.plan
        lanes = plan.lanes
        lane = bind(block * plan.columns)
        outputs: list[list[Expr]] = [[] for _ in range(4)]
        for n in range(NV):
            bias = bind(load(self.constants["bias"], lane + n * lanes, lanes))

            def product(position: int, n: int = n) -> Expr:
                step = position * (plan.patches * plan.columns) + n * lanes
                return bind(load(m, patch * plan.columns + step, lanes))

            halves = [_output_transform([product(4 * i + j) for i in range(4)]) for j in range(4)]
            for i in range(2):
                for j, value in enumerate(_output_transform([halves[k][i] for k in range(4)])):
                    sums = value >> splat(2, "int32", lanes)
                    outputs[2 * i + j].append(bind(sums + bias))
        base = bind(((image * w.oh + 2 * row) * w.ow + 2 * col) * w.co + lane)

        def write(i: int, j: int) -> None:
            start = base + (i * w.ow + j) * w.co
            self.writer.store_row(outputs[2 * i + j], lane, [start], lanes)

        right = bind(2 * col + 1 < w.ow) if w.ow % 2 else None
        lower = bind(2 * row + 1 < w.oh) if w.oh % 2 else None
        for i in range(2):
            for j in range(2):
                conditions = [c for c, odd in ((lower, i), (right, j)) if odd and c is not None]
                if not conditions:
                    write(i, j)
                elif len(conditions) == 1:
                    with when(conditions[0]):
                        write(i, j)
                else:
                    with when(conditions[0]), when(conditions[1]):
                        write(i, j)


def _input_transform(d: list[Expr]) -> list[Expr]:
    """Bt of four vectors."""
    return [bind(d[0] - d[2]), bind(d[1] + d[2]), bind(d[2] - d[1]), bind(d[1] - d[3])]


def _output_transform(m: list[Expr]) -> list[Expr]:
    """At of four vectors."""
    return [bind(m[0] + m[1] + m[2]), bind(m[1] - m[2] - m[3])]
