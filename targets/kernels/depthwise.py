# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution of 8-bit activations, NHWC, exact, with the requantizing epilogue.

The workload is a `ConvWorkload` with one input channel for each group; output channel `c` reads
input channel `c // multiplier`.  Arguments of the built PrimFunc, in order: the activations, the
residual where the epilogue has one, `Packed.arrays`, the output.

How it runs.  A vector register holds one byte of V channels.  The taps along one axis (rows, or
columns where that is cheaper: the *gathered* axis) of a few neighbouring outputs are interleaved
byte by byte, four (`vpdpbusd`, `sdot`, and `vpmaddubsw` where it cannot saturate) or two
(`vpmaddwd`, widened) to a group, by unpack instructions, and kept in a work area of one strip.
Each group is made once and serves every tap along the other (*strip*) axis and every output of the
tile: outputs at different positions of the gathered axis differ only in their weights, which are
packed with zeros where a row is not theirs.
Padding is written to the work area as the zero point, so the inner loop has no borders and the zero
point's share is a constant in the bias.

Unpacking permutes the channels within 128-bit lanes; weights, bias and multipliers are packed in
that order, and the pack instructions that narrow the results undo it.

Channels are covered by vectors of one width, of which the last may overlap the one before: that
takes no more instructions than a narrower vector.  Fewer than 16 channels, multipliers other than
powers of two up to 16 and very large kernels take the plain form of `depthwise_plain`; where s8
products make int16, kernels of few taps take the form of `depthwise_taps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.depthwise_plain import PlainKernel
from qcompiler.targets.kernels.depthwise_plan import (
    DepthwiseParams,
    Plan,
    by_taps,
    default_params,
    is_depthwise,
    is_plain,
    pack_depthwise,
    space,
)
from qcompiler.targets.kernels.depthwise_taps import TapsKernel
from qcompiler.targets.kernels.interleave import (
    in_order,
    interleave,
    narrowed,
    scattered,
)
from qcompiler.targets.kernels.packing import Facts, Packed
from qcompiler.targets.kernels.simd import loop, unravel, workspace, worth_threads
from qcompiler.targets.kernels.tir import Buffer, Expr, PrimFuncBuilder
from qcompiler.targets.kernels.workload import ConvWorkload

__all__ = [
    "DepthwiseParams",
    "build_depthwise",
    "default_params",
    "is_depthwise",
    "is_plain",
    "pack_depthwise",
    "space",
]


def build_depthwise(
    workload: ConvWorkload,
    isa: Isa,
    params: DepthwiseParams,
    packed: Packed,
    name: str = "depthwise",
) -> Any:
    """The PrimFunc of a depthwise convolution whose constants are `packed`.

    Raises:
        CodegenError: the workload is not a depthwise convolution of 8-bit activations.
    """
    if not is_depthwise(workload):
        raise CodegenError(
            f"depthwise: expected groups == channels and 8-bit activations, got {workload}"
        )
    epilogue = workload.epilogue
    with PrimFuncBuilder(name) as builder:
        a = builder.argument("a", workload.a_shape, workload.a_dtype)
        residual = None
        if epilogue.residual_dtype is not None:
            residual = builder.argument("residual", workload.out_shape, epilogue.residual_dtype)
        constants = {
            label: builder.argument(label, shape, dtype) for label, shape, dtype in packed.shapes
        }
        out = builder.argument("out", workload.out_shape, epilogue.out_dtype)
        size = int(np.prod(workload.a_shape))
        buffers = {label: tir.flat(buffer) for label, buffer in constants.items()}
        buffers["a"] = tir.alias(a, (size,), "uint8")
        buffers["out"] = tir.flat(out)
        if residual is not None:
            buffers["residual"] = tir.flat(residual)
        if by_taps(workload, isa):
            TapsKernel(workload, isa, packed.facts, buffers).emit()
        elif is_plain(workload, isa, params):
            PlainKernel(workload, isa, packed.facts, buffers).emit()
        else:
            plan = Plan(workload, isa, params, by_bytes=packed.facts.dot == "maddubs")
            _Kernel(plan, packed.facts, buffers).emit()
    return builder.finish()


@dataclass(frozen=True)
class _Kernel:
    """One kernel under construction; buffers are one-dimensional."""

    plan: Plan
    facts: Facts
    buffers: dict[str, Buffer]

    def emit(self) -> None:
        """The loop over tasks: images, runs of tiles along the gathered axis, channel blocks."""
        plan = self.plan
        w = plan.workload
        a, b = plan.axes
        tiles = -(-a.out // plan.rows)
        blocks = len(plan.starts)
        threads = worth_threads(plan.cost * w.n * a.out * b.out * blocks / 2.5)
        # Threads share images and tiles, and channel blocks too where tiles are few.
        shared = threads and w.n * tiles < 32
        strips = -(-b.out // plan.strip)
        run = tiles
        if threads:
            run = min(tiles, max(1, w.n * tiles * (blocks if shared else 1) // 64))
        outer = [w.n, -(-tiles // run), blocks if shared else 1]
        step = len(plan.steps) * 4 * (plan.lanes if plan.group == 4 else plan.lanes // 2)
        with loop(int(np.prod(outer)), threads=threads) as task:
            image, chunk, block = unravel(task, outer)
            area = workspace(plan.columns(plan.strip) * plan.column_bytes // 4, "int32")
            with loop(1 if shared else blocks) as n:
                index = block if shared else n
                emit = _Block(
                    self,
                    area,
                    plan.lanes,
                    tir.bind(T.min(index * plan.lanes, w.co - plan.lanes)),
                    tir.bind(index * plan.lanes),
                    tir.bind(index * step),
                )
                with loop(run) as t, loop(strips) as strip:
                    start = T.min((chunk * run + t) * plan.rows, a.out - plan.rows)
                    column = T.min(strip * plan.strip, b.out - plan.strip)
                    emit.tile(image, tir.bind(start), tir.bind(column))


@dataclass(frozen=True)
class _Block:
    """The code for one vector of channels."""

    kernel: _Kernel
    area: Buffer
    """Work area, int32 `[column, group, 4, lanes / 4]`."""
    lanes: int
    channel: Expr
    """First output channel."""
    packed_channel: Expr
    """Where the block's bias and multipliers start."""
    packed_weight: Expr

    @property
    def plan(self) -> Plan:
        """The kernel's plan."""
        return self.kernel.plan

    def tile(self, image: Expr, start: Expr, column: Expr) -> None:
        """Outputs `start ...` along the gathered, `column ...` along the strip axis."""
        plan = self.plan
        self._fill(image, start, column)
        b = plan.axes[1]
        with loop(-(-plan.strip // plan.cols)) as t:
            first = tir.bind(T.min(t * plan.cols, plan.strip - plan.cols))
            at = image * (plan.workload.oh * plan.workload.ow * plan.workload.co) + self.channel
            at = at + start * plan.axes[0].out_step + (column + first) * b.out_step
            self._products(tir.bind(first * b.stride), tir.bind(at))

    # Filling the work area.

    def _fill(self, image: Expr, start: Expr, column: Expr) -> None:
        plan, w = self.plan, self.plan.workload
        a, b = plan.axes
        columns = plan.columns(plan.strip)
        row = tir.bind(start * a.stride - a.pad)
        left = tir.bind(column * b.stride - b.pad)
        base = tir.bind(
            image * (w.h * w.w * w.c) + T.floordiv(self.channel, plan.multiplier) + left * b.step
        )
        lo, hi = tir.splat(0, "int32", 1), tir.splat(columns, "int32", 1)
        if b.pad:
            lo = tir.bind(T.max(T.min(tir.splat(0, "int32", 1) - left, columns), 0))
            with tir.serial(lo) as j:
                self._fill_padding(j)
        if (b.out - 1) * b.stride - b.pad + (b.kernel - 1) * b.dilation >= b.size:
            hi = tir.bind(T.max(T.min(tir.splat(b.size, "int32", 1) - left, columns), lo))
            with tir.serial(hi, columns) as j:
                self._fill_padding(j)
        last = (a.out - 1) * a.stride - a.pad + plan.offsets[-1] - (plan.rows - 1) * a.stride
        if a.pad == 0 and last < a.size:
            with tir.serial(lo, hi) as j:
                self._fill_column(base, row, j, inside=True)
            return
        inside = T.And(row >= 0, row + plan.offsets[-1] < a.size)
        with T.If(inside):
            with T.Then(), tir.serial(lo, hi) as j:
                self._fill_column(base, row, j, inside=True)
            with T.Else(), tir.serial(lo, hi) as j:
                self._fill_column(base, row, j, inside=False)

    def _fill_padding(self, column: Expr) -> None:
        quarter = self.lanes // 4
        repeat = 0x01010101 if self.plan.group == 4 else 0x00010001
        value = tir.bind(tir.splat(self._zero_byte() * repeat, "int32", quarter))
        for part in range(self.plan.groups * 4):
            self._put(column, part, value)

    def _zero_byte(self) -> Expr:
        """The byte that stands for zero, as int32."""
        zero = tir.cast(tir.load(self.kernel.buffers["scalars"], 0, 1), "int32")
        return T.bitwise_and(zero, tir.splat(255, "int32", 1))

    def _put(self, column: Expr, part: int, value: Expr) -> None:
        quarter = self.lanes // 4
        at = column * (self.plan.groups * self.lanes) + part * quarter
        tir.store(self.area, at, value)

    def _fill_column(self, base: Expr, row: Expr, column: Expr, *, inside: bool) -> None:
        plan = self.plan
        rows: list[Expr] = []
        zeros = tir.splat(0, "uint8", self.lanes)
        for slot in range(plan.groups * plan.group):
            if slot < len(plan.offsets):
                rows.append(self._row(base, row + plan.offsets[slot], column, inside=inside))
            else:
                rows.append(zeros)
        for g in range(plan.groups):
            members = rows[g * plan.group : (g + 1) * plan.group]
            for part, vector in enumerate(interleave(members)):
                self._put(column, g * 4 + part, vector)

    def _row(self, base: Expr, row: Expr, column: Expr, *, inside: bool) -> Expr:
        """V channels of one input pixel as bytes; the zero point where `row` is outside."""
        plan = self.plan
        a, b = plan.axes
        held = row if inside else T.max(T.min(row, a.size - 1), 0)
        repeat = plan.multiplier
        count = self.lanes // repeat
        source = self.kernel.buffers["a"]
        at = base + held * a.step + column * b.step
        value = tir.load(source, at, count)
        if repeat > 1:
            value = tir.bind(value)
            picks = [lane // repeat for lane in range(self.lanes)]
            value = tir.shuffle([value] * repeat, picks)
        if plan.workload.a_dtype != plan.isa.a_dtype:
            value = T.bitwise_xor(value, tir.splat(128, "uint8", self.lanes))
        if not inside:
            fill = tir.cast(self._zero_byte(), "uint8")
            valid = T.And(row >= 0, row < a.size)
            value = T.Select(valid, value, tir.splat(fill, "uint8", self.lanes))
        return tir.bind(value)

    # The products.

    def _products(self, column: Expr, at: Expr) -> None:
        plan = self.plan
        quarter = self.lanes // 4
        narrow: dict[tuple[int, int], list[Expr]] = {}
        for part in range(4):
            for key, acc in self._accumulate(column, part).items():
                narrow.setdefault(key, []).append(acc)
        for (row, col), accs in narrow.items():
            where = at + row * plan.axes[0].out_step + col * plan.axes[1].out_step
            _Finish(self, tir.bind(where), quarter).store(accs)

    def _accumulate(self, column: Expr, part: int) -> dict[tuple[int, int], Expr]:
        plan = self.plan
        b = plan.axes[1]
        quarter = self.lanes // 4
        constants = self.kernel.buffers
        bias = tir.bind(tir.load(constants["bias"], self.packed_channel + part * quarter, quarter))
        accs = {(r, c): bias for c in range(plan.cols) for r in range(plan.rows)}
        loaded: dict[tuple[int, int], Expr] = {}
        width = self.lanes if plan.group == 4 else self.lanes // 2
        data_dtype = plan.isa.a_dtype if plan.group == 4 else "int16"
        for s, (k, row, g) in enumerate(plan.steps):
            weight = tir.bind(
                tir.load(constants["weight"], self.packed_weight + (s * 4 + part) * width, width)
            )
            for col in range(plan.cols):
                source = (col * b.stride + k * b.dilation, g)
                if source not in loaded:
                    offset = (column + source[0]) * (plan.groups * self.lanes)
                    value = tir.load(self.area, offset + (g * 4 + part) * quarter, quarter)
                    loaded[source] = tir.bind(tir.reinterpret(value, data_dtype, width))
                accs[row, col] = self._added(accs[row, col], loaded[source], weight)
        return accs

    def _added(self, acc: Expr, data: Expr, weight: Expr) -> Expr:
        """`acc` plus the products of one group."""
        plan = self.plan
        bits = self.lanes * 8
        dtype = tir.vector("int32", self.lanes // 4)
        if plan.isa.adds_to_int32:
            name = plan.isa.intrinsic(plan.isa.dot_operation, bits)
            return tir.bind(tir.intrinsic(dtype, str(name), acc, data, weight))
        if plan.by_bytes:
            name = plan.isa.intrinsic("madd_u8s8", bits)
            half = tir.vector("int16", self.lanes // 2)
            data = tir.intrinsic(half, str(name), data, weight)
            weight = tir.splat(1, "int16", self.lanes // 2)
        name = plan.isa.intrinsic("madd_i16", bits)
        return tir.bind(acc + tir.intrinsic(dtype, str(name), data, weight))


@dataclass(frozen=True)
class _Finish:
    """The epilogue of one output pixel: four accumulators in packed order to V stored outputs."""

    block: _Block
    at: Expr
    quarter: int

    def store(self, accs: list[Expr]) -> None:
        """Requantize or dequantize `accs` and store them."""
        kernel = self.block.kernel
        isa, facts = kernel.plan.isa, kernel.facts
        dtype = kernel.plan.workload.epilogue.out_dtype
        out = kernel.buffers["out"]
        if dtype == "int32":
            tir.store(out, self.at, in_order(accs))
            return
        residuals = self._residuals()
        reals = [self._real(part, acc, residuals) for part, acc in enumerate(accs)]
        if dtype == "float32":
            tir.store(out, self.at, in_order(reals))
            return
        clamps = not facts.saturating
        late = clamps and isa.saturates and dtype != "int16"
        if clamps and not late:
            reals = [T.min(T.max(value, self._scalar(2)), self._scalar(3)) for value in reals]
        rounded = [tir.round_to_int32(isa, value) for value in reals]
        zero = tir.cast(tir.load(kernel.buffers["scalars"], 1, 1), "int32")
        zero_point = zero if facts.zero_point else None
        narrow = narrowed(isa, rounded, zero_point, dtype)
        if late:  # in whole registers of bytes
            for position, limit in ((2, T.max), (3, T.min)):
                scalars = kernel.buffers["scalars"]
                bound = tir.load(scalars, position, 1) + tir.load(scalars, 1, 1)
                bound = tir.cast(tir.cast(bound, "int32"), dtype)
                narrow = limit(narrow, tir.splat(bound, dtype, tir.lanes_of(narrow)))
        tir.store(out, self.at, narrow)

    def _scalar(self, position: int) -> Expr:
        scalar = tir.load(self.block.kernel.buffers["scalars"], position, 1)
        return tir.splat(scalar, "float32", self.quarter)

    def _real(self, part: int, acc: Expr, residuals: list[Expr]) -> Expr:
        multiplier = tir.load(
            self.block.kernel.buffers["multiplier"],
            self.block.packed_channel + part * self.quarter,
            self.quarter,
        )
        value = tir.cast(acc, "float32") * multiplier
        if residuals:
            other = tir.cast(residuals[part], "float32") - self._scalar(5)
            value = tir.fence(value) + tir.fence(other * self._scalar(4))
        return tir.bind(value)

    def _residuals(self) -> list[Expr]:
        """The residual's values as int32 in packed order; empty where there is none."""
        block = self.block
        residual = block.kernel.buffers.get("residual")
        if residual is None:
            return []
        return scattered(tir.load(residual, self.at, block.lanes))
