# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Float32 Winograd kernels are as near to the exact sums as is said, on each row that runs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import gemm_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import ISA_TABLE, Isa, runnable
from qcompiler.targets.kernels.gemm import (
    ConvWorkload,
    Epilogue,
    GemmParams,
    GemmValues,
    default_params,
    pack_conv,
    space,
)
from qcompiler.targets.kernels.winograd_float_plan import is_float_winograd

ROWS = [isa for isa in ISA_TABLE.values() if runnable(isa)]
X86 = [isa for isa in ISA_TABLE.values() if isa.architecture == "x86_64"]
AVX512 = ISA_TABLE["x86-avx512vnni"]
SIZES = {"winograd-2x2": 2e-6, "winograd-4x4": 8e-6}
"""Largest error that each is allowed, relative to the largest sum of the tensor."""
Array = np.ndarray[Any, np.dtype[Any]]


def conv(
    h: int, w: int, c: int, co: int, pads: tuple[int, int, int, int] = (1, 1, 1, 1), n: int = 1,
    residual: bool = False,
) -> ConvWorkload:  # fmt: skip
    epilogue = Epilogue("float32", "float32" if residual else None)
    return ConvWorkload(n, h, w, c, co, 3, 3, epilogue, pads=pads, a_dtype="float32")


def of_size(workload: ConvWorkload, isa: Isa, algorithm: str) -> list[GemmParams]:
    return [p for p in space(workload, isa) if p.algorithm == algorithm]


@given(
    extents=st.tuples(st.integers(5, 13), st.integers(5, 13)),
    channels=st.tuples(st.integers(16, 40), st.integers(16, 70)),
    pads=st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 3, 1), (4, 0, 0, 5)]),
    batch=st.integers(1, 2),
    with_residual=st.booleans(),
    clip=st.booleans(),
    algorithm=st.sampled_from(list(SIZES)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=8)
def test_convolution(
    extents: tuple[int, int],
    channels: tuple[int, int],
    pads: tuple[int, int, int, int],
    batch: int,
    with_residual: bool,
    clip: bool,
    algorithm: str,
    seed: int,
) -> None:
    """Odd sizes, patches over every border, columns that are no multiple of a tile."""
    rng = np.random.default_rng(seed)
    workload = conv(*extents, *channels, pads, batch, with_residual)
    x = rng.standard_normal(workload.a_shape).astype(np.float32)
    weight = rng.standard_normal(workload.weight_shape).astype(np.float32)
    bias = rng.standard_normal(workload.co).astype(np.float32)
    expected = reference.conv_sums(workload, x, weight, 0) + bias
    largest = np.abs(expected).max()
    operands = [x]
    if with_residual:
        operands.append(rng.standard_normal(workload.out_shape).astype(np.float32))
        expected = expected + operands[1]
    values = GemmValues(bias)
    if clip:
        values = GemmValues(bias, act_min=-0.5, act_max=1.5)
        expected = np.clip(expected, -0.5, 1.5)
    for isa in ROWS:
        found = of_size(workload, isa, algorithm)
        params = found[rng.integers(len(found))]
        got = reference.run(workload, isa, params, operands, weight, values)
        error = np.abs(got - expected).max()
        assert error <= SIZES[algorithm] * largest, f"{isa.name} {params}: {error / largest}"


@pytest.mark.parametrize("isa", ROWS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("algorithm", SIZES)
@pytest.mark.parametrize("n_block", [1, 99])
def test_every_task_split_gives_the_same_bits(isa: Isa, algorithm: str, n_block: int) -> None:
    """Tasks of one and of all column tiles, of unequal numbers of rows of patches."""
    rng = np.random.default_rng(3)
    workload = conv(14, 11, 24, 48, n=2)
    x = rng.standard_normal(workload.a_shape).astype(np.float32)
    weight = rng.standard_normal(workload.weight_shape).astype(np.float32)
    base = of_size(workload, isa, algorithm)[0]
    whole = replace(base, m_block=99, n_block=99)
    expected = reference.run(workload, isa, whole, [x], weight, GemmValues())
    for m_block in (1, 2, 3):
        params = replace(base, m_block=m_block, n_block=n_block)
        got = reference.run(workload, isa, params, [x], weight, GemmValues())
        np.testing.assert_array_equal(got, expected, f"{params}")


def test_error_beside_a_direct_sum() -> None:
    """What the documentation says: 2x2 is nearer to the exact sums, 4x4 within 4 times as far."""
    rng = np.random.default_rng(0)
    isa = next(isa for isa in ROWS if isa.fma or len(ROWS) == 1)
    workload = conv(12, 12, 256, 32)
    x = rng.standard_normal(workload.a_shape).astype(np.float32)
    weight = (rng.standard_normal(workload.weight_shape) / 48).astype(np.float32)
    exact = reference.conv_sums(workload, x, weight, 0)

    def error(params: GemmParams) -> float:
        got = reference.run(workload, isa, params, [x], weight, GemmValues())
        return float(np.sqrt(np.square(got - exact).mean()))

    direct = error(next(p for p in space(workload, isa) if not is_float_winograd(p)))
    assert error(of_size(workload, isa, "winograd-2x2")[0]) < direct
    assert error(of_size(workload, isa, "winograd-4x4")[0]) < 4 * direct


def test_default_choice() -> None:
    """Where patches pay: not where the transformed weights are what takes the time."""
    for isa in X86:
        assert is_float_winograd(default_params(conv(56, 56, 64, 64), isa)), isa.name
    assert not is_float_winograd(default_params(conv(7, 7, 512, 512), AVX512))
    assert not of_size(conv(56, 56, 8, 64), AVX512, "winograd-2x2")  # too few channels
    assert not of_size(replace(conv(8, 8, 32, 32), strides=(2, 2)), AVX512, "winograd-4x4")


@pytest.mark.parametrize("isa", ROWS[-1:], ids=lambda isa: isa.name)
def test_weights_in_half_precision_stay_as_they_are(isa: Isa) -> None:
    """They are kept small to be small: the kernel is the direct one, whatever the parameters."""
    rng = np.random.default_rng(5)
    workload = conv(16, 16, 32, 32)
    params = of_size(workload, isa, "winograd-4x4")[0]
    x = rng.standard_normal(workload.a_shape).astype(np.float32)
    weight = rng.standard_normal(workload.weight_shape).astype(np.float16)
    packed = pack_conv(workload, isa, params, weight, GemmValues())
    assert packed.facts.storage == "half"
    assert packed.arrays[0].nbytes == weight.nbytes
    got = reference.run(workload, isa, params, [x], weight, GemmValues())
    expected = reference.conv_sums(workload, x, weight.astype(np.float32), 0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_refusal() -> None:
    workload = replace(conv(8, 8, 32, 32), strides=(2, 2))
    params = GemmParams(16, 8, 2, 1, 1, algorithm="winograd-4x4")
    weight = np.zeros(workload.weight_shape, np.float32)
    with pytest.raises(CodegenError, match="no Winograd kernel for"):
        pack_conv(workload, AVX512, params, weight, GemmValues())


@pytest.mark.parametrize("isa", [isa for isa in X86 if isa.fma], ids=lambda isa: isa.name)
@pytest.mark.parametrize("algorithm", SIZES)
def test_hot_loop(isa: Isa, algorithm: str) -> None:
    """The loop over channels: one FMA for each accumulator, no vector on the stack."""
    import tvm

    from qcompiler.targets.isa import tvm_target
    from qcompiler.targets.kernels.gemm import build_conv

    workload = conv(56, 56, 64, 64)
    params = of_size(workload, isa, algorithm)[0]
    weight = np.ones(workload.weight_shape, np.float32)
    packed = pack_conv(workload, isa, params, weight, GemmValues())
    function = build_conv(workload, isa, params, packed, "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa))
    text = module.mod.inspect_source("asm")
    start = text.index("kernel_tile:")
    body = text[start : text.index(".Lfunc_end", start)]
    blocks = re.split(r"^\.LBB\w+:.*$", body, flags=re.M)
    loops = [block for block in blocks if "vfmadd" in block]
    assert loops
    for block in loops:
        lines = [line.strip() for line in block.splitlines()]
        fmas = [line for line in lines if line.startswith("vfmadd")]
        assert len(fmas) % (params.mt * params.nv) == 0
        assert not [line for line in lines if "mm" in line and "%rsp" in line], block
