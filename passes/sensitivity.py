# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What quantizing one product alone costs: at its own result and at the model's outputs.

Each product is tried with rounded weights (several widths) and, apart from that, with rounded
activations, everything else in float. Products are independent tasks for any executor with
`submit`; finished ones are kept in a state file, from which an interrupted analysis goes on.

Sources: Fisher trace from forward passes, Tr(F) = mean over Rademacher v of 2 KL(p_W || p_W+ev)/e^2
(second-order expansion of the divergence; +e and -e are averaged, which cancels the cubic term);
the product of trace and squared weight error is HAWQ-V2's measure (arXiv 1911.03852).
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np

from qcompiler.cache import write_whole
from qcompiler.data import Batch, Evaluation, InputSpec, SampleSet, load_samples
from qcompiler.errors import DataError, UsageError
from qcompiler.ir import Graph, Node, Value
from qcompiler.metrics import Metric, metric_of
from qcompiler.numerics import choose_qparams, fake_quantize, least_weight_scale
from qcompiler.ops import OpKind, Stage
from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable
from qcompiler.passes.narrow_products import NarrowProducts, group_qparams
from qcompiler.passes.sensitivity_along import Compared, along_names, compare, pairs
from qcompiler.passes.sensitivity_report import (
    Effect,
    NodeSensitivity,
    SensitivityReport,
    first_jump,
)
from qcompiler.passes.sensitivity_trial import Head, Trial, Tried, level, try_unit
from qcompiler.passes.single_node import Unit, Walker, suffix_of, units
from qcompiler.passes.weights import weight_qparams
from qcompiler.passmanager import Pass, PassContext, ProgressFn, no_progress
from qcompiler.plan import group_size, integer_group, obstacle_to, summed_axis
from qcompiler.printer import digest
from qcompiler.types import Array, DType, Precision, QuantParams

STATE_FORMAT = 1
"""Version of the state file."""

SMALL_OUTPUTS = 64e6
"""Bytes of the float model's outputs on all samples up to which they are kept for every task; of
larger ones each task makes its own."""

Task = TypeVar("Task")
Found = TypeVar("Found")
Result = TypeVar("Result", covariant=True)


class Pending(Protocol[Result]):
    """What `Submits.submit` returns."""

    def result(self) -> Result:
        """Wait for the task and return what it found, or raise what it raised."""


class Submits(Protocol):
    """What runs tasks: any `concurrent.futures.Executor`, or an object with this one method."""

    def submit(self, fn: Callable[[Task], Found], task: Task, /) -> Pending[Found]:
        """Start a task. Function and argument are plain data that pickle."""


@dataclass(frozen=True)
class Settings:
    """How an analysis is done.

    Attributes:
        weight_bits: Widths of weights to try.
        samples: Samples to use at most.
        fisher_samples: Samples of the Fisher trace; 0 leaves it out.
        loss: Divergence at the model's outputs: "kl", "mse", or "auto": KL for class scores, MSE
            else.
        seed: Seed of the random directions.
        memory: Bytes that kept float prefixes may take, in all tasks together; the samples' inputs
            come on top. 0: tasks carry the inputs, and walk on their own.
        activation_bits: Widths of activations to try.
        forms: Precisions to try that are no plain widths: weights with a scale per group, weights
            held in fewer bits, activations quantized at run time.
    """

    weight_bits: tuple[int, ...] = (8, 6, 4)
    samples: int = 64
    fisher_samples: int = 16
    loss: Literal["auto", "kl", "mse"] = "auto"
    seed: int = 0
    memory: float = 512e6
    activation_bits: tuple[int, ...] = (8,)
    forms: tuple[Precision, ...] = ()

    def __post_init__(self) -> None:
        if not self.weight_bits or not all(2 <= b <= 8 for b in self.weight_bits):
            raise UsageError(f"weight bits {self.weight_bits}: expected widths from 2 to 8")
        if not self.activation_bits or not all(2 <= b <= 8 for b in self.activation_bits):
            raise UsageError(f"activation bits {self.activation_bits}: expected widths from 2 to 8")
        if self.samples < 1 or self.fisher_samples < 0:
            raise UsageError("the number of samples must be at least 1")


@dataclass(frozen=True)
class Sensitivity(Pass):
    """Measure the sensitivity of every product. Leaves the graph unchanged.

    An `Evaluation` among the artifacts gives labelled samples; else the calibration set serves.
    """

    name: ClassVar[str] = "sensitivity"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, CalibrationTable)
    provides: ClassVar[tuple[type, ...]] = (SensitivityReport,)
    weight_bits: tuple[int, ...] = (8, 6, 4)
    samples: int = 64  # samples to use at most
    fisher_samples: int = 16  # samples of the Fisher trace; 0 leaves it out
    loss: Literal["auto", "kl", "mse"] = "auto"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Measure.

        Raises:
            DataError: The samples do not fit the metric.
        """
        settings = Settings(
            self.weight_bits, self.samples, self.fisher_samples, self.loss, ctx.seed
        )
        evaluation = ctx.find(Evaluation)
        samples = ctx.get(CalibrationSet).samples
        ctx.put(
            measure_sensitivity(
                graph,
                ctx.get(CalibrationTable),
                samples,
                evaluation=evaluation,
                settings=settings,
                progress=ctx.progress,
            )
        )
        return False


def measure_sensitivity(
    graph: Graph,
    table: CalibrationTable,
    samples: SampleSet,
    *,
    evaluation: Evaluation | None = None,
    settings: Settings | None = None,
    executor: Submits | None = None,
    workers: int = 1,
    state: str | os.PathLike[str] | None = None,
    late: Callable[[], bool] = lambda: False,
    progress: ProgressFn = no_progress,
) -> SensitivityReport:
    """Return what each product's quantization costs.

    Args:
        graph: Canonical FLOAT graph.
        table: Its calibration table.
        samples: Samples to measure on where there is no evaluation.
        evaluation: Labelled samples and metric.
        settings: How; default `Settings()`.
        executor: Runs tasks; default: in this thread.
        workers: Tasks that it runs at once. One more waits, and each of them and the walk along
            the network hold a share of the memory bound.
        state: JSON file with the finished products, written after each and read at the start.
        late: Whether time is up: the products that are left are then not analysed, and missing in
            the report.
        progress: Called after each product.

    Raises:
        DataError: The samples do not fit the model or the metric.
        UsageError: The state file belongs to another analysis.
    """
    how = settings or Settings()
    data = _Data(graph, samples, evaluation, how.samples)
    heads = {name: head_of(graph, v, how.loss, data.metric) for name, v in graph.outputs}
    found = units(graph)
    done = _State(state, _key(graph, data, table, how))
    workers = max(workers, 1) if executor is not None else 0
    kept = data.metric is not None or data.small
    progress("analyze", 0, len(found))
    whole = Compared()
    tasks = pairs(graph, table, found, data.batches(), data.stacked, heads, kept)
    for part in _each(compare, tasks, executor, workers):
        whole.add(part)
    outputs = data.by_run(whole.exact) if data.small else None
    # what is kept for a cut is held by the walker and by each task under way or waiting
    walker = Walker(graph, data.batches, how.memory / (workers + 2 if workers else 1), outputs)
    tried: dict[str, NodeSensitivity] = {}
    for unit in found:
        known = done.get(unit.node)
        if known is not None:
            tried[unit.node] = known
            progress("analyze", len(tried), len(found))

    todo = [(i, u) for i, u in enumerate(found) if u.node not in tried]

    def trials() -> Iterator[Trial]:
        for index, unit in todo:
            if late():
                return
            yield _trial(graph, unit, table, walker, heads, how, index, data.metric is not None)

    for (_, unit), result in zip(todo, _each(try_unit, trials(), executor, workers), strict=False):
        tried[unit.node] = done.put(unit.node, _judged(graph, unit, result, data))
        progress("analyze", len(tried), len(found))
    along = along_names(graph, found, whole.sqnr())
    nodes = tuple(tried[u.node].along(along.get(u.result)) for u in found if u.node in tried)
    score = data.scores(whole)
    return SensitivityReport(
        graph=digest(graph),
        data=data.digest,
        table=table.spec,
        samples=data.count,
        seed=how.seed,
        losses={name: h.kind for name, h in heads.items()},
        metric=None if data.metric is None else data.metric.name,
        score=score[0],
        joint_score=score[1],
        joint_loss=whole.loss(data.count),
        nodes=nodes,
        tensors={n: t for n, t in table.tensors.items() if n in _read(graph, found)},
        first_jump=first_jump(nodes),
    )


def _each(
    fn: Callable[[Task], Found], tasks: Iterator[Task], executor: Submits | None, workers: int
) -> Iterator[Found]:
    """Yield the result of every task in order; one more than `workers` is made ahead."""
    if executor is None:
        yield from map(fn, tasks)
        return
    waiting: deque[Pending[Found]] = deque()
    for task in tasks:
        waiting.append(executor.submit(fn, task))
        del task  # the executor holds it as long as it needs it
        if len(waiting) > workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _Data:
    """The samples in use, with their metric."""

    def __init__(
        self, graph: Graph, samples: SampleSet, evaluation: Evaluation | None, most: int
    ) -> None:
        self.samples = samples if evaluation is None else load_samples(evaluation.samples)
        self.metric: Metric | None = None if evaluation is None else metric_of(evaluation.metric)
        self.inputs = InputSpec.of_graph(graph)
        self.most = most
        self.stacked = {name: v.batch_axis != 0 for name, v in graph.outputs}
        self.count = sum(b.samples for b in self.batches())
        extras = {} if self.metric is None else self.samples.extras(self.inputs)
        self.extras = {k: a[: self.count] if a.ndim else a for k, a in extras.items()}
        self.digest = self.samples.digest()
        size = sum(v.type.size * v.dtype.bits // 8 for _, v in graph.outputs)
        self.small = size * self.count <= SMALL_OUTPUTS

    def batches(self) -> Iterator[Batch]:
        """Yield the runs, up to the number of samples wanted."""
        taken = 0
        for batch in self.samples.batches(self.inputs):
            if taken >= self.most:
                return
            taken += batch.samples
            yield batch

    def by_run(self, outputs: Mapping[str, list[Array]]) -> list[dict[str, Array]]:
        """Return the outputs of each run by name."""
        count = len(next(iter(outputs.values()), ()))
        return [{n: a[i] for n, a in outputs.items()} for i in range(count)]

    def scores(self, whole: Compared) -> tuple[float | None, float | None]:
        """Return the metric of the float network and of the one in 8 bits; None without labels."""
        if self.metric is None:
            return None, None
        sizes = [b.samples for b in self.batches()]
        real = {
            n: a if self.stacked[n] else [y[:s] for y, s in zip(a, sizes, strict=True)]
            for n, a in whole.exact.items()
        }
        reference = self.join(real)
        return (
            self.metric.score(reference, self.extras, reference),
            self.metric.score(self.join(whole.rounded), self.extras, reference),
        )

    def join(self, parts: Mapping[str, list[Array]]) -> dict[str, Array]:
        """Join the outputs of the runs."""
        return {n: np.stack(a) if self.stacked[n] else np.concatenate(a) for n, a in parts.items()}


def _key(graph: Graph, data: _Data, table: CalibrationTable, how: Settings) -> str:
    """Return what identifies an analysis: all that its figures depend on."""
    metric = None if data.metric is None else data.metric.name
    ranges = sorted((n, t.range) for n, t in table.tensors.items())
    parts: list[Any] = [digest(graph), data.digest, metric, how.weight_bits, how.samples]
    parts += [how.fisher_samples, how.loss, how.seed, ranges]
    if how.activation_bits != (8,):
        parts.append(how.activation_bits)
    if how.forms:
        parts.append([p.value for p in how.forms])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _State:
    """Finished products in a file."""

    def __init__(self, path: str | os.PathLike[str] | None, key: str) -> None:
        self.path = None if path is None else pathlib.Path(path)
        self.key = key
        self.nodes: dict[str, Any] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            doc = json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the state {str(self.path)!r}: {error}") from None
        if not isinstance(doc, Mapping) or doc.get("format") != STATE_FORMAT:
            raise UsageError(f"{str(self.path)!r} is not a state file of format {STATE_FORMAT}")
        if doc.get("key") != key:
            raise UsageError(
                f"the state {str(self.path)!r} belongs to another model, data or settings",
                hint="remove it, or name another file",
            )
        self.nodes = dict(doc["nodes"])

    def get(self, node: str) -> NodeSensitivity | None:
        return NodeSensitivity.from_json(self.nodes[node]) if node in self.nodes else None

    def put(self, node: str, found: NodeSensitivity) -> NodeSensitivity:
        self.nodes[node] = found.to_json()
        if self.path is not None:
            doc = {"format": STATE_FORMAT, "key": self.key, "nodes": self.nodes}
            write_whole(self.path, json.dumps(doc) + "\n", "make room: the analysis goes on then")
        return found


# ----------------------------------------------------------------------------------- one task


def _trial(
    graph: Graph,
    unit: Unit,
    table: CalibrationTable,
    walker: Walker,
    heads: Mapping[str, Head],
    how: Settings,
    index: int,
    keep: bool,
) -> Trial:
    node = graph.node(unit.node)
    x, w = node.input(0), node.input(1)
    qparams = {}
    for bits in how.activation_bits:
        second = None if w.is_constant else activation_qparams(w, table, signed=True, bits=bits)
        qparams[str(bits)] = (activation_qparams(x, table, signed=False, bits=bits), second)
    xq = activation_qparams(x, table, signed=False)
    weights = {}
    if w.is_constant:
        weights = {str(b): fake_quantize(w.array(), weight_grid(node, b, xq)) for b in
                   how.weight_bits}  # fmt: skip
        weights.update(_held(node, how.forms))
    runs = int(how.fisher_samples) if w.is_constant else 0
    return Trial(
        suffix=suffix_of(graph, unit),
        feeds=tuple(walker.feeds(unit)),
        weight=w.array() if w.is_constant else None,
        weights=weights,
        qparams=qparams,
        dynamic=tuple(p.value for p in how.forms if p.is_dynamic and obstacle_to(node, p) is None),
        heads=dict(heads),
        fisher_samples=runs,
        seed=(how.seed, index),
        keep_outputs=keep,
    )


def _held(node: Node, forms: tuple[Precision, ...]) -> dict[str, Array]:
    """Return the constant weights of a product as each of some precisions holds them."""
    w = node.input(1).array()
    found: dict[str, Array] = {}
    for p in forms:
        if p.is_dynamic or obstacle_to(node, p) is not None:
            continue
        if p is Precision.FP16:
            found[p.value] = w.astype(np.float16).astype(np.float32)
        elif p is Precision.W4A8_GROUP:
            size = integer_group(node)
            if size is not None:
                q = group_qparams(w, summed_axis(node), size, p.weight_bits, factored=True)
                found[p.value] = fake_quantize(w, q)
        else:
            options = NarrowProducts()
            limit = options.w4_group if p is Precision.W4 else options.w8_group
            size = group_size(w.shape[summed_axis(node)], limit)
            q = group_qparams(w, summed_axis(node), size, p.weight_bits)
            found[p.value] = fake_quantize(w, q)
    return found


def activation_qparams(
    v: Value, table: CalibrationTable, *, signed: bool, bits: int = 8
) -> QuantParams:
    """Return the parameters that an activation gets as an operand of a product.

    Raises:
        DataError: The calibration table has no range for it.
    """
    bounded = v.producer is not None and v.producer.op.name in ("softmax", "sigmoid")
    entry = table.find(v.name)
    if entry is None and not bounded:
        raise DataError(f"the calibration table has no range for {v.name!r}", value=v.name)
    lo, hi = (0.0, 1.0) if bounded or entry is None else entry.range
    if signed:
        return choose_qparams(lo, hi, storage=DType.INT8, scheme="symmetric", bits=bits)
    return choose_qparams(lo, hi, storage=DType.UINT8, bits=bits)


def weight_grid(node: Node, bits: int, x: QuantParams) -> QuantParams:
    """Return the grid that the constant weights of a product get at a width."""
    w, bias = node.input(1).array(), node.optional(2)
    if node.op.name == "matmul" and w.ndim != 2:  # not one matrix: one scale
        peak = float(np.abs(w).max(initial=0.0))
        return choose_qparams(-peak, peak, storage=DType.INT8, scheme="symmetric", bits=bits)
    axis = 0 if node.op.name == "conv" or node.attr("transpose_b") else 1
    least = 0.0 if bias is None else least_weight_scale(bias.array(), x.s)
    return weight_qparams(w, axis, bits, least)


def _judged(graph: Graph, unit: Unit, tried: Tried, data: _Data) -> NodeSensitivity:
    """Turn what a task found into figures; score the outputs where there is a metric."""
    scores: dict[str, float] = {}
    if data.metric is not None:
        reference = data.join(tried.outputs["float"]) if tried.outputs else {}
        if set(reference) == set(data.stacked):  # the metric may need every output
            before = data.metric.score(reference, data.extras, reference)
            for name, parts in tried.outputs.items():
                after = data.metric.score(data.join(parts), data.extras, reference)
                scores[name] = data.metric.drop(before, after)
    effects = {
        name: Effect(level(s.signal, s.noise), s.cosine, s.noise / max(s.count, 1), s.loss,
                     scores.get(name))
        for name, s in tried.sums.items()
    }  # fmt: skip
    node = graph.node(unit.node)
    w = node.input(1)
    return NodeSensitivity(
        node=unit.node,
        op=unit.op,
        members=unit.members,
        operand=node.input(0).name,
        result=unit.result,
        parameters=w.type.size if w.is_constant else 0,
        weight={name[1:]: e for name, e in effects.items() if name[0] == "w"},
        activation={name[1:]: e for name, e in effects.items() if name[0] == "a"},
        weight_error=dict(tried.weight_error),
        fisher=tried.fisher,
    )


def _read(graph: Graph, found: tuple[Unit, ...]) -> set[str]:
    """Return the names of the values that the products read."""
    return {v.name for u in found for v in graph.node(u.node).operands[:2]}


def head_of(graph: Graph, v: Value, loss: str, metric: Metric | None) -> Head:
    """Return how differences of an output are measured."""
    origin = v.producer
    while origin is not None and origin.op.name in ("reshape", "transpose", "reduce_mean"):
        origin = origin.input(0).producer
    if loss == "mse":
        return Head("mse", -1)
    last = v.producer
    if last is not None and last.op.name in ("softmax", "log_softmax"):
        kind: Literal["probabilities", "log_probabilities"]
        kind = "probabilities" if last.op.name == "softmax" else "log_probabilities"
        return Head(kind, int(last.attr("axis")))
    classes = metric is not None and metric.name in ("top1", "top5")
    product = origin is not None and origin.op.kind is OpKind.COMPUTE
    same = any(i.type.size == v.type.size for i in graph.inputs)  # reconstructs its input
    if loss == "kl" or classes or (product and v.type.rank == 2 and v.shape[1] > 1 and not same):
        return Head("logits", -1)
    return Head("mse", -1)
