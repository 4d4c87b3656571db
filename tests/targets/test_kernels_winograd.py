# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Winograd convolutions equal the integer definition, bit for bit, and are chosen by the rule."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from qcompiler.targets.kernels.winograd_plan import applies, prefers_winograd, winograd_plan

_SPEC = importlib.util.spec_from_file_location(
    "gemm_reference", Path(__file__).with_name("gemm_reference.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
reference = importlib.util.module_from_spec(_SPEC)
sys.modules["gemm_reference"] = reference
_SPEC.loader.exec_module(reference)

ROWS = [isa for isa in ISA_TABLE.values() if runnable(isa)]
AVX2 = ISA_TABLE["x86-avx2"]
Array = np.ndarray[Any, np.dtype[Any]]


def conv(
    size: int, c: int, co: int, epilogue: Epilogue | None = None, **changes: Any
) -> ConvWorkload:
    given = {"n": 1, "h": size, "w": size, "pads": (1, 1, 1, 1), **changes}
    return ConvWorkload(c=c, co=co, kh=3, kw=3, epilogue=epilogue or Epilogue("uint8"), **given)


def winograd(workload: ConvWorkload, isa: Isa) -> GemmParams:
    return replace(default_params(workload, isa), algorithm="winograd")


@given(
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
@settings(max_examples=15)
def test_winograd_is_exact(
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
    for isa in ROWS:
        params = winograd(workload, isa)
        got = reference.run(workload, isa, params, operands, weight, values)
        np.testing.assert_array_equal(got, expected, isa.name)


@pytest.mark.parametrize("sign", [127, -128])
def test_the_largest_sums_are_exact(sign: int) -> None:
    """The bound on channels is where four times the sum still fits int32."""
    workload = conv(4, 1824, 16, Epilogue("int32"))
    assert applies(workload, AVX2)
    assert not applies(conv(4, 1840, 16), AVX2)
    x = np.full(workload.a_shape, 255, np.uint8)
    weight = np.full(workload.weight_shape, sign, np.int8)
    expected = reference.conv_sums(workload, x, weight, 0)
    params = winograd(workload, AVX2)
    got = reference.run(workload, AVX2, params, [x], weight, GemmValues())
    np.testing.assert_array_equal(got, expected)


def test_packing_chooses_by_the_rule() -> None:
    rng = np.random.default_rng(0)
    workload = conv(14, 64, 64)
    weight = rng.integers(-127, 128, workload.weight_shape).astype(np.int8)
    for isa in ISA_TABLE.values():
        params = default_params(workload, isa)
        packed = pack_conv(workload, isa, params, weight, GemmValues())
        wins = isa.dot in ("none", "maddubs", "smlal")
        assert (packed.facts.dot == "winograd") == wins, isa.name
        direct = replace(params, algorithm="direct")
        assert pack_conv(workload, isa, direct, weight, GemmValues()).facts.dot != "winograd"
    strided = conv(14, 64, 64, strides=(2, 2))
    odd_channels = conv(14, 24, 64)
    for other in (strided, odd_channels):
        assert not prefers_winograd(other, AVX2, 1.0)
        weight = np.ones(other.weight_shape, np.int8)
        with pytest.raises(CodegenError, match="no Winograd kernel"):
            pack_conv(other, AVX2, winograd(other, AVX2), weight, GemmValues())
    assert not prefers_winograd(conv(1, 64, 64), AVX2, 1.0)  # one output in a patch of four
    assert not prefers_winograd(conv(7, 512, 512), AVX2, 1.0)  # weights weigh more than products
    assert prefers_winograd(conv(14, 256, 256), AVX2, 0.77)


def test_the_tuner_sees_both_algorithms() -> None:
    found = {params.algorithm for params in space(conv(14, 64, 64), AVX2)}
    assert found == {"auto", "direct", "winograd"}
    assert {p.algorithm for p in space(conv(14, 24, 64), AVX2)} == {"auto"}


@pytest.mark.parametrize("size", [7, 8, 14, 28, 56])
@pytest.mark.parametrize("batch", [1, 3])
def test_plans_cover_all_patches(size: int, batch: int) -> None:
    for co, isa in itertools.product((32, 256, 512), ROWS):
        workload = conv(size, 64, co, n=batch)
        plan = winograd_plan(workload, isa)
        assert plan.rows * plan.tasks >= plan.patch_rows == -(-size // 2)
        assert plan.splits * plan.blocks * plan.columns >= co
        assert (plan.splits - 1) * plan.blocks * plan.columns < co
        assert plan.patches >= plan.rows * plan.patch_cols


@pytest.mark.parametrize("name", ["x86-64", "x86-avx2"])
@pytest.mark.parametrize("size", [8, 14])
def test_the_hot_loop_does_not_spill(name: str, size: int) -> None:
    isa = ISA_TABLE[name]
    workload = conv(size, 64, 64)
    params = winograd(workload, isa)
    weight = np.ones(workload.weight_shape, np.int8)
    packed = pack_conv(workload, isa, params, weight, GemmValues(multiplier=1e-3))
    function = build_conv(workload, isa, params, packed, "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa))
    lines = [line.strip() for line in module.mod.inspect_source("asm").splitlines()]
    lines = [line for line in lines if not re.search(r"\.loc\b|Ltmp|\.cfi", line)]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:$", line)}
    seen = 0
    for end, line in enumerate(lines):
        jump = re.match(r"j\w+\s+(\.LBB\w+)", line)
        if jump is None or labels.get(jump.group(1), end) >= end:
            continue
        body = lines[labels[jump.group(1)] + 1 : end]
        products = sum("pmaddwd" in inner for inner in body)
        if not products or any(re.match(r"j\w+\s", inner) for inner in body):
            continue
        seen += 1
        assert products % (winograd_plan(workload, isa).mt * 2) == 0
        assert not [inner for inner in body if "mm" in inner and "%rsp" in inner], "\n".join(body)
    assert seen
