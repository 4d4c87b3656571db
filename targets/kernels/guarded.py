# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Full 8-bit products by `vpmaddubsw`, as deep as the activations at hand allow.

What `depth` proves from the weights alone must hold for the largest activations, so among 8-bit
weights many K-groups are left to the slower products of int16 pairs.  Activations behind a
rectifier are mostly small: a register tile asks first.  With the largest magnitude `m[k]` of each
weight row over all output columns, `sum m[k] a[k]` over the products that one int16 lane adds
bounds that lane's sum for every column, in any order.  These bounds are computed once for each
tile of pixels, with `vpmaddubsw` and saturating additions, so that a bound that leaves int16 reads
32767; then every column tile takes the same way:

* 2: two K-groups are added in int16 before they are widened;
* 1: every K-group is widened;
* 0: weights and activations widened in registers, by `vpmaddwd`: exact for any numbers. The two
  int32 sums of a K-group's halves stay apart until the end, which is how widened bytes lie.

Which way is taken changes the time, never the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcompiler.targets.kernels.depth import group_time
from qcompiler.targets.kernels.plan import Geometry
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
    registers,
    reinterpret,
    scratch,
    serial,
    shuffle,
    splat,
    store,
    when,
)

if TYPE_CHECKING:
    from qcompiler.targets.isa import Isa
    from qcompiler.targets.kernels.macro import MacroKernel, Source
    from qcompiler.targets.kernels.register_tile import Accumulators

__all__ = [
    "DEPTHS",
    "applies",
    "classify",
    "expected_time",
    "guard_row",
    "guarded_loops",
    "ways_of_block",
    "ways_of_tile",
]

Array = npt.NDArray[Any]

DEPTHS = (2, 1, 0)
"""The ways a register tile may take, by depth."""
_SEGMENT = 256
"""Activations of a pixel that take a way together: one large one slows down no more of K."""
_BYTES = 32
_OPERATIONS = ("madd_u8s8", "madd_i16")
_LANES = 16
_TOP = 32767
_SPREAD_TIME = 1.7
"""Time of a K-group by `vpmaddwd`, relative to depth 1."""
_SEVEN_BITS = 64
_NEAR_ZERO = 32
"""Largest zero point of activations that are taken to come from a rectifier."""
_SIGMAS = 6.0
"""Standard deviations of a rectified value in the range that calibration found for it."""
_PIXELS, _TILES = 3, 48
"""Size and number of the tiles that `expected_time` draws."""


def applies(isa: Isa, geometry: Geometry, weight: Array) -> bool:
    """Whether the kernel exists and may be worth it.

    It takes one run of whole blocks, read in place, and weights from -127.  Weights of 7 bits are
    proved to go two deep nearly always.

    Args:
        isa: The row; the kernel needs its instructions on vectors of 256 bits.
        geometry: The convolution or matrix product.
        weight: Its int8 weights.
    """
    one_run = geometry.k_rows * geometry.k_cols == 1 and geometry.groups == 1 and geometry.direct
    whole = geometry.run % 8 == 0 and geometry.run >= _BYTES
    if isa.dot != "maddubs" or not all(isa.intrinsic(op, 8 * _BYTES) for op in _OPERATIONS):
        return False
    if not (one_run and whole and geometry.dot_dtype == "uint8"):
        return False
    return int(weight.min()) > -128 and int(guard_row(weight).max()) > _SEVEN_BITS


def guard_row(weight: Array) -> Array:
    """The largest magnitude of each weight row over all columns: `[..., K]` to int8 `[K]`."""
    largest: Array = np.abs(weight.reshape(-1, weight.shape[-1]).astype(np.int16)).max(0)
    return largest.astype(np.int8)


def expected_time(row: Array, zero_point: int, largest: int) -> float:
    """Estimated time of a K-group, relative to depth 1; infinite where it is no use to ask.

    Draws activations as a rectifier leaves them.

    Args:
        row: `guard_row` of the weights.
        zero_point: Stored zero point of the activations.
        largest: Largest stored activation.
    """
    if zero_point > _NEAR_ZERO:
        return float("inf")
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((_TILES * _PIXELS, len(row))) * ((largest - zero_point) / _SIGMAS)
    a = np.clip(np.rint(drawn) + zero_point, zero_point, largest).astype(np.int64)
    lanes = np.minimum((a * row).reshape(len(a), -1, 2, 2, 2).sum(-1), _TOP)  # block, group, pair
    shares = []
    for bounds in (lanes, lanes.sum(-2)):
        fits = bounds.reshape(_TILES, -1).max(1) < _TOP
        shares.append(float(fits.mean()))
    one, two = shares
    return two * group_time(2) + (one - two) * group_time(1) + (1 - one) * _SPREAD_TIME


def ways_of_tile(geometry: Geometry) -> int:
    """Ways of a register tile: 2 where all of K may go two deep, then that of each segment."""
    return 1 + -(-geometry.run // _SEGMENT)


def ways_of_block(kernel: MacroKernel) -> int:
    """Ways that the register tiles of a block of tile rows take."""
    plan = kernel.plan
    return plan.row_block * plan.cols.tiles * ways_of_tile(kernel.geometry)


def classify(
    kernel: MacroKernel,
    source: Source,
    rows: tuple[Expr, Expr],
    to: tuple[Buffer, Expr] | None = None,
) -> Buffer:
    """The ways (`ways_of_tile`) of each register tile of some tile rows, as int32.

    Args:
        kernel: The kernel under construction.
        source: The activations.
        rows: The tile rows, half-open.
        to: Where the ways go, and the first element there; by default a new work area.
    """
    g, plan = kernel.geometry, kernel.plan
    ways, start = to or (scratch(ways_of_block(kernel), "int32"), 0)
    count = ways_of_tile(g)
    for (first, last), size in kernel.row_tiles(rows):
        with serial(first, last) as row_tile:
            row = bind(kernel.first_row_of(row_tile))
            for col_from, tiles, cols in plan.cols.kinds:
                with serial(tiles) as col_tile:
                    col = bind(col_from * plan.cols.size + col_tile * cols)
                    a_index = bind(source.origin + row * (g.sh * source.pitch) + col * (g.sw * g.c))
                    tile = (row_tile - rows[0]) * plan.cols.tiles + col_from + col_tile
                    at = bind(start + tile * count)
                    steps = [
                        r * g.sh * source.pitch + c * g.sw * g.c
                        for r in range(size)
                        for c in range(cols)
                    ]
                    with own_function(f"{kernel.name}_guard"):
                        store(ways, at, splat(2, "int32", 1))
                        for begin, many, length in _parts(g.run):
                            with serial(many) as part:
                                k = bind(begin + part * length)
                                way = bind(_way(kernel, source.buffer, a_index, steps, k, length))
                                store(ways, at + (1 + begin // _SEGMENT + part), way)
                                store(ways, at, minimum(load(ways, at, 1), way))
    return ways


def _parts(run: int) -> list[tuple[int, int, int]]:
    """(first element, segments, length of each) of whole segments and of a shorter last one."""
    whole = run // _SEGMENT
    parts = [(0, whole, _SEGMENT), (whole * _SEGMENT, 1, run % _SEGMENT)]
    return [part for part in parts if part[1] and part[2]]


def _way(
    kernel: MacroKernel, a: Buffer, a_index: Expr, steps: Sequence[int], begin: Expr, length: int
) -> Expr:
    """The way of `length` activations from `begin` of pixels at `steps` from `a_index`."""
    guard = kernel.constants["guard"]
    madd = _instruction(kernel, "madd_u8s8", 8 * _BYTES)
    lanes = f"int16x{_LANES}"
    tops = registers(2 * _LANES, "int16")
    for depth in range(2):
        store(tops, depth * _LANES, splat(0, "int16", _LANES))

    def raise_tops(k: Expr) -> None:
        row = bind(load(guard, k, _BYTES))
        for step in steps:
            piece = load(a, a_index + k + step, _BYTES)
            one = bind(intrinsic(lanes, madd, piece, row))
            other = shuffle([one], [lane ^ 2 for lane in range(_LANES)])  # the block's other group
            two = intrinsic(lanes, "llvm.sadd.sat.v16i16", one, other)
            for depth, bound in enumerate((one, two)):
                at = depth * _LANES
                store(tops, at, maximum(load(tops, at, _LANES), bound))

    if length >= _BYTES:
        with serial(length // _BYTES) as chunk:
            raise_tops(bind(begin + chunk * _BYTES))
    if length % _BYTES:
        raise_tops(begin + length - _BYTES)  # others in part again; blocks of 8 stay whole
    one, two = (_largest(load(tops, depth * _LANES, _LANES)) for depth in range(2))
    return cast(one < _TOP, "int32") + cast(two < _TOP, "int32")


def _instruction(kernel: MacroKernel, operation: str, bits: int) -> str:
    name = kernel.isa.intrinsic(operation, bits)
    assert name is not None  # see `applies`
    return name


def _largest(vector: Expr) -> Expr:
    """The largest lane."""
    lanes = _LANES
    while lanes > 1:
        lanes //= 2
        vector = bind(vector)
        low, high = (shuffle([vector], range(at, at + lanes)) for at in (0, lanes))
        vector = maximum(low, high)
    return bind(vector)


def guarded_loops(
    kernel: MacroKernel,
    source: Source,
    a_index: Expr,
    a_steps: Sequence[int],
    tile: Expr,
    acc: Accumulators,
    way_at: Expr,
) -> None:
    """Accumulate over all of K, each segment widened at once or by `vpmaddwd`.

    Two deep by segments, the loops would share registers and spill.

    Args:
        kernel: The kernel under construction.
        source: The activations.
        a_index: Element of the first pixel's.
        a_steps: Offset of each pixel from the first.
        tile: Column tile in the weights.
        acc: The register tile to add to.
        way_at: Element of `source.ways` of the tile's ways.
    """
    groups = kernel.geometry.k_groups
    step = replace(kernel.step(acc), kind="maddubs")
    size = step.weight_elements
    first = bind(tile * (groups * size))
    most = _SEGMENT // 4
    with serial(ways_of_tile(kernel.geometry) - 1) as segment:
        way = bind(load(source.ways, way_at + 1 + segment, 1))
        begin = bind(segment * most)
        count = bind(minimum(most, groups - begin))
        with when(way > 0), serial(count) as group:
            k = bind(begin + group)
            step.emit(source.buffer, a_index, [k * 4], a_steps, first + k * size)
        with when(way == 0):
            a = bind(a_index + begin * 4)
            _spread_loop(kernel, source.buffer, a, a_steps, bind(first + begin * size), count, acc)


def _spread_loop(
    kernel: MacroKernel,
    a: Buffer,
    a_index: Expr,
    a_steps: Sequence[int],
    first: Expr,
    count: Expr,
    acc: Accumulators,
) -> None:
    """Add `count` K-groups by `vpmaddwd`, whatever the activations are.

    Weights begin at element `first`.
    """
    lanes, weight = acc.lanes, kernel.constants["weight"]
    group = 4 * acc.nv * lanes
    name = _instruction(kernel, "madd_i16", 32 * lanes)
    for v in range(acc.nv):  # one after the other: twice the accumulators would not fit
        halves = acc.of_columns(2)
        for m, h in itertools.product(range(len(a_steps)), range(2)):
            halves.put(m, h, splat(0, "int32", lanes))
        with serial(count) as k:
            parts = []
            for h in range(2):
                part = load(weight, first + k * group + (2 * v + h) * 2 * lanes, 2 * lanes)
                parts.append(bind(cast(part, "int16")))
            for m, step in enumerate(a_steps):
                quad = cast(load(a, a_index + k * 4 + step, 4), "int16")
                words = splat(reinterpret(quad, "int64", 1), "int64", lanes // 2)
                pixel = bind(reinterpret(words, "int16", 2 * lanes))
                for h, part in enumerate(parts):
                    products = intrinsic(f"int32x{lanes}", name, pixel, part)
                    halves.put(m, h, halves.get(m, h) + products)
        for m in range(len(a_steps)):
            both = [bind(halves.get(m, h)) for h in range(2)]
            even, odd = (shuffle(both, range(at, 2 * lanes, 2)) for at in range(2))
            acc.put(m, v, acc.get(m, v) + even + odd)
