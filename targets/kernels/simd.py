# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What kernels written on wide generic vectors need beyond `tir`.

Memory-bound kernels are written on vectors wider than a register (64 lanes of float32, say); LLVM
splits them into what the machine has.  Only target-independent LLVM intrinsics are used here, so
one generator serves every CPU row, and the few kernels that want one particular instruction ask the
`Isa`.

Covering a length: `vector_spans` cuts it into full vectors and a remainder, and the remainder into
one overlapping vector or into narrower ones; no kernel reads or writes out of bounds.

Buffers made inside a kernel live on the stack only in scope "global" and below 1024 bytes; anything
else calls the runtime's allocator on every pass.  `stack` is the one kind, `workspace` the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod

from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.tir import Buffer, Expr

__all__ = [
    "ITEM_BYTES",
    "PARALLEL_CYCLES",
    "clamped",
    "div_mod",
    "exact_mul",
    "loop",
    "lrint",
    "moving_cycles",
    "quantized",
    "reduce_lanes",
    "settle",
    "stack",
    "tail_widths",
    "unravel",
    "vector_spans",
    "workspace",
    "worth_threads",
]

ITEM_BYTES = {
    "uint8": 1,
    "int8": 1,
    "bool": 1,
    "int16": 2,
    "float16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
}
"""Bytes per element of each storage dtype."""

STORAGE_RANGE = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-32768, 32767)}
"""Inclusive range of the quantized storage dtypes."""

STACK_BYTES = 1023
"""Largest buffer that stays on the stack, in bytes."""

PARALLEL_CYCLES = 60_000.0
"""Estimated work, in cycles, from which a kernel is split over the thread pool: waking the pool
costs several microseconds."""


def worth_threads(cycles: float) -> bool:
    """Whether work of this many estimated cycles pays for waking the thread pool."""
    return cycles >= PARALLEL_CYCLES


def moving_cycles(outputs: float, elements_read: float, lanes: int) -> float:
    """Estimated cycles of a product beside its multiplications, which may be most of them.

    Three for a vector of sums to become outputs in memory, one for 16 operands from level 2.
    """
    return outputs * 3.0 / lanes + elements_read / 16.0


# Loops.


@contextmanager
def loop(extent: int, *, threads: bool = False) -> Iterator[Expr]:
    """A loop over range(extent); no loop, and the index 0, where there is one iteration."""
    if extent == 1:
        yield tir.splat(0, "int32", 1)
        return
    with tir.parallel(extent) if threads else tir.serial(extent) as index:
        yield index


def div_mod(value: Expr, divisor: int) -> tuple[Expr, Expr]:
    """Quotient and remainder of a non-negative index."""
    if divisor == 1:
        return value, tir.splat(0, "int32", 1)
    return tir.bind(T.floordiv(value, divisor)), tir.bind(T.floormod(value, divisor))


def unravel(flat: Expr, extents: Sequence[int]) -> list[Expr]:
    """The indices along `extents` of the row-major index `flat`."""
    out: list[Expr] = []
    rest = flat
    for axis in range(len(extents) - 1, -1, -1):
        if prod(extents[:axis]) == 1:
            out.append(rest if extents[axis] != 1 else tir.splat(0, "int32", 1))
            out.extend(tir.splat(0, "int32", 1) for _ in range(axis))
            break
        rest, index = div_mod(rest, extents[axis])
        if extents[axis] == 1:
            index = tir.splat(0, "int32", 1)
        out.append(index)
    return out[::-1]


def tail_widths(count: int) -> list[tuple[int, int]]:
    """Split `count` elements into power-of-two vectors, widest first: [(offset, lanes)]."""
    spans, offset = [], 0
    while offset < count:
        lanes = 1 << ((count - offset).bit_length() - 1)
        spans.append((offset, lanes))
        offset += lanes
    return spans


def vector_spans(count: int, lanes: int, *, overlap: bool) -> list[tuple[int, int, int]]:
    """Cover `count` elements with vectors: [(offset, repetitions, lanes)].

    The first span holds the full vectors.  What is left is covered by one more full vector that
    ends at the end (`overlap`: some elements are computed twice, for kernels where that is
    harmless) or by narrower and narrower ones.
    """
    full, left = divmod(count, lanes)
    spans = [(0, full, lanes)] if full else []
    if left and full and overlap:
        return [*spans, (count - lanes, 1, lanes)]
    return spans + [(full * lanes + offset, 1, width) for offset, width in tail_widths(left)]


# Memory.


def stack(count: int, dtype: str) -> Buffer:
    """A small array on the stack; in registers where every index is a constant."""
    if count * ITEM_BYTES[dtype] > STACK_BYTES:
        raise CodegenError(f"stack: expected at most {STACK_BYTES} bytes, got {count} x {dtype}")
    return T.alloc_buffer((count,), dtype, scope="global")


def settle(value: Expr) -> Expr:
    """`value`, named by way of a stack slot (a register, once LLVM has seen it).

    TVM's analysis of nested names takes time exponential in their depth; a slot ends the chain.
    """
    dtype, _, lanes = str(value.ty).partition("x")
    slot = stack(int(lanes or 1), dtype)
    tir.store(slot, 0, value)
    return tir.bind(tir.load(slot, 0, int(lanes or 1)))


def workspace(count: int, dtype: str) -> Buffer:
    """A work area from the runtime's pool; tens of nanoseconds for each allocation."""
    return T.alloc_buffer(
        (max(count, STACK_BYTES // ITEM_BYTES[dtype] + 1),), dtype, scope="global"
    )


# Arithmetic.


def exact_mul(a: Expr, b: Expr) -> Expr:
    """A float32 product that is rounded before anything is added to it."""
    return tir.fence(a * b)


def lrint(value: Expr) -> Expr:
    """Round float32 lanes to int32, ties to even; every lane must fit int32.

    `llvm.lrint` is one conversion instruction on x86 and on ARM, for vectors of any width.
    """
    lanes = tir.lanes_of(value)
    if lanes == 1:  # the scalar form calls libm on some rows
        return tir.shuffle([lrint(T.broadcast(value, 4))], [0])
    return tir.intrinsic(tir.vector("int32", lanes), "llvm.lrint", value)


def clamped(value: Expr, low: float, high: float, dtype: str) -> Expr:
    """Limit 8- or 16-bit lanes to [low, high], without the comparisons the dtype makes needless."""
    storage_low, storage_high = STORAGE_RANGE[dtype]
    return tir.clamp(
        value,
        low if low > storage_low else None,
        high if high < storage_high else None,
    )


def quantized(
    value: Expr,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: str,
    isa: Isa | None = None,
    bound: float | None = None,
) -> Expr:
    """`clamp(rint(value) + zero_point, qmin, qmax)` as lanes of `dtype`, for float32 `value`.

    The clamp comes first and in float32, where its bounds are whole numbers that no rounding can
    cross; so the conversion to int32 is always in range.  NaN gives qmin.

    With `isa`, a full register of 8-bit results is narrowed by the saturating pack instructions.
    With a `bound` on |value| as well they also do the clamp, where it is the dtype's own range.
    """
    lanes = tir.lanes_of(value)
    packs = isa is not None and lanes * 8 == isa.vector_bits and dtype in ("uint8", "int8")
    free = packs and bound is not None and (bound < 2.0**30 or (isa and isa.saturates))
    if isa is not None and free and isa.saturates:
        narrow = _packed_bytes(isa, tir.bind(value), zero_point, dtype)
        return clamped(tir.bind(narrow), qmin, qmax, dtype)
    if not (free and (qmin, qmax) == STORAGE_RANGE[dtype]):
        value = tir.clamp(value, float(qmin - zero_point), float(qmax - zero_point))
    if isa is not None and packs:
        return _packed_bytes(isa, tir.bind(value), zero_point, dtype)
    rounded = lrint(value)
    if zero_point:
        rounded = rounded + tir.splat(zero_point, "int32", lanes)
    return tir.cast(rounded, dtype)


def _packed_bytes(isa: Isa, value: Expr, zero_point: int, dtype: str) -> Expr:
    """Round, add the zero point and saturate one register's worth of 8-bit results."""
    lanes = tir.lanes_of(value)
    quarter, half = lanes // 4, tir.vector("int16", lanes // 2)
    parts = [
        tir.bind(
            tir.round_to_int32(isa, tir.shuffle([value], range(k * quarter, (k + 1) * quarter)))
        )
        for k in range(4)
    ]
    words = [tir.saturated(isa, parts[k], parts[k + 1], "int16") for k in (0, 2)]
    if zero_point:  # saturating to int16 before and after it changes no 8-bit result
        shift = tir.splat(zero_point, "int16", lanes // 2)
        words = [tir.intrinsic(half, "llvm.sadd.sat", word, shift) for word in words]
    narrow = tir.saturated(isa, tir.bind(words[0]), tir.bind(words[1]), dtype)
    if lanes == 16:
        return narrow
    # Packs work within 128-bit lanes: four bytes of each part, lane after lane.
    blocks = lanes // 16
    order = [lane * 4 + part for part in range(4) for lane in range(blocks)]
    moved = tir.shuffle([tir.bind(tir.reinterpret(narrow, "int32", quarter))], order)
    return tir.reinterpret(moved, dtype, lanes)


def reduce_lanes(operation: str, value: Expr) -> Expr:
    """Fold a vector into a scalar by "add", "max" or "min".

    The lanes must be a power of two.  Halves are combined until one lane is left, so float sums
    have one fixed order.
    """
    fold: Callable[[Expr, Expr], Expr] = {
        "add": lambda a, b: a + b,
        "max": T.max,
        "min": T.min,
    }[operation]
    lanes = tir.lanes_of(value)
    while lanes > 1:
        lanes //= 2
        value = tir.bind(value)
        value = fold(
            tir.shuffle([value], range(lanes)), tir.shuffle([value], range(lanes, 2 * lanes))
        )
    return value
