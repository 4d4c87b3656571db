# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Choose an observer for each activation by the error that its range causes in what reads it.

The histogram of one pass gives the range of every observer. On some of the samples each product is
run on its operand rounded to each of the ranges; the range with the least squared error of the
product's result, over all the products that read the value, is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from qcompiler.data import Batch
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import choose_qparams, fake_quantize
from qcompiler.onnx_export import subgraph_to_onnx
from qcompiler.ops import OpKind
from qcompiler.ort import Session
from qcompiler.passes.observers import Observer, ObserverName, TensorStats
from qcompiler.passes.sample_axes import Filled
from qcompiler.passes.trails import Trail
from qcompiler.types import Array

CANDIDATES: tuple[ObserverName, ...] = ("mse", "minmax", "percentile", "entropy")
"""In the order of preference among equals."""

Range = tuple[float, float]


def candidate_ranges(stats: TensorStats, percentile: float) -> dict[ObserverName, Range]:
    """Return the range that each observer makes of one summary."""
    return {k: Observer(k, percentile).range(stats) for k in CANDIDATES}


def choose_observers(
    graph: Graph,
    ranges: Mapping[str, Mapping[ObserverName, Range]],
    batches: Iterable[Batch],
) -> dict[str, ObserverName]:
    """Return the observer of each value that a product reads and whose ranges differ.

    Args:
        graph: FLOAT graph.
        ranges: Value name -> range by observer.
        batches: The runs to measure on.
    """
    runs = list(batches)
    trail, filled = Trail(graph, runs), Filled(graph)
    errors: dict[str, dict[ObserverName, float]] = {}
    for node in graph.nodes:
        if node.op.kind is not OpKind.COMPUTE:
            continue
        operands = [
            (i, v)
            for i, v in enumerate(node.operands[:2])
            if not v.is_constant and len(set(ranges.get(v.name, {}).values())) > 1
        ]
        if not operands:
            continue
        trail.advance(node)
        session = Session(subgraph_to_onnx([node], outputs=[node.output]).SerializeToString())
        read = [v for v in dict.fromkeys(node.operands) if not v.is_constant]
        for found, batch in zip(trail.values(read), runs, strict=True):
            exact = filled.real(node.output, _run(session, node, found), batch)
            power = float((exact.astype(np.float64) ** 2).sum()) or 1.0
            for _, v in operands:
                sums = errors.setdefault(v.name, dict.fromkeys(CANDIDATES, 0.0))
                for kind, (lo, hi) in ranges[v.name].items():
                    rounded = fake_quantize(found[v.name], choose_qparams(lo, hi))
                    y = _run(session, node, {**found, v.name: rounded})
                    y = filled.real(node.output, y, batch)
                    sums[kind] += float(((y - exact).astype(np.float64) ** 2).sum()) / power
    return {name: min(CANDIDATES, key=lambda k: e[k]) for name, e in errors.items()}


def _run(session: Session, node: Node, values: Mapping[str, Array]) -> Array:
    output: Value = node.output
    return session.run({n: values[n] for n in session.input_names})[output.name]
