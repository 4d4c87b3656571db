# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products in half precision: float16 by float16, added up in float16 over short runs of K.

`fmla` on halves also adds in halves, and a long sum in halves is off by too much: with each step
the sum is rounded to eleven bits.  So K is cut into blocks of at most `BLOCK` products; the sums of
a block are float16, and its end adds them to float32 totals.  With weights `w` of the sum's column,
activations `a`, and u = 2^-11, the total differs from the exact sum by at most

    sum |a| |w| * (B * u / (1 - B * u) + K * 2^-24)  +  c * (K + sum |a|) * 2^-25,

B = `BLOCK`, and typically by 0.0011 of the sum's own size (root mean square of 576 normal products;
0.0008 with blocks of 32, 0.0035 with one block).  The second part is what subnormal products and
weights lose; c is the column's power of two, below.

No sum of a block overflows, whatever finite activations meet the weights: those of a column are
divided by a power of two c, so that the magnitudes of a block's weights add up to less than one,
and a block's sum is smaller than its largest activation.  The totals are multiplied by c again in
float32.  Only results beyond 65519 become infinite, where they are stored in half precision.

Hot loop as LLVM 22 emits it for eight members of K, 5 pixels x 4 vectors on ARM: 160 `fmla` by
element, 16 `ldp`, 5 `ldr`, 4 of the loop.  The end of a block is for each accumulator 2 `fcvtl` and
2 `fadd`, most with the totals on the stack: with blocks of 64, an eighth of the products.

Source: N. Higham, Accuracy and Stability of Numerical Algorithms, chapters 3 and 4 (blocked sums).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.plan import Geometry

if TYPE_CHECKING:
    from qcompiler.targets.kernels.macro import MacroKernel, Source
    from qcompiler.targets.kernels.register_tile import Accumulators
    from qcompiler.targets.kernels.tir import Buffer, Expr

__all__ = ["BLOCK", "block_starts", "column_powers", "half_loops", "needs_halves", "powers_of"]

BLOCK = 64
"""Most products that are added in float16."""
_WIDE = 8
"""Members of K of a pixel that are loaded together, for multiplication by element."""
_MARGIN = 0.96
"""What the weights of a block may add up to, divided: rounding makes sums 3.2 % larger at most."""
_POWERS = (-24, 64)
"""Exponents of a column's power of two: no float16 is below the first but 0."""


def needs_halves(isa: Isa, what: str) -> None:
    """Check that a row multiplies halves.

    Raises:
        CodegenError: It does not.
    """
    if not isa.halves:
        raise CodegenError(f"{what}: instruction set {isa.name} does not multiply float16")


def block_starts(runs: int, run: int) -> npt.NDArray[np.int64]:
    """First member of K of each block: parts of a run, or several whole runs."""
    if run > BLOCK:
        parts = np.arange(0, run, _part(run))
        return (np.arange(runs)[:, None] * run + parts).reshape(-1)
    return np.arange(0, runs * run, _runs_together(run) * run)


def _part(run: int) -> int:
    """Members of each block but the last of a run that is cut: whole loads, about as many each."""
    blocks = -(-run // BLOCK)
    return -(-run // (blocks * _WIDE)) * _WIDE


def _runs_together(run: int) -> int:
    """Runs of a block, where several fit."""
    return max(1, BLOCK // run)


def column_powers(weight: npt.NDArray[np.float16], geometry: Geometry) -> npt.NDArray[np.float32]:
    """The power of two c of each column, for weights `[groups, n, runs, run]`; `[groups * n]`."""
    count = geometry.groups * geometry.n
    sizes = np.abs(weight.reshape(count, -1).astype(np.float64))
    starts = block_starts(geometry.k_rows * geometry.k_cols, geometry.run)
    return powers_of(np.add.reduceat(sizes, starts, axis=1).max(1))


def powers_of(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The power of two of columns whose weights' magnitudes add up to `sums` in some block.

    Raises:
        CodegenError: A weight is infinite or NaN.
    """
    if not np.isfinite(sums).all():
        raise CodegenError("weights in half precision must be finite")
    exponents = np.ceil(np.log2(np.maximum(sums, 2.0**-60) / _MARGIN))
    return np.exp2(np.where(sums > 0, np.clip(exponents, *_POWERS), 0)).astype(np.float32)


def half_loops(
    kernel: MacroKernel,
    source: Source,
    a_index: Expr,
    a_steps: list[int],
    tile: Expr,
    sums: tuple[Accumulators, Accumulators],
) -> None:
    """Accumulate a register tile over all of K.

    Args:
        kernel: The kernel.
        source: The activations.
        a_index: Element of the first pixel's activations.
        a_steps: Offset of each pixel from the first.
        tile: The column tile, counted from the first whose weights are in the buffer.
        sums: The accumulators of a block, float16, and the totals, float32.
    """
    from qcompiler.targets.kernels.tir import bind, load, serial

    g, plan = kernel.geometry, kernel.plan
    runs, run = g.k_rows * g.k_cols, g.run
    offsets = kernel.constants.get("offsets")
    block = _Block(kernel, source.buffer, a_steps, *sums)
    first = bind(tile * (g.k_groups * plan.nt))

    def start_of(k: Expr) -> Expr:
        return a_index if offsets is None else bind(a_index + load(offsets, k, 1))

    def members(at: Expr, k: Expr, count: int) -> None:
        """Some members of a run, from element `at` of the activations and member `k` of K."""
        whole = count // _WIDE if count > 2 * _WIDE else 0
        if whole:
            with serial(whole) as wide:
                step = bind(wide * _WIDE)
                block.multiply(bind(at + step), bind(first + (k + step) * plan.nt), _WIDE)
        for begin, size in _pieces(count - whole * _WIDE):
            step = whole * _WIDE + begin
            block.multiply(at + step, bind(first + (k + step) * plan.nt), size)

    if run > BLOCK:
        with _loop(runs) as r:
            at, k, size = start_of(r * run), bind(r * run), _part(run)
            with serial(run // size) as part:
                block.begin()
                with serial(size // _WIDE) as wide:
                    step = bind(part * size + wide * _WIDE)
                    block.multiply(bind(at + step), bind(first + (k + step) * plan.nt), _WIDE)
                block.end()
            if run % size:
                done = run // size * size
                block.begin()
                members(bind(at + done), bind(k + done), run % size)
                block.end()
        return
    together = _runs_together(run)

    def whole(r: Expr, count: int) -> None:
        block.begin()
        if run < _WIDE:
            for i in range(count):
                k = bind((r + i) * run)
                members(start_of(k), k, run)
        else:
            with _loop(count) as i:
                k = bind((r + i) * run)
                members(start_of(k), k, run)
        block.end()

    if runs // together:
        with _loop(runs // together) as chunk:
            whole(bind(chunk * together), together)
    if runs % together:
        whole(runs // together * together, runs % together)


def _loop(extent: int) -> Any:
    from qcompiler.targets.kernels.simd import loop

    return loop(extent)


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    """(first, size) of the loads of `count` members: powers of two, `_WIDE` at most."""
    begin = 0
    while begin < count:
        size = min(_WIDE, 1 << ((count - begin).bit_length() - 1))
        yield begin, size
        begin += size


@dataclass(frozen=True, slots=True)
class _Block:
    """Emits the products of one block of K."""

    kernel: MacroKernel
    source: Buffer
    a_steps: list[int]
    acc: Accumulators
    totals: Accumulators

    def _each(self) -> Iterator[tuple[int, int]]:
        return ((m, v) for m in range(len(self.a_steps)) for v in range(self.acc.nv))

    def begin(self) -> None:
        """Start the sums of a block from nothing."""
        from qcompiler.targets.kernels.tir import splat

        for m, v in self._each():
            self.acc.put(m, v, splat(0.0, "float16", self.acc.lanes))

    def multiply(self, at: Expr, weights: Expr, size: int) -> None:
        """Some neighbours along K, a power of two."""
        from qcompiler.targets.kernels.tir import bind, load, reinterpret, shuffle, splat

        acc, lanes, nt = self.acc, self.acc.lanes, self.kernel.plan.nt
        weight = self.kernel.constants["weight"]
        rows = [bind(load(self.source, at + step, size)) for step in self.a_steps]
        for k in range(size):
            bits = [load(weight, weights + (k * nt + v * lanes), lanes) for v in range(acc.nv)]
            columns = [bind(reinterpret(b, "float16", lanes)) for b in bits]
            for m, row in enumerate(rows):
                if size >= lanes:
                    part = bind(shuffle([row], [k] * lanes))
                else:
                    part = row if size == 1 else bind(shuffle([row], [k]))
                    part = bind(splat(part, "float16", lanes))
                for v in range(acc.nv):  # contracted to one multiply-add
                    acc.put(m, v, acc.get(m, v) + part * columns[v])

    def end(self) -> None:
        """Add the sums to the totals."""
        from qcompiler.targets.kernels.tir import cast

        for m, v in self._each():
            self.totals.put(m, v, self.totals.get(m, v) + cast(self.acc.get(m, v), "float32"))
