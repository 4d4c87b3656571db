# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Geometry and tiling shared by packing and code generation: integers only, no TVM.

Every product with constant weights is seen as a convolution over an NHWC array.  K is a list of
`k_rows * k_cols` *runs* of `run` consecutive activation bytes; each run is padded with zero
weights to a multiple of the dot instruction's group.  A 1x1 convolution of stride 1 and a matrix
product have one run and a width of one, with all pixels along H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.workload import (
    FLOATS,
    ConvWorkload,
    GemmParams,
    MatmulWorkload,
)

__all__ = [
    "Axis",
    "Dot",
    "Geometry",
    "Storage",
    "TilePlan",
    "column_index",
    "geometry_of",
    "split",
    "tile_plan",
    "unpacks_ahead",
]

Dot = Literal[
    "float",
    "half",
    "vpdpbusd",
    "maddubs",
    "exact",
    "mixed",
    "winograd",
    "smlal",
    "sdot",
    "smmla",
    "tiles",
]
"""How a kernel multiplies: "half" in float16, added up in float32 (`halves`), "maddubs" for tiles
proved not to saturate, "exact" by int16 pairs, "mixed" by a list of K-groups of either kind for
each tile, "smlal", "sdot" and "smmla" by those instructions, "winograd" by transformed operands,
"tiles" by AMX."""

Storage = Literal["plain", "int4", "half", "group8", "group4"]
"""How weights lie in memory: as they are multiplied, or in fewer bits (`unpack`)."""


_FEW = 3
"""Register tiles of a task over one column tile from which unpacking ahead pays."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """A convolution over an NHWC array, as the macro-kernel walks it."""

    a_dtype: str
    batch: int
    h: int
    w: int
    c: int
    groups: int
    n: int
    """Output columns of one group."""
    kh: int
    kw: int
    sh: int
    sw: int
    dh: int
    dw: int
    pt: int
    pl: int
    oh: int
    ow: int
    k_group: int
    dot_dtype: str = "uint8"
    """Dtype in which 8-bit activations are multiplied; others are shifted by 128 on the way."""

    @property
    def cg(self) -> int:
        """Input channels of one group."""
        return self.c // self.groups

    @property
    def wide_runs(self) -> bool:
        """Whether one run covers all kernel columns, which NHWC keeps consecutive."""
        return self.groups == 1 and (self.dw == 1 or self.kw == 1)

    @property
    def k_rows(self) -> int:
        """Runs along the kernel's rows."""
        return self.kh

    @property
    def k_cols(self) -> int:
        """Runs along the kernel's columns."""
        return 1 if self.wide_runs else self.kw

    @property
    def run(self) -> int:
        """Consecutive activation elements of one run."""
        return self.cg * (self.kw if self.wide_runs else 1)

    @property
    def run_groups(self) -> int:
        """K-groups of one run, the last padded with zero weights."""
        return -(-self.run // self.k_group)

    @property
    def k_groups(self) -> int:
        """K-groups of all runs."""
        return self.k_rows * self.k_cols * self.run_groups

    @property
    def padded(self) -> bool:
        """Whether some kernel position falls outside the input."""
        bottom = (self.oh - 1) * self.sh + (self.kh - 1) * self.dh - self.pt
        right = (self.ow - 1) * self.sw + (self.kw - 1) * self.dw - self.pl
        return self.pt > 0 or self.pl > 0 or bottom >= self.h or right >= self.w

    @property
    def direct(self) -> bool:
        """Whether tiles may read the activations where they lie.

        Otherwise a task copies its band of rows, padded, into a work area first: for padding, to
        change the signedness, and so that the last run, rounded up to the group, stays in bounds.
        """
        aligned = self.run % self.k_group == 0
        return not self.padded and aligned and self.a_dtype in (self.dot_dtype, *FLOATS)

    @property
    def band_width(self) -> int:
        """Pixels in one row of the work area."""
        return (self.ow - 1) * self.sw + (self.kw - 1) * self.dw + 1

    def band_rows(self, output_rows: int) -> int:
        """Input rows that `output_rows` consecutive output rows read."""
        return (output_rows - 1) * self.sh + (self.kh - 1) * self.dh + 1

    @property
    def outputs(self) -> int:
        """Results."""
        return self.batch * self.oh * self.ow * self.n * self.groups

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.outputs * self.kh * self.kw * self.cg

    @property
    def elements_read(self) -> int:
        """Activations and weights."""
        weights = self.n * self.groups * self.kh * self.kw * self.cg
        return self.batch * self.h * self.w * self.c + weights


def geometry_of(workload: ConvWorkload | MatmulWorkload, isa: Isa) -> Geometry:
    """The geometry of a convolution or of a matrix product (of one, for an activation B)."""
    group = 1 if workload.a_dtype in FLOATS else isa.k_group
    if isinstance(workload, MatmulWorkload) and not workload.b_constant:
        group = min(group, 4)  # what packs B at run time makes groups of four
    geometry = _geometry(workload, group)
    return replace(geometry, dot_dtype=isa.a_dtype)


def _geometry(workload: ConvWorkload | MatmulWorkload, group: int) -> Geometry:
    if isinstance(workload, MatmulWorkload):
        rows = math.prod(workload.a_shape) // workload.k if workload.b_constant else workload.m
        return _matrix(workload.a_dtype, rows, workload.k, workload.n, 1, group)
    pointwise = workload.kh == workload.kw == 1 and workload.strides == (1, 1)
    if pointwise and not any(workload.pads):
        rows = workload.n * workload.h * workload.w
        columns = workload.co // workload.groups
        return _matrix(workload.a_dtype, rows, workload.c, columns, workload.groups, group)
    return Geometry(
        a_dtype=workload.a_dtype,
        batch=workload.n,
        h=workload.h,
        w=workload.w,
        c=workload.c,
        groups=workload.groups,
        n=workload.co // workload.groups,
        kh=workload.kh,
        kw=workload.kw,
        sh=workload.strides[0],
        sw=workload.strides[1],
        dh=workload.dilations[0],
        dw=workload.dilations[1],
        pt=workload.pads[0],
        pl=workload.pads[1],
        oh=workload.oh,
        ow=workload.ow,
        k_group=group,
    )


def _matrix(a_dtype: str, rows: int, c: int, n: int, groups: int, k_group: int) -> Geometry:
    return Geometry(
        a_dtype=a_dtype,
        batch=1,
        h=rows,
        w=1,
        c=c,
        groups=groups,
        n=n,
        kh=1,
        kw=1,
        sh=1,
        sw=1,
        dh=1,
        dw=1,
        pt=0,
        pl=0,
        oh=rows,
        ow=1,
        k_group=k_group,
    )


@dataclass(frozen=True, slots=True)
class Axis:
    """An extent cut into `big` tiles of `size` and then `small` tiles of `size - 1`."""

    size: int
    big: int
    small: int

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.big + self.small

    @property
    def kinds(self) -> tuple[tuple[int, int, int], ...]:
        """(first tile, number of tiles, tile size) of each size present."""
        both = ((0, self.big, self.size), (self.big, self.small, self.size - 1))
        return tuple(kind for kind in both if kind[1])


def split(extent: int, limit: int) -> Axis:
    """Cut `extent` into the fewest tiles of at most `limit`, as equal as can be."""
    tiles = -(-extent // max(limit, 1))
    size = -(-extent // tiles)
    small = tiles * size - extent
    return Axis(size, tiles - small, small)


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Register tiles and tasks of one kernel."""

    rows: Axis
    """Output rows."""
    cols: Axis
    """Output columns (pixels along W)."""
    lanes: int
    nv: int
    group_tiles: int
    """Column tiles of one group."""
    tiles: int
    """Column tiles of all groups."""
    row_blocks: int
    row_block: int
    """Row tiles of one task."""
    col_blocks: int
    col_block: int
    """Column tiles of one task."""

    @property
    def nt(self) -> int:
        """Output columns of a tile."""
        return self.lanes * self.nv

    @property
    def band(self) -> int:
        """Most output rows of one task."""
        return min(self.row_block, self.rows.tiles) * self.rows.size


def tile_plan(geometry: Geometry, params: GemmParams) -> TilePlan:
    """Cut a geometry as `params` say."""
    whole_rows = params.mt // geometry.ow
    if whole_rows >= 1:
        rows, cols = split(geometry.oh, whole_rows), Axis(geometry.ow, 1, 0)
    else:
        rows, cols = Axis(1, geometry.oh, 0), split(geometry.ow, params.mt)
    group_tiles = -(-geometry.n // (params.lanes * params.nv))
    tiles = group_tiles * geometry.groups
    row_block = max(1, min(params.m_block, rows.tiles))
    col_block = max(1, min(params.n_block, tiles))
    return TilePlan(
        rows=rows,
        cols=cols,
        lanes=params.lanes,
        nv=params.nv,
        group_tiles=group_tiles,
        tiles=tiles,
        row_blocks=-(-rows.tiles // row_block),
        row_block=row_block,
        col_blocks=-(-tiles // col_block),
        col_block=col_block,
    )


def unpacks_ahead(storage: Storage, plan: TilePlan, order: str, factors: bool = False) -> bool:
    """Whether a task unpacks each column tile once, before its register tiles.

    Factors take longer to unpack than nibbles alone, so that two register tiles are enough, and the
    order of the loops is of less account.
    """
    tiles = min(plan.row_block, plan.rows.tiles) * plan.cols.tiles
    if factors:
        return tiles > 1
    return storage != "plain" and order == "n" and tiles >= _FEW


def column_index(n: int, lanes: int, nv: int) -> npt.NDArray[np.int64]:
    """Column of a group that each lane of each tile computes, [group_tiles, nv, lanes].

    Where `n` is no multiple of the tile, the last tile (or vector, if there is one tile only) is
    moved back to end at `n`: some columns are computed twice, and every store stays a whole vector.
    With fewer columns than lanes the surplus lanes are -1.
    """
    nt = lanes * nv
    tiles = -(-n // nt)
    if n < lanes:
        index = np.full((1, nv, lanes), -1, np.int64)
        index[0, 0, :n] = np.arange(n)
        return index
    starts = np.minimum(np.arange(tiles) * nt, max(n - nt, 0))[:, None] + np.arange(nv) * lanes
    starts = np.minimum(starts, n - lanes)
    return starts[:, :, None] + np.arange(lanes)
