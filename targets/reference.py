# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The interpreter as a target: no TVM, every operator, exact integers, and slow.

It defines what the others must return, and is the template for a new backend.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from qcompiler.artifact import Artifact
from qcompiler.errors import ArtifactError
from qcompiler.graph_json import graph_from_json, graph_to_json
from qcompiler.interpreter import run
from qcompiler.ir import Graph, Node
from qcompiler.manifest import loads
from qcompiler.passmanager import Pass, ProgressFn, no_progress
from qcompiler.plan import precision_of
from qcompiler.targets.base import Backend, Built, Region, Support, TargetSpec, TuningBudget
from qcompiler.types import Array, Precision

SPEC = TargetSpec(
    name="reference",
    description="the numpy interpreter: exact, runs anywhere, slow",
    precisions=tuple(Precision),
)


class ReferenceBackend(Backend):
    """Stores the graph and interprets it at run time."""

    def supports(self, node: Node) -> Support:
        """Every operator of the table has a numpy meaning."""
        del node
        return Support(True)

    def passes(self) -> tuple[Pass, ...]:
        """The graph is run as it is."""
        return ()

    def lower(self, graph: Graph, progress: ProgressFn = no_progress) -> Graph:
        """Return the graph."""
        progress("lower", 1, 1)
        return graph

    def build(
        self, lowered: Graph, tuning: TuningBudget, progress: ProgressFn = no_progress
    ) -> Built:
        """Store the graph as JSON and its constants as parameters."""
        del tuning
        doc, constants = graph_to_json(lowered)
        progress("build", 1, 1)
        return Built(
            library=None,
            parameters=tuple(constants),
            parameter_names=tuple(v.name for v in lowered.constants()),
            graph=lowered,
            regions=tuple(
                Region(n.name, (n.op.name,), n.sources, precision_of(n), ()) for n in lowered.nodes
            ),
            members={"graph.json": json.dumps(doc, separators=(",", ":")).encode()},
            executor="interpreter",
        )


def make(name: str) -> Backend:
    """Entry point: return the backend."""
    del name
    return ReferenceBackend(SPEC)


class GraphExecutor:
    """Runs a stored graph on arrays in the order of its inputs and outputs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def run(self, inputs: Sequence[Array], *, threads: int = 1) -> list[Array]:
        """Return the graph's results in order; numpy decides about threads."""
        del threads
        named = {v.name: a for v, a in zip(self.graph.inputs, inputs, strict=True)}
        results = run(self.graph, named)
        return [results[name] for name, _ in self.graph.outputs]


def load_executor(artifact: Artifact) -> GraphExecutor:
    """Return the executor of a stored artifact.

    Raises:
        ArtifactError: The stored graph is missing or not valid.
    """
    stored = artifact.extras.get("graph.json")
    if stored is None:
        raise ArtifactError("the artifact holds no graph for the interpreter")
    doc = loads(bytes(stored), "graph.json")
    return GraphExecutor(graph_from_json(doc, artifact.params.arrays))
