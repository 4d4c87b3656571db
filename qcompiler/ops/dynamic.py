# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Matrix products whose activations are quantized at run time; `numerics_dynamic` defines them.

The quantized activations carry a grid of scale 1 (their stored integers, minus a zero point); the
real scales are a tensor of their own: one per row, one in all, or one per block of neighbours in a
row. With these the weights have a scale, and a zero point, for each column and the same blocks.

A model may come with such products (`MatMulNBits`), so they are legal beside quantize/dequantize
pairs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler import numerics, numerics_dynamic
from qcompiler.ops import _infer as c
from qcompiler.ops._base import (
    QUANTIZED_STAGES,
    Attrs,
    EvalContext,
    OpDef,
    OpKind,
    register,
)
from qcompiler.ops.cast import declared_qparams, operand_qparams
from qcompiler.ops.linear import check_residual, finish, matmul_shape, optional_array
from qcompiler.types import Array, DType, PerGroup, Shape, TensorType

Arrays = Sequence["Array | None"]
_UNTURNED = {"transpose_a": False, "transpose_b": False}


def _block(attrs: Attrs) -> int:
    block: Any = attrs["block"]
    return int(block)


def _scale_shape(x: Shape, per: str, block: int) -> Shape:
    if per == "tensor":
        return ()
    return (*x[:-1], 1 if per == "row" else x[-1] // block)


def _quantize_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    name = "dynamic_quantize"
    x = c.floating(name, c.given(name, types, 0, "x"), "x")
    per, block = str(attrs["per"]), _block(attrs)
    if per not in ("row", "tensor", "block"):
        raise c.fail(name, f"per is {per!r}, expected 'row', 'tensor' or 'block'")
    if x.dtype is not DType.FLOAT32 or x.rank < 1:
        raise c.fail(name, f"operand 'x' is {x}, expected float32 of rank 1 or more")
    if per == "block" and (block < 1 or x.shape[-1] % block):
        raise c.fail(name, f"blocks of {block} do not divide rows of {x.shape[-1]}")
    scale = TensorType(_scale_shape(x.shape, per, block), DType.FLOAT32)
    return (TensorType(x.shape, DType.INT8), scale)


def _quantize(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    q = declared_qparams("dynamic_quantize", ctx)
    per: Any = attrs["per"]
    x = np.asarray(arrays[0])
    return numerics_dynamic.dynamic_quantize(x, per, q.z, q.storage.numpy.type, _block(attrs))


register(
    OpDef(
        "dynamic_quantize",
        ("x",),
        _quantize_infer,
        _quantize,
        {"per": "row", "block": 0},
        stages=QUANTIZED_STAGES,
        kind=OpKind.CAST,
        declared=True,
        outputs=2,
    )
)


def _matmul_infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    name = "dynamic_matmul"
    a, b = c.given(name, types, 0, "a"), c.given(name, types, 1, "b")
    q = c.quantized_per_tensor(name, a, "a")
    if a.dtype.bits != 8 or q.s != 1.0:
        raise c.fail(name, f"operand 'a' is {a}, expected 8-bit integers of scale 1")
    if b.rank != 2 or b.dtype is not DType.INT8:
        raise c.fail(name, f"operand 'b' is {b}, expected an int8 matrix")
    shape = matmul_shape(name, a, b, _UNTURNED)
    scale = c.given(name, types, 2, "scale")
    expected: tuple[Shape, ...] = ((), (*a.shape[:-1], 1))
    what = "one float32"
    weights = c.quantized(name, b, "b")
    if isinstance(weights.granularity, PerGroup):
        size = weights.granularity.group_size
        if weights.granularity.axis != 0 or b.shape[0] % size:
            raise c.fail(
                name, f"operand 'b' has {weights.granularity} scales, expected groups along 0"
            )
        expected = ((*a.shape[:-1], b.shape[0] // size),)
        what = f"one float32 per {size} neighbours"
    elif not c.quantized_weight(name, b, "b", 1).is_symmetric:
        raise c.fail(name, "operand 'b' has zero points, expected none")
    if scale.dtype is not DType.FLOAT32 or scale.shape not in expected:
        raise c.fail(name, f"operand 'scale' is {scale}, expected {what} per row of {a}")
    for i, what, want in ((3, "bias", (b.shape[1],)), (4, "residual", shape)):
        t = c.optional(types, i)
        if t is not None and (t.dtype is not DType.FLOAT32 or t.qparams is not None):
            raise c.fail(name, f"operand {what!r} is {t}, expected float32")
        if t is not None and what == "bias":
            c.has_shape(name, t, want, what)
    check_residual(name, types, 4, shape)
    return (TensorType(shape, DType.FLOAT32),)


def _matmul(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    a, b = np.asarray(arrays[0]), np.asarray(arrays[1])
    aq = operand_qparams("dynamic_matmul", ctx, 0)
    bq = operand_qparams("dynamic_matmul", ctx, 1)
    scale, bias = np.asarray(arrays[2]), optional_array(arrays, 3)
    if isinstance(bq.granularity, PerGroup):
        y = numerics_dynamic.blocked_result(a, b, aq.z, bq.zero_point, scale, bq.scale, bias)
    else:
        acc = numerics.accumulate_matmul(a, b, aq.z, 0)
        y = numerics_dynamic.dynamic_result(acc, scale, bq.scale)
        if bias is not None:
            y = y + bias
    return (np.asarray(finish(y, optional_array(arrays, 4), attrs)),)


register(
    OpDef(
        "dynamic_matmul",
        ("a", "b", "scale", "bias?", "residual?"),
        _matmul_infer,
        _matmul,
        {"act_min": None, "act_max": None},
        stages=QUANTIZED_STAGES,
        kind=OpKind.COMPUTE,
    )
)
