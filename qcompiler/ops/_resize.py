# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Resampling of tensors: the interpolation of ONNX Resize, separable, axis by axis.

Source: ONNX Resize-19 and its reference implementation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qcompiler.ops._base import Attrs
from qcompiler.types import Array

MODES = ("nearest", "linear", "cubic")
COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
)
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def problem(attrs: Attrs) -> str | None:
    """Return what is wrong with the attributes, or None."""
    for name, known in (
        ("mode", MODES),
        ("coordinate_mode", COORDINATES),
        ("nearest_mode", NEAREST),
    ):
        if attrs[name] not in known:
            return f"{name} {attrs[name]!r}, expected one of {', '.join(known)}"
    return None


def source_positions(
    n: int, out: int, scale: float, mode: str, length: float | None = None
) -> Array:
    """Return the real position in the input of each of `out` results (float64).

    Args:
        n: Extent of the input.
        out: Extent of the result.
        scale: Result extent per input extent, as the model states it.
        mode: Coordinate transformation of ONNX Resize.
        length: Extent between whose corners `align_corners` aligns; `out` by default.
    """
    i = np.arange(out, dtype=np.float64)
    if mode == "align_corners":
        corners = out if length is None else length
        return i * (n - 1) / (corners - 1) if corners > 1 else np.zeros(out)
    if mode == "asymmetric":
        return np.asarray(i / scale)
    if mode == "pytorch_half_pixel":
        return np.asarray((i + 0.5) / scale - 0.5) if out > 1 else np.zeros(out)
    if mode == "half_pixel_symmetric":
        adjust = out / (scale * n)  # the result extent was rounded: keep the centre
        return np.asarray(n / 2 * (1 - adjust) + (i + 0.5) / scale - 0.5)
    return np.asarray((i + 0.5) / scale - 0.5)


def nearest_indices(positions: Array, n: int, mode: str) -> Array:
    """Return the nearest input index of each position, inside the input."""
    if mode == "floor":
        index = np.floor(positions)
    elif mode == "ceil":
        index = np.ceil(positions)
    elif mode == "round_prefer_ceil":
        index = np.floor(positions + 0.5)
    else:
        index = np.ceil(positions - 0.5)
    return np.asarray(np.clip(index, 0, n - 1).astype(np.int64))


def _linear(t: Array) -> Array:
    return np.maximum(0.0, 1.0 - np.abs(t))


def _cubic(t: Array, a: float) -> Array:
    t = np.abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def weights(n: int, out: int, scale: float, attrs: Attrs, length: float | None = None) -> Array:
    """Return the interpolation matrix [out, n] (float64) of one axis.

    Takes the arguments of `source_positions`.
    """
    mode: Any = attrs["mode"]
    coeff: Any = attrs["cubic_coeff_a"]
    positions = source_positions(n, out, scale, str(attrs["coordinate_mode"]), length)
    stretch = min(1.0, scale) if attrs["antialias"] else 1.0
    support = (1 if mode == "linear" else 2) / stretch
    matrix = np.zeros((out, n))
    for i, p in enumerate(positions):
        index = np.arange(math.ceil(p - support), math.floor(p + support) + 1)
        t = (index - p) * stretch
        w = _linear(t) if mode == "linear" else _cubic(t, float(coeff))
        inside = (index >= 0) & (index < n)
        if attrs["exclude_outside"]:
            w = np.where(inside, w, 0.0)
        w = w / w.sum()
        np.add.at(matrix[i], np.clip(index, 0, n - 1), w)
    return matrix


def resize(x: Array, attrs: Attrs) -> Array:
    """Resample every axis whose extent or scale changes."""
    shape: Any = attrs["shape"]
    scales: Any = attrs["scales"]
    y = x
    for axis, (out, scale) in enumerate(zip(shape, scales, strict=True)):
        n = x.shape[axis]
        if out == n and scale == 1:
            continue
        if attrs["mode"] == "nearest":
            positions = source_positions(n, out, scale, str(attrs["coordinate_mode"]))
            index = nearest_indices(positions, n, str(attrs["nearest_mode"]))
            y = np.take(y, index, axis=axis)
        else:
            m = weights(n, out, scale, attrs).astype(np.float64)
            y = np.moveaxis(np.tensordot(m, y.astype(np.float64), axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(y.astype(x.dtype, copy=False))
