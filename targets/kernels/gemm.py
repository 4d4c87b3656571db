# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The macro-kernel: matrix products and convolutions with constant weights, int8 and float32.

One generator serves every instruction set (see `isa.Isa`) and both element types; a convolution is
an implicit matrix product over NHWC activations (`plan.Geometry`).

Arguments of the built PrimFunc, in order:

1. the activations, shape `a_shape`;
2. the residual, shape `out_shape`, where the epilogue has one;
3. the packed constants, `Packed.arrays` in order;
4. the output, shape `out_shape`.

How it runs: tasks (image, block of tile rows, block of tile columns) go to the thread pool.  A task
reads the activations in place where it can, else it copies its band of input rows, padded, into a
work area.  Register tiles of `mt` pixels x `nv` vectors then run over all of K with their
accumulators in registers.  Activation addresses of a tile are one base plus constants, since shapes
are static: no pointer per row, no im2col.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.epilogue import EpilogueWriter
from qcompiler.targets.kernels.packing import Facts, Packed
from qcompiler.targets.kernels.plan import Geometry, TilePlan, geometry_of, tile_plan
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    PrimFuncBuilder,
    bind,
    cast,
    flat,
    intrinsic,
    load,
    local,
    own_function,
    parallel,
    reinterpret,
    scratch,
    serial,
    splat,
    store,
    when,
)
from qcompiler.targets.kernels.workload import ConvWorkload, GemmParams, MatmulWorkload

__all__ = ["build_conv", "build_matmul", "kernel_key"]


def build_conv(
    workload: ConvWorkload, isa: Isa, params: GemmParams, packed: Packed, name: str = "conv"
) -> Any:
    """The PrimFunc of a convolution whose constants are `packed` (by `pack_conv`)."""
    return _build(workload, isa, params, packed, name)


def build_matmul(
    workload: MatmulWorkload, isa: Isa, params: GemmParams, packed: Packed, name: str = "matmul"
) -> Any:
    """The PrimFunc of a matrix product whose constant B is `packed` (by `pack_matmul`)."""
    return _build(workload, isa, params, packed, name)


def kernel_key(
    workload: ConvWorkload | MatmulWorkload, isa: Isa, params: GemmParams, packed: Packed
) -> tuple[object, ...]:
    """A hashable key: layers with equal keys can share one PrimFunc."""
    return (workload, isa.name, params, packed.facts, packed.shapes)


def _build(
    workload: ConvWorkload | MatmulWorkload,
    isa: Isa,
    params: GemmParams,
    packed: Packed,
    name: str,
) -> Any:
    geometry = geometry_of(workload, isa)
    plan = tile_plan(geometry, params)
    epilogue = workload.epilogue
    with PrimFuncBuilder(name) as builder:
        a = builder.argument("a", workload.a_shape, workload.a_dtype)
        residual = None
        if epilogue.residual_dtype is not None:
            residual = builder.argument("residual", workload.out_shape, epilogue.residual_dtype)
        constants = {
            label: builder.argument(label, shape, dtype) for label, shape, dtype in packed.shapes
        }
        out = builder.argument("out", workload.out_shape, epilogue.out_dtype)

        flats = {label: flat(buffer) for label, buffer in constants.items()}
        writer = EpilogueWriter(
            isa=isa,
            epilogue=epilogue,
            facts=packed.facts,
            out=flat(out),
            residual=None if residual is None else flat(residual),
            multiplier=flats.get("multiplier"),
            scalars=flats["scalars"],
        )
        kernel = _Kernel(isa, geometry, plan, params, packed.facts, flat(a), flats, writer, name)
        kernel.emit()
    return builder.finish()


@dataclass(frozen=True, slots=True)
class _Kernel:
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

    def emit(self) -> None:
        """The loop over tasks."""
        g, plan = self.geometry, self.plan
        with parallel(g.batch * plan.row_blocks * plan.col_blocks) as task:
            block = bind(task % plan.col_blocks)
            outer = bind(task // plan.col_blocks)
            image = bind(outer // plan.row_blocks)
            first = bind(outer % plan.row_blocks * plan.row_block)
            last = bind(tirx.min(first + plan.row_block, plan.rows.tiles))
            source, origin, pitch = self._source(image, first)
            begin = bind(block * plan.col_block)
            end = bind(tirx.min(begin + plan.col_block, plan.tiles))
            if self.params.order == "n":
                with serial(begin, end) as tile:
                    self._tile_rows(source, origin, pitch, image, (first, last), (tile, None))
            else:
                self._tile_rows(source, origin, pitch, image, (first, last), (begin, end))

    def _first_row(self, row_tile: Expr) -> Expr:
        """First output row of a tile row."""
        rows = self.plan.rows
        if rows.small == 0:
            return row_tile * rows.size
        return row_tile * (rows.size - 1) + tirx.min(row_tile, rows.big)

    def _source(self, image: Expr, first: Expr) -> tuple[Buffer, Expr, int]:
        """Where a task reads activations: buffer, offset of output row 0, elements of a row."""
        g = self.geometry
        if g.direct:
            return self.a, bind(image * (g.h * g.w * g.c)), g.w * g.c
        band = self._copy_band(image, self._first_row(first))
        pitch = g.band_width * g.c
        return band, bind(0 - self._first_row(first) * (g.sh * pitch)), pitch

    def _copy_band(self, image: Expr, first_row: Expr) -> Buffer:
        """Copy the input rows that a task reads into a padded work area."""
        g, plan = self.geometry, self.plan
        pitch = g.band_width * g.c
        rows = g.band_rows(plan.band)
        dtype = "float32" if g.a_dtype == "float32" else "uint8"
        band = scratch(rows * pitch + 64, dtype)
        fill = bind(cast(load(self.constants["scalars"], 0, 1), dtype))
        left = min(g.pl, g.band_width) * g.c
        inside = max(0, min(g.w, g.band_width - g.pl)) * g.c
        with serial(rows) as row:
            top = bind(first_row * g.sh + row - g.pt)
            target = bind(row * pitch)
            outside = tirx.any(top < 0, top >= g.h)
            with when(outside):
                _fill(band, target, fill, pitch)
            with when(tirx.Not(outside)):
                _fill(band, target, fill, left)
                start = bind((image * g.h + top) * (g.w * g.c))
                _copy(band, target + left, self.a, start, inside)
                _fill(band, target + (left + inside), fill, pitch - left - inside)
        return band

    def _tile_rows(
        self,
        source: Buffer,
        origin: Expr,
        pitch: int,
        image: Expr,
        row_range: tuple[Expr, Expr],
        tile_range: tuple[Expr, Expr | None],
    ) -> None:
        """All register tiles of a task's rows, for one column tile or a range of them."""
        g, plan = self.geometry, self.plan
        first, last = row_range
        for row_from, row_count, rows in plan.rows.kinds:
            low, high = first, last
            if plan.rows.small:
                low = bind(tirx.max(first, row_from))
                high = bind(tirx.max(low, tirx.min(last, row_from + row_count)))
            with serial(low, high) as row_tile:
                row = bind(self._first_row(row_tile))
                for col_from, col_count, cols in plan.cols.kinds:
                    start = col_from * plan.cols.size
                    with serial(col_count) as col_tile:
                        col = start + col_tile * cols
                        a_base = bind(origin + row * (g.sh * pitch) + col * (g.sw * g.c))
                        pixel = bind((image * g.oh + row) * g.ow + col)
                        if tile_range[1] is None:
                            self._tile(source, pitch, a_base, pixel, rows, cols, tile_range[0])
                            continue
                        with serial(*tile_range) as tile:
                            self._tile(source, pitch, a_base, pixel, rows, cols, tile)

    def _tile(
        self,
        source: Buffer,
        pitch: int,
        a_base: Expr,
        pixel: Expr,
        rows: int,
        cols: int,
        tile: Expr,
    ) -> None:
        """One register tile: rows x cols pixels, nv vectors."""
        g, plan = self.geometry, self.plan
        if g.groups > 1:
            group = tile // plan.group_tiles
            a_base = a_base + group * g.cg
        a_base = bind(a_base)
        with own_function(f"{self.name}_tile"):
            self._tile_body(source, pitch, a_base, pixel, rows, cols, tile)

    def _tile_body(
        self,
        source: Buffer,
        pitch: int,
        a_base: Expr,
        pixel: Expr,
        rows: int,
        cols: int,
        tile: Expr,
    ) -> None:
        g, plan = self.geometry, self.plan
        lanes, nv = plan.lanes, plan.nv
        channels = g.groups * g.n
        a_steps = [r * g.sh * pitch + c * g.sw * g.c for r in range(rows) for c in range(cols)]
        o_steps = [(r * g.ow + c) * channels for r in range(rows) for c in range(cols)]

        accumulators = _Accumulators(len(a_steps), nv, lanes, self._acc_dtype)
        lane = bind(tile * (nv * lanes))
        for v in range(nv):
            bias = bind(load(self.constants["bias"], lane + v * lanes, lanes))
            for m in range(len(a_steps)):
                accumulators.put(m, v, bias)
        self._k_loops(source, pitch, a_base, a_steps, tile, accumulators)

        starts, valid = self._columns(tile)
        base = bind(pixel * channels)
        for m, step in enumerate(o_steps):
            at = [base + step + start for start in starts]
            values = [accumulators.get(m, v) for v in range(nv)]
            self.writer.store_row(values, lane, at, valid)

    @property
    def _acc_dtype(self) -> str:
        return "float32" if self.facts.dot == "float" else "int32"

    def _columns(self, tile: Expr) -> tuple[list[Expr], int]:
        """Output channel of each vector of a tile (see `column_index`), and its valid lanes."""
        g, plan = self.geometry, self.plan
        lanes, nv, nt = plan.lanes, plan.nv, plan.nt
        group = tile // plan.group_tiles
        within = tile % plan.group_tiles
        if g.n < lanes:
            return [tile * g.n], g.n
        if g.n < nt:
            return [group * g.n + min(v * lanes, g.n - lanes) for v in range(nv)], lanes
        if g.n % nt == 0:
            return [bind(tile * nt)], lanes
        return [bind(group * g.n + tirx.min(within * nt, g.n - nt))], lanes

    def _k_loops(
        self,
        source: Buffer,
        pitch: int,
        a_base: Expr,
        a_steps: list[int],
        tile: Expr,
        acc: _Accumulators,
    ) -> None:
        """Accumulate over all of K."""
        g = self.geometry
        if self.facts.dot == "mixed":
            self._mixed_loops(source, a_base, a_steps, tile, acc)
            return
        weight = self.constants["weight"]
        kind = self.facts.dot
        step = _Step(self.isa, kind, source, weight, a_steps, acc)
        group_bytes = step.weight_elements
        tile_base = bind(tile * (g.k_groups * group_bytes))
        offsets = self.constants.get("offsets")
        with serial(g.k_groups) as k:
            offset = k * g.k_group if offsets is None else load(offsets, k, 1)
            step.emit(bind(a_base + offset), tile_base + k * group_bytes)

    def _mixed_loops(
        self, source: Buffer, a_base: Expr, a_steps: list[int], tile: Expr, acc: _Accumulators
    ) -> None:
        """Safe K-groups by the saturating instruction, then the others by int16 pairs."""
        g = self.geometry
        offsets, spans = self.constants["offsets"], self.constants["spans"]
        kinds = (("maddubs", "weight", 0), ("exact", "weight_exact", 1))
        table = bind(tile * g.k_groups)
        for kind, label, which in kinds:
            step = _Step(self.isa, kind, source, self.constants[label], a_steps, acc)
            count = bind(load(spans, tile * 4 + which, 1))
            base = bind(load(spans, tile * 4 + 2 + which, 1) * step.weight_elements)
            with serial(count) as k:
                offset = bind(a_base + load(offsets, table + k, 1))
                step.emit(offset, base + k * step.weight_elements)
            if which == 0:
                table = bind(table + count)


class _Accumulators:
    """The register tile: `rows` x `nv` vectors."""

    def __init__(self, rows: int, nv: int, lanes: int, dtype: str) -> None:
        self.nv, self.lanes = nv, lanes
        self._buffer = local(rows * nv * lanes, dtype)

    def get(self, m: int, v: int) -> Expr:
        """The vector of row m, column vector v."""
        return load(self._buffer, (m * self.nv + v) * self.lanes, self.lanes)

    def put(self, m: int, v: int, value: Expr) -> None:
        """Replace it."""
        store(self._buffer, (m * self.nv + v) * self.lanes, value)


@dataclass(frozen=True, slots=True)
class _Step:
    """One K-group of a register tile."""

    isa: Isa
    kind: str
    source: Buffer
    weight: Buffer
    a_steps: list[int]
    acc: _Accumulators

    @property
    def weight_elements(self) -> int:
        """Elements of the weight buffer that one K-group takes."""
        return self.acc.nv * self.acc.lanes * (1 if self.kind == "float" else 4)

    def emit(self, a_index: Expr, w_index: Expr) -> None:
        """Multiply the activations at `a_index` by the weights at `w_index`."""
        lanes, nv = self.acc.lanes, self.acc.nv
        per_vector = self.weight_elements // nv
        if self.kind == "exact":
            halves = [
                [
                    bind(load(self.weight, w_index + (h * nv + v) * 2 * lanes, 2 * lanes))
                    for v in range(nv)
                ]
                for h in range(2)
            ]
            for m, step in enumerate(self.a_steps):
                even, odd = self._even_odd(a_index + step)
                for v in range(nv):
                    total = self.acc.get(m, v) + self._madd(even, halves[0][v])
                    self.acc.put(m, v, total + self._madd(odd, halves[1][v]))
            return
        weights = [bind(load(self.weight, w_index + v * per_vector, per_vector)) for v in range(nv)]
        for m, step in enumerate(self.a_steps):
            if self.kind == "float":
                a = bind(splat(load(self.source, a_index + step, 1), "float32", lanes))
            else:
                a = bind(reinterpret(self._quad(a_index + step), "uint8", 4 * lanes))
            for v in range(nv):
                self.acc.put(m, v, self._dot(self.acc.get(m, v), a, weights[v]))

    def _quad(self, index: Expr) -> Expr:
        """Four activation bytes in every 32-bit lane."""
        return splat(reinterpret(load(self.source, index, 4), "int32", 1), "int32", self.acc.lanes)

    def _dot(self, acc: Expr, a: Expr, w: Expr) -> Expr:
        lanes = self.acc.lanes
        bits = 32 * lanes
        if self.kind == "float":
            return acc + a * w  # contracted to one FMA where the row has it
        if self.kind == "vpdpbusd":
            return intrinsic(f"int32x{lanes}", self._name("dot_u8s8", bits), acc, a, w)
        pairs = intrinsic(f"int16x{2 * lanes}", self._name("madd_u8s8", bits), a, w)
        return acc + self._madd(pairs, splat(1, "int16", 2 * lanes))

    def _madd(self, a: Expr, w: Expr) -> Expr:
        lanes = self.acc.lanes
        return intrinsic(f"int32x{lanes}", self._name("madd_i16", 32 * lanes), a, w)

    def _even_odd(self, index: Expr) -> tuple[Expr, Expr]:
        """Even and odd bytes of each group as int16 pairs."""
        lanes = self.acc.lanes
        words = bind(reinterpret(self._quad(index), "uint16", 2 * lanes))
        even = words & splat(255, "uint16", 2 * lanes)
        odd = words >> splat(8, "uint16", 2 * lanes)
        return (
            bind(reinterpret(even, "int16", 2 * lanes)),
            bind(reinterpret(odd, "int16", 2 * lanes)),
        )

    def _name(self, operation: str, bits: int) -> str:
        name = self.isa.intrinsic(operation, bits)
        if name is None:
            raise LookupError(f"{self.isa.name} has no {operation} on {bits} bits")
        return name


_CHUNK = 64


def _chunks(count: int) -> tuple[int, list[tuple[int, int]]]:
    """Whole chunks of `_CHUNK` elements, and (offset, length) of the pieces that remain."""
    whole = count // _CHUNK
    rest = []
    at, size = whole * _CHUNK, _CHUNK
    while at < count:
        while size > count - at:
            size //= 2
        rest.append((at, size))
        at += size
    return whole, rest


def _fill(buffer: Buffer, start: Expr, value: Expr, count: int) -> None:
    """Set `count` elements to a scalar."""
    dtype = str(buffer.dtype)
    whole, rest = _chunks(count)
    if whole:
        with serial(whole) as chunk:
            store(buffer, start + chunk * _CHUNK, splat(value, dtype, _CHUNK))
    for at, size in rest:
        store(buffer, start + at, splat(value, dtype, size))


def _copy(target: Buffer, to: Expr, source: Buffer, start: Expr, count: int) -> None:
    """Copy `count` elements; s8 becomes u8 by adding 128."""
    flip = source.dtype == "int8" and target.dtype == "uint8"

    def piece(at: Expr, size: int) -> None:
        value = load(source, start + at, size)
        if flip:
            value = reinterpret(value, "uint8", size) ^ splat(128, "uint8", size)
        store(target, to + at, value)

    whole, rest = _chunks(count)
    if whole:
        with serial(whole) as chunk:
            piece(chunk * _CHUNK, _CHUNK)
    for at, size in rest:
        piece(at, size)
