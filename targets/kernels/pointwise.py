# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Element-wise kernels: quantize, dequantize, requantize, qadd/qsub/qmul, table, clip, float ops.

Every generator takes a workload and an `Isa` and returns a PrimFunc whose buffers are the inputs in
the order of the workload, the packed constants (`table` only: the entries), and the output, with
the shapes the workload gives.

All but `table` run on one engine, `_elementwise`: the shapes are collapsed to the fewest axes
that tell the operands apart (same shape: one axis; a per-channel vector against NHWC: two; a
squeeze-excite gate [N, 1, 1, C]: three), the innermost axis is vectorised and the outer ones are
shared out to threads when there is enough work.  Any numpy broadcast works.

Integer kernels equal their definition bit for bit: float32 products are rounded before they are
added (`simd.exact_mul`), quantize divides.

`table` looks 8-bit codes up in 256 entries.  With 8-bit entries the table is held in vector
registers: on AVX2 rows `vpshufb` on differences of its sixteen 16-entry pieces, on AVX-512 rows
`vpermi2w`; other cases load from memory, element by element.

Source of the shuffle form: W. Mula, "SIMD-ized lookup in a 256-byte table" (idea only).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.fmath import FUNCTIONS
from qcompiler.targets.kernels.simd import (
    ITEM_BYTES,
    STORAGE_RANGE,
    exact_mul,
    loop,
    quantized,
    settle,
    unravel,
    vector_spans,
    worth_threads,
)
from qcompiler.targets.kernels.tir import Buffer, Expr, PrimFuncBuilder

__all__ = [
    "ClipWorkload",
    "DequantizeWorkload",
    "FloatBinaryWorkload",
    "FloatUnaryWorkload",
    "QBinaryWorkload",
    "QuantizeWorkload",
    "RequantizeWorkload",
    "TableWorkload",
    "clip",
    "dequantize",
    "float_binary",
    "float_unary",
    "pack_table",
    "permute_look_up",
    "qbinary",
    "quantize",
    "requantize",
    "table",
    "table_shape",
]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class QuantizeWorkload:
    """`clamp(rint(x / scale) + zero_point, qmin, qmax)`; buffers: x float32, y."""

    shape: Shape
    scale: float
    zero_point: int
    dtype: str
    """Storage of the output: uint8, int8 or int16."""
    qmin: int
    qmax: int


@dataclass(frozen=True, slots=True)
class DequantizeWorkload:
    """`f32(q - zero_point) * scale`; buffers: q, y float32."""

    shape: Shape
    dtype: str
    """Storage of the input: uint8, int8, int16 or int32."""
    scale: float
    zero_point: int


@dataclass(frozen=True, slots=True)
class RequantizeWorkload:
    """`clamp(rint(f32(q - in_zero_point) * multiplier) + zero_point, qmin, qmax)`; buffers q, y."""

    shape: Shape
    in_dtype: str
    in_zero_point: int
    multiplier: float
    """s_in / s_out, computed in float64 and rounded once to float32."""
    dtype: str
    zero_point: int
    qmin: int
    qmax: int


@dataclass(frozen=True, slots=True)
class QBinaryWorkload:
    """qadd, qsub or qmul of two quantized arrays with numpy broadcasting; buffers: a, b, y.

    add, sub: `clamp(rint(f32(a - za) * Ma ± f32(b - zb) * Mb) + zero_point, qmin, qmax)`;
    mul: `clamp(rint(f32((a - za) * (b - zb)) * Ma) + zero_point, qmin, qmax)`.
    With dtype "float32" nothing is rounded to an integer or clamped.
    """

    operation: str
    """"add", "sub" or "mul"."""
    a_shape: Shape
    b_shape: Shape
    a_dtype: str
    """uint8, int8 or int16, as is `b_dtype`."""
    b_dtype: str
    a_zero_point: int
    b_zero_point: int
    a_multiplier: float
    """f32(s_a / s_y); for mul f32(s_a * s_b / s_y).  Without s_y for a float32 output."""
    b_multiplier: float
    """f32(s_b / s_y); not used by mul."""
    dtype: str
    zero_point: int = 0
    qmin: int = 0
    qmax: int = 0


@dataclass(frozen=True, slots=True)
class ClipWorkload:
    """Limit to [low, high] in the storage dtype (8- or 16-bit, or float32); buffers: x, y."""

    shape: Shape
    dtype: str
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class FloatBinaryWorkload:
    """A float32 operation with broadcasting and an optional clip; buffers: a, b, y.

    Operations: add, sub, mul, div, max, min.
    """

    operation: str
    a_shape: Shape
    b_shape: Shape
    low: float | None = None
    """Lower clip bound of the result (0 is relu); None leaves it open."""
    high: float | None = None


@dataclass(frozen=True, slots=True)
class FloatUnaryWorkload:
    """A float32 function of `fmath.FUNCTIONS`; buffers: x, y."""

    function: str
    shape: Shape
    alpha: float = 0.0
    beta: float = 0.0


@dataclass(frozen=True, slots=True)
class TableWorkload:
    """`y = entries[x - storage_min]`; buffers: x, packed entries (`table_shape`), y."""

    shape: Shape
    in_dtype: str
    """uint8 or int8."""
    dtype: str
    """Of the entries and the output: uint8, int8, int16 or float32."""


# The engine.


def broadcast_shape(a: Shape, b: Shape) -> Shape:
    """The shape of numpy's broadcast of `a` and `b`."""
    return tuple(int(d) for d in np.broadcast_shapes(a, b))


def collapse(out: Shape, shapes: Sequence[Shape]) -> tuple[list[int], list[list[int]]]:
    """The fewest axes that describe the broadcast of `shapes` to `out`.

    Returns the extents of those axes and, for each operand, its stride in elements along each of
    them (0 where it is repeated).
    """
    aligned = [(1,) * (len(out) - len(shape)) + tuple(shape) for shape in shapes]
    extents: list[int] = []
    strides: list[list[int]] = [[] for _ in shapes]
    for axis, extent in enumerate(out):
        if extent == 1:
            continue
        here = [0 if shape[axis] == 1 else prod(shape[axis + 1 :]) for shape in aligned]
        if extents and all(s[-1] == h * extent for s, h in zip(strides, here, strict=True)):
            extents[-1] *= extent
            for operand, stride in zip(strides, here, strict=True):
                operand[-1] = stride
        else:
            extents.append(extent)
            for operand, stride in zip(strides, here, strict=True):
                operand.append(stride)
    if not extents:
        extents = [1]
        strides = [[0] for _ in shapes]
    return extents, strides


def _elementwise(
    name: str,
    isa: Isa,
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    dtype: str,
    body: Callable[..., Expr],
    *,
    cycles: float,
) -> Any:
    """Generate `y = body(*operands)`, where `body` maps vectors to a vector of `dtype`.

    `cycles` estimates the work for each vector of `isa.vector_bits / 8` elements.
    """
    out: Shape = shapes[0]
    for shape in shapes[1:]:
        out = broadcast_shape(out, shape)
    extents, strides = collapse(out, shapes)
    lanes = isa.vector_bits // 8
    threads = worth_threads(cycles * prod(extents) / lanes)
    with PrimFuncBuilder(name) as builder:
        arguments = [
            builder.argument(f"x{i}", shape, operand)
            for i, (shape, operand) in enumerate(zip(shapes, dtypes, strict=True))
        ]
        output = builder.argument("y", out, dtype)
        inputs = [tir.flat(argument) for argument in arguments]
        y = tir.flat(output)

        def row(bases: Sequence[Expr], start: Expr, threads: bool) -> None:
            inner = [stride[-1] for stride in strides]
            for offset, count, width in vector_spans(extents[-1], lanes, overlap=True):
                with loop(count, threads=threads and count > 1) as j:
                    at = j * width + offset
                    values = [
                        tir.bind(
                            tir.load(x, base + at, width)
                            if step
                            else tir.splat(x[base], operand, width)
                        )
                        for x, base, step, operand in zip(inputs, bases, inner, dtypes, strict=True)
                    ]
                    tir.store(y, start + at, body(*values))

        outer = extents[:-1]
        if not outer:
            zero = tir.splat(0, "int32", 1)
            row([zero] * len(inputs), zero, threads)
        else:
            # The thread loop takes as many axes as it needs to have work for many threads.
            split = 1
            while split < len(outer) and prod(outer[:split]) < 32:
                split += 1
            with loop(prod(outer[:split]), threads=threads) as shared:
                indices = unravel(shared, outer[:split])
                _nest(outer[split:], indices, strides, extents, row)
    return builder.finish()


def _nest(
    outer: Sequence[int],
    indices: list[Expr],
    strides: list[list[int]],
    extents: list[int],
    row: Callable[[Sequence[Expr], Expr, bool], None],
) -> None:
    """Serial loops over `outer`, then one row at the offsets the indices give."""
    if outer:
        with loop(outer[0]) as index:
            _nest(outer[1:], [*indices, index], strides, extents, row)
        return
    zero = tir.splat(0, "int32", 1)
    bases = []
    for stride in strides:
        base = zero
        for index, step in zip(indices, stride, strict=False):
            if step:
                base = base + index * step
        bases.append(tir.bind(base))
    start = zero
    for axis, index in enumerate(indices):
        start = start + index * prod(extents[axis + 1 :])
    row(bases, tir.bind(start), False)


def _centered(value: Expr, zero_point: int) -> Expr:
    """`f32(value - zero_point)` for 8- and 16-bit lanes: the difference is exact in int32."""
    wide = tir.cast(value, "int32")
    if zero_point:
        wide = wide - tir.splat(zero_point, "int32", tir.lanes_of(value))
    return tir.cast(wide, "float32")


def _reach(dtype: str) -> float:
    """A bound on |value - zero point|, with room for the rounding of what it is multiplied by."""
    return 2.0 ** (ITEM_BYTES[dtype] * 8 + 1)


def _f32(value: float) -> float:
    """`value` rounded to float32."""
    return float(np.float32(value))


# The kernels.


def quantize(workload: QuantizeWorkload, isa: Isa) -> Any:
    """Generate `quantize`."""
    w = workload

    def body(x: Expr) -> Expr:
        real = x / tir.splat(_f32(w.scale), "float32", tir.lanes_of(x))
        return quantized(real, w.zero_point, w.qmin, w.qmax, w.dtype, isa)

    return _elementwise("quantize", isa, [w.shape], ["float32"], w.dtype, body, cycles=40)


def dequantize(workload: DequantizeWorkload, isa: Isa) -> Any:
    """Generate `dequantize`."""
    w = workload

    def body(q: Expr) -> Expr:
        return _centered(q, w.zero_point) * tir.splat(_f32(w.scale), "float32", tir.lanes_of(q))

    return _elementwise("dequantize", isa, [w.shape], [w.dtype], "float32", body, cycles=16)


def requantize(workload: RequantizeWorkload, isa: Isa) -> Any:
    """Generate `requantize`."""
    w = workload
    bound = _reach(w.in_dtype) * abs(w.multiplier)

    def body(q: Expr) -> Expr:
        factor = tir.splat(_f32(w.multiplier), "float32", tir.lanes_of(q))
        real = exact_mul(_centered(q, w.in_zero_point), factor)
        return quantized(real, w.zero_point, w.qmin, w.qmax, w.dtype, isa, bound)

    return _elementwise("requantize", isa, [w.shape], [w.in_dtype], w.dtype, body, cycles=16)


def qbinary(workload: QBinaryWorkload, isa: Isa) -> Any:
    """Generate `qadd`, `qsub` or `qmul`.

    Raises:
        CodegenError: the operation is not one of the three.
    """
    w = workload
    if w.operation not in ("add", "sub", "mul"):
        raise CodegenError(f"qbinary: expected operation add, sub or mul, got {w.operation!r}")
    a_reach, b_reach = _reach(w.a_dtype), _reach(w.b_dtype)
    if w.operation == "mul":
        bound = a_reach * b_reach * abs(w.a_multiplier)
    else:
        bound = a_reach * abs(w.a_multiplier) + b_reach * abs(w.b_multiplier)
    # Products of centred 8-bit values are below 2**24, hence exact in float32.
    narrow = "int16" not in (w.a_dtype, w.b_dtype)

    def real(a: Expr, b: Expr) -> Expr:
        lanes = tir.lanes_of(a)
        a_factor = tir.splat(_f32(w.a_multiplier), "float32", lanes)
        b_factor = tir.splat(_f32(w.b_multiplier), "float32", lanes)
        if w.operation == "mul" and narrow:
            product = exact_mul(_centered(a, w.a_zero_point), _centered(b, w.b_zero_point))
            return exact_mul(product, a_factor)
        if w.operation == "mul":
            wide_a = tir.cast(a, "int32") - tir.splat(w.a_zero_point, "int32", lanes)
            wide_b = tir.cast(b, "int32") - tir.splat(w.b_zero_point, "int32", lanes)
            return exact_mul(tir.cast(wide_a * wide_b, "float32"), a_factor)
        left = exact_mul(_centered(a, w.a_zero_point), a_factor)
        right = exact_mul(_centered(b, w.b_zero_point), b_factor)
        return left + right if w.operation == "add" else left - right

    def body(a: Expr, b: Expr) -> Expr:
        if w.dtype == "float32":
            return real(a, b)
        return quantized(real(a, b), w.zero_point, w.qmin, w.qmax, w.dtype, isa, bound)

    return _elementwise(
        f"q{w.operation}",
        isa,
        [w.a_shape, w.b_shape],
        [w.a_dtype, w.b_dtype],
        w.dtype,
        body,
        cycles=24,
    )


def clip(workload: ClipWorkload, isa: Isa) -> Any:
    """Generate `clip`."""
    w = workload
    integer = w.dtype in STORAGE_RANGE

    def bound(value: float | None) -> float | None:
        if value is None or not integer:
            return value
        low, high = STORAGE_RANGE[w.dtype]
        return int(min(max(value, low), high))

    def body(x: Expr) -> Expr:
        return tir.clamp(x, bound(w.low), bound(w.high))

    return _elementwise("clip", isa, [w.shape], [w.dtype], w.dtype, body, cycles=3)


def float_binary(workload: FloatBinaryWorkload, isa: Isa) -> Any:
    """Generate a float32 operation of two arrays.

    Raises:
        CodegenError: the operation is not known.
    """
    w = workload
    table: dict[str, Callable[[Expr, Expr], Expr]] = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "max": T.max,
        "min": T.min,
    }
    if w.operation not in table:
        raise CodegenError(f"float_binary: expected one of {', '.join(table)}, got {w.operation!r}")

    def body(a: Expr, b: Expr) -> Expr:
        return tir.clamp(table[w.operation](a, b), w.low, w.high)

    return _elementwise(
        f"float_{w.operation}",
        isa,
        [w.a_shape, w.b_shape],
        ["float32", "float32"],
        "float32",
        body,
        cycles=20,
    )


def float_unary(workload: FloatUnaryWorkload, isa: Isa) -> Any:
    """Generate a float32 function of one array.

    Raises:
        CodegenError: the function is not in `fmath.FUNCTIONS`.
    """
    w = workload
    if w.function not in FUNCTIONS:
        raise CodegenError(
            f"float_unary: expected one of {', '.join(FUNCTIONS)}, got {w.function!r}"
        )

    def body(x: Expr) -> Expr:
        return FUNCTIONS[w.function](x, w.alpha, w.beta)

    return _elementwise(w.function, isa, [w.shape], ["float32"], "float32", body, cycles=60)


# Table look-up.

_BYTE_SHUFFLE = {256: "llvm.x86.avx2.pshuf.b", 512: "llvm.x86.avx512.pshuf.b.512"}
_WORD_PERMUTE = "llvm.x86.avx512.vpermi2var.hi.512"


def _table_form(workload: TableWorkload, isa: Isa) -> str:
    """How the look-up is done: "permute", "shuffle", "registers" or "memory"."""
    if ITEM_BYTES[workload.dtype] != 1 or prod(workload.shape) < isa.vector_bits // 8:
        return "memory"
    if isa.mtriple.startswith("x86_64"):
        if isa.vector_bits == 512:
            return "permute"
        if isa.vector_bits == 256:
            return "shuffle"
    if isa.intrinsic("table_4", 128) is not None:
        return "registers"
    return "memory"


def table_shape(workload: TableWorkload, isa: Isa) -> tuple[Shape, str]:
    """Shape and dtype of the packed entries."""
    form = _table_form(workload, isa)
    if form == "shuffle":
        return (16, 16), "uint8"
    if form == "permute":
        return (128,), "int16"
    return (256,), "uint8" if form == "registers" else workload.dtype


def pack_table(entries: npt.NDArray[Any], workload: TableWorkload, isa: Isa) -> npt.NDArray[Any]:
    """Put 256 `entries` (entry 0 belongs to the storage minimum) in the order `table` reads.

    The kernel indexes by the bits of the code, so entries of a signed input are rotated by 128.
    The shuffle form holds the exclusive-ors of neighbouring 16-entry pieces, the permute form words
    of entry k and entry k + 128.

    Raises:
        CodegenError: not 256 entries.
    """
    if entries.shape != (256,):
        raise CodegenError(f"pack_table: expected 256 entries, got shape {entries.shape}")
    values = np.ascontiguousarray(entries, dtype=workload.dtype)
    if workload.in_dtype == "int8":
        values = np.roll(values, 128)
    form = _table_form(workload, isa)
    if form == "memory":
        return values
    codes = values.view(np.uint8)
    if form == "permute":
        words = codes[:128].astype(np.uint16) | (codes[128:].astype(np.uint16) << 8)
        return words.view(np.int16)
    if form == "registers":
        return codes
    pieces = codes.reshape(2, 8, 16).copy()
    pieces[:, 1:] ^= codes.reshape(2, 8, 16)[:, :-1]
    packed: npt.NDArray[Any] = pieces.reshape(16, 16)
    return packed


def table(workload: TableWorkload, isa: Isa) -> Any:
    """Generate `table`."""
    w = workload
    form = _table_form(w, isa)
    size = prod(w.shape)
    shape, entry_dtype = table_shape(w, isa)
    with PrimFuncBuilder("table") as builder:
        argument = builder.argument("x", w.shape, w.in_dtype)
        entries = builder.argument("entries", shape, entry_dtype)
        output = builder.argument("y", w.shape, w.dtype)
        x = tir.alias(argument, (size,), "uint8")
        if form == "memory":
            _look_up_in_memory(x, entries, tir.flat(output), size)
        else:
            y = tir.alias(output, (size,), "uint8")
            _look_up_in_registers(form, isa, x, tir.flat(entries), y, size)
    return builder.finish()


def _look_up_in_memory(x: Buffer, entries: Buffer, y: Buffer, size: int) -> None:
    block = 1024
    threads = worth_threads(1.5 * size)
    spans = ((0, size // block, block), (size // block * block, 1, size % block))
    for offset, count, width in spans:
        if count and width:
            several = threads and count > 1
            with loop(count, threads=several) as outer, loop(width) as inner:
                at = outer * width + inner + offset
                tir.store(y, at, entries[tir.cast(x[at], "int32")])


def _look_up_in_registers(
    form: str, isa: Isa, x: Buffer, pieces: Buffer, y: Buffer, size: int
) -> None:
    lanes = isa.vector_bits // 8
    forms: dict[str, Callable[[Buffer, list[Expr]], list[Expr]]] = {
        "permute": permute_look_up,
        "shuffle": _shuffle_look_up,
        "registers": partial(_table_look_up, isa),
    }
    look_up = forms[form]
    threads = worth_threads(size * {"permute": 0.15, "shuffle": 0.8, "registers": 0.5}[form])
    # Several vectors in one iteration share what the registers do not hold of the table.
    vectors = 2 if form == "shuffle" else 4
    blocks = size // (vectors * lanes)
    done = 0
    if blocks > 1:
        done = blocks * vectors * lanes
        with loop(blocks, threads=threads) as index:
            base = index * (vectors * lanes)
            codes = [tir.bind(tir.load(x, base + v * lanes, lanes)) for v in range(vectors)]
            for v, value in enumerate(look_up(pieces, codes)):
                tir.store(y, base + v * lanes, value)
    for offset, count, _ in vector_spans(size - done, lanes, overlap=True):
        for repeat in range(count):
            at = min(done + offset + repeat * lanes, size - lanes)
            tir.store(y, at, look_up(pieces, [tir.bind(tir.load(x, at, lanes))])[0])


def _table_look_up(isa: Isa, pieces: Buffer, codes: list[Expr]) -> list[Expr]:
    """Look 8-bit codes up in sixteen registers, four at a time.

    An index beyond the four registers leaves what was found before; 64 less makes the next four
    the first, and wraps those that were found.
    """
    first, more = (str(isa.intrinsic(name, 128)) for name in ("table_4", "table_4_else"))
    parts = [tir.bind(tir.load(pieces, k * 16, 16)) for k in range(16)]
    step = tir.splat(64, "uint8", 16)
    results = []
    for code in codes:
        found = tir.bind(tir.intrinsic("uint8x16", first, *parts[:4], code))
        for k in range(4, 16, 4):
            code = tir.bind(code - step)
            found = tir.bind(tir.intrinsic("uint8x16", more, found, *parts[k : k + 4], code))
        results.append(found)
    return results


def _shuffle_look_up(pieces: Buffer, codes: list[Expr]) -> list[Expr]:
    """Look 8-bit codes up with the byte shuffle.

    The shuffle gives 0 where bit 7 of the index is set and looks at four bits else.  Subtract 16
    at each step: a code in piece k is non-negative for steps 0..k, and the exclusive-or of what
    these steps give is piece k, because the pieces hold differences.
    """
    lanes = tir.lanes_of(codes[0])
    half = lanes // 16
    name = _BYTE_SHUFFLE[lanes * 8]
    dtype = tir.vector("int8", lanes)
    results: list[Expr | None] = [None] * len(codes)
    minus = tir.splat(16, "int8", lanes)
    indices: list[Expr] = []
    for upper in range(2):
        if upper:
            flip = tir.splat(-128, "int8", lanes)
            indices = [
                tir.bind(T.bitwise_xor(tir.reinterpret(code, "int8", lanes), flip))
                for code in codes
            ]
        else:
            indices = [tir.bind(tir.reinterpret(code, "int8", lanes)) for code in codes]
        for step in range(8):
            piece = tir.load(pieces, (upper * 8 + step) * 16, 16)
            piece = tir.reinterpret(piece, "int8", 16)
            piece = tir.bind(tir.shuffle([piece] * half, range(16 * half)))
            for v, index in enumerate(indices):
                if step:
                    # Saturating, so that negative indices stay negative.
                    index = indices[v] = tir.bind(
                        tir.intrinsic(dtype, "llvm.ssub.sat", index, minus)
                    )
                found = tir.intrinsic(dtype, name, piece, index)
                before = results[v]
                results[v] = tir.bind(found if before is None else T.bitwise_xor(before, found))
    return [tir.reinterpret(result, "uint8", lanes) for result in results]


def permute_look_up(pieces: Buffer, codes: list[Expr], start: int = 0) -> list[Expr]:
    """Look 8-bit codes up with the two-register word permute of AVX-512.

    `pieces` holds, from `start` on, the 128 words that `pack_table` makes for this form.

    A permute looks at six bits of a word: bit 6 chooses between two of them, bit 7 between the
    bytes of the word found.  Odd bytes are shifted down first.
    """
    quarters = [tir.bind(tir.load(pieces, start + k * 32, 32)) for k in range(4)]

    def constant(value: int) -> Expr:
        return tir.splat(value, "int16", 32)

    def bit(word: Expr, mask: int) -> Expr:
        return T.bitwise_and(word, constant(mask)) != constant(0)

    def permute(low: Expr, high: Expr, index: Expr) -> Expr:
        return tir.intrinsic("int16x32", _WORD_PERMUTE, low, index, high)

    def found(word: Expr) -> Expr:
        low = permute(quarters[0], quarters[1], word)
        high = permute(quarters[2], quarters[3], word)
        return settle(T.Select(bit(word, 0x40), high, low))

    results = []
    for code in codes:
        even = settle(tir.reinterpret(code, "int16", 32))
        odd = settle(
            tir.reinterpret(
                T.shift_right(tir.reinterpret(code, "uint16", 32), tir.splat(8, "uint16", 32)),
                "int16",
                32,
            )
        )
        low, high = found(even), found(odd)
        low_shifted = tir.reinterpret(
            T.shift_right(tir.reinterpret(low, "uint16", 32), tir.splat(8, "uint16", 32)),
            "int16",
            32,
        )
        low = tir.bind(T.Select(bit(even, 0x80), low_shifted, low))
        high = tir.bind(T.Select(bit(odd, 0x80), high, T.shift_left(high, constant(8))))
        low_bytes = tir.reinterpret(low, "uint8", 64)
        high_bytes = tir.reinterpret(high, "uint8", 64)
        merged = [lane if lane % 2 == 0 else 64 + lane for lane in range(64)]
        results.append(tir.shuffle([tir.bind(low_bytes), tir.bind(high_bytes)], merged))
    return results
