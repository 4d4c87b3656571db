# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Quantized softmax of float32 attention scores, the same integers on every target.

    d = max(x - max(x), EXP_LEAST);  T = int32(rint(exp_f32(d) * 2**20));  S = max(sum T, 1) (exact)
    y = clamp(rint(f32(T) * (f32(1 / s_y) / f32(S))) + zero_point, qmin, qmax)

`exp_f32` is `numerics.exp_f32`: each of its float32 steps is rounded by itself, so products that
feed an addition are fenced. The sum is of integers: its order does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.numerics import (
    EXP_COEFFICIENTS,
    EXP_LEAST,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    SOFTMAX_BITS,
)
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.simd import (
    STACK_BYTES,
    exact_mul,
    loop,
    lrint,
    quantized,
    reduce_lanes,
    settle,
    stack,
    vector_spans,
    workspace,
    worth_threads,
)
from qcompiler.targets.kernels.tir import Buffer, Expr, PrimFuncBuilder

__all__ = ["ScoresWorkload", "exp_exact", "softmax_scores"]


@dataclass(frozen=True, slots=True)
class ScoresWorkload:
    """Softmax of float32 along `axis` to integers; buffers: x, y."""

    shape: tuple[int, ...]
    axis: int
    out_scale: float
    """s_y; 1 for a float32 output."""
    dtype: str
    """Of the output: uint8, int8, int16 or float32."""
    zero_point: int = 0
    qmin: int = 0
    qmax: int = 0


def _const(value: float | np.floating[Any], like: Expr) -> Expr:
    return tir.splat(float(value), "float32", tir.lanes_of(like))


def exp_exact(x: Expr) -> Expr:
    """`numerics.exp_f32`, bit for bit, of float32 lanes in [EXP_LEAST, 0]."""
    lanes = tir.lanes_of(x)
    n = tir.bind(lrint(x * _const(LOG2_E, x)))
    whole = tir.bind(tir.cast(n, "float32"))
    r = x - exact_mul(whole, _const(LN2_HIGH, x))
    r = settle(r - exact_mul(whole, _const(LN2_LOW, x)))
    p = _const(EXP_COEFFICIENTS[0], x)
    for c in EXP_COEFFICIENTS[1:]:
        p = exact_mul(p, r) + _const(c, x)
    e = settle((exact_mul(p, r * r) + r) + _const(1.0, x))
    bits = T.shift_left(n + tir.splat(127, "int32", lanes), tir.splat(23, "int32", lanes))
    return e * tir.reinterpret(bits, "float32", lanes)


def softmax_scores(workload: ScoresWorkload, isa: Isa) -> Any:
    """Generate the softmax; rows along other axes than the last are copied together first."""
    w = workload
    axis = w.axis % len(w.shape)
    outer, depth, inner = prod(w.shape[:axis]), w.shape[axis], prod(w.shape[axis + 1 :])
    threads = worth_threads(prod(w.shape) * 30.0 / isa.lanes())
    place = stack if depth * 4 <= STACK_BYTES else workspace
    with PrimFuncBuilder("softmax_scores") as builder:
        source = builder.argument("x", w.shape, "float32")
        output = builder.argument("y", w.shape, w.dtype)
        x, y = tir.flat(source), tir.flat(output)
        with loop(outer * inner, threads=threads) as row:
            area = place(depth, "int32")
            if inner == 1:
                _row(w, x, y, area, tir.bind(row * depth), depth, isa.lanes() * 2)
            else:
                near_x, near_y = place(depth, "float32"), place(depth, w.dtype)
                first = T.floordiv(row, inner) * (depth * inner) + T.floormod(row, inner)
                base = tir.bind(first)
                with loop(depth) as k:
                    tir.store(near_x, k, tir.load(x, base + k * inner, 1))
                _row(w, near_x, near_y, area, tir.bind(0), depth, isa.lanes() * 2)
                with loop(depth) as k:
                    tir.store(y, base + k * inner, tir.load(near_y, k, 1))
    return builder.finish()


def _row(
    w: ScoresWorkload,
    x: Buffer,
    y: Buffer,
    area: Buffer,
    base: Expr,
    depth: int,
    lanes: int,
) -> None:
    """Softmax of the contiguous row from element `base` of `x` and `y` on."""
    top = stack(1, "float32")
    tir.store(top, 0, tir.splat(float("-inf"), "float32", 1))
    for offset, count, width in vector_spans(depth, lanes, overlap=True):
        best = stack(width, "float32")
        tir.store(best, 0, tir.load(x, base + offset, width))
        with loop(count) as k:
            value = tir.load(x, base + (k * width + offset), width)
            tir.store(best, 0, T.max(tir.load(best, 0, width), value))
        part = reduce_lanes("max", tir.load(best, 0, width)) if width > 1 else tir.load(best, 0, 1)
        tir.store(top, 0, T.max(tir.load(top, 0, 1), part))
    peak = tir.bind(tir.load(top, 0, 1))
    total = stack(1, "int64")
    tir.store(total, 0, tir.splat(0, "int64", 1))
    for offset, count, width in vector_spans(depth, lanes, overlap=False):
        dtype = "int32" if count < 2047 else "int64"  # an int32 lane holds 2047 values of 2**20
        acc = stack(width, dtype)
        tir.store(acc, 0, tir.splat(0, dtype, width))
        with loop(count) as k:
            at = tir.bind(k * width + offset)
            value = tir.load(x, base + at, width)
            below = settle(value - tir.splat(peak, "float32", width))
            least = _const(EXP_LEAST, below)
            # NaN (a row of -inf) counts as the least, as in the definition.
            d = settle(T.Select(below >= least, below, least))
            t = settle(lrint(exp_exact(d) * _const(float(1 << SOFTMAX_BITS), d)))
            tir.store(area, at, t)
            tir.store(acc, 0, tir.load(acc, 0, width) + tir.cast(t, dtype))
        lane_sum = tir.cast(tir.load(acc, 0, width), "int64")
        part = reduce_lanes("add", lane_sum) if width > 1 else lane_sum
        tir.store(total, 0, tir.load(total, 0, 1) + part)
    inverse = float(np.float32(1.0 / np.float64(w.out_scale)))
    whole = T.max(tir.load(total, 0, 1), tir.splat(1, "int64", 1))
    factor = settle(tir.splat(inverse, "float32", 1) / tir.cast(whole, "float32"))
    for offset, count, width in vector_spans(depth, lanes, overlap=True):
        with loop(count) as k:
            at = tir.bind(k * width + offset)
            t = tir.bind(tir.load(area, at, width))
            real = exact_mul(tir.cast(t, "float32"), tir.splat(factor, "float32", width))
            if w.dtype != "float32":
                real = quantized(real, w.zero_point, w.qmin, w.qmax, w.dtype)
            tir.store(y, base + at, real)
