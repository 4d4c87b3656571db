# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""If, Loop and Scan: a graph has no control flow, so branches are selected and loops unrolled.

An If whose condition is constant becomes the branch that it selects. Any other becomes both
branches and a `where` per result: operators are pure, so computing the branch that is not taken
changes nothing (lowering may skip it). A Loop with a constant trip count and a Scan become their
bodies, one after the other, up to `max_unrolled` nodes in all.

Source: ONNX operators If, Loop-1 to -25, Scan-8, Scan-9 to -25.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import onnx

from qcompiler.errors import ModelError, UnsupportedOpError, UsageError
from qcompiler.ir import Value
from qcompiler.onnx_import_context import OpContext, normal_axis, reshape

MAX_UNROLLED = 10_000
"""Nodes that unrolled loops may amount to, where nothing else is said."""
OPTION = "QCOMPILER_MAX_UNROLLED"
"""Environment variable with another limit."""

Results = list["Value | None"]


class Branch(Protocol):
    """Imports a graph that an attribute holds, as often as it is called."""

    def __call__(self, inputs: Sequence[Value | None]) -> Results:
        """Return the graph's results for values of its inputs; None for what is not imported."""


Open = Callable[[onnx.GraphProto], Branch]
"""Prepares an inner graph; what does not depend on its inputs is imported once."""


def unroll_limit(given: int | None) -> int:
    """Return the limit: the argument, else the environment's, else the default.

    Raises:
        UsageError: It is not a positive integer.
    """
    text = os.environ.get(OPTION, str(MAX_UNROLLED)) if given is None else str(given)
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"the limit of unrolled nodes is {text!r}, expected an integer of 1 or more",
            hint=f"give max_unrolled=... or set {OPTION}",
        )
    return int(text)


class Unroller:
    """Counts the nodes that unrolled loops amount to."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, trips: int, body: onnx.GraphProto) -> None:
        """Count a loop.

        Raises:
            UnsupportedOpError: All loops together exceed the limit.
        """
        nodes = sum(1 for n in body.node if n.op_type != "Constant")
        if self.used + trips * nodes > self.limit:
            raise UnsupportedOpError(
                f"its {trips} iterations of {nodes} nodes exceed the limit of {self.limit} nodes "
                f"for unrolled loops (raise it with max_unrolled=... or {OPTION})"
            )
        self.used += trips * nodes


# ------------------------------------------------------------------------------------------ If


def convert_if(ctx: OpContext, open_graph: Open) -> Results:
    """Take the branch that a constant selects, else compute both and select."""
    condition = ctx.input(0)
    if condition.type.size != 1:
        raise ModelError(f"its condition has shape {list(condition.shape)}, expected one element")
    then, other = (open_graph(ctx.attr(k)) for k in ("then_branch", "else_branch"))
    if condition.data is not None:
        return (then if bool(condition.data.reshape(-1)[0]) else other)(())
    results: Results = []
    for i, (a, b) in enumerate(zip(then(()), other(()), strict=False)):
        if a is None or b is None or not ctx.wanted[i]:
            results.append(None)
            continue
        if a.type != b.type:
            raise UnsupportedOpError(
                f"its condition is computed at run time and its branches return {a.type} and "
                f"{b.type}; compiling needs one type"
            )
        results.append(a if a is b else _select(ctx, condition, a, b))
    return results


def _select(ctx: OpContext, condition: Value, a: Value, b: Value) -> Value:
    flag = reshape(ctx, condition, (1,) * a.type.rank)
    return ctx.emit("where", flag, a, b)


# ---------------------------------------------------------------------------------------- Loop


def convert_loop(ctx: OpContext, open_graph: Open, unroller: Unroller) -> Results:
    """Unroll a loop whose trip count, or whose every condition, is constant."""
    graph: onnx.GraphProto = ctx.attr("body")
    count, keep = ctx.get(0), ctx.get(1)
    state: Results = list(ctx.inputs[2:])
    scans = len(graph.output) - 1 - len(state)
    if len(graph.input) != len(state) + 2 or scans < 0:
        raise ModelError(
            f"its body has {len(graph.input)} inputs and {len(graph.output)} outputs for "
            f"{len(state)} carried values"
        )
    trips = None if count is None else int(ctx.static(0, "trip count").reshape(-1)[0])
    if keep is not None and keep.data is not None and not bool(keep.data.reshape(-1)[0]):
        trips = 0
    if trips is not None:
        unroller.take(max(trips, 0), graph)
    body = open_graph(graph)
    collected: list[Results] = [[] for _ in range(scans)]
    active = keep if keep is None or keep.data is None else None
    done = 0
    while trips is None or done < trips:
        if trips is None:
            unroller.take(1, graph)
        index = ctx.constant(np.asarray(done, np.int64), "iteration")
        flag = keep if keep is not None else ctx.constant(np.asarray(True), "condition")
        found = body([index, flag, *state])
        keep, after = found[0], found[1 : 1 + len(state)]
        if active is not None:
            _check_predicable(scans)
            after = [_kept(ctx, active, a, b) for a, b in zip(after, state, strict=True)]
        state = after
        for parts, part in zip(collected, found[1 + len(state) :], strict=True):
            parts.append(part)
        done += 1
        if keep is None:
            return [None] * (len(state) + scans)
        if keep.data is not None:
            if not bool(keep.data.reshape(-1)[0]):
                break
        elif trips is None:
            raise UnsupportedOpError("it has no trip count, and its condition is computed at run "
                                     "time; compiling needs one of them as a constant")  # fmt: skip
        elif done < trips:
            active = keep if active is None else ctx.emit("and", _scalar(ctx, active),
                                                          _scalar(ctx, keep))  # fmt: skip
            _check_predicable(scans)
    return [*state, *(_stacked(ctx, parts, 0) for parts in collected)]


def _check_predicable(scans: int) -> None:
    if scans:
        raise UnsupportedOpError(
            "its condition is computed at run time and decides the shape of its scan outputs; "
            "compiling needs the condition as a constant"
        )


def _scalar(ctx: OpContext, v: Value) -> Value:
    return reshape(ctx, v, ())


def _kept(ctx: OpContext, active: Value, new: Value | None, old: Value | None) -> Value | None:
    """Return the new value of a carried one while the loop runs, then the old one."""
    if new is None or old is None or new is old:
        return new
    if new.type != old.type:
        raise UnsupportedOpError(
            f"its condition is computed at run time and a carried value changes from {old.type} "
            f"to {new.type}"
        )
    return _select(ctx, active, new, old)


def _stacked(ctx: OpContext, parts: Results, axis: int) -> Value | None:
    """Stack the scan outputs of all iterations."""
    given = [v for v in parts if v is not None]
    if len(given) < len(parts):
        return None
    if not given:
        raise UnsupportedOpError("it runs no iteration, so its scan outputs are empty")
    at = axis if axis >= 0 else axis + given[0].type.rank + 1
    shape = given[0].shape
    if any(v.type != given[0].type for v in given):
        raise UnsupportedOpError("its scan outputs change their shape between iterations")
    wide = [reshape(ctx, v, (*shape[:at], 1, *shape[at:])) for v in given]
    return wide[0] if len(wide) == 1 else ctx.emit("concat", *wide, axis=at)


# ---------------------------------------------------------------------------------------- Scan


def convert_scan(ctx: OpContext, open_graph: Open, unroller: Unroller) -> Results:
    """Unroll a scan over the entries of its scan inputs."""
    graph: onnx.GraphProto = ctx.attr("body")
    if ctx.version >= 9:
        return _scan(ctx, open_graph(graph), graph, list(ctx.inputs), unroller)
    lens = ctx.get(0)
    operands = list(ctx.inputs[1:])
    if lens is not None:
        raise UnsupportedOpError("sequences of different lengths are not supported")
    batches = {v.shape[0] for v in operands if v is not None and v.type.rank}
    if len(batches) != 1:
        raise ModelError(f"its operands have the batches {sorted(batches)}, expected one")
    body = open_graph(graph)
    per_batch = [
        _scan(ctx, body, graph, [_entry(ctx, v, b, 0) for v in operands], unroller)
        for b in range(batches.pop())
    ]
    return [_stacked(ctx, list(parts), 0) for parts in zip(*per_batch, strict=True)]


def _entry(ctx: OpContext, v: Value | None, i: int, axis: int) -> Value | None:
    """Return entry `i` of an axis, without the axis."""
    if v is None:
        return None
    axis = normal_axis(axis, v.type.rank)
    part = v
    if v.shape[axis] > 1:
        part = ctx.emit("slice", v, starts=(i,), ends=(i + 1,), axes=(axis,), steps=(1,))
    return reshape(ctx, part, v.shape[:axis] + v.shape[axis + 1 :])


def _scan(
    ctx: OpContext,
    body: Branch,
    graph: onnx.GraphProto,
    operands: Results,
    unroller: Unroller,
) -> Results:
    count = int(ctx.attr("num_scan_inputs"))
    if not 1 <= count <= len(operands):
        raise ModelError(f"num_scan_inputs is {count}, it has {len(operands)} operands")
    state, sequences = operands[: len(operands) - count], operands[len(operands) - count :]
    if len(graph.input) != len(operands) or len(graph.output) < len(state):
        raise ModelError("the inputs and outputs of its body do not fit its operands")
    scans = len(graph.output) - len(state)
    name = "scan_input_directions" if ctx.version >= 9 else "directions"
    backwards = _numbers(ctx, name, count)
    axes = _numbers(ctx, "scan_input_axes", count)
    extents = {
        v.shape[normal_axis(axis, v.type.rank)]
        for v, axis in zip(sequences, axes, strict=True)
        if v is not None
    }
    if None in sequences or len(extents) != 1:
        raise ModelError(f"its scan inputs have the lengths {sorted(extents)}, expected one")
    trips = extents.pop()
    unroller.take(trips, graph)
    collected: list[Results] = [[] for _ in range(scans)]
    for i in range(trips):
        entries = [
            _entry(ctx, v, trips - 1 - i if back else i, axis)
            for v, axis, back in zip(sequences, axes, backwards, strict=True)
        ]
        found = body([*state, *entries])
        state = found[: len(state)]
        for parts, part in zip(collected, found[len(state) :], strict=True):
            parts.append(part)
    turned = _numbers(ctx, "scan_output_directions", scans)
    out_axes = _numbers(ctx, "scan_output_axes", scans)
    stacks = [
        _stacked(ctx, parts[::-1] if back else parts, axis)
        for parts, axis, back in zip(collected, out_axes, turned, strict=True)
    ]
    return [*state, *stacks]


def _numbers(ctx: OpContext, name: str, count: int) -> list[int]:
    """Return an attribute of one integer per scan input or output, zeros by default."""
    value: Any = ctx.attr(name)
    found = [0] * count if not value else [int(n) for n in value]
    if len(found) != count:
        raise ModelError(f"{name} has {len(found)} entries, expected {count}")
    return found
