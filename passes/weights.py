# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Grids of constant weights, symmetric per output channel, and of the biases beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.numerics import choose_weight_qparams
from qcompiler.types import Array, DType, PerAxis, PerTensor, QuantParams

_SHRINK = np.linspace(1.0, 0.35, 40)


def weight_qparams(w: Array, axis: int, bits: int, least_scale: Any = 0.0) -> QuantParams:
    """Choose the symmetric scale of each output channel of a weight tensor.

    In 8 bits the largest weight of the channel is kept. Below, clipping it pays: the scale with the
    least mean squared error over a grid of clipped ranges is taken. Up to 6 bits the least code
    (-8 of 4 bits) is used too: there it is a level in fifteen.

    Args:
        w: Weights, finite.
        axis: Output channel axis.
        bits: Width in use; storage is int8.
        least_scale: Lower bound of the scale, a number or one per channel.

    Raises:
        DataError: A weight is NaN or infinite.
    """
    full = choose_weight_qparams(w, axis=axis, bits=bits, least_scale=least_scale)
    if bits >= 8:
        return full
    qmin = full.qmin - 1 if bits <= 6 else full.qmin
    rows = np.moveaxis(np.asarray(w, np.float64), axis, 0).reshape(w.shape[axis], -1)
    best = np.full(rows.shape[0], np.inf)
    scale = full.scale.astype(np.float64)
    for shrink in _SHRINK:
        s = np.maximum(full.scale.astype(np.float64) * shrink, least_scale)
        q = np.clip(np.rint(rows / s[:, None]), qmin, full.qmax)
        error = ((q * s[:, None] - rows) ** 2).sum(1)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, s, scale)
    return QuantParams(
        scale.astype(np.float32), full.zero_point, full.storage, qmin, full.qmax, PerAxis(axis)
    )


def bias_qparams(x_scale: float, weights: QuantParams) -> QuantParams:
    """Return the int32 grid of a bias: one unit is worth a product of operand and weight.

    Args:
        x_scale: Scale of the operand.
        weights: Of the weights, per tensor or per output channel.
    """
    scale = (np.float64(x_scale) * weights.scale.astype(np.float64)).astype(np.float32)
    return QuantParams(
        scale,
        np.zeros(scale.shape, np.int32),
        DType.INT32,
        DType.INT32.min,
        DType.INT32.max,
        PerTensor() if weights.is_per_tensor else PerAxis(0),
    )
