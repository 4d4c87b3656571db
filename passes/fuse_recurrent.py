# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Recurrent cells whose weights and hidden states are quantized become integer operators.

    quantize(lstm(gates, dequantize(r), ...).y)  ->  qlstm(gates, r, ...).y

The quantize gives the grid on which the loop holds its hidden state.
"""

from __future__ import annotations

from qcompiler.ir import Graph, Node
from qcompiler.ops import OpKind
from qcompiler.ops._recurrence import cell_of, settles
from qcompiler.passes.fuse_moves import dequantized
from qcompiler.types import DType, PerAxis, TensorType


def fuse_recurrent(graph: Graph) -> bool:
    """Rewrite what matches; return whether anything did."""
    changed = False
    for node in graph.nodes:
        if node.graph is not None and node.op.kind is OpKind.RECURRENT:
            changed |= _fuse(graph, node)
    if changed:
        graph.eliminate_dead()
    return changed


def _fuse(graph: Graph, node: Node) -> bool:
    if node.op.declared:
        return False
    r, y = dequantized(node.input(1)), node.outputs[0]
    ends = [n for n in y.users if n.op.name == "quantize"]
    if r is None or not r.is_constant or r.qparams is None or len(ends) != 1:
        return False
    q, held = r.qparams, ends[0].output
    grid = held.qparams
    columns = q.is_per_tensor or q.granularity == PerAxis(1)
    if not columns or not q.is_symmetric or r.dtype not in (DType.INT8, DType.INT4):
        return False
    if grid is None or not grid.is_per_tensor or grid.storage.bits > 8:
        return False
    if not all(settles(f) for f in cell_of(node.op.name, node.attrs).functions):
        return False
    operands = [node.input(0), r, *node.inputs[2:]]
    rest = [TensorType(v.shape, DType.FLOAT32) for v in node.outputs[1:]]
    new = graph.add(
        f"q{node.op.name}",
        operands,
        node.attrs,
        types=[held.type, *rest],
        before=node,
        sources=node.sources,
    )
    if len(y.uses) > 1 or graph.is_output(y):
        real = graph.add("dequantize", [new.outputs[0]], before=node, sources=node.sources)
        graph.replace_uses(y, real.output)
    graph.replace_uses(held, new.outputs[0])
    for old, value in zip(node.outputs[1:], new.outputs[1:], strict=True):
        graph.replace_uses(old, value)
    names = [held.name, *(v.name for v in node.outputs[1:])]
    graph.erase(ends[0])
    graph.erase(node)
    new.name = node.name  # plans are keyed by it
    for value, name in zip(new.outputs, names, strict=True):
        value.name = name
    return True
