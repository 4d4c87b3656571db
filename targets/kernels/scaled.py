# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Quantize and dequantize tensors by a scale per index, or per block, along an axis.

`pointwise` serves one scale for the whole tensor. Here scales and zero points are operands, which
broadcast against the tensor once blocks are an axis of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.numerics import expanded
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.pointwise import elementwise
from qcompiler.targets.kernels.simd import lrint
from qcompiler.targets.kernels.tir import Expr
from qcompiler.types import Array, PerGroup, QuantParams

Shape = tuple[int, ...]

STORAGES = ("uint8", "int8", "int16", "uint16")


@dataclass(frozen=True, slots=True)
class ScaledWorkload:
    """`clamp(rint(x / s) + z, qmin, qmax)`, or `f32(x - z) * s`; buffers: x, s, z int32, y."""

    shape: Shape
    view: Shape
    """The same elements with an axis of blocks, where the scales are of blocks."""
    scales: Shape
    """Of s and z; broadcasts to `view`."""
    dtype: str
    """Of the integers: one of `STORAGES`."""
    qmin: int
    qmax: int


def parameters(q: QuantParams, shape: Shape) -> tuple[Shape, Array, Array]:
    """The view of a tensor, and its scales (float32) and zero points (int32) as they broadcast."""
    g = q.granularity
    if isinstance(g, PerGroup) and shape[g.axis] % g.group_size == 0:
        axis = g.axis % len(shape)
        blocks = shape[axis] // g.group_size
        view = (*shape[:axis], blocks, g.group_size, *shape[axis + 1 :])
        scale, zero = (np.expand_dims(v, axis + 1) for v in (q.scale, q.zero_point))
    else:  # also where the last block is shorter: an element each
        view = shape
        scale, zero = expanded(q, shape)
    return view, np.ascontiguousarray(scale, np.float32), np.ascontiguousarray(zero, np.int32)


def quantize(workload: ScaledWorkload, isa: Isa) -> Any:
    """Generate `quantize`."""
    w = workload

    def body(x: Expr, scale: Expr, zero: Expr) -> Expr:
        lanes = tir.lanes_of(x)
        low, high = (
            tir.cast(tir.splat(bound, "int32", lanes) - zero, "float32")
            for bound in (w.qmin, w.qmax)
        )
        # Clamped in float32, where the bounds are whole; NaN is not above the lower one.
        value = tir.minimum(tir.maximum(tir.bind(x / scale), low), high)
        return tir.cast(lrint(value) + zero, w.dtype)

    dtypes = ["float32", "float32", "int32"]
    return elementwise("quantize", isa, [w.view, w.scales, w.scales], dtypes, w.dtype, body,
                       cycles=48, first_shape=w.shape)  # fmt: skip


def dequantize(workload: ScaledWorkload, isa: Isa) -> Any:
    """Generate `dequantize`."""
    w = workload

    def body(q: Expr, scale: Expr, zero: Expr) -> Expr:
        return tir.cast(tir.cast(q, "int32") - zero, "float32") * scale

    dtypes = [w.dtype, "float32", "int32"]
    return elementwise("dequantize", isa, [w.view, w.scales, w.scales], dtypes, "float32", body,
                       cycles=24, first_shape=w.shape)  # fmt: skip
