# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""int8 weights stored as codes of 4 bits and factors of groups: every row returns the same sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gemm_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.targets.isa import ISA_TABLE, Isa, runnable
from qcompiler.targets.kernels.factored import factored_weights
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

ROWS = [isa for isa in ISA_TABLE.values() if runnable(isa)]
Array = np.ndarray[Any, np.dtype[Any]]
each_row = pytest.mark.parametrize("isa", ROWS, ids=lambda isa: isa.name)


def factored(rng: np.random.Generator, shape: tuple[int, ...], size: int, extreme: bool) -> Array:
    """Weights [..., K] of codes and factors in groups of `size`."""
    codes = rng.choice(np.asarray([-8, 7] if extreme else range(-8, 8)), shape)
    choices = np.asarray([15, 16] if extreme else range(1, 17))
    factors = rng.choice(choices, (*shape[:-1], shape[-1] // size))
    return np.asarray(codes * np.repeat(factors, size, -1), np.int8)


@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 14),
    size=st.sampled_from([8, 16, 32]),
    n=st.integers(1, 80),
    transpose_b=st.booleans(),
    extreme=st.booleans(),
    signed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=10)
def test_products_with_factors_are_exact(
    rows: int,
    groups: int,
    size: int,
    n: int,
    transpose_b: bool,
    extreme: bool,
    signed: bool,
    seed: int,
) -> None:
    """With few rows weights unpack in the register tile, with many ahead of it."""
    rng = np.random.default_rng(seed)
    k = groups * size
    weight = factored(rng, (n, k), size, extreme)
    b = np.ascontiguousarray(weight if transpose_b else weight.T)
    low, high = (-128, 127) if signed else (0, 255)
    values = [low, high] if extreme else range(low, high + 1)
    a = rng.choice(np.asarray(values), (rows, k)).astype(np.int8 if signed else np.uint8)
    zero_point = int(rng.integers(low, high + 1))
    workload = MatmulWorkload(
        a.shape, b.shape, Epilogue("int32"), a_dtype=a.dtype.name, transpose_b=transpose_b
    )
    given_values = GemmValues(a_zero_point=zero_point)
    expected = ((a.astype(np.int64) - zero_point) @ weight.T.astype(np.int64)).astype(np.int32)
    for isa in ROWS:
        candidates = space(workload, isa)
        params = candidates[rng.integers(len(candidates))]
        got = reference.run(workload, isa, params, [a], b, given_values)
        np.testing.assert_array_equal(got, expected, f"{isa.name} {params}")


@each_row
@pytest.mark.parametrize("nv", [1, 2, 3])
@pytest.mark.parametrize("size", [8, 16])
def test_convolutions_store_codes_and_factors(isa: Isa, nv: int, size: int) -> None:
    """Half a byte for each code, and for each group."""
    rng = np.random.default_rng(nv)
    workload = ConvWorkload(1, 16, 6, 16, 96, 3, 3, Epilogue("int32"), pads=(1, 1, 1, 1))
    weight = factored(rng, (96, 3, 3, 16), size, extreme=False).transpose(0, 3, 1, 2)
    x = rng.integers(0, 256, workload.a_shape).astype(np.uint8)
    base = default_params(workload, isa)
    params = replace(base, nv=nv, mt=min(base.mt, 2), algorithm="direct", order="n")
    packed = pack_conv(workload, isa, params, weight, GemmValues())
    columns = -(-96 // (nv * params.lanes)) * nv * params.lanes
    sizes = {name: a.nbytes for name, a in zip(packed.names, packed.arrays, strict=True)}
    assert (sizes["weight"], sizes["factors"]) == (columns * 72, columns * 144 // size // 2)
    assert packed.facts.factor == size // isa.k_group
    got = reference.run(workload, isa, params, [x], weight, GemmValues())
    np.testing.assert_array_equal(got, reference.conv_sums(workload, x, weight, 0))


@each_row
def test_weights_without_factors_keep_bytes(isa: Isa) -> None:
    workload = MatmulWorkload((40, 16), (16, 16), Epilogue("int32"))
    b = np.full((16, 16), 6, np.int8)
    params = replace(default_params(workload, isa), algorithm="direct")
    for value, factor in ((42, True), (-48, True), (30, True), (43, False), (-54, False)):
        b[3, 5] = value  # the factor is 1, 2, 3 or 6 beside weights of 6
        packed = pack_matmul(workload, isa, params, b, GemmValues())
        assert (packed.facts.factor > 0) == factor, value


@given(size=st.sampled_from([4, 8, 16, 32, 64]), seed=st.integers(0, 2**32 - 1))
def test_codes_and_factors_are_found_again(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = factored(rng, (5, 2, 3, 64), size, extreme=bool(seed % 2))
    found = factored_weights(weight, 4)
    assert found is not None
    assert found.group >= size
    assert found.codes.min() >= -8
    assert found.codes.max() <= 7
    factors = found.factors + 9
    assert factors.min() >= 1
    assert factors.max() <= 16
    np.testing.assert_array_equal(found.codes * factors.astype(np.int32), weight)
    for group in (found.factors.reshape(-1, found.group),):
        assert (group == group[:, :1]).all()
    assert factored_weights(weight, 128) is None


def test_what_has_no_factors_is_told_from_what_has() -> None:
    rng = np.random.default_rng(0)
    assert factored_weights(rng.integers(-128, 128, (8, 64)).astype(np.int8), 4) is None
    one = factored(rng, (200, 64), 8, extreme=False)
    one[199, 60:62] = 127, 126  # no common factor, in the last group
    assert factored_weights(one, 4) is None
    assert factored_weights(np.zeros((2, 64), np.int8), 4) is not None
    assert factored_weights(factored(rng, (2, 63), 7, extreme=False), 4) is None


@pytest.mark.skipif(not runnable(ISA_TABLE["x86-amx"]), reason="this CPU has no AMX-INT8")
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize(("channels", "kernel"), [(24, 1), (64, 1), (16, 3), (40, 3)])
def test_tiles_are_unpacked_with_their_factors(size: int, channels: int, kernel: int) -> None:
    isa = ISA_TABLE["x86-amx"]
    if channels % size:
        size = 8
    rng = np.random.default_rng(channels)
    pads = (kernel // 2,) * 4
    workload = ConvWorkload(1, 24, 20, channels, 50, kernel, kernel, Epilogue("int32"), pads=pads)
    shape = (50, kernel, kernel, channels)
    weight = factored(rng, shape, size, extreme=False).transpose(0, 3, 1, 2)
    x = rng.integers(0, 256, workload.a_shape).astype(np.uint8)
    tiled = [p for p in space(workload, isa) if p.algorithm == "tiles"]
    packed = pack_conv(workload, isa, tiled[0], weight, GemmValues())
    assert (packed.facts.dot, packed.facts.storage) == ("tiles", "int4")
    assert packed.facts.factor
    for params in tiled[:3]:
        got = reference.run(workload, isa, params, [x], weight, GemmValues())
        np.testing.assert_array_equal(got, reference.conv_sums(workload, x, weight, 0))
