# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The fused end of a matrix kernel: accumulators to stored outputs, as CONTRACT arithmetic.

`acc` already holds the bias.  Everything is float32 with one rounding for each operation: the two
products of a residual addition are fenced against contraction into fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.packing import LIMITS, Facts
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    cast,
    clamp,
    fence,
    intrinsic,
    lanes_of,
    load,
    load_int32,
    maximum,
    minimum,
    registers,
    reinterpret,
    round_to_int32,
    saturated,
    serial,
    shuffle,
    splat,
    store,
    store_narrow,
)
from qcompiler.targets.kernels.workload import FLOATS, Epilogue

__all__ = ["EpilogueWriter"]


@dataclass(frozen=True, slots=True)
class EpilogueWriter:
    """Emits the epilogue of one kernel.  Buffers are one-dimensional."""

    isa: Isa
    epilogue: Epilogue
    facts: Facts
    out: Buffer
    residual: Buffer | None
    multiplier: Buffer | None
    scalars: Buffer
    row_scale: Buffer | None = None
    """Scales of A's rows, or the one of A."""
    addend: Buffer | None = None
    columns: int = 1
    """Columns of the output, where there are row scales."""

    def store_row(
        self, accumulators: Sequence[Expr], lane: Expr, starts: Sequence[Expr], valid: int
    ) -> None:
        """Store one output pixel's column tile.

        Args:
            accumulators: The tile's vectors, int32 or float32.
            lane: Index of the first lane in the packed per-column arrays.
            starts: Index in the output of each vector.  Vectors that follow each other in memory
                must share the expression of the first: pass `starts` of length 1 for that.
            valid: Lanes of each vector that are outputs; fewer than all only for one vector.
        """
        lanes = lanes_of(accumulators[0])
        adjacent = len(starts) == 1
        values = []
        for position, acc in enumerate(accumulators):
            index = starts[0] + position * lanes if adjacent else starts[position]
            values.append(self._value(acc, lane + position * lanes, index, valid))
        if valid < lanes:
            self._store_some(values[0], starts[0], valid)
        elif adjacent:
            self._store(values, starts[0])
        else:
            for value, start in zip(values, starts, strict=True):
                self._store([value], start)

    def store_quad(
        self,
        accumulators: Sequence[Expr],
        lanes_at: Sequence[Expr],
        starts: Sequence[Expr],
        adjacent: int,
    ) -> None:
        """Store four vectors as bytes by three packs and one permutation (see `packs_quads`).

        Args:
            accumulators: Four int32 vectors.
            lanes_at: Index of each one's first lane in the packed per-column arrays.
            starts: Index in the output of each run of `adjacent` vectors.
            adjacent: Vectors that follow each other in the output: 1, 2 or 4.
        """
        lanes = lanes_of(accumulators[0])
        values = []
        for position, acc in enumerate(accumulators):
            index = starts[position // adjacent] + position % adjacent * lanes
            values.append(self._value(acc, lanes_at[position], index, lanes))
        half = f"int16x{2 * lanes}"
        bits = 32 * lanes
        words = str(self.isa.intrinsic("pack_i16", bits))
        low, high = (bind(intrinsic(half, words, *values[i : i + 2])) for i in (0, 2))
        unsigned = self.out.dtype == "uint8"
        narrow = str(self.isa.intrinsic("pack_u8" if unsigned else "pack_i8", bits))
        # Packs work within 128-bit lanes: dword 4 l + p is part of vector p.
        mixed = reinterpret(intrinsic(f"int8x{4 * lanes}", narrow, low, high), "int32", lanes)
        order = [4 * lane + part for part in range(4) for lane in range(lanes // 4)]
        ordered = bind(shuffle([bind(mixed)], order))
        size = adjacent * lanes // 4
        for position, start in enumerate(starts):
            part = ordered
            if size < lanes:
                part = shuffle([ordered], range(position * size, (position + 1) * size))
            store(self.out, start, reinterpret(part, str(self.out.dtype), 4 * size))

    def packs_quads(self, lanes: int) -> bool:
        """Whether `store_quad` serves this output and vectors of `lanes`."""
        bits = 32 * lanes
        found = all(self.isa.intrinsic(name, bits) for name in ("pack_i16", "pack_u8", "pack_i8"))
        return found and self.out.dtype in ("uint8", "int8")

    @property
    def _late(self) -> bool:
        """Whether zero point and clamp are left to the narrowing, for conversions saturate."""
        integers = self.facts.dot not in ("float", "half") and self.row_scale is None
        return self.isa.saturates and integers and self.out.dtype in ("uint8", "int8")

    def _bytes(self, values: Sequence[Expr]) -> Expr:
        """Rounded int32 vectors, plus the zero point, clamped, as the output's bytes.

        Saturating to int16 before and after the zero point is added changes no 8-bit result, and
        the clamp of a whole register of bytes takes two instructions.
        """
        dtype, count = str(self.out.dtype), len(values)
        width = 1 << (count - 1).bit_length()
        values = [*values, *[values[-1]] * (width - count)]
        lanes = lanes_of(values[0])
        if width == 1:
            words = [cast(clamp(values[0], *LIMITS["int16"]), "int16")]
        else:
            pairs = range(0, width, 2)
            words = [saturated(self.isa, values[i], values[i + 1], "int16") for i in pairs]
        if self.facts.zero_point:
            zero = cast(load(self.scalars, 1, 1), "int16")
            half = f"int16x{lanes_of(words[0])}"
            shift = splat(zero, "int16", lanes_of(words[0]))
            words = [intrinsic(half, "llvm.sadd.sat", bind(word), shift) for word in words]
        if len(words) == 1:
            narrow = cast(clamp(bind(words[0]), *LIMITS[dtype]), dtype)
        else:
            narrow = saturated(self.isa, words[0], words[1], dtype)
        if width > count:
            narrow = shuffle([bind(narrow)], range(count * lanes))
        if not self.facts.saturating:
            zero_point = load(self.scalars, 1, 1)
            for position, limit in ((2, maximum), (3, minimum)):
                bound = cast(load(self.scalars, position, 1) + zero_point, "int32")
                narrow = limit(narrow, splat(cast(bound, dtype), dtype, count * lanes))
        return bind(narrow)

    def _store(self, values: Sequence[Expr], index: Expr) -> None:
        lanes = lanes_of(values[0])
        if self.out.dtype in FLOATS:
            for position, value in enumerate(values):
                store(self.out, index + position * lanes, cast(value, str(self.out.dtype)))
        elif self._late:
            together = 16 // lanes
            for first in range(0, len(values), together):
                narrow = self._bytes(values[first : first + together])
                store(self.out, index + first * lanes, narrow)
        else:
            saturate = self.facts.saturating
            store_narrow(self.isa, self.out, index, values, saturate=saturate)

    def _store_some(self, value: Expr, index: Expr, valid: int) -> None:
        """Store the first `valid` lanes one by one, out of the tile function's own registers."""
        dtype = str(self.out.dtype)
        lanes = lanes_of(value)
        if self._late:
            narrow = registers(lanes, dtype)
            store(narrow, 0, self._bytes([value]))
            for position in range(valid):
                store(self.out, index + position, load(narrow, position, 1))
            return
        staged = registers(lanes, "float32" if dtype in FLOATS else "int32")
        if self.facts.saturating and dtype in LIMITS:
            value = clamp(value, *LIMITS[dtype])
        store(staged, 0, value)
        for position in range(valid):
            single = load(staged, position, 1)
            store(self.out, index + position, cast(single, dtype))

    def _value(self, acc: Expr, lane: Expr, index: Expr, valid: int) -> Expr:
        """The outputs of one vector, before narrowing."""
        lanes = lanes_of(acc)
        out_dtype = self.epilogue.out_dtype
        if self.facts.dot in ("float", "half"):
            if self.facts.dot == "half":
                acc = acc * load(self.multiplier, lane, lanes)
            if self.residual is not None:
                acc = acc + self._residual(self.residual, index, lanes, valid)
            if self.facts.clip:
                acc = minimum(maximum(acc, self._scalar(2, lanes)), self._scalar(3, lanes))
            return bind(acc)
        if out_dtype == "int32":
            return acc
        if self.row_scale is not None:
            return self._dynamic(self.row_scale, acc, lane, index, valid)
        value = acc  # in groups the sums are scaled already
        if not self.epilogue.group:
            value = cast(acc, "float32") * load(self.multiplier, lane, lanes)
        if out_dtype == "float32":
            return bind(value)
        if self.residual is not None:
            other = cast(self._residual(self.residual, index, lanes, valid), "float32")
            if self.facts.residual_zero_point:
                other = other - self._scalar(5, lanes)  # exact: integers below 2**24
            value = fence(value) + fence(other * self._scalar(4, lanes))
        if self._late:
            return bind(round_to_int32(self.isa, value))
        if not self.facts.saturating:
            value = minimum(maximum(value, self._scalar(2, lanes)), self._scalar(3, lanes))
        rounded = round_to_int32(self.isa, value)
        if self.facts.zero_point:
            rounded = rounded + splat(cast(load(self.scalars, 1, 1), "int32"), "int32", lanes)
        return bind(rounded)

    def _dynamic(self, scales: Buffer, acc: Expr, lane: Expr, index: Expr, valid: int) -> Expr:
        """The float32 outputs of one vector whose activations have scales made at run time."""
        lanes = lanes_of(acc)
        value = acc  # in groups the sums are scaled already
        if not self.epilogue.group:
            row = index // self.columns if self.epilogue.row_scale == "row" else 0
            scale = splat(load(scales, row, 1), "float32", lanes)
            value = cast(acc, "float32") * fence(scale * load(self.multiplier, lane, lanes))
        if self.addend is not None:
            value = fence(value) + load(self.addend, lane, lanes)
        if self.residual is not None:
            value = fence(value) + self._residual(self.residual, index, lanes, valid)
        if self.facts.clip:
            value = minimum(maximum(value, self._scalar(2, lanes)), self._scalar(3, lanes))
        return bind(value)

    def _scalar(self, position: int, lanes: int) -> Expr:
        return splat(load(self.scalars, position, 1), "float32", lanes)

    def _residual(self, residual: Buffer, index: Expr, lanes: int, valid: int) -> Expr:
        """Residual operand of one vector: int32 lanes, or float32."""
        if valid == lanes:
            if residual.dtype in FLOATS:
                return cast(load(residual, index, lanes), "float32")
            return load_int32(residual, index, lanes)
        dtype = "float32" if residual.dtype in FLOATS else "int32"
        staged = registers(lanes, dtype)
        with serial(lanes) as position:
            store(staged, position, splat(0, dtype, 1))
        for position in range(valid):
            store(staged, position, cast(load(residual, index + position, 1), dtype))
        return load(staged, 0, lanes)
