# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Models that were built but not packed: all their integers can be seen, and they run."""

from __future__ import annotations

from qcompiler.artifact import ParamBlock
from qcompiler.ir import Graph
from qcompiler.targets.base import Built
from qcompiler.vm import VmExecutor


def show_integers(graph: Graph) -> None:
    """Return every quantized result too, so that a difference shows where it starts."""
    named = set(graph.output_values)
    hidden = [v for n in graph.nodes for v in n.outputs if v.type.is_quantized]
    more = [(f"value:{v.name}", v) for v in hidden if v not in named]
    graph.set_outputs([*graph.outputs, *more])


def executor(built: Built) -> VmExecutor:
    """Return what runs the code on this machine."""
    assert built.library is not None
    block = ParamBlock.from_arrays({str(i): a for i, a in enumerate(built.parameters)})
    return VmExecutor(built.library, block.arrays)
