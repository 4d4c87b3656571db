# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Integer products whose weights have a scale for each group along K.

The sums of a group are int32, exact, and start from the zero point's share; at the group's end they
are scaled and added to float32 totals, product and sum rounded by themselves, in the order of K.
A group lies within one run of channels, so its activations follow each other in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcompiler.targets.kernels.neon import run_of_elements
from qcompiler.targets.kernels.tir import Expr, bind, cast, fence, load, serial

if TYPE_CHECKING:
    from qcompiler.targets.kernels.macro import MacroKernel, Source
    from qcompiler.targets.kernels.register_tile import Accumulators

__all__ = ["grouped_loops"]


def grouped_loops(
    kernel: MacroKernel,
    source: Source,
    a_index: Expr,
    a_steps: list[int],
    tiles: tuple[Expr, Expr],
    sums: tuple[Accumulators, Accumulators],
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
    """
    g, facts, plan = kernel.geometry, kernel.facts, kernel.plan
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
            for m in range(len(a_steps)):
                acc.put(m, v, start)
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
                product = fence(cast(acc.get(m, v), "float32") * scale)
                totals.put(m, v, totals.get(m, v) + product)
