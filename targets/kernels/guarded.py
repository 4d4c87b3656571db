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

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcompiler.targets.kernels.depth import group_time
from qcompiler.targets.kernels.plan import Dot, Geometry
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    cast,
    intrinsic,
    load,
    maximum,
    own_function,
    registers,
    reinterpret,
    scratch,
    serial,
    shuffle,
    splat,
    store,
)

if TYPE_CHECKING:
    from qcompiler.targets.kernels.macro import Accumulators, MacroKernel, Source

__all__ = ["DEPTHS", "applies", "classify", "expected_time", "guard_row", "spread_loop", "variants"]

Array = npt.NDArray[Any]

DEPTHS = (2, 1, 0)
"""The ways a register tile may take, by depth."""
_BYTES = 32
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


def applies(geometry: Geometry, weight: Array) -> bool:
    """Whether the kernel exists and may be worth it.

    It takes one run of whole blocks, read in place, and weights from -127.  Weights of 7 bits are
    proved to go two deep nearly always.

    Args:
        geometry: The convolution or matrix product.
        weight: Its int8 weights.
    """
    one_run = geometry.k_rows * geometry.k_cols == 1 and geometry.groups == 1 and geometry.direct
    whole = geometry.run % 8 == 0 and geometry.run >= _BYTES
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


def classify(kernel: MacroKernel, source: Source, rows: tuple[Expr, Expr]) -> Buffer:
    """The way that each register tile of a task's tile rows takes, as int32.

    Args:
        kernel: The kernel under construction.
        source: The task's activations.
        rows: The task's tile rows, half-open.
    """
    g, plan = kernel.geometry, kernel.plan
    ways = scratch(plan.row_block * plan.cols.tiles, "int32")
    for (first, last), size in kernel.row_tiles(rows):
        with serial(first, last) as row_tile:
            row = bind(kernel.first_row_of(row_tile))
            for col_from, count, cols in plan.cols.kinds:
                with serial(count) as col_tile:
                    col = bind(col_from * plan.cols.size + col_tile * cols)
                    a_index = bind(source.origin + row * (g.sh * source.pitch) + col * (g.sw * g.c))
                    at = bind((row_tile - rows[0]) * plan.cols.tiles + col_from + col_tile)
                    steps = [
                        r * g.sh * source.pitch + c * g.sw * g.c
                        for r in range(size)
                        for c in range(cols)
                    ]
                    with own_function(f"{kernel.name}_guard"):
                        store(ways, at, _way(kernel, source.buffer, a_index, steps))
    return ways


def _way(kernel: MacroKernel, a: Buffer, a_index: Expr, steps: Sequence[int]) -> Expr:
    """The way of the pixels that begin `steps` elements after `a_index`."""
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

    k_elements = kernel.geometry.run
    with serial(k_elements // _BYTES) as chunk:
        raise_tops(bind(chunk * _BYTES))
    if k_elements % _BYTES:
        raise_tops(k_elements - _BYTES)  # again in part; blocks of 8 stay whole
    one, two = (_largest(load(tops, depth * _LANES, _LANES)) for depth in range(2))
    return cast(one < _TOP, "int32") + cast(two < _TOP, "int32")


def _instruction(kernel: MacroKernel, operation: str, bits: int) -> str:
    name = kernel.isa.intrinsic(operation, bits)
    assert name is not None  # packing asks for this kernel on rows with `vpmaddubsw` only
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


def variants(kernel: MacroKernel) -> Iterator[tuple[int, MacroKernel]]:
    """(way, the kernel that takes it) of each way."""
    for way in DEPTHS:
        dot: Dot = "maddubs" if way else "spread"
        facts = replace(kernel.facts, dot=dot, depths=(max(way, 1),))
        yield way, replace(kernel, facts=facts)


def spread_loop(
    kernel: MacroKernel,
    source: Source,
    a_index: Expr,
    a_steps: Sequence[int],
    tile: Expr,
    acc: Accumulators,
) -> None:
    """Accumulate over all of K by `vpmaddwd`, whatever the activations are.

    Args:
        kernel: The kernel under construction.
        source: The activations.
        a_index: Element of the first pixel's.
        a_steps: Offset of each pixel from the first.
        tile: Column tile in the weights.
        acc: The register tile to add to.
    """
    lanes, weight = acc.lanes, kernel.constants["weight"]
    halves = acc.of_columns(2 * acc.nv)
    group = 4 * acc.nv * lanes
    first = bind(tile * (kernel.geometry.k_groups * group))
    for m in range(len(a_steps)):
        for h in range(2 * acc.nv):
            halves.put(m, h, splat(0, "int32", lanes))
    name = _instruction(kernel, "madd_i16", 32 * lanes)
    with serial(kernel.geometry.k_groups) as k:
        pixels = []
        for step in a_steps:
            quad = load(source.buffer, a_index + k * 4 + step, 4)
            words = splat(reinterpret(cast(quad, "int16"), "int64", 1), "int64", lanes // 2)
            pixels.append(bind(reinterpret(words, "int16", 2 * lanes)))
        for h in range(2 * acc.nv):
            part = load(weight, first + k * group + h * 2 * lanes, 2 * lanes)
            wide = bind(cast(part, "int16"))
            for m, pixel in enumerate(pixels):
                products = intrinsic(f"int32x{lanes}", name, pixel, wide)
                halves.put(m, h, halves.get(m, h) + products)
    for m in range(len(a_steps)):
        for v in range(acc.nv):
            both = [bind(halves.get(m, 2 * v + h)) for h in range(2)]
            even, odd = (shuffle(both, range(at, 2 * lanes, 2)) for at in range(2))
            acc.put(m, v, acc.get(m, v) + even + odd)
