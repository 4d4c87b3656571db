# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Elementwise operators: functions of one operand, of two with broadcast, and `where`.

Meanings are those of ONNX; float32 in gives float32 out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from qcompiler.ops import _infer as c
from qcompiler.ops._base import (
    Attrs,
    EvalContext,
    EvalFn,
    InferFn,
    OpDef,
    OpKind,
    register,
)
from qcompiler.types import Array, DType, TensorType

UnaryFn = Callable[[Array, Attrs], Array]
BinaryFn = Callable[[Array, Array, Attrs], Array]
Arrays = Sequence["Array | None"]


def _array(arrays: Arrays, i: int) -> Array:
    return np.asarray(arrays[i])


def _f(attrs: Attrs, name: str, like: Array) -> Any:
    """Return a float attribute in the operand's dtype, so that nothing is promoted."""
    return like.dtype.type(attrs[name])


# ------------------------------------------------------------------------------------ unary


def _unary_infer(name: str, accepts: str, to_bool: bool) -> InferFn:
    def infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
        x = c.given(name, types, 0, "x")
        if accepts == "bool":
            if c.plain(name, x, "x").dtype is not DType.BOOL:
                raise c.fail(name, f"operand 'x' is {x}, expected bool")
        elif accepts == "float":
            c.floating(name, x, "x")
        else:
            c.numeric(name, x, "x")
        return (TensorType(x.shape, DType.BOOL if to_bool else x.dtype),)

    return infer


def _unary_evaluate(fn: UnaryFn) -> EvalFn:
    def evaluate(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
        x = _array(arrays, 0)
        with np.errstate(all="ignore"):  # ONNX defines NaN and infinity as results, not as errors
            y = np.asarray(fn(x, attrs))
        return (y.astype(ctx.outputs[0].dtype.numpy, copy=False),)

    return evaluate


def _unary(
    name: str,
    fn: UnaryFn,
    attrs: Mapping[str, Any] | None = None,
    *,
    accepts: str = "float",
    to_bool: bool = False,
) -> None:
    register(
        OpDef(
            name,
            ("x",),
            _unary_infer(name, accepts, to_bool),
            _unary_evaluate(fn),
            attrs or {},
            kind=OpKind.UNARY,
        )
    )


def sigmoid(x: Array) -> Array:
    """Logistic function in the operand's dtype, without overflow."""
    y: Array = special.expit(x)
    return y


def _relu(x: Array, attrs: Attrs) -> Array:
    return np.asarray(np.maximum(x, x.dtype.type(0)))


def _leaky_relu(x: Array, attrs: Attrs) -> Array:
    return np.where(x < 0, x * _f(attrs, "alpha", x), x)


def _clip(x: Array, attrs: Attrs) -> Array:
    # ONNX: min first, then max, so that max wins where min > max.
    if attrs["min"] is not None:
        x = np.maximum(x, _f(attrs, "min", x))
    if attrs["max"] is not None:
        x = np.minimum(x, _f(attrs, "max", x))
    return x


def _hard_sigmoid(x: Array, attrs: Attrs) -> Array:
    t = x * _f(attrs, "alpha", x) + _f(attrs, "beta", x)
    return np.asarray(np.maximum(np.minimum(t, x.dtype.type(1)), x.dtype.type(0)))


def _hard_swish(x: Array, attrs: Attrs) -> Array:
    one = x.dtype.type(1)
    t = x * x.dtype.type(1 / 6) + x.dtype.type(0.5)
    return np.asarray(x * np.maximum(np.minimum(t, one), x.dtype.type(0)))


def _silu(x: Array, attrs: Attrs) -> Array:
    return x * sigmoid(x)


def _erf(x: Array, attrs: Attrs) -> Array:
    y: Array = special.erf(x)
    return y


def _gelu(x: Array, attrs: Attrs) -> Array:
    one, half = x.dtype.type(1), x.dtype.type(0.5)
    if attrs["approximate"] == "tanh":
        inner = x.dtype.type(math.sqrt(2 / math.pi)) * (x + x.dtype.type(0.044715) * x * x * x)
        return np.asarray(half * x * (one + np.tanh(inner)))
    return np.asarray(half * x * (one + special.erf(x * x.dtype.type(math.sqrt(0.5)))))


def _elu(x: Array, attrs: Attrs) -> Array:
    return np.where(x < 0, _f(attrs, "alpha", x) * np.expm1(np.minimum(x, 0)), x)


def _selu(x: Array, attrs: Attrs) -> Array:
    alpha, gamma = _f(attrs, "alpha", x), _f(attrs, "gamma", x)
    return np.asarray(np.where(x > 0, gamma * x, gamma * alpha * np.expm1(np.minimum(x, 0))))


def _celu(x: Array, attrs: Attrs) -> Array:
    alpha = _f(attrs, "alpha", x)
    y = np.maximum(x, 0) + np.minimum(0, alpha * np.expm1(np.minimum(x, 0) / alpha))
    return np.asarray(y)


def _softplus(x: Array, attrs: Attrs) -> Array:
    return np.asarray(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


def _softsign(x: Array, attrs: Attrs) -> Array:
    return np.asarray(x / (x.dtype.type(1) + np.abs(x)))


def _thresholded_relu(x: Array, attrs: Attrs) -> Array:
    return np.where(x > _f(attrs, "alpha", x), x, x.dtype.type(0))


def _mish(x: Array, attrs: Attrs) -> Array:
    return np.asarray(x * np.tanh(_softplus(x, attrs)))


def _isinf(x: Array, attrs: Attrs) -> Array:
    y = np.zeros(x.shape, bool)
    if attrs["detect_positive"]:
        y |= np.isposinf(x)
    if attrs["detect_negative"]:
        y |= np.isneginf(x)
    return y


def _plain(fn: Callable[[Array], Any]) -> UnaryFn:
    return lambda x, attrs: np.asarray(fn(x))


_unary("relu", _relu, accepts="numeric")
_unary("leaky_relu", _leaky_relu, {"alpha": 0.01})
_unary("clip", _clip, {"min": None, "max": None}, accepts="numeric")
_unary("sigmoid", _plain(sigmoid))
_unary("hard_sigmoid", _hard_sigmoid, {"alpha": 0.2, "beta": 0.5})
_unary("hard_swish", _hard_swish)
_unary("silu", _silu)
_unary("tanh", _plain(np.tanh))
_unary("erf", _erf)
_unary("gelu", _gelu, {"approximate": "none"})
_unary("elu", _elu, {"alpha": 1.0})
# Source: ONNX Selu-22 defaults (self-normalizing fixed point).
_unary("selu", _selu, {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875})
_unary("softplus", _softplus)
_unary("softsign", _softsign)
_unary("celu", _celu, {"alpha": 1.0})
_unary("thresholded_relu", _thresholded_relu, {"alpha": 1.0})
_unary("mish", _mish)
_unary("reciprocal", lambda x, attrs: x.dtype.type(1) / x)
_unary("round", _plain(np.rint))
for _name in ("neg", "abs", "sign"):
    _unary(
        _name,
        _plain({"neg": np.negative, "abs": np.abs, "sign": np.sign}[_name]),
        accepts="numeric",
    )
for _name in ("sqrt", "exp", "log", "floor", "ceil", "sin", "cos", "tan", "sinh", "cosh"):
    _unary(_name, _plain(getattr(np, _name)))
for _name in ("asin", "acos", "atan", "asinh", "acosh", "atanh"):
    _unary(_name, _plain(getattr(np, "arc" + _name[1:])))
_unary("not", _plain(np.logical_not), accepts="bool", to_bool=True)
_unary("isnan", _plain(np.isnan), to_bool=True)
_unary("isinf", _isinf, {"detect_negative": True, "detect_positive": True}, to_bool=True)


# ----------------------------------------------------------------------------------- binary


def _binary_infer(name: str, kind: str) -> InferFn:
    def infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
        a = c.plain(name, c.given(name, types, 0, "a"), "a")
        b = c.plain(name, c.given(name, types, 1, "b"), "b")
        if name == "pow":
            c.numeric(name, a, "a")
            c.numeric(name, b, "b")
        else:
            c.same_dtype(name, a, b, "b")
        if kind == "logic":
            if a.dtype is not DType.BOOL:
                raise c.fail(name, f"operand 'a' is {a}, expected bool")
        elif name != "equal":
            c.numeric(name, a, "a")
        shape = c.broadcast(name, a.shape, b.shape)
        return (TensorType(shape, a.dtype if kind == "arith" else DType.BOOL),)

    return infer


def _binary_evaluate(fn: BinaryFn) -> EvalFn:
    def evaluate(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
        with np.errstate(all="ignore"):  # ONNX defines NaN and infinity as results, not as errors
            y = np.asarray(fn(_array(arrays, 0), _array(arrays, 1), attrs))
        return (y.astype(ctx.outputs[0].dtype.numpy, copy=False),)

    return evaluate


def _binary(
    name: str, fn: BinaryFn, kind: str = "arith", attrs: Mapping[str, Any] | None = None
) -> None:
    register(
        OpDef(
            name,
            ("x", "slope") if name == "prelu" else ("a", "b"),
            _binary_infer(name, kind),
            _binary_evaluate(fn),
            attrs or {},
            kind=OpKind.BINARY,
        )
    )


def _div(a: Array, b: Array, attrs: Attrs) -> Array:
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    # Integers truncate towards zero as in C; numpy floors.
    q = np.asarray(np.abs(a) // np.where(b == 0, 1, np.abs(b)))
    return np.where((a < 0) != (b < 0), -q, q) if a.dtype.kind == "i" else q


def _mod(a: Array, b: Array, attrs: Attrs) -> Array:
    return np.asarray(np.fmod(a, b) if attrs["fmod"] else np.mod(a, b))


def _pow(a: Array, b: Array, attrs: Attrs) -> Array:
    if a.dtype.kind == "f":
        return np.asarray(np.power(a, b.astype(a.dtype)))
    return np.asarray(np.power(a.astype(np.float64), b.astype(np.float64)))


def _prelu(x: Array, slope: Array, attrs: Attrs) -> Array:
    return np.where(x < 0, x * slope, x)


def _two(fn: Callable[[Array, Array], Any]) -> BinaryFn:
    return lambda a, b, attrs: np.asarray(fn(a, b))


_binary("add", _two(np.add))
_binary("sub", _two(np.subtract))
_binary("mul", _two(np.multiply))
_binary("div", _div)
_binary("pow", _pow)
_binary("min", _two(np.minimum))
_binary("max", _two(np.maximum))
_binary("mod", _mod, attrs={"fmod": 0})
_binary("prelu", _prelu)
_binary("equal", _two(np.equal), "compare")
_binary("less", _two(np.less), "compare")
_binary("less_or_equal", _two(np.less_equal), "compare")
_binary("greater", _two(np.greater), "compare")
_binary("greater_or_equal", _two(np.greater_equal), "compare")
_binary("and", _two(np.logical_and), "logic")
_binary("or", _two(np.logical_or), "logic")
_binary("xor", _two(np.logical_xor), "logic")


# ------------------------------------------------------------------------------------ where


def _where_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    cond = c.given("where", types, 0, "cond")
    a = c.plain("where", c.given("where", types, 1, "a"), "a")
    b = c.plain("where", c.given("where", types, 2, "b"), "b")
    if cond.dtype is not DType.BOOL:
        raise c.fail("where", f"operand 'cond' is {cond}, expected bool")
    c.same_dtype("where", a, b, "b")
    return (TensorType(c.broadcast("where", cond.shape, a.shape, b.shape), a.dtype),)


def _where(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    return (np.where(_array(arrays, 0), _array(arrays, 1), _array(arrays, 2)),)


register(OpDef("where", ("cond", "a", "b"), _where_infer, _where))
