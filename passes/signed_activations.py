# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Hold every 8-bit activation as int8: ARM dot instructions multiply s8 by s8; 16 bits as int16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph
from qcompiler.passes.signedness import hold_activations
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import DType


@dataclass(frozen=True)
class SignedActivations(Pass):
    """Shift unsigned activations (not weights, not graph inputs and results) to signed ones."""

    name: ClassVar[str] = "signed_activations"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was shifted."""
        del ctx
        sixteen = hold_activations(graph, DType.INT16)
        return hold_activations(graph, DType.INT8) or sixteen
