# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""int8 weights that are codes of 4 bits times factors of groups: found, and packed.  NumPy only.

`packing` says what the layouts are; `unpack` emits the code that multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.amx_plan import pack_tiles, tile_factors, tile_nibbles, tiles_plan
from qcompiler.targets.kernels.near_plan import Stored
from qcompiler.targets.kernels.plan import Dot, Geometry
from qcompiler.targets.kernels.weight_forms import nibbles
from qcompiler.targets.kernels.weight_order import pack_weights
from qcompiler.targets.kernels.workload import GemmParams

__all__ = [
    "FactoredWeights",
    "factored_tiles",
    "factored_weights",
    "in_nibbles",
    "pack_factored",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class FactoredWeights:
    """int8 weights as 4-bit codes times factors, 1 to 16, that neighbours along K share."""

    codes: Array
    """int8 from -8 to 7, in the weights' own shape."""
    factors: Array
    """int8 less 9 (so that they fit a signed nibble too), in the weights' own shape."""
    group: int
    """Neighbours that share a factor."""


def factored_weights(weight: Array, k_group: int) -> FactoredWeights | None:
    """Return int8 weights `[..., K]` as codes and factors, or None where they are no such products.

    The longest groups are found, of `k_group` weights or more.
    """
    for group in (64, 32, 16, 8, 4):
        if group % k_group or weight.shape[-1] % group:
            continue
        rows = weight.reshape(-1, group)
        if len(rows) > _SAMPLE and _factors(rows[:_SAMPLE]) is None:
            continue
        found = _factors(rows)
        if found is not None:
            shape = weight.shape
            codes = (rows // found[:, None]).astype(np.int8).reshape(shape)
            return FactoredWeights(codes, np.repeat(found - 9, group).reshape(shape), group)
    return None


_SAMPLE = 64
"""Groups looked at first: weights of 8 bits mostly fail there."""


def _factors(rows: Array) -> Array | None:
    """The least factor of each row that leaves codes of 4 bits, int8; None if a row has none."""
    found = np.zeros(len(rows), np.int8)
    low, high = rows.min(1), rows.max(1)
    for factor in range(1, 17):
        fits = (found == 0) & (low >= -8 * factor) & (high <= 7 * factor)
        fits[fits] = (rows[fits] % factor == 0).all(1)
        found[fits] = factor
    return found if found.all() else None


def packed_factors(tiles: Array, k_groups: int) -> Array:
    """Factors less 9, `[T, V, L, Q, G]`, as nibbles `[T, Q / k_groups, V * L / 2]`."""
    first = tiles[:, :, :, ::k_groups, 0].transpose(0, 3, 1, 2)
    return nibbles(np.ascontiguousarray(first)[..., None], "float")


def pack_factored(
    geometry: Geometry,
    isa: Isa,
    weight: Array,
    cut: Callable[[Array], Array],
    stored: Stored,
    arrays: dict[str, Array],
) -> tuple[Dot, tuple[int, ...], int] | None:
    """Put codes and factors of weights in `arrays`.

    Args:
        geometry: The product.
        isa: The instruction set's row.
        weight: int8 weights `[groups, n, runs, run]`.
        cut: Makes tiles `[T, V, L, Q, G]` of an array of that shape.
        stored: What is known of the stored activations.
        arrays: Where they go.

    Returns:
        How weights will be multiplied, to which depths, and the K-groups that share a factor; None
        for weights that have no factors.
    """
    found = factored_weights(weight, isa.k_group)
    if found is None:
        return None
    codes, factor = cut(found.codes), found.group // isa.k_group
    # Where factors multiply sums of codes, these are what must not saturate, else the weights.
    summed = isa.dot == "maddubs"
    dot, depths, _ = pack_weights(geometry, isa, codes if summed else cut(weight), stored, arrays)
    if summed:  # those of one factor at a time
        depths = (math.gcd(depths[0], factor),)
    else:
        pack_weights(geometry, isa, codes, stored, arrays)
    arrays["weight"] = in_nibbles(isa, codes, arrays["weight"], dot)
    arrays["factors"] = packed_factors(cut(found.factors), factor)
    return dot, depths, factor


def in_nibbles(isa: Isa, tiles: Array, packed: Array, dot: Dot) -> Array:
    """Weights `[T, V, L, Q, G]` of 4 bits as nibbles, given how they are packed in bytes."""
    groups = tiles.transpose(0, 3, 1, 2, 4)
    if isa.a_dtype == "int8":  # the plain layout's registers, whatever they hold
        return nibbles(packed.reshape(*groups.shape[:2], -1, 4, 4), "sdot")
    return nibbles(groups, dot)


def factored_tiles(
    geometry: Geometry, params: GemmParams, weight: Array, columns: Array
) -> tuple[dict[str, Array], int] | None:
    """The codes and factors of weights in tiles, and the lines that share one; None without."""
    found = factored_weights(weight, 4)
    if found is None:
        return None
    count, plan = geometry.groups * geometry.n, tiles_plan(geometry, params)
    factors = tile_factors(plan, found.factors.reshape(count, -1) + 9, found.group, columns)
    if factors is None:
        return None
    codes = pack_tiles(plan, found.codes.reshape(count, -1), columns)
    return {"weight": tile_nibbles(codes), "factors": factors[0]}, factors[1]
