# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Half precision: products of float16 weights on tensor cores, and halves between them.

The graph says `conv(x, cast(w16))`: float32 arithmetic with weights that half precision holds.
Tensor cores multiply halves and add in float32, so here, on a copy that only lowering sees, the
products read the weights as they are, and values turn to halves where all that touches them can:

    add(conv(x, cast(w16)), r)   ->   add(conv(cast16(x), w16), r), the result of conv in float16

Other weights in fewer bits become float32: no kernel unpacks them for a float product.
"""

from __future__ import annotations

import networkx as nx

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.widen_weights import WidenWeights
from qcompiler.passmanager import PassContext
from qcompiler.types import DType, TensorType

# Operators whose kernels convert every operand and result on its own. What spans too many
# magnitudes for halves (exp, powers, sums) stays float32.
_EITHER = frozenset({
    "relu", "clip", "leaky_relu", "gelu", "silu", "sigmoid", "tanh", "hard_sigmoid", "hard_swish",
    "elu", "softplus", "add", "sub", "mul", "max", "min", "average_pool", "reduce_mean", "softmax",
    "layer_norm", "transpose", "slice", "expand", "tile", "pad", "resize", "depth_to_space",
    "space_to_depth", "concat",
})  # fmt: skip
# Operators whose operand and result must be held alike.
_TIED = frozenset({"reshape", "max_pool"})
_READS = frozenset({"quantize"})


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


def with_halves(graph: Graph) -> Graph:
    """Return the graph itself, or a copy with half-precision products and values between them."""
    if not any(_reads_widened(n) for n in graph.nodes):
        return graph
    graph = graph.clone()
    products = {n for n in graph.nodes if half_weights(n) is not None}
    for node in products:
        held = half_weights(node)
        if held is not None:
            graph.set_input(node, 1, held)
    WidenWeights().run(graph, PassContext())
    graph.eliminate_dead()
    for v in _held_as_halves(graph, products):
        graph.set_type(v, TensorType(v.shape, DType.FLOAT16))
    for node in products:
        if node.output.dtype is DType.FLOAT16:
            _read_as_half(graph, node, 3)
        if not _is_depthwise(node):
            _read_as_half(graph, node, 0)
    graph.sort()
    return graph


def _reads_widened(node: Node) -> bool:
    return node.op.name in ("conv", "matmul") and node.input(1).producer is not None


def _is_depthwise(node: Node) -> bool:
    """Whether a convolution runs outside of the tensor cores, which takes floats of both widths."""
    return node.op.name == "conv" and node.input(1).shape[1] == 1 and int(node.attr("group")) > 1


def _held_as_halves(graph: Graph, products: set[Node]) -> set[Value]:
    """Return the float32 values that every reader and the writer can handle as halves."""
    able = _EITHER | _TIED
    candidates: set[Value] = set()
    for node in graph.nodes:
        if node not in products and node.op.name not in able:
            continue
        for v in node.outputs:
            fits = all(u in products or u.op.name in able | _READS for u in v.users)
            if v.dtype is DType.FLOAT32 and fits and not graph.is_output(v):
                candidates.add(v)
    ties = nx.Graph()
    ties.add_nodes_from(v for v in graph.values() if not v.is_constant)
    for node in graph.nodes:
        if node.op.name in _TIED:
            ties.add_edge(node.input(0), node.output)
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
    cast = graph.add("cast", [v], {"to": "float16"}, name=f"{node.name}/half", before=node)
    graph.set_input(node, i, cast.output)
