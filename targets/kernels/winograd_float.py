# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Winograd F(2x2, 3x3) and F(4x4, 3x3) for float32 convolutions of stride 1.

With the transforms of `winograd_float_plan`::

    V = Bt d B          of each patch d of inputs
    U = G g Gt          of each 3x3 filter g, at compile time
    M = sum over channels of U * V, for each position of a patch
    Y = At M A          for each patch of outputs

A task (rows of patches, column tiles) transforms its inputs to V, `[position, patch, channel]`,
then for each column tile and each register tile of patches multiplies all positions into M, which
stays within level 1, and transforms M back, straight into the epilogue.  Where tasks share the
patches of an image among column tiles, V is made first, by all threads.  Patches that reach over
the border read zeros there.

Hot loop as LLVM 22 emits it (AVX-512, 14 patches x 2 vectors, one channel): 28 `vfmadd231ps zmm`,
14 `vbroadcastss`, 2 loads and their 2 prefetches, no vector on the stack.

An infinity or NaN reaches every output of its patches, up to three pixels further than by a direct
sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.targets.kernels.fetch import FAR_BYTES, NEAR_GROUPS
from qcompiler.targets.kernels.macro import MacroKernel
from qcompiler.targets.kernels.register_tile import Accumulators
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    load,
    maximum,
    minimum,
    own_function,
    prefetch,
    scratch,
    select_lazy,
    serial,
    splat,
    store,
    when,
)
from qcompiler.targets.kernels.winograd_float_plan import FloatWinogradPlan
from qcompiler.targets.kernels.workload import ConvWorkload

__all__ = ["FloatWinogradKernel"]

_ROOT = 2.0**0.5


@dataclass(frozen=True, slots=True)
class FloatWinogradKernel:
    """One kernel under construction; buffers are one-dimensional."""

    workload: ConvWorkload
    plan: FloatWinogradPlan
    kernel: MacroKernel
    """The direct kernel of the same parameters: its buffers, epilogue and column tiles."""

    def emit(self) -> None:
        """The loop over tasks."""
        w, plan = self.workload, self.plan
        row_tasks = plan.task_rows.tiles
        size = plan.positions * plan.patches * plan.pitch
        everywhere = None
        if plan.col_tasks > 1:  # tasks of several column tiles share their patches
            everywhere = scratch(w.n * row_tasks * size, "float32")
            rows = w.n * plan.patch_rows
            with self.kernel.task_loop(w.macs, rows) as index:
                image, row = bind(index // plan.patch_rows), bind(index % plan.patch_rows)
                task = self._task_of(row)
                first = self._first_row(task)
                start = bind((image * row_tasks + task) * size)
                self._transform_row(everywhere, start, image, row, bind(row - first))
        with self.kernel.task_loop(w.macs, w.n * row_tasks * plan.col_tasks) as index:
            part = bind(index % plan.col_tasks * plan.col_block)
            outer = bind(index // plan.col_tasks)
            image, task = bind(outer // row_tasks), bind(outer % row_tasks)
            first = self._first_row(task)
            rows = bind(self._first_row(task + 1) - first)
            if everywhere is None:
                v, start = scratch(size, "float32"), bind(T.int32(0))
                with serial(rows) as row:
                    self._transform_row(v, start, image, bind(first + row), row)
            else:
                v, start = everywhere, bind(outer * size)
            self._tiles(v, start, image, first, rows, part)

    def _first_row(self, task: Expr) -> Expr:
        """First row of patches of a task."""
        rows = self.plan.task_rows
        if rows.small == 0:
            return bind(task * rows.size)
        return bind(task * (rows.size - 1) + minimum(task, rows.big))

    def _task_of(self, row: Expr) -> Expr:
        """The task that a row of patches belongs to."""
        rows = self.plan.task_rows
        if rows.small == 0:
            return bind(row // rows.size)
        later = maximum(row - rows.big * rows.size, 0) // (rows.size - 1)
        return bind(minimum(row // rows.size, rows.big) + later)

    def _transform_row(self, v: Buffer, start: Expr, image: Expr, row: Expr, within: Expr) -> None:
        """V of one row of patches, which is row `within` of its task."""
        w, plan = self.workload, self.plan
        top, left = w.pads[0], w.pads[1]
        y = bind(row * plan.size - top)
        with serial(plan.patch_cols) as col:
            x = bind(col * plan.size - left)
            target = bind(start + (within * plan.patch_cols + col) * plan.pitch)
            origin = bind(((image * w.h + y) * w.w + x) * w.c)
            inside = T.And(T.And(y >= 0, y <= w.h - plan.taps), T.And(x >= 0, x <= w.w - plan.taps))
            with T.If(inside):
                with T.Then():
                    self._transform_patch(v, target, origin, None)
                with T.Else():
                    self._transform_patch(v, target, origin, (y, x))

    def _transform_patch(
        self, v: Buffer, target: Expr, origin: Expr, corner: tuple[Expr, Expr] | None
    ) -> None:
        """V of one patch whose first input is `origin`; at `corner`, where it may lie outside."""
        w, plan = self.workload, self.plan
        lanes, taps = plan.lanes, plan.taps
        transform = _INPUT[plan.size]
        name = "in" if corner is None else "edge"
        chunks = -(-w.c // lanes)
        with serial(chunks) as chunk, own_function(f"{self.kernel.name}_{name}"):
            at = bind(minimum(chunk * lanes, w.c - lanes) if w.c % lanes else chunk * lanes)
            base, to = bind(origin + at), bind(target + at)

            def read(i: int, j: int) -> Expr:
                value = load(self.kernel.a, base + (i * w.w + j) * w.c, lanes)
                if corner is None:
                    return bind(value)
                y, x = corner[0] + i, corner[1] + j
                conditions = [y >= 0, y < w.h, x >= 0, x < w.w]
                return bind(select_lazy(conditions, value, splat(0.0, "float32", lanes)))

            columns = [transform([read(i, j) for i in range(taps)]) for j in range(taps)]
            for i in range(taps):
                for j, value in enumerate(transform([columns[k][i] for k in range(taps)])):
                    step = (i * taps + j) * (plan.patches * plan.pitch)
                    store(v, to + step, value)

    def _tiles(
        self, v: Buffer, start: Expr, image: Expr, first: Expr, rows: Expr, part: Expr
    ) -> None:
        """The products and outputs of a task."""
        plan, name = self.plan, self.kernel.name
        m = scratch(plan.positions * plan.mt * plan.columns, "float32")
        count = bind(rows * plan.patch_cols)
        last = bind(minimum(part + plan.col_block, plan.tiles))
        with serial(part, last) as tile, serial((count + (plan.mt - 1)) // plan.mt) as block:
            patch = bind(minimum(block * plan.mt, count - plan.mt))
            with serial(plan.positions) as position, own_function(f"{name}_tile"):
                self._multiply(v, start, m, (tile, block, position), patch)
            starts, _ = self.kernel.columns(tile)
            with serial(plan.mt) as i:
                at = bind(patch + i)
                row, col = bind(first + at // plan.patch_cols), bind(at % plan.patch_cols)
                for n in range(plan.nv):
                    offset = starts[n] if len(starts) > 1 else starts[0] + n * plan.lanes
                    with own_function(f"{name}_out{n}"):
                        self._transform_outputs(m, (i, n), image, (row, col), tile, offset)

    def _multiply(
        self, v: Buffer, start: Expr, m: Buffer, at: tuple[Expr, Expr, Expr], patch: Expr
    ) -> None:
        """M of `mt` patches from `patch` on, at a column tile, block of patches and position."""
        w, plan = self.workload, self.plan
        tile, block, position = at
        lanes, nv, mt = plan.lanes, plan.nv, plan.mt
        acc = Accumulators(mt, nv, lanes, "float32")
        for i in range(mt):
            for n in range(nv):
                acc.put(i, n, splat(0.0, "float32", lanes))
        step = self.kernel.step(acc)
        a_index = bind(start + (position * plan.patches + patch) * plan.pitch)
        w_index = bind((tile * plan.positions + position) * (w.c * plan.columns))
        weight = self.kernel.constants["weight"]
        a_steps = [i * plan.pitch for i in range(mt)]
        # Weights that no level 2 keeps: blocks of patches share in fetching the next column tile's.
        far = plan.weight_bytes(w.c) >= FAR_BYTES
        share = -(-plan.columns // max(1, plan.fewest // mt))
        following = (tile + 1) * (plan.positions * w.c * plan.columns)
        next_index = bind(following + (block * plan.positions + position) * (w.c * share))
        with serial(w.c) as k:
            near = bind(w_index + k * plan.columns)
            for line in range(0, plan.columns, 16):
                prefetch(weight, near + (NEAR_GROUPS * plan.columns + line), near=True)
            for line in range(0, share if far else 0, 16):
                prefetch(weight, next_index + (k * share + line))
            step.emit(v, a_index, [k], a_steps, near)
        target = bind(position * (mt * plan.columns))
        for i in range(mt):
            for n in range(nv):
                store(m, target + (i * plan.columns + n * lanes), acc.get(i, n))

    def _transform_outputs(
        self,
        m: Buffer,
        which: tuple[Expr, int],
        image: Expr,
        patch: tuple[Expr, Expr],
        tile: Expr,
        offset: Expr,
    ) -> None:
        """The outputs of one patch and one vector of channels, through the epilogue."""
        w, plan = self.workload, self.plan
        lanes, taps, size = plan.lanes, plan.taps, plan.size
        transform = _OUTPUT[size]
        i, n = which
        source = bind(i * plan.columns + n * lanes)
        lane = bind(tile * plan.columns + n * lanes)
        bias = bind(load(self.kernel.constants["bias"], lane, lanes))

        def product(a: int, b: int) -> Expr:
            return bind(load(m, source + (a * taps + b) * (plan.mt * plan.columns), lanes))

        halves = [transform([product(a, b) for a in range(taps)]) for b in range(taps)]
        row, col = bind(patch[0] * size), bind(patch[1] * size)
        base = bind(((image * w.oh + row) * w.ow + col) * w.co + offset)
        for a in range(size):
            for b, value in enumerate(transform([halves[k][a] for k in range(taps)])):
                conditions = []
                if w.oh % size and a >= w.oh % size:
                    conditions.append(row + a < w.oh)
                if w.ow % size and b >= w.ow % size:
                    conditions.append(col + b < w.ow)
                total = bind(value + bias)
                place = base + (a * w.ow + b) * w.co
                self._guarded(conditions, total, lane, place)

    def _guarded(self, conditions: Sequence[Expr], value: Expr, lane: Expr, place: Expr) -> None:
        """Store one vector of outputs where the conditions hold."""
        if conditions:
            with when(conditions[0]):
                self._guarded(conditions[1:], value, lane, place)
        else:
            self.kernel.writer.store_row([value], lane, [place], self.plan.lanes)


def _times(value: Expr, factor: float) -> Expr:
    lanes = int(str(value.ty.dtype).partition("x")[2] or 1)
    return value * splat(factor, "float32", lanes)


def _input2(d: list[Expr]) -> list[Expr]:
    """Bt of four vectors."""
    return [bind(d[0] - d[2]), bind(d[1] + d[2]), bind(d[2] - d[1]), bind(d[1] - d[3])]


def _input4(d: list[Expr]) -> list[Expr]:
    """Bt of six vectors."""
    even, odd = bind(d[4] - _times(d[2], 0.5)), bind(d[3] - _times(d[1], 0.5))
    even2, odd2 = bind(d[4] - _times(d[2], 2.0)), bind(d[3] - _times(d[1], 2.0))
    return [
        bind(d[0] + d[4] - _times(d[2], 2.5)),
        bind(even + _times(odd, _ROOT)),
        bind(even - _times(odd, _ROOT)),
        bind(even2 + _times(odd2, 1 / _ROOT)),
        bind(even2 - _times(odd2, 1 / _ROOT)),
        bind(d[1] + d[5] - _times(d[3], 2.5)),
    ]


def _output2(m: list[Expr]) -> list[Expr]:
    """At of four vectors."""
    return [bind(m[0] + m[1] + m[2]), bind(m[1] - m[2] - m[3])]


def _output4(m: list[Expr]) -> list[Expr]:
    """At of six vectors."""
    sum1, sum2 = bind(m[1] + m[2]), bind(m[3] + m[4])
    less1, less2 = bind(m[1] - m[2]), bind(m[3] - m[4])
    return [
        bind(m[0] + sum1 + sum2),
        bind(_times(less1 + _times(less2, 0.5), _ROOT)),
        bind(_times(sum1, 2.0) + _times(sum2, 0.5)),
        bind(m[5] + _times(less1, 2 * _ROOT) + _times(less2, _ROOT / 4)),
    ]


Transform = Callable[[list[Expr]], list[Expr]]
_INPUT: dict[int, Transform] = {2: _input2, 4: _input4}
_OUTPUT: dict[int, Transform] = {2: _output2, 4: _output4}
