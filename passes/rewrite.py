# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What rewrites share: questions about constants and uses, and replacing values by name.

A rewrite that changes what a value means gives it the name of the value that it replaces, so that
names in the graph keep the meaning they have in the model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.types import Array, QuantParams


def only_use(graph: Graph, value: Value) -> bool:
    """Whether exactly one operand reads the value and the graph does not return it."""
    return len(value.uses) == 1 and not graph.is_output(value)


def producer_of(value: Value | None, *ops: str) -> Node | None:
    """Return the node that computes the value if it is one of these operators."""
    node = value.producer if value is not None else None
    return node if node is not None and node.op.name in ops else None


def scalar(value: Value | None) -> float | None:
    """Return the number that a plain constant of one element holds, else None."""
    if value is None or value.data is None or value.type.is_quantized or value.type.size != 1:
        return None
    return float(value.data.reshape(-1)[0])


def constant_operand(node: Node) -> tuple[int, Value] | None:
    """Return (index, constant) if exactly one of two operands is a plain constant."""
    found = [
        (i, v) for i, v in enumerate(node.operands) if v.is_constant and not v.type.is_quantized
    ]
    return found[0] if len(node.operands) == 2 and len(found) == 1 else None


def float_constant(value: Value | None) -> Array | None:
    """Return the elements of a plain floating-point constant, else None."""
    if value is None or value.data is None or not value.dtype.is_float:
        return None
    return value.data


def along_axis(data: Array, rank: int, axis: int, extent: int) -> Array | None:
    """Return a constant as one number per index of an axis, if it varies along no other.

    Args:
        data: A constant that broadcasts to a tensor of that rank.
        rank: Rank of the tensor.
        axis: The axis, counted from the front.
        extent: Its extent.

    Returns:
        Float64 vector [extent], or None where the constant varies elsewhere or adds axes.
    """
    if data.ndim > rank:
        return None
    full: Array = data.reshape((1,) * (rank - data.ndim) + data.shape)
    if full.size != full.shape[axis]:
        return None
    return np.broadcast_to(full.reshape(-1).astype(np.float64), (extent,))


def merged_sources(*nodes: Node) -> tuple[str, ...]:
    """Return the original node names that nodes stand for, each once."""
    return tuple(dict.fromkeys(s for n in nodes for s in n.sources))


def bypass(graph: Graph, node: Node, value: Value) -> None:
    """Replace the only result of a node by an existing value and erase the node."""
    _keep_batch(graph, node.output, value)
    graph.replace_node(node, value)


def absorb(graph: Graph, node: Node, into: Node) -> None:
    """Let `into` stand for `node` too: its result takes over the uses and the name."""
    old, new = node.output, into.output
    into.sources = merged_sources(into, node)
    _keep_batch(graph, old, new)
    graph.replace_node(node, new)
    new.name = old.name


def supersede(graph: Graph, root: Node, new: Node, *matched: Node) -> None:
    """Replace `root` by a new node that takes its names and stands for all matched nodes.

    Matched nodes (given inner ones first) that nothing reads any more are erased.
    """
    absorb(graph, root, new)
    new.sources = merged_sources(*matched, root)
    new.name = root.name
    for node in reversed(matched):
        dead = all(not v.uses and not graph.is_output(v) for v in node.outputs)
        if node is not root and dead:
            graph.erase(node)


def continued(graph: Graph, node: Node, build: Callable[[Value], Value], suffix: str) -> None:
    """Let what is made of the one result of a node take its place and its name.

    Args:
        graph: The graph.
        node: The node.
        build: Makes it.
        suffix: What the name of the node's own result gets.
    """
    out = node.output
    readers, name = out.uses, out.name
    y = build(out)
    for reader, at in readers:
        graph.set_input(reader, at, y)
    if graph.is_output(out):
        _keep_batch(graph, out, y)
        graph.set_outputs([(n, y if v is out else v) for n, v in graph.outputs])
    out.name = f"{name}_{suffix}"
    y.name = name


def _keep_batch(graph: Graph, old: Value, new: Value) -> None:
    if new.batch_axis is None and graph.is_output(old):
        new.batch_axis = old.batch_axis


def new_constant(
    graph: Graph, like: Value, data: Array, qparams: QuantParams | None = None
) -> Value:
    """Make a constant of the dtype of `like`, named after it."""
    if qparams is not None:
        return graph.constant(np.asarray(data, qparams.storage.numpy), like.name, qparams)
    return graph.constant(np.asarray(data, like.dtype.numpy), like.name, dtype=like.dtype)
