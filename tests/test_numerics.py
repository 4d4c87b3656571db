# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Grids, multipliers and requantization against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from exact_arithmetic import SCALES, STORAGES, any_qparams, clamp, exact, f32, qparams
from hypothesis import example, given
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.errors import DataError, UsageError
from qcompiler.types import DType, PerAxis, PerGroup, QuantParams

INT32 = st.integers(-(2**31), 2**31 - 1)
REALS = st.floats(-(2.0**60), 2.0**60, width=32)


# ------------------------------------------------------------------------- choose_qparams


@pytest.mark.parametrize(
    ("storage", "bits", "narrow", "expected"),
    [
        (DType.UINT8, None, False, (0, 255)),
        (DType.UINT8, 7, False, (0, 127)),
        (DType.INT8, None, False, (-128, 127)),
        (DType.INT8, None, True, (-127, 127)),
        (DType.INT8, 4, False, (-8, 7)),
        (DType.INT8, 7, True, (-63, 63)),
        (DType.INT4, None, True, (-7, 7)),
        (DType.UINT16, 12, True, (1, 4095)),
    ],
)
def test_storage_range(storage, bits, narrow, expected):
    assert numerics.storage_range(storage, bits, narrow_range=narrow) == expected


def test_storage_range_refuses_bits_wider_than_the_storage():
    with pytest.raises(UsageError, match="9-bit integers do not fit the storage uint8"):
        numerics.storage_range(DType.UINT8, 9)


@given(
    lo=REALS,
    hi=REALS,
    storage=STORAGES,
    scheme=st.sampled_from(["symmetric", "asymmetric"]),
    narrow=st.booleans(),
)
@example(lo=0.0, hi=0.0, storage=DType.UINT8, scheme="asymmetric", narrow=False)
@example(lo=0.0, hi=1e-45, storage=DType.INT8, scheme="symmetric", narrow=True)
@example(lo=-3e38, hi=3e38, storage=DType.UINT8, scheme="asymmetric", narrow=False)
def test_chosen_grid_covers_the_range_and_holds_zero(lo, hi, storage, scheme, narrow):
    lo, hi = min(lo, hi), max(lo, hi)
    q = numerics.choose_qparams(lo, hi, storage=storage, scheme=scheme, narrow_range=narrow)
    assert q.scale.dtype == np.float32
    assert 0 < q.s < math.inf
    assert q.qmin <= q.z <= q.qmax
    assert numerics.fake_quantize(np.zeros(1, np.float32), q)[0] == 0.0
    # The ends lie within half a step (and the rounding of the scale) of the grid's ends.
    slack = Fraction(1, 2) + Fraction(1, 64)
    step = exact(q.s)
    assert (q.qmin - q.z - slack) * step <= exact(min(lo, 0.0))
    assert exact(max(hi, 0.0)) <= (q.qmax - q.z + slack) * step
    if scheme == "symmetric":
        assert q.z == (0 if storage.min else (q.qmin + q.qmax + 1) // 2)


def test_chosen_scale_of_a_range_of_zeros_is_one():
    q = numerics.choose_qparams(0.0, 0.0)
    assert (q.s, q.z) == (1.0, 0)


@pytest.mark.parametrize(("lo", "hi"), [(math.nan, 1.0), (0.0, math.inf), (-math.inf, 0.0)])
def test_choose_refuses_nan_and_infinity(lo, hi):
    with pytest.raises(DataError, match="the range has NaN or infinity"):
        numerics.choose_qparams(lo, hi)


def test_choose_refuses_a_reversed_range():
    with pytest.raises(DataError, match=r"lower bound 2\.0 exceeds upper bound 1\.0"):
        numerics.choose_qparams(2.0, 1.0)


def test_weight_scales_per_axis_are_the_extremes_of_each_channel(rng):
    w = rng.normal(size=(5, 3, 2, 2)).astype(np.float32)
    w[2] = 0
    q = numerics.choose_weight_qparams(w, axis=0)
    top = np.abs(w).reshape(5, -1).max(axis=1)
    top[2] = 127
    np.testing.assert_array_equal(q.scale, (top.astype(np.float64) / 127).astype(np.float32))
    assert q.granularity == PerAxis(0)
    assert q.is_symmetric
    assert (q.qmin, q.qmax) == (-127, 127)
    codes = numerics.quantize(w, q)
    assert np.abs(codes.reshape(5, -1)).max(axis=1).tolist() == [127, 127, 0, 127, 127]


def test_weight_scales_per_group_quantize_each_block_by_itself(rng):
    w = rng.normal(size=(4, 6)).astype(np.float32) * np.repeat([1.0, 50.0], 3).astype(np.float32)
    q = numerics.choose_weight_qparams(w, axis=1, group_size=3, bits=4)
    assert q.granularity == PerGroup(1, 3)
    assert q.scale.shape == (4, 2)
    codes = numerics.quantize(w, q)
    assert (np.abs(codes.reshape(4, 2, 3)).max(axis=2) == 7).all()
    error = np.abs(numerics.dequantize(codes, q) - w).reshape(4, 2, 3)
    assert (error <= q.scale[:, :, None] * np.float32(0.5001)).all()


def test_weight_groups_must_divide_the_axis():
    with pytest.raises(UsageError, match="groups of 4 do not divide the extent 6"):
        numerics.choose_weight_qparams(np.zeros((2, 6), np.float32), axis=1, group_size=4)


def test_weights_without_elements_are_refused():
    with pytest.raises(DataError, match="no elements"):
        numerics.choose_weight_qparams(np.zeros((0, 6), np.float32))


def test_least_weight_scale_keeps_the_bias_of_a_dead_channel_in_int32():
    w = np.array([[1e-30, 0.0], [0.5, -1.0]], np.float32)
    bias = np.array([3.0, -2.0], np.float32)
    naive = numerics.choose_weight_qparams(w)
    assert numerics.quantize_bias(bias, 0.02, naive.scale).clamped == (0,)
    q = numerics.choose_weight_qparams(w, least_scale=numerics.least_weight_scale(bias, 0.02))
    fitted = numerics.quantize_bias(bias, 0.02, q.scale)
    assert fitted.clamped == ()
    reals = fitted.q.astype(np.float64) * 0.02 * q.scale
    np.testing.assert_allclose(reals, bias, rtol=1e-6)


# -------------------------------------------------------------------- quantize, dequantize


@given(x=REALS, q=any_qparams())
@example(x=2.5, q=qparams(1.0, 0))
@example(x=3.5, q=qparams(1.0, 0))
@example(x=-0.5, q=qparams(1.0, 128))
def test_quantize_is_the_formula_in_exact_arithmetic(x, q):
    expected = clamp(round(f32(exact(x) / exact(q.s))) + q.z, q)
    got = numerics.quantize(np.array([x], np.float32), q)
    assert got.dtype == q.storage.numpy
    assert int(got[0]) == expected


@given(q=any_qparams(), data=st.data())
def test_dequantize_is_the_formula_in_exact_arithmetic(q, data):
    code = data.draw(st.integers(q.storage.min, q.storage.max))
    got = numerics.dequantize(np.array([code], q.storage.numpy), q)
    assert got.dtype == np.float32
    assert exact(got[0]) == f32(Fraction(code - q.z) * exact(q.s))


@given(x=st.floats(-100, 100, width=32), lo=st.floats(-50, 0), hi=st.floats(0, 50))
def test_quantization_error_is_half_a_step_inside_the_range(x, lo, hi):
    q = numerics.choose_qparams(lo, hi)
    x32 = np.array([x], np.float32)
    code = int(numerics.quantize(x32, q)[0])
    if q.qmin < code < q.qmax:
        error = abs(exact(numerics.dequantize(np.array([code], np.uint8), q)[0]) - exact(x32[0]))
        assert error <= exact(q.s) * (Fraction(1, 2) + Fraction(1, 2**14))
    elif code == q.qmin:
        assert x <= (q.qmin - q.z + 0.5001) * q.s
    else:
        assert x >= (q.qmax - q.z - 0.5001) * q.s


@given(q=any_qparams())
def test_codes_survive_a_round_trip(q):
    codes = np.arange(q.qmin, q.qmax + 1)[:: max(1, (q.qmax - q.qmin) // 300)]
    codes = codes.astype(q.storage.numpy)
    np.testing.assert_array_equal(numerics.quantize(numerics.dequantize(codes, q), q), codes)


def test_quantize_saturates_at_infinity_and_maps_nan_to_qmin():
    q = qparams(0.1, 10, qmin=3, qmax=200)
    x = np.array([np.inf, -np.inf, np.nan, 1e38, -1e38], np.float32)
    assert numerics.quantize(x, q).tolist() == [200, 3, 3, 200, 3]


def test_quantize_to_int32_saturates_exactly():
    q = qparams(1.0, 0, DType.INT32)
    x = np.array([2.0**31, -(2.0**31), 2.0**31 - 128, np.inf], np.float32)
    expected = [2**31 - 1, -(2**31), 2**31 - 128, 2**31 - 1]
    assert numerics.quantize(x, q).tolist() == expected


def test_per_axis_parameters_apply_along_their_axis(rng):
    q = QuantParams(
        np.array([0.5, 2.0], np.float32), np.array([0, 3]), DType.INT8, -128, 127, PerAxis(1)
    )
    x = rng.normal(size=(3, 2, 4)).astype(np.float32) * 20
    got = numerics.quantize(x, q)
    for channel in range(2):
        one = qparams(float(q.scale[channel]), int(q.zero_point[channel]), DType.INT8)
        np.testing.assert_array_equal(got[:, channel], numerics.quantize(x[:, channel], one))
    reals = numerics.dequantize(got, q)
    assert reals.shape == x.shape


# ------------------------------------------------------------------------------- multipliers


@given(a=SCALES, b=SCALES, y=SCALES)
def test_multiplier_rounds_float64_once(a, b, y):
    got = numerics.multiplier(np.float32(a), np.float32(b), over=np.float32(y))
    assert got.dtype == np.float32
    assert float(got) == float(np.float32(float(a) * float(b) / float(y)))


@given(m=st.floats(2.0**-60, 2.0**30))
@example(m=1.0 - 2.0**-53)
@example(m=0.5)
def test_dyadic_multiplier_is_within_half_a_unit(m):
    m_int, shift = numerics.dyadic(m)
    assert 2**30 <= int(m_int) < 2**31
    approx = Fraction(int(m_int)) / Fraction(2) ** int(shift)
    assert abs(approx - exact(m)) <= exact(m) / 2**31


@given(acc=INT32, m=st.floats(2.0**-45, 2.0**20))
@example(acc=-(2**31), m=0.5)
@example(acc=-1, m=0.5)
@example(acc=1, m=0.5)
@example(acc=2**31 - 1, m=2.0**-40)
def test_dyadic_rounding_is_half_up_and_happens_once(acc, m):
    m_int, shift = numerics.dyadic(m)
    got = numerics.round_dyadic(np.array([acc], np.int32), m_int, shift)
    product = Fraction(acc * int(m_int)) / Fraction(2) ** int(shift)
    assert int(got[0]) == math.floor(product + Fraction(1, 2))


@pytest.mark.parametrize("m", [0.0, -1.0, 2.0**31, math.nan])
def test_dyadic_refuses_multipliers_out_of_range(m):
    with pytest.raises(UsageError, match="dyadic multipliers"):
        numerics.dyadic(m)


# --------------------------------------------------------------------------------- requantize


@given(acc=INT32, scale=st.floats(2.0**-40, 2.0**10), q=any_qparams())
@example(acc=2**31 - 1, scale=1.0, q=qparams(1.0, 128))
@example(acc=-(2**31), scale=1.0, q=qparams(1.0, 128))
@example(acc=3, scale=0.5, q=qparams(1.0, 0))
@example(acc=5, scale=0.5, q=qparams(1.0, 0))
def test_requantize_is_the_formula_in_exact_arithmetic(acc, scale, q):
    m = exact(np.float32(np.float64(scale) / np.float64(q.s)))
    expected = clamp(round(f32(f32(Fraction(acc)) * m)) + q.z, q)
    got = numerics.requantize(np.array([acc], np.int32), np.float64(scale), q)
    assert got.dtype == q.storage.numpy
    assert int(got[0]) == expected


@given(acc=INT32, r=st.integers(0, 255), scale=SCALES, target=any_qparams(), other=any_qparams())
def test_residual_is_two_products_and_one_add_each_rounded(acc, r, scale, target, other):
    other = qparams(other.s, 7)
    m = exact(np.float32(np.float64(scale) / np.float64(target.s)))
    mr = exact(np.float32(np.float64(other.s) / np.float64(target.s)))
    total = f32(f32(f32(Fraction(acc)) * m) + f32(f32(Fraction(r - 7)) * mr))
    residual = numerics.Residual(np.array([r], np.uint8), other)
    got = numerics.requantize(
        np.array([acc], np.int32), np.float64(scale), target, residual=residual
    )
    assert int(got[0]) == clamp(round(total) + target.z, target)


@pytest.mark.parametrize(
    ("scale", "residual_scale", "acc", "r"),
    [
        (0.009274039417505264, 1.2479815483093262, 14227, 102),
        (0.006283430848270655, 0.9970531463623047, 15401, 99),
        (0.018971405923366547, 1.780444860458374, -16383, 206),
        (0.00406650872901082, 1.8181557655334473, 7970, 45),
    ],
)
def test_residual_is_not_contracted_to_a_fused_multiply_add(scale, residual_scale, acc, r):
    target, other = qparams(1.0, 0), qparams(residual_scale, 7)
    product = Fraction(acc) * exact(np.float32(scale))
    branch = f32(Fraction(r - 7) * exact(np.float32(residual_scale)))
    separate, fused = round(f32(f32(product) + branch)), round(f32(product + branch))
    assert separate != fused  # the values tell both apart
    residual = numerics.Residual(np.array([r], np.uint8), other)
    got = numerics.requantize(np.array([acc], np.int32), scale, target, residual=residual)
    assert got.tolist() == [separate]


@given(
    acc=INT32,
    r=st.integers(0, 255),
    scale=st.floats(2.0**-20, 2.0**-5),
    target=any_qparams(),
)
def test_dyadic_requantize_rounds_each_branch_by_itself(acc, r, scale, target):
    target = qparams(0.25, target.z, target.storage, qmin=target.qmin, qmax=target.qmax)
    other = qparams(0.125, 7)

    def branch(value: int, m: float) -> int:
        m_int, shift = numerics.dyadic(m)
        product = Fraction(value * int(m_int)) / Fraction(2) ** int(shift)
        return math.floor(product + Fraction(1, 2))

    total = branch(acc, scale / target.s) + branch(r - 7, other.s / target.s)
    got = numerics.requantize(
        np.array([acc], np.int32),
        scale,
        target,
        residual=numerics.Residual(np.array([r], np.uint8), other),
        mode="dyadic",
    )
    assert int(got[0]) == clamp(total + target.z, target)


def test_float_result_keeps_the_product(rng):
    acc = rng.integers(-(2**31), 2**31, 100).astype(np.int32)
    got = numerics.requantize(acc, np.float64(0.3), None)
    np.testing.assert_array_equal(got, acc.astype(np.float32) * np.float32(0.3))


def test_float_result_refuses_residual_and_dyadic():
    acc = np.zeros(1, np.int32)
    residual = numerics.Residual(np.zeros(1, np.uint8), qparams(1.0, 0))
    with pytest.raises(UsageError, match="no residual and no dyadic"):
        numerics.requantize(acc, 1.0, None, residual=residual)
    with pytest.raises(UsageError, match="no residual and no dyadic"):
        numerics.requantize(acc, 1.0, None, mode="dyadic")


@given(source=any_qparams(), target=any_qparams(), data=st.data())
def test_rescale_is_requantize_of_the_centred_code(source, target, data):
    code = data.draw(st.integers(source.storage.min, source.storage.max))
    m = exact(np.float32(np.float64(source.s) / np.float64(target.s)))
    expected = clamp(round(f32(Fraction(code - source.z) * m)) + target.z, target)
    got = numerics.rescale(np.array([code], source.storage.numpy), source, target)
    assert int(got[0]) == expected


def test_u8_and_s8_are_one_grid_shifted_by_128(rng):
    u = rng.integers(0, 256, 200).astype(np.uint8)
    s = numerics.rescale(u, qparams(0.1, 100), qparams(0.1, -28, DType.INT8))
    np.testing.assert_array_equal(s, (u.astype(np.int32) - 128).astype(np.int8))


@given(bias=st.floats(-1e6, 1e6, width=32), sx=SCALES, sw=SCALES)
def test_bias_is_rounded_in_units_of_both_scales(bias, sx, sw):
    value = Fraction(float(np.float64(bias) / (np.float64(sx) * np.float64(sw))))
    got = numerics.quantize_bias(np.array([bias], np.float32), sx, np.array([sw], np.float32))
    expected = round(value)
    assert got.q.dtype == np.int32
    assert int(got.q[0]) == max(-(2**31), min(2**31 - 1, expected))
    assert got.clamped == ((0,) if not -(2**31) <= expected < 2**31 else ())
