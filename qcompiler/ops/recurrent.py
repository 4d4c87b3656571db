# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Recurrent cells over a whole sequence: lstm, gru, rnn, and qlstm, qgru, qrnn in integers.

The inputs' part of what the gates read is an operand, computed by one matrix product for all steps;
the operator itself is the loop over time. See `_recurrence` for what it computes.

| operand | shape | |
|---|---|---|
| gates | [T, B, G * H] | G gates per unit: i, o, f, g of an LSTM; z, r, n of a GRU |
| r | [H, G * H] | recurrent weights, gate after gate; int8 with one scale per column |
| h0, c0 | [B, H] | initial states, in reals |
| lens | [B] | steps of each sequence (int32); without it all T |
| peephole | [3, H] | i, o, f (LSTM) |
| bias | [H] | inside the reset (GRU) |

Results: y [T, B, H], the last state h_n [B, H], and c_n [B, H] of an LSTM. In integers y is held
in 8 bits; `carry` is the step of the int16 grid that the state of an LSTM or GRU is carried on
(None: float32).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.ops import _infer as c
from qcompiler.ops._base import (
    INTEGER_ONLY,
    REQUIRED,
    Attrs,
    EvalContext,
    OpDef,
    OpKind,
    register,
)
from qcompiler.ops._recurrence import FUNCTIONS, GATES, Floats, Integers, cell_of, run_sequence
from qcompiler.ops._recurrence import settles as table_serves
from qcompiler.ops.cast import operand_qparams
from qcompiler.types import Array, DType, TensorType

Arrays = Sequence["Array | None"]

_FUNCTIONS = {"lstm": 3, "gru": 2, "rnn": 1}
_OPERANDS = {
    "lstm": ("gates", "r", "h0", "c0", "lens?", "peephole?"),
    "gru": ("gates", "r", "h0", "lens?", "bias?"),
    "rnn": ("gates", "r", "h0", "lens?"),
}
_ATTRS: dict[str, dict[str, Any]] = {
    "lstm": {"input_forget": False, "carry": None},
    "gru": {"linear_before_reset": False, "carry": None},
    "rnn": {},
}


def _attrs(kind: str) -> dict[str, Any]:
    return {
        "activations": REQUIRED,
        "alphas": REQUIRED,
        "betas": REQUIRED,
        "clip": None,
        "reverse": False,
        **_ATTRS[kind],
    }


def operand_index(kind: str, name: str) -> int:
    """Return the position of an operand; -1 where the cell has no such one."""
    plain = [n.rstrip("?") for n in _OPERANDS[kind]]
    return plain.index(name) if name in plain else -1


def _check_attrs(op: str, kind: str, attrs: Attrs) -> None:
    names = str(attrs["activations"]).split(",")
    unknown = [n for n in names if n not in FUNCTIONS]
    if unknown or len(names) != _FUNCTIONS[kind]:
        raise c.fail(
            op,
            f"activations are {attrs['activations']!r}, expected {_FUNCTIONS[kind]} of "
            f"{', '.join(sorted(FUNCTIONS))}",
        )
    for name in ("alphas", "betas"):
        value: Any = attrs[name]
        if len(value) != len(names):
            raise c.fail(op, f"{name} has {len(value)} numbers for {len(names)} activations")


def _shapes(op: str, kind: str, types: c.Types, attrs: Attrs) -> tuple[int, int, int]:
    """Check all operands' shapes; return the extents T, B, H."""
    _check_attrs(op, kind, attrs)
    gates = c.floating(op, c.given(op, types, 0, "gates"), "gates")
    r = c.given(op, types, 1, "r")
    if gates.rank != 3 or r.rank != 2 or r.shape[1] != GATES[kind] * r.shape[0]:
        raise c.fail(
            op, f"'gates' is {gates} and 'r' is {r}, expected [T, B, {GATES[kind]} * H] and "
            f"[H, {GATES[kind]} * H]"
        )  # fmt: skip
    steps, batch, columns = gates.shape
    hidden = r.shape[0]
    if columns != r.shape[1]:
        raise c.fail(op, f"'gates' has {columns} columns, 'r' has {r.shape[1]}")
    wanted = {"h0": (batch, hidden), "c0": (batch, hidden), "peephole": (3, hidden),
              "bias": (hidden,)}  # fmt: skip
    for i, name in enumerate(_OPERANDS[kind]):
        t = c.optional(types, i)
        plain = name.rstrip("?")
        if plain == "lens":
            if t is not None:
                if t.dtype is not DType.INT32:
                    raise c.fail(op, f"operand 'lens' is {t}, expected int32")
                c.has_shape(op, t, (batch,), "lens")
        elif plain in wanted and (t is not None or not name.endswith("?")):
            t = c.floating(op, c.given(op, types, i, plain), plain)
            c.same_dtype(op, gates, t, plain)
            c.has_shape(op, t, wanted[plain], plain)
    return steps, batch, hidden


def _results(kind: str, dtype: DType, extents: tuple[int, int, int]) -> tuple[TensorType, ...]:
    last = TensorType(extents[1:], dtype)
    y = TensorType(extents, dtype)
    return (y, last, last) if kind == "lstm" else (y, last)


def _at(kind: str, arrays: Arrays, name: str) -> Array | None:
    i = operand_index(kind, name)
    return arrays[i] if 0 <= i < len(arrays) else None


def _extra(kind: str, arrays: Arrays) -> Array | None:
    return _at(kind, arrays, "peephole" if kind == "lstm" else "bias")


def _register_float(kind: str) -> None:
    def infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
        extents = _shapes(kind, kind, types, attrs)
        gates = c.given(kind, types, 0, "gates")
        r = c.floating(kind, c.given(kind, types, 1, "r"), "r")
        c.same_dtype(kind, gates, r, "r")
        return _results(kind, gates.dtype, extents)

    def evaluate(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
        del ctx
        gates, r, h0 = (np.asarray(a) for a in arrays[:3])
        cell = cell_of(kind, attrs)
        found = run_sequence(
            cell, Floats(cell, r), gates, h0, _at(kind, arrays, "c0"), _at(kind, arrays, "lens"),
            _extra(kind, arrays),
        )  # fmt: skip
        return tuple(np.asarray(a, gates.dtype) for a in found if a is not None)

    register(
        OpDef(
            kind, _OPERANDS[kind], infer, evaluate, _attrs(kind), kind=OpKind.RECURRENT,
            outputs=3 if kind == "lstm" else 2,
        )
    )  # fmt: skip


def _register_integer(kind: str) -> None:
    name = f"q{kind}"

    def infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
        extents = _shapes(name, kind, types, attrs)
        r = c.given(name, types, 1, "r")
        c.quantized_weight(name, r, "r", 1)
        if r.dtype not in (DType.INT8, DType.INT4):
            raise c.fail(name, f"operand 'r' is {r}, expected int8")
        cell = cell_of(kind, attrs)
        for function in cell.functions:
            if not table_serves(function):
                raise c.fail(name, f"no table of [-8, 8) stands for {function[0]}")
        return _results(kind, DType.FLOAT32, extents)

    def evaluate(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
        gates, r, h0 = (np.asarray(a) for a in arrays[:3])
        cell = cell_of(kind, attrs)
        hidden = ctx.outputs[0].qparams
        if hidden is None or not hidden.is_per_tensor or hidden.storage.bits > 8:
            raise c.fail(name, f"result 'y' is {ctx.outputs[0]}, expected 8 bits and one scale")
        arithmetic = Integers(cell, r, operand_qparams(name, ctx, 1), hidden)
        found = run_sequence(
            cell, arithmetic, gates, h0, _at(kind, arrays, "c0"), _at(kind, arrays, "lens"),
            _extra(kind, arrays),
        )  # fmt: skip
        return tuple(a for a in found if a is not None)

    register(
        OpDef(
            name, _OPERANDS[kind], infer, evaluate, _attrs(kind),
            stages=INTEGER_ONLY, kind=OpKind.RECURRENT, declared=True,
            outputs=3 if kind == "lstm" else 2,
        )
    )  # fmt: skip


for _kind in GATES:
    _register_float(_kind)
    _register_integer(_kind)
