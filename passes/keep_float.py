# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Leave products in float whose operands 8 bits cannot hold, by measured error.

One 8-bit grid holds 48 dB. A spectrum spans more from a quiet frame to a loud one: the grid that
fits the loud one leaves nothing of the quiet ones, and no later product makes up for it. Such a
network loses most of its result, and nearly all of that in one or two products. So the network is
run once in integers and once in float on calibration samples; where too little is left of a result,
each product is tried with its operand in 8 bits and everything else in float, and those that alone
cost too much stay in float. What other networks compute is not touched; nor is one whose loss is
spread over many products, or that would be little better for it: there a budget decides
(`precision="auto"`), at the price of time that it states.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from qcompiler.data import Batch
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import choose_qparams, fake_quantize
from qcompiler.onnx_export import subgraph_to_onnx, to_onnx
from qcompiler.ops import OpKind, Stage
from qcompiler.ort import Session
from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.regions import analyse
from qcompiler.passes.sample_axes import Filled
from qcompiler.passes.trails import MEMORY, Trail, most_live, needed_nodes
from qcompiler.passmanager import Pass, PassContext, PassManager
from qcompiler.plan import Decision, PrecisionPlan
from qcompiler.types import Array, DType, Precision, QuantParams


@dataclass(frozen=True)
class AskedFor:
    """Nodes whose precision was asked for by name: it is not changed."""

    nodes: frozenset[str] = field(default_factory=frozenset)

    def spec(self) -> str:
        """Return the text form."""
        return f"asked{{{', '.join(sorted(self.nodes))}}}"


@dataclass(frozen=True)
class KeptFloat:
    """Products that stay float because 8 bits do not hold their operands, and why."""

    nodes: Mapping[str, Decision] = field(default_factory=dict)

    def overrides(self) -> dict[str, Precision]:
        """Return them as rules that keep their precision."""
        return {name: d.precision for name, d in self.nodes.items()}


@dataclass(frozen=True)
class KeepFloat(Pass):
    """Give float32 to products whose operands in 8 bits cost most of a result.

    Results are what recurrent operators read, step by step, and the outputs that do not depend on
    one: an output behind a recurrent operator follows a state, not one product. A state adds up
    what its steps get wrong, so they are held to more. The plan says for each product that stays
    float what was measured.
    """

    name: ClassVar[str] = "keep_float"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, CalibrationTable, PrecisionPlan)
    provides: ClassVar[tuple[type, ...]] = (PrecisionPlan, KeptFloat)
    floor: float = 15.0  # dB: a network whose results all keep this is left as it is
    alone: float = 20.0  # dB: a product that alone leaves less makes a third of that noise
    steps: float = 5.0  # dB more of both for what recurrent operators read
    gain: float = 5.0  # dB that must be won, or nothing changes: two thirds of the noise
    share: float = 0.125  # of the products that may stay in float, two in any case
    runs: int = 8  # runs, at most, to measure on

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Measure, and change the plan where too little is left."""
        plan = ctx.get(PrecisionPlan)
        table = ctx.get(CalibrationTable)
        samples = ctx.get(CalibrationSet)
        points = _points(graph, self.steps)
        asked = (ctx.find(AskedFor) or AskedFor()).nodes
        open_nodes = {
            n for n in graph.nodes
            if n.op.kind is OpKind.COMPUTE
            and n.name not in asked
            and plan.precision(n.name).is_integer
        }  # fmt: skip
        if not points or not open_nodes:
            return False
        every = max(1, samples.runs // self.runs)
        spread = (b for i, b in enumerate(samples) if i % every == 0)
        batches = list(itertools.islice(spread, self.runs))
        whole = _whole(graph, plan, table, points, batches)
        if whole.beyond >= self.floor:
            return False
        fit = max(1, MEMORY // max(most_live(graph), 1))
        most = max(2, int(self.share * len(open_nodes)))
        found: dict[Node, _Left] = {}
        culprits = 0
        for node, left in _each_alone(graph, plan, table, points, batches[:fit]):
            found[node] = left
            culprits += node in open_nodes and left.beyond < self.alone
            if culprits > most:  # spread over many: none of them explains it
                return False
        changes = {
            n.name: Decision(
                Precision.FP32,
                f"alone in 8 bits it would leave {left.sqnr:.1f} dB of {left.value!r}, less than "
                f"{self.alone + left.sqnr - left.beyond:g} dB",
            )
            for n, left in found.items()
            if n in open_nodes and left.beyond < self.alone
        }
        if changes:
            plan = plan.replaced(changes)
            after = _whole(graph, plan, table, points, batches)
            if after.beyond < whole.beyond + self.gain:
                return False
            ctx.put(plan)
            ctx.put(KeptFloat(changes))
            ctx.log.append(
                f"{self.name}: in 8 bits {whole.sqnr:.1f} dB are left of {whole.value!r}; "
                f"{', '.join(changes)} stay float, with which {after.sqnr:.1f} dB are"
            )
        return False


@dataclass(frozen=True, order=True)
class _Left:
    """What is left of a value: SQNR in dB beyond what is asked of it in particular, and in all."""

    beyond: float = math.inf
    sqnr: float = math.inf
    value: str = ""


def _points(graph: Graph, steps: float) -> dict[Value, float]:
    """Return what recurrent operators read, and the float outputs that depend on none.

    Each with the dB that are asked of it beyond what is asked of every result.
    """
    behind: set[Value] = set()
    read: dict[Value, float] = {}
    for node in graph.nodes:
        if node.op.kind is OpKind.RECURRENT:
            read[node.input(0)] = steps
            behind.update(node.outputs)
        elif any(v in behind for v in node.operands):
            behind.update(node.outputs)
    outputs = [v for v in graph.output_values if v not in behind and v.producer is not None]
    every = {**dict.fromkeys(outputs, 0.0), **read}
    return {v: db for v, db in every.items() if v.dtype is DType.FLOAT32 and v.type.size}


def _whole(
    graph: Graph,
    plan: PrecisionPlan,
    table: CalibrationTable,
    points: Mapping[Value, float],
    batches: Sequence[Batch],
) -> _Left:
    """Return what is left of the worst point of the network in integers.

    Weights are rounded to 8 bits whatever the plan says: what their width costs was asked for.
    """
    eight = plan.replaced({
        name: Decision(Precision.W8A7 if d.precision is Precision.W8A7 else Precision.W8A8, "")
        for name, d in plan.nodes.items() if d.precision.is_integer
    })  # fmt: skip
    ctx = PassContext()
    ctx.put(eight)
    ctx.put(table)
    rounded = PassManager([InsertQdq()], given=tuple(ctx.artifacts)).run(graph, ctx)
    outputs = {v: name for name, v in graph.outputs}
    inner = [v.name for v in points if v not in outputs]
    there = {v.name for v in rounded.values()}
    inner = [name for name in inner if name in there]
    first = Session(to_onnx(graph, extra_outputs=inner).SerializeToString())
    second = Session(to_onnx(rounded, extra_outputs=inner).SerializeToString())
    names = {v: outputs.get(v, v.name) for v in points if v in outputs or v.name in inner}
    sums = _Sums(Filled(graph), points)
    for batch in batches:
        a, b = first.run(batch.inputs), second.run(batch.inputs)
        for v, name in names.items():
            sums.add(v, a[name], b[name], batch)
    return sums.worst()


def _each_alone(
    graph: Graph,
    plan: PrecisionPlan,
    table: CalibrationTable,
    points: Mapping[Value, float],
    batches: Sequence[Batch],
) -> Iterator[tuple[Node, _Left]]:
    """Yield what each product leaves of the points when only its operands are in 8 bits.

    Products after a recurrent operator are judged by the outputs that they reach themselves.
    """
    primary = analyse(graph, plan).primary
    ends = {**dict.fromkeys(graph.output_values, 0.0), **points}
    trail, filled = Trail(graph, batches), Filled(graph)
    known = {v.name: v for v in graph.values()}
    levels: dict[Value, _Left] = {}
    for at, node in enumerate(graph.nodes):
        if node.op.kind is not OpKind.COMPUTE or not plan.precision(node.name).is_integer:
            continue
        left = []
        for i, v in enumerate(node.operands[:2]):
            entry = table.find(v.name)
            if v.is_constant or v not in primary or entry is None:
                continue
            if v not in levels:
                trail.advance(node)
                reached = _reached(graph.nodes[at:], v, ends)
                bits = plan.precision(node.name).activation_bits
                grid = choose_qparams(
                    *entry.range,
                    storage=DType.INT8 if i else DType.UINT8,
                    scheme="symmetric" if i else "asymmetric",
                    bits=bits,
                )
                nodes = needed_nodes(graph.nodes[at:], reached)
                model = subgraph_to_onnx(nodes, outputs=reached).SerializeToString()
                levels[v] = _rounded(
                    Session(model),
                    v,
                    grid,
                    {r: ends[r] for r in reached},
                    known,
                    trail,
                    filled,
                    batches,
                )
            left.append(levels[v])
        if left:
            yield node, min(left)


def _reached(nodes: Sequence[Node], value: Value, ends: Iterable[Value]) -> list[Value]:
    """Return the ends that depend on a value, not counting the way through recurrent operators."""
    after = {value}
    for node in nodes:
        if node.op.kind is not OpKind.RECURRENT and any(v in after for v in node.operands):
            after.update(node.outputs)
    return [v for v in ends if v in after and v.dtype is DType.FLOAT32 and v.producer is not None]


def _rounded(
    session: Session,
    value: Value,
    grid: QuantParams,
    reached: Mapping[Value, float],
    known: Mapping[str, Value],
    trail: Trail,
    filled: Filled,
    batches: Sequence[Batch],
) -> _Left:
    """Return what is left of the worst result of a session when a value is rounded to a grid."""
    sums = _Sums(filled, reached)
    reads = [known[n] for n in session.input_names]
    for held, batch in zip(trail.values(reads), batches, strict=True):
        a = session.run(held)
        b = session.run({**held, value.name: fake_quantize(held[value.name], grid)})
        for v in reached:
            sums.add(v, a[v.name], b[v.name], batch)
    return sums.worst()


class _Sums:
    """Powers of signal and noise per value, over the real samples of runs."""

    def __init__(self, filled: Filled, points: Mapping[Value, float]) -> None:
        self._filled = filled
        self._points = points
        self._powers: dict[Value, tuple[float, float]] = {}

    def add(self, value: Value, exact: Array, other: Array, batch: Batch) -> None:
        a = self._filled.real(value, exact, batch).astype(np.float64)
        b = self._filled.real(value, other, batch)
        signal, noise = self._powers.get(value, (0.0, 0.0))
        with np.errstate(invalid="ignore", over="ignore"):  # what holds infinities does not count
            self._powers[value] = (
                signal + float((a**2).sum()),
                noise + float(((b - a) ** 2).sum()),
            )

    def worst(self) -> _Left:
        """Return what is left of the value that is worst."""
        found = []
        for v, (signal, noise) in self._powers.items():
            if signal and noise and math.isfinite(signal) and math.isfinite(noise):
                sqnr = 10 * math.log10(signal / noise)
                found.append(_Left(sqnr - self._points[v], sqnr, v.name))
        return min(found, default=_Left())
