# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""How products are cut for AMX tiles: integers only, no TVM.

A tile of activations holds 16 pixels x up to 64 bytes of K, its rows at one fixed distance.  So the
pixels of a task must lie in a row at one distance:

* direct: the activations as they are (pointwise convolutions and matrix products, and unpadded
  convolutions of stride 1).  Pixels run along whole input rows; the few outputs that this computes
  beyond the end of an output row are stored first and then overwritten by the next row's own.
* planes: the same over a padded copy, with the rows and columns of each phase of the stride in a
  plane of their own, so that neighbouring outputs again read neighbouring pixels.
* rows: a copy that holds all of K for each output pixel (im2col), for few input channels.

K is cut into chunks of at most 64 bytes, within runs of consecutive bytes.  The last chunk of a run
ends with the run: the bytes that the chunk before has multiplied already get zero weights.

Source: Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter 20 (AMX).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.plan import Geometry, geometry_of
from qcompiler.targets.kernels.workload import (
    FLOATS,
    ConvWorkload,
    GemmParams,
    MatmulWorkload,
)

__all__ = [
    "TILE_ROWS",
    "TilesPlan",
    "applies",
    "candidates",
    "tile_nibbles",
    "tile_registers",
    "tiles_constants",
    "tiles_plan",
    "worthwhile",
]

TILE_ROWS = 16
"""Pixels of an activation tile, and columns of a weight tile."""
TILE_BYTES = 64
"""Bytes of K of a tile."""

Source = Literal["direct", "planes", "rows"]


@dataclass(frozen=True, slots=True)
class TilesPlan:
    """Where a kernel's activation tiles lie, and its tasks."""

    source: Source
    chunk: int
    """Bytes of K of one tile."""
    chunks: int
    """Tiles of K."""
    offsets: tuple[int, ...]
    """Byte at which each chunk starts, from its pixel's first."""
    index: tuple[tuple[int, int, int], ...]
    """(first byte of K, unused bytes in front, used bytes) of each chunk."""
    pixel: int
    """Bytes from one pixel to the next."""
    pitch: int
    """Pixels from one output row to the next."""
    planes: tuple[tuple[int, int], ...]
    """Source "planes": the phases (row, column) of the stride that the kernel reads."""
    plane_rows: int
    """Rows of one plane."""
    rows: int
    """Output rows of a task; the last one may have fewer."""
    bands: int
    """Tasks of one image, along its rows."""

    @property
    def consecutive(self) -> bool:
        """Whether each chunk starts where the one before ends."""
        return self.offsets == tuple(k * self.chunk for k in range(self.chunks))

    @property
    def area(self) -> int:
        """Bytes of a task's copy of its activations, and what tiles may read beyond them."""
        if self.source == "rows":
            pixels = self.rows * self.pitch
        else:
            pixels = len(self.planes) * self.plane_rows * self.pitch
        return pixels * self.pixel + 2 * TILE_BYTES

    def places(self, ow: int) -> npt.NDArray[np.int32]:
        """Output pixel of each pixel of a task."""
        pixels = np.arange(self.rows * self.pitch)
        return (pixels // self.pitch * ow + pixels % self.pitch).astype(np.int32)


def applies(workload: ConvWorkload | MatmulWorkload, isa: Isa) -> bool:
    """Whether tiles can compute a workload: constant weights, 16 pixels or more of one image."""
    if isa.tiles == "none" or workload.a_dtype in FLOATS or workload.epilogue.group:
        return False
    if isinstance(workload, MatmulWorkload) and not workload.b_constant:
        return False
    geometry = geometry_of(workload, isa)
    return geometry.groups == 1 and geometry.oh * geometry.ow >= TILE_ROWS


def worthwhile(workload: ConvWorkload | MatmulWorkload, isa: Isa) -> bool:
    """Whether tiles are faster than vectors; measured on Sapphire Rapids, by a factor of 1.4 to 5.

    With fewer than 16 columns, part of every tile is wasted and outputs are stored one by one.
    """
    return applies(workload, isa) and geometry_of(workload, isa).n >= TILE_ROWS


_TASKS = 8
"""Tasks wanted for a kernel of some size."""
_TASK_MACS = 8_000_000
"""Products that a task should have: some five microseconds."""
_OUTPUT_MACS, _BYTE_MACS = 80, 27
"""Products that take as long as an output on its way from a tile to memory, and as a byte read."""
_L2_BYTES = 512 * 1024
"""Quarter of level 2: what may stay there while other data streams through."""


def candidates(workload: ConvWorkload | MatmulWorkload, isa: Isa) -> tuple[GemmParams, ...]:
    """Tilings to choose from, the analytic choice first.

    Each element of a 2 x 2 block is used twice, more than of any other block; sixteen columns need
    one column tile, and then four pixel tiles share its loads.  Pixel blocks go outermost ("m")
    where all weights stay near and the outputs of a pixel are written together; columns do where
    weights come from far ("n"), or where neighbouring pixels share activations.
    """
    geometry = geometry_of(workload, isa)
    pointwise = geometry.kh * geometry.kw == 1
    weights = geometry.n * geometry.c * geometry.kh * geometry.kw
    order: Literal["n", "m"] = "m" if pointwise and weights <= _L2_BYTES else "n"
    other: Literal["n", "m"] = "n" if order == "m" else "m"
    block = (2, 2) if geometry.n > TILE_ROWS else (4, 1)
    first = _tasks(geometry, *block, order)
    found = [first, _tasks(geometry, *block, other)]
    for mt, nv in ((2, 2), (1, 4), (4, 1)):
        if (mt, nv) != block and nv * TILE_ROWS < geometry.n + TILE_ROWS:
            found.append(_tasks(geometry, mt, nv, order))
    found += [replace(first, m_block=-(-first.m_block // 2)), replace(first, m_block=geometry.oh)]
    found += [replace(first, n_block=-(-first.n_block // 2)), replace(first, n_block=1 << 16)]
    return tuple(dict.fromkeys(found))


def _tasks(geometry: Geometry, mt: int, nv: int, order: Literal["n", "m"]) -> GemmParams:
    """Share the work out: by rows, unless weights are what has to come from far.

    The threads then find in their own cache what they wrote in the kernel before.
    """
    g = geometry
    work = g.macs + g.outputs * _OUTPUT_MACS + g.elements_read * _BYTE_MACS
    wanted = max(1, min(_TASKS, 1 << (work // _TASK_MACS).bit_length() >> 1))
    tiles = -(-g.n // (nv * TILE_ROWS))
    window = g.kh * g.kw > 1
    # A task of a window copies the rows around its own too; it should have more of its own.
    least = -(-3 * mt * TILE_ROWS // g.ow)
    if window:
        least = max(3 * (g.kh - 1) + 1, -(-mt * TILE_ROWS // g.ow))
    most = max(1, g.oh // least)
    whole = tiles_plan(g, GemmParams(16, mt, nv, g.oh, 1, algorithm="tiles"))
    if whole.source == "rows":  # all of K for each pixel: the copy of a task stays in level 2
        most = max(1, g.oh * g.ow // (2 * mt * TILE_ROWS))
        by_rows = min(max(wanted, -(-whole.area // _L2_BYTES)), most, g.oh)
    elif g.n * g.c * g.kh * g.kw > 2 * _L2_BYTES:
        columns = min(tiles, wanted)
        by_rows = min(most, -(-wanted // columns))
    else:
        by_rows = 1 << (min(wanted, most, 4 if window else wanted).bit_length() - 1)
    columns = min(tiles, max(1, wanted // (by_rows * g.batch)))
    # No two tasks write into one line of 64 bytes.
    n_block = -(-tiles // columns)
    n_block += -n_block * nv * TILE_ROWS % 64 // (nv * TILE_ROWS)
    m_block = -(-g.oh // by_rows)
    if g.ow == 1 and m_block > TILE_ROWS:  # whole tiles
        m_block = -(-m_block // TILE_ROWS) * TILE_ROWS
    return GemmParams(16, mt, nv, m_block, n_block, order, algorithm="tiles")


@dataclass(frozen=True, slots=True)
class TileRegisters:
    """Which of the eight tile registers hold what; accumulators come first, row by row."""

    mt: int
    nv: int
    a_count: int
    """Tiles for activations; with fewer than `mt` they take turns."""
    b_count: int
    """Tiles for weights, likewise."""

    def acc(self, m: int, v: int) -> int:
        """Accumulator of pixel tile m, column tile v."""
        return m * self.nv + v

    def a(self, m: int) -> int:
        """Activations of pixel tile m."""
        return self.mt * self.nv + m % self.a_count

    def b(self, v: int) -> int:
        """Weights of column tile v."""
        return self.mt * self.nv + self.a_count + v % self.b_count

    def config(self, chunk: int) -> npt.NDArray[np.uint8]:
        """What `ldtilecfg` reads, for chunks of `chunk` bytes of K."""
        found = np.zeros(64, np.uint8)
        found[0] = 1  # the only palette
        row_bytes = found[16:32].view(np.uint16)
        row_bytes[:] = TILE_BYTES
        found[48:56] = TILE_ROWS
        for m in range(self.a_count):
            row_bytes[self.a(m)] = chunk
        for v in range(self.b_count):
            found[48 + self.b(v)] = chunk // 4
        return found


def tile_registers(mt: int, nv: int) -> TileRegisters:
    """Share out the registers.

    Raises:
        CodegenError: The block does not fit.
    """
    left = 8 - mt * nv
    if mt + nv <= left:
        return TileRegisters(mt, nv, mt, nv)
    if min(mt, nv) > 1 or left < 2:
        raise CodegenError(f"a block of {mt} x {nv} AMX tiles does not fit eight registers")
    if mt == 1:
        return TileRegisters(mt, nv, 1, left - 1)
    return TileRegisters(mt, nv, left - 1, 1)


def tiles_plan(geometry: Geometry, params: GemmParams) -> TilesPlan:
    """Cut a geometry as `params` say: `m_block` output rows are one task."""
    g = geometry
    rows = min(max(params.m_block, 1), g.oh)
    while min(rows, (g.oh - 1) % rows + 1) * g.ow < TILE_ROWS:  # each task must fill a tile
        rows += 1
    bands = (rows, -(-g.oh // rows))
    wide = g.dw == 1 or g.kw == 1
    strided = g.sh > 1 or g.sw > 1
    taps = [(i * g.dh, j * g.dw) for i in range(g.kh) for j in range(g.kw)]
    # Outputs computed beyond the end of a row must fall into the next row, or they stay wrong.
    if not g.padded and not strided and g.a_dtype == "uint8" and g.w <= 2 * g.ow:
        runs = [(i * g.dh * g.w * g.c, g.kw * g.c) for i in range(g.kh)]
        if not wide:
            runs = [((y * g.w + x) * g.c, g.c) for y, x in taps]
        if runs[0][1] >= TILE_BYTES or runs[0][1] % 4 == 0:
            return _plan("direct", runs, g.c, g.w, ((0, 0),), 0, bands)
    k = g.kh * g.kw * g.c
    planes = tuple(sorted({(y % g.sh, x % g.sw) for y, x in taps}))
    plane_rows = rows + (g.kh - 1) * g.dh // g.sh
    pitch = g.ow + (g.kw - 1) * g.dw // g.sw
    columns = [0] if g.sw == 1 and wide else [j * g.dw for j in range(g.kw)]
    run = g.kw * g.c // len(columns)
    runs = []
    for i in range(g.kh):
        for x in columns:
            y = i * g.dh
            plane = planes.index((y % g.sh, x % g.sw))
            row = plane * plane_rows + y // g.sh
            runs.append(((row * pitch + x // g.sw) * g.c, run))
    # Cycles for each pixel and column tile: one for a chunk, about two and a half for a copy.
    in_planes = len(runs) * -(-run // TILE_BYTES) * _tiles((rows - 1) * pitch + g.ow)
    pieces = g.kh * -(-g.kw * g.c // TILE_BYTES) if wide else g.kh * g.kw * -(-g.c // TILE_BYTES)
    in_rows = (-(-k // TILE_BYTES) + 2.5 * pieces / -(-g.n // TILE_ROWS)) * _tiles(rows * g.ow)
    if g.kh * g.kw > 1 and (in_rows < in_planes or pitch > 2 * g.ow):
        pixel = -(-k // TILE_BYTES) * TILE_BYTES if k > TILE_BYTES else -(-k // 4) * 4
        return _plan("rows", [(0, k)], pixel, g.ow, (), 0, bands, whole=True)
    return _plan("planes", runs, g.c, pitch, planes, plane_rows, bands)


def _tiles(pixels: int) -> int:
    return -(-pixels // TILE_ROWS)


def _plan(
    source: Source,
    runs: Sequence[tuple[int, int]],
    pixel: int,
    pitch: int,
    planes: tuple[tuple[int, int], ...],
    plane_rows: int,
    bands: tuple[int, int],
    *,
    whole: bool = False,
) -> TilesPlan:
    """Cut runs (first byte, bytes) into chunks; `whole` runs may be read beyond their end."""
    run = runs[0][1]
    chunk = min(TILE_BYTES, -(-run // 4) * 4)
    offsets: list[int] = []
    index: list[tuple[int, int, int]] = []
    for position, (first, _) in enumerate(runs):
        for at in range(0, run, chunk):
            start = at if whole or run < chunk else min(at, run - chunk)
            offsets.append(first + start)
            index.append((position * run + at, at - start, min(chunk, run - at)))
    return TilesPlan(
        source=source,
        chunk=chunk,
        chunks=len(offsets),
        offsets=tuple(offsets),
        index=tuple(index),
        pixel=pixel,
        pitch=pitch,
        planes=planes,
        plane_rows=plane_rows,
        rows=bands[0],
        bands=bands[1],
    )


def tiles_constants(
    geometry: Geometry,
    params: GemmParams,
    weight: npt.NDArray[np.int8],
    columns: npt.NDArray[np.int64],
) -> dict[str, npt.NDArray[Any]]:
    """What a kernel reads beside the epilogue's constants.

    `weight` from `[n, K]`; `config` for `ldtilecfg`; `offsets` int32 `[chunks]`, where chunks do
    not simply follow each other; `places` int32, the output pixel of each pixel of a task, where
    they differ.
    """
    plan = tiles_plan(geometry, params)
    found: dict[str, npt.NDArray[Any]] = {
        "weight": pack_tiles(plan, weight, columns),
        "config": tile_registers(params.mt, params.nv).config(plan.chunk),
    }
    if not plan.consecutive:
        found["offsets"] = np.asarray(plan.offsets, np.int32)
    if plan.pitch != geometry.ow:
        found["places"] = plan.places(geometry.ow)
    return found


def tile_nibbles(weight: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Weights of 4 bits plus 8, two to a byte: the two halves of every 64 bytes, `[..., 32]`."""
    halves = (weight.reshape(len(weight), -1, 2, 32) + 8).astype(np.uint8)
    return np.ascontiguousarray(halves[:, :, 0] | halves[:, :, 1] << 4)


def tile_factors(
    plan: TilesPlan,
    factors: npt.NDArray[np.int8],
    group: int,
    columns: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.uint8], int] | None:
    """Factors less 1 of codes in tiles as nibbles, and the lines of 64 bytes that share one.

    A line holds four neighbours along K of 16 columns; the low nibbles of its eight bytes are those
    of the first half of the columns.

    Args:
        plan: The tiles.
        factors: Factor of each weight, 1 to 16, `[n, K]`.
        group: Neighbours along K that share a factor.
        columns: As `pack_tiles` takes them.

    Returns:
        uint8 `[T, chunks, V, lines of a chunk / shared, 8]`; None where a line mixes two groups.
    """
    lines = pack_tiles(plan, factors, columns)  # 0 where nothing is multiplied
    shared = math.gcd(group // 4, plan.chunk // 4)
    while shared:
        runs = lines.reshape(*lines.shape[:3], -1, shared, *lines.shape[4:])
        most = runs.max((4, 6))
        least = np.where(runs > 0, runs, np.int8(16)).min((4, 6))
        if (least >= most).all():
            found = np.maximum(most, 1).astype(np.uint8) - 1
            return np.ascontiguousarray(found[..., :8] | found[..., 8:] << 4), shared
        shared //= 2
    return None


def pack_tiles(
    plan: TilesPlan, weight: npt.NDArray[np.int8], columns: npt.NDArray[np.int64]
) -> npt.NDArray[np.int8]:
    """Weights `[n, K]` as `[T, chunks, V, chunk / 4, L, 4]` for the columns `[T, V, L]`."""
    chunks = np.zeros((len(weight), plan.chunks, plan.chunk), np.int8)
    for position, (first, skip, count) in enumerate(plan.index):
        chunks[:, position, skip : skip + count] = weight[:, first : first + count]
    picked = np.where((columns >= 0)[..., None, None], chunks[columns], np.int8(0))
    picked = picked.reshape(*columns.shape, plan.chunks, plan.chunk // 4, 4)  # [T, V, L, Q, G, 4]
    return np.ascontiguousarray(picked.transpose(0, 3, 1, 4, 2, 5))
