# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Sums along an axis of what elementwise steps make of a tensor, in one pass over it.

    y = sum over k of steps(x[..., k, ...]),   in the order of k, each step rounded by itself

Vectors lie along the last axis, which is not the one that is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.pointwise import CHAINED
from qcompiler.targets.kernels.simd import loop, stack, unravel, vector_spans, worth_threads
from qcompiler.targets.kernels.tir import Expr, PrimFuncBuilder

__all__ = ["SumChainWorkload", "sum_chain"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SumChainWorkload:
    """Buffers: x float32, the other operands of the steps float32, y float32."""

    shape: Shape
    """Of x; the other operands broadcast to it."""
    axis: int
    steps: tuple[tuple[str, tuple[Shape, ...]], ...]
    """Operations of `CHAINED` in order, and the shapes of the factors of the other operand: none,
    itself, or two."""
    out_shape: Shape


def sum_chain(workload: SumChainWorkload, isa: Isa) -> Any:
    """Generate a sum along an axis after elementwise steps.

    Raises:
        CodegenError: a step is none of those that are known, or the last axis is summed.
    """
    w, rank = workload, len(workload.shape)
    if not 0 <= w.axis < rank - 1:
        raise CodegenError(f"sum_chain: expected an axis before the last of {rank}, got {w.axis}")
    for operation, _ in w.steps:
        if operation not in CHAINED:
            known = ", ".join(sorted(CHAINED))
            raise CodegenError(f"sum_chain: expected one of {known}, got {operation!r}")
    shapes = [w.shape, *(shape for _, factors in w.steps for shape in factors)]
    strides = [_strides(shape, rank) for shape in shapes]
    others = [axis for axis in range(rank - 1) if axis != w.axis]
    outer = [w.shape[axis] for axis in others]
    lanes = isa.lanes() * 2
    threads = worth_threads(1.5 * (1 + len(w.steps)) * prod(w.shape) / isa.lanes())
    with PrimFuncBuilder("sum_chain") as builder:
        arguments = [builder.argument(f"x{i}", shape, "float32") for i, shape in enumerate(shapes)]
        y = tir.flat(builder.argument("y", w.out_shape, "float32"))
        inputs = [tir.flat(argument) for argument in arguments]
        with loop(prod(outer), threads=threads) as row:
            indices = unravel(row, outer)
            bases = [_base(indices, [stride[axis] for axis in others]) for stride in strides]
            for offset, count, width in vector_spans(w.shape[-1], lanes, overlap=True):
                with loop(count) as j:
                    at = tir.bind(j * width + offset)
                    acc = stack(width, "float32")
                    tir.store(acc, 0, tir.splat(0, "float32", width))
                    with loop(w.shape[w.axis]) as k:
                        values = []
                        for buffer, base, stride in zip(inputs, bases, strides, strict=True):
                            place = tir.bind(base + k * stride[w.axis])
                            values.append(
                                tir.bind(tir.load(buffer, place + at, width))
                                if stride[-1]
                                else tir.bind(tir.splat(buffer[place], "float32", width))
                            )
                        value = _stepped(w, values)
                        tir.store(acc, 0, tir.load(acc, 0, width) + value)
                    tir.store(y, row * w.shape[-1] + at, tir.load(acc, 0, width))
    return builder.finish()


def _strides(shape: Shape, rank: int) -> list[int]:
    """Return the elements between neighbours along each axis, 0 where there is one in all."""
    full = (1,) * (rank - len(shape)) + shape
    return [0 if full[axis] == 1 else prod(full[axis + 1 :]) for axis in range(rank)]


def _base(indices: Sequence[Expr], strides: Sequence[int]) -> Expr:
    base = tir.splat(0, "int32", 1)
    for index, stride in zip(indices, strides, strict=True):
        base = base + index * stride
    return tir.bind(base)


def _stepped(w: SumChainWorkload, values: Sequence[Expr]) -> Expr:
    x, others = values[0], iter(values[1:])
    for operation, factors in w.steps:
        other = x
        for i, _ in enumerate(factors):
            other = tir.bind(CHAINED["mul"](other, next(others))) if i else next(others)
        x = tir.bind(CHAINED[operation](x, other))
    return x
