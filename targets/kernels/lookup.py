# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of 256 entries looked up by 8-bit codes: any chain of unary functions on integers.

8-bit entries are found in registers: on AVX2 rows by `vpshufb` on differences of the table's
sixteen 16-entry pieces, on AVX-512 rows by `vpermi2w`, on ARM rows by `tbl` and `tbx` on sixteen
registers; other cases load from memory, element by element.

Source of the shuffle form: W. Mula, "SIMD-ized lookup in a 256-byte table" (idea only).
"""

from __future__ import annotations

from collections.abc import Callable
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
from qcompiler.targets.kernels.simd import (
    ITEM_BYTES,
    loop,
    settle,
    vector_spans,
    worth_threads,
)
from qcompiler.targets.kernels.tir import Buffer, Expr, PrimFuncBuilder

__all__ = ["TableWorkload", "pack_table", "permute_look_up", "table", "table_shape"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TableWorkload:
    """`y = entries[x - storage_min]`; buffers: x, packed entries (`table_shape`), y."""

    shape: Shape
    in_dtype: str
    """uint8 or int8."""
    dtype: str
    """Of the entries and the output: uint8, int8, int16 or float32."""


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
