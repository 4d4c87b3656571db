# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Integer products of weights with scales in groups equal their definition, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gemm_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.errors import CodegenError
from qcompiler.numerics import Residual
from qcompiler.numerics_grouped import conv_parts, grouped_result, matmul_parts
from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.targets.kernels.gemm import (
    ConvWorkload,
    Epilogue,
    GemmValues,
    MatmulWorkload,
    default_params,
    pack_matmul,
    space,
)
from qcompiler.types import DType, QuantParams
from qcompiler.windows import Geometry

ROWS = [isa for isa in ISA_TABLE.values() if runnable(isa)]
Array = np.ndarray[Any, np.dtype[Any]]


class Case:
    """The numbers of one product."""

    def __init__(self, rng: np.random.Generator, a_dtype: str, out: str, residual: str | None):
        self.rng = rng
        self.low, self.high = (0, 255) if a_dtype == "uint8" else (-128, 127)
        self.zero = int(rng.integers(self.low, self.high + 1))
        self.x_scale = float(np.float32(0.02))
        self.target = None
        if out != "float32":
            qmin, qmax = (3, 99) if rng.random() < 0.5 else reference.LIMITS[out]
            self.target = QuantParams(np.float32(0.4), np.int32(50), DType(out), qmin, qmax)
        self.residual_type = residual

    def residual(self, shape: tuple[int, ...]) -> Residual | None:
        if self.residual_type is None:
            return None
        q = QuantParams(np.float32(0.13), np.int32(7), DType(self.residual_type), -128, 127)
        return Residual(self.rng.integers(0, 100, shape).astype(self.residual_type), q)

    def values(self, scale: Array, bias: Array | None, residual: Residual | None) -> GemmValues:
        """As lowering makes them; `scale` has the weights' shape."""
        over = 1.0 if self.target is None else self.target.scale
        found = GemmValues(
            a_zero_point=self.zero,
            group_multiplier=numerics.multiplier(self.x_scale, scale, over=over),
            addend=None if bias is None else numerics.multiplier(bias, over=over),
        )
        if self.target is not None:
            t = self.target
            found = replace(found, zero_point=t.z, qmin=t.qmin, qmax=t.qmax)
        if residual is not None:
            factor = float(numerics.multiplier(residual.qparams.scale, over=over))
            found = replace(found, residual_zero_point=7, residual_multiplier=factor)
        return found


kinds = st.tuples(
    st.sampled_from(["uint8", "int8"]),
    st.sampled_from([("uint8", None), ("int8", "int8"), ("float32", None), ("uint8", "int8")]),
    st.booleans(),
)


@given(
    rows=st.integers(1, 50),
    groups=st.integers(1, 4),
    size=st.sampled_from([4, 16, 20, 64]),
    n=st.integers(1, 70),
    wide=st.booleans(),
    zeros=st.booleans(),
    kind=kinds,
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=12)
def test_matrix_products(
    rows: int, groups: int, size: int, n: int, wide: bool, zeros: bool, kind: Any, seed: int
) -> None:
    a_dtype, (out, residual_dtype), biased = kind
    rng = np.random.default_rng(seed)
    case = Case(rng, a_dtype, out, residual_dtype)
    a = rng.integers(case.low, case.high + 1, (rows, groups * size)).astype(a_dtype)
    limit = 128 if wide else 8
    b = rng.integers(-limit, limit, (groups * size, n)).astype(np.int8)
    scale = rng.uniform(1e-3, 0.1, (groups, n)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if biased else None
    residual = case.residual((rows, n))
    zero = rng.integers(-limit, limit, (groups, n)) * int(zeros)
    parts = matmul_parts(a, b, case.zero, scale, zero)
    expected = grouped_result(parts, case.x_scale, case.target, bias=bias, residual=residual)
    values = case.values(np.repeat(scale, size, 0), bias, residual)
    values = replace(values, group_zero=np.repeat(zero, size, 0).astype(np.int32))
    workload = MatmulWorkload(
        a.shape, b.shape, Epilogue(out, residual_dtype, group=size), a_dtype=a_dtype
    )
    operands = [a] if residual is None else [a, residual.q]
    for isa in ROWS:
        if size % isa.k_group:
            continue
        candidates = space(workload, isa)
        params = candidates[rng.integers(len(candidates))]
        assert params.algorithm in ("auto", "direct")
        got = reference.run(workload, isa, params, operands, b, values)
        np.testing.assert_array_equal(got, expected, f"{isa.name} {params}")


@given(
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    groups=st.integers(1, 3),
    size=st.sampled_from([16, 32]),
    co=st.integers(1, 40),
    wide=st.booleans(),
    kind=kinds,
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=8)
def test_convolutions(
    kernel: int, stride: int, groups: int, size: int, co: int, wide: bool, kind: Any, seed: int
) -> None:
    a_dtype, (out, residual_dtype), biased = kind
    rng = np.random.default_rng(seed)
    case = Case(rng, a_dtype, out, residual_dtype)
    c, pad = groups * size, kernel // 2
    workload = ConvWorkload(
        2, 7, 6, c, co, kernel, kernel, Epilogue(out, residual_dtype, group=size),
        strides=(stride, stride), pads=(pad,) * 4, a_dtype=a_dtype,
    )  # fmt: skip
    x = rng.integers(case.low, case.high + 1, workload.a_shape).astype(a_dtype)
    limit = 128 if wide else 8
    w = rng.integers(-limit, limit, workload.weight_shape).astype(np.int8)
    scale = rng.uniform(1e-3, 0.1, (co, groups, kernel, kernel)).astype(np.float32)
    bias = rng.standard_normal(co).astype(np.float32) if biased else None
    residual = case.residual(workload.out_shape)
    geometry = Geometry((7, 6), (kernel, kernel), (stride, stride), ((pad, pad),) * 2, (1, 1))
    parts = conv_parts(np.moveaxis(x, -1, 1), w, case.zero, scale, geometry)
    expected = grouped_result(parts, case.x_scale, case.target, bias=bias, residual=residual)
    values = case.values(np.repeat(scale, size, 1), bias, residual)
    operands = [x] if residual is None else [x, residual.q]
    for isa in ROWS:
        params = default_params(workload, isa)
        got = reference.run(workload, isa, params, operands, w, values)
        np.testing.assert_array_equal(got, expected, f"{isa.name} {params}")


@pytest.mark.parametrize(("size", "factors"), [(6, True), (16, False)])
def test_groups_without_multipliers_or_whole_k_groups_are_refused(size: int, factors: bool) -> None:
    isa = ISA_TABLE["x86-avx2"]
    workload = MatmulWorkload((4, 48), (48, 16), Epilogue("float32", group=size))
    b = np.full((48, 16), 7, np.int8)
    values = GemmValues(group_multiplier=np.ones((48, 16), np.float32) if factors else None)
    with pytest.raises(CodegenError, match=f"groups of {size} need a multiplier"):
        pack_matmul(workload, isa, default_params(workload, isa), b, values)
