# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Half precision: products of float16 weights, and halves between them.

The graph says `conv(x, cast(w16))`: float32 arithmetic with weights that half precision holds.
Targets that multiply halves work, in lowering, on a copy where the activations of these products
are halves too, and values turn to halves where all that touches them can:

    add(conv(x, cast(w16)), r)   ->   add(conv(cast16(x), cast(w16)), r), the result of conv in
                                      float16
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import networkx as nx

from qcompiler.ir import Graph, Node, Value
from qcompiler.types import DType, TensorType

__all__ = ["HalfRules", "half_weights", "with_halves"]


def _any(node: Node) -> bool:
    del node
    return True


@dataclass(frozen=True)
class HalfRules:
    """Which kernels of a target take halves.

    Attributes:
        either: Operators whose kernels convert every operand and result on its own. What spans too
            many magnitudes for halves (exp, powers, sums) should stay float32.
        tied: Operators whose operands and result must be held alike.
        reads: Operators that read halves, and give something else.
        can: Whether a target has a kernel for a node of these, and for a product.
        reads_as_half: Whether a product needs its activations in halves.
    """

    either: frozenset[str]
    tied: frozenset[str]
    reads: frozenset[str] = frozenset()
    can: Callable[[Node], bool] = _any
    reads_as_half: Callable[[Node], bool] = _any


def half_weights(node: Node) -> Value | None:
    """Return the float16 constant that a product reads through a cast, or None."""
    if node.op.name not in ("conv", "matmul"):
        return None
    w = node.input(1)
    cast = w.producer
    if cast is None or cast.op.name != "cast":
        return None
    held = cast.input(0)
    return held if held.is_constant and held.dtype is DType.FLOAT16 else None


def with_halves(graph: Graph, rules: HalfRules) -> Graph:
    """Return the graph itself, or a copy with half-precision products and values between them."""
    if not any(half_weights(n) is not None and rules.can(n) for n in graph.nodes):
        return graph
    graph = graph.clone()
    products = {n for n in graph.nodes if half_weights(n) is not None and rules.can(n)}
    for v in _held_as_halves(graph, products, rules):
        graph.set_type(v, TensorType(v.shape, DType.FLOAT16))
    for node in [n for n in graph.nodes if n in products]:
        if node.output.dtype is DType.FLOAT16:
            _read_as_half(graph, node, 3)
        if rules.reads_as_half(node):
            _read_as_half(graph, node, 0)
    graph.sort()
    return graph


def _held_as_halves(graph: Graph, products: set[Node], rules: HalfRules) -> set[Value]:
    """Return the float32 values that every reader and the writer can handle as halves."""
    able = rules.either | rules.tied
    takes = products | {n for n in graph.nodes if n.op.name in able and rules.can(n)}
    reads = takes | {n for n in graph.nodes if n.op.name in rules.reads}
    candidates: set[Value] = set()
    for node in takes:
        for v in node.outputs:
            fits = v.dtype is DType.FLOAT32 and reads.issuperset(v.users)
            if fits and not graph.is_output(v):
                candidates.add(v)
    ties = nx.Graph()
    ties.add_nodes_from(v for v in graph.values() if not v.is_constant)
    for node in graph.nodes:
        if node.op.name in rules.tied:
            # A constant among them is never a candidate.
            ties.add_edges_from((v, node.output) for v in node.operands if v.dtype.is_float)
    held: set[Value] = set()
    for group in nx.connected_components(ties):
        if group <= candidates:
            held |= group
    return _near_products(graph, products, held)


def _near_products(graph: Graph, products: set[Node], held: set[Value]) -> set[Value]:
    """Return the values that lead to or from a product of halves through others of them."""
    near = nx.Graph()
    near.add_nodes_from(held)
    for node in graph.nodes:
        touched = [v for v in (*node.operands, *node.outputs) if v in held]
        if node in products:
            nx.add_star(near, [node, *touched])
        else:
            nx.add_path(near, touched)
    found: set[Value] = set()
    for node in products:
        found |= {v for v in nx.node_connected_component(near, node) if v in held}
    return found


def _read_as_half(graph: Graph, node: Node, i: int) -> None:
    """Make an operand of a product half precision, by a cast where it is not yet."""
    v = node.optional(i)
    if v is None or v.dtype is DType.FLOAT16:
        return
    for reader in v.users:  # one cast serves all
        if reader.op.name == "cast" and reader.output.dtype is DType.FLOAT16:
            graph.set_input(node, i, reader.output)
            return
    to = {"to": DType.FLOAT16.value}
    name = f"{node.name}/half"
    cast = graph.add("cast", [v], to, name=name, before=node, sources=node.sources)
    graph.set_input(node, i, cast.output)
