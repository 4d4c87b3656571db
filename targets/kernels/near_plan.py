# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Full 8-bit products by `vpmaddubsw` on AVX2: split the few activations that stand in the way.

What `depth` proves from the weights must hold for the largest activations, so 8-bit weights on
8-bit activations leave many K-groups to the slower products of int16 pairs.  But few activations
are large.  So each is split, exactly, into two parts:

    a = base + near + far

* `near` takes the place of the activations in the kernel.  `base` is a constant: it goes into the
  bias with the zero point.
* `far` is 0 nearly everywhere.  Each register tile has a list of its pixels' K-groups where it is
  not, and multiplies those with the same weights, one by one: |far| <= 128, so two products by
  weights above -128 fit int16.  Their sums are what the tile starts from.

There are two ways to split:

* by a window: near = clip(a - base, 0, size).  `depth` plans for a largest value of `size`: 127, or
  as much more as lets no K-group of the weights saturate by itself.  The proof is as good as for
  7-bit weights then.
* by blocks: behind a rectifier most activations are 0 or small, and large ones rarely meet, so what
  counts is not each value but what they may add up to.  With the largest magnitude `m[k]` of each
  weight row over all columns, `sum m[k] a[k]` over the four products that one int16 lane adds in
  two K-groups bounds that lane for every column.  Blocks of two K-groups that keep the bound are
  near as a whole and go two deep; of the others half of each activation is far, or all of it in
  two halves.

The numbers are those of any other kernel, whatever the activations are; only the time depends on
them.  A register tile where much is far multiplies its whole activations as int16 pairs, widened
with the weights in registers.  `near` emits the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.depth import TileOrder, group_time, mean_time, plan_depths
from qcompiler.targets.kernels.plan import Geometry

__all__ = [
    "HEAD",
    "LANES",
    "WORDS",
    "Sides",
    "Split",
    "Stored",
    "best_split",
    "capacity",
    "compress_table",
    "far_size",
    "largest_rows",
    "may_split",
    "most_listed",
    "one_pixel_each",
]

Array = npt.NDArray[Any]

Sides = Literal["none", "above", "both", "blocks"]
"""How activations are split: by a window above which they may lie, by one on both sides of which
they may lie, or by blocks."""

LANES = 32
"""Activations that are split together."""
WORDS = LANES // 4
HEAD = 8
"""Elements of a list before its entries: their number, and room up to a whole vector."""

_NEAR = 127
"""Largest activation with which no K-group of 8-bit weights saturates."""
_TOP = 32767
_SEVEN_BITS = 64
"""Magnitude of weights that are proved to go two deep nearly always, whatever is multiplied."""
_NEAR_ZERO = 32
"""Largest zero point of activations that are taken to come from a rectifier."""
_SIGMAS = 5.0
"""Standard deviations from the zero point to the end of the range that calibration found."""
_DRAWN = 64
"""Pixels that are drawn to estimate how many blocks are split."""
_FAR_TIME = 0.6
"""Time of an entry of a list, relative to a K-group of a register tile at depth 1."""
_START_TIME = 4.0
"""Time to start a list, in K-groups."""
_SPLIT_TIME = 1.6
"""Time to split the activations of a K-group, relative to one at depth 1 of one column tile; twice
that of warm activations."""


@dataclass(frozen=True, slots=True)
class Split:
    """How the activations of a product are split."""

    sides: Sides
    base: int = 0
    """Stored activation that the window begins with."""
    size: int = 0
    """Largest value of the near part, of a window."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What is known of the stored activations of a product."""

    zero_point: int
    largest: int
    spread: float | None = None
    """Root mean square of their distance from the zero point."""

    @property
    def rectified(self) -> bool:
        """Whether they are taken to come from a rectifier."""
        return self.zero_point <= _NEAR_ZERO

    @property
    def deviation(self) -> float:
        """Standard deviation before the rectifier, if there is one, of a normal distribution."""
        if self.spread is not None:
            scale = math.sqrt(2.0) if self.rectified else 1.0
            return max(self.spread * scale, 1.0)
        below = 0 if self.rectified else self.zero_point
        return max(self.largest - self.zero_point, below, 1) / _SIGMAS


def may_split(isa: Isa, geometry: Geometry, weight: Array, largest: int) -> bool:
    """Whether the kernels exist and may be worth it.

    Args:
        isa: The row; the kernels need its instructions.
        geometry: The convolution or matrix product.
        weight: Its int8 weights.
        largest: Largest stored activation.
    """
    if isa.dot != "maddubs" or isa.intrinsic("sign_i8", isa.vector_bits) is None:
        return False
    plain = geometry.groups == 1 and geometry.run % 4 == 0 and geometry.n >= isa.lanes()
    wide = int(np.abs(weight.astype(np.int16)).max()) > _SEVEN_BITS and int(weight.min()) > -128
    return plain and wide and largest > _NEAR


def best_split(
    packed: Array,
    geometry: Geometry,
    row: Array,
    stored: Stored,
    pixels: int,
    time: float,
) -> tuple[int | list[TileOrder], Split] | None:
    """The fastest split that takes less than `time`, with the order of the K-groups.

    Activations on both sides of their zero point of which nothing is known are not split: they may
    as well be spread evenly (what tanh gives, or rows that are quantized at run time).

    Args:
        packed: int8 weights [T, Q, V, L, G].
        geometry: The product.
        row: `largest_rows` of the weights.
        stored: What is known of the stored activations.
        pixels: Pixels of a register tile.
        time: Of a K-group otherwise, relative to depth 1.
    """
    tiles, groups = packed.shape[:2]
    found: tuple[int | list[TileOrder], Split] | None = None

    def lists(share: float) -> float:
        """Time that the lists take for each K-group, of which a share is listed for each pixel."""
        return pixels * share * _FAR_TIME + _START_TIME / int(groups) + _SPLIT_TIME / int(tiles)

    if one_pixel_each(geometry) and geometry.run % 8 == 0 and stored.rectified:
        blocks = group_time(2) + lists(_split_blocks(row[: geometry.run], stored))
        if blocks < time:
            time, found = blocks, (2, Split("blocks"))
    for size in _sizes(packed) if stored.rectified or stored.spread is not None else ():
        base = min(max(0, stored.zero_point - (size + 1) // 2), 255 - size)
        split = Split("both" if base else "above", base, size)
        extra = lists(_outside(split, stored))
        if extra >= time:
            continue
        orders = plan_depths(packed, size)
        if mean_time(orders, packed) + extra < time:
            time, found = mean_time(orders, packed) + extra, (orders, split)
    return found


def _sizes(packed: Array) -> list[int]:
    """Sizes of windows in which no K-group saturates: the largest, and that for any weights."""
    pairs = packed.reshape(-1, 2).astype(np.int16)
    most = int(max(np.maximum(pairs, 0).sum(1).max(), -np.minimum(pairs, 0).sum(1).min(), 1))
    return list(dict.fromkeys((min(_TOP // most, 255), _NEAR)))


def _outside(split: Split, stored: Stored) -> float:
    """Expected share of the K-groups of a pixel with an activation outside of the window.

    It takes activations for normally distributed around their zero point, or above it.
    """
    scale = 1.0 / (stored.deviation * math.sqrt(2.0))
    far = 0.0
    if split.base + split.size < stored.largest:
        far += math.erfc((split.base + split.size + 1 - stored.zero_point) * scale) / 2
    if split.base:
        far += math.erfc((stored.zero_point - split.base + 1) * scale) / 2
    return 1.0 - (1.0 - far) ** 4


def _split_blocks(row: Array, stored: Stored) -> float:
    """Expected share of the blocks that leave int16, of activations as a rectifier leaves them."""
    drawn = np.random.default_rng(0).standard_normal((_DRAWN, len(row))) * stored.deviation
    a = np.clip(np.rint(drawn) + stored.zero_point, stored.zero_point, stored.largest)
    bounds = (a * row).reshape(_DRAWN, -1, 2, 2, 2).sum((2, 4))  # [pixel, block, pair]
    return float((bounds >= _TOP).any(-1).mean())


def largest_rows(weight: Array) -> Array:
    """The largest magnitude of each weight row over all columns: `[..., K]` to int8.

    Zeros fill it up to whole vectors.
    """
    largest = np.abs(weight.reshape(-1, weight.shape[-1]).astype(np.int16)).max(0)
    return np.pad(largest, (0, -len(largest) % LANES)).astype(np.int8)


def most_listed(geometry: Geometry) -> int:
    """Entries of a register tile's list from which int16 pairs of whole activations are faster."""
    return geometry.k_groups + geometry.k_groups // 2


def one_pixel_each(geometry: Geometry) -> bool:
    """Whether every activation belongs to one pixel only."""
    return geometry.k_rows * geometry.k_cols == 1 and geometry.kw == 1


def far_size(geometry: Geometry, pixels: int) -> int:
    """Elements of a register tile's list: the count, where each entry is, and the entries."""
    return HEAD + 2 * capacity(geometry, pixels)


def capacity(geometry: Geometry, pixels: int) -> int:
    """Most entries of a list, with those that a whole vector writes beyond the last."""
    return -(-2 * pixels * geometry.k_groups // WORDS) * WORDS + WORDS


def compress_table() -> Array:
    """For each mask of eight lanes the lanes that are set, then any: uint8 [256 * 8]."""
    table = np.zeros((256, WORDS), np.uint8)
    for mask in range(256):
        lanes = [lane for lane in range(WORDS) if mask >> lane & 1]
        table[mask, : len(lanes)] = lanes
    return table.reshape(-1)
