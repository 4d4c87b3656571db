# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The reference interpreter: runs a graph of any stage in numpy, exactly for integers.

It is the definition that every backend is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from qcompiler.errors import DataError, QCompilerError, VerificationError
from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import EvalContext
from qcompiler.types import Array

Observer = Callable[[Value, Array], None]


def run(
    graph: Graph,
    inputs: Mapping[str, Array],
    *,
    observe: Observer | None = None,
    keep: Collection[Value] = (),
) -> dict[str, Array]:
    """Run a graph and return its outputs by name.

    Args:
        graph: Graph of any stage.
        inputs: One array per graph input, of exactly its shape and dtype.
        observe: Called with each value and its elements: inputs first, then every result in
            order. The array must not be changed.
        keep: Values to return as well, under their own names (an output of that name wins).

    Returns:
        Elements of every graph output, then of every kept value.

    Raises:
        DataError: An input is missing, unknown, or of the wrong shape or dtype.
        VerificationError: An operator's result contradicts its declared type.
    """
    values = _bound_inputs(graph, inputs)
    kept: dict[str, Array] = {}
    wanted = set(keep)
    last = _last_reader(graph)

    def note(value: Value, array: Array) -> None:
        if observe is not None:
            observe(value, array)
        if value in wanted:
            kept[value.name] = array

    for value in graph.inputs:
        note(value, values[value])
    for value in wanted:
        if value.is_constant:
            kept[value.name] = value.array()
    for node in graph.nodes:
        results = evaluate(node, [_read(values, v) for v in node.inputs])
        for value, array in zip(node.outputs, results, strict=True):
            values[value] = array
            note(value, array)
        for value in (*node.operands, *node.outputs):
            if last.get(value, node) is node and value in values:
                del values[value]
    found = {name: np.asarray(_read(values, v)) for name, v in graph.outputs}
    return {**{k: v for k, v in kept.items() if k not in found}, **found}


def evaluate(node: Node, arrays: list[Array | None]) -> tuple[Array, ...]:
    """Evaluate one node and check its results against their declared types.

    Raises:
        VerificationError: A result has another shape or dtype than declared.
        QCompilerError: The operator's own error, with the node's name.
    """
    context = EvalContext(
        tuple(v.type if v is not None else None for v in node.inputs),
        tuple(v.type for v in node.outputs),
    )
    try:
        results = node.op.evaluate(arrays, node.attrs, context)
    except QCompilerError as error:
        error.node = error.node or node.name
        raise
    if len(results) != len(node.outputs):
        raise VerificationError(
            f"{node.name} ({node.op.name}) gave {len(results)} results, declares "
            f"{len(node.outputs)}",
            node=node.name,
        )
    for value, array in zip(node.outputs, results, strict=True):
        if tuple(array.shape) != value.shape or array.dtype != value.dtype.numpy:
            raise VerificationError(
                f"{node.name} ({node.op.name}) gave {array.dtype}{list(array.shape)} for "
                f"{value.name!r}, declared {value.type}",
                node=node.name,
                value=value.name,
            )
    return results


def known(value: Value) -> Array | None:
    """Return the elements of a constant, or of a constant that a cast or dequantize widens."""
    if value.is_constant:
        return value.array()
    node = value.producer
    if node is None or node.op.name not in ("cast", "dequantize") or not node.input(0).is_constant:
        return None
    return evaluate(node, [node.input(0).array()])[0]


def _read(values: Mapping[Value, Array], value: Value | None) -> Array | None:
    if value is None:
        return None
    return value.data if value.data is not None else values[value]


def _last_reader(graph: Graph) -> dict[Value, Node | None]:
    """Return the last node that reads each value; None for outputs, which are kept."""
    last: dict[Value, Node | None] = {}
    for node in graph.nodes:
        for value in node.operands:
            last[value] = node
    for value in graph.output_values:
        last[value] = None
    return last


def _bound_inputs(graph: Graph, inputs: Mapping[str, Array]) -> dict[Value, Array]:
    names = [v.name for v in graph.inputs]
    missing = [n for n in names if n not in inputs]
    unknown = [n for n in inputs if n not in set(names)]
    if missing or unknown:
        parts = []
        if missing:
            parts.append(f"missing {', '.join(missing)}")
        if unknown:
            parts.append(f"unknown {', '.join(map(str, unknown))}")
        raise DataError(
            f"graph {graph.name!r}: inputs {'; '.join(parts)}",
            hint=f"the graph takes {', '.join(names) or 'no inputs'}",
        )
    bound: dict[Value, Array] = {}
    for value in graph.inputs:
        array = np.asarray(inputs[value.name])
        if tuple(array.shape) != value.shape or array.dtype != value.dtype.numpy:
            raise DataError(
                f"input {value.name!r} is {array.dtype}{list(array.shape)}, expected "
                f"{value.dtype.numpy}{list(value.shape)}",
                value=value.name,
            )
        bound[value] = array
    return bound
