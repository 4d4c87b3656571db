# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of the lowering table: pooling, reductions, softmax, normalization, scans."""

from __future__ import annotations

import math

import numpy as np

from qcompiler import numerics
from qcompiler.ir import Node, Value
from qcompiler.targets.cuda.lowering import (
    EIGHT_BITS,
    FLOATS,
    Answer,
    Maker,
    bounds,
    grid,
    row,
    scalar,
)
from qcompiler.targets.cuda.products import Window
from qcompiler.targets.cuda.rows import along, row_launch
from qcompiler.targets.cuda.source import c_type, literal
from qcompiler.targets.cuda.windows import pool_launch, quantized_text
from qcompiler.types import DType, QuantParams
from qcompiler.windows import Geometry, counts

_NUMBERS = {  # dtype -> (least, greatest) as C++ text
    DType.FLOAT32: ("-__int_as_float(0x7f800000)", "__int_as_float(0x7f800000)"),
    DType.INT8: ("-128", "127"),
    DType.UINT8: ("0", "255"),
    DType.INT16: ("-32768", "32767"),
    DType.UINT16: ("0", "65535"),
    DType.INT32: ("-2147483647 - 1", "2147483647"),
    DType.INT64: ("-9223372036854775807ll - 1", "9223372036854775807ll"),
}


def result_text(out: Value, value: str) -> str:
    """Return C++ that turns a float32 into an element of a quantized or float result."""
    q = out.qparams
    if q is None:
        return f"qc_as<{c_type(out.dtype)}>::of({value})"
    return quantized_text(out.dtype, value, *bounds(q))


def _fits(out: Value) -> str | None:
    """Return why a result is neither float nor quantized per tensor, or None."""
    if out.dtype in FLOATS or grid(out) is not None:
        return None
    return f"its result {out.type} is neither float nor quantized per tensor"


@row("max_pool", "average_pool", "qaverage_pool")
def _pool(make: Maker, node: Node) -> Answer:
    x, out, name = node.input(0), node.output, node.op.name
    if x.type.rank != 4 or node.attr("layout") != "NHWC":
        return f"its operand {x.type} is not an image with channels last"
    (n, ih, iw, c), (_, oh, ow, _) = x.shape, out.shape
    kernel, pads = node.attr("kernel"), node.attr("pads")
    strides, dilations = tuple(node.attr("strides")), tuple(node.attr("dilations"))
    window = Window(
        n, ih, iw, c, oh, ow, kernel[0], kernel[1], strides, (pads[0], pads[1]), dilations
    )
    geometry = Geometry(
        (ih, iw), tuple(kernel), strides, ((pads[0], pads[2]), (pads[1], pads[3])), dilations,
        bool(node.attr("ceil_mode")),
    )  # fmt: skip
    if name == "max_pool":
        if x.dtype is DType.FLOAT16:
            return pool_launch(
                name, x, out, window, x.dtype, out.dtype, accumulator="float",
                first=_NUMBERS[DType.FLOAT32][0], fold="qc_max()(acc, qc_real(x))",
                finish="qc_as<qc_half>::of(acc)",
            ),  # fmt: skip
        if x.dtype not in _NUMBERS:
            return f"no kernel takes {x.dtype.value}"
        wide = "qc_i64" if x.dtype is DType.INT64 else "int"
        wide = "float" if x.dtype is DType.FLOAT32 else wide
        ctype = c_type(x.dtype)
        return pool_launch(
            name, x, out, window, x.dtype, out.dtype, accumulator=wide,
            first=_NUMBERS[x.dtype][0], fold=f"qc_max()(acc, static_cast<{wide}>(x))",
            finish=f"static_cast<{ctype}>(acc)",
        ),  # fmt: skip
    count = counts(geometry, include_pad=bool(node.attr("count_include_pad")))
    if name == "average_pool":
        if x.dtype not in FLOATS:
            return f"no kernel takes {x.dtype.value}"
        return pool_launch(
            name, x, out, window, x.dtype, out.dtype, accumulator="float", first="0.0f",
            fold="__fadd_rn(acc, qc_real(x))",
            finish=f"qc_as<{c_type(out.dtype)}>::of(__fdiv_rn(acc, scale))",
            multiplier=count.astype(np.float32).reshape(-1),
        ),  # fmt: skip
    q = grid(x)
    problem = _fits(out)
    if q is None or problem:
        return problem or f"its operand {x.type} is not quantized per tensor"
    scale = numerics.mean_multiplier(q, np.maximum(count, 1), out.qparams)
    return pool_launch(
        name, x, out, window, x.dtype, out.dtype, accumulator="int", first="0",
        fold=f"qc_wrap_add(acc, static_cast<int>(x) - ({q.z}))",
        finish=result_text(out, "__fmul_rn(__int2float_rn(acc), scale)"),
        multiplier=np.ascontiguousarray(scale.reshape(-1), np.float32),
    ),  # fmt: skip


# -------------------------------------------------------------------------------- reductions


def _run(node: Node) -> tuple[int, int, int] | str:
    """Return (outer, depth, inner) of the reduced axes, which must be neighbours."""
    x = node.input(0)
    axes = sorted({a % x.type.rank for a in node.attr("axes")})
    if not axes:
        return "it reduces over no axis"
    first, last = axes[0], axes[-1]
    if any(x.shape[a] != 1 for a in range(first, last) if a not in axes):
        return "it reduces over axes with others between them"
    return (
        math.prod(x.shape[:first]),
        math.prod(x.shape[first : last + 1]),
        math.prod(x.shape[last + 1 :]),
    )


# operator -> (combination, first, take, finish) on floats; N stands for the depth
_FLOAT_REDUCTIONS = {
    "reduce_mean": ("qc_sum", "0.0f", "x", "__fdiv_rn(acc, N)"),
    "reduce_sum": ("qc_sum", "0.0f", "x", "acc"),
    "reduce_prod": ("qc_product_of", "1.0f", "x", "acc"),
    "reduce_l1": ("qc_sum", "0.0f", "fabsf(x)", "acc"),
    "reduce_l2": ("qc_sum", "0.0f", "x * x", "sqrtf(acc)"),
    "reduce_sum_square": ("qc_sum", "0.0f", "x * x", "acc"),
    "reduce_log_sum": ("qc_sum", "0.0f", "x", "logf(acc)"),
    "reduce_max": ("qc_max", _NUMBERS[DType.FLOAT32][0], "x", "acc"),
    "reduce_min": ("qc_min", _NUMBERS[DType.FLOAT32][1], "x", "acc"),
}
_INTEGER_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"})


@row("qreduce_mean", *_FLOAT_REDUCTIONS)
def _reduce(make: Maker, node: Node) -> Answer:
    x, out, name = node.input(0), node.output, node.op.name
    extents = _run(node)
    if isinstance(extents, str):
        return extents
    depth = extents[1]
    source, target = c_type(x.dtype), c_type(out.dtype)
    if name == "qreduce_mean":
        q, problem = grid(x), _fits(out)
        if q is None or problem:
            return problem or f"its operand {x.type} is not quantized per tensor"
        scale = float(numerics.mean_multiplier(q, depth, out.qparams).reshape(()))
        value = f"__fmul_rn(__int2float_rn(static_cast<int>(acc)), {literal(scale)})"
        # Unsigned sums wrap as int32 does, without being undefined.
        acc, combine, first = "qc_u32", "qc_sum", "0"
        take = f"static_cast<qc_u32>(static_cast<int>(x) - ({q.z}))"
        finish = result_text(out, value)
    elif x.dtype in FLOATS:
        combine, first, take, finish = _FLOAT_REDUCTIONS[name]
        acc = "float"
        take = take.replace("x", "qc_real(x)")
        finish = f"qc_as<{target}>::of({finish.replace('N', literal(float(depth)))})"
    elif name in _INTEGER_REDUCTIONS and x.dtype in _NUMBERS:
        combine = _FLOAT_REDUCTIONS[name][0]
        least, greatest = _NUMBERS[x.dtype]
        first = {"reduce_max": least, "reduce_min": greatest, "reduce_prod": "1"}.get(name, "0")
        acc, take, finish = "qc_i64", "x", f"static_cast<{target}>(acc)"
    else:
        return f"no kernel takes {x.dtype.value}"
    by_thread = extents[2] >= 32 or depth < 32
    return row_launch(
        name, "qc_reduce_thread" if by_thread else "qc_reduce_block", extents,
        {"IN": source, "OUT": target, "ACC": acc, "F": combine}, {},
        [
            f"{acc} first() {{ return {first}; }}",
            f"{acc} take({source} x) {{ return {take}; }}",
            f"{target} finish({acc} acc) {{ return {finish}; }}",
        ],
        [(source, x)], (target, out), thread_per_row=by_thread,
    ),  # fmt: skip


# ----------------------------------------------------------------------------------- softmax


@row("qsoftmax")
def _qsoftmax(make: Maker, node: Node) -> Answer:
    x, out = node.input(0), node.output
    problem = _fits(out)
    if problem:
        return problem
    q: QuantParams | None = None
    table = np.zeros(1, np.int32)
    if x.dtype in EIGHT_BITS:
        q = grid(x)
        if q is None:
            return f"its operand {x.type} is not quantized per tensor"
        table = numerics.softmax_table(q.s)
        wide, term = "int", "table[top - static_cast<int>(x)]"
    elif x.dtype is DType.FLOAT32:
        wide, term = "float", "qc_score_term(x, top)"
    else:
        return f"no kernel takes {x.dtype.value}"
    source, target = c_type(x.dtype), c_type(out.dtype)
    over = 1.0 if out.qparams is None else out.qparams.s
    return row_launch(
        "qsoftmax", "qc_softmax_exact", along(x.shape, int(node.attr("axis"))),
        {"IN": source, "OUT": target, "WIDE": wide},
        {"ONE_OVER_SCALE": scalar(1.0, over=over)},
        [
            f"int term({source} x, {wide} top, const int* table) {{ return {term}; }}",
            f"{target} finish(float y) {{ return {result_text(out, 'y')}; }}",
        ],
        [(source, x), ("int", table)], (target, out),
    ),  # fmt: skip


@row("softmax", "log_softmax")
def _softmax(make: Maker, node: Node) -> Answer:
    x, out = node.input(0), node.output
    if x.dtype not in FLOATS:
        return f"no kernel takes {x.dtype.value}"
    source, target = c_type(x.dtype), c_type(out.dtype)
    return row_launch(
        node.op.name, "qc_softmax_float", along(x.shape, int(node.attr("axis"))),
        {"IN": source, "OUT": target}, {"LOGARITHM": node.op.name == "log_softmax"}, [],
        [(source, x)], (target, out),
    ),  # fmt: skip


# ------------------------------------------------------------------------------ normalization


@row("qlayer_norm")
def _qlayer_norm(make: Maker, node: Node) -> Answer:
    x, gamma, beta, out = node.input(0), node.input(1), node.input(2), node.output
    q, problem = grid(x), _fits(out)
    if q is None or problem:
        return problem or f"its operand {x.type} is not quantized per tensor"
    if not gamma.is_constant or not beta.is_constant:
        return "its scale or bias is computed at run time"
    depth = x.shape[-1]
    s = np.float64(q.s)
    if out.qparams is None:
        finish = result_text(out, "y")
    else:
        finish = result_text(out, f"__fdiv_rn(y, {literal(out.qparams.s)})")
    source, target = c_type(x.dtype), c_type(out.dtype)
    return row_launch(
        "qlayer_norm", "qc_layer_norm_exact", along(x.shape, -1), {"IN": source, "OUT": target},
        {
            "VARIANCE_SCALE": float(np.float32(s * s / np.float64(depth * depth))),
            "EPSILON": float(np.float32(node.attr("epsilon"))),
            "MEAN_SCALE": float(np.float32(s / np.float64(depth))),
        },
        [f"{target} finish(float y) {{ return {finish}; }}"],
        [(source, x), ("float", gamma.array().astype(np.float32)),
         ("float", beta.array().astype(np.float32))], (target, out),
    ),  # fmt: skip


@row("layer_norm", "instance_norm")
def _norm(make: Maker, node: Node) -> Answer:
    x, out = node.input(0), node.output
    if x.dtype not in FLOATS:
        return f"no kernel takes {x.dtype.value}"
    per_row = node.op.name == "instance_norm"
    axis = 2 if per_row else int(node.attr("axis")) % x.type.rank
    extents = (math.prod(x.shape[:axis]), math.prod(x.shape[axis:]), 1)
    channels = x.shape[1] if per_row else 1
    constants = []
    for v, default in ((node.optional(1), 1.0), (node.optional(2), 0.0)):
        if v is not None and not v.is_constant:
            return "its scale or bias is computed at run time"
        values = np.full(1, default) if v is None else v.array()
        values = np.broadcast_to(values, (channels,) if per_row else x.shape[axis:])
        constants.append(np.ascontiguousarray(values.reshape(-1), np.float32))
    source, target = c_type(x.dtype), c_type(out.dtype)
    return row_launch(
        node.op.name, "qc_norm_float", extents, {"IN": source, "OUT": target},
        {"EPSILON": float(node.attr("epsilon")), "PER_ROW": per_row, "CHANNELS": channels}, [],
        [(source, x), ("float", constants[0]), ("float", constants[1])], (target, out),
    ),  # fmt: skip


# -------------------------------------------------------------------------------------- scans


@row("argmax", "argmin")
def _arg(make: Maker, node: Node) -> Answer:
    x, out = node.input(0), node.output
    if x.dtype not in _NUMBERS:
        return f"no kernel takes {x.dtype.value}"
    source = c_type(x.dtype)
    return row_launch(
        node.op.name, "qc_arg", along(x.shape, int(node.attr("axis"))), {"IN": source},
        {"LARGEST": node.op.name == "argmax", "LAST": bool(node.attr("select_last_index"))}, [],
        [(source, x)], ("qc_i64", out), thread_per_row=True,
    ),  # fmt: skip


@row("cumsum")
def _cumsum(make: Maker, node: Node) -> Answer:
    x, out = node.input(0), node.output
    if x.dtype not in _NUMBERS:
        return f"no kernel takes {x.dtype.value}"
    source = c_type(x.dtype)
    return row_launch(
        "cumsum", "qc_cumulate", along(x.shape, int(node.attr("axis"))), {"IN": source},
        {"EXCLUSIVE": bool(node.attr("exclusive")), "REVERSE": bool(node.attr("reverse"))}, [],
        [(source, x)], (source, out), thread_per_row=True,
    ),  # fmt: skip
