# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""LSTM, GRU and Elman cells: the loop over time in one kernel, float32 and int8.

Each step multiplies the hidden state by the packed recurrent weights with the macro-kernel of
`macro` (so AVX2 has its proof of no saturation here too), then computes the gates on vectors. Codes
and tables of the loop stay in the caches; the inputs' part of the gates comes in as an operand.

Buffers: gates [T, B, G * H], r [H, G * H] where it is not constant (float32), h0 [B, H], c0 [B, H]
(LSTM), lens [B] (int32), extra (peephole [3, H], bias [H]), the packed constants, then y, h_n and
c_n. `qcompiler.ops._recurrence` defines what is computed; every float32 operation of the integer
form is rounded by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import CodegenError
from qcompiler.ops._recurrence import GATES, TABLE_BITS, TABLE_STEPS, Cell, gate_table
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.epilogue import EpilogueWriter
from qcompiler.targets.kernels.fmath import FUNCTIONS as FLOAT_FUNCTIONS
from qcompiler.targets.kernels.macro import MacroKernel
from qcompiler.targets.kernels.packing import Packed, pack_matmul
from qcompiler.targets.kernels.params import default_params, fitted
from qcompiler.targets.kernels.plan import geometry_of, tile_plan
from qcompiler.targets.kernels.simd import exact_mul, loop, lrint, settle, vector_spans, workspace
from qcompiler.targets.kernels.tir import Buffer, Expr, PrimFuncBuilder
from qcompiler.targets.kernels.workload import Epilogue, GemmParams, GemmValues, MatmulWorkload

__all__ = ["Grid", "PackedCell", "RecurrentWorkload", "build_recurrent", "pack_recurrent"]

Array = npt.NDArray[Any]

_HALF = 1 << (TABLE_BITS - 1)
_FLOAT_ONLY: dict[str, Callable[[Expr, float, float], Expr]] = {
    "affine": lambda x, a, b: x * _splat(a, x) + _splat(b, x),
    "scaled_tanh": lambda x, a, b: FLOAT_FUNCTIONS["tanh"](x * _splat(b, x), 0, 0) * _splat(a, x),
    "softsign": lambda x, a, b: x / (_splat(1.0, x) + T.abs(x)),
    "thresholded_relu": lambda x, a, b: T.Select(x >= _splat(a, x), x, _splat(0.0, x)),
}


def _splat(value: float, like: Expr) -> Expr:
    return tir.splat(float(value), "float32", tir.lanes_of(like))


@dataclass(frozen=True, slots=True)
class Grid:
    """Quantization of the hidden state."""

    dtype: str
    scale: float
    zero_point: int
    qmin: int
    qmax: int


@dataclass(frozen=True, slots=True)
class RecurrentWorkload:
    """A recurrent operator."""

    cell: Cell
    steps: int
    batch: int
    hidden: int
    grid: Grid | None = None
    """Of the hidden state; None for float32."""
    constant: bool = True
    """Whether the recurrent weights are packed at compile time."""
    lens: bool = False
    extra: bool = False
    """Whether there is a peephole (LSTM) or a bias inside the reset (GRU)."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.hidden) < 1:
            raise CodegenError(f"recurrent: extents must be 1 or more: {self}")
        if self.grid is not None and not self.constant:
            raise CodegenError("recurrent: integer products need constant recurrent weights")
        if self.grid is not None and self.grid.dtype not in ("uint8", "int8"):
            raise CodegenError(f"recurrent: no hidden state of dtype {self.grid.dtype}")
        missing = [n for n, _, _ in self.cell.functions if not _has_function(n)]
        if missing and self.grid is None:
            raise CodegenError(f"recurrent: no float32 function {', '.join(missing)}")

    @property
    def columns(self) -> int:
        """Columns of the recurrent weights."""
        return GATES[self.cell.kind] * self.hidden

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """Column ranges of the products of a step, in order."""
        if self.cell.kind == "gru" and not self.cell.linear_before_reset:
            return (0, 2 * self.hidden), (2 * self.hidden, 3 * self.hidden)
        return ((0, self.columns),)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.steps * self.batch * self.hidden * self.columns

    @property
    def h_dtype(self) -> str:
        """Dtype of the stored hidden state."""
        return "float32" if self.grid is None else self.grid.dtype

    def matmul(self, columns: int) -> MatmulWorkload:
        """The product of one step."""
        return MatmulWorkload(
            (self.batch, self.hidden),
            (self.hidden, columns),
            Epilogue("float32"),
            a_dtype=self.h_dtype,
            b_dtype="float32" if self.grid is None else "int8",
        )


def _has_function(name: str) -> bool:
    return name in _FLOAT_ONLY or name in FLOAT_FUNCTIONS


@dataclass(frozen=True, slots=True, eq=False)
class PackedCell:
    """Constants of a kernel: of each product, then the gate tables."""

    products: tuple[Packed, ...]
    tables: tuple[Array, ...]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """In the order of the kernel's arguments."""
        return (*(a for p in self.products for a in p.arrays), *self.tables)

    @property
    def key(self) -> tuple[object, ...]:
        """What the code depends on."""
        return tuple((p.facts, p.shapes) for p in self.products)


def pack_recurrent(
    w: RecurrentWorkload, isa: Isa, r: Array | None, scale: Array | None = None
) -> PackedCell:
    """Pack the recurrent weights and make the gate tables.

    Args:
        w: The workload.
        isa: The instruction set's row.
        r: [H, G * H], int8 with zero point 0, or float32; None where it is an operand.
        scale: float32 multiplier of each column's sums, for int8.
    """
    products = []
    for first, last in w.products if r is not None else ():
        assert r is not None
        matmul = w.matmul(last - first)
        values = GemmValues()
        if w.grid is not None:
            assert scale is not None
            values = GemmValues(
                multiplier=np.ascontiguousarray(scale[first:last]),
                a_zero_point=w.grid.zero_point,
                a_qmin=w.grid.qmin,
                a_qmax=w.grid.qmax,
            )
        part = np.ascontiguousarray(r[:, first:last])
        products.append(pack_matmul(matmul, isa, _params(matmul, isa), part, values))
    tables = () if w.grid is None else tuple(gate_table(f) for f in _distinct(w.cell))
    return PackedCell(tuple(products), tables)


def _distinct(cell: Cell) -> tuple[tuple[str, float, float], ...]:
    return tuple(dict.fromkeys(cell.functions))


def _params(matmul: MatmulWorkload, isa: Isa) -> GemmParams:
    """One task: the loop over time is serial, and a step is too short to share out."""
    params = default_params(matmul, isa)
    return replace(params, m_block=1 << 30, n_block=1 << 30, order="n", algorithm="direct")


def build_recurrent(w: RecurrentWorkload, isa: Isa, packed: PackedCell, name: str) -> Any:
    """The PrimFunc of a recurrent operator whose constants are `packed`."""
    with PrimFuncBuilder(name) as builder:
        _Kernel(w, isa, packed, name, builder).emit()
    return builder.finish()


class _Kernel:
    """One kernel under construction."""

    def __init__(
        self, w: RecurrentWorkload, isa: Isa, packed: PackedCell, name: str, b: PrimFuncBuilder
    ) -> None:
        self.w, self.isa, self.packed, self.name = w, isa, packed, name
        kind, n, state = w.cell.kind, w.hidden, (w.batch, w.hidden)
        arguments: dict[str, Buffer] = {}

        def argument(label: str, shape: tuple[int, ...], dtype: str = "float32") -> None:
            arguments[label] = b.argument(label, shape, dtype)

        argument("gates", (w.steps, w.batch, w.columns))
        if not w.constant:
            argument("r", (n, w.columns))
        argument("h0", state)
        if kind == "lstm":
            argument("c0", state)
        if w.lens:
            argument("lens", (w.batch,), "int32")
        if w.extra:
            argument("extra", (3, n) if kind == "lstm" else (n,))
        for i, product in enumerate(packed.products):
            for label, shape, dtype in product.shapes:
                argument(f"{label}{i}", shape, dtype)
        for i, table in enumerate(packed.tables):
            argument(f"table{i}", table.shape)
        argument("y", (w.steps, w.batch, n), w.h_dtype)
        argument("h_n", state)
        if kind == "lstm":
            argument("c_n", state)
        self.buffers = {label: tir.flat(buffer) for label, buffer in arguments.items()}
        self.h = workspace(w.batch * n, w.h_dtype)
        self.state = workspace(w.batch * n, "float32")
        self.sums = workspace(w.batch * w.columns, "float32")
        self.spans = vector_spans(n, isa.lanes(), overlap=False)

    # ------------------------------------------------------------------------ structure

    def emit(self) -> None:
        """Copy the initial states, run the steps, copy the last states."""
        w = self.w
        carried = w.cell.kind != "rnn"
        first = self.buffers["c0" if w.cell.kind == "lstm" else "h0"]

        def begin(at: Expr, lanes: int) -> None:
            tir.store(self.h, at, self._held(tir.load(self.buffers["h0"], at, lanes)))
            if carried:
                tir.store(self.state, at, self._carried(tir.load(first, at, lanes)))

        self._units(begin)
        with loop(w.steps) as k:
            t = tir.bind((w.steps - 1) - k) if w.cell.reverse else k
            self._product(0, self.h, self.sums)
            if len(w.products) > 1:
                self._reset(t)
            with loop(w.batch) as b:
                self._sequence(t, b)

        def end(at: Expr, lanes: int) -> None:
            gru = w.cell.kind == "gru"
            last = tir.load(self.state if gru else self.h, at, lanes)
            tir.store(self.buffers["h_n"], at, last if gru else self._real(last))
            if w.cell.kind == "lstm":
                tir.store(self.buffers["c_n"], at, tir.load(self.state, at, lanes))

        self._units(end)

    def _units(self, body: Callable[[Expr, int], None]) -> None:
        """Run over all [B, H]."""
        for offset, count, lanes in vector_spans(
            self.w.batch * self.w.hidden, self.isa.lanes(), overlap=False
        ):
            with loop(count) as j:
                body(tir.bind(j * lanes + offset), lanes)

    def _sequence(self, t: Expr, b: Expr) -> None:
        """The gates of one sequence of the batch, unless it has ended."""
        if not self.w.lens:
            self._gates(t, b)
            return
        length = tir.bind(tir.load(self.buffers["lens"], b, 1))
        with tir.when(t < length):
            self._gates(t, b)
        with tir.when(t >= length):
            row = tir.bind((t * self.w.batch + b) * self.w.hidden)
            for offset, count, lanes in self.spans:
                with loop(count) as j:
                    zero = self._held(tir.splat(0.0, "float32", lanes))
                    tir.store(self.buffers["y"], row + (j * lanes + offset), zero)

    def _product(self, i: int, h: Buffer, sums: Buffer, first: int = 0) -> None:
        """`sums` = the stored hidden states times the columns of product `i`."""
        w, isa = self.w, self.isa
        if not w.constant:
            self._plain_product(i, h, sums)
            return
        columns = w.products[i][1] - w.products[i][0]
        del first
        matmul, packed = w.matmul(columns), self.packed.products[i]
        geometry = geometry_of(matmul, isa)
        params = fitted(matmul, isa, _params(matmul, isa), packed.facts.depths)
        params = replace(params, m_block=1 << 30, n_block=1 << 30)
        plan = tile_plan(geometry, params)
        flats = {label: self.buffers[f"{label}{i}"] for label, _, _ in packed.shapes}
        writer = EpilogueWriter(
            isa=isa,
            epilogue=matmul.epilogue,
            facts=packed.facts,
            out=sums,
            residual=None,
            multiplier=flats.get("multiplier"),
            scalars=flats["scalars"],
        )
        MacroKernel(
            isa=isa,
            geometry=geometry,
            plan=plan,
            params=params,
            facts=packed.facts,
            a=h,
            constants=flats,
            writer=writer,
            name=f"{self.name}_{i}",
            tasks=1,
        ).emit()

    def _plain_product(self, i: int, h: Buffer, sums: Buffer) -> None:
        """The product with weights that are an operand: rows of R times elements of h."""
        w, r = self.w, self.buffers["r"]
        low, high = w.products[i]
        with loop(w.batch) as b:
            for offset, count, lanes in vector_spans(high - low, self.isa.lanes(), overlap=True):
                with loop(count) as j:
                    at = tir.bind(j * lanes + offset)
                    out = tir.bind(b * (high - low) + at)
                    tir.store(sums, out, tir.splat(0.0, "float32", lanes))
                    with loop(w.hidden) as k:
                        row = tir.load(r, k * w.columns + (at + low), lanes)
                        x = tir.splat(tir.load(h, b * w.hidden + k, 1), "float32", lanes)
                        tir.store(sums, out, tir.load(sums, out, lanes) + x * row)

    # ----------------------------------------------------------------------- arithmetic

    def _held(self, value: Expr) -> Expr:
        """A hidden state as it is stored."""
        g = self.w.grid
        if g is None:
            return value
        scaled = value / tir.splat(g.scale, "float32", tir.lanes_of(value))
        scaled = tir.clamp(scaled, float(g.qmin - g.zero_point), float(g.qmax - g.zero_point))
        rounded = lrint(scaled) + tir.splat(g.zero_point, "int32", tir.lanes_of(value))
        return tir.cast(rounded, g.dtype)

    def _real(self, held: Expr) -> Expr:
        """The reals of a stored hidden state."""
        g = self.w.grid
        if g is None:
            return held
        lanes = tir.lanes_of(held)
        centred = tir.cast(held, "int32") - tir.splat(g.zero_point, "int32", lanes)
        return tir.cast(centred, "float32") * tir.splat(g.scale, "float32", lanes)

    def _carried(self, value: Expr) -> Expr:
        """A state as the next step reads it."""
        step = self.w.cell.carry
        if step is None:
            return value
        scaled = value / tir.splat(step, "float32", tir.lanes_of(value))
        rounded = lrint(tir.clamp(scaled, -32768.0, 32767.0))
        return tir.cast(rounded, "float32") * tir.splat(step, "float32", tir.lanes_of(value))

    def _act(self, i: int, value: Expr, limited: bool = True) -> Expr:
        """Function `i` of the cell."""
        cell, lanes = self.w.cell, tir.lanes_of(value)
        value = settle(value)
        if limited and cell.clip is not None:
            value = tir.clamp(value, -float(np.float32(cell.clip)), float(np.float32(cell.clip)))
        name, alpha, beta = cell.functions[i]
        if self.w.grid is None:
            function = _FLOAT_ONLY.get(name) or FLOAT_FUNCTIONS[name]
            return settle(function(value, alpha, beta))
        steps = value * tir.splat(float(TABLE_STEPS), "float32", lanes)
        index = lrint(tir.clamp(steps, float(-_HALF), float(_HALF - 1)))
        index = tir.bind(index + tir.splat(_HALF, "int32", lanes))
        table = self.buffers[f"table{_distinct(cell).index(cell.functions[i])}"]
        return settle(look_up(self.isa, table, index))

    def _total(self, gate: int, at: Expr, t: Expr, b: Expr, lanes: int) -> Expr:
        """What a gate reads: the product's sum plus the inputs' part."""
        w = self.w
        column = gate * w.hidden + at
        given = tir.load(self.buffers["gates"], (t * w.batch + b) * w.columns + column, lanes)
        width = w.products[0][1]
        return settle(tir.load(self.sums, b * width + column, lanes) + given)

    # ----------------------------------------------------------------------------- cells

    def _gates(self, t: Expr, b: Expr) -> None:
        w = self.w
        body = {"lstm": self._lstm, "gru": self._gru, "rnn": self._rnn}[w.cell.kind]
        for offset, count, lanes in self.spans:
            with loop(count) as j:
                at = tir.bind(j * lanes + offset)
                new = self._held(body(t, b, at, lanes))
                new = new if w.grid is None else settle(new)
                tir.store(self.h, tir.bind(b * w.hidden + at), new)
                row = (t * w.batch + b) * w.hidden
                tir.store(self.buffers["y"], tir.bind(row + at), new)

    def _lstm(self, t: Expr, b: Expr, at: Expr, lanes: int) -> Expr:
        w = self.w
        i, o, f, g = (self._total(k, at, t, b, lanes) for k in range(4))
        slot = tir.bind(b * w.hidden + at)
        c = tir.bind(tir.load(self.state, slot, lanes))
        peephole = [
            tir.bind(tir.load(self.buffers["extra"], k * w.hidden + at, lanes))
            for k in (range(3) if w.extra else ())
        ]
        if peephole:
            i, f = i + exact_mul(peephole[0], c), f + exact_mul(peephole[2], c)
        i, g = self._act(0, i), self._act(1, g)
        one = tir.splat(1.0, "float32", lanes)
        f = settle(one - i) if w.cell.input_forget else self._act(0, f)
        c2 = settle(self._carried(settle(exact_mul(f, c) + exact_mul(i, g))))
        if peephole:
            o = o + exact_mul(peephole[1], c2)
        tir.store(self.state, slot, c2)
        return settle(exact_mul(self._act(0, o), self._act(2, c2, limited=False)))

    def _rnn(self, t: Expr, b: Expr, at: Expr, lanes: int) -> Expr:
        return self._act(0, self._total(0, at, t, b, lanes))

    def _reset(self, t: Expr) -> None:
        """The product of the reset state, for a GRU whose reset comes before it."""
        w = self.w
        self.after = workspace(w.batch * w.hidden, w.h_dtype)
        self.inner = workspace(w.batch * w.hidden, "float32")
        with loop(w.batch) as b:
            for offset, count, lanes in self.spans:
                with loop(count) as j:
                    at = tir.bind(j * lanes + offset)
                    r = self._act(0, self._total(1, at, t, b, lanes))
                    slot = tir.bind(b * w.hidden + at)
                    state = tir.load(self.state, slot, lanes)
                    tir.store(self.after, slot, self._held(settle(exact_mul(r, state))))
        self._product(1, self.after, self.inner)

    def _gru(self, t: Expr, b: Expr, at: Expr, lanes: int) -> Expr:
        w = self.w
        z = self._act(0, self._total(0, at, t, b, lanes))
        slot = tir.bind(b * w.hidden + at)
        column = 2 * w.hidden + at
        given = tir.load(self.buffers["gates"], (t * w.batch + b) * w.columns + column, lanes)
        if w.cell.linear_before_reset:
            r = self._act(0, self._total(1, at, t, b, lanes))
            inner = tir.load(self.sums, b * w.columns + column, lanes)
            if w.extra:
                inner = inner + tir.load(self.buffers["extra"], at, lanes)
            inner = exact_mul(r, inner)
        else:
            inner = tir.load(self.inner, slot, lanes)
        new = self._act(1, inner + given)
        state = tir.bind(tir.load(self.state, slot, lanes))
        one = tir.splat(1.0, "float32", lanes)
        state2 = settle(exact_mul(one - z, new) + exact_mul(z, state))
        state2 = settle(self._carried(state2))
        tir.store(self.state, slot, state2)
        return state2


def look_up(isa: Isa, table: Buffer, index: Expr) -> Expr:
    """`table[index]` for int32 lanes."""
    lanes = tir.lanes_of(index)
    name = isa.intrinsic("gather_f32", lanes * 32)
    if name is None:
        return table[index]
    zero = tir.splat(0.0, "float32", lanes)
    pointer = T.address_of(table[0])
    if ".mask." in name:  # AVX-512: pass-through, base, indices, mask, scale
        mask = T.broadcast(tir.splat(1, "bool", 1), lanes)
        return tir.intrinsic(f"float32x{lanes}", name, zero, pointer, index, mask,
                             tir.splat(4, "int32", 1))  # fmt: skip
    mask = tir.reinterpret(tir.splat(-1, "int32", lanes), "float32", lanes)
    return tir.intrinsic(f"float32x{lanes}", name, zero, pointer, index, mask,
                         tir.splat(4, "int8", 1))  # fmt: skip
