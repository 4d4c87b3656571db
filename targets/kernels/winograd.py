# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Exact integer Winograd F(m x n, 3x3), m and n 2 or 4, for 3x3 convolutions of stride 1.

With the integer transforms (B, G and A of each dimension, see `winograd_plan.FILTERS` for G)::

    V = Bt d B          of each patch d of stored 8-bit inputs
    U = G g Gt          of each 3x3 filter g, at compile time
    M = sum over channels of U * V, for each of the (m + 2) (n + 2) positions
    At M A = scale * sum, scale = 4 (2x2), 48 = 3 * 16 (2x4, 4x2) or 576 = 9 * 64 (4x4)

V and U fit int16: a transform of F(4, 3) takes d by factors of at most 10 in all, so |V| is at
most 68 * 255 = 17340 (their signs cancel the rest), and |U| at most 12 * 12 * 128 = 18432.  All
that follows is a ring operation, so it may wrap modulo 2**32.  The odd factor of the scale has an
inverse in that ring; by its power of two the result is shifted right, which is exact where the sum,
with the bias, is within +-2**29, 2**27 or 2**25: `winograd_plan.proved` proves it for a layer.

A patch of 4x4 takes 36 products for each pair of channels in place of 144, one of 2x2 16 in place
of 36, and `vpmaddwd` does 16 in one instruction (`vpdpwssd` adds them too).  `smlal` by element
does four: as many products in a count of instructions as chains of 8-bit `smlal`, and so the same
gain.

Transformed weights take 3.6 to 8 times the bytes of int8.  Where they are too large for that the
kernel holds int8 and transforms as it goes (`_multiply_late`): a tenth to a third slower alone in
the cache, as fast in a model, whose weights come from memory.

A task (some rows of patches) copies its input rows, padded with the zero point, into a work area,
transforms them to V, then for each 16 output channels multiplies into M and transforms back,
straight into the epilogue.  V of a task stays within level 2, M of 16 channels within level 1.

Hot loop as LLVM 22 emits it (AVX2, 6 patches x 2 vectors, one channel pair): 12 `vpmaddwd`,
12 `vpaddd`, 6 broadcasts, 2 loads, no vector on the stack.

Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), sections 4.1
and 4.2, with G scaled to integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.bands import PaddedRow, copy_padded_row, fill_elements
from qcompiler.targets.kernels.epilogue import EpilogueWriter
from qcompiler.targets.kernels.register_tile import Accumulators
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    cast,
    dtype_of,
    intrinsic,
    lanes_of,
    load,
    maximum,
    minimum,
    own_function,
    parallel,
    prefetch,
    reinterpret,
    scratch,
    serial,
    shuffle,
    splat,
    store,
    when,
)
from qcompiler.targets.kernels.winograd_plan import (
    LINE,
    NV,
    WinogradPlan,
    scale_of,
    takes_pairs,
)
from qcompiler.targets.kernels.workload import ConvWorkload

__all__ = ["WinogradKernel"]


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
            v = scratch(plan.positions * plan.v_step, "int16")
            self._transform_inputs(self._copy_band(image, first, rows), v, rows)
            m = scratch(plan.positions * plan.m_step, "int32")
            u = scratch(plan.u_size, "int16") if plan.late else self.constants["weight"]
            with serial(part, minimum(part + plan.blocks, w.co // plan.columns)) as block:
                if plan.late:
                    self._multiply_late(v, u, m, block, rows)
                else:
                    with serial(plan.positions) as position:
                        w_index = bind((block * plan.positions + position) * plan.u_step)
                        at = bind(position * plan.v_step), w_index, position
                        self._multiply_all(v, u, m, at, rows)
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
        sizes = PaddedRow(w.h, w.w, w.c, w.pads[1], plan.band_width)
        band = scratch(plan.band_rows * sizes.pitch, self.isa.a_dtype)
        fill = bind(cast(load(self.constants["scalars"], 0, 1), self.isa.a_dtype))
        with serial(plan.patch[0] * rows + 2) as row:
            at = bind(plan.patch[0] * first + row - w.pads[0])
            copy_padded_row(sizes, image, at, fill, self.a, band, bind(row * sizes.pitch))
        return band

    def _transform_inputs(self, band: Buffer, v: Buffer, rows: Expr) -> None:
        """V = Bt d B, laid out [position, patch, channel]."""
        w, plan = self.workload, self.plan
        pitch = plan.band_width * w.c
        height, width = plan.patch
        channels = 32 if self.isa.vector_bits == 512 and w.c % 32 == 0 else 16
        with (
            serial(rows) as row,
            serial(plan.patch_cols) as col,
            own_function(f"{self.name}_in"),
            serial(w.c // channels) as chunk,
        ):
            start = bind(height * row * pitch + width * col * w.c + chunk * channels)
            target = bind((row * plan.patch_cols + col) * w.c + chunk * channels)

            def element(i: int, j: int) -> Expr:
                return bind(cast(load(band, start + (i * pitch + j * w.c), channels), "int16"))

            columns = [
                _input_transform([element(i, j) for i in range(height + 2)])
                for j in range(width + 2)
            ]
            for i in range(height + 2):
                for j, value in enumerate(_input_transform([column[i] for column in columns])):
                    store(v, target + (i * (width + 2) + j) * plan.v_step, value)

    def _multiply_late(self, v: Buffer, u: Buffer, m: Buffer, block: Expr, rows: Expr) -> None:
        """M of all positions and the columns of a block, with filters transformed on the way.

        One row of positions and a chunk of channels at a time: these filters stay in level 1, where
        a whole block's would go through level 2 and back.
        """
        plan = self.plan
        across = plan.patch[1] + 2
        fill_elements(m, 0, splat(0, "int32", 1), plan.positions * plan.m_step)
        for row in range(plan.patch[0] + 2):
            with serial(plan.channels // plan.chunk) as chunk:
                first_channel = bind(chunk * plan.chunk)
                self._transform_filters(u, block, first_channel, row)
                with serial(across) as col:
                    position = bind(row * across + col)
                    a_index = bind(position * plan.v_step + first_channel)
                    at = a_index, bind(col * plan.u_step), position
                    self._multiply_all(v, u, m, at, rows)

    def _transform_filters(self, u: Buffer, block: Expr, first_channel: Expr, row: int) -> None:
        """A row of U = G g Gt, of the columns of a block and a chunk of channels."""
        plan = self.plan
        weight, words = self.constants["weight"], 2 * plan.lanes
        height, width = plan.patch
        first = bind((block * plan.channels + first_channel) * (9 * plan.columns))
        with own_function(f"{self.name}_filters{row}"), serial(plan.chunk // 2 * NV) as vector:
            start = bind(first + vector * (9 * words))
            g = [bind(cast(load(weight, start + k * words, words), "int16")) for k in range(9)]
            columns = [_filter_transform(g[j::3], height)[row] for j in range(3)]
            for j, value in enumerate(_filter_transform(columns, width)):
                store(u, vector * words + j * plan.u_step, value)

    def _multiply_all(
        self, v: Buffer, u: Buffer, m: Buffer, at: tuple[Expr, Expr, Expr], rows: Expr
    ) -> None:
        """M of all tiles of a task, at one position."""
        plan = self.plan
        for start, count, size in plan.tiles.kinds:
            # The last task may have fewer patches, and so fewer tiles.
            left = rows * plan.patch_cols - start * plan.tiles.size
            tiles = bind(minimum(count, (maximum(left, 0) + (size - 1)) // size))
            with serial(tiles) as tile, own_function(f"{self.name}_tile{size}"):
                patch = bind(start * plan.tiles.size + tile * size)
                self._multiply(v, u, m, at, start + tile, patch, size)

    def _multiply(
        self,
        v: Buffer,
        u: Buffer,
        m: Buffer,
        at: tuple[Expr, Expr, Expr],
        tile: Expr,
        patch: Expr,
        mt: int,
    ) -> None:
        """M of a tile: of `mt` patches from `patch`, the columns of a block, at one position.

        Args:
            v: Transformed inputs.
            u: Transformed filters.
            m: Products.
            at: Where the position's inputs and filters start, and the position.
            tile: Which tile of the task it is.
            patch: Its first patch.
            mt: Its patches.
        """
        w, plan = self.workload, self.plan
        lanes = plan.lanes
        a_index, w_index, position = at
        a_index = bind(a_index + patch * w.c)
        target = bind(position * plan.m_step + patch * plan.columns)
        acc = Accumulators(mt, NV, lanes, "int32")
        for i in range(mt):
            for n in range(NV):
                place = target + (i * plan.columns + n * lanes)
                acc.put(i, n, load(m, place, lanes) if plan.late else splat(0, "int32", lanes))
        if takes_pairs(self.isa):
            self._by_pairs(acc, v, u, a_index, w_index, tile, mt)
        else:
            self._by_element(acc, v, u, a_index, w_index, mt)
        for i in range(mt):
            for n in range(NV):
                store(m, target + (i * plan.columns + n * lanes), acc.get(i, n))

    def _by_pairs(
        self,
        acc: Accumulators,
        v: Buffer,
        u: Buffer,
        a_index: Expr,
        w_index: Expr,
        tile: Expr,
        mt: int,
    ) -> None:
        """Products of pairs of channels, each pair in every lane."""
        w, plan, lanes = self.workload, self.plan, self.plan.lanes
        words = NV * 2 * lanes
        madd = str(self.isa.intrinsic("madd_i16", 32 * lanes))
        with serial(plan.chunk // 2) as pair:
            if plan.far and not plan.late:
                self._fetch_ahead(w_index, pair, tile)
            filters = [
                bind(load(u, w_index + pair * words + n * 2 * lanes, 2 * lanes)) for n in range(NV)
            ]
            for i in range(mt):
                both = reinterpret(load(v, a_index + pair * 2 + i * w.c, 2), "int32", 1)
                values = bind(reinterpret(splat(both, "int32", lanes), "int16", 2 * lanes))
                for n in range(NV):
                    product = intrinsic(f"int32x{lanes}", madd, values, filters[n])
                    acc.put(i, n, acc.get(i, n) + product)

    def _fetch_ahead(self, w_index: Expr, pair: Expr, tile: Expr) -> None:
        """Ask for the next position's weights, each tile for its share, evenly over its loop.

        Weights that come from beyond level 2 then arrive while those of a position are multiplied
        (12 % on 14x14x256, Golden Cove).
        """
        panel = self.workload.c * self.plan.columns
        share = panel // self.plan.tiles.tiles
        step = max(1, 2 * share // self.workload.c)
        at = w_index + panel + tile * share + pair * step
        for line in range(0, step, LINE // 2):
            prefetch(self.constants["weight"], at + line)

    def _by_element(
        self, acc: Accumulators, v: Buffer, u: Buffer, a_index: Expr, w_index: Expr, mt: int
    ) -> None:
        """Products of one channel at a time, which is one element of a register of eight."""
        w, lanes = self.workload, self.plan.lanes
        words = NV * lanes
        mul = str(self.isa.intrinsic("mul_s16", 32 * lanes))
        with serial(w.c // 8) as block:
            values = [bind(load(v, a_index + block * 8 + i * w.c, 8)) for i in range(mt)]
            for k in range(8):
                at = w_index + (block * 8 + k) * words
                filters = [bind(load(u, at + n * lanes, lanes)) for n in range(NV)]
                for i in range(mt):
                    element = bind(shuffle([values[i]], [k] * lanes))
                    for n in range(NV):
                        product = intrinsic(f"int32x{lanes}", mul, filters[n], element)
                        acc.put(i, n, acc.get(i, n) + product)

    def _transform_outputs(
        self, m: Buffer, patch: Expr, image: Expr, row: Expr, col: Expr, block: Expr
    ) -> None:
        """The outputs of one patch, through the epilogue, row by row."""
        w, plan = self.workload, self.plan
        height, width = plan.patch
        lanes = plan.lanes
        lane = bind(block * plan.columns)
        start = bind(patch * plan.columns)
        halves: list[list[list[Expr]]] = []
        for n in range(NV):

            def product(i: int, j: int, n: int = n) -> Expr:
                position = i * (width + 2) + j
                return bind(load(m, start + (position * plan.m_step + n * lanes), lanes))

            columns = ([product(i, j) for i in range(height + 2)] for j in range(width + 2))
            halves.append([_output_transform(column) for column in columns])
        biases = [bind(load(self.constants["bias"], lane + n * lanes, lanes)) for n in range(NV)]
        base = bind(((image * w.oh + height * row) * w.ow + width * col) * w.co + lane)

        def write_row(i: int) -> None:
            outputs = [_output_transform([column[i] for column in halves[n]]) for n in range(NV)]
            for j in range(width):
                values = [self._sum(outputs[n][j], biases[n]) for n in range(NV)]
                if right is not None and j >= w.ow % width:
                    with when(right):
                        self._write(values, lane, base + (i * w.ow + j) * w.co)
                else:
                    self._write(values, lane, base + (i * w.ow + j) * w.co)

        # Of the last patches, some rows and columns may lie beyond the outputs.
        right = bind(width * (col + 1) <= w.ow) if w.ow % width else None
        lower = bind(height * (row + 1) <= w.oh) if w.oh % height else None
        for i in range(height):
            if lower is not None and i >= w.oh % height:
                with when(lower):
                    write_row(i)
            else:
                write_row(i)

    def _sum(self, scaled: Expr, bias: Expr) -> Expr:
        """The sum that a result of the output transform is a multiple of, plus the bias."""
        lanes = self.plan.lanes
        scale = scale_of(self.plan.patch[0]) * scale_of(self.plan.patch[1])
        power = scale & -scale
        if scale > power:
            inverse = pow(scale // power, -1, 1 << 32)
            scaled = scaled * splat(inverse - (inverse >> 31 << 32), "int32", lanes)
        return bind((scaled + bias) >> splat(power.bit_length() - 1, "int32", lanes))

    def _write(self, values: list[Expr], lane: Expr, start: Expr) -> None:
        self.writer.store_row(values, lane, [bind(start)], self.plan.lanes)


def _times(value: Expr, power: int) -> Expr:
    """An integer vector times 2**power."""
    return bind(value << splat(power, dtype_of(value), lanes_of(value)))


def _input_transform(d: Sequence[Expr]) -> list[Expr]:
    """Bt of the inputs of a patch along one dimension."""
    if len(d) == 4:
        return [bind(d[0] - d[2]), bind(d[1] + d[2]), bind(d[2] - d[1]), bind(d[1] - d[3])]
    far = bind(d[4] - d[2])
    even = bind(_times(d[2], 2) - d[4])
    odd = bind(_times(d[1], 2) - d[3])
    twice = _times(bind(d[3] - d[1]), 1)
    return [
        bind(_times(bind(d[0] - d[2]), 2) + far),
        bind(even + odd),
        bind(even - odd),
        bind(far + twice),
        bind(far - twice),
        bind(bind(d[5] - d[3]) - _times(twice, 1)),
    ]


def _filter_transform(g: Sequence[Expr], outputs: int) -> list[Expr]:
    """G of the weights of a filter along one dimension, as `winograd_plan.FILTERS`."""
    sum_ends = bind(g[0] + g[2])
    if outputs == 2:
        ends = [_times(g[0], 1), _times(g[2], 1)]
        return [ends[0], bind(sum_ends + g[1]), bind(sum_ends - g[1]), ends[1]]
    near, near_odd = _times(sum_ends, 2), _times(g[1], 2)
    far, far_odd = bind(g[0] + _times(g[2], 2)), _times(g[1], 1)

    def scaled(value: Expr, factor: int) -> Expr:
        return bind(value * splat(factor, dtype_of(value), lanes_of(value)))

    return [
        scaled(g[0], 6),
        bind(near + near_odd),
        bind(near - near_odd),
        bind(far + far_odd),
        bind(far - far_odd),
        scaled(g[2], 12),
    ]


def _output_transform(m: Sequence[Expr]) -> list[Expr]:
    """At of the products of a patch along one dimension, times `scale_of` by the filters."""
    if len(m) == 4:
        return [bind(m[0] + m[1] + m[2]), bind(m[1] - m[2] - m[3])]
    near, near_odd = bind(m[1] + m[2]), bind(m[1] - m[2])
    far, far_odd = bind(m[3] + m[4]), bind(m[3] - m[4])
    return [
        bind(m[0] + near + far),
        bind(near_odd + _times(far_odd, 1)),
        bind(near + _times(far, 2)),
        bind(near_odd + _times(bind(_times(far_odd, 2) + m[5]), 1)),
    ]
