# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights in fewer bits become float32, for targets whose float products take nothing else.

Before -> after:  matmul(x, dequantize(w4)) -> matmul(x, w), the same numbers
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.interpreter import known
from qcompiler.ir import Graph
from qcompiler.passmanager import Pass, PassContext


@dataclass(frozen=True)
class WidenWeights(Pass):
    """Replace a cast or dequantize of a constant, read by a float product, by a constant."""

    name: ClassVar[str] = "widen_weights"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was widened."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name not in ("conv", "matmul"):
                continue
            w = node.input(1)
            data = None if w.is_constant else known(w)
            if data is not None:
                graph.set_input(node, 1, graph.constant(data, w.name))
                changed = True
        if changed:
            graph.eliminate_dead()
        return changed
