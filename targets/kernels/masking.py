# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The kernel behind `mask_tail`: what fills up a dynamic extent becomes zero.

Buffers: x, tail (float32, one per index of the axis, 0 where the index is in use), y.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.layout import copy_run, raw, raw_dtype
from qcompiler.targets.kernels.movement import fill_run
from qcompiler.targets.kernels.simd import ITEM_BYTES, loop, unravel, worth_threads
from qcompiler.targets.kernels.tir import PrimFuncBuilder
from qcompiler.targets.kernels.workload import FLOATS

__all__ = ["MaskTailWorkload", "mask_tail"]


@dataclass(frozen=True, slots=True)
class MaskTailWorkload:
    """Zero beyond the used part of an axis."""

    shape: tuple[int, ...]
    axis: int
    dtype: str
    value: float
    """Zero in storage: the zero point, for quantized types."""


def mask_tail(workload: MaskTailWorkload, isa: Isa) -> Any:
    """Generate `mask_tail`."""
    w = workload
    size = w.shape[w.axis]
    outer, inner = prod(w.shape[: w.axis]), prod(w.shape[w.axis + 1 :])
    item = ITEM_BYTES[w.dtype]
    lanes = max(1, isa.vector_bits // 8 // item)
    with PrimFuncBuilder("mask_tail") as builder:
        x = builder.argument("x", w.shape, w.dtype)
        tail = builder.argument("tail", (size,), "float32")
        y = builder.argument("y", w.shape, w.dtype)
        source, target, ends = raw(x, w.dtype), raw(y, w.dtype), tir.flat(tail)
        number = float(w.value) if w.dtype in FLOATS else int(w.value)
        value = tir.splat(number, raw_dtype(w.dtype), 1)
        threads = worth_threads(prod(w.shape) * item / 16.0)
        with loop(outer * size, threads=threads) as flat:
            _, k = unravel(flat, [outer, size])
            start = tir.bind(flat * inner)
            used = tir.load(ends, k, 1) == tir.splat(0.0, "float32", 1)
            with T.If(used):
                with T.Then():
                    copy_run(target, start, source, start, inner, lanes)
                with T.Else():
                    fill_run(target, start, value, inner, lanes)
    return builder.finish()
