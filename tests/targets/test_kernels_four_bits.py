# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Kernels that make and read 4-bit integers, and scales along an axis, equal `numerics`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.targets.kernels import scaled
from qcompiler.targets.kernels.four_bits import LowBitsWorkload, low_bits
from qcompiler.targets.kernels.harness import build, run
from qcompiler.types import DType, PerAxis, PerGroup, QuantParams

ROWS = [row for row in ISA_TABLE.values() if runnable(row) and row.name != "x86-avxvnni"]
F = np.float32
few = settings(max_examples=2, deadline=None)
rows = pytest.mark.parametrize("isa", ROWS, ids=lambda row: row.name)
ODD = [np.nan, np.inf, -np.inf, 3e38, -3e38, 2.0**28, 2.0**28 + 16, -(2.0**31), 2.0**63, -0.0]
ODD += [7.99, 8.0, -8.99, -9.0, 15.5, -0.99, 1e-40]
KINDS = ["float32", "float64", "int8", "uint16", "int32", "uint64"]


@rows
@pytest.mark.parametrize("to", [DType.INT4, DType.UINT4])
@pytest.mark.parametrize("kind", KINDS)
@few
@given(size=st.sampled_from([1, 5, 64, 257]), seed=st.integers(0, 2**31))
def test_casts_keep_the_low_bits(isa, to, kind, size, seed):
    rng = np.random.default_rng(seed)
    if kind.startswith("float"):
        x = (rng.normal(size=size) * 10.0 ** rng.integers(0, 12, size)).astype(kind)
        with np.errstate(over="ignore"):
            odd = np.array([*ODD, 2.0**52 + 3, -(2.0**52) - 3]).astype(kind)
        rng.shuffle(odd)
        x[: len(odd)] = odd[:size]
    else:
        info = np.iinfo(kind)
        x = rng.integers(info.min, info.max, size, kind, endpoint=True)
    w = LowBitsWorkload((size,), kind, to is DType.INT4)
    got = run(build(low_bits(w, isa), isa), x, shape=(size,), dtype=to.numpy.name)
    want = numerics.low_bits(x, to)
    np.testing.assert_array_equal(got, want)
    assert want.min() >= to.min
    assert want.max() <= to.max


GRIDS = [
    ((5, 6, 7), PerAxis(1), (6,)),
    ((5, 6, 7), PerAxis(2), (7,)),
    ((4, 96), PerGroup(1, 32), (4, 3)),
    ((3, 8, 5), PerGroup(1, 4), (3, 2, 5)),
    ((3, 7, 5), PerGroup(1, 4), (3, 2, 5)),  # the last block is shorter
    ((1, 1), PerAxis(0), (1,)),
]


@rows
@pytest.mark.parametrize(("shape", "granularity", "scales"), GRIDS, ids=lambda v: str(v))
@pytest.mark.parametrize("held", [DType.INT4, DType.UINT8, DType.INT16])
@few
@given(seed=st.integers(0, 2**31), narrow=st.booleans())
def test_scales_along_an_axis(isa, shape, granularity, scales, held, seed, narrow):
    rng = np.random.default_rng(seed)
    zero = rng.integers(held.min, held.max, scales, endpoint=True)
    scale = rng.uniform(1e-3, 3, scales).astype(F)
    lo, hi = (held.min + 1, held.max - 2) if narrow else (held.min, held.max)
    q = QuantParams(scale, zero, held, lo, hi, granularity)
    x = (rng.normal(size=shape) * 4 * held.max).astype(F)
    x.flat[: len(ODD)] = np.array(ODD, F)[: x.size]
    if x.size > 20:
        x.flat[-1] = numerics.expanded(q, shape)[0].reshape(-1)[-1] * F(2.5)  # a tie
    view, s, z = scaled.parameters(q, shape)
    stored = held.numpy.name
    w = scaled.ScaledWorkload(shape, view, s.shape, stored, q.qmin, q.qmax)
    got = run(build(scaled.quantize(w, isa), isa), x, s, z, shape=shape, dtype=stored)
    want = numerics.quantize(x, q)
    np.testing.assert_array_equal(got, want)
    codes = rng.integers(held.min, held.max, shape, endpoint=True).astype(held.numpy)
    got = run(build(scaled.dequantize(w, isa), isa), codes, s, z, shape=shape, dtype="float32")
    np.testing.assert_array_equal(got, numerics.dequantize(codes, q))
