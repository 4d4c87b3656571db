# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Casts to 4-bit integers, held one to a byte: `numerics.low_bits` as a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.pointwise import elementwise
from qcompiler.targets.kernels.tir import Expr

Shape = tuple[int, ...]

_WHOLE = {"float32": ("int32", 2.0**28), "float64": ("int64", 2.0**57)}
"""Float -> (integers that its integral part is converted to; from where on 16 divides it)."""


@dataclass(frozen=True, slots=True)
class LowBitsWorkload:
    """Numbers modulo 16; buffers: x, y int8 or uint8."""

    shape: Shape
    in_dtype: str
    """float32, float64 or any integers."""
    signed: bool
    """Whether the result is int4, -8 to 7, in int8; else uint4, 0 to 15, in uint8."""


def low_bits(workload: LowBitsWorkload, isa: Isa) -> Any:
    """Generate the cast."""
    w = workload
    dtype = "int8" if w.signed else "uint8"

    def body(x: Expr) -> Expr:
        lanes = tir.lanes_of(x)
        if w.in_dtype in _WHOLE:
            whole, far = _WHOLE[w.in_dtype]
            edge, zero = (tir.splat(v, w.in_dtype, lanes) for v in (far, 0.0))
            # What a conversion makes of numbers out of its range is undefined; NaN is not below.
            near = T.And(x < edge, tir.splat(-far, w.in_dtype, lanes) < x)
            x = tir.cast(tir.bind(T.Select(near, x, zero)), whole)
        low = tir.cast(x, dtype) & tir.splat(15, dtype, lanes)
        if not w.signed:
            return low
        eight = tir.splat(8, dtype, lanes)
        return (low ^ eight) - eight

    return elementwise("low_bits", isa, [w.shape], [w.in_dtype], dtype, body, cycles=8)
