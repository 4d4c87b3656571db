# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The macro-kernel: register tiles over all of K, for every instruction set and element type.

Tasks (image, block of tile rows, block of tile columns) go to the thread pool.  A task reads the
activations in place where it can, else it copies its band of input rows, padded, into a work area.
Register tiles of `mt` pixels x `nv` vectors then run over all of K with their accumulators in
registers.  Activation addresses in a tile are one base plus constants, since shapes are static: no
pointer per row and no im2col.

Each register tile is an LLVM function of its own: inlined into the loops around it, LLVM hoists
per-layer constants over the K loop and then spills the accumulators (measured on 16 registers:
1.6 times slower).

Hot loops as LLVM 22 emits them, one K-group, none with a vector on the stack:

* AVX512-VNNI 14x2: 28 `vpdpbusd zmm`, 14 `vpbroadcastd`, 2 loads; float32 the same with FMA;
* AVX-VNNI 6x2 or 4x3: 12 `{vex} vpdpbusd ymm`, 6 or 4 broadcasts, 2 or 3 loads;
* AVX2 4x2, safe: 8 each of `vpmaddubsw`, `vpmaddwd`, `vpaddd`, 4 broadcasts; exact: 16 `vpmaddwd`,
  16 `vpaddd`, and for each pixel a broadcast, `vpand` and `vpsrlw`;
* AVX2 3x2 at depth 2: 12 `vpmaddubsw`, 6 `vpaddw`, 6 each of `vpmaddwd` and `vpaddd`, 6
  broadcasts; 2x2 at depth D: 4 D `vpmaddubsw`, 4 (D - 1) `vpaddw`, 4 each of the others;
* SSE2 2x3: 12 `pmaddwd`, 12 `paddd`, with `movdqa` copies since instructions overwrite an operand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.bands import CHUNK, PaddedRow, copy_padded_row, widen_elements
from qcompiler.targets.kernels.depth import EXACT
from qcompiler.targets.kernels.epilogue import EpilogueWriter
from qcompiler.targets.kernels.fetch import Ahead, ahead_of
from qcompiler.targets.kernels.grouped import ROW_SUMS, grouped_loops, row_sums
from qcompiler.targets.kernels.halves import half_loops
from qcompiler.targets.kernels.near import (
    far_size_of_block,
    far_size_of_tile,
    far_sums,
    near_whole,
    whole_sums,
    with_near,
)
from qcompiler.targets.kernels.near_plan import most_listed
from qcompiler.targets.kernels.neon import by_element_loops, rows_of_tile
from qcompiler.targets.kernels.packing import Facts
from qcompiler.targets.kernels.plan import Geometry, TilePlan, unpacks_ahead
from qcompiler.targets.kernels.register_tile import Accumulators, Step
from qcompiler.targets.kernels.simd import moving_cycles, worth_threads
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    cast,
    load,
    maximum,
    minimum,
    own_function,
    parallel,
    scratch,
    serial,
    splat,
    store,
    when,
)
from qcompiler.targets.kernels.unpack import factor_pairs, factor_vectors, group_terms
from qcompiler.targets.kernels.workload import FLOATS, GemmParams

__all__ = ["MacroKernel", "Source"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a task reads activations, and what it adds to its sums."""

    buffer: Buffer
    origin: Expr
    """Element of output row 0, column 0 (of the whole image, even if the buffer is a band)."""
    pitch: int
    """Elements from one input row to the next."""
    image: Expr = 0
    first_tile: Expr = 0
    """Column tile that the weight and bias buffers begin with."""
    row_terms: Buffer | None = None
    """int32 added to every sum of an output row (products of two activations)."""
    first_row: Expr = 0
    """Output row that `row_terms` begins with."""
    weight_tile: Expr | None = None
    """Column tile that the weights begin with, where it differs from `first_tile`."""
    wide: Buffer | None = None
    """The activations in int16, for K-groups multiplied by int16 pairs (`Facts.wide`)."""
    wide_from: Expr = 0
    """Element of `buffer` that `wide` begins with."""
    far: Buffer | None = None
    """What `buffer` leaves of the activations, in lists (see `near_plan`)."""
    far_from: Expr = 0
    """Element of `far` where those of tile row `first_row_tile` begin."""
    first_row_tile: Expr = 0
    whole: Source | None = None
    """The activations before they were split, for tiles where much is far."""


@dataclass(frozen=True, slots=True)
class MacroKernel:
    """One kernel under construction; buffers are one-dimensional."""

    isa: Isa
    geometry: Geometry
    plan: TilePlan
    params: GemmParams
    facts: Facts
    a: Buffer
    constants: dict[str, Buffer]
    writer: EpilogueWriter
    name: str
    tasks: int
    """Iterations of the loop over tasks."""

    def task_loop(self, macs: int, extent: int | None = None) -> Any:
        """A loop over tasks, on the thread pool where the work pays for waking it."""
        g, lanes = self.geometry, self.isa.lanes()
        extent = self.tasks if extent is None else extent
        per_cycle = _PRODUCTS[self.isa.dot] * lanes
        if g.a_dtype in FLOATS:
            per_cycle = (2 if self.isa.fma else 1) * lanes * (1 + (g.a_dtype == "float16"))
        images = macs / max(1, g.macs)  # of products of two activations the geometry is that of one
        moved = moving_cycles(images * g.outputs, images * g.elements_read, lanes)
        threads = extent > 1 and worth_threads(macs / per_cycle + moved)
        return parallel(extent) if threads else serial(extent)

    def emit(self) -> None:
        """The loop over tasks."""
        if "group_zero" in self.constants and ROW_SUMS not in self.constants:
            replace(self, constants={**self.constants, ROW_SUMS: row_sums(self)}).emit()
            return
        g, plan = self.geometry, self.plan
        bands, wide, near = None, None, None
        if plan.col_blocks > 1:  # tasks of several column blocks share a band
            if not g.direct:
                bands = self._copy_bands()
            if self.facts.wide:
                wide = self._widened_whole(self.a if bands is None else bands)
            if self.facts.far != "none":
                near = near_whole(self, bands)
        with self.task_loop(g.macs) as task:
            block = bind(task % plan.col_blocks)
            outer = bind(task // plan.col_blocks)
            image = bind(outer // plan.row_blocks)
            first = bind(outer % plan.row_blocks * plan.row_block)
            last = bind(minimum(first + plan.row_block, plan.rows.tiles))
            begin = bind(block * plan.col_block)
            end = bind(minimum(begin + plan.col_block, plan.tiles))
            if bands is None:
                source = self.source_of_block(image, first)
                if self.facts.wide:
                    source = self._with_wide(source, first, wide)
            else:
                source = replace(self.source_in_band(bands, image, outer, first), wide=wide)
            if near is not None:
                begin_far = bind(outer * far_size_of_block(self))
                source = replace(
                    source,
                    buffer=near[0],
                    far=near[1],
                    far_from=begin_far,
                    first_row_tile=first,
                    whole=source,
                )
            elif self.facts.far != "none":
                source = with_near(self, source, (first, last))
            self.emit_task(source, (first, last), (begin, end))

    def emit_task(self, source: Source, rows: tuple[Expr, Expr], tiles: tuple[Expr, Expr]) -> None:
        """All register tiles of the tile rows and column tiles in the two half-open ranges."""
        storage, factors = self.facts.storage, self.facts.factor > 0
        if unpacks_ahead(storage, self.plan, self.params.order, factors):
            self._emit_unpacked(source, rows, tiles)
        elif self.params.order == "n":
            with serial(*tiles) as tile:
                for row_tile, size in self.row_tiles(rows):
                    self._row(source, row_tile, size, (tile, None))
        else:
            for row_tile, size in self.row_tiles(rows):
                self._row(source, row_tile, size, tiles)

    def _emit_unpacked(
        self, source: Source, rows: tuple[Expr, Expr], tiles: tuple[Expr, Expr]
    ) -> None:
        """The same, by columns, with the weights of each column tile unpacked first."""
        packed = self.step(Accumulators(1, self.plan.nv, self.plan.lanes, "int32"))
        plain = replace(packed, storage="plain")
        dtype = {"exact": "int16", "float": "float32"}.get(self.facts.dot, "int8")
        if dtype == "int16" and self.isa.a_dtype == "int8":
            dtype = "int8"  # products of bytes, widened one by one
        area = scratch(self.geometry.k_groups * plain.weight_elements, dtype)
        constants = {**self.constants, "weight": area}
        facts, factors = replace(self.facts, storage="plain"), None
        if self.facts.dot != "maddubs":
            facts = replace(facts, factor=0)
        elif self.facts.factor:
            runs = self.geometry.k_groups // self.facts.factor
            factors = constants["factors"] = scratch(runs * 2 * self.plan.nt, "int16")
        kernel = replace(self, constants=constants, facts=facts)
        with serial(*tiles) as tile:
            first = bind(tile * (self.geometry.k_groups * packed.weight_elements))
            with own_function(f"{self.name}_unpack"):
                with self._each_group(packed, tile) as (step, k):
                    to = bind(k * plain.weight_elements)
                    step.unpack(first + k * step.weight_elements, area, to)
                if factors is not None:
                    self._unpack_factors(tile, factors)
            for row_tile, size in self.row_tiles(rows):
                kernel._row(replace(source, weight_tile=tile), row_tile, size, (tile, None))

    def _unpack_factors(self, tile: Expr, area: Buffer) -> None:
        """Write the factors of a column tile as the int16 pairs that multiply int16 sums."""
        runs, nt, lanes = self.geometry.k_groups // self.facts.factor, self.plan.nt, self.plan.lanes
        with serial(runs) as run:
            for v, pairs in enumerate(self.factors(bind(tile * runs + run))):
                store(area, run * (2 * nt) + v * (2 * lanes), pairs)

    def factors(self, run: Expr) -> list[Expr]:
        """The factors of a run of K-groups, counted from the first column tile in the buffer."""
        nt, nv, lanes = self.plan.nt, self.plan.nv, self.plan.lanes
        held = self.constants["factors"]
        if held.dtype == "int16":
            size = 2 * lanes
            return [bind(load(held, run * (2 * nt) + v * size, size)) for v in range(nv)]
        found = factor_vectors(held, bind(run * (nt // 2)), nv, lanes)
        if self.facts.dot != "maddubs":
            return found
        return [bind(factor_pairs(factor, lanes)) for factor in found]

    def step(self, acc: Accumulators) -> Step:
        """The step of a kernel with one kind of K-groups."""
        return Step(self.isa, self.facts.dot, self.constants["weight"], acc, self.facts.storage)

    def narrow_step(self, acc: Accumulators) -> Step:
        """The step that multiplies one K-group of 8-bit weights by `vpmaddubsw`."""
        return Step(self.isa, "maddubs", self.constants["weight"], acc)

    @contextmanager
    def _each_group(self, step: Step, tile: Expr) -> Iterator[tuple[Step, Expr]]:
        """A loop over the K-groups of a column tile; gives the step that multiplies one."""
        count, size = self.geometry.k_groups, self.facts.group
        factor = self.facts.factor
        if factor:
            with serial(count // factor) as run:
                step = replace(step, factors=self.factors(bind(tile * (count // factor) + run)))
                with serial(factor) as k:
                    yield step, bind(run * factor + k)
            return
        if self.facts.storage not in ("group8", "group4"):
            with serial(count) as k:
                yield step, k
            return
        with serial(count // size) as group:
            index = bind((tile * (count // size) + group) * self.plan.nt)
            zeros = self.constants.get("zeros")
            scales = self.constants["scales"]
            terms = group_terms(scales, zeros, index, self.plan.nv, self.plan.lanes)
            with serial(size) as k:
                yield replace(step, terms=terms), bind(group * size + k)

    def row_tiles(self, row_range: tuple[Expr, Expr]) -> list[tuple[tuple[Expr, Expr], int]]:
        """The ranges of tile rows of each size."""
        first, last = row_range
        if self.plan.rows.small == 0:
            return [((first, last), self.plan.rows.size)]
        found = []
        for start, count, size in self.plan.rows.kinds:
            low = bind(maximum(first, start))
            high = bind(maximum(low, minimum(last, start + count)))
            found.append(((low, high), size))
        return found

    def _row(
        self,
        source: Source,
        row_tiles: tuple[Expr, Expr],
        size: int,
        tiles: tuple[Expr, Expr | None],
    ) -> None:
        """Tile rows of one size, for one column tile or for a range of them."""
        plan = self.plan
        with serial(*row_tiles) as row_tile:
            row = bind(self.first_row_of(row_tile))
            for col_from, col_count, cols in plan.cols.kinds:
                with serial(col_count) as col_tile:
                    col = bind(col_from * plan.cols.size + col_tile * cols)
                    far = None
                    if source.far is not None:
                        before = (row_tile - source.first_row_tile) * plan.cols.tiles
                        before = (before + col_from + col_tile) * far_size_of_tile(self)
                        far = bind(source.far_from + before)
                    if tiles[1] is None:
                        self._tile(source, (row, col), (size, cols), tiles[0], far)
                        continue
                    with serial(*tiles) as tile:
                        self._tile(source, (row, col), (size, cols), tile, far)

    def first_row_of(self, row_tile: Expr) -> Expr:
        """First output row of a tile row."""
        rows = self.plan.rows
        if rows.small == 0:
            return row_tile * rows.size
        return row_tile * (rows.size - 1) + minimum(row_tile, rows.big)

    def source_of_block(self, image: Expr, first: Expr) -> Source:
        """Where a block of tile rows from `first` on reads: in place, or a band copied for it."""
        g = self.geometry
        if g.direct:
            return Source(self.a, bind(image * (g.h * g.w * g.c)), g.w * g.c, image)
        first_row = bind(self.first_row_of(first))
        pitch = g.band_width * g.c
        band = self._work_area(1)
        with serial(g.band_rows(self.plan.band)) as row:
            self._copy_row(image, first_row, row, band, bind(row * pitch))
        return Source(band, bind(0 - first_row * (g.sh * pitch)), pitch, image)

    def source_in_band(self, bands: Buffer, image: Expr, block: Expr, first: Expr) -> Source:
        """The source of a block of tile rows from `first` on, whose band is among `bands`."""
        pitch = self.geometry.band_width * self.geometry.c
        start = block * self.band_size - self.first_row_of(first) * (self.geometry.sh * pitch)
        return Source(bands, bind(start), pitch, image)

    def _with_wide(self, source: Source, first: Expr, whole: Buffer | None) -> Source:
        """The source of a task with its activations in int16 as well."""
        g = self.geometry
        if whole is not None:
            return replace(source, wide=whole)
        if not g.direct:
            area = scratch(self.band_size + CHUNK, "int16")
            widen_elements(area, 0, source.buffer, 0, self.band_size)
            return replace(source, wide=area)
        pitch = g.w * g.c
        row = bind(self.first_row_of(first) * g.sh)
        most = g.band_rows(self.plan.band)
        area = scratch(most * pitch + CHUNK, "int16")
        begin = bind(source.origin + row * pitch)
        with serial(bind(minimum(most, g.h - row))) as near:
            widen_elements(area, near * pitch, source.buffer, begin + near * pitch, pitch)
        return replace(source, wide=area, wide_from=begin)

    def _widened_whole(self, narrow: Buffer) -> Buffer:
        """All activations in int16."""
        g = self.geometry
        if g.direct:
            pieces, size = g.batch * g.h, g.w * g.c
        else:
            pieces, size = g.batch * self.plan.row_blocks, self.band_size
        area = scratch(pieces * size + CHUNK, "int16")
        with self.task_loop(g.macs, pieces) as piece:
            start = bind(piece * size)
            widen_elements(area, start, narrow, start, size)
        return area

    @property
    def band_size(self) -> int:
        """Elements of a padded band of input rows."""
        g = self.geometry
        return g.band_rows(self.plan.band) * g.band_width * g.c

    def _work_area(self, bands: int) -> Buffer:
        g = self.geometry
        dtype = g.a_dtype if g.a_dtype in FLOATS else g.dot_dtype
        return scratch(bands * self.band_size + CHUNK, dtype)

    def _copy_bands(self) -> Buffer:
        """Copy the bands of all tasks, one after the other."""
        g, plan = self.geometry, self.plan
        count = g.batch * plan.row_blocks
        rows, pitch = g.band_rows(plan.band), g.band_width * g.c
        area = self._work_area(count)
        with self.task_loop(g.macs, count * rows) as index:
            band = bind(index // rows)
            row = bind(index % rows)
            first_row = bind(self.first_row_of(bind(band % plan.row_blocks * plan.row_block)))
            self._copy_row(bind(band // plan.row_blocks), first_row, row, area, bind(index * pitch))
        return area

    def _copy_row(
        self, image: Expr, first_row: Expr, row: Expr, band: Buffer, target: Expr
    ) -> None:
        """Copy one input row that a task reads into a padded work area."""
        g = self.geometry
        fill = bind(cast(load(self.constants["scalars"], 0, 1), str(band.dtype)))
        top = bind(first_row * g.sh + row - g.pt)
        sizes = PaddedRow(g.h, g.w, g.c, g.pl, g.band_width)
        copy_padded_row(sizes, image, top, fill, self.a, band, target)

    def _tile(
        self,
        source: Source,
        at: tuple[Expr, Expr],
        extent: tuple[int, int],
        tile: Expr,
        far: Expr = None,
    ) -> None:
        """One register tile: `extent` pixels from pixel `at`, the vectors of one column tile.

        The list of what is far in them begins at element `far`.
        """
        g, plan = self.geometry, self.plan
        row, col = at
        a_index = source.origin + row * (g.sh * source.pitch) + col * (g.sw * g.c)
        if g.groups > 1:
            a_index = a_index + tile // plan.group_tiles * g.cg
        a_index = bind(a_index)
        if source.far is None or source.whole is None:
            with own_function(f"{self.name}_tile"):
                self._tile_body(source, a_index, at, extent, tile)
            return
        count = bind(load(source.far, far, 1))
        most = most_listed(g)
        with when(count <= most), own_function(f"{self.name}_tile"):
            self._tile_body(source, a_index, at, extent, tile, far)
        a_index = bind(a_index - source.origin + source.whole.origin)
        with when(count > most), own_function(f"{self.name}_tile"):
            self._tile_body(source.whole, a_index, at, extent, tile)

    def _tile_body(
        self,
        source: Source,
        a_index: Expr,
        at: tuple[Expr, Expr],
        extent: tuple[int, int],
        tile: Expr,
        far: Expr = None,
    ) -> None:
        g, plan = self.geometry, self.plan
        lanes, nv = plan.lanes, plan.nv
        row, col = at
        pixels = [(r, c) for r in range(extent[0]) for c in range(extent[1])]
        a_steps = self.pixel_steps(source, extent)

        dtype = {"float": "float32", "half": "float16"}.get(self.facts.dot, "int32")
        narrow = max(self.facts.depths) > 1
        acc = Accumulators(rows_of_tile(self.facts.dot, pixels), nv, lanes, dtype, narrow=narrow)
        near_tile = bind(tile - source.first_tile)
        near_row = bind(row - source.first_row)
        totals = acc
        if self.writer.epilogue.group or self.facts.dot == "half":
            totals = Accumulators(len(pixels), nv, lanes, "float32")
        for v in range(nv):
            index = near_tile * plan.nt + v * lanes
            bias = bind(load(self.constants["bias"], index, lanes))
            for m, (r, _) in enumerate(pixels):
                total = bias
                if source.row_terms is not None:
                    term = load(source.row_terms, near_row + r, 1)
                    total = total + splat(term, "int32", lanes)
                totals.put(m, v, total)

        weight_tile = near_tile
        if source.weight_tile is not None:
            weight_tile = bind(tile - source.weight_tile)
        channels = g.groups * g.n
        starts, valid = self.columns(tile)
        first = bind((source.image * g.oh + row) * g.ow + col)
        base = bind(first * channels)
        lane = bind(tile * plan.nt)
        if source.far is not None:
            far_sums(self, (source.far, far), len(pixels), weight_tile, acc)
        if self.facts.far != "none" and source.far is None:
            whole_sums(self, source, a_index, a_steps, weight_tile, acc)
        elif totals is acc:
            outputs = [base + start for start in starts] if valid == lanes else []
            ahead = ahead_of(self, source, a_index, at, len(pixels), weight_tile, outputs)
            self._k_loops(source, a_index, a_steps, weight_tile, acc, ahead)
        elif self.facts.dot == "half":
            half_loops(self, source, a_index, a_steps, weight_tile, (acc, totals))
        else:
            rows = [bind(first + (r * g.ow + c)) for r, c in pixels]
            grouped_loops(self, source, a_index, a_steps, (weight_tile, tile), (acc, totals), rows)

        for m, (r, c) in enumerate(pixels):
            step = (r * g.ow + c) * channels
            values = [totals.get(m, v) for v in range(nv)]
            self.writer.store_row(values, lane, [base + start + step for start in starts], valid)

    def pixel_steps(self, source: Source, extent: tuple[int, int]) -> list[int]:
        """Offset of the activations of each pixel of a register tile from the first's."""
        g = self.geometry
        pixels = [(r, c) for r in range(extent[0]) for c in range(extent[1])]
        return [r * g.sh * source.pitch + c * g.sw * g.c for r, c in pixels]

    def columns(self, tile: Expr) -> tuple[list[Expr], int]:
        """Output channel of the vectors of a tile (see `plan.column_index`), and valid lanes.

        One start where the vectors follow each other, else one for each.
        """
        g, plan = self.geometry, self.plan
        lanes, nv, nt = plan.lanes, plan.nv, plan.nt
        if g.n < lanes:
            return [bind(tile * g.n)], g.n
        group = tile // plan.group_tiles
        if g.n < nt:
            return [bind(group * g.n + min(v * lanes, g.n - lanes)) for v in range(nv)], lanes
        if g.n % nt == 0:
            return [bind(tile * nt)], lanes
        within = tile % plan.group_tiles
        return [bind(group * g.n + minimum(within * nt, g.n - nt))], lanes

    def _k_loops(
        self,
        source: Source,
        a_index: Expr,
        a_steps: list[int],
        tile: Expr,
        acc: Accumulators,
        ahead: Ahead | None = None,
    ) -> None:
        """Accumulate over all of K."""
        g = self.geometry
        offsets = self.constants.get("offsets")
        if self.facts.dot == "mixed":
            self._mixed_loops(source, a_index, a_steps, tile, acc)
            return
        if self.isa.a_dtype == "int8" and self.facts.dot != "float":
            by_element_loops(self, source, a_index, a_steps, tile, acc)
            return
        step = self.step(acc)
        first = bind(tile * (g.k_groups * step.weight_elements))
        (depth,) = self.facts.depths

        def block(step: Step, start: Expr, size: int) -> None:
            at = [start + k for k in range(size)]
            steps = [k * g.k_group if offsets is None else load(offsets, k, 1) for k in at]
            begin = first + start * step.weight_elements
            step.emit(*self._read_by(step, source, a_index), steps, a_steps, begin)

        if depth == 1:

            def group(one: Step, k: Expr) -> None:
                if ahead is not None:
                    ahead.operands(k)
                block(one, k, 1)

            if ahead is None or not ahead.groups:
                with self._each_group(step, tile) as (one, k):
                    group(one, k)
                return
            with serial(ahead.pixels) as pixel:
                ahead.results(pixel)
                start = bind(pixel * ahead.groups)
                with serial(ahead.groups) as k:
                    group(step, bind(start + k))
            if g.k_groups % ahead.pixels:
                with serial(ahead.pixels * ahead.groups, g.k_groups) as k:
                    group(step, k)
            return
        factor = self.facts.factor
        with serial(g.k_groups // depth) as k:
            if factor:
                run = tile * (g.k_groups // factor) + k * depth // factor
                step = replace(step, factors=self.factors(bind(run)))
            block(step, k * depth, depth)
        if g.k_groups % depth:
            block(step, g.k_groups // depth * depth, g.k_groups % depth)

    def _read_by(self, step: Step, source: Source, a_index: Expr) -> tuple[Buffer, Expr]:
        """The activations that a step multiplies, and the index of the first pixel's there."""
        if source.wide is None or step.kind != "exact":
            return source.buffer, a_index
        return source.wide, a_index - source.wide_from

    def _mixed_loops(
        self, source: Source, a_index: Expr, a_steps: list[int], tile: Expr, acc: Accumulators
    ) -> None:
        """The sections of the tile's list, from the deepest int16 sums to exact int16 pairs."""
        offsets, spans = self.constants["offsets"], self.constants["spans"]
        depths = self.facts.depths
        table = bind(tile * self.geometry.k_groups)
        span = bind(tile * (len(depths) + 2))
        group = load(spans, span + len(depths), 1)
        for section, depth in enumerate(depths):
            if depth == EXACT:
                step = Step(self.isa, "exact", self.constants["weight_exact"], acc)
                group = load(spans, span + len(depths) + 1, 1)
            else:
                step = self.narrow_step(acc)
            size = max(depth, 1)
            count = bind(load(spans, span + section, 1))
            first = bind(group * step.weight_elements)
            with serial(count) as k:
                steps = [load(offsets, table + k * size + i, 1) for i in range(size)]
                begin = first + k * (size * step.weight_elements)
                step.emit(*self._read_by(step, source, a_index), steps, a_steps, begin)
            table = bind(table + count * size)
            group = bind(group + count * size)


_PRODUCTS = {"vpdpbusd": 8, "sdot": 8, "smmla": 16, "maddubs": 4, "smlal": 3, "none": 2}
"""Products in a cycle for each 32-bit lane, by dot instruction (two ports)."""
