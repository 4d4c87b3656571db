# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Choose how quantized LSTMs and GRUs carry their state between steps: int16, or float32.

The state accumulates over the sequence, so 8 bits are never enough. Each cell runs over the
calibration sequences twice, with the state in float32 and on an int16 grid; int16 is taken where
its error in the hidden state stays far below what rounding that to 8 bits costs anyway.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from qcompiler.data import Batch
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import choose_qparams, dequantize, quantize
from qcompiler.onnx_export import to_onnx
from qcompiler.ops._recurrence import Cell, Floats, cell_of, run_sequence
from qcompiler.ops.recurrent import operand_index
from qcompiler.ort import Session
from qcompiler.passes.sample_axes import Filled
from qcompiler.plan import integer_obstacle
from qcompiler.types import Array, DType

_RUNS = 8
"""Calibration runs that are looked at."""
_STEPS = 512
"""Steps of a run that are looked at."""
_HEADROOM = 2.0
"""Factor by which the grid exceeds the greatest state seen: beyond the grid it would saturate."""
_SHARE = 0.05
"""Of the noise power of the 8-bit hidden state: what the int16 state may add to it."""


def state_steps(graph: Graph, samples: Iterable[Batch]) -> dict[str, float]:
    """Return the step of the int16 grid of each cell whose state int16 carries well enough.

    Args:
        graph: FLOAT graph.
        samples: Calibration runs; some of the first are looked at.
    """
    cells = [n for n in graph.nodes if n.op.name in ("lstm", "gru") and integer_obstacle(n) is None]
    if not cells:
        return {}
    seen = _operands(graph, cells, samples)
    steps = {n.name: _step(n, seen) for n in cells}
    return {name: step for name, step in steps.items() if step is not None}


def _operands(
    graph: Graph, cells: list[Node], samples: Iterable[Batch]
) -> dict[Value, list[Array]]:
    """Return what the cells read in some runs."""
    wanted = list(dict.fromkeys(v for n in cells for v in n.operands if not v.is_constant))
    inner = [v for v in wanted if v not in graph.inputs]
    model = to_onnx(graph, extra_outputs=[v.name for v in inner]).SerializeToString()
    session = Session(model, optimization="basic")
    seen: dict[Value, list[Array]] = {v: [] for v in wanted}
    filled, gates = Filled(graph), {n.input(0) for n in cells}
    for batch in itertools.islice(iter(samples), _RUNS):
        found = session.run(batch.inputs, [v.name for v in inner]) if inner else {}
        for v in wanted:
            given = found[v.name] if v in inner else batch.inputs[v.name]
            seen[v].append(filled.steps(v, given, batch) if v in gates else given)
    return seen


def _step(node: Node, seen: dict[Value, list[Array]]) -> float | None:
    """Return the step of the int16 grid, or None where float32 is the better carrier."""
    runs = max((len(seen[v]) for v in node.operands if v in seen), default=1)
    pairs = [_run(node, seen, k, None) for k in range(runs)]
    greatest = max(float(np.abs(state).max(initial=0)) for _, state in pairs)
    if not 0 < greatest < np.inf:
        return None
    # A power of two: dividing by it is exact.
    step = 2.0 ** int(np.ceil(np.log2(greatest * _HEADROOM / DType.INT16.max)))
    hidden = np.concatenate([y.reshape(-1) for y, _ in pairs])
    grid = choose_qparams(float(hidden.min()), float(hidden.max()), storage=DType.UINT8)
    rounding = np.mean((dequantize(quantize(hidden, grid), grid) - hidden) ** 2)
    carried = np.concatenate([_run(node, seen, k, step)[0].reshape(-1) for k in range(runs)])
    return step if float(np.mean((carried - hidden) ** 2)) <= _SHARE * float(rounding) else None


def _run(
    node: Node, seen: dict[Value, list[Array]], run: int, carry: float | None
) -> tuple[Array, Array]:
    """Run a cell; return its hidden states and the states carried after each step."""
    kind = node.op.name
    cell = replace(cell_of(kind, node.attrs), carry=carry)

    def given(name: str) -> Array | None:
        i = operand_index(kind, name)
        v = node.optional(i) if i >= 0 else None
        if v is None:
            return None
        return v.array() if v.is_constant else seen[v][run]

    gates, r, h0 = given("gates"), given("r"), given("h0")
    assert gates is not None  # required operands
    assert r is not None
    assert h0 is not None
    gates = gates[-_STEPS:] if cell.reverse else gates[:_STEPS]
    watched = _Watched(cell)
    y, _, _ = run_sequence(
        watched,
        Floats(cell, r),
        gates,
        h0,
        given("c0"),
        given("lens"),
        given("peephole" if kind == "lstm" else "bias"),
    )
    return y, np.asarray(watched.greatest, np.float32)


class _Watched(Cell):
    """A cell that remembers the greatest state it carried."""

    greatest: float

    def __init__(self, cell: Cell) -> None:
        for name in cell.__slots__:
            object.__setattr__(self, name, getattr(cell, name))
        object.__setattr__(self, "greatest", 0.0)

    def carried(self, c: Array) -> Array:
        """Return a state as the next step reads it."""
        object.__setattr__(self, "greatest", max(self.greatest, float(np.abs(c).max(initial=0))))
        return Cell.carried(self, c)
