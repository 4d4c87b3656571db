# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Converters of LSTM, GRU and RNN.

The inputs' part of the gates becomes one matrix product over all steps, `gates = X W + (Wb + Rb)`;
the loop over time is the operator `lstm`, `gru` or `rnn`, one for each direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from qcompiler.errors import ShapeError, UnsupportedOpError
from qcompiler.ir import Value
from qcompiler.onnx_import_context import OpContext, converter, reshape
from qcompiler.ops._recurrence import FUNCTIONS, GATES
from qcompiler.types import DType

Results = Sequence[Value] | None

ONNX_NAMES = {
    "affine": "Affine",
    "elu": "Elu",
    "hard_sigmoid": "HardSigmoid",
    "leaky_relu": "LeakyRelu",
    "relu": "Relu",
    "scaled_tanh": "ScaledTanh",
    "sigmoid": "Sigmoid",
    "softplus": "Softplus",
    "softsign": "Softsign",
    "tanh": "Tanh",
    "thresholded_relu": "ThresholdedRelu",
}
_NAMES = {name.lower(): own for own, name in ONNX_NAMES.items()}
ALPHA = {
    "affine": 1.0, "elu": 1.0, "hard_sigmoid": 0.2, "leaky_relu": 0.01, "scaled_tanh": 1.0,
    "thresholded_relu": 1.0,
}  # fmt: skip
"""Functions that take an alpha, and its default."""
BETA = {"affine": 0.0, "hard_sigmoid": 0.5, "scaled_tanh": 1.0}
_DEFAULTS = {
    "lstm": ("Sigmoid", "Tanh", "Tanh"),
    "gru": ("Sigmoid", "Tanh"),
    "rnn": ("Tanh",),
}
_DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


def _functions(ctx: OpContext, kind: str, directions: int) -> list[dict[str, Any]]:
    """Return the attributes of the activation functions of each direction."""
    default = _DEFAULTS[kind] * directions
    names = [n.decode() if isinstance(n, bytes) else str(n) for n in ctx.attr("activations", [])]
    names = names or list(default)
    if len(names) != len(default):
        raise ShapeError(f"it has {len(names)} activations, expected {len(default)}")
    unknown = [n for n in names if n.lower() not in _NAMES]
    if unknown:
        raise UnsupportedOpError(f"its activation {', '.join(unknown)} is not known")
    alphas, betas = list(ctx.attr("activation_alpha", [])), list(ctx.attr("activation_beta", []))
    found = []
    for name in (_NAMES[n.lower()] for n in names):
        # The lists hold numbers for the functions that take some, in order.
        alpha = (alphas.pop(0) if alphas else ALPHA[name]) if name in ALPHA else 0.0
        beta = (betas.pop(0) if betas else BETA[name]) if name in BETA else 0.0
        found.append((name, float(alpha), float(beta)))
    assert all(n in FUNCTIONS for n, _, _ in found)
    n = len(default) // directions
    return [
        {
            "activations": ",".join(f[0] for f in found[d * n : (d + 1) * n]),
            "alphas": tuple(f[1] for f in found[d * n : (d + 1) * n]),
            "betas": tuple(f[2] for f in found[d * n : (d + 1) * n]),
        }
        for d in range(directions)
    ]


def _cut(ctx: OpContext, v: Value, axis: int, first: int, last: int) -> Value:
    """Return [first, last) of an axis."""
    if (first, last) == (0, v.shape[axis]):
        return v
    return ctx.emit("slice", v, starts=(first,), ends=(last,), axes=(axis,), steps=(1,))


def _one(ctx: OpContext, v: Value, d: int, axis: int = 0) -> Value:
    """Return entry `d` of an axis, without the axis."""
    shape = v.shape[:axis] + v.shape[axis + 1 :]
    return reshape(ctx, _cut(ctx, v, axis, d, d + 1), shape)


@converter("LSTM", "GRU", "RNN")
def _recurrent(ctx: OpContext) -> Results:
    kind = ctx.proto.op_type.lower()
    direction = str(ctx.attr("direction", "forward"))
    if direction not in _DIRECTIONS:
        raise ShapeError(f"its direction is {direction!r}")
    reverses = _DIRECTIONS[direction]
    x, w, r = ctx.input(0), ctx.input(1), ctx.input(2)
    batch_first = bool(ctx.attr("layout", 0))
    if x.type.rank != 3 or w.type.rank != 3 or r.type.rank != 3:
        raise ShapeError(
            f"operands {list(x.shape)}, {list(w.shape)} and {list(r.shape)} should have rank 3"
        )
    if batch_first:
        x = ctx.emit("transpose", x, perm=(1, 0, 2))
    hidden = r.shape[2]
    columns = GATES[kind] * hidden
    if int(ctx.attr("hidden_size", hidden)) != hidden:
        raise ShapeError(f"hidden_size is {ctx.attr('hidden_size')}, R has {hidden} columns")
    for name, weight, inner in (("W", w, x.shape[2]), ("R", r, hidden)):
        if weight.shape != (len(reverses), columns, inner):
            raise ShapeError(
                f"{name} has shape {list(weight.shape)}, expected {[len(reverses), columns, inner]}"
            )
    functions = _functions(ctx, kind, len(reverses))
    results = [
        _direction(ctx, kind, x, d, {**functions[d], "reverse": reverse}, batch_first)
        for d, reverse in enumerate(reverses)
    ]
    # Y is [T, D, B, H], or [B, T, D, H] with the batch first; the states [D, B, H] or [B, D, H].
    ys = [ctx.emit("transpose", v[0], perm=(1, 0, 2)) if batch_first else v[0] for v in results]
    out = _stacked(ctx, ys, 2 if batch_first else 1)
    last = [
        _stacked(ctx, [v[k] for v in results], 1 if batch_first else 0)
        for k in range(1, len(results[0]))
    ]
    return [out, *last]


@converter("DynamicQuantizeLSTM", domain="com.microsoft")
def _dynamic_lstm(ctx: OpContext) -> Results:
    """Take the values of the stored weights; what is multiplied by them stays in floats.

    Operands: as LSTM's, with W and R [directions, inner, 4 hidden] in 8 bits, then scale and zero
    point of each, one or one per column.
    """
    given = list(ctx.inputs[:8]) + [None] * (8 - len(ctx.inputs[:8]))
    for i, at, what in ((1, 8, "W"), (2, 10, "R")):
        codes = ctx.static(i, what)
        scale = np.asarray(ctx.static(at, f"scale of {what}"), np.float32)
        zero = np.asarray(ctx.static(at + 1, f"zero point of {what}"), np.int32)
        if codes.ndim != 3 or scale.size not in (
            1,
            codes.shape[0],
            codes.shape[0] * codes.shape[2],
        ):
            raise ShapeError(f"{scale.size} scales do not fit {what} of {list(codes.shape)}")
        grid = (-1, 1, scale.size // codes.shape[0] if scale.size > 1 else 1)
        wide = codes.astype(np.int32) - zero.reshape(-1, 1, 1 if zero.ndim < 2 else zero.shape[1])
        floats = wide.astype(np.float32) * scale.reshape(grid)
        given[i] = ctx.constant(np.ascontiguousarray(floats.transpose(0, 2, 1)), what)
    return _recurrent(replace(ctx, inputs=tuple(given), proto=_renamed(ctx.proto)))


def _renamed(proto: onnx.NodeProto) -> onnx.NodeProto:
    named = onnx.NodeProto()
    named.CopyFrom(proto)
    named.op_type = "LSTM"
    return named


def _stacked(ctx: OpContext, parts: Sequence[Value], axis: int) -> Value:
    """Put one axis more where the directions are."""
    shape = parts[0].shape
    wide = [reshape(ctx, v, (*shape[:axis], 1, *shape[axis:])) for v in parts]
    return wide[0] if len(wide) == 1 else ctx.emit("concat", *wide, axis=axis)


def _direction(
    ctx: OpContext, kind: str, x: Value, d: int, attrs: dict[str, Any], batch_first: bool
) -> tuple[Value, ...]:
    w, r = _one(ctx, ctx.input(1), d), _one(ctx, ctx.input(2), d)
    steps, batch, _ = x.shape
    hidden = r.shape[1]
    columns = GATES[kind] * hidden
    outer = bool(ctx.attr("linear_before_reset", 0)) if kind == "gru" else False
    bias, inner = _biases(ctx, kind, d, columns, outer)
    w, r = (ctx.emit("transpose", v, perm=(1, 0)) for v in (w, r))
    gates = ctx.emit("matmul", x, w) if bias is None else ctx.emit("matmul", x, w, bias)
    state = 1 if batch_first else 0

    def initial(i: int) -> Value:
        v = ctx.get(i)
        if v is None:
            return ctx.constant(np.zeros((batch, hidden), x.dtype.numpy), dtype=x.dtype)
        return reshape(ctx, _one(ctx, v, d, state), (batch, hidden))

    operands: list[Value | None] = [gates, r, initial(5)]
    if kind == "lstm":
        operands.append(initial(6))
    operands.append(_lens(ctx, steps, batch))
    if kind == "lstm":
        peephole = ctx.get(7)
        if peephole is not None:
            operands.append(reshape(ctx, _one(ctx, peephole, d), (3, hidden)))
    elif inner is not None:
        operands.append(inner)
    clip = ctx.attr("clip")
    attrs = {**attrs, "clip": None if clip is None else float(clip)}
    if kind == "lstm":
        attrs["input_forget"] = bool(ctx.attr("input_forget", 0))
    if kind == "gru":
        attrs["linear_before_reset"] = outer
    while operands and operands[-1] is None:
        operands.pop()
    return ctx.builder.emit(kind, operands, attrs, ctx.name)


def _biases(
    ctx: OpContext, kind: str, d: int, columns: int, outer: bool
) -> tuple[Value | None, Value | None]:
    """Return the bias of the inputs' product, and the one inside the reset gate of a GRU."""
    b = ctx.get(3)
    if b is None:
        return None, None
    if b.type.rank != 2 or b.shape[1] != 2 * columns:
        raise ShapeError(f"B has shape {list(b.shape)}, expected [directions, {2 * columns}]")
    b = _one(ctx, b, d)
    wb, rb = _cut(ctx, b, 0, 0, columns), _cut(ctx, b, 0, columns, 2 * columns)
    if not outer:
        return ctx.emit("add", wb, rb), None
    first = columns // 3 * 2
    inner = _cut(ctx, rb, 0, first, columns)
    zeros = ctx.constant(np.zeros(columns - first, b.dtype.numpy), dtype=b.dtype)
    rest = ctx.emit("concat", _cut(ctx, rb, 0, 0, first), zeros, axis=0)
    return ctx.emit("add", wb, rest), inner


def _lens(ctx: OpContext, steps: int, batch: int) -> Value | None:
    """Return the lengths of the sequences, or None where all have every step."""
    v = ctx.get(4)
    if v is None or (v.data is not None and (v.data == steps).all()):
        return None
    if v.shape != (batch,):
        raise ShapeError(f"sequence_lens has shape {list(v.shape)}, expected [{batch}]")
    return v if v.dtype is DType.INT32 else ctx.emit("cast", v, to=DType.INT32.value)
