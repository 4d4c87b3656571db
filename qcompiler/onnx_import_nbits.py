# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Converter of ONNX Runtime's MatMulNBits: weights in blocks of 4 or 8 bits.

`accuracy_level` 4 lets a runtime quantize activations to int8 in the same blocks: the product is
then one of integers. At other levels activations may not be quantized: it is one of floats, and
the weights are widened in registers.

Source: ONNX Runtime contrib operators (docs/ContribOperators.md), version 1 of com.microsoft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.errors import ShapeError, UnsupportedOpError
from qcompiler.ir import Value
from qcompiler.numerics_dynamic import RUN_TIME_GRID, blocked_weights
from qcompiler.onnx_import_codes import checked
from qcompiler.onnx_import_context import OpContext, converter
from qcompiler.onnx_import_qdq import with_positive_scales
from qcompiler.types import Array, DType, PerGroup, QuantParams, TensorType

_INT8 = 4
"""The accuracy level that lets activations be int8."""


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Weights: real = scale * (code - zero).

    Attributes:
        codes: Integers [N, K], K rounded up to whole blocks.
        scale: float32 > 0 [N, blocks].
        zero: int32 [N, blocks].
        storage: Dtype of the codes.
        size: Neighbours along K that share a scale.
    """

    codes: Array
    scale: Array
    zero: Array
    storage: DType
    size: int


@converter("MatMulNBits", domain="com.microsoft")
def _matmul_nbits(ctx: OpContext) -> Sequence[Value] | None:
    """Operands: a in floats; b packed in blocks along K, scales, zero points; order; bias.

    b is [N, blocks, bytes] of K numbers per column in `bits` bits each, the first in the lowest
    bits; without zero points the middle of the range stands for 0.
    """
    a, k = ctx.input(0), int(ctx.attr("K"))
    weights = _weights(ctx, k)
    if a.dtype not in (DType.FLOAT32, DType.FLOAT16):
        raise UnsupportedOpError(f"products of {a.dtype.value} are not supported")
    if a.type.rank < 2 or a.shape[-1] != k:
        raise ShapeError(f"its first operand {list(a.shape)} has no rows of {k}")
    bias = ctx.get(5)
    if a.dtype is DType.FLOAT16:
        wide = ctx.emit("cast", a, to="float32")
        bias = None if bias is None else ctx.emit("cast", bias, to="float32")
        return [ctx.emit("cast", _product(ctx, wide, weights, bias), to="float16")]
    return [_product(ctx, a, weights, bias)]


def _product(ctx: OpContext, a: Value, weights: _Blocks, bias: Value | None) -> Value:
    if int(ctx.attr("accuracy_level", 0)) == _INT8 and not a.is_constant and 0 not in a.shape:
        return _integer_product(ctx, a, weights, bias)
    k = a.shape[-1]
    q = checked(weights.scale, weights.zero, weights.storage, PerGroup(1, weights.size))
    held = _constant(ctx, np.ascontiguousarray(weights.codes[:, :k]), q)
    wide = ctx.builder.emit("dequantize", [held], {}, ctx.name)[0]
    return ctx.emit("matmul", a, wide, bias, transpose_b=True)


def _integer_product(ctx: OpContext, a: Value, weights: _Blocks, bias: Value | None) -> Value:
    """Quantize activations at run time, in the blocks of the weights."""
    size, k = weights.size, a.shape[-1]
    whole = weights.codes.shape[1]
    if whole > k:
        pads = (*(0,) * (2 * a.type.rank - 1), whole - k)
        a = ctx.emit("pad", a, pads=pads, mode="constant", value=0.0)
    lead = a.shape[:-1]
    ints, own = ctx.builder.emit(
        "dynamic_quantize", [a], {"per": "block", "block": size}, ctx.name,
        types=[TensorType(a.shape, DType.INT8, RUN_TIME_GRID),
               TensorType((*lead, whole // size), DType.FLOAT32)],
    )  # fmt: skip
    q = checked(weights.scale, weights.zero, weights.storage, PerGroup(1, size))
    codes, grid = blocked_weights(weights.codes, q)
    held = _constant(ctx, codes, grid)
    fused = bias if bias is not None and bias.is_constant else None
    y = ctx.emit("dynamic_matmul", ints, held, own, fused)
    return y if bias is fused else ctx.emit("add", y, bias)


def _constant(ctx: OpContext, codes: Array, q: QuantParams) -> Value:
    name = ctx.builder.unique(f"{ctx.input(1).name}.blocks")
    return ctx.builder.graph.constant(codes, name, q)


def _weights(ctx: OpContext, k: int) -> _Blocks:
    n, bits = int(ctx.attr("N")), int(ctx.attr("bits", 4))
    size = int(ctx.attr("block_size", 32))
    if bits not in (4, 8):
        raise UnsupportedOpError(f"weights of {bits} bits are not supported")
    if min(n, k, size) < 1:
        raise ShapeError(f"K {k}, N {n} and block_size {size} are not all positive")
    if ctx.get(4) is not None:
        order = np.asarray(ctx.static(4, "g_idx"))
        if not np.array_equal(order, np.arange(k) // size):
            raise UnsupportedOpError("its groups are not runs of neighbours (g_idx)")
    blocks = -(-k // size)
    codes = _unpacked(np.asarray(ctx.static(1, "weights")), bits, n, blocks * size)
    scale = np.asarray(ctx.static(2, "scales"), np.float32)
    if scale.size != n * blocks:
        raise ShapeError(f"{scale.size} scales do not fit {n} columns of {blocks} blocks")
    scale = scale.reshape(n, blocks)
    middle = 1 << (bits - 1)
    if ctx.get(3) is None:
        zero: Array = np.full(scale.shape, middle, np.int32)
    else:
        given = np.asarray(ctx.static(3, "zero points"))
        if given.dtype != np.uint8:
            raise UnsupportedOpError("its zero points are not integers")
        zero = _unpacked(given, bits, n, blocks).astype(np.int32)

    def spread(values: Array) -> Array:
        return np.repeat(values, size, axis=1)

    storage = DType.UINT4 if bits == 4 else DType.UINT8
    codes, scale, zero = with_positive_scales(codes, scale, zero, storage, spread)
    codes[:, k:] = spread(zero)[:, k:]  # what fills up the last block stands for 0
    if (zero == middle).all():  # around zero: held as signed integers
        storage = DType.INT4 if bits == 4 else DType.INT8
        codes = (codes.astype(np.int16) - middle).astype(np.int8)
        zero = np.zeros_like(zero)
    return _Blocks(codes, scale, zero, storage, size)


def _unpacked(packed: Array, bits: int, rows: int, count: int) -> Array:
    """Return `count` numbers of some bits from each row of bytes, the lowest bits first."""
    if packed.dtype != np.uint8 or packed.size != rows * -(-count * bits // 8):
        raise ShapeError(f"{packed.size} packed bytes do not hold {rows} x {count} numbers")
    held = packed.reshape(rows, -1)
    if bits == 8:
        return held
    pairs = np.stack([held & 15, held >> 4], axis=-1)
    return pairs.reshape(rows, -1)[:, :count]
