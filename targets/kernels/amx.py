# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The macro-kernel on AMX tiles: blocks of accumulator tiles over all of K (see `amx_plan`).

A task loads the tile configuration, copies its activations where they cannot be read in place, and
walks blocks of `mt` x `nv` accumulator tiles: 16 `mt` pixels by 16 `nv` output columns.  An
accumulator starts as its columns' biases, one row loaded sixteen times (stride 0).  A finished
block goes through a work area in level 1 into the epilogue that all kernels share.

Hot loop, one chunk of K of a 2 x 2 block: 4 `tileloadd`, 4 `tdpbusd`: 65536 products in 64 cycles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.amx_plan import TILE_ROWS, TilesPlan, tile_registers
from qcompiler.targets.kernels.bands import (
    PaddedRow,
    copy_elements,
    copy_padded_row,
    fill_elements,
)
from qcompiler.targets.kernels.epilogue import EpilogueWriter
from qcompiler.targets.kernels.macro import MacroKernel
from qcompiler.targets.kernels.packing import Facts
from qcompiler.targets.kernels.plan import Geometry
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
    prefetch,
    reinterpret,
    scratch,
    serial,
    splat,
    store,
    when,
)
from qcompiler.targets.kernels.unpack import byte_products
from qcompiler.targets.kernels.workload import GemmParams

__all__ = ["TilesKernel"]

_MACS_PER_CYCLE = 250
"""Far below the peak of 1024, so that threads share kernels of ten microseconds: a woken pool is
quick, and others run on one thread for as long."""
_LONG = 24
_AWAKE = 4
"""From `_LONG` chunks of K on, there is a store of a tile every `_AWAKE` chunks.

On Sapphire Rapids a `tilestored` takes a quarter of a microsecond when there was none for about
0.6 us, else 4 ns.  Without stores in between, the one at the end of a long K costs up to a quarter
of the time (14 x 14 x 256, 3 x 3: 61 us; with them 51)."""
_NEAR_BYTES = 16 * 1024
"""Weights of a column tile that are fetched ahead; smaller ones come soon enough by themselves."""


def _tile_op(name: str, *operands: Expr) -> None:
    """Emit an AMX instruction; tile registers are constants."""
    code = T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
    T.evaluate(T.call_llvm_intrin("void", code, *operands))


def _register(number: int) -> Expr:
    return tirx.const(number, "int8")


def _stride(size: int) -> Expr:
    return tirx.const(size, "int64")


@dataclass(frozen=True, slots=True)
class _Task:
    """Where a task reads and writes."""

    a: Buffer
    origin: Expr
    """Byte of the task's first pixel."""
    out: Expr
    """Output pixel of the task's first pixel."""
    pixels: Expr
    """Pixels of the task."""


@dataclass(frozen=True, slots=True)
class TilesKernel:
    """One kernel under construction; buffers are one-dimensional."""

    isa: Isa
    geometry: Geometry
    plan: TilesPlan
    vectors: MacroKernel
    """The kernel on vectors of the same columns, for where they lie."""
    params: GemmParams
    facts: Facts
    a: Buffer
    constants: dict[str, Buffer]
    writer: EpilogueWriter
    name: str
    first_tile: Expr = 0
    """Column tile that the weights begin with."""

    def emit(self) -> None:
        """The loop over tasks."""
        g, plan, columns = self.geometry, self.plan, self.vectors.plan
        bands = g.batch * plan.bands
        apart = plan.source != "direct" and columns.col_blocks > 1
        area = -(-plan.area // 64) * 64
        shared = scratch(bands * area, "uint8") if apart else None
        if shared is not None:
            with self._loop(bands) as band:
                self._copy(*self._band(band), shared, bind(band * area))
        with self._loop(bands * columns.col_blocks) as task:
            block = bind(task % columns.col_blocks)
            band = bind(task // columns.col_blocks)
            begin = bind(block * columns.col_block)
            end = bind(minimum(begin + columns.col_block, columns.tiles))
            image, first, rows = self._band(band)
            _tile_op("ldtilecfg", self._address(self.constants["config"], 0))
            out = bind((image * g.oh + first) * g.ow)
            pixels = bind((rows - 1) * plan.pitch + g.ow)
            if plan.source == "direct":
                origin = bind((image * g.h + first) * (g.w * g.c))
                where = _Task(self.a, origin, out, pixels)
            elif shared is not None:
                where = _Task(shared, bind(band * area), out, pixels)
            else:
                own = scratch(area, "uint8")
                self._copy(image, first, rows, own, 0)
                where = _Task(own, 0, out, pixels)
            if self.facts.storage == "int4":
                self._unpacked(begin, end)._blocks(where, begin, end)
            else:
                self._blocks(where, begin, end)
            _tile_op("tilerelease")

    def _unpacked(self, begin: Expr, end: Expr) -> TilesKernel:
        """The kernel that reads a task's weights of 4 bits from a work area, as bytes."""
        lines = self.plan.chunks * self.params.nv * 16 * self.plan.chunk // 64
        packed = self.constants["weight"]
        area = scratch(self.vectors.plan.col_block * lines * 64, "int8")
        shared = self.facts.factor or 1
        with (
            own_function(f"{self.name}_unpack"),
            serial((end - begin) * (lines // shared)) as run,
        ):
            factors = self._factors(bind(begin * (lines // shared) + run))
            with serial(shared) as k:
                line = bind(run * shared + k)
                pairs = bind(load(packed, (begin * lines + line) * 32, 32))
                for half, nibble in enumerate(
                    (pairs & splat(15, "uint8", 32), pairs >> splat(4, "uint8", 32))
                ):
                    value = reinterpret(nibble - splat(8, "uint8", 32), "int8", 32)
                    if factors:
                        value = byte_products(bind(value), factors[half], 8)
                    store(area, line * 64 + half * 32, value)
        return replace(self, constants={**self.constants, "weight": area}, first_tile=begin)

    def _factors(self, run: Expr) -> list[Expr]:
        """Factors of the codes of some lines, int32: of each half of the columns."""
        if not self.facts.factor:
            return []
        pairs = bind(load(self.constants["factors"], run * 8, 8))
        nibbles = pairs & splat(15, "uint8", 8), pairs >> splat(4, "uint8", 8)
        return [bind(cast(bind(nibble), "int32") + splat(1, "int32", 8)) for nibble in nibbles]

    def _loop(self, extent: int) -> Any:
        g = self.geometry
        moved = moving_cycles(g.outputs, g.elements_read, self.isa.lanes())
        threads = extent > 1 and worth_threads(g.macs / _MACS_PER_CYCLE + moved)
        return parallel(extent) if threads else serial(extent)

    def _band(self, band: Expr) -> tuple[Expr, Expr, Expr]:
        """Image, first output row and number of output rows of a task."""
        plan = self.plan
        image = bind(band // plan.bands)
        first = bind(band % plan.bands * plan.rows)
        return image, first, bind(minimum(plan.rows, self.geometry.oh - first))

    @staticmethod
    def _address(buffer: Buffer, index: Expr) -> Expr:
        return T.address_of(buffer[index])

    # --- blocks of accumulators

    def _blocks(self, task: _Task, begin: Expr, end: Expr) -> None:
        """All register blocks of a task, for column tiles in [begin, end).

        The epilogue of a block comes after the products of the next one have been issued: these are
        few instructions that take long, so both run at the same time.
        """
        mt, nv = self.params.mt, self.params.nv
        tiles = bind((task.pixels + (TILE_ROWS - 1)) // TILE_ROWS)
        count = bind((tiles + (mt - 1)) // mt)
        sums = scratch(mt * nv * 256, "int32")
        # One row that stores without meaning go to, then the block whose sums are waiting. TVM
        # shrinks buffers to the elements that it sees used, so the first one is.
        before = scratch(256, "int32")
        store(before, 0, splat(0, "int32", 1))

        def step(block: Expr, tile: Expr) -> None:
            first = bind(block * mt)
            size = bind(minimum(mt, tiles - first))
            self._multiply(task, block, size, tile, before)
            with when(block + (tile - begin) > 0):
                self._store(task, before, sums)
            self._spill(size, sums)
            for position, value in enumerate((first, size, tile)):
                store(before, 16 + position, value)

        if self.params.order == "n":
            with serial(begin, end) as tile, serial(count) as block:
                step(block, tile)
        else:
            with serial(count) as block, serial(begin, end) as tile:
                step(block, tile)
        self._store(task, before, sums)

    def _first_pixels(self, task: _Task, first: Expr, count: int) -> list[Expr]:
        """First pixel of each tile of a block; the last tile of a task ends with the task."""
        return [
            bind(minimum((first + i) * TILE_ROWS, task.pixels - TILE_ROWS)) for i in range(count)
        ]

    def _spill(self, size: Expr, sums: Buffer) -> None:
        """Store the accumulators of a block of `size` pixel tiles."""
        mt, nv = self.params.mt, self.params.nv
        registers = tile_registers(mt, nv)

        def rows(m: int) -> None:
            for v in range(nv):
                to = self._address(sums, m * nv * 256 + v * 16)
                _tile_op("tilestored64", _register(registers.acc(m, v)), to, _stride(nv * 64))

        rows(0)
        for m in range(1, mt):
            with when(size > m):
                rows(m)

    def _multiply(self, task: _Task, block: Expr, size: Expr, tile: Expr, before: Buffer) -> None:
        """The sums of one block of at most `mt` pixel tiles, left in the tile registers."""
        mt = self.params.mt
        for count in range(mt, 0, -1):
            with when(size == count), own_function(f"{self.name}_block"):
                self._multiply_tiles(task, block, count, tile, before)

    def _lines_ahead(self) -> int:
        """Cache lines of the next column tile's weights to ask for with each chunk of K.

        Weights come from level 3 or memory once for each column tile; asked for evenly during the
        blocks of the tile before, they arrive while others are multiplied.
        """
        plan, params = self.plan, self.params
        unpacked = self.facts.storage != "plain"
        if (
            unpacked
            or params.order != "n"
            or plan.chunks * params.nv * 16 * plan.chunk < _NEAR_BYTES
        ):
            return 0
        pixels = (plan.rows - 1) * plan.pitch + self.geometry.ow
        blocks = -(-pixels // (TILE_ROWS * params.mt))
        return -(-params.nv * 16 * plan.chunk // (64 * blocks))

    def _multiply_tiles(
        self, task: _Task, block: Expr, count: int, tile: Expr, before: Buffer
    ) -> None:
        plan, params = self.plan, self.params
        firsts = self._first_pixels(task, bind(block * params.mt), count)
        ahead = self._lines_ahead()
        nv, chunk = params.nv, plan.chunk
        registers = tile_registers(params.mt, nv)
        bias = self.constants["bias"]
        for v in range(nv):
            row = self._address(bias, bind((tile * nv + v) * 16))
            for m in range(len(firsts)):
                _tile_op("tileloadd64", _register(registers.acc(m, v)), row, _stride(0))
        size = 16 * chunk
        weight = bind((tile - self.first_tile) * (plan.chunks * nv * size))
        starts = [bind(task.origin + first * plan.pixel) for first in firsts]
        offsets = self.constants.get("offsets")
        size_all = plan.chunks * nv * size
        wanted = bind(weight + size_all + block * (plan.chunks * ahead * 64)) if ahead else weight

        def step(k: Expr) -> None:
            for line in range(ahead):
                prefetch(self.constants["weight"], wanted + (k * ahead + line) * 64)
            offset = bind(load(offsets, k, 1) if offsets is not None else k * chunk)
            at = bind(weight + k * (nv * size))
            self._multiply_chunk(task, [start + offset for start in starts], at)

        if plan.chunks < _LONG:
            with serial(plan.chunks) as k:
                step(k)
            return
        with serial(plan.chunks // _AWAKE) as group:
            for k in range(_AWAKE):
                step(bind(group * _AWAKE + k))
            here = self._address(before, 0)
            _tile_op("tilestored64", _register(registers.b(0)), here, _stride(0))
        with serial(plan.chunks % _AWAKE) as k:
            step(bind(plan.chunks // _AWAKE * _AWAKE + k))

    def _multiply_chunk(self, task: _Task, starts: list[Expr], weight: Expr) -> None:
        """Add the products of one chunk of K, for pixel tiles from bytes `starts` on."""
        plan, nv = self.plan, self.params.nv
        registers = tile_registers(self.params.mt, nv)
        size = 16 * plan.chunk

        def load_b(v: int) -> None:
            source = self._address(self.constants["weight"], weight + v * size)
            _tile_op("tileloadd64", _register(registers.b(v)), source, _stride(64))

        b_first = registers.b_count == nv
        if b_first:
            for v in range(nv):
                load_b(v)
        for m, start in enumerate(starts):
            source = self._address(task.a, start)
            _tile_op("tileloadd64", _register(registers.a(m)), source, _stride(plan.pixel))
            for v in range(nv):
                if not b_first:
                    load_b(v)
                acc, a, b = registers.acc(m, v), registers.a(m), registers.b(v)
                _tile_op("tdpbusd", _register(acc), _register(a), _register(b))

    def _store(self, task: _Task, before: Buffer, sums: Buffer) -> None:
        """The epilogue of the block that waits in `sums`."""
        with own_function(f"{self.name}_store"):
            first, size, tile = (bind(load(before, 16 + i, 1)) for i in range(3))
            nv = self.params.nv
            starts, valid = self.vectors.columns(tile)
            lane = bind(tile * (nv * 16))
            quads = valid == 16 and len(starts) == 1 and self.writer.packs_quads(16)
            at_once = max(1, 4 // nv) if quads and nv in (1, 2, 4) else 1
            with serial(size) as m:
                pixel = bind(minimum((first + m) * TILE_ROWS, task.pixels - TILE_ROWS))
                with serial(TILE_ROWS // at_once) as group:
                    rows = [group * at_once + i for i in range(at_once)]
                    bases = [self._output(task, pixel + row) for row in rows]
                    values = [
                        bind(load(sums, (m * TILE_ROWS + row) * (nv * 16) + v * 16, 16))
                        for row in rows
                        for v in range(nv)
                    ]
                    if len(values) == 4 and quads:
                        lanes_at = [lane + i % nv * 16 for i in range(4)]
                        runs = [bind(base + starts[0]) for base in bases]
                        self.writer.store_quad(values, lanes_at, runs, nv)
                    else:
                        runs = [bind(bases[0] + start) for start in starts]
                        self.writer.store_row(values, lane, runs, valid)

    def _output(self, task: _Task, pixel: Expr) -> Expr:
        """Element of the output at which a pixel's channels start."""
        places = self.constants.get("places")
        place = pixel if places is None else load(places, pixel, 1)
        return bind((task.out + place) * self.geometry.n)

    # --- copies of activations

    def _copy(self, image: Expr, first: Expr, rows: Expr, target: Buffer, origin: Expr) -> None:
        """Copy what a task reads to `target` from `origin` on."""
        if self.plan.source == "planes":
            self._copy_planes(image, first, target, origin)
        else:
            self._copy_rows(image, first, rows, target, origin)

    def _fill(self) -> Expr:
        return bind(cast(load(self.constants["scalars"], 0, 1), "uint8"))

    def _copy_planes(self, image: Expr, first: Expr, target: Buffer, origin: Expr) -> None:
        g, plan = self.geometry, self.plan
        fill = self._fill()
        pitch = plan.pitch * g.c
        for number, (py, px) in enumerate(plan.planes):
            left = min(plan.pitch, max(0, -(-(g.pl - px) // g.sw)))
            last = (g.w - 1 + g.pl - px) // g.sw  # the last column of the plane inside the input
            inside = max(0, min(plan.pitch, last + 1) - left)
            with serial(plan.plane_rows) as row:
                top = bind((first + row) * g.sh + (py - g.pt))
                to = bind(origin + (number * plan.plane_rows + row) * pitch)
                with when(top < 0):
                    fill_elements(target, to, fill, pitch)
                with when(top >= g.h):
                    fill_elements(target, to, fill, pitch)
                with when(maximum(0, top) == minimum(top, g.h - 1)):
                    fill_elements(target, to, fill, left * g.c)
                    column = left * g.sw + px - g.pl
                    start = bind(((image * g.h + top) * g.w + column) * g.c)
                    begin = bind(to + left * g.c)
                    if g.sw == 1:
                        copy_elements(target, begin, self.a, start, inside * g.c)
                    elif inside:
                        with serial(inside) as x:
                            copy_elements(
                                target,
                                bind(begin + x * g.c),
                                self.a,
                                bind(start + x * (g.sw * g.c)),
                                g.c,
                            )
                    rest = plan.pitch - left - inside
                    fill_elements(target, begin + inside * g.c, fill, rest * g.c)

    def _copy_rows(
        self, image: Expr, first: Expr, rows: Expr, target: Buffer, origin: Expr
    ) -> None:
        """Im2col from a padded band; pieces overlap the next, which then overwrites them."""
        g, plan = self.geometry, self.plan
        band_rows = g.band_rows(plan.rows)
        sizes = PaddedRow(g.h, g.w, g.c, g.pl, g.band_width)
        pitch = sizes.pitch
        band = scratch(band_rows * pitch + 64, "uint8")
        fill = self._fill()
        with serial(band_rows) as row:
            top = bind(first * g.sh + row - g.pt)
            copy_padded_row(sizes, image, top, fill, self.a, band, bind(row * pitch))
        wide = g.dw == 1 or g.kw == 1
        run = g.c * (g.kw if wide else 1)
        with serial(rows) as row, own_function(f"{self.name}_gather"), serial(g.ow) as column:
            source = bind(row * (g.sh * pitch) + column * (g.sw * g.c))
            to = bind(origin + (row * g.ow + column) * plan.pixel)
            for i in range(g.kh):
                for j in range(1 if wide else g.kw):
                    at = source + (i * g.dh * pitch + j * g.dw * g.c)
                    done = (i * (1 if wide else g.kw) + j) * run
                    for piece in range(0, run, 64):
                        size = min(64, 1 << (run - piece - 1).bit_length())
                        store(target, to + (done + piece), load(band, at + piece, size))
