# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What all post-training methods have in common: they may work on a part of the network only."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from qcompiler.blas import one_thread
from qcompiler.ir import Graph
from qcompiler.passmanager import Pass, PassContext
from qcompiler.plan import Decision, PrecisionPlan, selected
from qcompiler.types import Precision


@dataclass(frozen=True)
class Method(Pass):
    """A method that keeps accuracy.

    Attributes:
        only: Selector of the nodes that it works on: a region (`input:image`, `fusion`), a node
            name, a pattern over node names, or `op:NAME`. Whatever else the plan holds in integers
            counts as float meanwhile, for what the method aims at and for the test on held-out
            samples. Empty: all nodes.
    """

    only: str = ""

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Improve the graph, or the part of it that `only` selects.

        Raises:
            UsageError: `only` selects nothing.
        """
        with one_thread():  # one seed gives the same codes with any number of threads
            return self._improve_part(graph, ctx)

    def _improve_part(self, graph: Graph, ctx: PassContext) -> bool:
        """Improve the part of the graph that `only` selects."""
        if not self.only:
            return self.improve(graph, ctx)
        chosen = {n.name for n in selected(graph, self.only)}
        plan = ctx.get(PrecisionPlan)
        others = {
            name: Decision(Precision.FP32, f"left out by {self.spec()}")
            for name, d in plan.nodes.items()
            if d.precision.is_integer and name not in chosen
        }
        part = plan.replaced(others)
        ctx.put(part)
        try:
            modified = self.improve(graph, ctx)
            changed = ctx.get(PrecisionPlan).nodes
            plan = plan.replaced({n: d for n, d in changed.items() if d != part.nodes[n]})
        finally:
            ctx.put(plan)
        return modified

    @abc.abstractmethod
    def improve(self, graph: Graph, ctx: PassContext) -> bool:
        """Improve the products that the plan holds in integers; return whether anything changed."""
