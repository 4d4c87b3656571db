# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Vector float32 functions as TIR expressions: exp, log, tanh, erf and what is made of them.

Relative errors against float64 over the whole range (measured, held by tests): exp 2e-7, log 3e-7,
sigmoid 3e-7, tanh and erf 5e-7; gelu 4e-7 of |x| absolute.  Overflow gives inf and underflow
denormals or 0, as in libm.

Source of the coefficients: own minimax fits of the relative error (Lawson iteration in float64),
rounded to float32: exp(r) degree 6 on |r| <= ln(2)/2; log(1+f)/f degree 8 on [1/sqrt(2), sqrt(2)];
tanh(x)/x as P5/Q4 in x*x on |x| <= 9; erf(x)/x as P5/Q5 in x*x on |x| <= 3.95.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.simd import lrint, settle
from qcompiler.targets.kernels.tir import Expr

__all__ = ["FUNCTIONS", "erf", "exp", "log", "sigmoid", "tanh"]

_EXP = (
    1.0, 1.0, 0.49999991059303284, 0.16666418313980103, 0.041668232530355453,
    0.008374917320907116, 0.0013836714206263423,
)  # fmt: skip
_LOG = (
    1.0, -0.49999988079071045, 0.3333418667316437, -0.2500208020210266, 0.1995677500963211,
    -0.1656218320131302, 0.14952677488327026, -0.14368629455566406, 0.08723456412553787,
)  # fmt: skip
_TANH_P = (
    1.0, 0.13679558038711548, 0.003867879742756486, 2.7998397854389623e-05, 3.0563146680151476e-08,
    -1.2187171410937836e-11,
)  # fmt: skip
_TANH_Q = (
    1.0, 0.4701288938522339, 0.02724420092999935, 0.0003937840519938618, 1.2867322993770358e-06,
)  # fmt: skip
_ERF_P = (
    1.1283791065216064, 0.19154927134513855, 0.052875179797410965, 0.0038080739323049784,
    0.00028467856463976204, 2.0258271433704067e-06,
)  # fmt: skip
_ERF_Q = (
    1.0, 0.5030887722969055, 0.11455907672643661, 0.015054930001497269, 0.0011706904042512178,
    3.783047213801183e-05,
)  # fmt: skip

_LOG2_E = 1.4426950408889634
# ln(2) as a float32 with few bits plus the rest, so that n * _LN2_HIGH is exact.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4


def _const(value: float, like: Expr) -> Expr:
    return tir.splat(float(value), "float32", tir.lanes_of(like))


def _horner(coefficients: Sequence[float], x: Expr) -> Expr:
    value = _const(coefficients[-1], x)
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + _const(coefficient, x)
    return tir.bind(value)


def _power_of_two(n: Expr) -> Expr:
    """2**n for int32 lanes in [-126, 127]."""
    lanes = tir.lanes_of(n)
    bits = T.shift_left(n + tir.splat(127, "int32", lanes), tir.splat(23, "int32", lanes))
    return tir.reinterpret(bits, "float32", lanes)


def exp(x: Expr) -> Expr:
    """e**x."""
    x = tir.bind(tir.clamp(x, -104.0, 89.0))
    n = tir.bind(lrint(x * _const(_LOG2_E, x)))
    whole = tir.bind(tir.cast(n, "float32"))
    r = tir.bind(x - whole * _const(_LN2_HIGH, x))
    r = tir.bind(r - whole * _const(_LN2_LOW, x))
    lanes = tir.lanes_of(x)
    # Two factors, because 2**n itself may be out of range where the result is not.
    half = tir.bind(T.shift_right(n, tir.splat(1, "int32", lanes)))
    return settle(_horner(_EXP, r) * _power_of_two(half) * _power_of_two(n - half))


def log(x: Expr) -> Expr:
    """Natural logarithm; -inf at 0, NaN below."""
    lanes = tir.lanes_of(x)

    def ints(value: int) -> Expr:
        return tir.splat(value, "int32", lanes)

    x = settle(x)
    # Scale denormals up by 2**23 first.
    tiny = x < _const(1.1754943508222875e-38, x)
    scaled = T.Select(tiny, x * _const(8388608.0, x), x)
    bits = tir.bind(tir.reinterpret(scaled, "int32", lanes))
    # Move the mantissa to [1/sqrt(2), sqrt(2)): subtract the bits of 1/sqrt(2), keep the exponent.
    exponent = tir.bind(T.shift_right(bits - ints(0x3F3504F3), ints(23)))
    mantissa = tir.reinterpret(bits - T.shift_left(exponent, ints(23)), "float32", lanes)
    power = tir.cast(exponent - T.Select(tiny, ints(23), ints(0)), "float32")
    f = tir.bind(mantissa - _const(1.0, x))
    power = tir.bind(power)
    value = power * _const(_LN2_HIGH, x) + (f * _horner(_LOG, f) + power * _const(_LN2_LOW, x))
    value = T.Select(x <= _const(3.4028234663852886e38, x), value, x)  # inf, NaN
    value = T.Select(T.Not(x == _const(0.0, x)), value, _const(float("-inf"), x))
    return tir.bind(T.Select(x < _const(0.0, x), _const(float("nan"), x), value))


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e**-x)."""
    return tir.bind(_const(1.0, x) / (_const(1.0, x) + exp(_const(0.0, x) - x)))


def _odd_rational(x: Expr, limit: float, p: Sequence[float], q: Sequence[float]) -> Expr:
    x = tir.bind(tir.clamp(x, -limit, limit))
    square = tir.bind(x * x)
    return tir.bind(tir.clamp(x * _horner(p, square) / _horner(q, square), -1.0, 1.0))


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent."""
    return _odd_rational(x, 9.02, _TANH_P, _TANH_Q)


def erf(x: Expr) -> Expr:
    """Error function."""
    return _odd_rational(x, 3.95, _ERF_P, _ERF_Q)


def _gelu(x: Expr) -> Expr:
    x = tir.bind(x)
    return _const(0.5, x) * x * (_const(1.0, x) + erf(x * _const(0.7071067811865476, x)))


def _gelu_tanh(x: Expr) -> Expr:
    x = tir.bind(x)
    cubic = x + _const(0.044715, x) * x * x * x
    return _const(0.5, x) * x * (_const(1.0, x) + tanh(_const(0.7978845608028654, x) * cubic))


def _silu(x: Expr) -> Expr:
    x = tir.bind(x)
    return x * sigmoid(x)


def _hard_sigmoid(x: Expr, alpha: float, beta: float) -> Expr:
    return tir.clamp(x * _const(alpha, x) + _const(beta, x), 0.0, 1.0)


def _hard_swish(x: Expr) -> Expr:
    x = tir.bind(x)
    return x * _hard_sigmoid(x, 1.0 / 6.0, 0.5)


def _leaky_relu(x: Expr, alpha: float) -> Expr:
    x = tir.bind(x)
    return T.Select(x < _const(0.0, x), x * _const(alpha, x), x)


def _elu(x: Expr, alpha: float) -> Expr:
    x = tir.bind(x)
    negative = _const(alpha, x) * (exp(tir.clamp(x, None, 0.0)) - _const(1.0, x))
    return T.Select(x < _const(0.0, x), negative, x)


def _softplus(x: Expr) -> Expr:
    x = tir.bind(x)
    return tir.clamp(x, 0.0, None) + _log1p(exp(_const(0.0, x) - T.abs(x)))


def _log1p(u: Expr) -> Expr:
    """log(1 + u) for u >= 0, with the last bits of a small u: adds what 1 + u rounds off."""
    u = tir.bind(u)
    w = tir.bind(_const(1.0, u) + u)
    lost = u - tir.fence(w - _const(1.0, u))
    return log(w) + lost / w


def _mish(x: Expr) -> Expr:
    x = tir.bind(x)
    return x * tanh(_softplus(x))


FUNCTIONS: Mapping[str, Callable[[Expr, float, float], Expr]] = MappingProxyType(
    {
        "abs": lambda x, a, b: T.abs(x),
        "ceil": lambda x, a, b: T.ceil(x),
        "elu": lambda x, a, b: _elu(x, a),
        "erf": lambda x, a, b: erf(x),
        "exp": lambda x, a, b: exp(x),
        "floor": lambda x, a, b: T.floor(x),
        "gelu": lambda x, a, b: _gelu(x),
        "gelu_tanh": lambda x, a, b: _gelu_tanh(x),
        "hard_sigmoid": lambda x, a, b: _hard_sigmoid(x, a, b),
        "hard_swish": lambda x, a, b: _hard_swish(x),
        "leaky_relu": lambda x, a, b: _leaky_relu(x, a),
        "log": lambda x, a, b: log(x),
        "mish": lambda x, a, b: _mish(x),
        "neg": lambda x, a, b: _const(0.0, x) - x,
        "reciprocal": lambda x, a, b: _const(1.0, x) / x,
        "relu": lambda x, a, b: tir.clamp(x, 0.0, None),
        "round": lambda x, a, b: T.nearbyint(x),
        "sigmoid": lambda x, a, b: sigmoid(x),
        "silu": lambda x, a, b: _silu(x),
        "softplus": lambda x, a, b: _softplus(x),
        "sqrt": lambda x, a, b: T.sqrt(x),
        "tanh": lambda x, a, b: tanh(x),
    }
)
"""Float32 functions of one variable by name; `alpha` and `beta` are the ONNX attributes."""
