# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products that split large activations: the same numbers, however many there are."""

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
from qcompiler.targets.kernels import harness, near_plan
from qcompiler.targets.kernels.depth import mean_time, plan_depths
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
from qcompiler.targets.kernels.near_plan import Stored
from qcompiler.targets.kernels.packing import Packed
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


def activations(kind: str, shape: tuple[int, ...], zero_point: int, seed: int = 0) -> Array:
    """Activations of which none, few or all are far from their zero point."""
    rng = np.random.default_rng(seed)
    near = rng.normal(zero_point, 12, shape)
    few = np.where(rng.random(shape) < 0.03, rng.integers(0, 256, shape), near)
    wild = rng.integers(0, 256, shape)
    ends = rng.choice([0, 255], shape)
    if kind == "mixed":
        choice = rng.integers(0, 5, (*shape[:-1], 1))
        a = np.choose(choice, [near, few, wild, ends, np.full(shape, 255)])
    else:
        a = {"near": near, "few": few, "wild": wild, "ends": ends}[kind]
    return np.clip(np.rint(a), 0, 255).astype(np.uint8)


def scalar(packed: Packed, position: int) -> int:
    """One of the scalars of a packed layer."""
    return int(packed.arrays[packed.names.index("scalars")][position])


@needs_avx2
@given(
    pixels=st.integers(1, 40),
    groups=st.integers(1, 70),
    columns=st.integers(8, 70),
    kind=st.sampled_from(["near", "few", "wild", "ends", "mixed"]),
    zero_point=st.sampled_from([0, 3, 31, 32, 90, 128, 200, 255]),
    spread=st.sampled_from([1.0, 10.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=12, deadline=None)
def test_the_sums_are_those_of_the_whole_activations(
    pixels: int, groups: int, columns: int, kind: str, zero_point: int, spread: float, seed: int
) -> None:
    k = 4 * groups
    workload = MatmulWorkload((pixels, k), (k, columns), Epilogue("int32"))
    b = unsafe_weights((k, columns), seed)
    a = activations(kind, (pixels, k), zero_point, seed)
    values = GemmValues(a_zero_point=zero_point, a_spread=spread)
    params = default_params(workload, AVX2)
    with (
        mock.patch.multiple(near_plan, _START_TIME=0, _SPLIT_TIME=0, _FAR_TIME=0),
        mock.patch("qcompiler.targets.kernels.weight_order.mean_time", return_value=9.0),
    ):
        far = pack_matmul(workload, AVX2, params, b, values).facts.far
        got = reference.run(workload, AVX2, params, [a], b, values)
    assert far == (
        "both" if zero_point >= 90 else "blocks" if k % 8 == 0 and zero_point <= 32 else "above"
    )
    expected = (a.astype(np.int64) - zero_point) @ b.astype(np.int64)
    np.testing.assert_array_equal(got, expected)


@needs_avx2
@pytest.mark.parametrize("zero_point", [4, 130])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("blocks", [(1, 100), (3, 1), (100, 100)])
def test_convolutions_with_residual(
    zero_point: int, kernel: int, stride: int, blocks: tuple[int, int]
) -> None:
    rng = np.random.default_rng(stride)
    pad = kernel // 2
    workload = ConvWorkload(
        2, 9, 7, 72, 40, kernel, kernel, Epilogue("uint8", "uint8"),
        strides=(stride, stride), pads=(pad,) * 4,
    )  # fmt: skip
    weight = unsafe_weights(workload.weight_shape)
    x = activations("mixed", workload.a_shape, zero_point)
    residual = rng.integers(0, 256, workload.out_shape).astype(np.uint8)
    multiplier = rng.uniform(1e-4, 1e-3, 40).astype(np.float32)
    bias = rng.integers(-5000, 5000, 40).astype(np.int32)
    values = GemmValues(
        bias=bias,
        multiplier=multiplier,
        a_zero_point=zero_point,
        a_spread=10.0,
        zero_point=7,
        residual_multiplier=0.7,
        residual_zero_point=11,
    )
    m_block, n_block = blocks
    params = default_params(workload, AVX2)
    params = replace(params, m_block=m_block, n_block=n_block, algorithm="direct")
    with mock.patch.object(near_plan, "_SPLIT_TIME", 0.0):
        far = pack_conv(workload, AVX2, params, weight, values).facts.far
        got = reference.run(workload, AVX2, params, [x, residual], weight, values)
    assert far == ("both" if zero_point == 130 else "blocks" if kernel == 1 else "above")
    sums = reference.conv_sums(workload, x, weight, zero_point) + bias
    expected = reference.requantize(sums, "uint8", values, residual)
    np.testing.assert_array_equal(got, expected)


@needs_avx2
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_bound_of_blocks_is_sharp_at_the_end_of_int16(offset: int, sign: int) -> None:
    """127 * 255 + a * w one below, at and above 32767, in one lane, alone and with its partner."""
    k = 64
    workload = MatmulWorkload((3, k), (k, 64), Epilogue("int32"))
    b = unsafe_weights((k, 64))
    b[:4] = 0
    b[0, 3], b[1, 3], b[5, 3] = sign * 127, sign * (127 + offset if offset < 0 else 127), sign
    a = np.zeros((3, k), np.uint8)
    a[:, 0], a[:, 1] = 255, 3
    a[:, 5] = 1 + max(offset, 0)  # the other group of the block
    values = GemmValues(a_zero_point=0, a_spread=5.0)
    params = default_params(workload, AVX2)
    assert pack_matmul(workload, AVX2, params, b, values).facts.far == "blocks"
    got = reference.run(workload, AVX2, params, [a], b, values)
    np.testing.assert_array_equal(got, a.astype(np.int64) @ b.astype(np.int64))


def test_who_splits() -> None:
    """8-bit weights on 8-bit activations do, where most are near and columns share the work."""
    workload = ConvWorkload(1, 8, 8, 64, 256, 1, 1, Epilogue("uint8"))
    params = default_params(workload, AVX2)
    weight = unsafe_weights(workload.weight_shape)

    def far(weight: Array, workload: ConvWorkload = workload, **values: Any) -> str:
        packed = pack_conv(workload, AVX2, params, weight, GemmValues(**values))
        return packed.facts.far

    assert far(weight) == "blocks"
    assert far(weight, a_zero_point=128, a_spread=20.0) == "both"
    assert far(weight, a_zero_point=128) == "none"  # nothing is known of them
    assert far(weight, a_zero_point=50, a_spread=20.0) == "above"
    assert far(weight, a_spread=200.0) == "none"  # most of them are far
    assert far(weight, a_qmax=127) == "none"  # nothing is
    assert far(weight // 2) == "none"  # 7 bits
    lowest = weight.copy()
    lowest[0, 0] = -128  # its sign cannot be changed, nor its magnitude kept
    assert far(lowest) == "none"
    narrow = replace(workload, co=8)
    assert far(unsafe_weights(narrow.weight_shape), narrow) == "none"
    other = replace(workload, c=62)
    assert far(unsafe_weights(other.weight_shape), other) == "none"
    geometry = geometry_of(workload, AVX2)
    assert near_plan.may_split(AVX2, geometry, weight, 255)
    assert not near_plan.may_split(replace(AVX2, intrinsics={}), geometry, weight, 255)
    assert not near_plan.may_split(ISA_TABLE["x86-avx512vnni"], geometry, weight, 255)


def test_windows_lie_around_the_zero_point_and_let_nothing_saturate() -> None:
    workload = ConvWorkload(1, 8, 8, 256, 256, 1, 1, Epilogue("uint8"))
    params = default_params(workload, AVX2)
    weight = unsafe_weights(workload.weight_shape)
    for zero_point in (128, 90, 250):
        values = GemmValues(a_zero_point=zero_point, a_spread=20.0)
        packed = pack_conv(workload, AVX2, params, weight, values)
        assert packed.facts.far == "both"
        size = scalar(packed, 7)
        assert size in near_plan._sizes(weight.reshape(-1, 4))
        assert scalar(packed, 6) == min(zero_point - (size + 1) // 2, 255 - size)
    assert near_plan._sizes(np.asarray([100, 100, -127, 0], np.int8)) == [32767 // 200, 127]
    assert near_plan._sizes(np.asarray([127, 127, 1, 1], np.int8)) == [129, 127]
    assert near_plan._sizes(np.asarray([1, -1], np.int8)) == [255, 127]


def test_what_is_known_of_the_activations_decides() -> None:
    """The estimate falls with their spread, and a spread from calibration goes before the range."""
    rng = np.random.default_rng(0)
    packed = rng.integers(-127, 128, (16, 64, 2, 8, 4)).astype(np.int8)
    row = np.full(256, 127, np.int8)
    workload = MatmulWorkload((8, 256), (256, 256), Epilogue("int32"))
    geometry = geometry_of(workload, AVX2)
    time = mean_time(plan_depths(packed, 255), packed)

    def split(spread: float | None) -> Any:
        return near_plan.best_split(packed, geometry, row, Stored(0, 255, spread), 3, time)

    assert Stored(0, 255, None).deviation == pytest.approx(51)
    assert Stored(0, 255, 20.0).deviation == pytest.approx(20 * 2**0.5)
    assert Stored(128, 255, 20.0).deviation == 20.0
    assert split(5.0)[1].sides == "blocks"
    assert split(150.0) is None
    shares = [near_plan._split_blocks(row, Stored(0, 255, s)) for s in (5.0, 20.0, 60.0)]
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    assert shares[2] > 0.1


def test_rows_are_the_largest_magnitudes_filled_up() -> None:
    row = near_plan.largest_rows(np.asarray([[[3, -127, 0]], [[-4, 126, 1]]], np.int8))
    assert row[:3].tolist() == [4, 127, 1]
    assert len(row) == 32
    assert not row[3:].any()


def test_the_table_moves_the_lanes_of_a_mask_to_the_front() -> None:
    table = near_plan.compress_table().reshape(256, 8)
    assert table[0b10110, :3].tolist() == [1, 2, 4]
    assert table[255].tolist() == list(range(8))


@needs_avx2
@pytest.mark.parametrize("zero_point", [0, 128])
def test_deep_loops_have_no_vector_on_the_stack(zero_point: int) -> None:
    workload = ConvWorkload(1, 14, 14, 256, 256, 1, 1, Epilogue("uint8"))
    params = default_params(workload, AVX2)
    values = GemmValues(a_zero_point=zero_point, a_spread=10.0)
    packed = pack_conv(workload, AVX2, params, unsafe_weights(workload.weight_shape), values)
    assert packed.facts.far != "none"
    assert packed.facts.depths[0] == 2
    code = harness.assembly(harness.build(build_conv(workload, AVX2, params, packed), AVX2))
    loops = [part.split("\n\tjne")[0] for part in code.split("\n.LBB") if "\n\tjne" in part]
    deep = [loop for loop in loops if loop.count("vpmaddubsw") == 12]  # three pixels, two vectors
    assert deep
    for loop in deep:
        assert "rsp" not in loop, loop
        assert loop.count("vpaddw") == loop.count("vpmaddwd") == loop.count("vpaddd") == 6
    whole = [loop for loop in loops if "vpmovsxbw" in loop]  # tiles where much is far
    assert whole
    assert all("vpmaddwd" in loop for loop in whole)
    assert near_plan.most_listed(geometry_of(workload, AVX2)) == 96  # of 64 K-groups
    listed = [loop for loop in loops if "vpsignb" in loop]
    assert bool(listed) == (zero_point == 128)
