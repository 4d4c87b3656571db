# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""How many `vpmaddubsw` results each tile may add in int16: proved from the constant weights.

`vpmaddubsw` gives sums of two products in int16, and `vpmaddwd` by ones widens them.  Where D
results are proved to fit int16 together, one `vpmaddwd` widens all D: (1 + 1/D) multiply-port
instructions for each 32 products in place of 2.  With activations in [0, a_max], D neighbouring
K-groups fit when for every int16 lane the positive weights add up to at most 32767 / a_max and the
negative ones to at least -32768 / a_max: then no partial sum, in any order, leaves int16.

K-groups may be taken in any order, since each tile has its own list of activation offsets, so a
tile pairs K-groups with large weights with K-groups with small or opposite ones (`_merge`).

Source: shared design notes, "Below the multiply floor on x86", points 1 and 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "EXACT",
    "SECTION_TIME",
    "TileOrder",
    "chain_depth",
    "group_time",
    "mean_time",
    "plan_depths",
]

Array = npt.NDArray[Any]

EXACT = 0
"""The depth class of K-groups that could saturate by themselves: int16 pairs multiply them."""

_COST = {EXACT: 1.4, 1: 1.0, 2: 0.77, 4: 0.72, 8: 0.67}
"""Time of one K-group by depth, relative to depth 1 (measured on Zen 5: 115, 144, 187, 202, 217
GMAC/s for a tile of 3 pixels x 2 vectors; on Sapphire Rapids, with three ports for vectors, the
first two are 79 and 115)."""
SECTION_TIME = 3.0
"""Time to start one section of a tile's list, in K-groups of depth 1."""
_DEEP = 1.08
"""Factor on the time of a tile with deep sums, which has fewer pixels (`params.fitted`); with
`_FEWER` measured on Sapphire Rapids: a product of 64, 128, 256, 512 and 1024 channels takes 1.15,
0.97, 1.0, 0.90 and 0.93 of its time at depth 1 with the 7-bit weights of a normal distribution."""
_FEWER = 2.0
"""Time that such a tile has more in start and epilogue, for the same pixels, in K-groups."""
_TABLE = 1.03
"""Factor on the time of a tile that looks its offsets up."""
_ROUNDS = 4
"""Attempts to pair what did not pair before."""


def group_time(depth: int, groups: int | None = None) -> float:
    """Time of one K-group of a depth class, relative to depth 1.

    With the number of K-groups of a tile that are all of this class, its start and epilogue, which
    take longer for deep sums, are shared out to them.
    """
    if groups is None or depth <= 1:
        return _COST[depth]
    return _DEEP * _COST[depth] + _FEWER / groups


@dataclass(frozen=True, slots=True, eq=False)
class TileOrder:
    """The K-groups of one tile by depth class, in the order in which they are multiplied."""

    blocks: dict[int, Array]
    """Depth -> K-groups [blocks, depth]; `EXACT` -> [groups, 1].  Absent where there are none."""

    @property
    def cost(self) -> float:
        """Estimated time, in K-groups of depth 1."""
        return self.time(deep=self.is_deep)

    @property
    def is_deep(self) -> bool:
        """Whether sums of several K-groups are added in int16."""
        return max(self.blocks) > 1

    def time(self, *, deep: bool) -> float:
        """Estimated time, in a tile of the size that goes with deep sums or without."""
        time = sum(
            groups.size * _COST[depth] + SECTION_TIME for depth, groups in self.blocks.items()
        )
        return _DEEP * time + _FEWER if deep else time


def plan_depths(packed: Array, a_max: int) -> int | list[TileOrder]:
    """Choose how deep each tile accumulates.

    Args:
        packed: int8 weights [T, Q, V, L, G]: tiles, K-groups, vectors, lanes, group (even).
        a_max: Largest stored activation, 0..255.

    Returns:
        One depth, if all tiles can take their K-groups in the given order by blocks of that depth
        (the last block may be shorter) and nothing is estimated faster; else the order of each
        tile.
    """
    tiles, count = packed.shape[:2]
    pairs = packed.reshape(tiles, count, -1, 2)
    high = np.maximum(pairs, 0).sum(-1, dtype=np.int16)
    low = -np.minimum(pairs, 0).sum(-1, dtype=np.int16)
    limits = (32767 // max(a_max, 1), 32768 // max(a_max, 1))
    groups = np.arange(count)[:, None]
    plain: dict[int, float] = {}
    for depth in (1, 2, 4, 8):
        if not _plain_fits(high, low, limits, depth):
            break
        plain[depth] = tiles * TileOrder({depth: groups}).cost
    best = min(plain, key=lambda depth: plain[depth], default=0)
    if 8 in plain:
        return best
    orders = [_order(high[t], low[t], limits) for t in range(tiles)]
    if any(order.is_deep for order in orders):  # then all tiles have the size of deep ones
        flat = [_order(high[t], low[t], limits, most=1) for t in range(tiles)]
        if sum(o.cost for o in flat) <= sum(o.time(deep=True) for o in orders):
            orders = flat
    listed = _TABLE * sum(order.cost for order in orders)
    if best and plain[best] <= listed:
        return best
    return orders


def mean_time(orders: int | list[TileOrder], packed: Array) -> float:
    """Estimated time of a K-group of weights [T, Q, V, L, G], relative to depth 1."""
    if isinstance(orders, int):
        return group_time(orders)
    return sum(order.cost for order in orders) / math.prod(packed.shape[:2])


def chain_depth(packed: Array, largest: int) -> int:
    """How many K-groups in a row `smlal` may add in int16: 4, 2, 1, or 0 where not even one.

    A lane adds the products of two members of each group, 0 and 2 or 1 and 3; it fits when the
    magnitudes of their weights add up to at most 32767 / `largest`.

    Args:
        packed: int8 weights [T, Q, V, L, 4].
        largest: Largest magnitude of an activation.
    """
    lanes = np.abs(packed.astype(np.int16))
    sums = (lanes[..., :2] + lanes[..., 2:]).reshape(*packed.shape[:2], -1).astype(np.int32)
    limit = 32767 // max(largest, 1)
    for depth in (4, 2, 1):
        total = np.cumsum(np.pad(sums, ((0, 0), (depth, depth - 1), (0, 0))), axis=1)
        if int((total[:, depth:] - total[:, :-depth]).max()) <= limit:
            return depth
    return 0


def _plain_fits(high: Array, low: Array, limits: tuple[int, int], depth: int) -> bool:
    """Whether blocks of `depth` K-groups in the given order fit int16 in every tile."""
    starts = np.arange(0, high.shape[1], depth)
    return all(
        int(np.add.reduceat(sums, starts, axis=1).max()) <= limit
        for sums, limit in zip((high, low), limits, strict=True)
    )


def _order(high: Array, low: Array, limits: tuple[int, int], most: int = 8) -> TileOrder:
    """The cheapest order of one tile's K-groups [Q, int16 lanes], at most so deep."""
    safe = (high.max(1) <= limits[0]) & (low.max(1) <= limits[1])
    groups = np.arange(len(high))[:, None]
    blocks: dict[int, Array] = {}
    if not safe.all():
        blocks[EXACT] = groups[~safe]
    rest = groups[safe]
    if not len(rest):
        return TileOrder(blocks)
    sums = np.concatenate([high, low], axis=1)[safe]
    most_int16 = np.minimum(limits, 32767).astype(np.int16)
    top = np.repeat(most_int16, (high.shape[1], low.shape[1]))
    best = TileOrder({**blocks, 1: rest})
    kept = dict(blocks)
    for depth in (1, 2, 4):
        if 2 * depth > most:
            break
        left, rest, sums = _merge(rest, sums, top)
        if len(left):
            kept[depth] = left
        if not len(rest):
            break
        found = TileOrder({**kept, 2 * depth: rest})
        if found.cost < best.cost:
            best = found
    return best


def _merge(blocks: Array, sums: Array, top: Array) -> tuple[Array, Array, Array]:
    """Join pairs of blocks [B, depth] whose lane sums [B, lanes] stay within `top` together.

    Returns:
        The blocks that found no partner; the joined blocks and their sums.
    """
    joined, joined_sums = [], []
    generator = np.random.default_rng(0)
    order = np.argsort(sums.max(1), kind="stable")
    for _ in range(_ROUNDS):
        half = len(order) // 2
        if not half:
            break
        one, other = order[:half], order[::-1][:half]
        both = sums[one] + sums[other]
        fits = (both <= top).all(1)
        joined.append(np.concatenate([blocks[one[fits]], blocks[other[fits]]], axis=1))
        joined_sums.append(both[fits])
        middle = order[half : len(order) - half]
        order = np.concatenate([one[~fits], other[~fits], middle])
        if not fits.any():
            break
        order = generator.permutation(order)
    order = np.sort(order)
    if not joined:
        width = blocks.shape[1]
        return blocks, np.empty((0, 2 * width), blocks.dtype), sums[:0]
    return blocks[order], np.concatenate(joined), np.concatenate(joined_sums)
