# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of activations that are quantized at run time, bit for bit.

The rules of `numerics` hold: every single-precision step is rounded by itself, to nearest even.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from qcompiler.numerics import MIN_SCALE
from qcompiler.types import Array

Per = Literal["row", "tensor"]

DYNAMIC_MAX = 127
"""Greatest magnitude of a quantized activation; the range is symmetric."""


def dynamic_scale(x: Array, per: Per) -> Array:
    """Return the float32 scale of each row (the last axis kept, of extent 1), or of the tensor.

    s = max(float32(max|x|) / 127, MIN_SCALE); NaN does not count.
    """
    magnitude = np.abs(np.asarray(x, np.float32))
    numbers = np.where(np.isnan(magnitude), np.float32(0), magnitude)
    if per == "row":
        top = numbers.max(axis=-1, keepdims=True, initial=np.float32(0))
    else:
        top = np.asarray(numbers.max(initial=np.float32(0)))
    return np.asarray(np.fmax(top / np.float32(DYNAMIC_MAX), np.float32(MIN_SCALE)), np.float32)


def dynamic_quantize(x: Array, per: Per, zero_point: int, storage: type) -> tuple[Array, Array]:
    """Quantize activations by scales of their own.

    q = clamp(rint(x / s), -127, 127) + zero_point, the division in float32; NaN becomes -127.

    Returns:
        The integers, and the scales (`dynamic_scale`).
    """
    x = np.asarray(x, np.float32)
    s = dynamic_scale(x, per)
    with np.errstate(invalid="ignore", over="ignore"):
        t = np.fmin(np.fmax(np.rint(x / s), np.float32(-DYNAMIC_MAX)), np.float32(DYNAMIC_MAX))
    return (t.astype(np.int32) + zero_point).astype(storage), s


def dynamic_result(acc: Array, row_scale: Array, column_scale: Array) -> Array:
    """Return float32(acc) * (s_row * s_column), each product rounded by itself.

    Args:
        acc: int32 accumulators [..., M, N].
        row_scale: Scales of the activations, [..., M, 1] or [].
        column_scale: Scales of the weights, [N] or [].
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.asarray(row_scale, np.float32) * np.asarray(column_scale, np.float32)
        return np.asarray(acc.astype(np.float32) * scale)
