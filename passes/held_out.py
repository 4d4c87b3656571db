# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What every data-driven method shares: its share of the samples, and the test on the others.

Every fourth calibration run is held out; of many runs, 32 spread evenly. A method works on the
rest; on the held-out runs the quantized outputs of the graph before and after are compared with
those of the float model, and what made them worse is discarded, with a line in the log.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qcompiler.data import Batch
from qcompiler.ir import Graph
from qcompiler.onnx_export import to_onnx
from qcompiler.ops import OpKind
from qcompiler.ort import Session
from qcompiler.passes.calibrate import Calibrate, CalibrationSet, CalibrationTable
from qcompiler.passes.insert_qdq import InsertQdq, WeightGrids
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.plan import PrecisionPlan, integer_obstacle
from qcompiler.printer import digest
from qcompiler.types import Array

EVERY = 4
"""One run of so many is held out, at most."""
HELD_OUT_RUNS = 32


@dataclass(frozen=True)
class FloatModel:
    """The float graph before a method rounded weights or shifted biases: what later ones aim at."""

    graph: Graph


@dataclass(frozen=True)
class Share(CalibrationSet):
    """Some runs of a calibration set.

    Attributes:
        held_out: The runs held out, or the others.
        most: Number of runs at most.
    """

    held_out: bool = False
    most: int = 1 << 30

    def __iter__(self) -> Iterator[Batch]:
        taken = 0
        only = self.runs < EVERY  # too few to share: the same runs serve both
        every = max(EVERY, self.runs // HELD_OUT_RUNS)
        for i, batch in enumerate(self.samples.batches(self.inputs)):
            if taken == self.most:
                return
            if only or (i % every == every - 1) == self.held_out:
                taken += 1
                yield batch


def shares(samples: CalibrationSet, most: int) -> tuple[Share, Share]:
    """Return the runs to work on, at most so many, and the runs held out."""
    given = {f.name: getattr(samples, f.name) for f in dataclasses.fields(CalibrationSet)}
    return Share(**given, most=most), Share(**given, held_out=True, most=HELD_OUT_RUNS)


def calibrated(graph: Graph, samples: Share) -> CalibrationTable:
    """Return the calibration table of a graph on a share of the samples."""
    ctx = PassContext()
    ctx.artifacts[CalibrationSet] = samples
    Calibrate().run(graph, ctx)
    return ctx.get(CalibrationTable)


def quantized(
    graph: Graph,
    plan: PrecisionPlan,
    table: CalibrationTable,
    grids: WeightGrids | None = None,
) -> Graph:
    """Return Graph[QDQ] with the ranges of a table that was made for an equivalent graph."""
    ctx = PassContext()
    ctx.put(plan)
    ctx.put(dataclasses.replace(table, graph=digest(graph)))
    if grids is not None:
        ctx.put(grids)
    return PassManager([InsertQdq()], given=tuple(ctx.artifacts)).run(graph, ctx)


@dataclass
class Judge:
    """Compares quantized graphs with the float model on held-out runs.

    Attributes:
        runs: The runs.
        reference: Outputs of the float model on each.
    """

    graph: Graph
    runs: Sequence[Batch]
    reference: list[Mapping[str, Array]] = field(default_factory=list)

    def __post_init__(self) -> None:
        session = Session(to_onnx(self.graph).SerializeToString())
        self.reference = [session.run(b.inputs) for b in self.runs]

    def error(self, qdq: Graph) -> float:
        """Return the squared error of the outputs of Graph[QDQ] over their squared magnitude.

        Averaged over the outputs. A divergence of classes would hang on the few samples that are
        hard to tell.
        """
        session = Session(to_onnx(qdq).SerializeToString())
        noise = dict.fromkeys((n for n, _ in self.graph.outputs), 0.0)
        signal = dict(noise)
        for batch, want in zip(self.runs, self.reference, strict=True):
            got = session.run(batch.inputs)
            for name in noise:
                y = np.asarray(want[name], np.float64)
                noise[name] += float(((y - got[name]) ** 2).sum())
                signal[name] += float((y * y).sum())
        ratios = [noise[n] / signal[n] if signal[n] else noise[n] for n in noise]
        return sum(ratios) / max(len(ratios), 1)


def verdict(name: str, before: float, after: float) -> tuple[bool, str]:
    """Return whether to keep a result, and the line of the log."""
    kept = after < before
    what = "kept" if kept else "discarded: not better"
    return kept, f"{name}: {what} (relative error held out {before:.3g} before, {after:.3g} after)"


def weighted_products(graph: Graph, plan: PrecisionPlan) -> list[str]:
    """Return the names of the integer products with one matrix of constant weights, in order."""
    found = []
    for n in graph.nodes:
        if n.op.kind is not OpKind.COMPUTE or not plan.precision(n.name).is_integer:
            continue
        if integer_obstacle(n) is None and n.input(1).is_constant:
            plain = n.op.name == "conv" or (
                n.input(1).type.rank == 2
                and not n.attr("transpose_b")
                and not n.attr("transpose_a")
            )
            if plain:
                found.append(n.name)
    return found


def accept(name: str, graph: Graph, changed: Graph, ctx: PassContext, most: int) -> bool:
    """Take over the constants of a rewritten clone where that is better on held-out runs.

    Both graphs are calibrated on at most so many of the other runs.

    Returns:
        Whether the graph was modified.
    """
    plan = ctx.get(PrecisionPlan)
    if not plan.has_integers:
        return False
    work, held_out = shares(ctx.get(CalibrationSet), most)
    judge = Judge(graph, list(held_out))
    before, after = (judge.error(quantized(g, plan, calibrated(g, work))) for g in (graph, changed))
    kept, line = verdict(name, before, after)
    ctx.log.append(line)
    if not kept:
        return False
    for old, new in zip(graph.nodes, changed.nodes, strict=True):
        for i, v in enumerate(new.inputs):
            if v is None or not v.is_constant:
                continue
            mine = old.optional(i)
            if mine is None or mine.data is not v.data:
                graph.set_input(old, i, graph.constant(v.array(), graph.fresh(v.name)))
    return True
