# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Moving a positive factor per channel from one operator into the products that read it.

y[c] = f(x)[c] and z = g(y): with f(x)[c] / s[c] and g reading s[c] * y[c] the network means the
same as before. The producer is a product or a layer normalization; between it and its readers may
stand operators for which f(a * x) = a * f(x), a > 0, channel by channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import OpKind
from qcompiler.plan import integer_obstacle
from qcompiler.types import Array

HOMOGENEOUS = frozenset({"relu", "leaky_relu", "max_pool", "average_pool"})


@dataclass(frozen=True)
class Joint:
    """A producer, the value that its readers read, and these products.

    Attributes:
        producer: Product or layer normalization.
        value: What the readers read, after any homogeneous operators.
        readers: Products that read the value as their first operand; nothing else reads it.
        ceiling: Upper bound of a clamp between them. A factor that makes a channel larger then
            only fits as far as the channel stays below it.
    """

    producer: Node
    value: Value
    readers: tuple[Node, ...]
    ceiling: float | None = None


def joints(graph: Graph, *, clamped: bool = False) -> list[Joint]:
    """Return the places of a FLOAT graph where channels can be scaled, in order.

    Args:
        graph: The graph.
        clamped: Also those with a clamp from 0 to a bound in between.
    """
    found = []
    for node in graph.nodes:
        if not _scalable(node):
            continue
        value, ceiling = node.output, None
        while len(value.uses) == 1 and not graph.is_output(value):
            follower = value.users[0]
            bound = _ceiling(follower) if clamped and ceiling is None else None
            if bound is not None:
                ceiling = bound
            elif follower.op.name not in HOMOGENEOUS:
                break
            value = follower.output
        readers = value.users
        if not readers or graph.is_output(value):
            continue
        if all(i == 0 and _reads_channels(n, node) for n, i in value.uses):
            found.append(Joint(node, value, readers, ceiling))
    return found


def _ceiling(node: Node) -> float | None:
    """Return the upper bound of a clamp that begins at 0."""
    if node.op.name != "clip" or node.attr("min") != 0.0 or node.attr("max") is None:
        return None
    bound = float(node.attr("max"))
    return bound if 0 < bound < np.inf else None


def _plain_product(node: Node) -> bool:
    return (
        node.op.name in ("conv", "matmul")
        and node.op.kind is OpKind.COMPUTE
        and integer_obstacle(node) is None
        and node.input(1).is_constant
        and (node.op.name == "conv" or node.input(1).type.rank == 2)
        and not (
            node.op.name == "matmul" and (node.attr("transpose_a") or node.attr("transpose_b"))
        )
    )


def _scalable(node: Node) -> bool:
    if node.op.name == "layer_norm":
        return integer_obstacle(node) is None
    return _plain_product(node)


def _reads_channels(reader: Node, producer: Node) -> bool:
    """Whether the reader's input channels are the producer's output channels."""
    return _plain_product(reader) and (reader.op.name == "conv") == (producer.op.name == "conv")


def output_range(node: Node) -> Array:
    """Return the greatest magnitude of the weights behind each output channel of a product."""
    w = np.abs(node.input(1).array())
    axis = 0 if node.op.name == "conv" else 1
    return _max_but(w, axis)


def input_range(node: Node) -> Array:
    """Return the greatest magnitude of the weights that each input channel of a product meets."""
    w = np.abs(node.input(1).array())
    if node.op.name != "conv":
        return _max_but(w, 0)
    groups = int(node.attr("group"))
    split = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])  # [G, O/G, I/G, kh, kw]
    found: Array = split.max(axis=(1, *range(3, split.ndim))).reshape(-1)
    return found


def _max_but(w: Array, axis: int) -> Array:
    found: Array = w.max(axis=tuple(i for i in range(w.ndim) if i != axis))
    return found


def divide_output(graph: Graph, node: Node, s: Array) -> None:
    """Divide the output channels of a product or a layer normalization by s."""
    if node.op.name == "layer_norm":
        width = node.input(0).shape[-1]
        scale, bias = node.optional(1), node.optional(2)
        old = np.ones(width) if scale is None else scale.array().astype(np.float64)
        _replace(graph, node, 1, old / s, scale)
        if bias is not None:
            _replace(graph, node, 2, bias.array() / s, bias)
        return
    w, bias = node.input(1), node.optional(2)
    shape = [1] * w.type.rank
    shape[0 if node.op.name == "conv" else 1] = s.size
    _replace(graph, node, 1, w.array() / s.reshape(shape), w)
    if bias is not None:
        _replace(graph, node, 2, np.broadcast_to(bias.array(), s.shape) / s, bias)


def multiply_input(graph: Graph, node: Node, s: Array) -> None:
    """Multiply the weights of a product by s along its input channels."""
    w = node.input(1)
    if node.op.name != "conv":
        _replace(graph, node, 1, w.array() * s[:, None], w)
        return
    groups = int(node.attr("group"))
    data = w.array()
    split = data.reshape(groups, data.shape[0] // groups, *data.shape[1:])
    factors = s.reshape(groups, 1, -1, *[1] * (data.ndim - 2))
    _replace(graph, node, 1, (split * factors).reshape(data.shape), w)


def _replace(graph: Graph, node: Node, i: int, data: Array, old: Value | None) -> None:
    base = f"{node.name}_scale" if old is None else f"{old.name}_scaled"
    graph.set_input(node, i, graph.constant(data.astype(np.float32), graph.fresh(base)))
