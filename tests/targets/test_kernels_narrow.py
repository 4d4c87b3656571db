# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights stored in fewer bits than they are multiplied in: every row returns the same numbers."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.targets.isa import ISA_TABLE, Isa, runnable
from qcompiler.targets.kernels.gemm import (
    ConvWorkload,
    Epilogue,
    GemmValues,
    MatmulWorkload,
    default_params,
    pack_conv,
    pack_matmul,
    space,
)

_SPEC = importlib.util.spec_from_file_location(
    "gemm_reference", Path(__file__).with_name("gemm_reference.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
reference = importlib.util.module_from_spec(_SPEC)
sys.modules["gemm_reference"] = reference
_SPEC.loader.exec_module(reference)

ROWS = [isa for isa in ISA_TABLE.values() if runnable(isa)]
Array = np.ndarray[Any, np.dtype[Any]]
each_row = pytest.mark.parametrize("isa", ROWS, ids=lambda isa: isa.name)


@given(
    extents=st.tuples(st.integers(1, 70), st.integers(1, 90), st.integers(1, 80)),
    transpose_b=st.booleans(),
    extreme=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=12)
def test_products_with_nibbles_are_exact(
    extents: tuple[int, int, int], transpose_b: bool, extreme: bool, seed: int
) -> None:
    """With few rows weights unpack in the register tile, with many ahead of it."""
    rng = np.random.default_rng(seed)
    m, k, n = extents
    choices = np.asarray([-8, 7] if extreme else range(-8, 8), np.int8)
    b = rng.choice(choices, (n, k) if transpose_b else (k, n))
    a = rng.choice(np.asarray([0, 255] if extreme else range(256), np.uint8), (m, k))
    zero_point = int(rng.integers(0, 256))
    workload = MatmulWorkload(a.shape, b.shape, Epilogue("int32"), transpose_b=transpose_b)
    values = GemmValues(a_zero_point=zero_point)
    wide = (b.T if transpose_b else b).astype(np.int64)
    expected = ((a.astype(np.int64) - zero_point) @ wide).astype(np.int32)
    for isa in ROWS:
        candidates = space(workload, isa)
        params = candidates[rng.integers(len(candidates))]
        packed = pack_matmul(workload, isa, params, b, values)
        assert packed.facts.storage == "int4"
        got = reference.run(workload, isa, params, [a], b, values)
        np.testing.assert_array_equal(got, expected, f"{isa.name} {params}")


@each_row
@pytest.mark.parametrize("nv", [1, 2, 3])
def test_nibbles_take_half_the_memory_of_bytes(isa: Isa, nv: int) -> None:
    rng = np.random.default_rng(nv)
    workload = ConvWorkload(1, 6, 6, 16, 96, 3, 3, Epilogue("int32"), pads=(1, 1, 1, 1))
    weight = rng.integers(-8, 8, workload.weight_shape).astype(np.int8)
    x = rng.integers(0, 256, workload.a_shape).astype(np.uint8)
    base = default_params(workload, isa)
    params = replace(base, nv=nv, mt=min(base.mt, 2), algorithm="direct")
    packed = pack_conv(workload, isa, params, weight, GemmValues())
    columns = -(-96 // (nv * params.lanes)) * nv * params.lanes
    assert packed.arrays[0].nbytes == columns * 16 * 9 // 2
    got = reference.run(workload, isa, params, [x], weight, GemmValues())
    np.testing.assert_array_equal(got, reference.conv_sums(workload, x, weight, 0))


@each_row
def test_one_weight_outside_of_four_bits_keeps_bytes(isa: Isa) -> None:
    workload = MatmulWorkload((4, 8), (8, 16), Epilogue("int32"))
    b = np.zeros((8, 16), np.int8)
    for value, storage in ((7, "int4"), (-8, "int4"), (8, "plain"), (-9, "plain")):
        b[3, 5] = value
        packed = pack_matmul(workload, isa, default_params(workload, isa), b, GemmValues())
        assert packed.facts.storage == storage
