# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Quantization of activations at run time: a scale per row, block or tensor, and the integers.

The arithmetic is `numerics_dynamic.dynamic_quantize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.numerics import MIN_SCALE
from qcompiler.numerics_dynamic import DYNAMIC_MAX
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.simd import (
    loop,
    quantized,
    reduce_lanes,
    stack,
    vector_spans,
    worth_threads,
)
from qcompiler.targets.kernels.tir import Buffer, Expr, PrimFuncBuilder

__all__ = ["DynamicQuantizeWorkload", "dynamic_quantize"]

_INFINITY = 0x7F800000
"""Bits of the float32 infinity."""


@dataclass(frozen=True)
class DynamicQuantizeWorkload:
    """Runs of float32 to 8 bits by scales of their own; buffers: x, q, scale."""

    shape: tuple[int, ...]
    run: int
    """Neighbours along the last axis that share a scale: a row, or what divides it; 0: all do."""
    dtype: str
    zero_point: int

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales."""
        return (*self.shape[:-1], self.shape[-1] // self.run) if self.run else ()


def dynamic_quantize(workload: DynamicQuantizeWorkload, isa: Isa) -> Any:
    """Generate the kernel: the greatest magnitude of a run, then its integers."""
    w = workload
    depth = w.run or prod(w.shape)
    lanes = isa.vector_bits // 8
    threads = worth_threads(prod(w.shape) * 8.0 / isa.lanes())
    with PrimFuncBuilder("dynamic_quantize") as builder:
        source = builder.argument("x", w.shape, "float32")
        target = builder.argument("q", w.shape, w.dtype)
        scales = builder.argument("scale", w.scale_shape, "float32")
        x, q, scale = (tir.flat(buffer) for buffer in (source, target, scales))
        with loop(prod(w.shape) // depth, threads=threads) as row:
            base = tir.bind(row * depth)
            top = _greatest(x, base, depth, isa.lanes() * 4)
            s = top / tir.splat(float(DYNAMIC_MAX), "float32", 1)
            s = tir.bind(T.max(s, tir.splat(MIN_SCALE, "float32", 1)))
            tir.store(scale, row, s)
            low, high = w.zero_point - DYNAMIC_MAX, w.zero_point + DYNAMIC_MAX
            for offset, count, width in vector_spans(depth, lanes, overlap=True):
                with loop(count) as k:
                    at = tir.bind(base + k * width + offset)
                    real = tir.load(x, at, width) / tir.splat(s, "float32", width)
                    ints = quantized(tir.bind(real), w.zero_point, low, high, w.dtype, isa)
                    tir.store(q, at, ints)
    return builder.finish()


def _greatest(x: Buffer, base: Expr, count: int, lanes: int) -> Expr:
    """The greatest magnitude of `count` elements; NaN does not count.

    Without the sign bit, floats are ordered as the integers of their bits; NaN are the greatest.
    """
    total = stack(1, "int32")
    tir.store(total, 0, tir.splat(0, "int32", 1))
    for offset, repetitions, width in vector_spans(count, lanes, overlap=True):
        zero = tir.splat(0, "int32", width)
        acc = stack(width, "int32")
        tir.store(acc, 0, zero)
        with loop(repetitions) as k:
            bits = tir.reinterpret(
                tir.load(x, base + k * width + offset, width), "int32", width
            ) & tir.splat(0x7FFFFFFF, "int32", width)
            bits = tir.bind(bits)
            number = T.Select(bits <= tir.splat(_INFINITY, "int32", width), bits, zero)
            tir.store(acc, 0, T.max(tir.load(acc, 0, width), number))
        part = reduce_lanes("max", tir.load(acc, 0, width))
        tir.store(total, 0, T.max(tir.load(total, 0, 1), part))
    return tir.bind(tir.reinterpret(tir.load(total, 0, 1), "float32", 1))
