# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Loops over K for rows whose activations are signed: ARM's dot instructions.

`sdot` multiplies a vector of four columns' weights by one 32-bit element of a register: sixteen
bytes of a pixel are loaded once and serve four K-groups, with no broadcast.

`smmla` multiplies 2 rows x 8 by 8 x 2 columns.  A pair of pixels and four columns make two
accumulators, `[p0 c0, p0 c1, p1 c0, p1 c1]` and the same of c2 and c3: as many registers as two
pixels times one vector, so a register tile keeps its shape and only its order changes.

`smlal` multiplies s8 by s8 into int16, where as many products are added as the weights are proved
to allow (`depth.chain_depth`); `sadalp` then adds neighbours into int32.

Hot loops as LLVM 22 emits them for sixteen bytes of K:

* `sdot` 5x4: 80 `sdot` by element, 5 `ldr`, 8 `ldp`, 4 of the loop; no vector on the stack;
* `smmla` 4x4: 32 `smmla`, 4 `ldr`, 4 `zip`, 8 `ldp`, 3 of the loop; no vector on the stack (6x4 is
  as fast where it fits, but LLVM spills it with the schedules of half of the processors);
* `smlal` 3x4, chains of one group: 48 each of `smull`, `smlal` and `sadalp`, 24 `dup`, 3 `ldr`, 16
  `ldp`; two vectors on the stack in some.

Sources: Arm A64 instruction set (SMULL, SMLAL, SADALP, SDOT by element, SMMLA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    dtype_of,
    intrinsic,
    lanes_of,
    load,
    reinterpret,
    serial,
    shuffle,
    splat,
)
from qcompiler.targets.kernels.unpack import times_factor, weight_vectors

if TYPE_CHECKING:
    from qcompiler.targets.kernels.macro import MacroKernel, Source
    from qcompiler.targets.kernels.packing import Facts
    from qcompiler.targets.kernels.register_tile import Accumulators, Step

__all__ = ["by_element_loops", "chain", "paired_weights", "rows_of_tile", "run_of_elements"]

_BYTES = 16
"""Activations of a pixel that are loaded together."""
_UNROLLED = 2
"""Blocks of a run that are unrolled rather than looped over."""


def rows_of_tile(dot: str, pixels: Sequence[Any]) -> int:
    """Rows of accumulators of a register tile: whole pairs for `smmla`."""
    return len(pixels) + (len(pixels) % 2 if dot == "smmla" else 0)


def by_element_loops(
    kernel: MacroKernel,
    source: Source,
    a_index: Expr,
    a_steps: Sequence[int],
    tile: Expr,
    acc: Accumulators,
) -> None:
    """Accumulate a register tile over all of K; arguments as `MacroKernel._k_loops`."""
    from qcompiler.targets.kernels.register_tile import Step

    g = kernel.geometry
    offsets = kernel.constants.get("offsets")
    step = Step(kernel.isa, kernel.facts.dot, kernel.constants["weight"], acc, kernel.facts.storage)
    (depth,) = kernel.facts.depths
    blocks = _Blocks(step, source.buffer, a_steps, g.k_group, depth)
    first = bind(tile * (g.k_groups * blocks.weight_elements))
    whole = _BYTES // g.k_group
    runs = g.k_rows * g.k_cols
    if kernel.facts.dot == "smmla":
        blocks.pair()
    if size := kernel.facts.factor:
        count = g.k_groups // size
        with serial(count) as run:
            begin = bind(run * size)
            at = begin * g.k_group if offsets is None else load(offsets, begin, 1)
            own = replace(step, factors=kernel.factors(bind(tile * count + run)))
            weights = bind(first + begin * blocks.weight_elements)
            part = _Blocks(own, source.buffer, a_steps, g.k_group, depth)
            part.run(bind(a_index + at), weights, size)
    elif runs > 1 and g.run_groups % whole == 0:  # blocks never straddle runs: one flat loop
        with serial(g.k_groups // whole) as k:
            at = bind(a_index + load(offsets, k * whole, 1))
            blocks.emit(at, first + k * (whole * blocks.weight_elements), whole)
    elif runs > 1:
        with serial(runs) as run:
            at = bind(a_index + load(offsets, run * g.run_groups, 1))
            begin = bind(first + run * (g.run_groups * blocks.weight_elements))
            blocks.run(at, begin, g.run_groups)
    else:
        blocks.run(a_index, first, g.run_groups)
    if kernel.facts.dot == "smmla":
        blocks.unpair()


def run_of_elements(
    step: Step,
    source: Buffer,
    a_index: Expr,
    a_steps: Sequence[int],
    w_index: Expr,
    facts: Facts,
) -> None:
    """Accumulate the K-groups of one group of weights (`Facts.group`), from one element on.

    Args:
        step: Of the kernel, with its accumulators.
        source: The activations.
        a_index: Element of the first pixel's activations; those of the group follow.
        a_steps: Offset of each pixel from the first.
        w_index: Element of the group's weights.
        facts: Of the packed weights.
    """
    (depth,) = facts.depths
    blocks = _Blocks(step, source, a_steps, step.isa.k_group, depth)
    if step.kind == "smmla":
        blocks.pair()
    blocks.run(a_index, w_index, facts.group)
    if step.kind == "smmla":
        blocks.unpair()


def products(isa: Isa, a: Sequence[Expr], w: Sequence[Expr], *sums: Expr) -> Expr:
    """Products of s8 vectors of eight, added in int16 to `sums`."""
    name = str(isa.intrinsic("mul_s8", 128))
    terms = [*sums, *(intrinsic("int16x8", name, *pair) for pair in zip(a, w, strict=True))]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def widened(isa: Isa, pairs: Expr) -> Expr:
    """Neighbouring int16 added to int32."""
    return intrinsic("int32x4", str(isa.intrinsic("pairs_i16", 128)), pairs)


def chain(isa: Isa, a: Sequence[Expr], w: Sequence[Expr]) -> Expr:
    """Products of s8 vectors of eight, added in int16, as int32 sums of neighbours."""
    return widened(isa, products(isa, a, w))


def paired_weights(step: Step, index: Expr) -> list[list[Expr]]:
    """The weights of one K-group by element: two registers for each column vector, but for `sdot`.

    `smlal` (and exact): eight bytes of the first, and of the last, two members of each group.
    `smmla`: eight members of the first, and of the last, two columns.
    """
    nv = step.acc.nv
    if step.kind == "smmla":
        return [_registers(step, index, v) for v in range(nv)]
    if step.storage == "plain":
        size = 2 * step.acc.lanes
        return [
            [bind(load(step.weight, index + (half * nv + v) * size, size)) for half in range(2)]
            for v in range(nv)
        ]
    whole = [vector[0] for vector in _unpacked(step, index, nv)]
    slots = [shuffle([vector], range(8 * k, 8 * k + 8)) for vector in whole for k in range(2)]
    found = [[bind(slots[half * nv + v]) for half in range(2)] for v in range(nv)]
    if not step.factors:
        return found
    both = zip(found, step.factors, strict=True)
    return [times_factor(vector, factor, step.kind, step.acc.lanes) for vector, factor in both]


def _registers(step: Step, index: Expr, v: int) -> list[Expr]:
    """Both registers of one column vector for `smmla`."""
    if step.storage == "plain":
        return [bind(load(step.weight, index + (v * 2 + half) * 16, 16)) for half in range(2)]
    codes = [vector[0] for vector in _unpacked(step, index + v * 16, 2)]
    if not step.factors:
        return codes
    return times_factor(codes, step.factors[v], step.kind, step.acc.lanes)


def _unpacked(step: Step, index: Expr, count: int) -> list[list[Expr]]:
    return weight_vectors(step.isa, step.storage, step.weight, "sdot", index, count, step.acc.lanes)


class _Blocks:
    """Emits blocks of K-groups of one register tile."""

    def __init__(
        self, step: Step, source: Buffer, a_steps: Sequence[int], group: int, depth: int
    ) -> None:
        self.step, self.source, self.a_steps, self.group = step, source, a_steps, group
        self.acc = step.acc
        self.depth = depth
        self.weight_elements = step.weight_elements

    def run(self, a_index: Expr, w_index: Expr, groups: int) -> None:
        """K-groups that follow each other in memory: whole blocks, then what is left."""
        whole = _BYTES // self.group
        count = groups // whole
        if count > _UNROLLED:
            with serial(count) as k:
                at = bind(a_index + k * _BYTES)
                self.emit(at, w_index + k * (whole * self.weight_elements), whole)
        else:
            for k in range(count):
                at = bind(a_index + k * _BYTES)
                self.emit(at, w_index + k * (whole * self.weight_elements), whole)
        done = count * whole
        while done < groups:
            size = 1 << ((groups - done).bit_length() - 1)
            at = bind(a_index + done * self.group)
            self.emit(at, w_index + done * self.weight_elements, size)
            done += size

    def emit(self, a_index: Expr, w_index: Expr, groups: int) -> None:
        """One block of K-groups, a power of two."""
        size = groups * self.group
        rows = [bind(load(self.source, a_index + step, size)) for step in self.a_steps]
        if self.step.kind == "smmla":
            self._matrices(rows, w_index, groups)
        elif self.step.kind == "sdot":
            self._elements(rows, w_index, groups)
        else:
            depth = min(self.depth, groups)
            for k in range(0, groups, depth):
                self._chains(rows, range(k, k + depth), w_index)

    def _elements(self, rows: list[Expr], w_index: Expr, groups: int) -> None:
        lanes = self.acc.lanes
        words = [bind(reinterpret(row, "int32", groups)) for row in rows]
        for k in range(groups):
            weights = self.step.weights(w_index + k * self.weight_elements)
            for m, word in enumerate(words):
                part = bind(reinterpret(_element(word, k, lanes), "int8", 4 * lanes))
                for v in range(self.acc.nv):
                    total = self.step.multiply(self.acc.get(m, v), [part], weights[v])
                    self.acc.put(m, v, total)

    def _chains(self, rows: list[Expr], groups: range, w_index: Expr) -> None:
        """K-groups whose products are added in int16, then widened together."""
        step, acc, lanes = self.step, self.acc, self.acc.lanes
        for k in groups:
            weights = step.weights(w_index + k * self.weight_elements)
            for m, row in enumerate(rows):
                words = bind(reinterpret(row, "int16", lanes_of(row) // 2))
                pairs = [_element(words, 2 * k + h, lanes) for h in range(2)]
                parts = [bind(reinterpret(pair, "int8", 2 * lanes)) for pair in pairs]
                for v in range(acc.nv):
                    if step.kind == "exact" or len(groups) == 1:
                        acc.put(m, v, step.multiply(acc.get(m, v), parts, weights[v]))
                        continue
                    sums = [] if k == groups[0] else [acc.get_narrow(m, v)]
                    acc.put_narrow(m, v, products(step.isa, parts, weights[v], *sums))
        if step.kind == "exact" or len(groups) == 1:
            return
        for m in range(len(rows)):
            for v in range(acc.nv):
                acc.put(m, v, acc.get(m, v) + widened(step.isa, acc.get_narrow(m, v)))

    def _matrices(self, rows: list[Expr], w_index: Expr, groups: int) -> None:
        name = str(self.step.isa.intrinsic("matmul_s8s8", 128))
        rows = rows if len(rows) % 2 == 0 else [*rows, rows[-1]]
        words = [bind(reinterpret(row, "int64", groups)) for row in rows]
        for k in range(groups):
            pairs = [shuffle(words[m : m + 2], [k, groups + k]) for m in range(0, len(rows), 2)]
            pairs = [bind(reinterpret(pair, "int8", 16)) for pair in pairs]
            for v in range(self.acc.nv):  # all pairs with one vector: few weights live at a time
                for half, w in enumerate(
                    _registers(self.step, w_index + k * self.weight_elements, v)
                ):
                    for j, a in enumerate(pairs):
                        m = 2 * j + half
                        total = intrinsic("int32x4", name, self.acc.get(m, v), a, w)
                        self.acc.put(m, v, total)

    def pair(self) -> None:
        """Turn rows of columns into 2 x 2 blocks; a last row without a partner is its own."""
        self._exchange(len(self.a_steps))

    def unpair(self) -> None:
        """Turn 2 x 2 blocks back into rows of columns."""
        self._exchange(len(self.a_steps) + len(self.a_steps) % 2)

    def _exchange(self, rows: int) -> None:
        """Exchange the upper half of each even row with the lower half of the odd row after it."""
        for even in range(0, rows, 2):
            for v in range(self.acc.nv):
                pair = [bind(self.acc.get(min(m, rows - 1), v)) for m in (even, even + 1)]
                self.acc.put(even, v, shuffle(pair, [0, 1, 4, 5]))
                self.acc.put(even + 1, v, shuffle(pair, [2, 3, 6, 7]))


def _element(words: Expr, index: int, lanes: int) -> Expr:
    """One element of a vector in every lane of another."""
    count = lanes_of(words)
    if count >= lanes:
        return shuffle([words], [index] * lanes)
    scalar = words if count == 1 else bind(shuffle([words], [index]))
    return splat(scalar, dtype_of(words), lanes)
