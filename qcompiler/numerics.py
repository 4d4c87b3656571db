# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The integer arithmetic of qcompiler: what every quantized operator computes, bit for bit.

Pure numpy, no graph. Rules that hold throughout:

- Single-precision steps are IEEE 754, round to nearest even, each operation rounded separately
  (never a fused multiply-add).
- Multipliers are computed in float64 and rounded once to float32.
- `rint` rounds ties to even. Accumulators are int32 in two's complement.
- A quantizer maps NaN to `qmin`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qcompiler.errors import DataError, UsageError
from qcompiler.types import (
    Array,
    DType,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    QuantParams,
    Shape,
)
from qcompiler.windows import Geometry, correlate, counts, padded, taps

Scheme = Literal["symmetric", "asymmetric"]
RequantizeMode = Literal["float32", "dyadic"]

_F32_EXACT = 1 << 24  # integers up to here are exact in float32, whatever the order of summation
_F64_EXACT = 1 << 53

MIN_SCALE = float(np.finfo(np.float32).tiny)
"""Least scale ever chosen: a smaller one would be subnormal, and kernels may flush it to zero."""

SOFTMAX_BITS = 20
"""Fraction bits of the exponential table of `softmax`."""


# ----------------------------------------------------------------------- choosing parameters


def storage_range(
    storage: DType, bits: int | None = None, *, narrow_range: bool = False
) -> tuple[int, int]:
    """Return (qmin, qmax) of `bits`-bit integers held in a storage dtype.

    Args:
        storage: Integer dtype of the stored values.
        bits: Width in use; default: all of the storage.
        narrow_range: Leave out the least value, so that a signed range is symmetric.

    Raises:
        UsageError: The width does not fit the storage.
    """
    bits = storage.bits if bits is None else bits
    if not storage.is_integer or not 2 <= bits <= storage.bits:
        raise UsageError(f"{bits}-bit integers do not fit the storage {storage.value}")
    lo, hi = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if storage.min else (0, (1 << bits) - 1)
    return lo + int(narrow_range), hi


def choose_qparams(
    lo: Any,
    hi: Any,
    *,
    storage: DType = DType.UINT8,
    scheme: Scheme = "asymmetric",
    bits: int | None = None,
    narrow_range: bool = False,
    granularity: Granularity | None = None,
    least_scale: Any = 0.0,
) -> QuantParams:
    """Choose scale and zero point so that [lo, hi] is covered and 0.0 is represented exactly.

    symmetric: scale = max(|lo|, |hi|) / (qmax - zero_point), zero_point = middle of the range.
    asymmetric: scale = (hi' - lo') / (qmax - qmin) with the range widened to hold 0,
    zero_point = rint(qmin - lo' / scale). A range that holds nothing but 0 gets scale 1.

    Args:
        lo: Least real; a number, or one per index for PerAxis and PerGroup.
        hi: Greatest real, of the same shape.
        storage: Integer dtype of the stored values.
        scheme: Where the zero point lies.
        bits: Width in use; default: all of the storage.
        narrow_range: Leave out the least stored value.
        granularity: How `lo` and `hi` map to elements; default PerTensor.
        least_scale: Lower bound of the scale (see `least_weight_scale`).

    Raises:
        DataError: A bound is NaN or infinite, or lo > hi.
        UsageError: The width does not fit the storage.
    """
    lo64, hi64 = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
    if not (np.isfinite(lo64).all() and np.isfinite(hi64).all()):
        raise DataError("cannot choose a scale: the range has NaN or infinity")
    if (lo64 > hi64).any():
        raise DataError(f"cannot choose a scale: lower bound {lo} exceeds upper bound {hi}")
    qmin, qmax = storage_range(storage, bits, narrow_range=narrow_range)
    lo64, hi64 = np.minimum(lo64, 0.0), np.maximum(hi64, 0.0)
    if scheme == "symmetric":
        middle = 0 if storage.min else (qmin + qmax + 1) // 2
        span = np.maximum(-lo64, hi64) / (qmax - middle)
    else:
        span = (hi64 - lo64) / (qmax - qmin)
    span = np.where(span < MIN_SCALE, np.where(span > 0, MIN_SCALE, 1.0), span)
    # A range near the end of float32 still needs a finite scale.
    span = np.minimum(np.maximum(span, least_scale), float(np.finfo(np.float32).max))
    scale = span.astype(np.float32)
    if scheme == "symmetric":
        zero_point = np.full(scale.shape, middle, np.int32)
    else:
        z = np.rint(qmin - lo64 / scale.astype(np.float64))
        zero_point = np.clip(z, qmin, qmax).astype(np.int32)
    return QuantParams(scale, zero_point, storage, qmin, qmax, granularity or PerTensor())


def choose_weight_qparams(
    w: Array,
    *,
    axis: int | None = 0,
    group_size: int | None = None,
    storage: DType = DType.INT8,
    bits: int | None = None,
    scheme: Scheme = "symmetric",
    narrow_range: bool = True,
    least_scale: Any = 0.0,
) -> QuantParams:
    """Choose parameters from the elements of a weight tensor.

    Args:
        w: Weights.
        axis: One scale per index of this axis; None: one scale in all.
        group_size: One scale per this many consecutive elements along `axis` instead.
        storage: Integer dtype of the stored weights.
        bits: Width in use; default: all of the storage.
        scheme: Where the zero point lies.
        narrow_range: Leave out the least stored value (-128), so that |q| <= qmax.
        least_scale: Lower bound of the scale, a number or one per index of `axis`.

    Raises:
        DataError: A weight is NaN or infinite.
        UsageError: The group size does not divide the extent of the axis.
    """
    granularity: Granularity
    if axis is None:
        granularity, blocks, over = PerTensor(), w, tuple(range(w.ndim))
    elif group_size is None:
        granularity, blocks = PerAxis(axis), w
        over = tuple(i for i in range(w.ndim) if i != axis)
    else:
        if group_size < 1 or w.shape[axis] % group_size:
            raise UsageError(f"groups of {group_size} do not divide the extent {w.shape[axis]}")
        granularity = PerGroup(axis, group_size)
        split = (w.shape[axis] // group_size, group_size)
        blocks, over = w.reshape(*w.shape[:axis], *split, *w.shape[axis + 1 :]), (axis + 1,)
    if not w.size:
        raise DataError("cannot choose a scale: the weight tensor has no elements")
    return choose_qparams(
        blocks.min(axis=over),
        blocks.max(axis=over),
        storage=storage,
        scheme=scheme,
        bits=bits,
        narrow_range=narrow_range,
        granularity=granularity,
        least_scale=least_scale,
    )


def least_weight_scale(bias: Array, input_scale: float) -> Array:
    """Return the least weight scale per output channel with which the bias fits int32.

    A channel whose weights are all (nearly) zero would get so small a scale that
    bias / (input_scale * scale) overflows. Half of the int32 range is left to the products.
    """
    return np.abs(np.asarray(bias, np.float64)) / (float(input_scale) * float(1 << 30))


# ------------------------------------------------------------------- quantize and dequantize


def expanded(qparams: QuantParams, shape: Shape) -> tuple[Array, Array]:
    """Return scale (float32) and zero point (int32) that broadcast against a tensor's shape."""
    g = qparams.granularity
    return spread_out(qparams.scale, g, shape), spread_out(qparams.zero_point, g, shape)


def spread_out(values: Array, granularity: Granularity, shape: Shape) -> Array:
    """Return a value per tensor, index or group so that it broadcasts against a tensor's shape."""
    if isinstance(granularity, PerTensor):
        return values
    axis = granularity.axis % len(shape)
    if isinstance(granularity, PerAxis):
        return values.reshape(tuple(-1 if i == axis else 1 for i in range(len(shape))))
    every = np.arange(shape[axis]) // granularity.group_size  # the last group may be shorter
    return np.asarray(np.take(values, every, axis=axis))


def _clamp_to_storage(t: Array, zero_point: Array, q: QuantParams) -> Array:
    """Return clamp(t + zero_point) for integral (or infinite, or NaN) float values `t`.

    Clamping before adding the zero point is the same and keeps every step exact.
    """
    wide = t if q.storage.bits <= 16 else t.astype(np.float64)
    kind = wide.dtype.type
    lo = (np.int64(q.qmin) - zero_point).astype(kind)
    hi = (np.int64(q.qmax) - zero_point).astype(kind)
    # fmax and fmin ignore NaN, so that NaN becomes the lower bound.
    wide = np.fmin(np.fmax(wide, lo), hi)
    if q.storage.bits <= 16:
        return np.asarray(wide.astype(np.int32) + zero_point).astype(q.storage.numpy)
    return np.asarray(wide.astype(np.int64) + zero_point).astype(q.storage.numpy)


def quantize(x: Array, qparams: QuantParams) -> Array:
    """Return clamp(rint(x / scale) + zero_point) in the storage dtype.

    The division is float32. Source: ONNX QuantizeLinear.
    """
    x = np.asarray(x, np.float32)
    scale, zero_point = expanded(qparams, x.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity clamps, NaN maps to qmin
        return _clamp_to_storage(np.rint(x / scale), zero_point, qparams)


def dequantize(q: Array, qparams: QuantParams) -> Array:
    """Return float32(q - zero_point) * scale. Source: ONNX DequantizeLinear."""
    scale, zero_point = expanded(qparams, q.shape)
    return np.asarray(centred(q, zero_point).astype(np.float32) * scale)


def fake_quantize(x: Array, qparams: QuantParams) -> Array:
    """Return the real values that the quantized tensor stands for (float32)."""
    return dequantize(quantize(x, qparams), qparams)


def centred(q: Array, zero_point: Any) -> Array:
    """Return q - zero_point as integers wide enough (int32; int64 for 32-bit storage)."""
    wide = np.int64 if q.dtype.itemsize >= 4 else np.int32
    return np.asarray(q.astype(wide) - np.asarray(zero_point, wide))


def codes(storage: DType) -> Array:
    """Return every value of a storage dtype of 8 bits or less, ascending.

    Raises:
        UsageError: The dtype is wider than 8 bits.
    """
    if storage.bits > 8:
        raise UsageError(f"{storage.value} has too many values for a table")
    return np.arange(storage.min, storage.max + 1).astype(storage.numpy)


def table_entries(
    fn: Callable[[Array], Array], source: QuantParams, target: QuantParams | None
) -> Array:
    """Return the 256 results of a float function on every 8-bit code.

    Args:
        fn: Elementwise float32 function.
        source: Quantization of the operand.
        target: Quantization of the result; None keeps float32.
    """
    reals = dequantize(codes(source.storage), source)
    y = np.asarray(fn(reals), np.float32)
    return y if target is None else quantize(y, target)


def lookup(x: Array, entries: Array) -> Array:
    """Return entries[x - least value of the storage]."""
    return np.asarray(entries[x.astype(np.int32) - int(np.iinfo(x.dtype).min)])


def low_bits(x: Array, storage: DType) -> Array:
    """Return numbers modulo 16 as 4-bit integers, held in 8 bits; fractions round towards 0.

    What 4 bits hold stays as it is. Of an integer outside the higher bits are dropped, and a
    float outside is treated like its integral part; NaN and infinities become 0.

    Source: ONNX Cast: "when OOR, discard higher bits and reinterpret"; floats out of range are
    undefined there, and this is what its tests expect of them.

    Args:
        x: Numbers of any dtype.
        storage: INT4 or UINT4.
    """
    if x.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            x = np.fmod(np.trunc(np.where(np.isfinite(x), x, 0)), 16)
    low = (x.astype(np.int64) & 15).astype(np.int8)  # of uint64 the cast keeps the low bits
    return np.asarray(((low ^ 8) - 8 if storage.min else low).astype(storage.numpy))


# ------------------------------------------------------------------------------- multipliers


def multiplier(*factors: Any, over: Any = 1.0) -> Array:
    """Return the float32 nearest to the float64 value (product of factors) / over.

    Factors multiply from left to right, then one division.
    """
    product = np.asarray(factors[0], np.float64)
    for f in factors[1:]:
        product = product * np.asarray(f, np.float64)
    with np.errstate(over="ignore"):  # beyond float32 it is infinity
        return np.asarray(product / np.asarray(over, np.float64)).astype(np.float32)


def _scale_of(qparams: QuantParams | None) -> Any:
    return 1.0 if qparams is None else qparams.scale


def dyadic(m: Any) -> tuple[Array, Array]:
    """Return (m_int, shift) with m = m_int / 2**shift, m_int in [2**30, 2**31).

    Source: HAWQ-V3 (arXiv 2011.10680); Jacob et al. 2018 (arXiv 1712.05877).

    Raises:
        UsageError: A multiplier is not positive, or is 2**31 or more.
    """
    value = np.asarray(m, np.float64)
    if not ((value > 0) & (value < 2.0**31)).all():
        raise UsageError("dyadic multipliers must be in (0, 2**31)")
    mantissa, exponent = np.frexp(value)
    m_int = np.floor(mantissa * 2.0**31 + 0.5).astype(np.int64)
    full = m_int == 1 << 31
    m_int = np.where(full, m_int >> 1, m_int)
    shift = 31 - exponent.astype(np.int64) - full
    return m_int, shift


def round_dyadic(acc: Array, m_int: Array, shift: Array) -> Array:
    """Return floor((acc * m_int + 2**(shift - 1)) / 2**shift) as int64: one rounding, half up."""
    product = acc.astype(np.int64) * m_int
    half = np.where(shift > 0, np.int64(1) << np.clip(shift - 1, 0, 62), 0)
    # |product| <= 2**62, so from a shift of 63 on the rounded result is 0.
    return np.where(shift > 62, 0, (product + half) >> np.clip(shift, 0, 62))


# -------------------------------------------------------------------------------- requantize


@dataclass(frozen=True, slots=True)
class Residual:
    """A quantized tensor that is added before the rounding of `requantize`.

    Attributes:
        q: Stored integers, of the accumulator's shape.
        qparams: Their quantization (one scale).
    """

    q: Array
    qparams: QuantParams


def requantize(
    acc: Array,
    scale: Any,
    target: QuantParams | None,
    *,
    residual: Residual | None = None,
    mode: RequantizeMode = "float32",
) -> Array:
    """Turn int32 accumulators into the result of a quantized operator.

    float32: t = float32(acc) * M, M = float32(scale / s_y); with a residual
    t = t + float32(r - z_r) * M_r; y = clamp(rint(t) + z_y). Without a target: float32 t, and
    M = float32(scale). dyadic: each branch is rounded by itself in int64 (`round_dyadic`).

    Args:
        acc: int32 accumulators.
        scale: float64 real value of one accumulator unit; broadcasts against `acc`.
        target: Quantization of the result (one scale); None for a float32 result.
        residual: Added branch, needs a target.
        mode: How to round.

    Raises:
        UsageError: dyadic or a residual without a target.
    """
    if target is None:
        if residual is not None or mode == "dyadic":
            raise UsageError("a float32 result takes no residual and no dyadic mode")
        return np.asarray(acc.astype(np.float32) * multiplier(scale))
    if mode == "dyadic":
        total = round_dyadic(acc, *dyadic(np.asarray(scale, np.float64) / target.s))
        if residual is not None:
            r = centred(residual.q, residual.qparams.zero_point)
            total = total + round_dyadic(r, *dyadic(residual.qparams.s / target.s))
        y = np.clip(total + target.z, target.qmin, target.qmax)
        return np.asarray(y.astype(target.storage.numpy))
    with np.errstate(over="ignore", invalid="ignore"):  # infinity clamps, NaN maps to qmin
        t = acc.astype(np.float32) * multiplier(scale, over=target.scale)
    return requantize_real(np.asarray(t), target, residual)


def requantize_real(t: Array, target: QuantParams, residual: Residual | None = None) -> Array:
    """Return clamp(rint(t + float32(r - z_r) * M_r) + z_y), t in units of the result's scale."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinity clamps, NaN maps to qmin
        if residual is not None:
            r = centred(residual.q, residual.qparams.zero_point).astype(np.float32)
            t = t + r * multiplier(residual.qparams.scale, over=target.scale)
        return _clamp_to_storage(np.rint(t), target.zero_point, target)


def rescale(q: Array, source: QuantParams, target: QuantParams) -> Array:
    """Move a quantized tensor to another scale, zero point or storage.

    On the same map (of any granularity) its integers stay, clamped to the range of the target.
    """
    if source.same_map(target) and max(source.storage.bits, target.storage.bits) <= 16:
        return np.clip(q, target.qmin, target.qmax).astype(target.storage.numpy)
    return requantize(centred(q, source.zero_point), source.scale, target)


@dataclass(frozen=True, slots=True)
class QuantizedBias:
    """An int32 bias.

    Attributes:
        q: int32 [C].
        clamped: Channels whose value did not fit int32 and was clamped.
    """

    q: Array
    clamped: tuple[int, ...]


def quantize_bias(bias: Array, input_scale: Any, weight_scale: Any) -> QuantizedBias:
    """Return rint(bias / (s_x * s_w)) as int32, saturating.

    Args:
        bias: float [C].
        input_scale: Scale of the activations.
        weight_scale: Scale of the weights, [] or [C].
    """
    scale = np.asarray(input_scale, np.float64) * np.asarray(weight_scale, np.float64)
    value = np.rint(np.asarray(bias, np.float64) / scale)
    info = np.iinfo(np.int32)
    q = np.clip(value, info.min, info.max)
    clamped = tuple(int(i) for i in np.flatnonzero(q != value))
    return QuantizedBias(q.astype(np.int32), clamped)


# ------------------------------------------------------------------------------ accumulation


def wrap_int32(a: Array) -> Array:
    """Return integers modulo 2**32 as int32."""
    return np.asarray(a.astype(np.int64, copy=False).astype(np.int32))


def _blas_dtype(bound: int) -> Any:
    """Return the fastest dtype in which sums of products up to `bound` are exact."""
    if bound <= _F32_EXACT:
        return np.float32
    return np.float64 if bound <= _F64_EXACT else np.int64


def _magnitude(a: Array) -> int:
    return max(abs(int(a.min())), abs(int(a.max()))) if a.size else 0


def _to_int32(acc: Array, bound: int) -> Array:
    """Return exact float (or int64) sums as int32, wrapping."""
    if bound < 1 << 31:
        return np.asarray(acc.astype(np.int32))
    return wrap_int32(acc)


def accumulate_conv(
    x: Array,
    w: Array,
    x_zero: int,
    w_zero: Any,
    geometry: Geometry,
    group: int = 1,
    bias: Array | None = None,
) -> Array:
    """Return the int32 accumulators of a convolution, channels first.

    acc[n, o, ...] = sum (x - x_zero) * (w - w_zero) + bias[o], modulo 2**32; padding adds 0.

    Args:
        x: [N, C, *spatial] integers.
        w: [O, C/group, *kernel] integers.
        x_zero: Zero point of `x`.
        w_zero: Zero point of `w`, a number or [O].
        geometry: Windows.
        group: Number of groups.
        bias: int32 [O].
    """
    tail = (1,) * (w.ndim - 1)
    cx = centred(x, x_zero)
    cw = centred(w, np.asarray(w_zero).reshape(-1, *tail))
    sums = np.abs(cw.astype(np.int64)).reshape(w.shape[0], -1).sum(axis=1)
    bound = _magnitude(cx) * int(sums.max(initial=0))
    dtype = _blas_dtype(bound)
    acc = correlate(padded(cx.astype(dtype), geometry, 0), cw.astype(dtype), geometry, group)
    total = _to_int32(acc, bound)
    if bias is not None:
        total = total + bias.astype(np.int32).reshape(-1, *(1,) * (w.ndim - 2))
    return total


def accumulate_matmul(
    a: Array, b: Array, a_zero: int, b_zero: Any, bias: Array | None = None
) -> Array:
    """Return the int32 accumulators of a matrix product (numpy's broadcasting).

    acc = (a - a_zero) @ (b - b_zero) + bias, modulo 2**32.

    Args:
        a: [..., M, K] integers.
        b: [..., K, N] integers.
        a_zero: Zero point of `a`.
        b_zero: Zero point of `b`; broadcasts against it.
        bias: int32 [N].
    """
    ca, cb = centred(a, a_zero), centred(b, b_zero)
    sums = np.abs(cb.astype(np.int64)).sum(axis=-2 if cb.ndim > 1 else 0)
    bound = _magnitude(ca) * int(np.max(sums, initial=0))
    dtype = _blas_dtype(bound)
    total = _to_int32(np.asarray(np.matmul(ca.astype(dtype), cb.astype(dtype))), bound)
    return np.asarray(total if bias is None else total + bias.astype(np.int32))


# ----------------------------------------------------------------------- elementwise, pooling


def add(
    a: Array,
    a_qparams: QuantParams,
    b: Array,
    b_qparams: QuantParams,
    target: QuantParams | None,
    *,
    subtract: bool = False,
) -> Array:
    """Return clamp(rint(float32(a - z_a) * M_a + float32(b - z_b) * M_b) + z_y).

    M_a = float32(s_a / s_y). With `subtract` the second product is subtracted. Without a target
    the float32 sum with M_a = s_a.
    """
    s = _scale_of(target)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity clamps, NaN maps to qmin
        ta = centred(a, a_qparams.zero_point).astype(np.float32) * multiplier(
            a_qparams.scale, over=s
        )
        tb = centred(b, b_qparams.zero_point).astype(np.float32) * multiplier(
            b_qparams.scale, over=s
        )
        t = np.asarray(ta - tb if subtract else ta + tb)
        if target is None:
            return t
        return _clamp_to_storage(np.rint(t), target.zero_point, target)


def mul(
    a: Array, a_qparams: QuantParams, b: Array, b_qparams: QuantParams, target: QuantParams | None
) -> Array:
    """Return clamp(rint(float32((a - z_a) * (b - z_b)) * M) + z_y), the product in int32.

    M = float32(s_a * s_b / s_y).
    """
    ca = centred(a, a_qparams.zero_point).astype(np.int64)
    cb = centred(b, b_qparams.zero_point).astype(np.int64)
    product = wrap_int32(np.asarray(ca * cb))
    scale = np.float64(a_qparams.s) * np.float64(b_qparams.s)
    return requantize(product, scale, target)


def average_pool(
    x: Array,
    x_qparams: QuantParams,
    geometry: Geometry,
    target: QuantParams | None,
    *,
    count_include_pad: bool,
) -> Array:
    """Average windows of [N, C, *spatial].

    y = clamp(rint(float32(sum(x - z_x)) * M) + z_y), M = float32(s_x / (s_y * count)), count per
    window; padding adds 0 to the sum.
    """
    cx = padded(centred(x, x_qparams.zero_point), geometry, 0)
    total = np.zeros((*x.shape[:2], *geometry.outputs), np.int64)
    for _, view in taps(cx, geometry):
        total += view
    # A window of padding only holds no elements; its sum is 0, and so is the average.
    count = np.maximum(counts(geometry, include_pad=count_include_pad), 1)
    return _mean(wrap_int32(total), x_qparams, count, target)


def reduce_mean(
    x: Array,
    x_qparams: QuantParams,
    axes: tuple[int, ...],
    target: QuantParams | None,
    *,
    keepdims: bool,
) -> Array:
    """Average over axes; the same formula as `average_pool` with one count."""
    total = np.sum(centred(x, x_qparams.zero_point), axis=axes, keepdims=keepdims, dtype=np.int64)
    count = math.prod(x.shape[a] for a in axes)
    return _mean(wrap_int32(np.asarray(total)), x_qparams, count, target)


def mean_multiplier(x_qparams: QuantParams, count: Any, target: QuantParams | None) -> Array:
    """Return float32(s_x / (s_y * count))."""
    s = np.asarray(_scale_of(target), np.float64)
    return multiplier(x_qparams.scale, over=s * np.asarray(count, np.float64))


def _mean(acc: Array, x_qparams: QuantParams, count: Any, target: QuantParams | None) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):  # infinity clamps, NaN maps to qmin
        t = np.asarray(acc.astype(np.float32) * mean_multiplier(x_qparams, count, target))
        return t if target is None else _clamp_to_storage(np.rint(t), target.zero_point, target)


# ------------------------------------------------------------------------------ softmax, norm


def softmax_table(scale: float) -> Array:
    """Return rint(exp(-scale * d) * 2**20) for d in 0..255, int32 [256]."""
    d = np.arange(256, dtype=np.float64)
    return np.rint(np.exp(-float(scale) * d) * float(1 << SOFTMAX_BITS)).astype(np.int32)


EXP_LEAST = -87.0
"""`exp_f32` is defined from here to 0; e**-87 is the least normal float32, nearly."""
LOG2_E, LN2_HIGH, LN2_LOW = (
    np.float32(1.44269504),
    np.float32(0.693359375),  # few digits: its products with small integers are exact
    np.float32(-2.12194440e-4),
)
EXP_COEFFICIENTS = tuple(
    np.float32(c)
    for c in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)


def exp_f32(x: Array) -> Array:
    """Return e**x for float32 x in [EXP_LEAST, 0], the same bits on every target.

    n = rint(x * log2 e); r = x - n * ln 2 in two steps; a polynomial in r, by Horner's rule; times
    2**n. Every step is one float32 operation, rounded by itself. Relative error below 2e-7.
    Source: Cephes `expf` (coefficients).
    """
    x = np.asarray(x, np.float32)
    n = np.rint(x * LOG2_E)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = np.full_like(r, EXP_COEFFICIENTS[0])
    for c in EXP_COEFFICIENTS[1:]:
        p = p * r + c
    e = (p * (r * r) + r) + np.float32(1)
    return np.asarray(np.ldexp(e, n.astype(np.int32)))


def softmax(
    x: Array, x_qparams: QuantParams | None, axis: int, target: QuantParams | None
) -> Array:
    """Softmax along an axis with an exact sum, so that its order does not matter.

    8-bit x: d = max(x) - x and T = softmax_table(s_x)[d]. float32 x (attention scores with a
    mask): T = int32(rint(exp_f32(max(x - max(x), EXP_LEAST)) * 2**20)).
    S = max(sum T, 1) (exact); r = float32(1 / s_y) / float32(S);
    y = clamp(rint(float32(T) * r) + z_y).
    """
    if x_qparams is None:
        with np.errstate(invalid="ignore"):  # a row of -inf: all equal
            below = x - x.max(axis=axis, keepdims=True)
            below = np.where(below >= EXP_LEAST, below, np.float32(EXP_LEAST))
        t = np.rint(exp_f32(below) * np.float32(1 << SOFTMAX_BITS)).astype(np.int32)
    else:
        wide = x.astype(np.int32)
        d = wide.max(axis=axis, keepdims=True) - wide
        t = softmax_table(x_qparams.s)[d]
    # At least 1: a row of -inf scores gives zeros.
    total = np.maximum(np.sum(t, axis=axis, keepdims=True, dtype=np.int64), 1)
    r = multiplier(1.0, over=_scale_of(target)) / total.astype(np.float32)
    y = np.asarray(t.astype(np.float32) * r)
    return y if target is None else _clamp_to_storage(np.rint(y), target.zero_point, target)


def layer_norm(
    x: Array,
    x_qparams: QuantParams,
    gamma: Array,
    beta: Array,
    epsilon: float,
    target: QuantParams | None,
) -> Array:
    """Layer normalization of integers over the last axis (extent D).

    c1 = sum q, c2 = sum q * q, V = D * c2 - c1 * c1 (exact, int64);
    v = float32(V) * float32(s_x**2 / D**2) + float32(epsilon); r = 1 / sqrt(v);
    t = float32(D * q - c1) * (r * float32(s_x / D)); y = t * gamma + beta; quantized like
    `quantize` where the result is quantized. Every float step is rounded by itself.

    Args:
        x: [..., D] integers of 16 bits or less.
        x_qparams: Quantization of `x`; the zero point cancels out.
        gamma: float32 [D].
        beta: float32 [D].
        epsilon: Added to the variance.
        target: Quantization of the result; None for float32.
    """
    depth = x.shape[-1]
    q = x.astype(np.int64)
    c1 = q.sum(axis=-1, keepdims=True)
    c2 = (q * q).sum(axis=-1, keepdims=True)
    spread = depth * c2 - c1 * c1
    s = np.float64(x_qparams.s)
    one = np.float32(1)
    with np.errstate(all="ignore"):  # zero variance and zero epsilon: infinity, as in float
        v = spread.astype(np.float32) * np.float32(s * s / np.float64(depth * depth))
        v = v + np.float32(epsilon)
        r = one / np.sqrt(v)
        t = (depth * q - c1).astype(np.float32) * (r * np.float32(s / np.float64(depth)))
        y = np.asarray(t * gamma.astype(np.float32) + beta.astype(np.float32))
    return y if target is None else quantize(y, target)
