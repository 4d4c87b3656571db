# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights stored in fewer bits than they are multiplied in: every row returns the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gemm_reference as reference
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.errors import CodegenError
from qcompiler.numerics_dynamic import Per, blocked_result, dynamic_quantize, dynamic_result
from qcompiler.passes.narrow_products import group_qparams
from qcompiler.targets.isa import ISA_TABLE, Isa, runnable
from qcompiler.targets.kernels import harness
from qcompiler.targets.kernels.dynamic import DynamicQuantizeWorkload
from qcompiler.targets.kernels.dynamic import dynamic_quantize as quantizer
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
from qcompiler.targets.kernels.weight_forms import GroupedWeights

ROWS = [isa for isa in ISA_TABLE.values() if runnable(isa)]
Array = np.ndarray[Any, np.dtype[Any]]
each_row = pytest.mark.parametrize("isa", ROWS, ids=lambda isa: isa.name)


@given(
    extents=st.tuples(st.integers(1, 70), st.integers(1, 90), st.integers(1, 80)),
    transpose_b=st.booleans(),
    extreme=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=8)
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
        assert packed.facts.storage == "int4" or packed.facts.dot == "tiles"
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
    b = np.ones((8, 16), np.int8)
    params = replace(default_params(workload, isa), algorithm="direct")
    for value, storage in ((7, "int4"), (-8, "int4"), (8, "plain"), (-9, "plain")):
        b[3, 5] = value
        packed = pack_matmul(workload, isa, params, b, GemmValues())
        assert packed.facts.storage == storage


# ------------------------------------------------------------------- weights of float32 products


def grouped(w: Array, axis: int, group: int, bits: int, asymmetric: bool) -> GroupedWeights:
    """Weights in groups along `axis`, as lowering passes them to packing."""
    q = group_qparams(w, axis, group, bits, asymmetric)
    scale, zero = numerics.expanded(q, w.shape)
    return GroupedWeights(numerics.quantize(w, q), scale, zero, bits, group)


def widened(weights: Any) -> Array:
    """What the weights stand for, in float32."""
    if isinstance(weights, GroupedWeights):
        centred = weights.codes.astype(np.int32) - weights.zeros
        return np.asarray(centred.astype(np.float32) * weights.scales)
    return np.asarray(weights.astype(np.float32))


FORMS = ("half", "group8", "group4", "group8 asymmetric", "group4 asymmetric")


def held_in(form: str, w: Array, axis: int, group: int) -> Any:
    if form == "half":
        return w.astype(np.float16)
    return grouped(w, axis, group, int(form[5]), form.endswith("asymmetric"))


@given(
    rows=st.integers(1, 60),
    groups=st.integers(1, 5),
    size=st.sampled_from([8, 16, 32]),
    n=st.integers(1, 70),
    transpose_b=st.booleans(),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=8)
def test_float_products_with_narrow_weights_equal_those_with_wide_ones(
    rows: int, groups: int, size: int, n: int, transpose_b: bool, form: str, seed: int
) -> None:
    """Bit for bit: the widened weights are the same numbers, and so is the order of the sums."""
    rng = np.random.default_rng(seed)
    k = groups * size
    w = rng.standard_normal((n, k) if transpose_b else (k, n)).astype(np.float32)
    w *= rng.choice([1e-6, 1.0, 100.0], w.shape)  # subnormal halves too
    a = rng.standard_normal((rows, k)).astype(np.float32)
    weights = held_in(form, w.astype(np.float32), 1 if transpose_b else 0, size)
    workload = MatmulWorkload(
        a.shape, w.shape, Epilogue("float32"), "float32", "float32", True, False, transpose_b
    )
    values = GemmValues(rng.standard_normal(n).astype(np.float32), act_min=-1.0)
    wide = widened(weights)
    exact = a.astype(np.float64) @ (wide.T if transpose_b else wide).astype(np.float64)
    expected = np.maximum(exact + values.bias, -1)
    for isa in ROWS:
        candidates = space(workload, isa)
        params = candidates[rng.integers(len(candidates))]
        packed = pack_matmul(workload, isa, params, weights, values)
        assert packed.facts.storage == form.split()[0]
        got = reference.run(workload, isa, params, [a], weights, values)
        same = reference.run(workload, isa, params, [a], wide, values)
        np.testing.assert_array_equal(got, same, f"{isa.name} {params}")
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(exact).max() + 1e-9)


@each_row
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_with_narrow_weights(isa: Isa, form: str, kernel: int) -> None:
    rng = np.random.default_rng(kernel)
    pad = kernel // 2
    workload = ConvWorkload(
        1, 7, 7, 32, 40, kernel, kernel, Epilogue("float32"),
        pads=(pad,) * 4, a_dtype="float32",
    )  # fmt: skip
    w = rng.standard_normal(workload.weight_shape).astype(np.float32)
    x = rng.standard_normal(workload.a_shape).astype(np.float32)
    weights = held_in(form, w, 1, 16)
    params = replace(default_params(workload, isa), algorithm="direct")  # both alike
    got = reference.run(workload, isa, params, [x], weights, GemmValues())
    same = reference.run(workload, isa, params, [x], widened(weights), GemmValues())
    np.testing.assert_array_equal(got, same)
    wide = reference.conv_sums(workload, x, widened(weights), 0)
    np.testing.assert_allclose(got, wide, rtol=1e-4, atol=1e-4)


@each_row
def test_the_memory_of_narrow_weights(isa: Isa) -> None:
    workload = MatmulWorkload((4, 128), (128, 64), Epilogue("float32"), "float32", "float32")
    w = np.random.default_rng(0).standard_normal((128, 64)).astype(np.float32)
    params = default_params(workload, isa)
    count, scales = 128 * 64, 128 * 64 // 32
    sizes = {
        "half": 2 * count,
        "group8": count + 4 * scales,
        "group4": count // 2 + 4 * scales,
        "group4 asymmetric": count // 2 + 5 * scales,
    }
    for form, size in sizes.items():
        packed = pack_matmul(workload, isa, params, held_in(form, w, 0, 32), GemmValues())
        found = dict(zip(packed.names, packed.arrays, strict=True))
        held = sum(found[name].nbytes for name in ("weight", "scales", "zeros") if name in found)
        assert held == size, form


def test_weights_that_a_product_does_not_take_are_refused() -> None:
    isa = ISA_TABLE["x86-avx2"]
    w = np.ones((8, 16), np.float32)
    float_ = MatmulWorkload((4, 8), (8, 16), Epilogue("float32"), "float32", "float32")
    with pytest.raises(CodegenError, match="weights are int8, the kernel takes float32"):
        pack_matmul(float_, isa, default_params(float_, isa), w.astype(np.int8), GemmValues())
    integer = MatmulWorkload((4, 8), (8, 16), Epilogue("int32"))
    params = default_params(integer, isa)
    with pytest.raises(CodegenError, match="the kernel takes int8"):
        pack_matmul(integer, isa, params, grouped(w, 0, 8, 8, False), GemmValues())


# -------------------------------------------------------------- activations with run-time scales


def check_every_row(
    rng: np.random.Generator,
    epilogue: Epilogue,
    operands: tuple[Array, Array, Array],
    values: GemmValues,
    expected: Array,
    adds: bool,
) -> None:
    """Compare products of activations with scales, on every row, tiled anyhow.

    Args:
        rng: Chooses tilings and the residual.
        epilogue: Without a residual.
        operands: Integers, their scales, and the weights.
        values: Of the kernel.
        expected: The sums, scaled, before a residual and the clip of `values`.
        adds: Whether a residual is added.
    """
    q, scale, b = operands
    residual = []
    if adds:
        residual = [rng.standard_normal(expected.shape).astype(np.float32)]
        expected = expected + residual[0]
        epilogue = replace(epilogue, residual_dtype="float32")
    if values.act_max is not None:
        expected = np.minimum(expected, np.float32(values.act_max))
    workload = MatmulWorkload(q.shape, b.shape, epilogue, a_dtype=q.dtype.name)
    for isa in ROWS:
        candidates = space(workload, isa)
        params = candidates[rng.integers(len(candidates))]
        got = reference.run(workload, isa, params, [q, *residual, scale], b, values)
        np.testing.assert_array_equal(got, expected, f"{isa.name} {params}")


@given(
    lead=st.sampled_from([(), (2,), (3, 2)]),
    extents=st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 60)),
    per=st.sampled_from(["row", "tensor"]),
    dtype=st.sampled_from(["uint8", "int8"]),
    extras=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    narrow=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=8)
def test_products_with_row_scales_are_exact(
    lead: tuple[int, ...],
    extents: tuple[int, int, int],
    per: Per,
    dtype: str,
    extras: tuple[bool, bool, bool],
    narrow: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    m, k, n = extents
    x = rng.standard_normal((*lead, m, k)) * rng.choice([1e-3, 1, 1e3], (*lead, m, 1))
    zero_point = 128 if dtype == "uint8" else 0
    q, scale = dynamic_quantize(x.astype(np.float32), per, zero_point, np.dtype(dtype).type)
    limit = 7 if narrow else 127
    b = rng.integers(-limit, limit + 1, (k, n)).astype(np.int8)
    columns = rng.uniform(0.001, 0.1, n).astype(np.float32)
    acc = (q.astype(np.int64) - zero_point) @ b.astype(np.int64)
    expected = dynamic_result(acc.astype(np.int32), scale, columns)
    values = GemmValues(
        multiplier=columns,
        a_zero_point=zero_point,
        addend=rng.standard_normal(n).astype(np.float32) if extras[0] else None,
        act_max=0.5 if extras[2] else None,
    )
    if values.addend is not None:
        expected = expected + values.addend
    check_every_row(rng, Epilogue("float32", None, per), (q, scale, b), values, expected, extras[1])


@given(
    lead=st.sampled_from([(), (2,)]),
    extents=st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 80)),
    size=st.sampled_from([8, 16, 32, 64]),
    dtype=st.sampled_from(["uint8", "int8"]),
    bits=st.sampled_from([4, 8]),
    extras=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    extreme=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=12)
def test_products_with_scales_per_block_are_exact(
    lead: tuple[int, ...],
    extents: tuple[int, int, int],
    size: int,
    dtype: str,
    bits: int,
    extras: tuple[bool, bool, bool, bool],
    extreme: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    m, groups, n = extents
    k = groups * size
    x = rng.standard_normal((*lead, m, k)) * rng.choice([1e-3, 1, 1e3], (*lead, m, k))
    if extreme:
        x = np.sign(x)
    zero_point = 128 if dtype == "uint8" else 0
    q, scale = dynamic_quantize(
        x.astype(np.float32), "block", zero_point, np.dtype(dtype).type, size
    )
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = [least, most] if extreme else range(least, most + 1)
    b = rng.choice(np.asarray(codes, np.int8), (k, n))
    zero = rng.choice(np.asarray(codes, np.int32), (groups, n)) * int(extras[3])
    factors = rng.uniform(0.001, 0.1, (groups, n)).astype(np.float32)
    values = GemmValues(
        a_zero_point=zero_point,
        addend=rng.standard_normal(n).astype(np.float32) if extras[0] else None,
        act_max=0.5 if extras[2] else None,
        group_multiplier=np.repeat(factors, size, axis=0),
        group_zero=np.repeat(zero, size, axis=0).astype(np.int32),
    )
    expected = blocked_result(q, b, zero_point, zero, scale, factors, values.addend)
    epilogue = Epilogue("float32", None, "block", size)
    check_every_row(rng, epilogue, (q, scale, b), values, expected, extras[1])


@each_row
@pytest.mark.parametrize("per", ["row", "tensor", "block"])
@pytest.mark.parametrize("shape", [(5, 36), (3, 2, 128), (1, 4), (9, 384), (2, 1000)])
def test_quantization_at_run_time_is_exact(isa: Isa, per: Per, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(shape))
    x = rng.standard_normal(shape) * rng.choice([1e-30, 1, 1e30], (*shape[:-1], 1))
    x = x.astype(np.float32)
    if shape[0] > 2:
        x.reshape(-1)[::11] = np.nan
        x[1], x[2] = 0, np.nan
    for dtype, zero_point in (("uint8", 128), ("int8", 0)):
        run = {"row": shape[-1], "block": shape[-1] // 4, "tensor": 0}[per]
        workload = DynamicQuantizeWorkload(shape, run, dtype, zero_point)
        module = harness.build(quantizer(workload, isa), isa)
        tensors = [
            tvm.runtime.tensor(a)
            for a in (x, np.full(shape, 77, dtype), np.full(workload.scale_shape, -1, np.float32))
        ]
        module["main"](*tensors)
        q, scale = dynamic_quantize(x, per, zero_point, np.dtype(dtype).type, run)
        np.testing.assert_array_equal(tensors[2].numpy(), scale)
        np.testing.assert_array_equal(tensors[1].numpy(), q)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda e: MatmulWorkload((2, 3), (3, 2), e), None),
        (lambda e: MatmulWorkload((2, 3), (3, 2), replace(e, out_dtype="uint8")), "into float32"),
        (
            lambda e: MatmulWorkload((2, 3), (3, 2), replace(e, residual_dtype="int8")),
            "into float32",
        ),
        (lambda e: MatmulWorkload((2, 3), (3, 2), e, "float32", "float32"), "into float32"),
        (lambda e: ConvWorkload(1, 4, 4, 8, 8, 1, 1, e), "for matrix products"),
    ],
)
def test_what_row_scales_are_for(make: Any, message: str | None) -> None:
    epilogue = Epilogue("float32", None, "row")
    if message is None:
        assert make(epilogue).row_scale_shape == (2, 1)
        return
    with pytest.raises(CodegenError, match=message):
        make(epilogue)
