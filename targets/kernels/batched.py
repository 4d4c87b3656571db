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

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.bands import copy_elements
from qcompiler.targets.kernels.macro import MacroKernel, Source
from qcompiler.targets.kernels.register_tile import Accumulators, Step
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    alias,
    bind,
    cast,
    intrinsic,
    load,
    minimum,
    own_function,
    registers,
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
    with kernel.task_loop(workload.macs) as task:
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
        dtype = "float32" if workload.a_dtype == "float32" else kernel.geometry.dot_dtype
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
    with (
        serial(rows) as row,
        own_function(f"{kernel.name}_row"),
    ):
        base = bind(source.origin + minimum(first_row + row, m - 1) * k)
        total = _row_sum(kernel.isa, source.buffer, base, k)
        store(terms, row, (0 - zero_point) * total)
    return replace(source, row_terms=alias(terms, (rows,), "int32"), first_row=first_row)


def _row_sum(isa: Isa, buffer: Buffer, base: Expr, count: int) -> Expr:
    """The int32 sum of `count` consecutive 8-bit values."""
    total: Expr = splat(0, "int32", 1)
    at = 0
    if isa.a_dtype == "int8":
        total, at = _signed_row_sum(isa, buffer, base, count)
    for bits in (isa.vector_bits, 128):
        size = bits // 8
        name = isa.intrinsic("sum_u8", bits)
        whole = (count - at) // size
        if name is None or not whole:
            continue
        words = bits // 64
        sums = registers(words, "int64")
        store(sums, 0, splat(0, "int64", words))
        with serial(whole) as chunk:
            piece = load(buffer, base + at + chunk * size, size)
            part = intrinsic(f"int64x{words}", name, piece, splat(0, "uint8", size))
            store(sums, 0, load(sums, 0, words) + part)
        halves = load(sums, 0, words)
        while words > 1:
            words //= 2
            halves = bind(halves)
            low, high = shuffle([halves], range(words)), shuffle([halves], range(words, 2 * words))
            halves = low + high
        total = total + cast(halves, "int32")
        at += whole * size
    if at == count:
        return total
    rest = registers(1, "int32")
    store(rest, 0, total)
    with serial(at, count) as k:
        store(rest, 0, load(rest, 0, 1) + cast(load(buffer, base + k, 1), "int32"))
    return load(rest, 0, 1)


def _signed_row_sum(isa: Isa, buffer: Buffer, base: Expr, count: int) -> tuple[Expr, int]:
    """The int32 sum of consecutive s8, in registers of sixteen, and how many it took."""
    whole = count // 16
    if not whole:
        return splat(0, "int32", 1), 0
    sums = registers(4, "int32")
    store(sums, 0, splat(0, "int32", 4))
    dot = isa.intrinsic("dot_s8s8", 128)
    with serial(whole) as chunk:
        piece = bind(load(buffer, base + chunk * 16, 16))
        if dot is not None:
            total = intrinsic("int32x4", dot, load(sums, 0, 4), piece, splat(1, "int8", 16))
        else:
            pairs = str(isa.intrinsic("pairs_i16", 128))
            wide = cast(piece, "int16")
            halves = shuffle([bind(wide)], range(8)) + shuffle([bind(wide)], range(8, 16))
            total = load(sums, 0, 4) + intrinsic("int32x4", pairs, bind(halves))
        store(sums, 0, total)
    lanes = bind(load(sums, 0, 4))
    half = bind(shuffle([lanes], [0, 1]) + shuffle([lanes], [2, 3]))
    return bind(shuffle([half], [0]) + shuffle([half], [1])), whole * 16


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
        self.signed = kernel.isa.a_dtype == "int8"
        dtype = {"float": "float32", "exact": "int16"}.get(self.kind, "int8")
        dtype = "int8" if self.kind == "exact" and self.signed else dtype
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
        if len(starts) == 1:
            starts = [bind(starts[0] + v * plan.lanes) for v in range(plan.nv)]
        near = bind(tile - self.begin)
        sums = Accumulators(1, plan.nv, plan.lanes, "float32" if self.is_float else "int32")
        step = Step(self.kernel.isa, self.kind, self.weight, sums)
        base = bind(near * (groups * step.weight_elements))
        for v in range(plan.nv):
            sums.put(0, v, splat(0, "float32" if self.is_float else "int32", plan.lanes))
        whole = workload.k // self.group if valid == plan.lanes else 0
        if workload.transpose_b:
            whole = whole // 4 * 4
            if whole:
                self._transposed(base, starts, whole, sums)
        elif whole:
            self._interleaved(base, starts, whole, step)
        for v, start in enumerate(starts):
            self._one_by_one(base, v, start, valid, whole)
        if not self.is_float:
            self._add_sums(step, base, whole, groups)
        for v in range(plan.nv):
            index = bind(tile * plan.nt + v * plan.lanes)
            bias = load(self.kernel.constants["bias"], index, plan.lanes)
            if not self.is_float:
                bias = bias + self._column_term(sums.get(0, v))
            store(self.bias, near * plan.nt + v * plan.lanes, bias)

    def _ones(self, lanes: int) -> list[Expr]:
        """A group of activations that are all one."""
        if self.kind == "exact":
            return [splat(1, "int8" if self.signed else "int16", 2 * lanes)] * 2
        return [splat(1, self.kernel.isa.a_dtype, 4 * lanes)]

    def _add_sums(self, step: Step, base: Expr, start: int, stop: int) -> None:
        """Add the packed K-groups `start` to `stop` to the column sums."""
        if start == stop:
            return
        ones = self._ones(self.kernel.plan.lanes)
        with serial(start, stop) as k:
            weights = step.weights(base + k * step.weight_elements)
            for v, weight in enumerate(weights):
                step.acc.put(0, v, step.multiply(step.acc.get(0, v), ones, weight))

    def _column_term(self, total: Expr) -> Expr:
        """`K * za * zb - za * column sum`."""
        lanes = self.kernel.plan.lanes
        points = self.kernel.constants["zero_points"]
        constant = splat(load(points, 2, 1), "int32", lanes)
        return constant - splat(load(points, 0, 1), "int32", lanes) * total

    def _put(self, base: Expr, k: Expr, v: int, lane: Expr, quads: Expr, lanes: int) -> list[Expr]:
        """Store `lanes` K-groups (int32 of four bytes) of neighbouring columns; return them."""
        plan = self.kernel.plan
        if self.flip:
            quads = quads ^ splat(-2139062144, "int32", lanes)  # 0x80808080
        if self.kind != "exact":
            at = base + (k * plan.nv + v) * (plan.lanes * 4) + lane * 4
            quads = bind(reinterpret(quads, "int8", 4 * lanes))
            store(self.weight, at, quads)
            return [quads]
        words = bind(reinterpret(quads, "int16", 2 * lanes))
        if self.signed:  # members 0 and 1, then 2 and 3
            picked = [shuffle([words], range(h, 2 * lanes, 2)) for h in range(2)]
            halves = [bind(reinterpret(half, "int8", 2 * lanes)) for half in picked]
        else:
            eight = splat(8, "int16", 2 * lanes)
            halves = [bind((words << eight) >> eight), bind(words >> eight)]
        for half, value in enumerate(halves):
            at = base + ((k * 2 + half) * plan.nv + v) * (plan.lanes * 2) + lane * 2
            store(self.weight, at, value)
        return halves

    def _interleaved(self, base: Expr, starts: Sequence[Expr], whole: int, step: Step) -> None:
        """B is [K, N]: rows of a group are interleaved byte by byte; adds to the column sums."""
        n, lanes = self.workload.n, self.kernel.plan.lanes
        ones = self._ones(lanes)
        with serial(whole) as k:
            for v, start in enumerate(starts):
                first = bind(self.origin + start + k * (self.group * n))
                if self.is_float:
                    at = base + (k * self.kernel.plan.nv + v) * lanes
                    store(self.weight, at, load(self.b, first, lanes))
                    continue
                rows = [bind(load(self.b, first + r * n, lanes)) for r in range(4)]
                pairs = [bind(_interleave(rows[i], rows[i + 1], 1, lanes)) for i in (0, 2)]
                quads = reinterpret(_interleave(pairs[0], pairs[1], 2, lanes), "int32", lanes)
                weight = self._put(base, k, v, 0, bind(quads), lanes)
                step.acc.put(0, v, step.multiply(step.acc.get(0, v), ones, weight))

    def _transposed(
        self, base: Expr, starts: Sequence[Expr], whole: int, sums: Accumulators
    ) -> None:
        """B is [N, K]: four columns times four groups are transposed at a time.

        Adds to the column sums in registers; to read back what was just stored in smaller pieces
        would stall the load.
        """
        k_extent, lanes, nv = self.workload.k, self.kernel.plan.lanes, self.kernel.plan.nv
        size = 1 if self.is_float else 4
        quarters = lanes // 4
        dtype = "float32" if self.is_float else "int32"
        pieces = Accumulators(1, nv * quarters, 4, dtype)
        step = Step(self.kernel.isa, self.kind, self.weight, pieces)
        for index in range(nv * quarters):
            pieces.put(0, index, splat(0, dtype, 4))
        with serial(whole // 4) as block:
            for v, start in enumerate(starts):
                first = bind(self.origin + start * k_extent + block * (4 * size))
                for quarter in range(quarters):
                    rows = []
                    for r in range(4):
                        row = load(self.b, first + (quarter * 4 + r) * k_extent, 4 * size)
                        rows.append(bind(row if self.is_float else reinterpret(row, dtype, 4)))
                    for j, column in enumerate(_transpose_4x4(rows)):
                        k = bind(block * 4 + j)
                        if self.is_float:
                            at = base + (k * nv + v) * lanes + quarter * 4
                            store(self.weight, at, column)
                            continue
                        weight = self._put(base, k, v, quarter * 4, column, 4)
                        index = v * quarters + quarter
                        total = step.multiply(pieces.get(0, index), self._ones(4), weight)
                        pieces.put(0, index, total)
        if not self.is_float:
            for v in range(nv):
                parts = [pieces.get(0, v * quarters + quarter) for quarter in range(quarters)]
                sums.put(0, v, shuffle(parts, range(lanes)) if quarters > 1 else parts[0])

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
                    first, second = (r // 2, r % 2) if self.signed else (r % 2, r // 2)
                    half = (k * 2 + first) * plan.nv + v
                    at = half * (plan.lanes * 2) + lane * 2 + second
                store(self.weight, base + at, cast(value, str(self.weight.dtype)))


def _transpose_4x4(rows: Sequence[Expr]) -> list[Expr]:
    """The columns of four vectors of four lanes."""
    halves = [
        [bind(shuffle([rows[i], rows[i + 1]], picks)) for i in (0, 2)]
        for picks in ((0, 4, 1, 5), (2, 6, 3, 7))
    ]
    return [bind(shuffle(half, picks)) for half in halves for picks in ((0, 1, 4, 5), (2, 3, 6, 7))]


def _interleave(a: Expr, b: Expr, size: int, lanes: int) -> Expr:
    """Pieces of `size` bytes of `a` and `b`, alternating; both have `size * lanes` bytes."""
    picks: list[int] = []
    for lane in range(lanes):
        for operand in range(2):
            first = operand * size * lanes + lane * size
            picks.extend(range(first, first + size))
    return shuffle([a, b], picks)
