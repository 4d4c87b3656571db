# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Winograd convolutions equal the integer definition, bit for bit, and are chosen by the rule."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import gemm_reference as reference
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import ISA_TABLE, Isa, runnable, tvm_target
from qcompiler.targets.kernels.gemm import (
    ConvWorkload,
    Epilogue,
    GemmParams,
    GemmValues,
    build_conv,
    default_params,
    pack_conv,
    space,
)
from qcompiler.targets.kernels.winograd_plan import (
    FILTERS,
    patches_by_time,
    shift_of,
    takes_pairs,
    winograd_plan,
)
from qcompiler.targets.kernels.workload import PATCHES, Algorithm

ROWS = [isa for isa in ISA_TABLE.values() if runnable(isa) and isa.dot not in ("sdot", "smmla")]
AVX2 = ISA_TABLE["x86-avx2"]
Array = np.ndarray[Any, np.dtype[Any]]


def conv(
    size: int, c: int, co: int, epilogue: Epilogue | None = None, **changes: Any
) -> ConvWorkload:
    given = {"n": 1, "h": size, "w": size, "pads": (1, 1, 1, 1), **changes}
    return ConvWorkload(c=c, co=co, kh=3, kw=3, epilogue=epilogue or Epilogue("uint8"), **given)


def winograd(
    workload: ConvWorkload, isa: Isa, algorithm: Algorithm = "winograd-4x4", rows: int = 0
) -> GemmParams:
    return replace(default_params(workload, isa), algorithm=algorithm, m_block=rows)


@given(
    algorithm=st.sampled_from(list(PATCHES)),
    height=st.integers(3, 19),
    width=st.integers(3, 19),
    c=st.sampled_from([16, 32, 48]),
    blocks=st.integers(1, 5),
    pads=st.sampled_from([(1, 1, 1, 1), (0, 0, 0, 0), (0, 2, 3, 1), (2, 0, 0, 0)]),
    a_dtype=st.sampled_from(["uint8", "uint8", "int8"]),
    out_dtype=st.sampled_from(["uint8", "int8", "int16", "int32", "float32"]),
    residual=st.booleans(),
    extreme=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=8)
def test_winograd_is_exact(
    algorithm: Algorithm,
    height: int,
    width: int,
    c: int,
    blocks: int,
    pads: tuple[int, int, int, int],
    a_dtype: str,
    out_dtype: str,
    residual: bool,
    extreme: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    kind = "uint8" if residual and out_dtype in reference.LIMITS else None
    co = blocks * 32
    workload = conv(
        0, c, co, Epilogue(out_dtype, kind), n=1 + seed % 2, h=height, w=width, pads=pads,
        a_dtype=a_dtype,
    )  # fmt: skip
    low, high = reference.LIMITS[a_dtype]
    x = rng.integers(low, high + 1, workload.a_shape).astype(a_dtype)
    weight = rng.integers(-128, 128, workload.weight_shape).astype(np.int8)
    if extreme:
        x = rng.choice(np.asarray([low, high], a_dtype), workload.a_shape)
        weight = rng.choice(np.asarray([-128, 127], np.int8), workload.weight_shape)
    bias = rng.integers(-(10**5), 10**5, co).astype(np.int32)
    values = GemmValues(
        bias=bias,
        multiplier=rng.uniform(1e-5, 1e-3, co).astype(np.float32),
        a_zero_point=int(rng.integers(low, high + 1)),
        zero_point=int(rng.integers(0, 100)) if seed % 3 else 0,
        qmin=3 if seed % 5 == 0 else None,
        residual_zero_point=9,
        residual_multiplier=float(np.float32(0.37)),
    )
    other = rng.integers(0, 256, workload.out_shape).astype(np.uint8)
    sums = reference.conv_sums(workload, x, weight, values.a_zero_point) + bias
    expected = reference.requantize(sums, out_dtype, values, other if kind else None)
    operands = [x, other] if kind else [x]
    for isa in {ROWS[0], ROWS[seed % len(ROWS)]}:
        params = winograd(workload, isa, algorithm, seed % 3)
        packed = pack_conv(workload, isa, params, weight, values)
        assert packed.facts.patch == PATCHES[algorithm]
        got = reference.run(workload, isa, params, operands, weight, values)
        np.testing.assert_array_equal(got, expected, isa.name)


BT = {
    2: np.asarray([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
    4: np.asarray(
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ]
    ),
}


@pytest.mark.parametrize("algorithm", list(PATCHES))
def test_transforms_fit_16_bits(algorithm: Algorithm) -> None:
    """Inputs and filters that make each position of their transforms largest, and smallest."""
    patch = PATCHES[algorithm]
    rows, cols = (BT[extent] for extent in patch)
    for low, high in ((0, 255), (-128, 127)):
        ends = [
            np.where((np.multiply.outer(row, col) > 0) == up, high, low)
            for row, col in itertools.product(rows, cols)
            for up in (True, False)
        ]
        filters = [
            np.where((np.multiply.outer(row, col) > 0) == up, 127, -128)
            for row, col in itertools.product(FILTERS[patch[0]], FILTERS[patch[1]])
            for up in (True, False)
        ]
        co = -(-len(filters) // 32) * 32
        a_dtype = "uint8" if low == 0 else "int8"
        workload = conv(
            0, 16, co, Epilogue("int32"), n=len(ends), h=len(rows), w=len(cols),
            pads=(0, 0, 0, 0), a_dtype=a_dtype,
        )  # fmt: skip
        assert (workload.oh, workload.ow) == patch
        x = np.repeat(np.stack(ends)[..., None], 16, -1).astype(a_dtype)
        chosen = np.stack([filters[k % len(filters)] for k in range(co)])
        weight = np.repeat(chosen[:, None], 16, 1).astype(np.int8)
        expected = reference.conv_sums(workload, x, weight, 0)
        for isa in (ROWS[0], ROWS[-1]):
            got = reference.run(
                workload, isa, winograd(workload, isa, algorithm), [x], weight, GemmValues()
            )
            np.testing.assert_array_equal(got, expected, isa.name)


@pytest.mark.parametrize("algorithm", list(PATCHES))
@pytest.mark.parametrize("sign", [127, -128])
def test_the_largest_sums_are_exact(algorithm: Algorithm, sign: int) -> None:
    """The proof holds up to the last sum that int32 takes times the transforms' power of two."""
    patch = PATCHES[algorithm]
    limit = 1 << (31 - shift_of(patch))
    workload = conv(4, 112, 32, Epilogue("int32"))
    x = np.full(workload.a_shape, 255, np.uint8)
    weight = np.full(workload.weight_shape, sign, np.int8)
    products = 255 * 112 * 9 * sign
    bias = np.full(32, (limit - 1 if sign > 0 else -limit) - products, np.int32)
    values = GemmValues(bias=bias)
    params = winograd(workload, AVX2, algorithm)
    packed = pack_conv(workload, AVX2, params, weight, values)
    assert packed.facts.patch == patch
    expected = reference.conv_sums(workload, x, weight, 0) + bias
    assert abs(expected).max() >= limit - 1
    got = reference.run(workload, AVX2, params, [x], weight, values)
    np.testing.assert_array_equal(got, expected)

    beyond = replace(values, bias=bias + np.int32(1 if sign > 0 else -1))
    packed = pack_conv(workload, AVX2, params, weight, beyond)
    if patch == (2, 2):
        assert packed.facts.dot != "winograd"
    else:
        assert packed.facts.patch == (2, 2)
    got = reference.run(workload, AVX2, params, [x], weight, beyond)
    np.testing.assert_array_equal(got, expected + (1 if sign > 0 else -1))


def test_deep_layers_are_exact_whether_proved_or_not() -> None:
    rng = np.random.default_rng(5)
    workload = conv(6, 512, 32, Epilogue("uint8", "uint8"), n=2)
    x = rng.integers(0, 256, workload.a_shape).astype(np.uint8)
    other = rng.integers(0, 256, workload.out_shape).astype(np.uint8)
    values = GemmValues(
        multiplier=np.float32(2e-6), a_zero_point=128, zero_point=7, residual_multiplier=0.5
    )
    for largest, patch in ((40, (4, 4)), (128, (2, 2))):
        weight = rng.integers(-largest, largest, workload.weight_shape).astype(np.int8)
        weight[0] = largest - 1  # with 127, no sum of this column is proved for patches of 4 x 4
        sums = reference.conv_sums(workload, x, weight, 128)
        expected = reference.requantize(sums, "uint8", values, other)
        for isa in (ROWS[0], ROWS[-1]):
            params = winograd(workload, isa)
            assert pack_conv(workload, isa, params, weight, values).facts.patch == patch
            got = reference.run(workload, isa, params, [x, other], weight, values)
            np.testing.assert_array_equal(got, expected, isa.name)


@pytest.mark.parametrize("algorithm", list(PATCHES))
def test_large_weights_are_transformed_by_the_kernel(algorithm: Algorithm) -> None:
    rng = np.random.default_rng(6)
    workload = conv(9, 512, 160, Epilogue("int32"), w=6)
    x = rng.integers(0, 256, workload.a_shape).astype(np.uint8)
    weight = rng.integers(-40, 41, workload.weight_shape).astype(np.int8)
    values = GemmValues(bias=rng.integers(-999, 999, 160).astype(np.int32), a_zero_point=7)
    expected = reference.conv_sums(workload, x, weight, 7) + values.bias
    for isa in dict.fromkeys([ROWS[0], *(r for r in ROWS if r.name == "x86-avx2"), ROWS[-1]]):
        params = winograd(workload, isa, algorithm, 2)
        packed = pack_conv(workload, isa, params, weight, values)
        assert packed.facts.patch == PATCHES[algorithm]
        assert (packed.arrays[0].nbytes == weight.nbytes) == takes_pairs(isa)
        got = reference.run(workload, isa, params, [x], weight, values)
        np.testing.assert_array_equal(got, expected, isa.name)
    few = replace(workload, co=32)
    packed = pack_conv(few, AVX2, winograd(few, AVX2, algorithm), weight[:32], GemmValues())
    assert packed.arrays[0].dtype == np.int16


def test_packing_chooses_by_the_rule() -> None:
    rng = np.random.default_rng(0)
    workload = conv(56, 64, 64)
    weight = rng.integers(-127, 128, workload.weight_shape).astype(np.int8)
    for isa in ISA_TABLE.values():
        params = default_params(workload, isa)
        packed = pack_conv(workload, isa, params, weight, GemmValues())
        wins = isa.tiles == "none" and isa.dot in ("none", "maddubs", "smlal", "vpdpbusd")
        assert (packed.facts.dot == "winograd") == wins, isa.name
        assert not wins or packed.facts.patch == (4, 4)
        direct = replace(params, algorithm="direct")
        assert pack_conv(workload, isa, direct, weight, GemmValues()).facts.dot != "winograd"
    large = np.full_like(weight, -128)
    values = GemmValues(bias=np.full(64, -(2**25), np.int32))
    packed = pack_conv(workload, AVX2, default_params(workload, AVX2), large, values)
    assert packed.facts.patch in ((2, 4), (4, 2))  # the fastest of those that are proved
    strided = conv(14, 64, 64, strides=(2, 2))
    odd_channels = conv(14, 24, 64)
    for other in (strided, odd_channels):
        assert not patches_by_time(other, AVX2, 1.0)
        weight = np.ones(other.weight_shape, np.int8)
        with pytest.raises(CodegenError, match="no Winograd kernel"):
            pack_conv(other, AVX2, winograd(other, AVX2), weight, GemmValues())
    assert not patches_by_time(conv(1, 64, 64), AVX2, 1.0)  # one output in a patch of four
    # As measured: large weights cost more than the products they save where those are cheap.
    assert patches_by_time(conv(7, 512, 512), AVX2, 1.0)[0] != (2, 2)
    assert patches_by_time(conv(14, 256, 256), AVX2, 0.77)[0] == (4, 4)
    assert patches_by_time(conv(14, 256, 256), ISA_TABLE["x86-avxvnni"], 1.0)[0] == (4, 4)
    for size, c, name in ((7, 512, "x86-avxvnni"), (14, 256, "x86-avx512vnni")):
        assert not patches_by_time(conv(size, c, c), ISA_TABLE[name], 1.0)
    assert patches_by_time(conv(28, 128, 128), ISA_TABLE["x86-avx512vnni"], 1.0)[0] == (4, 4)


def test_the_tuner_sees_all_algorithms() -> None:
    found = {params.algorithm for params in space(conv(14, 64, 64), AVX2)}
    assert found == {"auto", "direct", *PATCHES}
    assert {p.algorithm for p in space(conv(14, 24, 64), AVX2)} == {"auto"}


@pytest.mark.parametrize("size", [7, 8, 14, 28, 56])
@pytest.mark.parametrize("batch", [1, 3])
def test_plans_cover_all_patches(size: int, batch: int) -> None:
    for co, isa, patch in itertools.product((32, 256, 512), ROWS, PATCHES.values()):
        workload = conv(size, 64, co, n=batch)
        plan = winograd_plan(workload, isa, patch)
        assert plan.rows * plan.tasks >= plan.patch_rows == -(-size // patch[0])
        assert plan.splits * plan.blocks * plan.columns >= co
        assert (plan.splits - 1) * plan.blocks * plan.columns < co
        assert sum(count * extent for _, count, extent in plan.tiles.kinds) == plan.patches


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("x86-64", "pmaddwd"),
        ("x86-avx2", "vpmaddwd"),
        ("x86-avxvnni", "vpdpwssd"),
        ("x86-avx512vnni", "vpdpwssd"),
    ],
)
@pytest.mark.parametrize(("size", "c"), [(8, 64), (14, 64), (7, 256)])
def test_the_hot_loop_does_not_spill(name: str, product: str, size: int, c: int) -> None:
    isa = ISA_TABLE[name]
    workload = conv(size, c, c)
    params = winograd(workload, isa)
    weight = np.ones(workload.weight_shape, np.int8)
    packed = pack_conv(workload, isa, params, weight, GemmValues(multiplier=1e-3))
    function = build_conv(workload, isa, params, packed, "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa))
    lines = [line.strip() for line in module.mod.inspect_source("asm").splitlines()]
    lines = [line for line in lines if not re.search(r"\.loc\b|Ltmp|\.cfi", line)]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:$", line)}
    kinds = winograd_plan(workload, isa, (4, 4)).tiles.kinds
    counts = {2 * extent for _, _, extent in kinds}
    seen = 0
    for end, line in enumerate(lines):
        jump = re.match(r"j\w+\s+(\.LBB\w+)", line)
        if jump is None or labels.get(jump.group(1), end) >= end:
            continue
        body = lines[labels[jump.group(1)] + 1 : end]
        products = sum(product in inner for inner in body)
        if not products or any(re.match(r"j\w+\s", inner) for inner in body):
            continue
        seen += 1
        assert any(products % count == 0 for count in counts)
        assert product != "vpdpwssd" or not [inner for inner in body if "vpaddd" in inner]
        assert not [inner for inner in body if "mm" in inner and "%rsp" in inner], "\n".join(body)
    assert seen >= len(kinds)
