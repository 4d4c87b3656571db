# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights held in fewer bits than they are multiplied in: packing.  NumPy only.

`unpack` is the other half: it emits the code that widens them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import CodegenError
from qcompiler.targets.kernels.plan import Dot, Storage

__all__ = [
    "FloatWeights",
    "GroupedWeights",
    "Weights",
    "fits_int4",
    "float_weights",
    "laid_out",
    "nibbles",
    "packed_groups",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class GroupedWeights:
    """Integers that stand for float32 weights: float32(codes - zeros) * scales."""

    codes: Array
    """int8 or uint8, in the weights' own shape; 4-bit codes too."""
    scales: Array
    """float32 of the same shape: equal within a group."""
    zeros: Array
    """int32 of the same shape: equal within a group."""
    bits: int
    """8 or 4."""
    group: int
    """Neighbours along K that share a scale, once the weights are laid out for a kernel."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights."""
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype that holds the codes."""
        return self.codes.dtype


Weights = Array | GroupedWeights
Layout = Callable[[Array], Array]


@dataclass(frozen=True, slots=True, eq=False)
class FloatWeights:
    """The packed weights of a float32 product."""

    arrays: Mapping[str, Array]
    storage: Storage = "plain"
    group: int = 0


def laid_out(weights: Weights, layout: Layout) -> Any:
    """The weights with their axes rearranged by `layout`."""
    if not isinstance(weights, GroupedWeights):
        return layout(weights)
    return replace(
        weights,
        codes=layout(weights.codes),
        scales=layout(weights.scales),
        zeros=layout(weights.zeros),
    )


def float_weights(weights: Weights, tiles: Layout) -> FloatWeights:
    """Pack weights of a float32 product.

    Args:
        weights: float32, float16 or grouped, `[groups, n, runs, run]`.
        tiles: Cuts an array of that shape into `[T, V, L, Q, 1]`.

    Raises:
        CodegenError: Weights of another dtype.
    """

    def rows(a: Array) -> Array:
        """[T, Q, V, L]."""
        return np.ascontiguousarray(tiles(a)[..., 0].transpose(0, 3, 1, 2))

    if not isinstance(weights, GroupedWeights):
        if weights.dtype == np.float32:
            return FloatWeights({"weight": rows(weights)})
        if weights.dtype == np.float16:
            return FloatWeights({"weight": rows(weights).view(np.uint16)}, "half")
        raise CodegenError(f"weights are {weights.dtype.name}, the kernel takes float32")
    shift = (1 << (weights.bits - 1)) if weights.codes.dtype == np.uint8 else 0
    codes = rows(weights.codes.astype(np.int16) - shift).astype(np.int8)
    zeros = rows(weights.zeros - shift)[:, :: weights.group]
    flat = (*zeros.shape[:2], -1)
    arrays = {"weight": codes.reshape(*codes.shape[:2], -1)}
    if weights.bits == 4:
        arrays["weight"] = nibbles(codes[..., None], "float")
    arrays["scales"] = rows(weights.scales)[:, :: weights.group].reshape(flat)
    if zeros.any():
        arrays["zeros"] = zeros.reshape(flat).astype(np.int8)
    return FloatWeights(arrays, "group4" if weights.bits == 4 else "group8", weights.group)


def fits_int4(weight: Array) -> bool:
    """Whether every weight fits a signed nibble."""
    return bool(weight.min() >= -8 and weight.max() <= 7)


def nibbles(groups: Array, dot: Dot) -> Array:
    """Weights `[T, Q, V, L, G]` of 4 bits plus 8, two to a byte, as `unpack` reads them."""
    tiles, count, nv, lanes, group = groups.shape
    biased = (groups + 8).astype(np.uint8)
    if dot == "exact":
        members = biased.reshape(tiles, count, nv * lanes * group // 2, 2)
        return np.ascontiguousarray(members[..., 0] | members[..., 1] << 4)
    vectors = biased.reshape(tiles, count, nv, lanes * group)
    pairs = vectors[:, :, 0 : nv - 1 : 2] | vectors[:, :, 1::2] << 4
    parts = [pairs.reshape(tiles, count, -1)]
    if nv % 2:
        low, high = np.split(vectors[:, :, -1], 2, axis=-1)
        parts.append(low | high << 4)
    return np.ascontiguousarray(np.concatenate(parts, axis=-1))


def packed_groups(
    tiles: Array, scales: Array, zeros: Array | None, group: int, a_zero_points: tuple[int, int]
) -> dict[str, Array]:
    """Where the sums of each run of `group` K-groups start, and their multipliers.

    With zero points z of the weights, sums of (a - a_zero) * (w - z) are those of a * w, minus
    a_zero times the sum of w, minus z times the sum of a - a_zero. The kernel takes z times the
    sum of the activations as they are stored; the rest is constant.

    Args:
        tiles: Weights `[T, V, L, Q, G]`.
        scales: float32 of the same shape.
        zeros: Zero points of the weights, of the same shape; None where all are 0.
        group: K-groups of a run.
        a_zero_points: Zero point of the activations as they are multiplied, and as stored.
    """

    def of_groups(values: Array) -> Array:
        """`[T, V, L, Q / group]` as `[T, Q / group, V * L]`."""
        moved = np.ascontiguousarray(values.transpose(0, 3, 1, 2))
        return moved.reshape(*moved.shape[:2], -1)

    size = group * tiles.shape[4]
    sums = tiles.reshape(*tiles.shape[:3], -1, size).sum(-1, dtype=np.int64)
    starts = -a_zero_points[0] * sums
    found = {"group_scale": of_groups(scales[:, :, :, ::group, 0])}
    if zeros is not None:
        points = zeros[:, :, :, ::group, 0].astype(np.int64)
        starts += points * (size * a_zero_points[1])
        found["group_zero"] = of_groups(points.astype(np.int8))
    return {"group_start": of_groups(starts.astype(np.int32)), **found}
