# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The matrix kernels equal their definition, bit for bit, on every row this machine runs."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import gemm_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import ISA_TABLE, Isa, runnable
from qcompiler.targets.kernels.depth import EXACT, plan_depths
from qcompiler.targets.kernels.gemm import (
    ConvWorkload,
    Epilogue,
    GemmParams,
    GemmValues,
    MatmulWorkload,
    default_params,
    kernel_key,
    pack_conv,
    pack_matmul,
    space,
)

ROWS = [isa for isa in ISA_TABLE.values() if runnable(isa)]
AVX2 = ISA_TABLE["x86-avx2"]
Array = np.ndarray[Any, np.dtype[Any]]

each_row = pytest.mark.parametrize("isa", ROWS, ids=lambda isa: isa.name)
WEIGHTS = ("uniform", "normal", "extreme", "largest", "small", "nibbles")
ACTIVATIONS = ("uniform", "largest", "smallest")


def make_weights(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Weights whose pairs never, sometimes or always may saturate int16."""
    if kind == "normal":
        return np.clip(rng.normal(0, 38, shape).round(), -127, 127).astype(np.int8)
    if kind == "extreme":
        return rng.choice(np.asarray([-128, -127, 127], np.int8), shape)
    if kind == "largest":
        return np.full(shape, 127, np.int8)
    bound = {"uniform": 128, "nibbles": 8}.get(kind, 20)
    return rng.integers(-bound, bound, shape).astype(np.int8)


def make_activations(
    kind: str, dtype: str, shape: tuple[int, ...], rng: np.random.Generator
) -> Array:
    low, high = reference.LIMITS[dtype]
    if kind == "largest":
        return np.full(shape, high, dtype)
    if kind == "smallest":
        return np.full(shape, low, dtype)
    return rng.integers(low, high + 1, shape).astype(dtype)


@st.composite
def conv_workloads(draw: st.DrawFn, *, integer: bool) -> ConvWorkload:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 2)]))
    dilations = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)]))
    pads = draw(st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 3, 1), (2, 0, 0, 0)]))
    if integer:
        out = draw(st.sampled_from(["uint8", "int8", "int16", "int32", "float32"]))
        residuals = [None, "uint8", "int8"] if out in reference.LIMITS else [None]
        epilogue = Epilogue(out, draw(st.sampled_from(residuals)))
        a_dtype = draw(st.sampled_from(["uint8", "uint8", "int8"]))
    else:
        epilogue = Epilogue("float32", draw(st.sampled_from([None, "float32"])))
        a_dtype = "float32"
    return ConvWorkload(
        n=draw(st.integers(1, 2)),
        h=draw(st.integers((kernel[0] - 1) * dilations[0] + 1, 15)),
        w=draw(st.integers((kernel[1] - 1) * dilations[1] + 1, 18)),
        c=groups * draw(st.integers(1, 17)),
        co=groups * draw(st.integers(1, 50)),
        kh=kernel[0],
        kw=kernel[1],
        epilogue=epilogue,
        strides=draw(st.sampled_from([(1, 1), (2, 2), (1, 2)])),
        pads=pads,
        dilations=dilations,
        groups=groups,
        a_dtype=a_dtype,
    )


def some_params(
    workload: ConvWorkload | MatmulWorkload, isa: Isa, rng: np.random.Generator
) -> GemmParams:
    """The default half of the time, else another candidate."""
    candidates = space(workload, isa)
    return candidates[0 if rng.random() < 0.5 else rng.integers(len(candidates))]


def some_values(
    sums: Array, out_dtype: str, bias: Array, a_zero_point: int, rng: np.random.Generator
) -> GemmValues:
    """Multipliers that spread the sums over the output's range, with and without clamping."""
    columns = sums.shape[-1]
    spread = 1.5 * reference.LIMITS.get(out_dtype, (0, 100))[1] / max(1.0, np.abs(sums).max())
    plain = rng.random() < 0.4
    return GemmValues(
        bias=bias,
        multiplier=(rng.uniform(0.3, 1, columns) * spread).astype(np.float32),
        a_zero_point=a_zero_point,
        zero_point=0 if plain else int(rng.integers(0, 100)),
        qmin=None if plain else 3,
        qmax=None if plain else 99,
        residual_zero_point=0 if plain else int(rng.integers(0, 100)),
        residual_multiplier=float(np.float32(0.37)),
    )


@given(
    workload=conv_workloads(integer=True),
    weights=st.sampled_from(WEIGHTS),
    activations=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 2**32 - 1),
    near_int32=st.booleans(),
)
@settings(max_examples=16)
def test_integer_convolution_is_exact(
    workload: ConvWorkload, weights: str, activations: str, seed: int, near_int32: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = make_activations(activations, workload.a_dtype, workload.a_shape, rng)
    weight = make_weights(weights, workload.weight_shape, rng)
    low, high = reference.LIMITS[workload.a_dtype]
    zero_point = int(rng.integers(low, high + 1))
    bias = rng.integers(-(10**5), 10**5, workload.co).astype(np.int32)
    if near_int32:  # accumulators at both ends of int32, and past them: they wrap
        ends = np.int32([2**31 - 1, 2**31 - 2**20, -(2**31), -(2**31) + 2**20])
        bias = rng.choice(ends, workload.co)
    sums = reference.conv_sums(workload, x, weight, zero_point) + bias
    out_dtype = workload.epilogue.out_dtype
    values = some_values(sums, out_dtype, bias, zero_point, rng)
    residual = None
    if workload.epilogue.residual_dtype is not None:
        residual = rng.integers(0, 128, workload.out_shape).astype(workload.epilogue.residual_dtype)
    expected = reference.requantize(sums, out_dtype, values, residual)
    operands = [x] if residual is None else [x, residual]
    for isa in ROWS:
        params = some_params(workload, isa, rng)
        got = reference.run(workload, isa, params, operands, weight, values)
        np.testing.assert_array_equal(got, expected, f"{isa.name} {params}")


@given(workload=conv_workloads(integer=False), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8)
def test_float_convolution(workload: ConvWorkload, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(workload.a_shape).astype(np.float32)
    weight = rng.standard_normal(workload.weight_shape).astype(np.float32)
    bias = rng.standard_normal(workload.co).astype(np.float32)
    expected = reference.conv_sums(workload, x, weight, 0) + bias
    operands = [x]
    if workload.epilogue.residual_dtype is not None:
        operands.append(rng.standard_normal(workload.out_shape).astype(np.float32))
        expected = expected + operands[1]
    clip = None if rng.random() < 0.5 else 1.5
    values = GemmValues(bias, act_min=None if clip is None else -0.5, act_max=clip)
    if clip is not None:
        expected = np.clip(expected, -0.5, clip)
    for isa in ROWS:
        params = some_params(workload, isa, rng)
        got = reference.run(workload, isa, params, operands, weight, values)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


SHAPES = st.sampled_from(
    [((), ()), ((3,), (3,)), ((2, 1), (1, 3)), ((3,), (2, 3)), ((2, 2), ()), ((1,), (2,))]
)


@given(
    extents=st.tuples(st.integers(1, 30), st.integers(1, 70), st.integers(1, 60)),
    leading=SHAPES,
    constant=st.booleans(),
    transposes=st.tuples(st.booleans(), st.booleans()),
    dtypes=st.tuples(st.sampled_from(["uint8", "int8"]), st.sampled_from(["uint8", "int8"])),
    out_dtype=st.sampled_from(["uint8", "int8", "int16", "int32", "float32"]),
    with_residual=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=16)
def test_integer_matmul_is_exact(
    extents: tuple[int, int, int],
    leading: tuple[tuple[int, ...], tuple[int, ...]],
    constant: bool,
    transposes: tuple[bool, bool],
    dtypes: tuple[str, str],
    out_dtype: str,
    with_residual: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    m, k, n = extents
    transpose_a = transposes[0] and not constant
    a_shape = (*leading[0], k, m) if transpose_a else (*leading[0], m, k)
    b_lead = () if constant else leading[1]
    b_shape = (*b_lead, n, k) if transposes[1] else (*b_lead, k, n)
    a_dtype, b_dtype = dtypes[0], "int8" if constant else dtypes[1]
    residual_dtype = "int8" if with_residual and out_dtype in reference.LIMITS else None
    workload = MatmulWorkload(
        a_shape=a_shape,
        b_shape=b_shape,
        epilogue=Epilogue(out_dtype, residual_dtype),
        a_dtype=a_dtype,
        b_dtype=b_dtype,
        b_constant=constant,
        transpose_a=transpose_a,
        transpose_b=transposes[1],
    )
    a = make_activations(ACTIVATIONS[rng.integers(3)], a_dtype, a_shape, rng)
    b = make_activations(ACTIVATIONS[rng.integers(3)], b_dtype, b_shape, rng)
    low, high = reference.LIMITS[a_dtype]
    a_zero_point = int(rng.integers(low, high + 1))
    b_zero_point = 0 if constant else int(rng.choice([0, 5, 128 if b_dtype == "uint8" else -128]))
    wide_a, wide_b = a.astype(np.int64) - a_zero_point, b.astype(np.int64) - b_zero_point
    bias = rng.integers(-(10**4), 10**4, n).astype(np.int32)
    sums = (wide_a.swapaxes(-1, -2) if transpose_a else wide_a) @ (
        wide_b.swapaxes(-1, -2) if transposes[1] else wide_b
    ) + bias
    values = some_values(sums, out_dtype, bias, a_zero_point, rng)
    object.__setattr__(values, "b_zero_point", b_zero_point)
    residual = None
    if residual_dtype is not None:
        residual = make_activations("uniform", residual_dtype, workload.out_shape, rng)
    expected = reference.requantize(sums, out_dtype, values, residual)
    assert expected.shape == workload.out_shape
    operands = [a, *([] if constant else [b]), *([] if residual is None else [residual])]
    for isa in ROWS:
        params = some_params(workload, isa, rng)
        got = reference.run(workload, isa, params, operands, b if constant else None, values)
        np.testing.assert_array_equal(got, expected, f"{isa.name} {params}")


@each_row
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_float_matmul(isa: Isa, transpose_b: bool, constant: bool) -> None:
    rng = np.random.default_rng(7)
    a = rng.standard_normal((2, 9, 37)).astype(np.float32)
    b = rng.standard_normal((21, 37) if transpose_b else (37, 21)).astype(np.float32)
    workload = MatmulWorkload(
        a.shape, b.shape, Epilogue("float32"), "float32", "float32", constant, False, transpose_b
    )
    values = GemmValues(rng.standard_normal(21).astype(np.float32), act_min=0.0)
    expected = np.maximum(a @ (b.T if transpose_b else b) + values.bias, 0)
    operands = [a] if constant else [a, b]
    params = default_params(workload, isa)
    got = reference.run(workload, isa, params, operands, b if constant else None, values)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_worst_saturation_is_exact() -> None:
    """Weights and activations at their limits: 4 * 255 * 127 leaves int16 in one instruction."""
    workload = ConvWorkload(1, 6, 6, 32, 24, 3, 3, Epilogue("int32"), pads=(1, 1, 1, 1))
    x = np.full(workload.a_shape, 255, np.uint8)
    for weight in (
        np.full(workload.weight_shape, 127, np.int8),
        np.full(workload.weight_shape, -128, np.int8),
    ):
        expected = reference.conv_sums(workload, x, weight, 0)
        params = default_params(workload, AVX2)
        got = reference.run(workload, AVX2, params, [x], weight, GemmValues())
        np.testing.assert_array_equal(got, expected)


def test_residual_products_are_rounded_before_the_addition() -> None:
    """A fused multiply-add gives other integers for these numbers; the kernels must not."""
    rng = np.random.default_rng(3)
    rows, k, columns = 64, 8, 64
    a = rng.integers(0, 256, (rows, k)).astype(np.uint8)
    b = rng.integers(-127, 128, (k, columns)).astype(np.int8)
    sums = a.astype(np.int64) @ b.astype(np.int64)
    # Two products near 2**22, where float32 has steps of a quarter, nearly cancel: how each is
    # rounded decides the output.
    multiplier = np.float32(2**22 / np.abs(sums).max())
    other_multiplier = np.float32(-16384.37)
    residual = np.clip(np.rint(sums * multiplier / -other_multiplier), 0, 255).astype(np.uint8)
    values = GemmValues(
        multiplier=multiplier, residual_multiplier=float(other_multiplier), zero_point=1
    )
    expected = reference.requantize(sums, "int16", values, residual)
    exact = sums.astype(np.float64) * np.float64(multiplier)
    other = (residual.astype(np.float32) * other_multiplier).astype(np.float64)
    fused = np.clip(np.rint((exact + other).astype(np.float32)) + 1, -32768, 32767)
    assert (fused != expected).sum() > 50
    workload = MatmulWorkload(a.shape, b.shape, Epilogue("int16", "uint8"))
    for isa in ROWS:
        params = default_params(workload, isa)
        got = reference.run(workload, isa, params, [a, residual], b, values)
        np.testing.assert_array_equal(got, expected, isa.name)


@pytest.mark.parametrize("a_max", [255, 200, 127, 1])
def test_the_proof_of_no_saturation_is_tight(a_max: int) -> None:
    limits = np.asarray([-128, -127, -65, -64, -1, 0, 1, 63, 64, 65, 127], np.int8)
    for pair in itertools.product(limits, limits):
        group = np.asarray([*pair, 0, 0], np.int8).reshape(1, 1, 1, 1, 4)
        activations = np.asarray(list(itertools.product([0, a_max], repeat=2)), np.int64)
        sums = activations @ np.asarray(pair, np.int64)
        saturates = bool((sums > 32767).any() or (sums < -32768).any())
        plan = plan_depths(group, a_max)
        assert (not isinstance(plan, int) and EXACT in plan[0].blocks) == saturates


@pytest.mark.parametrize("a_max", [255, 127])
@pytest.mark.parametrize("largest", [4, 7, 15, 31, 63, 127])
def test_added_groups_stay_within_int16(a_max: int, largest: int) -> None:
    """For the worst activations of each lane: a_max on one sign's weights, 0 on the others."""
    rng = np.random.default_rng(largest)
    tiles, count = 3, 37
    weight = np.clip(rng.laplace(0, largest / 5, (tiles, count, 2, 8, 4)), -largest, largest)
    weight = weight.round().astype(np.int8)
    weight[0, :4, 0, 0] = largest
    plan = plan_depths(weight, a_max)
    for tile in range(tiles):
        if isinstance(plan, int):
            every = np.arange(count)
            blocks = {plan: [every[at : at + plan] for at in range(0, count, plan)]}
        else:
            blocks = {depth: list(rows) for depth, rows in plan[tile].blocks.items()}
        seen = np.concatenate([g for depth in blocks for g in blocks[depth]])
        assert sorted(seen) == list(range(count))
        for depth, rows in blocks.items():
            for groups in rows:
                assert len(groups) <= max(depth, 1)
                pairs = weight[tile, groups].astype(np.int64).reshape(len(groups), -1, 2)
                high = np.maximum(pairs, 0).sum((0, 2)).max() * a_max
                low = np.minimum(pairs, 0).sum((0, 2)).min() * a_max
                assert (high <= 32767 and low >= -32768) == (depth != EXACT)


def test_sums_are_deep_only_where_k_is_long_enough() -> None:
    """A tile of deep sums has fewer pixels, which few K-groups do not pay for."""
    rng = np.random.default_rng(0)
    few, many = (
        plan_depths(np.clip(rng.normal(0, 20, (2, count, 2, 8, 4)), -63, 63).astype(np.int8), 255)
        for count in (8, 256)
    )
    assert few == 1
    assert not isinstance(many, int)
    assert all(order.is_deep for order in many)


def test_one_tile_with_deep_sums_does_not_make_all_tiles_small() -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (40, 64, 2, 8, 4)).astype(np.int8)
    weight[0] = rng.integers(-15, 16, weight.shape[1:])
    alone, among = plan_depths(weight[:1], 255), plan_depths(weight, 255)
    assert alone == 8
    assert not isinstance(among, int)
    assert not any(order.is_deep for order in among)


def test_a_column_tile_is_not_one_vector_where_outputs_are_packed_in_pairs() -> None:
    workload = ConvWorkload(1, 56, 56, 24, 144, 1, 1, Epilogue("uint8"))
    assert default_params(workload, AVX2).nv == 2


def test_narrow_weights_and_activations_accumulate_deeper() -> None:
    workload = ConvWorkload(1, 8, 8, 64, 32, 1, 1, Epilogue("uint8"))
    rng = np.random.default_rng(0)
    params = default_params(workload, AVX2)
    depths = {}
    for bits, a_qmax in ((8, 255), (8, 127), (7, 255), (6, 255), (4, 255)):
        weight = rng.normal(size=workload.weight_shape)
        weight = (weight / np.abs(weight).max() * (2 ** (bits - 1) - 1)).round().astype(np.int8)
        packed = pack_conv(workload, AVX2, params, weight, GemmValues(a_qmax=a_qmax))
        depths[bits, a_qmax] = packed.facts.depths[0]
    assert depths[8, 255] <= 2
    assert depths[8, 127] == depths[7, 255] == 2
    assert depths[6, 255] in (4, 8)
    assert depths[4, 255] == 8


def test_the_activation_range_decides_how_a_layer_is_multiplied() -> None:
    workload = ConvWorkload(1, 8, 8, 512, 32, 1, 1, Epilogue("uint8"))
    rng = np.random.default_rng(0)
    params = default_params(workload, AVX2)
    kinds = {}
    for a_qmax, weights in itertools.product((127, 255), ("normal", "largest", "small")):
        weight = make_weights(weights, workload.weight_shape, rng)
        values = GemmValues(a_zero_point=100, a_qmax=a_qmax)  # far from 0: nothing to ask
        packed = pack_conv(workload, AVX2, params, weight, values)
        kinds[a_qmax, weights] = (packed.facts.dot, packed.facts.depths)
    assert kinds[127, "normal"][1][0] == 2
    assert kinds[127, "largest"] == ("maddubs", (1,))
    assert kinds[127, "small"][1][0] >= 4
    assert kinds[255, "normal"][0] == "mixed"
    assert kinds[255, "normal"][1][-1] == EXACT
    assert kinds[255, "largest"][0] == "exact"
    assert kinds[255, "small"][1][0] >= 2


def test_layers_of_one_shape_share_a_kernel() -> None:
    workload = ConvWorkload(1, 8, 8, 16, 16, 3, 3, Epilogue("uint8"), pads=(1, 1, 1, 1))
    isa = ISA_TABLE["x86-avx512vnni"]
    params = default_params(workload, isa)
    rng = np.random.default_rng(0)
    keys = set()
    for zero_point in (0, 7):
        weight = make_weights("uniform", workload.weight_shape, rng)
        values = GemmValues(multiplier=1e-3, a_zero_point=zero_point)
        packed = pack_conv(workload, isa, params, weight, values)
        keys.add(kernel_key(workload, isa, params, packed))
    assert len(keys) == 1


def test_wrong_arrays_are_refused() -> None:
    workload = ConvWorkload(1, 4, 4, 8, 8, 1, 1, Epilogue("uint8"))
    params = default_params(workload, AVX2)
    weight = np.zeros((8, 8, 1, 1), np.int8)
    with pytest.raises(CodegenError, match="weights have shape"):
        pack_conv(workload, AVX2, params, weight[:4], GemmValues())
    with pytest.raises(CodegenError, match="takes int8"):
        pack_conv(workload, AVX2, params, weight.astype(np.uint8), GemmValues())
    with pytest.raises(CodegenError, match="bias has shape"):
        pack_conv(workload, AVX2, params, weight, GemmValues(np.zeros(3, np.int32)))
    product = MatmulWorkload((2, 8), (8, 4), Epilogue("uint8"))
    with pytest.raises(CodegenError, match="no constant B"):
        pack_matmul(product, AVX2, params, None, GemmValues())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Epilogue("bool"), "out_dtype 'bool'"),
        (lambda: Epilogue("uint8", "int64"), "residual_dtype 'int64'"),
        (lambda: ConvWorkload(1, 4, 4, 6, 8, 1, 1, Epilogue("uint8"), groups=4), "do not divide"),
        (lambda: ConvWorkload(1, 2, 2, 4, 4, 3, 3, Epilogue("uint8")), "larger than the padded"),
        (lambda: ConvWorkload(0, 2, 2, 4, 4, 1, 1, Epilogue("uint8")), "must be >= 1"),
        (lambda: MatmulWorkload((2, 3), (4, 2), Epilogue("uint8")), "inner dimensions"),
        (lambda: MatmulWorkload((2,), (2, 2), Epilogue("uint8")), "rank >= 2"),
        (lambda: MatmulWorkload((2, 3), (3, 2), Epilogue("float32"), "float32"), "by int8"),
        (lambda: MatmulWorkload((2, 3), (1, 3, 2), Epilogue("uint8")), "rank 2"),
        (lambda: MatmulWorkload((2, 3), (3, 2), Epilogue("uint8"), "uint8", "uint8"), "int8;"),
        (lambda: MatmulWorkload((3, 2), (3, 2), Epilogue("uint8"), transpose_a=True), "operand"),
        (lambda: MatmulWorkload((2, 3), (3, 2), Epilogue("uint8"), "int16"), "activation dtype"),
        (
            lambda: MatmulWorkload((2, 3), (3, 2), Epilogue("uint8"), "float32", "float32"),
            "give float32",
        ),
        (lambda: MatmulWorkload((2, 3), (3, 2), Epilogue("uint8", "float32")), "cannot be added"),
        (lambda: MatmulWorkload((2, 3), (3, 2), Epilogue("int32", "uint8")), "requantized output"),
    ],
)
def test_impossible_workloads_are_refused(make: Any, message: str) -> None:
    with pytest.raises(CodegenError, match=message):
        make()


_GUARDED = """
    import ctypes, mmap, sys
    import numpy as np, tvm
    sys.path.insert(0, sys.argv[1])
    import gemm_reference as reference
    from qcompiler.targets.isa import ISA_TABLE, runnable
    from qcompiler.targets.kernels.gemm import *

    libc = ctypes.CDLL(None, use_errno=True)

    def at_page_end(array):
        size = (array.nbytes + 4095) // 4096 * 4096
        area = mmap.mmap(-1, size + 4096)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert libc.mprotect(ctypes.c_void_p(base + size), 4096, 0) == 0
        start = size - array.nbytes
        view = np.frombuffer(area, array.dtype, array.size, start).reshape(array.shape)
        view[...] = array
        keep.append(area)
        return tvm.runtime.from_dlpack(view)

    keep = []
    workloads = [
        ConvWorkload(1, 8, 8, 7, 23, 3, 3, Epilogue("uint8"), pads=(1, 1, 1, 1)),
        ConvWorkload(1, 8, 8, 8, 24, 1, 1, Epilogue("uint8", "uint8")),
        ConvWorkload(1, 8, 8, 72, 24, 1, 1, Epilogue("uint8", "uint8")),
        ConvWorkload(1, 18, 18, 16, 16, 3, 3, Epilogue("uint8")),
        ConvWorkload(1, 8, 8, 16, 16, 3, 3, Epilogue("uint8"), (2, 2), (1, 1, 1, 1)),
        ConvWorkload(1, 8, 8, 3, 16, 3, 3, Epilogue("uint8")),
        ConvWorkload(1, 8, 8, 3, 16, 3, 3, Epilogue("float32"), a_dtype="float32"),
        MatmulWorkload((64, 7), (7, 5), Epilogue("uint8")),
        MatmulWorkload((64, 7), (7, 64), Epilogue("uint8"), b_constant=False),
        MatmulWorkload((64, 19), (64, 19), Epilogue("uint8"), b_constant=False, transpose_b=True),
    ]
    rng = np.random.default_rng(0)
    for name in sys.argv[2:]:
        isa = ISA_TABLE[name]
        assert runnable(isa)  # asks for the registers of AMX, too
        for work in workloads:
            is_conv = isinstance(work, ConvWorkload)
            def data(shape, dtype):
                return (rng.standard_normal(shape) * 30).astype("int8").view("uint8").astype(
                    dtype) if dtype == "float32" else rng.integers(0, 127, shape).astype(dtype)
            constant = is_conv or work.b_constant
            float_ = work.a_dtype == "float32"
            weight = data(work.weight_shape if is_conv else work.b_shape,
                          "float32" if float_ else "int8")
            module, packed = reference.build(
                work, isa, default_params(work, isa), weight if constant else None, GemmValues())
            arrays = [data(work.a_shape, work.a_dtype)]
            if not constant:
                arrays.append(weight)
            if work.epilogue.residual_dtype:
                arrays.append(data(work.out_shape, "uint8"))
            out = np.zeros(work.out_shape, work.epilogue.out_dtype)
            assert all(a.nbytes % 64 == 0 for a in (*arrays, out)), work
            module["kernel"](*map(at_page_end, arrays), *map(tvm.runtime.tensor, packed),
                             at_page_end(out))
    print("in bounds")
"""


def test_no_access_leaves_the_operands() -> None:
    """Operands end at an unmapped page: one byte too far is a segmentation fault."""
    arguments = [str(Path(__file__).parent), *(isa.name for isa in ROWS)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_GUARDED), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "in bounds" in done.stdout
