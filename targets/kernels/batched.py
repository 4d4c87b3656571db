# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products of two activations (attention scores, probabilities times values).

A task packs its block of B into a work area in the layout that `macro` reads, then runs the same
register tiles.  With both operands stored with zero points::

    sum (a - za)(b - zb) = sum a*b  -  za * sum_k b  -  zb * sum_k a  +  K * za * zb

so each column starts from `bias - za * (column sum) + K * za * zb` and each row, where zb is not
zero, from `-zb * (row sum)`.  Stored s8 rows and u8 columns are first shifted by 128 to the
signedness that the dot instruction takes.  B is not known at compile time, so nothing can be proved
about saturation: rows without a non-saturating dot instruction multiply by int16 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from qcompiler.targets.kernels.macro import (
    Accumulators,
    MacroKernel,
    Source,
    Step,
    copy_elements,
)
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    cast,
    intrinsic,
    load,
    local,
    minimum,
    own_function,
    parallel,
    reinterpret,
    scratch,
    select_lazy,
    serial,
    shuffle,
    splat,
    store,
)
from qcompiler.targets.kernels.workload import MatmulWorkload

__all__ = ["emit_batched"]


def emit_batched(kernel: MacroKernel, workload: MatmulWorkload, b: Buffer) -> None:
    """Emit the whole kernel; `b` is B as a one-dimensional buffer."""
    plan = kernel.plan
    batch_shape = workload.batch_shape
    blocks = plan.row_blocks * plan.col_blocks
    with parallel(kernel.tasks) as task:
        index = bind(task // blocks)
        block = bind(task % plan.col_blocks)
        first = bind(task // plan.col_blocks % plan.row_blocks * plan.row_block)
        last = bind(minimum(first + plan.row_block, plan.rows.tiles))
        begin = bind(block * plan.col_block)
        end = bind(minimum(begin + plan.col_block, plan.tiles))
        a_matrix = _matrix_index(index, batch_shape, workload.a_shape[:-2])
        b_matrix = _matrix_index(index, batch_shape, workload.b_shape[:-2])
        operands = _Operands(
            kernel, workload, b, bind(b_matrix * (workload.k * workload.n)), begin, end
        )
        packed = operands.pack()
        source = _rows(kernel, workload, a_matrix, kernel.first_row_of(first))
        source = replace(source, image=index, first_tile=begin)
        packed.emit_task(source, (first, last), (begin, end))


def _matrix_index(index: Expr, batch: Sequence[int], own: Sequence[int]) -> Expr:
    """Which of an operand's matrices belongs to output matrix `index` (numpy broadcasting)."""
    own = (1,) * (len(batch) - len(own)) + tuple(own)
    found: Expr = 0
    stride = math.prod(own)
    below = math.prod(batch)
    for extent, mine in zip(batch, own, strict=True):
        below //= extent
        stride //= mine
        if mine > 1:
            found = found + index // below % extent * stride
    return found


def _rows(kernel: MacroKernel, workload: MatmulWorkload, matrix: Expr, first_row: Expr) -> Source:
    """A's rows of a task, copied where they cannot be read in place, and their terms."""
    m, k = workload.m, workload.k
    rows = min(kernel.plan.band, m)
    first_row = bind(first_row)
    origin = bind(matrix * (m * k))
    if kernel.geometry.direct and not workload.transpose_a:
        source = Source(kernel.a, origin, k)
    else:
        dtype = "float32" if workload.a_dtype == "float32" else "uint8"
        work = scratch(rows * k + 64, dtype)
        count = bind(minimum(rows, m - first_row))
        with serial(count) as row:
            if workload.transpose_a:
                with serial(k) as column:
                    index = origin + column * m + first_row + row
                    copy_elements(work, row * k + column, kernel.a, index, 1)
            else:
                copy_elements(work, row * k, kernel.a, bind(origin + (first_row + row) * k), k)
        source = Source(work, bind(0 - first_row * k), k)
    if not kernel.facts.row_terms:
        return source
    terms = scratch(rows, "int32")
    zero_point = bind(load(kernel.constants["zero_points"], 1, 1))
    with serial(minimum(rows, m - first_row)) as row:
        base = bind(source.origin + (first_row + row) * k)
        store(terms, row, (0 - zero_point) * _row_sum(source.buffer, base, k))
    return replace(source, row_terms=terms, first_row=first_row)


def _row_sum(buffer: Buffer, base: Expr, count: int) -> Expr:
    """The int32 sum of `count` consecutive u8."""
    lanes = 16
    whole = count // lanes
    total = local(1, "int32")
    store(total, 0, splat(0, "int32", 1))
    if whole:
        sums = local(lanes, "int32")
        store(sums, 0, splat(0, "int32", lanes))
        with serial(whole) as chunk:
            piece = cast(load(buffer, base + chunk * lanes, lanes), "int32")
            store(sums, 0, load(sums, 0, lanes) + piece)
        reduced = intrinsic("int32", "llvm.vector.reduce.add", load(sums, 0, lanes))
        store(total, 0, reduced)
    for at in range(whole * lanes, count):
        store(total, 0, load(total, 0, 1) + cast(load(buffer, base + at, 1), "int32"))
    return load(total, 0, 1)


class _Operands:
    """Packs one task's block of B."""

    def __init__(
        self,
        kernel: MacroKernel,
        workload: MatmulWorkload,
        b: Buffer,
        origin: Expr,
        begin: Expr,
        end: Expr,
    ) -> None:
        self.kernel, self.workload = kernel, workload
        self.b, self.origin, self.begin, self.end = b, origin, begin, end
        plan = kernel.plan
        self.kind = kernel.facts.dot
        self.is_float = self.kind == "float"
        self.group = kernel.geometry.k_group
        dtype = {"float": "float32", "exact": "int16"}.get(self.kind, "int8")
        steps = plan.col_block * kernel.geometry.k_groups
        self.weight = scratch(steps * plan.nt * self.group, dtype)
        self.bias = scratch(plan.col_block * plan.nt, "float32" if self.is_float else "int32")
        self.flip = 128 if workload.b_dtype == "uint8" else 0

    def pack(self) -> MacroKernel:
        """Fill the work areas; the kernel that reads them."""
        with serial(self.begin, self.end) as tile, own_function(f"{self.kernel.name}_pack"):
            self._tile(tile)
        constants = {**self.kernel.constants, "weight": self.weight, "bias": self.bias}
        return replace(self.kernel, constants=constants)

    def _tile(self, tile: Expr) -> None:
        plan, workload = self.kernel.plan, self.workload
        groups = self.kernel.geometry.k_groups
        starts, valid = self.kernel.columns(tile)
        near = bind(tile - self.begin)
        step = Step(
            self.kernel.isa,
            self.kind,
            self.weight,
            Accumulators(1, plan.nv, plan.lanes, "float32" if self.is_float else "int32"),
        )
        base = bind(near * (groups * step.weight_elements))
        for v in range(plan.nv):
            start = starts[v] if len(starts) > 1 else starts[0] + v * plan.lanes
            whole = workload.k // self.group if valid == plan.lanes else 0
            if whole and workload.transpose_b:
                whole = self._transposed(base, v, start, whole)
            elif whole:
                self._interleaved(base, v, start, whole)
            self._one_by_one(base, v, start, valid, whole)
        for v in range(plan.nv):
            index = bind(tile * plan.nt + v * plan.lanes)
            bias = load(self.kernel.constants["bias"], index, plan.lanes)
            if not self.is_float:
                bias = bias + self._column_term(step, base, v)
            store(self.bias, near * plan.nt + v * plan.lanes, bias)

    def _column_term(self, step: Step, base: Expr, v: int) -> Expr:
        """`K * za * zb - za * column sum`."""
        lanes = self.kernel.plan.lanes
        acc = step.acc
        ones = (
            [splat(1, "int16", 2 * lanes)] * 2
            if self.kind == "exact"
            else [splat(1, "uint8", 4 * lanes)]
        )
        acc.put(0, v, splat(0, "int32", lanes))
        with serial(self.kernel.geometry.k_groups) as k:
            weights = step.weights(base + k * step.weight_elements)[v]
            acc.put(0, v, step.multiply(acc.get(0, v), ones, weights))
        points = self.kernel.constants["zero_points"]
        constant = splat(load(points, 2, 1), "int32", lanes)
        return constant - splat(load(points, 0, 1), "int32", lanes) * acc.get(0, v)

    def _put(self, base: Expr, k: Expr, v: int, lane: int, quads: Expr, lanes: int) -> None:
        """Store `lanes` K-groups (int32 of four bytes) of neighbouring columns."""
        plan = self.kernel.plan
        if self.flip:
            quads = quads ^ splat(-2139062144, "int32", lanes)  # 0x80808080
        if self.kind != "exact":
            at = base + (k * plan.nv + v) * (plan.lanes * 4) + lane * 4
            store(self.weight, at, reinterpret(quads, "int8", 4 * lanes))
            return
        words = bind(reinterpret(quads, "int16", 2 * lanes))
        eight = splat(8, "int16", 2 * lanes)
        for half, value in enumerate(((words << eight) >> eight, words >> eight)):
            at = base + ((k * 2 + half) * plan.nv + v) * (plan.lanes * 2) + lane * 2
            store(self.weight, at, value)

    def _interleaved(self, base: Expr, v: int, start: Expr, whole: int) -> None:
        """B is [K, N]: rows of a group are interleaved byte by byte."""
        n, lanes = self.workload.n, self.kernel.plan.lanes
        first = bind(self.origin + start)
        with serial(whole) as k:
            if self.is_float:
                at = base + (k * self.kernel.plan.nv + v) * lanes
                store(self.weight, at, load(self.b, first + k * n, lanes))
                return
            rows = [bind(load(self.b, first + (k * 4 + r) * n, lanes)) for r in range(4)]
            pairs = [bind(_interleave(rows[i], rows[i + 1], 1, lanes)) for i in (0, 2)]
            quads = reinterpret(_interleave(pairs[0], pairs[1], 2, lanes), "int32", lanes)
            self._put(base, k, v, 0, bind(quads), lanes)

    def _transposed(self, base: Expr, v: int, start: Expr, whole: int) -> int:
        """B is [N, K]: four columns times four groups are transposed at a time.

        Returns the number of groups done, a multiple of four.
        """
        k_extent, lanes = self.workload.k, self.kernel.plan.lanes
        blocks = whole // 4
        if not blocks:
            return 0
        first = bind(self.origin + start * k_extent)
        dtype, size = ("float32", 1) if self.is_float else ("int32", 4)
        with serial(lanes // 4) as quarter, serial(blocks) as block:
            lane = bind(quarter * 4)
            rows = []
            for r in range(4):
                row = load(self.b, first + (lane + r) * k_extent + block * (4 * size), 4 * size)
                rows.append(bind(row if self.is_float else reinterpret(row, "int32", 4)))
            low = [bind(shuffle([rows[i], rows[i + 1]], (0, 4, 1, 5))) for i in (0, 2)]
            high = [bind(shuffle([rows[i], rows[i + 1]], (2, 6, 3, 7))) for i in (0, 2)]
            for j in range(4):
                pair = low if j < 2 else high
                picks = (0, 1, 4, 5) if j % 2 == 0 else (2, 3, 6, 7)
                column = bind(shuffle(pair, picks))
                k = bind(block * 4 + j)
                if dtype == "float32":
                    at = base + (k * self.kernel.plan.nv + v) * lanes + lane
                    store(self.weight, at, column)
                else:
                    self._put(base, k, v, lane, column, 4)
        return blocks * 4

    def _one_by_one(self, base: Expr, v: int, start: Expr, valid: int, done: int) -> None:
        """The K-groups from `done` on, element by element, with zeros where there is no element."""
        workload, plan = self.workload, self.kernel.plan
        groups = self.kernel.geometry.k_groups
        if done == groups:
            return
        with serial(done, groups) as k, serial(plan.lanes) as lane:
            for r in range(self.group):
                row = k * self.group + r
                column = start + lane
                if workload.transpose_b:
                    index = self.origin + column * workload.k + row
                else:
                    index = self.origin + row * workload.n + column
                value = load(self.b, index, 1)
                if not self.is_float:
                    value = cast(value, "int32") - self.flip
                dtype = "float32" if self.is_float else "int32"
                zero = splat(0, dtype, 1)
                value = select_lazy((lane < valid, row < workload.k), value, zero)
                step = (k * plan.nv + v) * (plan.lanes * self.group)
                at = step + lane * self.group + r
                if self.kind == "exact":
                    half = (k * 2 + r % 2) * plan.nv + v
                    at = half * (plan.lanes * 2) + lane * 2 + r // 2
                store(self.weight, base + at, cast(value, str(self.weight.dtype)))


def _interleave(a: Expr, b: Expr, size: int, lanes: int) -> Expr:
    """Pieces of `size` bytes of `a` and `b`, alternating; both have `size * lanes` bytes."""
    picks: list[int] = []
    for lane in range(lanes):
        for operand in range(2):
            first = operand * size * lanes + lane * size
            picks.extend(range(first, first + size))
    return shuffle([a, b], picks)
