# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Correct biases: rounding must not shift the mean of a product's result.

By data: products are corrected in the order of the network, each with what comes before it
quantized and already corrected: b += E[y float] - E[y quantized] per output channel. Analytic: from
the rounding of the weights and the means of the float network's activations alone, in one pass:
b += (W - W rounded) E[x]; borders, where padding lowers the mean, are left out of account.

Source: Nagel et al., arXiv 1906.04721, section 4.2 and appendix.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from qcompiler.data import Batch
from qcompiler.ir import Graph, Node
from qcompiler.numerics import dequantize
from qcompiler.onnx_export import to_onnx
from qcompiler.ops import Stage
from qcompiler.ort import Session
from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable
from qcompiler.passes.held_out import (
    FloatModel,
    Judge,
    quantized,
    shares,
    verdict,
    weighted_products,
)
from qcompiler.passes.insert_qdq import WeightGrids
from qcompiler.passes.method import Method
from qcompiler.passes.single_node import prefix_model
from qcompiler.passmanager import PassContext
from qcompiler.plan import PrecisionPlan
from qcompiler.printer import digest
from qcompiler.types import Array


@dataclasses.dataclass(frozen=True)
class CorrectBias(Method):
    """Shift biases so that quantized products keep their mean."""

    name: ClassVar[str] = "correct_bias"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, CalibrationTable, PrecisionPlan)
    provides: ClassVar[tuple[type, ...]] = (CalibrationTable,)
    runs: int = 32  # calibration runs to average over, at most
    form: Literal["empirical", "analytic"] = "empirical"

    def improve(self, graph: Graph, ctx: PassContext) -> bool:
        """Correct, and undo it where held-out samples say that it is worse."""
        plan, table = ctx.get(PrecisionPlan), ctx.get(CalibrationTable)
        grids = ctx.find(WeightGrids)
        work, held_out = shares(ctx.get(CalibrationSet), self.runs)
        batches = list(work)
        names = weighted_products(graph, plan)
        if not names:
            return False
        known = ctx.find(FloatModel)
        reference = graph if known is None else known.graph
        judge = Judge(reference, list(held_out))
        before = judge.error(quantized(graph, plan, table, grids))
        changed = graph.clone()
        if self.form == "analytic":
            rounded = quantized(graph, plan, table, grids)
            means = operand_means(reference, names, batches)
            for name in names:
                lost = weight_error(reference.node(name), rounded.node(name))
                _shift(changed, changed.node(name), mean_shift(reference.node(name), lost, means))
        else:
            self._by_data(changed, reference, names, batches, ctx)
        after = judge.error(quantized(changed, plan, table, grids))
        kept, line = verdict(self.name, before, after)
        ctx.log.append(line)
        if not kept:
            return False
        for name in names:
            bias = changed.node(name).input(2)
            node = graph.node(name)
            graph.set_input(node, 2, graph.constant(bias.array(), graph.fresh(bias.name)))
        ctx.put(dataclasses.replace(table, graph=digest(graph)))
        return True

    def _by_data(
        self,
        changed: Graph,
        reference: Graph,
        names: list[str],
        batches: list[Batch],
        ctx: PassContext,
    ) -> None:
        """Correct the products of a graph one after the other."""
        plan, table = ctx.get(PrecisionPlan), ctx.get(CalibrationTable)
        grids = ctx.find(WeightGrids)
        wanted = _means(reference, names, batches)
        for done, name in enumerate(names):
            ctx.progress("correct_bias", done, len(names))
            found = _mean(quantized(changed, plan, table, grids), name, batches)
            _shift(changed, changed.node(name), wanted[name] - found)
        ctx.progress("correct_bias", len(names), len(names))


def weight_error(node: Node, twin: Node) -> Array:
    """Return W - W rounded of a product and its twin in Graph[QDQ]."""
    producer = twin.input(1).producer
    q = None if producer is None else producer.input(0)
    assert q is not None
    assert q.qparams is not None
    lost: Array = node.input(1).array().astype(np.float64) - dequantize(q.array(), q.qparams)
    return lost


def mean_shift(node: Node, lost: Array, means: dict[str, Array]) -> Array:
    """Return by how much the mean of each output channel falls for lack of some weights."""
    mean = means[node.input(0).name]
    if node.op.name != "conv":
        return np.asarray(mean @ lost)
    per_input = lost.sum(tuple(range(2, lost.ndim)))  # [O, I / G]
    groups = int(node.attr("group"))
    split = per_input.reshape(groups, -1, per_input.shape[1])
    return np.asarray(np.einsum("goi,gi->go", split, mean.reshape(groups, -1)).reshape(-1))


def operand_means(graph: Graph, names: list[str], batches: list[Batch]) -> dict[str, Array]:
    """Return the mean per input channel of what products read, by the value's name."""
    values = {graph.node(n).input(0): graph.node(n) for n in names}
    trail = [v for v in values if v.producer is not None]
    session = Session(prefix_model(graph, trail)) if trail else None
    sums: dict[str, Array] = {}
    for batch in batches:
        found = dict(batch.inputs)
        if session is not None:
            found.update(session.run({n: batch.inputs[n] for n in session.input_names}))
        for v, node in values.items():
            y = found[v.name]
            axis = 1 if node.op.name == "conv" else y.ndim - 1
            mean = y.mean(tuple(i for i in range(y.ndim) if i != axis), dtype=np.float64)
            sums[v.name] = sums.get(v.name, 0.0) + mean
    return {name: total / len(batches) for name, total in sums.items()}


def _channel_mean(node: Node, y: Array) -> Array:
    """Return the mean per output channel: axis 1 of a convolution, the last one of a matmul."""
    axis = 1 if node.op.name == "conv" else y.ndim - 1
    mean: Array = y.mean(tuple(i for i in range(y.ndim) if i != axis), dtype=np.float64)
    return mean


def _means(graph: Graph, names: list[str], batches: list[Batch]) -> dict[str, Array]:
    """Return the float mean of every product's result."""
    nodes = [graph.node(n) for n in names]
    values = [n.output.name for n in nodes]
    session = Session(to_onnx(graph, extra_outputs=values).SerializeToString())
    outputs = {v.name: name for name, v in graph.outputs}
    sums: dict[str, Array] = {}
    for batch in batches:
        found = session.run(batch.inputs)
        for node, value in zip(nodes, values, strict=True):
            y = found[value] if value in found else found[outputs[value]]
            sums[node.name] = sums.get(node.name, 0.0) + _channel_mean(node, y)
    return {name: total / len(batches) for name, total in sums.items()}


def _mean(qdq: Graph, name: str, batches: list[Batch]) -> Array:
    node = qdq.node(name)
    session = Session(prefix_model(qdq, [node.output]))
    total: Array = np.zeros(())
    for batch in batches:
        given = {n: batch.inputs[n] for n in session.input_names}
        total = total + _channel_mean(node, session.run(given)[node.output.name])
    mean: Array = total / len(batches)
    return mean


def _shift(graph: Graph, node: Node, by: Array) -> None:
    bias = node.optional(2)
    old = np.zeros(by.shape) if bias is None else bias.array().astype(np.float64)
    new = np.broadcast_to(old, by.shape) + by
    base = f"{node.name}_bias" if bias is None else f"{bias.name}_corrected"
    graph.set_input(node, 2, graph.constant(new.astype(np.float32), graph.fresh(base)))
