# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Integer products whose weights have a scale for each group along K.

The sums of a group are int32, exact, and start from the zero point's share; at the group's end they
are scaled and added to float32 totals, product and sum rounded by themselves, in the order of K.
A group lies within one run of channels, so its activations follow each other in memory.

Rows of a matrix may bring a scale for each group too. Weights may have zero points then: their
share is a zero point times the sum of a row's activations in the group, which is taken once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcompiler.targets.kernels.neon import run_of_elements
from qcompiler.targets.kernels.simd import reduce_lanes, stack, vector_spans
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    cast,
    fence,
    load,
    scratch,
    serial,
    splat,
    store,
)

if TYPE_CHECKING:
    from qcompiler.targets.kernels.macro import MacroKernel, Source
    from qcompiler.targets.kernels.register_tile import Accumulators

__all__ = ["ROW_SUMS", "grouped_loops", "row_sums"]

ROW_SUMS = "row_sums"
"""Name among a kernel's buffers of the sums that `row_sums` returns."""


def row_sums(kernel: MacroKernel) -> Buffer:
    """Emit the sums of each group of each row of activations as they are stored: int32 [M, groups].

    They take one addition for as many activations as the product multiplies by every column.
    """
    g, size = kernel.geometry, kernel.writer.epilogue.group
    runs = g.batch * g.oh * g.ow * (g.cg // size)
    sums = scratch(runs, "int32")
    with kernel.task_loop(runs * size, runs) as run:
        total = stack(1, "int32")
        store(total, 0, splat(0, "int32", 1))
        for offset, count, width in vector_spans(size, kernel.isa.lanes(), overlap=False):
            with serial(count) as k:
                part = cast(load(kernel.a, run * size + k * width + offset, width), "int32")
                part = part if width == 1 else reduce_lanes("add", bind(part))
                store(total, 0, load(total, 0, 1) + part)
        store(sums, run, load(total, 0, 1))
    return sums


def grouped_loops(
    kernel: MacroKernel,
    source: Source,
    a_index: Expr,
    a_steps: list[int],
    tiles: tuple[Expr, Expr],
    sums: tuple[Accumulators, Accumulators],
    rows: Sequence[Expr],
) -> None:
    """Accumulate a register tile over all of K.

    Args:
        kernel: The kernel.
        source: The activations.
        a_index: Element of the first pixel's activations.
        a_steps: Offset of each pixel from the first.
        tiles: The column tile, counted from the first whose weights are in the buffer of weights,
            and from the first of all.
        sums: The accumulators of a group, int32, and the totals, float32.
        rows: Row of the activations that each pixel is, counted through all images.
    """
    g, facts, plan = kernel.geometry, kernel.facts, kernel.plan
    row_scale, zeros = kernel.writer.row_scale, kernel.constants.get("group_zero")
    acc, totals = sums
    offsets = kernel.constants.get("offsets")
    step = kernel.step(acc)
    first = bind(tiles[0] * (g.k_groups * step.weight_elements))
    count, size = g.k_groups // facts.group, facts.group
    (most,) = facts.depths
    depth = min(most, size)
    by_element = kernel.isa.a_dtype == "int8"

    def block(start: Expr, groups: int) -> None:
        at = [start + k for k in range(groups)]
        steps = [k * g.k_group if offsets is None else load(offsets, k, 1) for k in at]
        step.emit(source.buffer, a_index, steps, a_steps, first + start * step.weight_elements)

    with serial(count) as group:
        terms = bind((tiles[1] * count + group) * plan.nt)
        for v in range(plan.nv):
            start = bind(load(kernel.constants["group_start"], terms + v * plan.lanes, plan.lanes))
            zero = None
            if zeros is not None:
                zero = bind(cast(load(zeros, terms + v * plan.lanes, plan.lanes), "int32"))
            for m in range(len(a_steps)):
                if zero is None:
                    acc.put(m, v, start)
                    continue
                total = load(kernel.constants[ROW_SUMS], rows[m] * count + group, 1)
                acc.put(m, v, start - zero * splat(total, "int32", plan.lanes))
        begin = bind(group * size)
        if by_element:
            at = begin * g.k_group if offsets is None else load(offsets, begin, 1)
            weights = bind(first + begin * step.weight_elements)
            run_of_elements(step, source.buffer, bind(a_index + at), a_steps, weights, facts)
        else:
            with serial(size // depth) as k:
                block(begin + k * depth, depth)
            if size % depth:
                block(begin + size // depth * depth, size % depth)
        for v in range(plan.nv):
            scale = bind(load(kernel.constants["group_scale"], terms + v * plan.lanes, plan.lanes))
            for m in range(len(a_steps)):
                factor = scale
                if row_scale is not None:
                    own = load(row_scale, rows[m] * count + group, 1)
                    factor = fence(splat(own, "float32", plan.lanes) * scale)
                product = fence(cast(acc.get(m, v), "float32") * factor)
                totals.put(m, v, totals.get(m, v) + product)
