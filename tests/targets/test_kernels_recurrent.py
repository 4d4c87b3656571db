# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The recurrent kernels against the numpy meaning: bit for bit in integers, closely in float."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler import numerics
from qcompiler.errors import CodegenError
from qcompiler.ops._recurrence import (
    GATES,
    Cell,
    Floats,
    Integers,
    gate_table,
    look_up,
    run_sequence,
    settles,
)
from qcompiler.targets.isa import ISA_TABLE, Isa, runnable
from qcompiler.targets.kernels.harness import build
from qcompiler.targets.kernels.recurrent import (
    Grid,
    RecurrentWorkload,
    build_recurrent,
    pack_recurrent,
)
from qcompiler.types import Array, DType, PerAxis, QuantParams

ROWS = [row for row in ISA_TABLE.values() if runnable(row)]
rows = pytest.mark.parametrize("isa", ROWS, ids=lambda row: row.name)
SIGMOID, TANH = ("sigmoid", 0.0, 0.0), ("tanh", 0.0, 0.0)
FUNCTIONS = {"lstm": (SIGMOID, TANH, TANH), "gru": (SIGMOID, TANH), "rnn": (TANH,)}


def call(library: Any, inputs: list[Array], results: list[Array]) -> list[Array]:
    """Run a kernel; its results start with a pattern, so an element never written shows."""
    import tvm

    outs = [tvm.runtime.tensor(np.full(a.shape, 77, a.dtype)) for a in results]
    library["main"](*(tvm.runtime.tensor(np.asarray(a, order="C")) for a in inputs), *outs)
    return [o.numpy() for o in outs]


def check(
    isa: Isa,
    cell: Cell,
    extents: tuple[int, int, int],
    *,
    integer: bool,
    grid: QuantParams | None = None,
    r: Array | None = None,
    lens: list[int] | None = None,
    extra: bool = False,
    constant: bool = True,
    spread: float = 1.5,
) -> None:
    kind, (steps, batch, hidden) = cell.kind, extents
    rng = np.random.default_rng(hidden + steps)
    columns = GATES[kind] * hidden
    gates = rng.normal(0, spread, (steps, batch, columns)).astype(np.float32)
    h0 = rng.uniform(-1, 1, (batch, hidden)).astype(np.float32)
    c0 = rng.normal(0, 1, (batch, hidden)).astype(np.float32) if kind == "lstm" else None
    ends = None if lens is None else np.asarray(lens, np.int32)
    more = rng.normal(0, 0.3, (3, hidden) if kind == "lstm" else hidden).astype(np.float32)
    held, scale, arithmetic = None, None, None
    if integer:
        r = rng.integers(-128, 128, (hidden, columns)).astype(np.int8) if r is None else r
        per_column = (rng.uniform(0.5, 2, columns) / (64 * np.sqrt(hidden))).astype(np.float32)
        rq = QuantParams(per_column, np.zeros(columns), DType.INT8, -128, 127, PerAxis(1))
        hq = grid or QuantParams(np.float32(1 / 120), np.int32(122), DType.UINT8, 0, 255)
        arithmetic = Integers(cell, r, rq, hq)
        held = Grid(hq.storage.value, hq.s, hq.z, hq.qmin, hq.qmax)
        scale = numerics.multiplier(hq.scale, per_column)
    else:
        r = rng.normal(0, 1 / np.sqrt(hidden), (hidden, columns)).astype(np.float32)
    found = run_sequence(
        cell, arithmetic or Floats(cell, r), gates, h0, c0, ends, more if extra else None
    )
    want = [a for a in found if a is not None]
    w = RecurrentWorkload(cell, steps, batch, hidden, held, constant, ends is not None, extra)
    packed = pack_recurrent(w, isa, r if constant else None, scale)
    library = build(build_recurrent(w, isa, packed, "cell"), isa)
    operands = [gates, None if constant else r, h0, c0, ends, more if extra else None]
    got = call(library, [*(a for a in operands if a is not None), *packed.arrays], want)
    for a, b in zip(got, want, strict=True):
        if integer:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


CELLS = [
    Cell("lstm", FUNCTIONS["lstm"]),
    Cell("lstm", FUNCTIONS["lstm"], reverse=True, clip=0.7, input_forget=True, carry=2.0**-11),
    Cell("lstm", (("hard_sigmoid", 0.2, 0.5), TANH, ("scaled_tanh", 1.5, 0.7))),
    Cell("gru", FUNCTIONS["gru"], carry=2.0**-14),
    Cell("gru", FUNCTIONS["gru"], reverse=True),
    Cell("gru", FUNCTIONS["gru"], linear_before_reset=True),
    Cell("rnn", FUNCTIONS["rnn"], clip=0.5),
]
cells = pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.kind)


@rows
@cells
def test_integers_are_exact(isa: Isa, cell: Cell) -> None:
    check(isa, cell, (4, 1, 64), integer=True)
    check(isa, cell, (3, 3, 37), integer=True, lens=[3, 0, 2])


@rows
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_peepholes_and_inner_biases_are_exact(isa: Isa, kind: str) -> None:
    cell = Cell(kind, FUNCTIONS[kind], linear_before_reset=kind == "gru")
    check(isa, cell, (4, 2, 24), integer=True, extra=True)
    check(isa, cell, (4, 2, 24), integer=False, extra=True)


@rows
@pytest.mark.parametrize("end", [-128, 127])
def test_weights_at_the_ends_do_not_saturate(isa: Isa, end: int) -> None:
    """Products of 255 and -128 in pairs break vpmaddubsw: such tiles must be multiplied exactly."""
    r = np.full((64, 256), end, np.int8)
    r[1::2, ::3] = 127
    at_top = QuantParams(np.float32(1 / 250), np.int32(0), DType.UINT8, 0, 255)
    check(isa, CELLS[0], (3, 1, 64), integer=True, r=r, grid=at_top, spread=4.0)


@rows
def test_gates_beyond_the_table_and_signed_states(isa: Isa) -> None:
    signed = QuantParams(np.float32(1 / 127), np.int32(0), DType.INT8, -127, 127)
    check(isa, CELLS[0], (3, 2, 16), integer=True, grid=signed, spread=40.0)
    narrow = QuantParams(np.float32(1 / 50), np.int32(3), DType.UINT8, 2, 90)
    check(isa, CELLS[3], (3, 2, 16), integer=True, grid=narrow, spread=40.0)


@pytest.mark.parametrize("isa", [ROWS[0], ROWS[-1]], ids=lambda row: row.name)
@cells
def test_floats_are_close(isa: Isa, cell: Cell) -> None:
    check(isa, cell, (3, 3, 37), integer=False, lens=[3, 0, 2])


@cells
def test_floats_with_computed_weights_are_close(cell: Cell) -> None:
    check(ROWS[-1], cell, (3, 2, 20), integer=False, constant=False)


@pytest.mark.parametrize(
    "function",
    [("affine", 0.3, 0.1), ("softsign", 0.0, 0.0), ("thresholded_relu", 0.2, 0.0),
     ("relu", 0.0, 0.0), ("elu", 0.7, 0.0), ("leaky_relu", 0.1, 0.0), ("softplus", 0.0, 0.0)],
    ids=lambda f: f[0],
)  # fmt: skip
def test_float_functions(function: tuple[str, float, float]) -> None:
    check(ROWS[-1], Cell("rnn", (function,)), (3, 1, 24), integer=False)


def test_tables_follow_the_functions_to_their_limits() -> None:
    x = np.linspace(-12, 12, 5001).astype(np.float32)
    for f, exact in ((SIGMOID, 1 / (1 + np.exp(-x))), (TANH, np.tanh(x))):
        assert settles(f)
        error = np.abs(look_up(x, gate_table(f)) - exact)
        assert 1e-4 < error.max() < 1 / 400  # half a step of 1/256 times the slope
    assert not settles(("relu", 0.0, 0.0))
    assert look_up(np.asarray([np.nan, np.inf, -np.inf], np.float32), gate_table(TANH)).tolist() \
        == [gate_table(TANH)[i] for i in (0, -1, 0)]  # fmt: skip


def test_workloads_that_no_kernel_serves_are_refused() -> None:
    grid = Grid("uint8", 0.01, 0, 0, 255)
    with pytest.raises(CodegenError, match="constant recurrent weights"):
        RecurrentWorkload(CELLS[0], 1, 1, 4, grid, constant=False)
    with pytest.raises(CodegenError, match="extents must be 1 or more"):
        RecurrentWorkload(CELLS[0], 0, 1, 4)
    with pytest.raises(CodegenError, match="no hidden state of dtype int16"):
        RecurrentWorkload(CELLS[0], 1, 1, 4, Grid("int16", 0.01, 0, -9, 9))
    with pytest.raises(CodegenError, match="no float32 function gumbel"):
        RecurrentWorkload(Cell("rnn", (("gumbel", 0.0, 0.0),)), 1, 1, 4)
