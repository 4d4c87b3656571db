# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The simplest quantization that says the same: scales in blocks may be one per index, or one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from qcompiler.types import Array, Granularity, PerAxis, PerGroup, PerTensor, QuantParams


def varying(a: Array) -> tuple[int, ...]:
    """Return the axes along which a tensor has different elements."""
    found = []
    for axis in range(a.ndim):
        first = a[tuple(slice(0, 1) if i == axis else slice(None) for i in range(a.ndim))]
        if a.shape[axis] > 1 and (a != first).any():
            found.append(axis)
    return tuple(found)


def without_blocks(q: QuantParams) -> QuantParams:
    """Return parameters in blocks as one scale, or one per index of another axis, if they are."""
    if not isinstance(q.granularity, PerGroup) or 0 in q.scale.shape:
        return q
    axes = sorted({*varying(q.scale), *varying(q.zero_point)})
    if len(axes) > 1 or q.granularity.axis in axes:
        return q
    by: Granularity = PerAxis(axes[0]) if axes else PerTensor()
    at = tuple(slice(None) if i in axes else 0 for i in range(q.scale.ndim))
    return replace(q, scale=q.scale[at], zero_point=q.zero_point[at], granularity=by)


def found_grid(scale: Array, zero_point: Array) -> tuple[Granularity, Array, Array]:
    """Return the granularity with the fewest scales for scales that are known per element.

    Args:
        scale: Scales, of a tensor's shape.
        zero_point: Zero points, likewise.

    Returns:
        Granularity, scales and zero points as `QuantParams` holds them.
    """
    axes = sorted({*varying(scale), *varying(zero_point)})
    if len(axes) < 2:
        at = tuple(slice(None) if i in axes else 0 for i in range(scale.ndim))
        return PerAxis(axes[0]) if axes else PerTensor(), scale[at], zero_point[at]
    sizes = [_run(scale, zero_point, i) for i in range(scale.ndim)]
    axis = int(np.argmax(sizes))
    every = slice(None, None, sizes[axis])
    at = tuple(every if i == axis else slice(None) for i in range(scale.ndim))
    return PerGroup(axis, sizes[axis]), scale[at], zero_point[at]


def _run(scale: Array, zero_point: Array, axis: int) -> int:
    """Return the size of the largest blocks along an axis, from its start, that do not vary."""
    changed: set[int] = set()
    for a in (scale, zero_point):
        moved = np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1)
        changed |= set((np.flatnonzero((moved[1:] != moved[:-1]).any(axis=1)) + 1).tolist())
    return math.gcd(*changed) if changed else max(scale.shape[axis], 1)
