# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Conversions between floats, quantized tensors and element types."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompiler import numerics
from qcompiler.errors import ShapeError
from qcompiler.ops import _infer as c
from qcompiler.ops._base import (
    QUANTIZED_STAGES,
    REQUIRED,
    Attrs,
    EvalContext,
    OpDef,
    OpKind,
    register,
)
from qcompiler.types import WIDENED, Array, DType, QuantParams, TensorType

Arrays = Sequence["Array | None"]


def declared_qparams(op: str, ctx: EvalContext) -> QuantParams:
    """Return the quantization declared for the result.

    Raises:
        ShapeError: The result is declared without one.
    """
    q = ctx.outputs[0].qparams
    if q is None:
        raise c.fail(op, f"its result is declared as {ctx.outputs[0]}, expected a quantized type")
    return q


def operand_qparams(op: str, ctx: EvalContext, i: int) -> QuantParams:
    """Return the quantization of operand `i`."""
    return c.quantized(op, c.given(op, ctx.inputs, i, str(i)), str(i))


def _quantize_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    return (c.floating("quantize", c.given("quantize", types, 0, "x"), "x"),)


def _quantize(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x = np.asarray(arrays[0], np.float32)
    return (numerics.quantize(x, declared_qparams("quantize", ctx)),)


def _dequantize_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    q = c.given("dequantize", types, 0, "q")
    c.quantized("dequantize", q, "q")
    return (TensorType(q.shape, DType.FLOAT32),)


def _dequantize(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    return (numerics.dequantize(np.asarray(arrays[0]), operand_qparams("dequantize", ctx, 0)),)


def _requantize_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    q = c.given("requantize", types, 0, "q")
    c.quantized("requantize", q, "q")
    return (q,)


def _requantize(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    source = operand_qparams("requantize", ctx, 0)
    target = declared_qparams("requantize", ctx)
    if not ((source.is_per_tensor and target.is_per_tensor) or source.same_map(target)):
        raise c.fail(
            "requantize",
            f"operand 'q' has {source.granularity} scales, the result {target.granularity} ones: "
            "expected one scale each, or the same",
        )
    return (numerics.rescale(np.asarray(arrays[0]), source, target),)


register(
    OpDef(
        "quantize",
        ("x",),
        _quantize_infer,
        _quantize,
        stages=QUANTIZED_STAGES,
        kind=OpKind.CAST,
        declared=True,
    )
)
register(
    OpDef(
        "dequantize",
        ("q",),
        _dequantize_infer,
        _dequantize,
        stages=QUANTIZED_STAGES,
        kind=OpKind.CAST,
    )
)
register(
    OpDef(
        "requantize",
        ("q",),
        _requantize_infer,
        _requantize,
        stages=QUANTIZED_STAGES,
        kind=OpKind.CAST,
        declared=True,
    )
)


def _cast_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    x = c.plain("cast", c.given("cast", types, 0, "x"), "x")
    try:
        to = DType(attrs["to"])
    except ValueError:
        known = ", ".join(d.value for d in DType)
        raise ShapeError(
            f"cast: dtype {attrs['to']!r} is unknown, expected one of {known}"
        ) from None
    return (TensorType(x.shape, to),)


def _cast(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    x, dtype = np.asarray(arrays[0]), ctx.outputs[0].dtype
    to = dtype.numpy
    with np.errstate(all="ignore"):  # out-of-range floats: undefined in ONNX, never an error
        if dtype in WIDENED:
            return (numerics.low_bits(x, dtype),)
        if x.dtype.kind == "f" and to.kind in "iu":
            # Through int64 so that the low bits are kept, as C compilers do on x86.
            return (np.trunc(x).astype(np.int64).astype(to),)
        y = x.astype(to)
    return (_to_bfloat16(y) if dtype is DType.BFLOAT16 else y,)


def _to_bfloat16(x: Array) -> Array:
    """Round float32 to the nearest bfloat16, ties to even; the result is held in float32."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(np.float32))


register(OpDef("cast", ("x",), _cast_infer, _cast, {"to": REQUIRED}, kind=OpKind.CAST))
