# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What LSTM, GRU and Elman cells compute over a sequence, in float32 and in integers.

One loop over time serves both: an `Arithmetic` says how the hidden state is held, what the product
with the recurrent weights is, and what the activation functions are.

    lstm  i, o, f, g = gates[t] + h R (+ peephole * c);  c' = f * c + i * g;  h' = o * act(c')
    gru   z, r       = gates[t] + h R[:, :2H];  n = gates[t] + r * (h R_n + b)  or  + (r * h) R_n
          h' = (1 - z) * n + z * h
    rnn   h' = act(gates[t] + h R)

Integers: h is held in 8 bits on the grid of the result, R in int8 with one scale per column (so
one per gate and unit), the product is int32, `float32(acc) * M[n]` with `M[n] = s_h * s_R[n]`. A
function is a table of 4096 entries over [-8, 8): `entries[clamp(rint(x * 256), -2048, 2047) +
2048]`. The cell of an LSTM and the state of a GRU are carried in float32, or in int16 with the
step `carry`: `clamp(rint(c / carry), -32768, 32767) * carry`. Every float32 operation is rounded by
itself.

Source: ONNX operators LSTM, GRU, RNN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qcompiler import numerics
from qcompiler.types import Array, DType, QuantParams

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
"""Gates per unit of each cell."""

TABLE_BITS = 12
TABLE_STEPS = 256
"""Entries per unit of a gate table's argument: the table covers [-8, 8)."""
_TABLE_OFFSET = 1 << (TABLE_BITS - 1)

Function = tuple[str, float, float]
"""Name, alpha and beta of an activation function."""


def _sigmoid(x: Array, a: float, b: float) -> Array:
    one = x.dtype.type(1)
    with np.errstate(over="ignore"):
        return np.asarray(one / (one + np.exp(-x)))


FUNCTIONS: dict[str, Callable[[Array, float, float], Array]] = {
    "affine": lambda x, a, b: a * x + b,
    "elu": lambda x, a, b: np.where(x >= 0, x, a * np.expm1(np.minimum(x, 0))),
    "hard_sigmoid": lambda x, a, b: np.clip(a * x + b, 0, 1),
    "leaky_relu": lambda x, a, b: np.where(x >= 0, x, a * x),
    "relu": lambda x, a, b: np.maximum(x, 0),
    "scaled_tanh": lambda x, a, b: a * np.tanh(b * x),
    "sigmoid": _sigmoid,
    "softplus": lambda x, a, b: np.logaddexp(x, x.dtype.type(0)),
    "softsign": lambda x, a, b: x / (1 + np.abs(x)),
    "tanh": lambda x, a, b: np.tanh(x),
    "thresholded_relu": lambda x, a, b: np.where(x >= a, x, 0),
}
"""Activation functions by name; the numbers are ONNX's alpha and beta."""


def settles(function: Function) -> bool:
    """Whether the function is constant, to 8 bits, beyond [-8, 8]: a table can stand for it."""
    name, alpha, beta = function
    if name == "hard_sigmoid":
        return alpha > 0 and 8 * alpha >= max(beta, 1 - beta)
    if name == "scaled_tanh":
        return abs(beta) >= 0.5
    return name in ("sigmoid", "tanh")


def gate_table(function: Function) -> Array:
    """Return the entries of a gate table, float32 [4096]."""
    name, alpha, beta = function
    x = (np.arange(1 << TABLE_BITS) - _TABLE_OFFSET) / np.float64(TABLE_STEPS)
    return np.asarray(FUNCTIONS[name](x, alpha, beta), np.float32)


def look_up(x: Array, entries: Array) -> Array:
    """Return entries[clamp(rint(x * 256), -2048, 2047) + 2048]; NaN reads the first entry."""
    with np.errstate(over="ignore", invalid="ignore"):
        t = np.rint(x * np.float32(TABLE_STEPS))
        t = np.fmin(np.fmax(t, np.float32(-_TABLE_OFFSET)), np.float32(_TABLE_OFFSET - 1))
    return np.asarray(entries[t.astype(np.int32) + _TABLE_OFFSET])


@dataclass(frozen=True, slots=True)
class Cell:
    """The attributes of a recurrent operator.

    Attributes:
        kind: "lstm", "gru" or "rnn".
        functions: f, g, h of an LSTM; f, g of a GRU; f of an Elman cell.
        clip: What a function reads is limited to [-clip, clip]; None for no limit.
        reverse: Whether time runs backwards.
        input_forget: The forget gate is 1 - i (LSTM).
        linear_before_reset: The reset gate applies to the product, not to the state (GRU).
        carry: Step of the int16 grid of the carried state; None for float32.
    """

    kind: str
    functions: tuple[Function, ...]
    clip: float | None = None
    reverse: bool = False
    input_forget: bool = False
    linear_before_reset: bool = False
    carry: float | None = None

    def carried(self, c: Array) -> Array:
        """Return a state as the next step reads it."""
        if self.carry is None:
            return c
        q = carry_grid(self.carry)
        return numerics.dequantize(numerics.quantize(c, q), q)


def carry_grid(step: float) -> QuantParams:
    """Return the int16 grid of a carried state."""
    low, high = DType.INT16.min, DType.INT16.max
    return QuantParams(np.float32(step), np.int32(0), DType.INT16, low, high)


class Arithmetic(Protocol):
    """How a cell is computed."""

    def held(self, h: Array) -> Array:
        """Return a hidden state as it is stored and returned."""

    def real(self, h: Array) -> Array:
        """Return the reals of a stored hidden state."""

    def product(self, h: Array, first: int, last: int) -> Array:
        """Return the product of a stored hidden state with columns of R, float32."""

    def act(self, i: int, x: Array) -> Array:
        """Apply function `i`."""


class Floats:
    """Float32 arithmetic."""

    def __init__(self, cell: Cell, r: Array) -> None:
        self.cell, self.r = cell, r

    def held(self, h: Array) -> Array:
        """Return the state itself."""
        return h

    def real(self, h: Array) -> Array:
        """Return the state itself."""
        return h

    def product(self, h: Array, first: int, last: int) -> Array:
        """Return h @ R[:, first:last]."""
        return np.asarray(h @ self.r[:, first:last])

    def act(self, i: int, x: Array) -> Array:
        """Apply function `i`."""
        name, alpha, beta = self.cell.functions[i]
        kind = x.dtype.type
        return np.asarray(FUNCTIONS[name](x, kind(alpha), kind(beta)), x.dtype)


class Integers:
    """Integer products and tables.

    Args:
        cell: The operator's attributes.
        r: int8 [H, G * H].
        r_qparams: Its quantization, per tensor or per column.
        hidden: Grid of the hidden state.
    """

    def __init__(self, cell: Cell, r: Array, r_qparams: QuantParams, hidden: QuantParams) -> None:
        self.r, self.r_qparams, self.hidden = r, r_qparams, hidden
        self.tables = [gate_table(f) for f in cell.functions]

    def held(self, h: Array) -> Array:
        """Quantize to the grid of the result."""
        return numerics.quantize(h, self.hidden)

    def real(self, h: Array) -> Array:
        """Dequantize."""
        return numerics.dequantize(h, self.hidden)

    def product(self, h: Array, first: int, last: int) -> Array:
        """Return float32(sum (h - z_h) * (r - z_r)) * float32(s_h * s_r[n])."""
        q = self.r_qparams
        zero, scale = (np.broadcast_to(a, self.r.shape[1:])[first:last]
                       for a in (q.zero_point, q.scale))  # fmt: skip
        acc = numerics.accumulate_matmul(h, self.r[:, first:last], self.hidden.z, zero)
        return np.asarray(acc.astype(np.float32) * numerics.multiplier(self.hidden.scale, scale))

    def act(self, i: int, x: Array) -> Array:
        """Look function `i` up."""
        return look_up(x, self.tables[i])


def run_sequence(
    cell: Cell,
    arithmetic: Arithmetic,
    gates: Array,
    h0: Array,
    c0: Array | None = None,
    lens: Array | None = None,
    extra: Array | None = None,
) -> tuple[Array, Array, Array | None]:
    """Run a cell over a sequence.

    Args:
        cell: What is computed.
        arithmetic: In which numbers.
        gates: float32 [T, B, G * H], the inputs' part of what the gates read.
        h0: float32 [B, H].
        c0: float32 [B, H], for an LSTM.
        lens: Integers [B]: steps of each sequence; those beyond give zeros and change no state.
        extra: float32 [3, H] peepholes (i, o, f) of an LSTM, or [H] bias inside the reset of a GRU.

    Returns:
        The stored hidden states [T, B, H]; the last hidden state [B, H] in reals (of a GRU as it
        is carried); the last cell [B, H] in reals, of an LSTM.
    """
    steps, batch, _ = gates.shape
    hidden = h0.shape[1]
    held = arithmetic.held(h0)
    state = cell.carried(h0 if c0 is None else c0)
    y = np.empty((steps, batch, hidden), held.dtype)
    zero = arithmetic.held(np.zeros((batch, hidden), h0.dtype))
    step = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}[cell.kind]
    for k in range(steps):
        t = steps - 1 - k if cell.reverse else k
        h2, state2 = step(cell, arithmetic, gates[t], held, state, extra)
        new = arithmetic.held(h2)
        if lens is None:
            held, state, y[t] = new, state2, new
            continue
        live = (t < lens)[:, None]
        held, state = np.where(live, new, held), np.where(live, state2, state)
        y[t] = np.where(live, new, zero)
    if cell.kind == "gru":
        return y, state, None
    return y, arithmetic.real(held), state if cell.kind == "lstm" else None


def _limited(cell: Cell, x: Array) -> Array:
    if cell.clip is None:
        return x
    limit = x.dtype.type(cell.clip)
    return np.asarray(np.clip(x, -limit, limit))


def _lstm(
    cell: Cell, a: Arithmetic, gates: Array, h: Array, c: Array, peephole: Array | None
) -> tuple[Array, Array]:
    n = c.shape[1]
    total = a.product(h, 0, 4 * n) + gates
    i, o, f, g = (total[:, k * n : (k + 1) * n] for k in range(4))
    if peephole is not None:
        i, f = i + peephole[0] * c, f + peephole[2] * c
    i, g = a.act(0, _limited(cell, i)), a.act(1, _limited(cell, g))
    f = i.dtype.type(1) - i if cell.input_forget else a.act(0, _limited(cell, f))
    c2 = cell.carried(f * c + i * g)
    if peephole is not None:
        o = o + peephole[1] * c2
    return a.act(0, _limited(cell, o)) * a.act(2, c2), c2


def _gru(
    cell: Cell, a: Arithmetic, gates: Array, h: Array, state: Array, bias: Array | None
) -> tuple[Array, Array]:
    n = state.shape[1]
    zr = a.act(0, _limited(cell, a.product(h, 0, 2 * n) + gates[:, : 2 * n]))
    z, r = zr[:, :n], zr[:, n:]
    if cell.linear_before_reset:
        inner = a.product(h, 2 * n, 3 * n)
        inner = r * (inner if bias is None else inner + bias)
    else:
        inner = a.product(a.held(r * state), 2 * n, 3 * n)
    new = a.act(1, _limited(cell, inner + gates[:, 2 * n :]))
    state2 = cell.carried((new.dtype.type(1) - z) * new + z * state)
    return state2, state2


def _rnn(
    cell: Cell, a: Arithmetic, gates: Array, h: Array, state: Array, extra: Array | None
) -> tuple[Array, Array]:
    del extra
    total = a.product(h, 0, h.shape[1]) + gates
    return a.act(0, _limited(cell, total)), state


def cell_of(kind: str, attrs: Any) -> Cell:
    """Return the cell that an operator's attributes describe."""
    names = str(attrs["activations"]).split(",")
    functions = tuple(
        (name, float(a), float(b))
        for name, a, b in zip(names, attrs["alphas"], attrs["betas"], strict=True)
    )
    clip = attrs["clip"]
    return Cell(
        kind,
        functions,
        None if clip is None else float(clip),
        bool(attrs["reverse"]),
        bool(attrs.get("input_forget", False)),
        bool(attrs.get("linear_before_reset", False)),
        None if attrs.get("carry") is None else float(attrs["carry"]),
    )
