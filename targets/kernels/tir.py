# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Small helpers to write TIR kernels by executing Python.

A kernel is a Python function that runs inside `PrimFuncBuilder`; ordinary Python loops unroll, and
`serial`/`parallel` make loops in the kernel.  That takes milliseconds, where the TVMScript parser
takes tenths of a second for each kernel::

    with PrimFuncBuilder("scale") as builder:
        x = builder.argument("x", (64,), "float32")
        y = builder.argument("y", (64,), "float32")
        with serial(4) as i:
            store(y, i * 16, load(x, i * 16, 16) * splat(2.0, "float32", 16))
    function = builder.finish()

Rounding: TVM's LLVM code generator lets the back end contract `a * b + c` into a fused
multiply-add.  Where each operation must round by itself, wrap the product in `fence`.

This module imports TVM, so only modules that build kernels may import it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, final

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.targets.isa import Isa

__all__ = [
    "Buffer",
    "Expr",
    "PrimFuncBuilder",
    "alias",
    "bind",
    "cast",
    "clamp",
    "dtype_of",
    "fence",
    "flat",
    "intrinsic",
    "lanes_of",
    "load",
    "load_int32",
    "local",
    "maximum",
    "minimum",
    "own_function",
    "parallel",
    "prefetch",
    "ramp",
    "registers",
    "reinterpret",
    "requantized",
    "round_to_int32",
    "saturated",
    "scratch",
    "select_lazy",
    "serial",
    "shuffle",
    "splat",
    "store",
    "store_narrow",
    "vector",
    "when",
]

Expr = Any
"""A TIR expression (`tvm.ir.PrimExpr`)."""
Buffer = Any
"""A TIR buffer."""

_INT_RANGE = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-32768, 32767)}


@final
class PrimFuncBuilder:
    """Collects one PrimFunc; use as a context, then call `finish`."""

    def __init__(self, name: str) -> None:
        """Start the PrimFunc whose symbol is `name`."""
        self._name = name
        self._builder = IRBuilder()
        self._frame = T.prim_func()

    def __enter__(self) -> PrimFuncBuilder:
        self._builder.__enter__()
        self._frame.__enter__()
        T.func_name(self._name)
        T.func_attr({"global_symbol": self._name, "tirx.noalias": True})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._frame.__exit__(kind, error, trace)
        self._builder.__exit__(kind, error, trace)

    def argument(self, name: str, shape: Sequence[int], dtype: str) -> Buffer:
        """Declare the next buffer argument, a dense row-major array of `shape`.

        Declare all arguments before anything else (`flat` included).
        """
        return T.arg(name, T.buffer(tuple(shape), dtype))

    def finish(self) -> Any:
        """The finished `tvm.tirx.PrimFunc`."""
        return self._builder.get()


# Buffers.


def flat(buffer: Buffer) -> Buffer:
    """A one-dimensional alias of a dense `buffer`."""
    size = 1
    for extent in buffer.shape:
        size *= int(extent)
    return alias(buffer, (size,), buffer.dtype)


def alias(buffer: Buffer, shape: Sequence[int], dtype: str) -> Buffer:
    """A view of the memory of `buffer` with another shape or element type of the same size."""
    return T.decl_buffer(tuple(shape), dtype, data=buffer.data)


def local(size: int, dtype: str) -> Buffer:
    """A one-dimensional buffer that LLVM keeps in registers when all its indices are constants."""
    return T.alloc_buffer((size,), dtype, scope="local")


def registers(size: int, dtype: str) -> Buffer:
    """Like `local`, for use in `own_function`: it is allocated in that function.

    TVM moves a `local` buffer out to the enclosing parallel loop; what the body leaves in it is
    then stored to memory.
    """
    words = -(-size * int(re.findall(r"\d+", dtype)[0]) // 64)
    pointer = tvm.ir.PointerType(tvm.ir.PrimType(dtype), "local")
    data = T.bind(tirx.call_intrin(pointer, "tirx.tvm_stack_alloca", "shape", words), pointer)
    return T.decl_buffer((size,), dtype, data=data, scope="local", align=8)


def scratch(size: int, dtype: str) -> Buffer:
    """A one-dimensional work area in memory, private to the enclosing (parallel) iteration."""
    return T.alloc_buffer((size,), dtype, scope="global")


def prefetch(buffer: Buffer, index: Expr, *, near: bool = False) -> None:
    """Ask for the cache line of an element, which may lie beyond the buffer.

    It comes to level 2, or with `near` to level 1.
    """
    code = T.llvm_lookup_intrinsic_id("llvm.prefetch")
    read, level, data = (tirx.const(number, "int32") for number in (0, 3 if near else 2, 1))
    T.evaluate(T.call_llvm_intrin("void", code, T.address_of(buffer[index]), read, level, data))


# Control.


def serial(start: Expr, stop: Expr = None) -> Any:
    """`for i in range(start, stop)`, a context that gives the loop variable."""
    return T.serial(0, start) if stop is None else T.serial(start, stop)


def parallel(extent: Expr) -> Any:
    """A loop whose iterations the thread pool shares out in contiguous runs."""
    return T.parallel(0, extent)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Run the body only where `condition` holds."""
    with T.If(condition), T.Then():
        yield


@contextmanager
def own_function(name: str) -> Iterator[None]:
    """Put the body into an LLVM function of its own.

    Its registers are then allocated apart from the loops around it.  The empty statement after it
    gives LLVM a debug location in the caller again; TVM leaves it in the new function, and LLVM
    refuses such modules.
    """
    with T.attr(0, "compute_scope", name):
        yield
    nothing = T.llvm_lookup_intrinsic_id("llvm.donothing")
    T.evaluate(T.call_llvm_intrin("void", nothing))


# Vectors.


def vector(dtype: str, lanes: int) -> str:
    """The TIR name of `lanes` elements of `dtype`."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def dtype_of(value: Expr) -> str:
    """The element type of an expression, without its lanes."""
    return str(value.ty.dtype).split("x")[0]


def lanes_of(value: Expr) -> int:
    """How many lanes an expression has."""
    _, _, lanes = str(value.ty.dtype).partition("x")
    return int(lanes) if lanes else 1


def bind(value: Expr) -> Expr:
    """Name `value`, so that later uses do not compute it again."""
    return T.bind(value)


def splat(value: float | Expr, dtype: str, lanes: int) -> Expr:
    """`lanes` copies of a number or of a scalar expression of `dtype`."""
    scalar = tirx.const(value, dtype) if isinstance(value, (int, float)) else value
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def ramp(first: Expr, lanes: int) -> Expr:
    """The int32 numbers `first`, `first + 1` and so on."""
    return T.ramp(first, 1, lanes)


def load(buffer: Buffer, index: Expr, lanes: int) -> Expr:
    """`lanes` consecutive elements of a one-dimensional buffer."""
    return buffer[index] if lanes == 1 else buffer[T.ramp(index, 1, lanes)]


def store(buffer: Buffer, index: Expr, value: Expr) -> None:
    """Write the lanes of `value` to consecutive elements of a one-dimensional buffer."""
    lanes = lanes_of(value)
    T.buffer_store(buffer, value, [index if lanes == 1 else T.ramp(index, 1, lanes)])


def cast(value: Expr, dtype: str) -> Expr:
    """Convert each lane to `dtype` (a scalar name)."""
    return T.cast(value, vector(dtype, lanes_of(value)))


def reinterpret(value: Expr, dtype: str, lanes: int) -> Expr:
    """The bits of `value` read as `lanes` of `dtype`."""
    return T.reinterpret(vector(dtype, lanes), value)


def shuffle(values: Sequence[Expr], indices: Sequence[int]) -> Expr:
    """The lanes `indices` of the concatenation of `values`."""
    return tirx.Shuffle(list(values), list(indices))


def intrinsic(dtype: str, name: str, *arguments: Expr) -> Expr:
    """Call the side-effect-free LLVM intrinsic `name`; `dtype` is the result's."""
    return T.call_llvm_pure_intrin(dtype, T.llvm_lookup_intrinsic_id(name), *arguments)


# Arithmetic with a fixed meaning.


def fence(value: Expr) -> Expr:
    """`value`, rounded here: no later addition may be fused with the product it holds.

    It lowers to `llvm.arithmetic.fence`, which costs no instruction.
    """
    return intrinsic(str(value.ty.dtype), "llvm.arithmetic.fence", value)


def clamp(value: Expr, low: float | int | None, high: float | int | None) -> Expr:
    """Limit each lane to [low, high]; None leaves that side open."""
    dtype, lanes = dtype_of(value), lanes_of(value)
    if low is not None:
        value = T.max(value, splat(low, dtype, lanes))
    if high is not None:
        value = T.min(value, splat(high, dtype, lanes))
    return value


def select_lazy(conditions: Sequence[Expr], value: Expr, otherwise: Expr) -> Expr:
    """`value`, evaluated only where all conditions hold (so it may load), else `otherwise`."""
    for condition in reversed(conditions):
        value = T.if_then_else(condition, value, otherwise)
    return value


def minimum(a: Expr, b: Expr) -> Expr:
    """The smaller of two expressions, lane by lane."""
    return T.min(a, b)


def maximum(a: Expr, b: Expr) -> Expr:
    """The larger of two expressions, lane by lane."""
    return T.max(a, b)


def round_to_int32(isa: Isa, value: Expr) -> Expr:
    """Round float32 lanes to int32, ties to even; every |lane| must be below 2**31.

    One conversion where the row names one (x86 converts in the default rounding mode).
    """
    lanes = lanes_of(value)
    name = isa.intrinsic("round_i32", lanes * 32)
    if name is None:
        return cast(T.nearbyint(value), "int32")
    if ".mask." in name:  # AVX-512: pass-through, all-ones mask, current rounding mode
        everywhere = tirx.const(-1, f"int{lanes}")
        return intrinsic(
            f"int32x{lanes}",
            name,
            value,
            splat(0, "int32", lanes),
            everywhere,
            tirx.const(4, "int32"),
        )
    return intrinsic(f"int32x{lanes}", name, value)


def requantized(
    isa: Isa,
    value: Expr,
    zero_point: int,
    qmin: int,
    qmax: int,
    *,
    saturating_store: bool = False,
) -> Expr:
    """`clamp(rint(value) + zero_point, qmin, qmax)` as int32 lanes, for any float32 `value`.

    The clamp comes first and in float32, where its bounds are exact and ties cannot cross them;
    that also keeps the conversion to int32 in range.  With `saturating_store` the caller promises
    that |value| < 2**30 and that a saturating `store_narrow` to the full range [qmin, qmax]
    follows, so the clamp is left to the store.
    """
    if not saturating_store:
        value = clamp(value, float(qmin - zero_point), float(qmax - zero_point))
    rounded = round_to_int32(isa, value)
    if zero_point:
        rounded = rounded + splat(zero_point, "int32", lanes_of(rounded))
    return rounded


def load_int32(buffer: Buffer, index: Expr, lanes: int) -> Expr:
    """`lanes` consecutive 8-, 16- or 32-bit integers, widened to int32."""
    value = load(buffer, index, lanes)
    return value if buffer.dtype == "int32" else cast(value, "int32")


def store_narrow(
    isa: Isa, buffer: Buffer, index: Expr, values: Sequence[Expr], *, saturate: bool = False
) -> None:
    """Write int32 vectors one after another as the buffer's integer dtype.

    Lanes must already be within the dtype's range, unless `saturate` is set, which clamps them to
    it.  Vectors are narrowed in pairs by the pack instructions where that is the shortest way, else
    by truncation: one `vpmovdb` on AVX-512, and narrow vectors together (`xtn` and `sqxtn` on ARM).
    """
    dtype = str(buffer.dtype)
    lanes = lanes_of(values[0])
    if dtype == "int32":
        for position, value in enumerate(values):
            store(buffer, index + position * lanes, value)
        return
    position = 0
    while position < len(values):
        pair = list(values[position : position + 2])
        narrow = _packed(isa, pair, dtype)
        if narrow is None:
            pair = list(values[position : position + _together(lanes)])
            value = pair[0]
            if len(pair) > 1:
                value = shuffle([bind(v) for v in pair], range(lanes * len(pair)))
            narrow = cast(clamp(value, *_INT_RANGE[dtype]) if saturate else value, dtype)
        store(buffer, index + position * lanes, narrow)
        position += len(pair)


def _together(lanes: int) -> int:
    """How many vectors of `lanes` are truncated together: a power of two, to 16 bytes at most."""
    return max(1, 16 // lanes)


def saturated(isa: Isa, low: Expr, high: Expr, dtype: str) -> Expr:
    """Two vectors of twice the width as one of `dtype`, saturating, within 128-bit lanes."""
    lanes = 2 * lanes_of(low)
    operation = {"int16": "pack_i16", "int8": "pack_i8", "uint8": "pack_u8"}[dtype]
    wide = 32 if dtype == "int16" else 16
    name = isa.intrinsic(operation, lanes // 2 * wide)
    if name is not None:
        return intrinsic(vector(dtype, lanes), name, low, high)
    joined = shuffle([bind(low), bind(high)], range(lanes))
    return cast(clamp(joined, *_INT_RANGE[dtype]), dtype)


def _packed(isa: Isa, values: Sequence[Expr], dtype: str) -> Expr | None:
    """One or two int32 vectors as one of `dtype`, saturating; None where packs do not fit."""
    lanes = lanes_of(values[0])
    bits = lanes * 32
    if bits not in (128, 256):
        return None
    pack_i16 = isa.intrinsic("pack_i16", bits)
    pack_i8 = isa.intrinsic("pack_u8" if dtype == "uint8" else "pack_i8", 128)
    if pack_i16 is None or pack_i8 is None:
        return None
    words = intrinsic(f"int16x{2 * lanes}", pack_i16, values[0], values[-1])
    if bits == 256:  # packs work within 128-bit lanes: put the quarters back in order
        words = reinterpret(shuffle([reinterpret(words, "int64", 4)], [0, 2, 1, 3]), "int16", 16)
    words = bind(words)
    count = lanes * len(values)
    if dtype == "int16":
        return words if count == 2 * lanes else shuffle([words], range(count))
    low = shuffle([words], range(8)) if bits == 256 else words
    high = shuffle([words], range(8, 16)) if bits == 256 else words
    narrow = intrinsic("int8x16", pack_i8, low, high)
    if count < 16:
        narrow = shuffle([bind(narrow)], range(count))
    return narrow if dtype == "int8" else reinterpret(narrow, "uint8", count)
