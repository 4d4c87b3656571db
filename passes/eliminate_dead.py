# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Erase nodes whose results nothing reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph
from qcompiler.passmanager import Pass, PassContext


@dataclass(frozen=True)
class EliminateDead(Pass):
    """Erase dead nodes; inputs stay, they are the model's interface."""

    name: ClassVar[str] = "eliminate_dead"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was erased."""
        del ctx
        return graph.eliminate_dead() > 0
