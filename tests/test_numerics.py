# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The integer arithmetic against exact fractions and slow integer loops."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.errors import DataError, UsageError
from qcompiler.types import DType, PerAxis, PerGroup, QuantParams
from qcompiler.windows import Geometry

INT32 = st.integers(-(2**31), 2**31 - 1)
SCALES = st.floats(2.0**-30, 2.0**30, width=32)
REALS = st.floats(-(2.0**60), 2.0**60, width=32)
STORAGES = st.sampled_from([DType.UINT8, DType.INT8, DType.INT16, DType.UINT16])


def f32(value: Fraction) -> Fraction:
    """Round to the nearest float32, ties to even, in exact arithmetic (no subnormals)."""
    if value == 0:
        return Fraction(0)
    exponent = 0
    magnitude = abs(value)
    # 2**exponent <= magnitude < 2**(exponent + 1)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return round(value / unit) * unit  # round() of a Fraction ties to even


def exact(x: np.floating | float) -> Fraction:
    return Fraction(float(x))


def clamp(v: int, q: QuantParams) -> int:
    return max(q.qmin, min(q.qmax, v))


def qparams(scale: float, zero: int, storage: DType = DType.UINT8, **kw: int) -> QuantParams:
    return QuantParams(
        np.float32(scale), zero, storage, kw.get("qmin", storage.min), kw.get("qmax", storage.max)
    )


@st.composite
def any_qparams(draw: st.DrawFn, storages: st.SearchStrategy[DType] = STORAGES) -> QuantParams:
    storage = draw(storages)
    lo, hi = storage.min, storage.max
    qmin = draw(st.integers(lo, hi))
    qmax = draw(st.integers(qmin, hi))
    return qparams(draw(SCALES), draw(st.integers(lo, hi)), storage, qmin=qmin, qmax=qmax)


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


# ------------------------------------------------------------------------------ accumulators


def slow_conv(x, w, xz, wz, g: Geometry, group: int, bias):
    """Convolution by Python integers, wrapped to int32 at the end."""
    n, _, *extents = x.shape
    o = w.shape[0]
    y = np.zeros((n, o, *g.outputs), np.int32)
    per = o // group
    for index in np.ndindex(n, o, *g.outputs):
        b, out, *at = index
        acc = 0 if bias is None else int(bias[out])
        for ci, *tap in itertools.product(range(w.shape[1]), *map(range, g.kernel)):
            place = [
                a * s + t * d - p[0]
                for a, s, t, d, p in zip(at, g.strides, tap, g.dilations, g.pads, strict=True)
            ]
            if all(0 <= p < e for p, e in zip(place, extents, strict=True)):
                c = out // per * w.shape[1] + ci
                v = int(x[(b, c, *place)]) - xz
                acc += v * (int(w[(out, ci, *tap)]) - int(np.broadcast_to(wz, o)[out]))
        y[index] = (acc + 2**31) % 2**32 - 2**31
    return y


@st.composite
def conv_cases(draw: st.DrawFn):
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    small = 5 if rank < 3 else 3
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilations = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    strides = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    pads = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(rank))
    extents = tuple(
        draw(st.integers(max(1, d * (k - 1) + 1 - b - e), max(1, d * (k - 1) + 1) + small))
        for k, d, (b, e) in zip(kernel, dilations, pads, strict=True)
    )
    group = draw(st.sampled_from([1, 1, 2, 3]))
    chans = group * draw(st.integers(1, 2))
    outs = group * draw(st.integers(1, 2))
    g = Geometry(extents, kernel, strides, pads, dilations)
    return g, group, chans, outs


@given(case=conv_cases(), seed=st.integers(0, 2**32 - 1), extreme=st.booleans())
def test_conv_accumulators_equal_integer_loops(case, seed, extreme):
    g, group, chans, outs = case
    r = np.random.default_rng(seed)
    x = r.integers(0, 256, (2, chans, *g.extents)).astype(np.uint8)
    w = r.integers(-128, 128, (outs, chans // group, *g.kernel)).astype(np.int8)
    if extreme:
        x = np.where(x < 128, 0, 255).astype(np.uint8)
        w = np.where(w < 0, -128, 127).astype(np.int8)
    xz, wz = int(r.integers(0, 256)), r.integers(-128, 128, outs).astype(np.int32)
    bias = r.integers(-(2**31), 2**31, outs).astype(np.int32) if seed % 2 else None
    got = numerics.accumulate_conv(x, w, xz, wz, g, group, bias)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, slow_conv(x, w, xz, wz, g, group, bias))


@given(
    m=st.integers(1, 4),
    k=st.integers(1, 40),
    n=st.integers(1, 4),
    wide=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_matmul_accumulators_equal_integer_loops(m, k, n, wide, seed):
    r = np.random.default_rng(seed)
    dtype = np.int16 if wide else np.uint8
    info = np.iinfo(dtype)
    a = r.integers(info.min, info.max + 1, (2, m, k)).astype(dtype)
    b = r.integers(info.min, info.max + 1, (k, n)).astype(dtype)
    az, bz = int(r.integers(info.min, info.max + 1)), r.integers(info.min, info.max + 1, n)
    bias = r.integers(-(2**31), 2**31, n).astype(np.int32)
    got = numerics.accumulate_matmul(a, b, az, bz, bias)
    exactly = (a.astype(object) - az) @ (b.astype(object) - bz) + bias.astype(object)
    expected = (exactly + 2**31) % 2**32 - 2**31
    assert (got == expected).all()


def test_accumulators_stay_exact_beyond_the_float32_integers():
    # The sum of these products is odd and above 2**24: float32 could not hold it.
    k = 4097
    a = np.full((1, k), 255, np.uint8)
    b = np.full((k, 1), 127, np.int8)
    assert numerics.accumulate_matmul(a, b, 0, 0)[0, 0] == 255 * 127 * k
    a16 = np.full((1, 3), -32768, np.int16)
    b16 = np.full((3, 1), -32768, np.int16)
    assert numerics.accumulate_matmul(a16, b16, 0, 0)[0, 0] == 3 * 2**30 - 2**32


# -------------------------------------------------------------- elementwise, means, softmax


def one_code(draw: st.DrawFn, q: QuantParams) -> int:
    return draw(st.integers(q.storage.min, q.storage.max))


@given(data=st.data(), aq=any_qparams(), bq=any_qparams(), y=any_qparams(), subtract=st.booleans())
def test_add_is_the_formula_in_exact_arithmetic(data, aq, bq, y, subtract):
    a, b = one_code(data.draw, aq), one_code(data.draw, bq)
    ma = exact(np.float32(np.float64(aq.s) / np.float64(y.s)))
    mb = exact(np.float32(np.float64(bq.s) / np.float64(y.s)))
    ta, tb = f32((a - aq.z) * ma), f32((b - bq.z) * mb)
    expected = clamp(round(f32(ta - tb if subtract else ta + tb)) + y.z, y)
    arrays = np.array([a], aq.storage.numpy), aq, np.array([b], bq.storage.numpy), bq
    assert int(numerics.add(*arrays, y, subtract=subtract)[0]) == expected
    real = numerics.add(*arrays, None, subtract=subtract)
    ta, tb = f32((a - aq.z) * exact(aq.s)), f32((b - bq.z) * exact(bq.s))
    assert exact(real[0]) == f32(ta - tb if subtract else ta + tb)


@given(data=st.data(), aq=any_qparams(), bq=any_qparams(), y=any_qparams())
def test_mul_is_the_formula_in_exact_arithmetic(data, aq, bq, y):
    a, b = one_code(data.draw, aq), one_code(data.draw, bq)
    product = ((a - aq.z) * (b - bq.z) + 2**31) % 2**32 - 2**31
    m = exact(np.float32(np.float64(aq.s) * np.float64(bq.s) / np.float64(y.s)))
    expected = clamp(round(f32(f32(Fraction(product)) * m)) + y.z, y)
    got = numerics.mul(np.array([a], aq.storage.numpy), aq, np.array([b], bq.storage.numpy), bq, y)
    assert int(got[0]) == expected


def test_average_pool_counts_per_window(rng):
    x = rng.integers(0, 256, (1, 2, 5, 5)).astype(np.uint8)
    xq, y = qparams(0.3, 11), qparams(0.2, 20)
    g = Geometry((5, 5), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1))
    for include in (False, True):
        got = numerics.average_pool(x, xq, g, y, count_include_pad=include)
        for c, i, j in np.ndindex(2, 3, 3):
            rows = range(max(0, 2 * i - 1), min(5, 2 * i + 2))
            cols = range(max(0, 2 * j - 1), min(5, 2 * j + 2))
            acc = sum(int(x[0, c, p, q]) - 11 for p in rows for q in cols)
            count = 9 if include else len(rows) * len(cols)
            m = np.float32(np.float64(xq.s) / (np.float64(y.s) * count))
            expected = clamp(round(f32(Fraction(acc) * exact(m))) + 20, y)
            assert int(got[0, c, i, j]) == expected


def test_average_pool_of_nothing_but_padding_is_zero():
    x = np.full((1, 1, 1), 200, np.uint8)
    g = Geometry((1,), (1,), (1,), ((1, 1),), (1,))
    y = numerics.average_pool(x, qparams(1.0, 0), g, qparams(1.0, 5), count_include_pad=False)
    assert y.tolist() == [[[5, 205, 5]]]


def test_reduce_mean_is_one_multiplier(rng):
    x = rng.integers(-128, 128, (2, 7, 7, 3)).astype(np.int8)
    xq, y = qparams(0.05, 4, DType.INT8), qparams(0.01, 100)
    got = numerics.reduce_mean(x, xq, (1, 2), y, keepdims=False)
    m = np.float32(np.float64(xq.s) / (np.float64(y.s) * 49))
    for n, c in np.ndindex(2, 3):
        acc = sum(int(v) - 4 for v in x[n, :, :, c].reshape(-1))
        assert int(got[n, c]) == clamp(round(f32(Fraction(acc) * exact(m))) + 100, y)


def test_softmax_table_holds_the_exponentials():
    table = numerics.softmax_table(0.1)
    assert table.dtype == np.int32
    assert table[0] == 2**20
    assert table.tolist() == [round(math.exp(-0.1 * d) * 2**20) for d in range(256)]


@pytest.mark.parametrize("storage", [DType.UINT8, DType.INT8])
def test_softmax_is_the_formula_and_close_to_the_real_one(rng, storage):
    xq = qparams(0.08, storage.min + 60, storage)
    y = qparams(1 / 256, 0)
    x = rng.integers(storage.min, storage.max + 1, (4, 50)).astype(storage.numpy)
    got = numerics.softmax(x, xq, -1, y)
    table = numerics.softmax_table(xq.s)
    for row, out in zip(x, got, strict=True):
        t = [int(table[int(row.max()) - int(v)]) for v in row]
        r = f32(exact(np.float32(256.0)) / f32(Fraction(sum(t))))
        assert out.tolist() == [clamp(round(f32(f32(Fraction(v)) * r)), y) for v in t]
    reals = np.exp(numerics.dequantize(x, xq).astype(np.float64))
    reals /= reals.sum(axis=1, keepdims=True)
    assert np.abs(got / 256 - reals).max() <= 0.51 / 256 + 1e-4


def test_softmax_of_a_long_uniform_row_does_not_overflow():
    x = np.zeros((1, 5000), np.uint8)
    real = numerics.softmax(x, qparams(0.1, 0), -1, None)
    np.testing.assert_allclose(real, 1 / 5000, rtol=1e-6)


@pytest.mark.parametrize("storage", [DType.UINT8, DType.INT8, DType.INT16])
def test_layer_norm_is_the_formula_and_close_to_the_real_one(rng, storage):
    depth = 96
    x = rng.integers(storage.min, storage.max + 1, (3, depth)).astype(storage.numpy)
    x[2] = storage.max  # no variance at all
    xq, y = qparams(0.01, 3, storage), qparams(0.03, 120)
    gamma = rng.normal(size=depth).astype(np.float32)
    beta = rng.normal(size=depth).astype(np.float32)
    real = numerics.layer_norm(x, xq, gamma, beta, 1e-5, None)
    for row, out in zip(x, real, strict=True):
        c1 = sum(int(v) for v in row)
        spread = depth * sum(int(v) ** 2 for v in row) - c1 * c1
        s2 = exact(np.float32(np.float64(xq.s) ** 2 / depth**2))
        v = f32(f32(f32(Fraction(spread)) * s2) + exact(np.float32(1e-5)))
        root = np.float32(1) / np.sqrt(np.float32(float(v)))
        k = f32(exact(root) * exact(np.float32(np.float64(xq.s) / depth)))
        for j in range(depth):
            t = f32(f32(Fraction(depth * int(row[j]) - c1)) * k)
            expected = f32(f32(t * exact(gamma[j])) + exact(beta[j]))
            assert exact(out[j]) == expected
    np.testing.assert_array_equal(
        numerics.layer_norm(x, xq, gamma, beta, 1e-5, y), numerics.quantize(real, y)
    )
    f = numerics.dequantize(x, xq).astype(np.float64)
    d = f - f.mean(axis=1, keepdims=True)
    ideal = d / np.sqrt((d * d).mean(axis=1, keepdims=True) + 1e-5) * gamma + beta
    np.testing.assert_allclose(real, ideal, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", [DType.UINT8, DType.INT8])
def test_table_equals_the_function_on_every_code(storage):
    xq, y = qparams(0.05, storage.min + 128, storage), qparams(0.02, 3)
    entries = numerics.table_entries(np.tanh, xq, y)
    codes = numerics.codes(storage)
    assert len(codes) == 256
    expected = numerics.quantize(np.tanh(numerics.dequantize(codes, xq)), y)
    np.testing.assert_array_equal(numerics.lookup(codes, entries), expected)
    assert numerics.table_entries(np.tanh, xq, None).dtype == np.float32


def test_tables_of_wide_storage_are_refused():
    with pytest.raises(UsageError, match="int16 has too many values for a table"):
        numerics.codes(DType.INT16)
