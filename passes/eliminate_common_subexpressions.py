# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Compute equal things once: equal constants become one, and so do equal nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.rewrite import merged_sources
from qcompiler.passmanager import Pass, PassContext


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merge nodes with the same operator, operands, attributes and result types.

    The first in topological order stays, and stands for the sources of both. All operators are
    functions of their operands, so this is always right. O(nodes + bytes of constants).
    """

    name: ClassVar[str] = "eliminate_common_subexpressions"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was merged."""
        del ctx
        changed = _merge_constants(graph)
        first: dict[Hashable, Node] = {}
        for node in graph.nodes:
            key = (
                node.op.name,
                node.inputs,
                tuple(sorted((k, repr(v)) for k, v in node.attrs.items())),
                tuple(v.type for v in node.outputs),
            )
            kept = first.setdefault(key, node)
            if kept is node:
                continue
            for old, new in zip(node.outputs, kept.outputs, strict=True):
                if graph.is_output(old) and new.batch_axis is None:
                    new.batch_axis = old.batch_axis
            kept.sources = merged_sources(kept, node)
            graph.replace_node(node, *kept.outputs)
            changed = True
        return changed


def _merge_constants(graph: Graph) -> bool:
    first: dict[Hashable, Value] = {}
    changed = False
    for v in graph.constants():
        digest = hashlib.sha256(v.array().tobytes()).digest()
        kept = first.setdefault((v.type, digest), v)
        if kept is not v:
            graph.replace_uses(v, kept)
            changed = True
    return changed
