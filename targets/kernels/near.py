# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The code that splits activations and multiplies what is far (see `near_plan`).

Lists are written without branches: `vpermd` moves the K-groups of 32 activations that are not 0 to
the front, by a table of its 256 operands.  Where activations lie on both sides of a window, the
magnitude of what is far is multiplied with weights that have its sign (`vpsignb`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qcompiler.targets.kernels.bands import CHUNK
from qcompiler.targets.kernels.near_plan import (
    HEAD,
    LANES,
    WORDS,
    Sides,
    capacity,
    far_size,
    one_pixel_each,
)
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    cast,
    intrinsic,
    lanes_of,
    load,
    maximum,
    minimum,
    own_function,
    ramp,
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
    from qcompiler.targets.kernels.macro import MacroKernel, Source
    from qcompiler.targets.kernels.register_tile import Accumulators

__all__ = [
    "far_size_of_block",
    "far_size_of_tile",
    "far_sums",
    "near_whole",
    "whole_sums",
    "with_near",
]

_PIXEL = 1 << 24
"""What an entry's place has for each pixel, beside the K-group."""


def _window(kernel: MacroKernel) -> tuple[Expr, Expr]:
    scalars = kernel.constants["scalars"]
    base, size = (bind(cast(load(scalars, at, 1), "uint8")) for at in (6, 7))
    return base, size


def _near(value: Expr, window: tuple[Expr, Expr], lanes: int, sides: Sides) -> Expr:
    base, size = (splat(number, "uint8", lanes) for number in window)
    if sides == "both":
        value = maximum(value, base) - base
    return minimum(value, size)


def _near_elements(
    kernel: MacroKernel, target: Buffer, to: Expr, source: Buffer, start: Expr, count: int
) -> None:
    """Write the near part of `count` activations."""
    sides, window = kernel.facts.far, _window(kernel)

    def piece(at: Expr, size: int) -> None:
        value = bind(load(source, start + at, size))
        store(target, to + at, _near(value, window, size, sides))

    _pieces(count, piece)


def _pieces(count: int, piece: Callable[[Expr, int], None]) -> None:
    """Call `piece` with the offset and size of the pieces of `count` elements."""
    whole, rest = divmod(count, LANES)
    if whole:
        with serial(whole) as chunk:
            piece(bind(chunk * LANES), LANES)
    at = whole * LANES
    for bit in reversed(range(rest.bit_length())):
        if rest >> bit & 1:
            piece(at, 1 << bit)
            at += 1 << bit


class _List:
    """The list of a register tile, as it is written."""

    def __init__(self, buffer: Buffer, at: Expr, capacity: int, table: Buffer) -> None:
        self._buffer, self._at, self._capacity, self._table = buffer, at, capacity, table
        self._count = registers(1, "int32")
        store(self._count, 0, splat(0, "int32", 1))

    def append(self, words: Expr, mask: Expr, where: Expr) -> None:
        """Add the words that a mask names, whose places follow each other from `where` on."""
        order = bind(cast(load(self._table, mask * WORDS, WORDS), "int32"))
        first = bind(self._at + HEAD + load(self._count, 0, 1))
        for to, what in ((0, ramp(where, WORDS)), (self._capacity, words)):
            moved = intrinsic(f"int32x{WORDS}", "llvm.x86.avx2.permd", what, order)
            store(self._buffer, first + to, moved)
        count = intrinsic("int32", "llvm.ctpop.i32", mask)
        store(self._count, 0, load(self._count, 0, 1) + count)

    def close(self) -> None:
        """Write how many there are."""
        store(self._buffer, self._at, load(self._count, 0, 1))


def _split_tiles(
    kernel: MacroKernel,
    source: Source,
    rows: tuple[Expr, Expr],
    lists: tuple[Buffer, Expr],
    near: tuple[Buffer, Expr],
) -> None:
    """List what is far in each register tile of some tile rows, and write what is near.

    Args:
        kernel: The kernel under construction.
        source: The activations.
        rows: The tile rows, half-open.
        lists: Where the lists go, int32: `far_size` elements for each register tile, from an
            element on.
        near: Where the near part goes, and the element of `source` that it begins with there;
            nothing is written where several pixels read the same activations.
    """
    g, plan = kernel.geometry, kernel.plan
    pixels = plan.rows.size * plan.cols.size
    for (first, last), size in kernel.row_tiles(rows):
        with serial(first, last) as row_tile:
            row = bind(kernel.first_row_of(row_tile))
            for col_from, tiles, cols in plan.cols.kinds:
                with serial(tiles) as col_tile:
                    col = bind(col_from * plan.cols.size + col_tile * cols)
                    a_index = bind(source.origin + row * (g.sh * source.pitch) + col * (g.sw * g.c))
                    tile = (row_tile - rows[0]) * plan.cols.tiles + col_from + col_tile
                    at = bind(lists[1] + tile * far_size(g, pixels))
                    steps = kernel.pixel_steps(source, (size, cols))
                    with own_function(f"{kernel.name}_far"):
                        list_ = lists[0], at
                        _split_tile(kernel, source, a_index, steps, list_, near)


def _split_tile(
    kernel: MacroKernel,
    source: Source,
    a_index: Expr,
    steps: Sequence[int],
    lists: tuple[Buffer, Expr],
    near: tuple[Buffer, Expr],
) -> None:
    """Split the activations of pixels at `steps` from element `a_index`."""
    g, window = kernel.geometry, _window(kernel)
    pixels = kernel.plan.rows.size * kernel.plan.cols.size
    list_ = _List(*lists, capacity(g, pixels), kernel.constants["compress"])

    def run(index: Expr, group: Expr, pixel: int) -> None:
        def piece(offset: Expr, size: int) -> None:
            value = bind(load(source.buffer, index + offset, size))
            where = bind(group + pixel * _PIXEL + offset // 4)

            def keep(part: Expr) -> None:
                if one_pixel_each(g):
                    store(near[0], index + offset - near[1], part)

            if kernel.facts.far == "blocks":
                _split_blocks(kernel, value, offset, list_, where, keep)
                return
            part = bind(_near(value, window, size, kernel.facts.far))
            keep(part)
            far = value - part
            if kernel.facts.far == "both":
                far = far - splat(window[0], "uint8", size)
            words = bind(reinterpret(_filled(far), "int32", WORDS))
            list_.append(words, _signs(words | (splat(0, "int32", WORDS) - words)), where)

        _pieces(g.run, piece)

    for pixel, step in enumerate(steps):
        if g.k_rows * g.k_cols == 1:
            run(bind(a_index + step), 0, pixel)
            continue
        with serial(g.k_rows) as k_row, serial(g.k_cols) as k_col:
            index = a_index + step + k_row * (g.dh * source.pitch) + k_col * (g.dw * g.c)
            run(bind(index), bind((k_row * g.k_cols + k_col) * g.run_groups), pixel)
    list_.close()


def _split_blocks(
    kernel: MacroKernel,
    value: Expr,
    offset: Expr,
    list_: _List,
    where: Expr,
    keep: Callable[[Expr], None],
) -> None:
    """Split in halves the blocks of 32 activations or fewer whose bound leaves int16."""
    size = lanes_of(value)
    full = bind(_filled(value))
    rows = bind(load(kernel.constants["rows"], offset, LANES))
    name = kernel.isa.intrinsic("madd_u8s8", 8 * LANES)
    assert name is not None  # see `may_split`

    def leaves(part: Expr) -> Expr:
        """int32 lanes, negative for the K-groups of blocks that may leave int16."""
        one = bind(intrinsic(f"int16x{LANES // 2}", name, part, rows))
        other = shuffle([one], [lane ^ 2 for lane in range(LANES // 2)])
        both = intrinsic(f"int16x{LANES // 2}", "llvm.sadd.sat.v16i16", one, other)
        tops = bind(both + splat(1, "int16", LANES // 2))  # 32767 becomes negative
        words = bind(reinterpret(tops, "int32", WORDS))
        return bind(words | (words << splat(16, "int32", WORDS)))

    def chosen(words: Expr, part: Expr) -> Expr:
        whole = words >> splat(31, "int32", WORDS)
        return bind(part & reinterpret(whole, "uint8", LANES))

    def cut(part: Expr) -> Expr:
        return part if size == LANES else shuffle([part], range(size))

    large = leaves(full)
    far = chosen(large, full - (full >> splat(1, "uint8", LANES)))
    half = bind(full - far)
    keep(cut(half))
    mask = _signs(large)
    list_.append(bind(reinterpret(far, "int32", WORDS)), mask, where)
    with when(mask != 0):  # half may still be too large: then it is listed as well
        still = leaves(half)
        rest = chosen(still, half)
        keep(cut(bind(half - rest)))
        list_.append(bind(reinterpret(rest, "int32", WORDS)), _signs(still), where)


def _filled(value: Expr) -> Expr:
    """Bytes, and zeros after them to a whole vector."""
    size = lanes_of(value)
    if size == LANES:
        return value
    nothing = bind(splat(0, "uint8", LANES - size))
    return shuffle([bind(value), nothing], range(LANES))


def _signs(words: Expr) -> Expr:
    """The sign bits of int32 lanes."""
    lanes = reinterpret(words, "float32", WORDS)
    return bind(intrinsic("int32", "llvm.x86.avx.movmsk.ps.256", lanes))


def far_sums(
    kernel: MacroKernel, lists: tuple[Buffer, Expr], pixels: int, tile: Expr, acc: Accumulators
) -> None:
    """Add the products of what is far to the accumulators of a register tile.

    They are added in memory, since the entries name their pixel.

    Args:
        kernel: The kernel under construction.
        lists: The lists, and the first element of the tile's.
        pixels: Pixels of the register tile.
        tile: Column tile in the weights.
        acc: The register tile.
    """
    buffer, at = lists
    step, lanes, nt = kernel.narrow_step(acc), acc.lanes, kernel.plan.nt
    groups = kernel.geometry.k_groups
    room = capacity(kernel.geometry, kernel.plan.rows.size * kernel.plan.cols.size)
    places = kernel.constants.get("places")
    first = bind(tile * (groups * step.weight_elements))
    count = bind(load(buffer, at, 1))
    with when(count > 0):
        sums = registers(pixels * nt, "int32")
        for m in range(pixels):
            for v in range(acc.nv):
                store(sums, m * nt + v * lanes, acc.get(m, v))
        with serial(count) as index:
            where = bind(load(buffer, at + HEAD + index, 1))
            pixel = bind(where // _PIXEL)
            group = bind(where % _PIXEL)
            if places is not None:
                group = bind(load(places, tile * groups + group, 1))
            word = splat(load(buffer, at + HEAD + room + index, 1), "int32", lanes)
            far = bind(reinterpret(word, "int8", 4 * lanes))
            size = far
            if kernel.facts.far == "both":
                size = bind(maximum(far, splat(0, "int8", 4 * lanes) - far))
            weights = step.weights(bind(first + group * step.weight_elements))
            for v, weight in enumerate(weights):
                if kernel.facts.far == "both":
                    name = kernel.isa.intrinsic("sign_i8", 32 * lanes)
                    assert name is not None  # see `may_split`
                    weight = [intrinsic(f"int8x{4 * lanes}", name, weight[0], far)]
                there = bind(pixel * nt + v * lanes)
                store(sums, there, step.multiply(load(sums, there, lanes), [size], weight))
        for m in range(pixels):
            for v in range(acc.nv):
                acc.put(m, v, load(sums, m * nt + v * lanes, lanes))


def whole_sums(
    kernel: MacroKernel,
    source: Source,
    a_index: Expr,
    a_steps: Sequence[int],
    tile: Expr,
    acc: Accumulators,
) -> None:
    """Add all products of activations that are not split, by `vpmaddwd`: exact for any numbers.

    The int32 sums of a K-group's halves stay apart until the end, which is how widened bytes lie.

    Args:
        kernel: The kernel under construction.
        source: The activations before they were split.
        a_index: Element of the first pixel's.
        a_steps: Offset of each pixel from the first.
        tile: Column tile in the weights.
        acc: The register tile to add to.
    """
    lanes, weight, groups = acc.lanes, kernel.constants["weight"], kernel.geometry.k_groups
    size = kernel.narrow_step(acc).weight_elements
    first = bind(tile * (groups * size))
    offsets = kernel.constants.get("offsets")
    table = bind(tile * groups) if kernel.facts.dot == "mixed" else 0
    base = bind(cast(load(kernel.constants["scalars"], 6, 1), "int16"))
    name = kernel.isa.intrinsic("madd_i16", 32 * lanes)
    assert name is not None  # see `may_split`
    for v in range(acc.nv):  # one after the other: twice the accumulators would not fit
        halves = acc.of_columns(2)
        for m, h in itertools.product(range(len(a_steps)), range(2)):
            halves.put(m, h, splat(0, "int32", lanes))
        with serial(groups) as k:
            at = k * 4 if offsets is None else load(offsets, table + k, 1)
            at = bind(a_index + at)
            parts = []
            for h in range(2):
                start = first + k * size + (2 * v + h) * 2 * lanes
                parts.append(bind(cast(load(weight, start, 2 * lanes), "int16")))
            for m, step in enumerate(a_steps):
                quad = cast(load(source.buffer, at + step, 4), "int16") - splat(base, "int16", 4)
                words = splat(reinterpret(quad, "int64", 1), "int64", lanes // 2)
                pixel = bind(reinterpret(words, "int16", 2 * lanes))
                for h, part in enumerate(parts):
                    products = intrinsic(f"int32x{lanes}", name, pixel, part)
                    halves.put(m, h, halves.get(m, h) + products)
        for m in range(len(a_steps)):
            both = [bind(halves.get(m, h)) for h in range(2)]
            even, odd = (shuffle(both, range(at, 2 * lanes, 2)) for at in range(2))
            acc.put(m, v, acc.get(m, v) + even + odd)


def far_size_of_tile(kernel: MacroKernel) -> int:
    """Elements of the list of what is far in a register tile."""
    return far_size(kernel.geometry, kernel.plan.rows.size * kernel.plan.cols.size)


def far_size_of_block(kernel: MacroKernel) -> int:
    """Elements of the lists of a block of tile rows."""
    return kernel.plan.row_block * kernel.plan.cols.tiles * far_size_of_tile(kernel)


def with_near(kernel: MacroKernel, source: Source, rows: tuple[Expr, Expr]) -> Source:
    """The source of a task with its activations split (see `near_plan`)."""
    g = kernel.geometry
    lists = scratch(far_size_of_block(kernel), "int32")
    begin: Expr = 0
    if g.direct:
        begin = bind(source.origin + kernel.first_row_of(rows[0]) * (g.sh * source.pitch))
        area = scratch(g.band_rows(kernel.plan.band) * source.pitch + CHUNK, "uint8")
    else:
        area = scratch(kernel.band_size + CHUNK, "uint8")
    _split(kernel, source, rows, (lists, 0), (area, begin), begin)
    origin = bind(source.origin - begin)
    first = rows[0]
    return replace(
        source, buffer=area, origin=origin, far=lists, first_row_tile=first, whole=source
    )


def near_whole(kernel: MacroKernel, bands: Buffer | None) -> tuple[Buffer, Buffer]:
    """All activations split: the near part, and the lists of all blocks of tile rows."""
    g, plan = kernel.geometry, kernel.plan
    blocks = g.batch * plan.row_blocks
    size = g.batch * g.h * g.w * g.c if bands is None else blocks * kernel.band_size
    area = scratch(size + CHUNK, "uint8")
    lists = scratch(blocks * far_size_of_block(kernel), "int32")
    with kernel.task_loop(g.macs, blocks) as index:
        image = bind(index // plan.row_blocks)
        first = bind(index % plan.row_blocks * plan.row_block)
        rows = first, bind(minimum(first + plan.row_block, plan.rows.tiles))
        if bands is None:
            source = kernel.source_of_block(image, first)
            begin = bind(source.origin + kernel.first_row_of(first) * (g.sh * source.pitch))
        else:
            source = kernel.source_in_band(bands, image, index, first)
            begin = bind(index * kernel.band_size)
        first_list = bind(index * far_size_of_block(kernel))
        _split(kernel, source, rows, (lists, first_list), (area, 0), begin)
    return area, lists


def _split(
    kernel: MacroKernel,
    source: Source,
    rows: tuple[Expr, Expr],
    lists: tuple[Buffer, Expr],
    near: tuple[Buffer, Expr],
    begin: Expr,
) -> None:
    """Split the activations of some tile rows, from element `begin` on (see `_split_tiles`)."""
    g, pitch = kernel.geometry, source.pitch
    _split_tiles(kernel, source, rows, lists, near)
    if one_pixel_each(g):
        return
    area, start = near[0], bind(begin - near[1])
    if not g.direct:
        _near_elements(kernel, area, start, source.buffer, begin, kernel.band_size)
        return
    rest = g.h - kernel.first_row_of(rows[0]) * g.sh
    with serial(bind(minimum(g.band_rows(kernel.plan.band), rest))) as i:
        _near_elements(kernel, area, start + i * pitch, source.buffer, begin + i * pitch, pitch)
