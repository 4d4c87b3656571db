# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of activations that are quantized at run time, bit for bit.

The rules of `numerics` hold: every single-precision step is rounded by itself, to nearest even.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from qcompiler.numerics import MIN_SCALE, accumulate_matmul
from qcompiler.types import Array, DType, PerGroup, QuantParams

Per = Literal["row", "tensor", "block"]

DYNAMIC_MAX = 127
"""Greatest magnitude of a quantized activation; the range is symmetric."""


RUN_TIME_GRID = QuantParams(
    np.float32(1),
    np.int32(0),
    DType.INT8,
    -DYNAMIC_MAX,
    DYNAMIC_MAX,
)
"""What integers quantized at run time carry: their real scales are a tensor of their own."""


def dynamic_scale(x: Array, per: Per, block: int = 0) -> Array:
    """Return the float32 scale of each row (the last axis kept, of extent 1), or of the tensor.

    s = max(float32(max|x|) / 127, MIN_SCALE); NaN does not count. Per block, each `block`
    neighbours along the last axis have one: its extent is then the number of blocks.
    """
    magnitude = np.abs(np.asarray(x, np.float32))
    numbers = np.where(np.isnan(magnitude), np.float32(0), magnitude)
    if per == "block":
        top = _blocks(numbers, block).max(axis=-1, initial=np.float32(0))
    elif per == "row":
        top = numbers.max(axis=-1, keepdims=True, initial=np.float32(0))
    else:
        top = np.asarray(numbers.max(initial=np.float32(0)))
    return np.asarray(np.fmax(top / np.float32(DYNAMIC_MAX), np.float32(MIN_SCALE)), np.float32)


def _blocks(x: Array, block: int) -> Array:
    """Cut the last axis into blocks: [..., blocks, block]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def dynamic_quantize(
    x: Array, per: Per, zero_point: int, storage: type, block: int = 0
) -> tuple[Array, Array]:
    """Quantize activations by scales of their own.

    q = clamp(rint(x / s), -127, 127) + zero_point, the division in float32; NaN becomes -127.

    Returns:
        The integers, and the scales (`dynamic_scale`).
    """
    x = np.asarray(x, np.float32)
    s = dynamic_scale(x, per, block)
    steps = np.repeat(s, block, axis=-1) if per == "block" else s
    with np.errstate(invalid="ignore", over="ignore"):
        t = np.fmin(np.fmax(np.rint(x / steps), np.float32(-DYNAMIC_MAX)), np.float32(DYNAMIC_MAX))
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


def blocked_result(
    a: Array,
    codes: Array,
    a_zero: int,
    zero: Array,
    row_scale: Array,
    scale: Array,
    bias: Array | None = None,
) -> Array:
    """Multiply activations and weights that both have a scale per block along K.

    t = bias, or 0; for each block in order t = t + float32(acc) * (s_a * s_w), acc its exact int32
    sum of (a - a_zero) * (code - zero); each product and sum is rounded by itself.

    Args:
        a: [..., M, K] integers.
        codes: [K, N] integers.
        a_zero: Zero point of `a`.
        zero: Zero points of the weights, [K / block, N].
        row_scale: Scales of the activations, [..., M, K / block].
        scale: Scales of the weights, [K / block, N].
        bias: float32 [N].
    """
    t = np.zeros((*a.shape[:-1], codes.shape[1]), np.float32)
    if bias is not None:
        t = t + np.asarray(bias, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for j, acc in enumerate(_block_sums(a, codes, a_zero, zero)):
            factor = np.asarray(row_scale[..., j : j + 1], np.float32) * scale[j]
            t = t + acc.astype(np.float32) * factor
    return t


def blocked_weights(codes: Array, q: QuantParams) -> tuple[Array, QuantParams]:
    """Return a matrix of weights in blocks as `blocked_result` takes it: int8 [K, N], around 0.

    Args:
        codes: Integers [K, N] with blocks along axis 0, or [N, K] with blocks along axis 1.
        q: Their parameters, of 4 or 8 bits, signed or not.
    """
    assert isinstance(q.granularity, PerGroup)
    turned = q.granularity.axis % 2 == 1
    signed = DType.INT4 if q.storage.bits == 4 else DType.INT8
    shift = signed.min - q.storage.min
    held = (codes.astype(np.int16) + shift).astype(np.int8)
    scale, zero = (a.T if turned else a for a in (q.scale, q.zero_point + shift))
    grid = QuantParams(
        scale, zero, DType.INT8, signed.min, signed.max, PerGroup(0, q.granularity.group_size)
    )
    return np.ascontiguousarray(held.T if turned else held), grid


def _block_sums(a: Array, codes: Array, a_zero: int, zero: Array) -> Iterator[Array]:
    """Yield the int32 sums of each block of K in order."""
    size = codes.shape[0] // zero.shape[0]
    for j, points in enumerate(zero):
        run = slice(j * size, (j + 1) * size)
        yield accumulate_matmul(a[..., run], codes[run], a_zero, points)
