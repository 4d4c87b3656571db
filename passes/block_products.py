# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products of a model's own weights in blocks, with activations quantized at run time.

Before -> after:

    matmul(x, dequantize(w in blocks along K))  ->  dynamic_matmul(q, w, s)
                                                    (q, s) = dynamic_quantize(x, in the same blocks)

A model says that its weights are integers, not that its activations may be: only who compiles it
can.  (`MatMulNBits` at accuracy_level 4 says both, and is imported so.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics_dynamic import RUN_TIME_GRID, blocked_weights
from qcompiler.ops import Stage
from qcompiler.passes.fuse_moves import succeed
from qcompiler.passmanager import Pass, PassContext
from qcompiler.plan import WHOLE_GROUP, summed_axis
from qcompiler.types import DType, PerGroup, QuantParams, TensorType


@dataclass(frozen=True)
class BlockProducts(Pass):
    """Quantize the activations of products by weights in blocks at run time."""

    name: ClassVar[str] = "block_products"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.INTEGER, Stage.INTEGER)

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything changed."""
        del ctx
        quantized: dict[tuple[Value, int], Node] = {}
        changed = False
        for node in graph.nodes:
            held = _held(node)
            if held is not None and held.qparams is not None:
                _rewrite(graph, node, held, held.qparams, quantized)
                changed = True
        if changed:
            graph.eliminate_dead()
            graph.sort()
        return changed


def _held(node: Node) -> Value | None:
    """Return the weights of a product in blocks that integers serve, or None."""
    if node.op.name != "matmul" or node.attr("transpose_a"):
        return None
    x, w = node.input(0), node.input(1)
    if w.producer is None or w.producer.op.name != "dequantize":
        return None
    held = w.producer.input(0)
    q, axis = held.qparams, summed_axis(node)
    if q is None or not held.is_constant or held.type.rank != 2 or held.dtype.bits not in (4, 8):
        return None
    if not isinstance(q.granularity, PerGroup) or q.granularity.axis != axis:
        return None
    size = q.granularity.group_size
    bias = node.optional(2)
    fits = x.dtype is DType.FLOAT32 and x.type.rank >= 2 and not x.is_constant
    fits = fits and (bias is None or (bias.is_constant and bias.shape == node.output.shape[-1:]))
    return held if fits and size % WHOLE_GROUP == 0 and held.shape[axis] % size == 0 else None


def _rewrite(
    graph: Graph,
    node: Node,
    held: Value,
    q: QuantParams,
    quantized: dict[tuple[Value, int], Node],
) -> None:
    assert isinstance(q.granularity, PerGroup)
    x, out, size = node.input(0), node.output, q.granularity.group_size

    codes, grid = blocked_weights(held.array(), q)
    ints, scale = _quantizer(graph, x, size, node, quantized).outputs
    new = graph.add(
        "dynamic_matmul",
        [ints, graph.constant(codes, held.name, grid), scale, node.optional(2), node.optional(3)],
        {"act_min": node.attr("act_min"), "act_max": node.attr("act_max")},
        before=node,
        sources=node.sources,
    )
    graph.replace_node(node, new.output)
    succeed(new, node, out)


def _quantizer(
    graph: Graph, x: Value, size: int, before: Node, made: dict[tuple[Value, int], Node]
) -> Node:
    """Return the node that quantizes activations in blocks; products that share them share it."""
    if (x, size) not in made:
        scales = (*x.shape[:-1], x.shape[-1] // size)
        made[x, size] = graph.add(
            "dynamic_quantize",
            [x],
            {"per": "block", "block": size},
            types=[
                TensorType(x.shape, DType.INT8, RUN_TIME_GRID),
                TensorType(scales, DType.FLOAT32),
            ],
            name=f"{x.name}_quantize",
            names=[f"{x.name}_q", f"{x.name}_scale"],
            before=before,
        )
    return made[x, size]
