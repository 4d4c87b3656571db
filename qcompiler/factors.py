# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Scales of groups that are whole multiples of one scale per column.

A weight is `c f s`: a code c of few bits, a factor f from 1 to 16 that neighbours along K share,
and the scale s of its column. `c f` of a code of 4 bits fits int8, so a product of such weights is
one of int8 weights with a scale per column: exact in int32 and scaled once, by the kernels of every
target. Codes and factors are what has to be stored: 4.5 bits for each weight in groups of eight.
"""

from __future__ import annotations

import numpy as np

from qcompiler.numerics import spread_out
from qcompiler.types import Array, DType, PerAxis, PerGroup, QuantParams

__all__ = ["FACTORED_RANGE", "FACTORS", "folded", "snapped", "units"]

FACTORS = 16
"""Greatest factor: codes of 4 bits, -8 to 7, times it still fit int8."""

FACTORED_RANGE = (-8 * FACTORS, 7 * FACTORS)
"""Declared range of int8 weights that are 4-bit codes times factors."""

_NEAR = 4e-7
"""Most that a ratio of two rounded float32 scales may be off, as a share of it."""


def snapped(scale: Array, axis: int) -> Array:
    """Return the nearest scales that are whole multiples, 1 to 16, of one scale per column.

    Args:
        scale: Scales of groups, float32 > 0; columns on `axis`.
        axis: Axis of the columns.

    Returns:
        float32 of the same shape; the greatest of each column stays.
    """
    rows = np.moveaxis(scale, axis, 0).reshape(scale.shape[axis], -1).astype(np.float64)
    unit = np.maximum(rows.max(1, keepdims=True) / FACTORS, np.finfo(np.float32).tiny)
    found = (unit * np.clip(np.rint(rows / unit), 1, FACTORS)).astype(np.float32)
    return np.ascontiguousarray(_in_place(found, scale.shape, axis))


def units(scale: Array, axis: int) -> tuple[Array, Array] | None:
    """Return (unit [columns], factors in the shape of `scale`), or None where there are none.

    The unit is the largest with which every scale of a column is a whole multiple of it, 1 to 16.

    Args:
        scale: Scales of groups, float32 > 0.
        axis: Axis of the columns.
    """
    rows = np.moveaxis(scale, axis, 0).reshape(scale.shape[axis], -1).astype(np.float64)
    top = rows.max(1, keepdims=True)
    unit = np.zeros_like(top)
    for parts in range(1, FACTORS + 1):
        ratio = rows * (parts / top)
        whole = np.rint(ratio)
        fits = ((np.abs(ratio - whole) <= _NEAR * ratio) & (whole >= 1)).all(1, keepdims=True)
        unit = np.where((unit == 0) & fits, top / parts, unit)
        if (unit > 0).all():
            break
    else:
        return None
    factors = _in_place(np.rint(rows / unit).astype(np.int32), scale.shape, axis)
    return unit[:, 0].astype(np.float32), factors


def folded(codes: Array, q: QuantParams, axis: int) -> tuple[Array, QuantParams] | None:
    """Return weights with scales per group as int8 with a scale per column; None: they are not.

    They are where the scales are whole multiples of one per column and the products of codes (less
    their zero points) and factors fit int8.

    Args:
        codes: Weights as they are stored.
        q: Their grid, `PerGroup`.
        axis: Axis of the columns.
    """
    assert isinstance(q.granularity, PerGroup)
    found = units(q.scale, axis)
    if found is None or q.granularity.axis == axis:  # a block of columns has no scale per column
        return None
    zero, factors = (spread_out(a, q.granularity, codes.shape) for a in (q.zero_point, found[1]))
    whole = (codes.astype(np.int32) - zero) * factors
    if whole.size and (whole.min() < DType.INT8.min or whole.max() > DType.INT8.max):
        return None
    four = q.is_symmetric and q.qmin >= -8 and q.qmax <= 7
    low, high = FACTORED_RANGE if four else (DType.INT8.min, DType.INT8.max)
    zeros = np.zeros(found[0].shape, np.int32)
    grid = QuantParams(found[0], zeros, DType.INT8, low, high, PerAxis(axis))
    return whole.astype(np.int8), grid


def _in_place(rows: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Return [columns, groups] in the shape that the scales have."""
    moved = (shape[axis], *(n for i, n in enumerate(shape) if i != axis))
    return np.moveaxis(rows.reshape(moved), 0, axis)
