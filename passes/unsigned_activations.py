# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Hold every 8-bit activation as uint8: x86 dot instructions multiply u8 activations by s8 weights.

int8 with zero point z and uint8 with zero point z + 128 are the same grid shifted by 128, so only
types, table entries and constants change, never a real value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import numpy as np

from qcompiler.ir import Graph, Value
from qcompiler.ops import OpKind
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import DType, QuantParams, TensorType


@dataclass(frozen=True)
class UnsignedActivations(Pass):
    """Shift int8 activations (not weights, not graph inputs and results) to uint8."""

    name: ClassVar[str] = "unsigned_activations"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was shifted."""
        del ctx
        changed = False
        kept = _kept_signed(graph)
        for v in graph.inputs:
            if _is_signed(v) and v.uses and v not in kept:
                changed = True
                t = shifted(v.type)
                first = graph.nodes[0]
                new = graph.add("requantize", [v], types=[t], name=v.name + "_u8", before=first)
                for node, i in v.uses:
                    if node is not new:
                        graph.set_input(node, i, new.output)
        for node in graph.nodes:
            for v in node.outputs:
                if not _is_signed(v) or v in kept:
                    continue
                changed = True
                if node.op.name == "table":
                    entries = node.input(1)
                    data = (entries.array().astype(np.int16) + 128).astype(np.uint8)
                    graph.set_input(node, 1, graph.constant(data, entries.name))
                old = v.type
                graph.set_type(v, shifted(old))
                if graph.is_output(v):
                    back = graph.add("requantize", [v], types=[old], name=v.name + "_s8")
                    graph.set_outputs([(n, back.output if o is v else o) for n, o in graph.outputs])
            for i, operand in enumerate(node.inputs):
                if operand is None or not operand.is_constant or not _is_signed(operand):
                    continue
                if node.op.name in ("qconv", "qmatmul") and i == 1:
                    continue
                if node.op.name == "dequantize" or operand in kept:
                    continue
                changed = True
                data = (operand.array().astype(np.int16) + 128).astype(np.uint8)
                q = shifted(operand.type).qparams
                graph.set_input(node, i, graph.constant(data, operand.name, q))
        return changed


def shifted(t: TensorType) -> TensorType:
    """Return the uint8 type of the same grid as an int8 type."""
    q = t.qparams
    if q is None:
        return t
    moved = QuantParams(
        q.scale,
        np.asarray(q.zero_point, np.int32) + 128,
        DType.UINT8,
        q.qmin + 128,
        q.qmax + 128,
        q.granularity,
    )
    return TensorType(t.shape, DType.UINT8, moved)


def _is_signed(v: Value) -> bool:
    return v.dtype is DType.INT8 and v.qparams is not None and v.qparams.is_per_tensor


def _kept_signed(graph: Graph) -> set[Value]:
    """Values read only as second operands of products: the dot instruction wants those signed.

    Movement operators tie their operands and results together, so whole groups are decided.
    """
    ties = nx.Graph()
    for v in graph.values():
        if _is_signed(v):
            ties.add_node(v)
    for node in graph.nodes:
        if node.op.kind is OpKind.MOVEMENT:
            tied = [v for v in (*node.operands, *node.outputs) if _is_signed(v)]
            nx.add_path(ties, tied)
    kept: set[Value] = set()
    for group in nx.connected_components(ties):
        uses = [u for v in group for u in v.uses if u[0].op.kind is not OpKind.MOVEMENT]
        if uses and all(n.op.name == "qmatmul" and i == 1 for n, i in uses):
            kept |= group
    return kept
