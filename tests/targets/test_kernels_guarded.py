# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products that ask how large the activations are: the same numbers, whichever way they take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import gemm_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.targets.kernels import guarded, harness
from qcompiler.targets.kernels.gemm import (
    ConvWorkload,
    Epilogue,
    GemmValues,
    MatmulWorkload,
    build_conv,
    default_params,
    pack_conv,
    pack_matmul,
)
from qcompiler.targets.kernels.plan import geometry_of

AVX2 = ISA_TABLE["x86-avx2"]
Array = np.ndarray[Any, np.dtype[Any]]
needs_avx2 = pytest.mark.skipif(not runnable(AVX2), reason="this machine has no AVX2")


def unsafe_weights(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Weights over all 8 bits, many of whose neighbours saturate with large activations."""
    weight = np.random.default_rng(seed).normal(0, 45, shape)
    weight = np.clip(np.rint(weight), -127, 127).astype(np.int8)
    weight.reshape(-1)[:2] = 127
    return weight


def activations(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Activations that take one way, or all of them side by side."""
    small = rng.integers(0, 25, shape)
    medium = np.where(rng.random(shape) < 0.02, 200, small)
    large = rng.integers(0, 256, shape)
    if kind == "mixed":
        choice = rng.integers(0, 4, (*shape[:-1], 1))
        a = np.choose(choice, [small, medium, large, np.full(shape, 255)])
    else:
        a = {"small": small, "medium": medium, "large": large, "most": np.full(shape, 255)}[kind]
    return a.astype(np.uint8)


@needs_avx2
@given(
    pixels=st.integers(1, 40),
    blocks=st.integers(4, 30),
    columns=st.integers(1, 70),
    kind=st.sampled_from(["small", "medium", "large", "most", "mixed"]),
    zero_point=st.integers(0, 20),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=10)
def test_every_way_gives_the_same_sums(
    pixels: int, blocks: int, columns: int, kind: str, zero_point: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    k = 8 * blocks
    workload = MatmulWorkload((pixels, k), (k, columns), Epilogue("int32"))
    b = unsafe_weights((k, columns), seed)
    a = activations(kind, (pixels, k), rng)
    values = GemmValues(a_zero_point=zero_point)
    params = default_params(workload, AVX2)
    with mock.patch.object(guarded, "expected_time", return_value=-float("inf")):
        assert pack_matmul(workload, AVX2, params, b, values).facts.dot == "guarded"
        got = reference.run(workload, AVX2, params, [a], b, values)
    expected = (a.astype(np.int64) - zero_point) @ b.astype(np.int64)
    np.testing.assert_array_equal(got, expected)


@needs_avx2
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("m_block", [1, 3, 100])
@pytest.mark.parametrize("n_block", [1, 100])
def test_convolutions_of_one_pixel_with_residual(stride: int, m_block: int, n_block: int) -> None:
    rng = np.random.default_rng(stride)
    workload = ConvWorkload(
        2, 9, 7, 72, 40, 1, 1, Epilogue("uint8", "uint8"), strides=(stride, stride)
    )
    weight = unsafe_weights(workload.weight_shape)
    x = activations("mixed", workload.a_shape, rng)
    residual = rng.integers(0, 256, workload.out_shape).astype(np.uint8)
    multiplier = rng.uniform(1e-4, 1e-3, 40).astype(np.float32)
    bias = rng.integers(-5000, 5000, 40).astype(np.int32)
    values = GemmValues(
        bias=bias,
        multiplier=multiplier,
        a_zero_point=4,
        zero_point=7,
        residual_multiplier=0.7,
        residual_zero_point=11,
    )
    params = replace(default_params(workload, AVX2), m_block=m_block, n_block=n_block)
    assert pack_conv(workload, AVX2, params, weight, values).facts.dot == "guarded"
    got = reference.run(workload, AVX2, params, [x, residual], weight, values)
    sums = reference.conv_sums(workload, x, weight, 4) + bias
    expected = reference.requantize(sums, "uint8", values, residual)
    np.testing.assert_array_equal(got, expected)


@needs_avx2
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_bound_is_sharp_at_the_end_of_int16(offset: int, sign: int) -> None:
    """127 * 255 + a * w one below, at and above 32767, in one lane, alone and with its partner."""
    k = 64
    workload = MatmulWorkload((3, k), (k, 16), Epilogue("int32"))
    b = unsafe_weights((k, 16))
    b[:4] = 0
    b[0, 3], b[1, 3], b[5, 3] = sign * 127, sign * (127 + offset if offset < 0 else 127), sign
    a = np.zeros((3, k), np.uint8)
    a[:, 0], a[:, 1] = 255, 3
    a[:, 5] = 1 + max(offset, 0)  # the other group of the block
    values = GemmValues(a_zero_point=0)
    params = default_params(workload, AVX2)
    assert pack_matmul(workload, AVX2, params, b, values).facts.dot == "guarded"
    got = reference.run(workload, AVX2, params, [a], b, values)
    np.testing.assert_array_equal(got, a.astype(np.int64) @ b.astype(np.int64))


def test_who_asks() -> None:
    """8-bit weights on activations near zero do; where nothing is gained, nothing is asked."""
    workload = ConvWorkload(1, 8, 8, 64, 64, 1, 1, Epilogue("uint8"))
    params = default_params(workload, AVX2)
    weight = unsafe_weights(workload.weight_shape)

    def dot(weight: Array, workload: ConvWorkload = workload, **values: int) -> str:
        packed = pack_conv(workload, AVX2, params, weight, GemmValues(**values))
        return packed.facts.dot

    assert dot(weight) == "guarded"
    assert dot(weight, a_zero_point=128) != "guarded"
    assert dot(weight // 2) != "guarded"  # 7 bits
    lowest = weight.copy()
    lowest[0, 0] = -128  # its magnitude does not fit the bound's operand
    assert dot(lowest) != "guarded"
    padded = replace(workload, kh=3, kw=3, pads=(1, 1, 1, 1))
    assert dot(unsafe_weights(padded.weight_shape), padded) != "guarded"


def test_what_is_expected_of_the_activations() -> None:
    row = np.full(256, 127, np.int8)
    assert guarded.expected_time(row, 200, 255) == float("inf")
    assert guarded.expected_time(row // 16, 0, 255) == pytest.approx(0.77)  # two deep, always
    assert 0.77 < guarded.expected_time(row, 0, 255) < 1.1
    # Right at the bound.
    geometry = geometry_of(MatmulWorkload((8, 256), (256, 8), Epilogue("int32")), AVX2)
    weight = np.full((8, 1, 256), 127, np.int8)
    assert guarded.applies(AVX2, geometry, weight)
    assert not guarded.applies(replace(AVX2, intrinsics={}), geometry, weight)
    assert guarded.guard_row(np.asarray([[[3, -127]], [[-4, 126]]], np.int8)).tolist() == [4, 127]


@needs_avx2
def test_deep_loops_have_no_vector_on_the_stack() -> None:
    workload = ConvWorkload(1, 14, 14, 256, 256, 1, 1, Epilogue("uint8"))
    params = default_params(workload, AVX2)
    packed = pack_conv(workload, AVX2, params, unsafe_weights(workload.weight_shape), GemmValues())
    code = harness.assembly(harness.build(build_conv(workload, AVX2, params, packed), AVX2))
    loops = [part for part in code.split("\n.LBB") if "vpmaddubsw" in part and "vpaddd" in part]
    loops = [part.split("\n\tjne")[0] for part in loops if "\n\tjne" in part]
    assert loops
    for loop in loops:
        assert "rsp" not in loop, loop
