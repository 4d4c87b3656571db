# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Calibration: run the float graph on samples and note the range of every value to quantize."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from qcompiler.data import Batch, InputSpec, SampleSet
from qcompiler.document import Document
from qcompiler.errors import CalibrationError, UsageError
from qcompiler.ir import Graph, Value
from qcompiler.modality import select
from qcompiler.onnx_export import to_onnx
from qcompiler.ops import OpKind, Stage
from qcompiler.ort import Session
from qcompiler.passes.observer_choice import candidate_ranges, choose_observers
from qcompiler.passes.observers import Observer, ObserverName, TensorStats
from qcompiler.passes.recurrent_states import state_steps
from qcompiler.passes.regions import analyse
from qcompiler.passes.sample_axes import Filled
from qcompiler.passmanager import Pass, PassContext
from qcompiler.plan import uniform
from qcompiler.printer import digest
from qcompiler.types import DType, Precision

FORMAT = 1
"""Version of the table's JSON form."""

ObserverSetting = Literal["auto", "minmax", "moving_average", "percentile", "entropy", "mse"]

_SUMMARY_BINS = 64
_CHOICE_RUNS = 16
"""Runs, at most, on which `observer=auto` compares observers."""


@dataclass(frozen=True)
class CalibrationSet:
    """Samples that fit a graph.

    Attributes:
        samples: The samples.
        inputs: The graph's inputs.
        runs: Number of runs that the samples make.
        digest: sha256 of the samples.
        count: Number of samples.
    """

    samples: SampleSet
    inputs: tuple[InputSpec, ...]
    runs: int
    digest: str
    count: int

    @classmethod
    def of(cls, samples: SampleSet, graph: Graph) -> CalibrationSet:
        """Check every sample against the graph's inputs (reads the set once).

        Raises:
            CalibrationError: Missing or misnamed inputs, wrong shape or dtype, NaN or infinity, an
                empty set.
        """
        inputs = InputSpec.of_graph(graph)
        runs = count = 0
        for batch in samples.batches(inputs, CalibrationError):
            runs += 1
            count += batch.samples
        return cls(samples, inputs, runs, samples.digest(), count)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return self.samples.batches(self.inputs, CalibrationError)


@dataclass(frozen=True, slots=True)
class ObserverRule:
    """How some values are calibrated instead: the observer, and what "percentile" covers."""

    observer: ObserverSetting
    percentile: float = 99.99


@dataclass(frozen=True)
class RegionObservers:
    """Observers by region of a model with several inputs (`qcompiler.modality`).

    Attributes:
        rules: Selector of a region -> how the values that it makes are calibrated. A model's input
            belongs to the regions that read it; later rules win.
    """

    rules: Mapping[str, ObserverRule] = field(default_factory=dict)

    def of(self, graph: Graph) -> dict[str, ObserverRule]:
        """Return value name -> rule."""
        found: dict[str, ObserverRule] = {}
        for selector, rule in self.rules.items():
            inside = set(select(graph, selector))
            made = {v.name for n in inside for v in n.outputs}
            made |= {v.name for v in graph.inputs if inside.intersection(v.users)}
            found.update(dict.fromkeys(made, rule))
        return found

    def spec(self) -> str:
        """Return the text form."""
        parts = (f"{s}={r.observer} {r.percentile:g}" for s, r in self.rules.items())
        return f"regions{{{', '.join(parts)}}}"


@dataclass(frozen=True)
class TensorRange:
    """What calibration found about one value.

    Attributes:
        range: (least, greatest) real that 8-bit quantization should cover; holds 0.
        bounds: (least, greatest) element seen.
        mean: Mean of the elements.
        deviation: Standard deviation of the elements.
        count: Number of elements seen.
        histogram: Counts of equal bins over `bounds`, for reports; empty without a histogram.
    """

    range: tuple[float, float]
    bounds: tuple[float, float]
    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0
    histogram: tuple[int, ...] = ()


@dataclass(frozen=True)
class CalibrationTable(Document):
    """Range per value name.

    Attributes:
        tensors: Value name -> what was found.
        graph: Digest of the graph that ran.
        data: Digest of the samples.
        samples: Number of samples.
        spec: Text form of the pass that made it.
        states: Recurrent node name -> step of the int16 grid that carries its state; float32
            carries the state of the others.
    """

    title: ClassVar[str] = "calibration table"
    indent: ClassVar[int | None] = None

    tensors: Mapping[str, TensorRange] = field(default_factory=dict)
    graph: str = ""
    data: str = ""
    samples: int = 0
    spec: str = ""
    states: Mapping[str, float] = field(default_factory=dict)

    def find(self, name: str) -> TensorRange | None:
        """Return the entry of a value, if it was observed."""
        return self.tensors.get(name)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "format": FORMAT,
            "graph": self.graph,
            "data": self.data,
            "samples": self.samples,
            "spec": self.spec,
            **({"states": dict(self.states)} if self.states else {}),
            "tensors": {
                name: {
                    "range": list(t.range),
                    "bounds": list(t.bounds),
                    "mean": t.mean,
                    "deviation": t.deviation,
                    "count": t.count,
                    "histogram": list(t.histogram),
                }
                for name, t in self.tensors.items()
            },
        }

    @classmethod
    def from_json(cls, doc: object) -> CalibrationTable:
        """Return the table that `to_json` wrote.

        Raises:
            UsageError: Not such a document, or another format version.
        """
        if not isinstance(doc, Mapping) or doc.get("format") != FORMAT:
            raise UsageError(f"not a calibration table of format {FORMAT}")
        try:
            tensors = {
                str(name): TensorRange(
                    (float(t["range"][0]), float(t["range"][1])),
                    (float(t["bounds"][0]), float(t["bounds"][1])),
                    float(t["mean"]),
                    float(t["deviation"]),
                    int(t["count"]),
                    tuple(int(c) for c in t["histogram"]),
                )
                for name, t in doc["tensors"].items()
            }
            return cls(
                tensors,
                str(doc["graph"]),
                str(doc["data"]),
                int(doc["samples"]),
                str(doc["spec"]),
                {str(k): float(v) for k, v in doc.get("states", {}).items()},
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UsageError(f"the calibration table is damaged: {error!r}") from None


@dataclass(frozen=True)
class Calibrate(Pass):
    """Observe activation ranges on the calibration set. Leaves the graph unchanged.

    `RegionObservers` among the artifacts set other observers for the values of some regions.
    """

    name: ClassVar[str] = "calibrate"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet,)
    provides: ClassVar[tuple[type, ...]] = (CalibrationTable,)
    observer: ObserverSetting = "mse"  # auto: per value, by measured error
    percentile: float = 99.99  # percent of the elements covered, for percentile and auto
    momentum: float = 0.9  # weight of the past, for observer=moving_average

    def __post_init__(self) -> None:
        self._observer(None)

    def _observer(self, rule: ObserverRule | None) -> Observer:
        setting = self.observer if rule is None else rule.observer
        kind: ObserverName = "mse" if setting == "auto" else setting
        percentile = self.percentile if rule is None else rule.percentile
        return Observer(kind, percentile, self.momentum)

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Run the graph on every sample.

        Raises:
            CalibrationError: A sample or an inner value holds NaN or infinity.
        """
        samples = ctx.get(CalibrationSet)
        regional = ctx.find(RegionObservers) or RegionObservers()
        rules = regional.of(graph)
        values = observed_values(graph)
        observers = {v.name: self._observer(rules.get(v.name)) for v in values}
        stats = {name: observer.start(name) for name, observer in observers.items()}
        inputs = {v.name for v in graph.inputs} & stats.keys()
        inner = [name for name in stats if name not in inputs]
        model = to_onnx(graph, extra_outputs=inner).SerializeToString()
        session = Session(model, optimization="basic")
        filled, named = Filled(graph), {v.name: v for v in values}
        ctx.progress("calibrate", 0, samples.runs)
        for done, batch in enumerate(samples, 1):
            found = session.run(batch.inputs, inner) if inner else {}
            for name, summary in stats.items():
                array = batch.inputs[name] if name in inputs else found[name]
                summary.add(filled.real(named[name], array, batch), self.momentum)
            ctx.progress("calibrate", done, samples.runs)
        tensors = {name: _entry(s, observers[name]) for name, s in stats.items()}
        measured = {
            name: observers[name].percentile
            for name in stats
            if (self.observer if name not in rules else rules[name].observer) == "auto"
        }
        if measured:
            tensors.update(self._chosen(graph, stats, tensors, measured, samples, ctx))
        ctx.put(
            CalibrationTable(
                tensors,
                digest(graph),
                samples.digest,
                samples.count,
                f"{self.spec()} {regional.spec()}" if rules else self.spec(),
                state_steps(graph, samples),
            )
        )
        return False

    def _chosen(
        self,
        graph: Graph,
        stats: Mapping[str, TensorStats],
        tensors: Mapping[str, TensorRange],
        percentiles: Mapping[str, float],
        samples: CalibrationSet,
        ctx: PassContext,
    ) -> dict[str, TensorRange]:
        """Return the entries of the values named whose range another observer sets better."""
        ranges = {n: candidate_ranges(stats[n], p) for n, p in percentiles.items()
                  if stats[n].count}  # fmt: skip
        # Spread over the set, so that they are not all of one kind.
        every = max(1, samples.runs // _CHOICE_RUNS)
        some = (b for i, b in enumerate(samples) if i % every == 0)
        kinds = choose_observers(graph, ranges, itertools.islice(some, _CHOICE_RUNS))
        counts = {k: list(kinds.values()).count(k) for k in dict.fromkeys(kinds.values())}
        found = ", ".join(f"{n} {k}" for k, n in sorted(counts.items()))
        ctx.log.append(f"{self.name}: observers by measured error: {found or 'all agree'}")
        return {
            name: dataclasses.replace(tensors[name], range=ranges[name][kind])
            for name, kind in kinds.items()
        }


def observed_values(graph: Graph) -> list[Value]:
    """Return the values that a plan might quantize, in the graph's order.

    These are the values that the all-integer plan quantizes, and every float operand of a product,
    which a plan with some float products may quantize instead.
    """
    regions = analyse(graph, uniform(graph, Precision.W8A8))
    wanted: dict[Value, None] = dict.fromkeys(regions.primary)
    for node in graph.nodes:
        if node.op.kind is OpKind.COMPUTE:
            wanted.update(dict.fromkeys(node.operands[:2]))
        if node.op.kind is OpKind.RECURRENT:
            wanted[node.outputs[0]] = None
    order = {v: i for i, v in enumerate(graph.values())}
    return sorted(
        (v for v in wanted if not v.is_constant and v.dtype is DType.FLOAT32),
        key=lambda v: order[v],
    )


def _entry(stats: TensorStats, observer: Observer) -> TensorRange:
    if stats.count == 0:
        return TensorRange((0.0, 0.0), (0.0, 0.0))
    summary: tuple[int, ...] = ()
    if stats.histogram is not None:
        centres, counts = stats.histogram.bins()
        bounds = (stats.least, stats.greatest)
        folded, _ = np.histogram(np.clip(centres, *bounds), _SUMMARY_BINS, bounds, weights=counts)
        summary = tuple(int(c) for c in folded)
    return TensorRange(
        observer.range(stats),
        (stats.least, stats.greatest),
        stats.mean,
        stats.deviation,
        stats.count,
        summary,
    )
