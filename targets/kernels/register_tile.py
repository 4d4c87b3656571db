# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""A register tile of a product: its accumulators, and how K-groups are multiplied into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.neon import chain, paired_weights
from qcompiler.targets.kernels.plan import Storage
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    intrinsic,
    lanes_of,
    load,
    registers,
    reinterpret,
    splat,
    store,
)
from qcompiler.targets.kernels.unpack import elements_per_lane, times_factor, weight_vectors

__all__ = ["Accumulators", "Step"]


class Accumulators:
    """The register tile: `rows` x `nv` vectors."""

    def __init__(self, rows: int, nv: int, lanes: int, dtype: str, *, narrow: bool = False) -> None:
        """Reserve the registers; with `narrow` also for int16 sums of two products each."""
        self.nv, self.lanes = nv, lanes
        self._buffer = registers(rows * nv * lanes, dtype)
        self._narrow = registers(rows * nv * 2 * lanes, "int16") if narrow else None
        self._rows, self._dtype = rows, dtype

    def of_columns(self, nv: int) -> Accumulators:
        """A register tile with as many rows and other columns."""
        return Accumulators(self._rows, nv, self.lanes, self._dtype)

    def get(self, m: int, v: int) -> Expr:
        """The vector of row m, column vector v."""
        return load(self._buffer, (m * self.nv + v) * self.lanes, self.lanes)

    def put(self, m: int, v: int, value: Expr) -> None:
        """Replace it."""
        store(self._buffer, (m * self.nv + v) * self.lanes, value)

    def get_narrow(self, m: int, v: int) -> Expr:
        """The int16 sums of row m, column vector v."""
        return load(self._narrow, (m * self.nv + v) * 2 * self.lanes, 2 * self.lanes)

    def put_narrow(self, m: int, v: int, value: Expr) -> None:
        """Replace them."""
        store(self._narrow, (m * self.nv + v) * 2 * self.lanes, value)


@dataclass(frozen=True, slots=True)
class Step:
    """K-groups of a register tile, multiplied in one of the ways of `plan.Dot`."""

    isa: Isa
    kind: str
    weight: Buffer
    acc: Accumulators
    storage: Storage = "plain"
    terms: Sequence[tuple[Expr, Expr | None]] = ()
    """Scale and zero of each column vector, for weights in groups."""
    factors: Sequence[Expr] = ()
    """Factors of each column vector: int32, or int16 pairs that multiply int16 sums."""

    @property
    def weight_elements(self) -> int:
        """Elements of the weight buffer that one K-group takes."""
        members, to_one = elements_per_lane(self.storage, self.kind)
        return self.acc.nv * self.acc.lanes * members // to_one

    def emit(
        self,
        source: Buffer,
        a_index: Expr,
        k_steps: Sequence[Expr],
        a_steps: Sequence[int],
        w_index: Expr,
    ) -> None:
        """Multiply some K-groups; more than one are added in int16 before they are widened.

        Args:
            source: The activations.
            a_index: Element of the first pixel's activations.
            k_steps: Offset of each K-group's activations from there.
            a_steps: Offset of each pixel from the first.
            w_index: Element of the first K-group's weights; the others follow.
        """
        indices = [bind(a_index + step) for step in k_steps]
        if len(indices) > 1:
            self._emit_deep(source, indices, a_steps, w_index)
            return
        weights = self.weights(w_index)
        for m, a_step in enumerate(a_steps):
            parts = self._activations(source, indices[0] + a_step)
            for v in range(self.acc.nv):
                self.acc.put(m, v, self.multiply(self.acc.get(m, v), parts, weights[v], v))

    def _emit_deep(
        self, source: Buffer, indices: list[Expr], a_steps: Sequence[int], w_index: Expr
    ) -> None:
        lanes = self.acc.lanes
        for k, index in enumerate(indices):
            weights = self.weights(w_index + k * self.weight_elements)
            for m, a_step in enumerate(a_steps):
                parts = self._activations(source, index + a_step)
                for v in range(self.acc.nv):
                    pairs = self._call("madd_u8s8", "int16", 2 * lanes, parts[0], weights[v][0])
                    if k:
                        pairs = self.acc.get_narrow(m, v) + pairs
                    self.acc.put_narrow(m, v, pairs)
        for m in range(len(a_steps)):
            for v in range(self.acc.nv):
                wide = self._widened(self.acc.get_narrow(m, v), v)
                self.acc.put(m, v, self.acc.get(m, v) + wide)

    def _widened(self, pairs: Expr, v: int) -> Expr:
        """Neighbouring int16 sums of column vector v added to int32, times their factors."""
        lanes = self.acc.lanes
        ones = self.factors[v] if self.factors else splat(1, "int16", 2 * lanes)
        return self._call("madd_i16", "int32", lanes, pairs, ones)

    def weights(self, index: Expr) -> list[list[Expr]]:
        """The weight vectors of one K-group: for each column vector one, or two halves."""
        nv, lanes = self.acc.nv, self.acc.lanes
        if self.kind in ("smlal", "smmla") or (self.kind == "exact" and self.isa.dot == "smlal"):
            return paired_weights(self, index)
        if self.storage != "plain":
            found = weight_vectors(
                self.isa, self.storage, self.weight, self.kind, index, nv, lanes, self.terms
            )
        else:
            halves = 2 if self.kind == "exact" else 1
            size = self.weight_elements // nv // halves
            return [
                [bind(load(self.weight, index + (h * nv + v) * size, size)) for h in range(halves)]
                for v in range(nv)
            ]
        if not self.factors or self.kind == "maddubs":
            return found
        both = zip(found, self.factors, strict=True)
        return [times_factor(vector, factor, self.kind, lanes) for vector, factor in both]

    def unpack(self, index: Expr, area: Buffer, to: Expr) -> None:
        """Write the weight vectors of one K-group as plain storage has them."""
        vectors = self.weights(index)
        if self.kind == "smmla":  # both registers of a column vector, then the next
            vectors = [[register] for vector in vectors for register in vector]
        position = 0
        for half in range(len(vectors[0])):
            for vector in vectors:
                store(area, to + position, vector[half])
                position += lanes_of(vector[half])

    def _activations(self, source: Buffer, index: Expr) -> list[Expr]:
        """One activation group in every lane.

        For int16 pairs in two halves: the first and the last two members of wide activations, else
        the even and the odd bytes.
        """
        lanes = self.acc.lanes
        if self.kind == "float":
            return [bind(splat(load(source, index, 1), "float32", lanes))]
        if self.kind == "exact" and source.dtype == "int16":
            pairs = [reinterpret(load(source, index + at, 2), "int32", 1) for at in (0, 2)]
            return [bind(reinterpret(splat(p, "int32", lanes), "int16", 2 * lanes)) for p in pairs]
        quad = splat(reinterpret(load(source, index, 4), "int32", 1), "int32", lanes)
        if self.kind != "exact":
            return [bind(reinterpret(quad, self.isa.a_dtype, 4 * lanes))]
        words = bind(reinterpret(quad, "uint16", 2 * lanes))
        even = words & splat(255, "uint16", 2 * lanes)
        odd = words >> splat(8, "uint16", 2 * lanes)
        return [bind(reinterpret(half, "int16", 2 * lanes)) for half in (even, odd)]

    def multiply(self, acc: Expr, a: list[Expr], w: list[Expr], v: int = 0) -> Expr:
        """`acc` plus the products of one activation group with one weight vector, the v-th."""
        lanes = self.acc.lanes
        if self.kind == "float":
            return acc + a[0] * w[0]  # contracted to one FMA where the row has it
        if self.kind == "vpdpbusd":
            return self._call("dot_u8s8", "int32", lanes, acc, a[0], w[0])
        if self.kind == "sdot":  # the operand that may be one element of a register comes last
            return self._call("dot_s8s8", "int32", lanes, acc, w[0], a[0])
        if self.kind == "maddubs":
            pairs = self._call("madd_u8s8", "int16", 2 * lanes, a[0], w[0])
            return acc + self._widened(pairs, v)
        if self.kind == "smlal":
            return acc + chain(self.isa, a, w)
        if self.isa.a_dtype == "int8":
            return acc + chain(self.isa, a[:1], w[:1]) + chain(self.isa, a[1:], w[1:])
        for even_or_odd, weight in zip(a, w, strict=True):
            acc = acc + self._call("madd_i16", "int32", lanes, even_or_odd, weight)
        return acc

    def _call(self, operation: str, dtype: str, lanes: int, *operands: Expr) -> Expr:
        bits = 32 * self.acc.lanes
        name = self.isa.intrinsic(operation, bits)
        if name is None:
            raise CodegenError(f"instruction set {self.isa.name} has no {operation} on {bits} bits")
        return intrinsic(f"{dtype}x{lanes}", name, *operands)
