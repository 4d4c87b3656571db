# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of the lowering table: activations that are quantized at run time, and their products."""

from __future__ import annotations

import math

import numpy as np

from qcompiler.ir import Node, Value
from qcompiler.numerics import MIN_SCALE
from qcompiler.numerics_dynamic import DYNAMIC_MAX
from qcompiler.targets.cuda.blocked import blocked_product
from qcompiler.targets.cuda.lowering import EIGHT_BITS, Answer, Maker, grid, row
from qcompiler.targets.cuda.maps import Operand, broadcast_strides, map_launch, row_major
from qcompiler.targets.cuda.products import Epilogue, Product
from qcompiler.targets.cuda.program import Launch, Temporary
from qcompiler.targets.cuda.rows import row_launch
from qcompiler.targets.cuda.source import literal
from qcompiler.types import Array, DType, PerGroup


@row("dynamic_quantize")
def _dynamic_quantize(make: Maker, node: Node) -> Answer:
    x, (out, scale) = node.input(0), node.outputs
    q = grid(out)
    if q is None or x.dtype is not DType.FLOAT32:
        return f"it makes {out.type} of {x.type}"
    per = node.attr("per")
    depth = {"row": x.shape[-1], "tensor": x.type.size, "block": int(node.attr("block"))}[str(per)]
    shape, scales_shape = x.shape, scale.shape
    if per == "block":
        shape, scales_shape = (*scale.shape, depth), (*scale.shape, 1)
    extents = (x.type.size // max(depth, 1), depth, 1)
    finish = f"fmaxf(__fdiv_rn(acc, {literal(DYNAMIC_MAX)}), {literal(MIN_SCALE)})"
    scales = row_launch(
        "dynamic_scale", "qc_reduce_block", extents,
        {"IN": "float", "OUT": "float", "ACC": "float", "F": "qc_max"}, {},
        [
            "float first() { return 0.0f; }",
            "float take(float x) { return x != x ? 0.0f : fabsf(x); }",  # NaN does not count
            f"float finish(float acc) {{ return {finish}; }}",
        ],
        [("float", x)], ("float", scale),
    )  # fmt: skip
    bound = literal(DYNAMIC_MAX)
    integers = map_launch(
        "dynamic_quantize", shape, out, Operand(out, out.dtype, row_major(shape)),
        [
            Operand(x, DType.FLOAT32, row_major(shape)),
            Operand(scale, DType.FLOAT32, broadcast_strides(scales_shape, shape)),
        ],
        f"qc_quantized(__fdiv_rn(a, b), -{bound}, {bound}, {q.z})",
    )  # fmt: skip
    return scales, integers


@row("dynamic_matmul")
def _dynamic_matmul(make: Maker, node: Node) -> Answer:
    a, b, scale, out = node.input(0), node.input(1), node.input(2), node.output
    bias, q = node.optional(3), grid(a)
    if q is None or a.dtype not in EIGHT_BITS or not b.is_constant or b.qparams is None:
        return f"its operands are {a.type} and {b.type}"
    if isinstance(b.qparams.granularity, PerGroup):
        return _blocked(make, node, b.qparams.granularity.group_size)
    depth, columns = b.shape
    rows = math.prod(a.shape[:-1])
    sums = Temporary(rows * columns * 4)
    product = Product(
        a, None, rows, columns, depth, 1, a.dtype, DType.INT8,
        Epilogue(DType.FLOAT32, np.ones(1, np.float32)), sums, a_row=depth, out_row=columns,
        weights=np.ascontiguousarray(b.array().T)[None], a_zero=q.z,
    )  # fmt: skip
    operands = [
        Operand(sums, DType.FLOAT32, row_major(out.shape)),
        Operand(scale, DType.FLOAT32, broadcast_strides(scale.shape, out.shape)),
        _constant(b.qparams.scale.reshape(-1), out),
    ]
    text = "__fmul_rn(a, __fmul_rn(b, c))"
    if bias is not None:
        if not bias.is_constant:
            return "its bias is computed at run time"
        text = f"__fadd_rn({text}, {chr(ord('a') + len(operands))})"
        operands.append(_constant(bias.array().reshape(-1), out))
    return make.product(product), _finished(node, operands, text)


def _finished(node: Node, operands: list[Operand], text: str) -> Launch:
    """Return the launch that adds the residual to what a text computes, and clips it."""
    out, residual = node.output, node.optional(4)
    if residual is not None:
        text = f"__fadd_rn({text}, {chr(ord('a') + len(operands))})"
        strides = broadcast_strides(residual.shape, out.shape)
        source = residual.array() if residual.is_constant else residual
        operands.append(Operand(source, DType.FLOAT32, strides))
    if node.attr("act_min") is not None:
        text = f"qc_max()({text}, {literal(float(node.attr('act_min')))})"
    if node.attr("act_max") is not None:
        text = f"qc_min()({text}, {literal(float(node.attr('act_max')))})"
    result = Operand(out, DType.FLOAT32, row_major(out.shape))
    return map_launch("dynamic_scaled", out.shape, out, result, operands, text)


def _blocked(make: Maker, node: Node, size: int) -> Answer:
    bias, out = node.optional(3), node.output
    if bias is not None and not bias.is_constant:
        return "its bias is computed at run time"
    clips = node.attr("act_min") is not None or node.attr("act_max") is not None
    plain = node.optional(4) is None and not clips
    total = out if plain else Temporary(out.type.size * 4)
    weights = node.input(1).qparams
    assert weights is not None  # the caller looked
    launches = blocked_product(
        make, node, size, weights.scale, None if bias is None else bias.array(), total,
        node.input(2),
    )  # fmt: skip
    if plain:
        return launches
    operands = [Operand(total, DType.FLOAT32, row_major(out.shape))]
    return (*launches, _finished(node, operands, "a"))


def _constant(values: Array, out: Value) -> Operand:
    """Return an operand with one value per column, or one in all."""
    array = np.ascontiguousarray(values, np.float32)
    return Operand(array, DType.FLOAT32, broadcast_strides(array.shape, out.shape))
