# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The float network and the one with everything in 8 bits, side by side along the network.

Tasks of a few runs each, plain data in and out like the products' own, for the same executor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from qcompiler.data import Batch
from qcompiler.ir import Graph
from qcompiler.onnx_export import to_onnx
from qcompiler.ort import Session
from qcompiler.passes.calibrate import CalibrationTable
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.sensitivity_trial import Head, level, product
from qcompiler.passes.single_node import Unit
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.plan import uniform
from qcompiler.types import Array

RUNS = 16
"""Runs of a task."""


@dataclass(frozen=True)
class Pair:
    """Both networks over some runs.

    Attributes:
        exact: Serialized float model.
        rounded: Serialized model with everything in 8 bits.
        batches: The runs.
        names: Inner values to compare.
        outputs: Output name -> whether its first axis is not the samples'.
        heads: Output name -> how it is compared.
        keep: Whether to return the outputs.
    """

    exact: bytes
    rounded: bytes
    batches: tuple[Batch, ...]
    names: tuple[str, ...]
    outputs: Mapping[str, bool]
    heads: Mapping[str, Head]
    keep: bool


@dataclass
class Compared:
    """What was found over some runs.

    Attributes:
        signal: Name -> sum of squares of the float value, by run.
        noise: Name -> sum of squares of the difference, by run.
        losses: Loss at the outputs times samples, by run.
        exact: Output name -> float output, by run; empty unless kept.
        rounded: Output name -> output with everything in 8 bits, by run; empty unless kept.
    """

    signal: dict[str, list[float]] = field(default_factory=dict)
    noise: dict[str, list[float]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    exact: dict[str, list[Array]] = field(default_factory=dict)
    rounded: dict[str, list[Array]] = field(default_factory=dict)

    def add(self, other: Compared) -> None:
        """Append what was found over the runs that follow."""
        for mine, theirs in ((self.signal, other.signal), (self.noise, other.noise)):
            for name, sums in theirs.items():
                mine.setdefault(name, []).extend(sums)
        for kept, more in ((self.exact, other.exact), (self.rounded, other.rounded)):
            for name, arrays in more.items():
                kept.setdefault(name, []).extend(arrays)
        self.losses += other.losses

    def sqnr(self) -> dict[str, float]:
        """Return the signal-to-noise ratio of every compared value, in dB."""
        return {n: level(math.fsum(s), math.fsum(self.noise[n])) for n, s in self.signal.items()}

    def loss(self, samples: int) -> float:
        """Return the mean loss at the outputs."""
        total = math.fsum(self.losses) if all(map(math.isfinite, self.losses)) else math.inf
        return total / max(samples, 1)


def pairs(
    graph: Graph,
    table: CalibrationTable,
    found: Iterable[Unit],
    batches: Iterator[Batch],
    outputs: Mapping[str, bool],
    heads: Mapping[str, Head],
    keep: bool,
) -> Iterator[Pair]:
    """Yield the tasks: `RUNS` runs each."""
    plan = uniform(graph)
    ctx = PassContext()
    ctx.put(plan)
    ctx.put(table)
    qdq = PassManager([InsertQdq()], given=tuple(ctx.artifacts)).run(graph, ctx)
    there = {v.name for v in qdq.values()}
    names = [u.result for u in found if u.result in there and u.result not in outputs]
    exact = to_onnx(graph, extra_outputs=names).SerializeToString()
    rounded = to_onnx(qdq, extra_outputs=names).SerializeToString()
    part: list[Batch] = []
    for batch in batches:
        part.append(batch)
        if len(part) == RUNS:
            yield Pair(exact, rounded, tuple(part), tuple(names), outputs, heads, keep)
            part = []
    if part:
        yield Pair(exact, rounded, tuple(part), tuple(names), outputs, heads, keep)


def compare(pair: Pair) -> Compared:
    """Run both networks over the runs of a task."""
    found = Compared()
    first, second = Session(pair.exact), Session(pair.rounded)
    for batch in pair.batches:
        a, b = first.run(batch.inputs), second.run(batch.inputs)
        for name in (*pair.names, *pair.outputs):
            y, d = a[name], np.subtract(b[name], a[name])
            found.signal.setdefault(name, []).append(product(y, y))
            found.noise.setdefault(name, []).append(product(d, d))
        loss = 0.0
        for name, stacked in pair.outputs.items():
            y, z = (o[name] if stacked else o[name][: batch.samples] for o in (a, b))
            loss += pair.heads[name].loss(y, z) * batch.samples
            if pair.keep:
                found.exact.setdefault(name, []).append(a[name])
                found.rounded.setdefault(name, []).append(z)
        found.losses.append(loss)
    return found


def along_names(graph: Graph, found: Iterable[Unit], sqnr: Mapping[str, float]) -> dict[str, float]:
    """Return the figures by the results' own names: one may leave the graph under another."""
    along = dict(sqnr)
    for u in found:
        for name, v in graph.outputs:
            if v.name == u.result:
                along[u.result] = sqnr[name]
    return along
