# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Choose how a product's 8-bit weights are multiplied, and put them in that order.  NumPy only.

`packing` says what the layouts are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.depth import (
    EXACT,
    TileOrder,
    chain_depth,
    mean_time,
    plan_depths,
)
from qcompiler.targets.kernels.near_plan import Split, Stored, best_split
from qcompiler.targets.kernels.plan import Dot, Geometry

__all__ = ["is_wide", "k_offsets", "pack_weights"]

Array = npt.NDArray[Any]

_WIDE_TILES = 4
"""Column tiles from which activations are widened once, not in every tile (10 to 14 % faster)."""


def pack_weights(
    geometry: Geometry,
    isa: Isa,
    tiles: Array,
    stored: Stored,
    arrays: dict[str, Array],
    splits: tuple[Array, int] | None = None,
    in_order: bool = False,
) -> tuple[Dot, tuple[int, ...], Split | None]:
    """Put the weights of `[T, V, L, Q, G]` tiles in `arrays`.

    Args:
        geometry: The product.
        isa: The instruction set's row.
        tiles: The weights.
        stored: What is known of the stored activations.
        arrays: Where the packed weights go.
        splits: Where activations may be split: `near_plan.largest_rows` of the weights, and the
            pixels of a register tile.
        in_order: Whether K-groups must keep their order, as groups with a scale do.

    Returns:
        How they will be multiplied, to which depths, and how activations are split.
    """
    groups = tiles.transpose(0, 3, 1, 2, 4)  # [T, Q, V, L, G]
    if isa.dot in ("vpdpbusd", "sdot", "smmla"):
        arrays["weight"] = np.ascontiguousarray(groups)
        return isa.dot, (1,), None
    if isa.dot == "none":
        arrays["weight"] = _even_odd(groups)
        return "exact", (1,), None
    if isa.dot == "smlal":
        arrays["weight"] = _halves(groups)
        depth = chain_depth(groups, stored.largest)
        return ("smlal", (depth,), None) if depth else ("exact", (1,), None)
    orders = plan_depths(groups, stored.largest)
    split = None
    if splits is not None:
        time = mean_time(orders, groups)
        found = best_split(groups, geometry, splits[0], stored, splits[1], time)
        if found is not None:
            orders, split = found
    if isinstance(orders, int):
        arrays["weight"] = np.ascontiguousarray(groups)
        return "maddubs", (orders,), split
    if in_order:
        arrays["weight"] = _even_odd(groups)
        return "exact", (1,), None
    depths = sorted({depth for order in orders for depth in order.blocks}, reverse=True)
    if depths == [EXACT]:
        arrays["weight"] = _int16_pairs(groups, is_wide(len(groups)))
        return "exact", (1,), None
    _pack_lists(geometry, groups, orders, depths, arrays)
    if split is not None:  # no K-group is left to the exact section
        arrays["places"] = np.argsort(_flat(orders, depths), axis=1).astype(np.int32)
    return "mixed", tuple(depths), split


def _flat(orders: list[TileOrder], depths: list[int]) -> Array:
    """The K-groups of each tile in its order, [T, Q]."""
    none = np.empty((0, 1), np.int64)
    lists = [[order.blocks.get(depth, none).reshape(-1) for depth in depths] for order in orders]
    return np.stack([np.concatenate(sections) for sections in lists])


def _pack_lists(
    geometry: Geometry,
    groups: Array,
    orders: list[TileOrder],
    depths: list[int],
    arrays: dict[str, Array],
) -> None:
    """Put weights `[T, Q, V, L, G]` in `arrays` in each tile's order, with its offsets and spans.

    `depths` lists the sections: from the deepest to `EXACT`, if present.
    """
    none = np.empty((0, 1), np.int64)
    lists = [[order.blocks.get(depth, none) for depth in depths] for order in orders]
    flat = _flat(orders, depths)
    exact = [order.blocks.get(EXACT, none).size for order in orders]
    safe = [len(order) - count for order, count in zip(flat, exact, strict=True)]
    every = range(len(orders))
    arrays["weight"] = np.concatenate([groups[t, flat[t][: safe[t]]] for t in every])
    if EXACT in depths:
        unsafe = np.concatenate([groups[t, flat[t][safe[t] :]] for t in every])
        arrays["weight_exact"] = _int16_pairs(unsafe, is_wide(len(groups)))
    arrays["offsets"] = k_offsets(geometry)[flat].astype(np.int32)
    counts = np.asarray([[len(section) for section in sections] for sections in lists])
    first = np.stack([np.cumsum(safe) - safe, np.cumsum(exact) - exact], axis=1)
    arrays["spans"] = np.concatenate([counts, first], axis=1).astype(np.int32)


def is_wide(tiles: int) -> bool:
    """Whether it pays to widen activations ahead, for a number of column tiles."""
    return tiles >= _WIDE_TILES


def _int16_pairs(groups: Array, wide: bool) -> Array:
    """int8 `[..., V, L, 4]` as int16 `[..., 2, V, L, 2]`, for `wide` activations or others."""
    return _halves(groups).astype(np.int16) if wide else _even_odd(groups)


def _halves(groups: Array) -> Array:
    """int8 `[..., V, L, 4]` as `[..., 2, V, L, 2]`: members 0 and 1, then 2 and 3."""
    return np.ascontiguousarray(np.moveaxis(groups.reshape(*groups.shape[:-1], 2, 2), -2, -4))


def _even_odd(groups: Array) -> Array:
    """int8 `[..., V, L, 4]` as int16 `[..., 2, V, L, 2]`: members 0 and 2, then 1 and 3."""
    pairs = groups.reshape(*groups.shape[:-1], 2, 2).astype(np.int16)
    return np.ascontiguousarray(np.moveaxis(pairs, -1, -4))


def k_offsets(geometry: Geometry) -> Array:
    """Offset of each K-group's activations from a pixel's first, in elements, [Q]."""
    width = geometry.w if geometry.direct else geometry.band_width
    row = np.arange(geometry.k_rows) * geometry.dh * width * geometry.c
    col = np.arange(geometry.k_cols) * geometry.dw * geometry.c
    step = np.arange(geometry.run_groups) * geometry.k_group
    return (row[:, None, None] + col[:, None] + step).reshape(-1)
