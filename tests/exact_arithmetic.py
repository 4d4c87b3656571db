# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Float32 arithmetic in exact fractions, and grids of any kind, to hold the numerics against."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from qcompiler.types import DType, QuantParams

SCALES = st.floats(2.0**-30, 2.0**30, width=32)
STORAGES = st.sampled_from([DType.UINT8, DType.INT8, DType.INT16, DType.UINT16])


def f32(value: Fraction) -> Fraction:
    """Round to the nearest float32, ties to even, in exact arithmetic (no subnormals)."""
    if value == 0:
        return Fraction(0)
    exponent = 0
    magnitude = abs(value)
    # 2**exponent <= magnitude < 2**(exponent + 1)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return round(value / unit) * unit  # round() of a Fraction ties to even


def exact(x: np.floating | float) -> Fraction:
    return Fraction(float(x))


def clamp(v: int, q: QuantParams) -> int:
    return max(q.qmin, min(q.qmax, v))


def qparams(scale: float, zero: int, storage: DType = DType.UINT8, **kw: int) -> QuantParams:
    return QuantParams(
        np.float32(scale), zero, storage, kw.get("qmin", storage.min), kw.get("qmax", storage.max)
    )


@st.composite
def any_qparams(draw: st.DrawFn, storages: st.SearchStrategy[DType] = STORAGES) -> QuantParams:
    storage = draw(storages)
    lo, hi = storage.min, storage.max
    qmin = draw(st.integers(lo, hi))
    qmax = draw(st.integers(qmin, hi))
    return qparams(draw(SCALES), draw(st.integers(lo, hi)), storage, qmin=qmin, qmax=qmax)
