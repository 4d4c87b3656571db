# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Hold 8-bit activations as uint8: x86 dot instructions multiply u8 by s8; 16 bits as int16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import networkx as nx

from qcompiler.ir import Graph, Value
from qcompiler.ops import OpKind
from qcompiler.passes.signedness import hold_activations, is_activation
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import DType


@dataclass(frozen=True)
class UnsignedActivations(Pass):
    """Shift int8 activations (not weights, graph inputs and results) to uint8, uint16 to int16."""

    name: ClassVar[str] = "unsigned_activations"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was shifted."""
        del ctx
        sixteen = hold_activations(graph, DType.INT16)  # what kernels read and write
        return hold_activations(graph, DType.UINT8, _kept_signed(graph)) or sixteen


def _is_signed(v: Value) -> bool:
    return is_activation(v, DType.INT8)


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
