# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of integer products whose weights have a scale per group along K, bit for bit.

The rules of `numerics` hold. A group's sum of products is exact in int32; groups are added in
float32, in the order of K: kernel positions row by row, channels within each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qcompiler.numerics import (
    Residual,
    accumulate_matmul,
    centred,
    multiplier,
    requantize_real,
)
from qcompiler.types import Array, QuantParams
from qcompiler.windows import Geometry, padded, taps

Part = tuple[Array, Array]
"""int32 accumulators of one group, and the scales of its weights, which broadcast against them."""


def matmul_parts(
    a: Array, b: Array, a_zero: int, scale: Array, b_zero: Array | None = None
) -> Iterator[Part]:
    """Yield the groups of `(a - a_zero) @ (b - b_zero)` in order.

    Args:
        a: [..., M, K] integers.
        b: [K, N] integers.
        a_zero: Zero point of `a`.
        scale: [K / group, N].
        b_zero: Zero points of `b`, [K / group, N]; None for 0.
    """
    size = b.shape[0] // scale.shape[0]
    for j, columns in enumerate(scale):
        run = slice(j * size, (j + 1) * size)
        zero = 0 if b_zero is None else b_zero[j]
        yield accumulate_matmul(a[..., run], b[run], a_zero, zero), columns


def conv_parts(x: Array, w: Array, x_zero: int, scale: Array, geometry: Geometry) -> Iterator[Part]:
    """Yield the groups of a convolution in order, channels last: [N, *spatial, O].

    Args:
        x: [N, C, *spatial] integers.
        w: [O, C, *kernel] integers with zero point 0.
        x_zero: Zero point of `x`; padding adds nothing.
        scale: [O, C / group, *kernel].
        geometry: Windows.
    """
    size = w.shape[1] // scale.shape[1]
    for index, view in taps(padded(centred(x, x_zero), geometry, 0), geometry):
        rows = np.ascontiguousarray(np.moveaxis(view, 1, -1))
        for j in range(scale.shape[1]):
            run = slice(j * size, (j + 1) * size)
            some: tuple[Any, ...] = (slice(None), run, *index)
            one: tuple[Any, ...] = (slice(None), j, *index)
            yield accumulate_matmul(rows[..., run], w[some].T, 0, 0), scale[one]


def grouped_result(
    parts: Iterator[Part],
    x_scale: float,
    target: QuantParams | None,
    *,
    bias: Array | None = None,
    residual: Residual | None = None,
) -> Array:
    """Add the groups and turn them into the result of a quantized operator.

    t = float32(bias / s_y); for each group in order t = t + float32(acc) * M, M = float32(s_x *
    s_w / s_y), product and sum rounded by themselves; then as `numerics.requantize` goes on: the
    residual, rounding, zero point, clamp. Without a target s_y = 1 and the result is t.

    Args:
        parts: Groups in order.
        x_scale: Scale of the activations.
        target: Quantization of the result; None for float32.
        bias: float32 reals, one per column (the last axis).
        residual: Added before rounding; needs a target.
    """
    over = 1.0 if target is None else target.scale
    start = np.float32(0) if bias is None else multiplier(bias, over=over)
    t: Array | None = None
    for acc, scale in parts:
        product = acc.astype(np.float32) * multiplier(np.float64(x_scale), scale, over=over)
        t = np.asarray((start if t is None else t) + product)
    assert t is not None  # a product sums something
    return t if target is None else requantize_real(t, target, residual)
