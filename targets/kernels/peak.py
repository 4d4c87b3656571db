# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The measured peak of an instruction set: multiply-accumulates per second of one core.

A loop of nothing but the row's multiply instruction, in as many chains as it takes to keep every
port busy, each product depending on the one before in its chain so that none can be left out. That
is what the multiply ports can do at the clock that they have under this load, without a load, a
store or an addition beside them. A share of it is a share of the machine and not of a model of it.
Sums that take fewer products than the direct ones (Winograd) may come above it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import TargetError
from qcompiler.targets.isa import Isa, runnable, tvm_target
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.tir import Expr

__all__ = ["Peak", "measured_peak"]

Kind = Literal["int8", "float32"]

_CHAINS = 12
"""Independent products in flight: latencies of 4 or 5 cycles times two ports."""
_TILE_CHAINS = 6
"""Tiles that are added to; the other two are operands."""
_TILE_MACS = 16 * 16 * 64
_STEPS = 20_000
_REPEATS = 15
_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Peak:
    """What the multiply ports of one core can do.

    Attributes:
        instruction: What was measured.
        gmacs: Multiply-accumulates per second, in thousands of millions.
    """

    instruction: str
    gmacs: float


@dataclass(frozen=True, slots=True)
class _Multiply:
    """One step of a chain: `step(sums, operand)`, both vectors of `dtype`, gives the next sums."""

    instruction: str
    macs: int
    dtype: str
    step: Callable[[Expr, Expr], Expr]


def measured_peak(isa: Isa, kind: Kind = "int8") -> Peak:
    """Measure the peak of one core of this machine; it takes a small build and about 0.1 s.

    8-bit operands are multiplied by `tdpbusd` on tiles, else by `vpdpbusd`, `vpmaddubsw` (pairs
    added in int16) or `pmaddwd` (int16 operands), the first of them that the row has.

    Raises:
        TargetError: This machine cannot run the row, or the row is not of x86.
    """
    if isa.architecture != "x86_64" or not runnable(isa):
        raise TargetError(
            f"the peak of {isa.name} cannot be measured on this machine",
            hint="`qcompile targets` lists what this machine runs",
        )
    if kind == "int8" and isa.tiles == "tdpbusd":
        instruction, macs, function = "tdpbusd", _TILE_CHAINS * _TILE_MACS, _tiles()
    else:
        multiply = _multiply(isa, kind)
        instruction, macs = multiply.instruction, _CHAINS * multiply.macs
        function = _vectors(multiply, isa.lanes())
    library = tvm.compile(tvm.IRModule({"main": function}), target=tvm_target(isa))
    source = np.zeros(_BYTES, np.uint8)
    if instruction == "tdpbusd":
        source[0] = 1  # palette; then bytes per row and rows of each tile
        source[16:32].view(np.uint16)[:] = 64
        source[48:56] = 16
    arguments = [tvm.runtime.tensor(a) for a in (source, np.zeros(_BYTES, np.uint8))]
    timer = library.mod.time_evaluator("main", tvm.cpu(), number=3, repeat=_REPEATS)
    seconds = min(timer(*arguments).results)
    return Peak(instruction, macs * _STEPS / seconds / 1e9)


def _multiply(isa: Isa, kind: Kind) -> _Multiply:
    """Return the instruction of a row; every x86 row has one."""
    bits, lanes = isa.vector_bits, isa.lanes()
    if kind == "float32":
        name = f"float32x{lanes}"
        if isa.fma:
            return _Multiply(
                "fma", lanes, "float32", lambda s, b: tir.intrinsic(name, "llvm.fma", b, b, s)
            )
        return _Multiply("mulps", lanes, "float32", lambda s, b: tir.fence(s * b))

    def call(operation: str, out: str, a: Expr, b: Expr) -> Expr:
        name = isa.intrinsics[operation, bits]
        return tir.reinterpret(tir.intrinsic(out, name, a, b), "int32", lanes)

    if isa.dot == "vpdpbusd":
        dot = isa.intrinsics["dot_u8s8", bits]
        return _Multiply(
            "vpdpbusd",
            4 * lanes,
            "int32",
            lambda s, b: tir.intrinsic(
                f"int32x{lanes}",
                dot,
                s,
                tir.reinterpret(b, "uint8", 4 * lanes),
                tir.reinterpret(b, "int8", 4 * lanes),
            ),
        )
    if isa.dot == "maddubs":
        return _Multiply(
            "vpmaddubsw",
            4 * lanes,
            "int32",
            lambda s, b: call(
                "madd_u8s8",
                f"int16x{2 * lanes}",
                tir.reinterpret(s, "uint8", 4 * lanes),
                tir.reinterpret(b, "int8", 4 * lanes),
            ),
        )
    return _Multiply(
        "pmaddwd",
        2 * lanes,
        "int32",
        lambda s, b: call(
            "madd_i16",
            f"int32x{lanes}",
            tir.reinterpret(s, "int16", 2 * lanes),
            tir.reinterpret(b, "int16", 2 * lanes),
        ),
    )


def _vectors(multiply: _Multiply, lanes: int) -> Any:
    """The loop over chains in vector registers; reads `source` and writes `target`."""
    with tir.PrimFuncBuilder("main") as function:
        source = function.argument("source", (_BYTES,), "uint8")
        target = function.argument("target", (_BYTES,), "uint8")
        read, write = (tir.alias(b, (_BYTES // 4,), multiply.dtype) for b in (source, target))
        with tir.own_function("main_loop"):
            sums = tir.registers(_CHAINS * lanes, multiply.dtype)
            operand = tir.bind(tir.load(read, 0, lanes))
            for chain in range(_CHAINS):
                tir.store(sums, chain * lanes, tir.load(read, (chain + 1) * lanes, lanes))
            with tir.serial(_STEPS):
                for chain in range(_CHAINS):
                    before = tir.load(sums, chain * lanes, lanes)
                    tir.store(sums, chain * lanes, multiply.step(before, operand))
            for chain in range(_CHAINS):
                tir.store(write, chain * lanes, tir.load(sums, chain * lanes, lanes))
    return function.finish()


def _tiles() -> Any:
    """The loop over tile registers; `source` starts with their configuration."""

    def tile_op(name: str, *operands: Expr) -> None:
        code = T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
        T.evaluate(T.call_llvm_intrin("void", code, *operands))

    def register(number: int) -> Expr:
        return tirx.const(number, "int8")

    with tir.PrimFuncBuilder("main") as function:
        source = function.argument("source", (_BYTES,), "uint8")
        target = function.argument("target", (_BYTES,), "uint8")
        tile_op("ldtilecfg", T.address_of(source[0]))
        for tile in range(_TILE_CHAINS + 2):
            tile_op("tilezero", register(tile))
        a, b = register(_TILE_CHAINS), register(_TILE_CHAINS + 1)
        with tir.serial(_STEPS):
            for chain in range(_TILE_CHAINS):
                tile_op("tdpbusd", register(chain), a, b)
        for chain in range(_TILE_CHAINS):
            where = T.address_of(target[chain * 512])
            tile_op("tilestored64", register(chain), where, tirx.const(64, "int64"))
    return function.finish()
