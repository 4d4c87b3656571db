# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Builds and judges joint models of one network: what the precision search tries things with.

The network is imported and calibrated once. A plan then costs its quantization, its build, one
pass over the samples and a few timed runs; what was judged before is found in the cache.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler import benchmark, data
from qcompiler.cache import Cache, key_of
from qcompiler.cpu import default_threads, host_cpu
from qcompiler.data import Budget, Evaluation, InputSpec, SampleSet, SampleSource, load_samples
from qcompiler.driver import Quantized, assemble
from qcompiler.errors import DataError
from qcompiler.example import example_of
from qcompiler.ir import Graph
from qcompiler.latency import KernelTime, LatencyTable, measure_models
from qcompiler.metrics import metric_of
from qcompiler.ops import Stage
from qcompiler.passmanager import Pass, PassContext, PassManager, ProgressFn, no_progress
from qcompiler.plan import PrecisionPlan, uniform
from qcompiler.printer import digest
from qcompiler.records import RecordFile
from qcompiler.region_measure import Replay
from qcompiler.runtime import CompiledModel
from qcompiler.targets.base import Backend, Built, TuningBudget
from qcompiler.types import Array, Precision

if TYPE_CHECKING:
    from qcompiler.onnx_import import ModelSource
    from qcompiler.passes.calibrate import CalibrationTable
    from qcompiler.regional import RegionOptions

__all__ = ["Figures", "Judge", "Prepared", "Trial", "Workshop", "prepare", "race", "records_file"]

_CAST_SHAPES = 24
"""Distinct shapes whose conversions are measured; others follow from the nearest in size."""


@dataclass(frozen=True)
class Figures:
    """What a joint model costs: predicted, or measured.

    Attributes:
        loss: Divergence from the float model's outputs on the calibration samples.
        drop: Of the metric, in points.
        seconds: Of one run, the least of many: what kernels' times add up to.
        size: Bytes of the artifact.
        slice_drop: Of the worst group of samples.
        median: Seconds of one run, the median: what limits hold for.
        memory: Bytes of the tensors between kernels.
    """

    loss: float | None = None
    drop: float | None = None
    seconds: float | None = None
    size: float | None = None
    slice_drop: float | None = None
    median: float | None = None
    memory: float | None = None

    @property
    def typical(self) -> float | None:
        """Seconds of one run as limits see them."""
        return self.seconds if self.median is None else self.median

    def keeps(self, budget: Budget) -> bool:
        """Whether every limit is kept; what was not measured keeps it."""
        return not self.broken(budget)

    def broken(self, budget: Budget) -> dict[str, float]:
        """Return the limits that are not kept, with what was found."""
        found = {
            "max_drop": self.drop,
            "max_latency_ms": None if self.typical is None else self.typical * 1e3,
            "max_size_mb": None if self.size is None else self.size / 1e6,
            "max_slice_drop": self.slice_drop,
            "max_memory_mb": None if self.memory is None else self.memory / 1e6,
        }
        over = {}
        for name, value in found.items():
            limit = getattr(budget, name)
            if limit is not None and value is not None and not value <= limit:
                over[name] = float(value)
        return over

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form that reports hold."""
        return {
            "loss": self.loss,
            "drop": self.drop,
            "latency_ms": None if self.seconds is None else self.seconds * 1e3,
            "size_bytes": None if self.size is None else round(self.size),
            "memory_bytes": None if self.memory is None else round(self.memory),
        }


@dataclass
class Trial:
    """A joint model.

    Attributes:
        plan: What was asked for.
        quantized: The passes' result, with the explained plan.
        built: What the backend made.
        compiled: The model.
        figures: What was measured of it.
    """

    plan: PrecisionPlan
    quantized: Quantized
    built: Built
    compiled: CompiledModel
    figures: Figures = field(default_factory=Figures)

    def note(self, **found: float | None) -> Figures:
        """Add measured figures."""
        self.figures = dataclasses.replace(self.figures, **found)
        return self.figures


@dataclass
class Prepared:
    """A network ready to be quantized in any way.

    Attributes:
        graph: Canonical FLOAT graph, after the methods that come before calibration.
        table: Its calibration table; None without samples.
        samples: Calibration samples.
        sources: Digests of model, graph and calibration data.
        count: Number of calibration samples.
        quantized: The model was imported quantized: there is nothing to choose.
    """

    graph: Graph
    table: CalibrationTable | None
    samples: SampleSet | None
    sources: dict[str, str]
    count: int
    quantized: bool = False


def prepare(
    model: ModelSource,
    *,
    calibration: SampleSource | None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    freeze: Mapping[str, Any] | None = None,
    methods: Sequence[Pass] = (),
    regions: Mapping[str, RegionOptions] | None = None,
    evaluate: object = None,
    seed: int = 0,
    progress: ProgressFn = no_progress,
) -> Prepared:
    """Import, simplify and calibrate a model.

    Args and errors: as `qcompiler.compile`; samples to evaluate on are only checked, before the
    long part.
    """
    from qcompiler.onnx_import import load_onnx, model_digest
    from qcompiler.passes.calibrate import (
        Calibrate,
        CalibrationSet,
        CalibrationTable,
        RegionObservers,
    )
    from qcompiler.passes.canonicalize import canonicalize_passes
    from qcompiler.regional import as_rules, check_regions

    samples = None if calibration is None else load_samples(calibration)
    shapes = {} if samples is None else samples.shapes()
    graph = load_onnx(model, input_shapes=input_shapes, freeze=freeze, sample_shapes=shapes)
    sources = {"model": model_digest(model)}
    if isinstance(evaluate, Evaluation):
        data.check_evaluation(evaluate, InputSpec.of_graph(graph))
    ctx = PassContext(seed=seed, progress=progress)
    graph = PassManager(canonicalize_passes()).run(graph, ctx)
    sources["graph"] = digest(graph)
    check_regions(graph, regions or {})
    if graph.stage is Stage.QDQ:
        return Prepared(graph, None, samples, sources, 0, quantized=True)
    if samples is None:
        return Prepared(graph, None, None, sources, 0)
    loaded = CalibrationSet.of(samples, graph)
    sources["calibration"] = loaded.digest
    ctx.put(loaded)
    ctx.put(uniform(graph))
    ctx.put(RegionObservers(as_rules(regions or {})))
    early = [m for m in methods if CalibrationTable not in m.requires]
    graph = PassManager([*early, Calibrate()], given=tuple(ctx.artifacts)).run(graph, ctx)
    return Prepared(graph, ctx.get(CalibrationTable), samples, sources, len(loaded))


class Workshop:
    """Makes joint models of a prepared network for a target.

    Attributes:
        prepared: The network.
        backend: The target, with tuned parameters where there are records.
    """

    def __init__(
        self,
        prepared: Prepared,
        backend: Backend,
        *,
        seed: int = 0,
        progress: ProgressFn = no_progress,
    ) -> None:
        self.prepared = prepared
        self.backend = backend
        self.seed = seed
        self.progress = progress
        self._made: dict[str, Trial] = {}
        self._example: Mapping[str, Array] | None = None

    def quantize(self, plan: PrecisionPlan) -> Quantized:
        """Return the network at a plan.

        Raises:
            DataError: The plan has integers and there are no samples.
        """
        from qcompiler.passes.calibrate import Calibrate
        from qcompiler.passes.insert_qdq import quantize_passes

        prepared = self.prepared
        ctx = PassContext(seed=self.seed)
        ctx.put(plan)
        if plan.has_integers:
            if prepared.table is None:
                raise DataError(
                    "integer precision needs calibration samples, got none",
                    hint="give calibration=... (--calibration), or precision='fp32'",
                )
            ctx.put(prepared.table)
        passes = [p for p in quantize_passes(plan) if not isinstance(p, Calibrate)]
        graph = PassManager(passes, given=tuple(ctx.artifacts)).run(prepared.graph, ctx)
        explained = ctx.get(PrecisionPlan)
        sources = {**prepared.sources, "plan": explained.digest()}
        return Quantized(prepared.graph, graph, explained, sources, prepared.count, ctx.log)

    def make(self, plan: PrecisionPlan) -> Trial:
        """Return the joint model of a plan; equal precisions are built once.

        Raises:
            UnsupportedByTargetError, CodegenError: As the backend's.
        """
        key = key_of({n: plan.precision(n).value for n in plan})
        if key not in self._made:
            quantized = self.quantize(plan)
            shaped = PassManager(self.backend.passes()).run(quantized.graph, PassContext())
            built = self.backend.build(self.backend.lower(shaped), TuningBudget())
            compiled = assemble(built, self.backend.spec, quantized)
            if self._example is None:
                self._example = example_of(compiled.inputs, self.prepared.samples)
            compiled.example = self._example
            size = float(sum(len(m) for m in compiled.artifact.members().values()))
            figures = Figures(size=size, memory=built.memory)
            self._made[key] = Trial(plan, quantized, built, compiled, figures)
        return self._made[key]

    def uniform(self, precision: Precision) -> Trial:
        """Return the model with everything at one precision."""
        return self.make(uniform(self.prepared.graph, precision))

    def latency_table(
        self,
        precisions: Sequence[Precision],
        file: RecordFile | None = None,
        *,
        fresh: bool = False,
        deadline: Callable[[], bool] = lambda: False,
    ) -> LatencyTable:
        """Measure every kernel at every precision, and the conversions.

        Args:
            precisions: To build the model at.
            file: Records that hold times, and get new ones.
            fresh: Measure what the records hold as well.
            deadline: Whether time is up.

        Raises:
            UnsupportedByTargetError: See `latency.measure_models`.
        """
        models: dict[str, Trial] = {}
        for i, precision in enumerate(precisions):
            self.progress("build", i, len(precisions) + 1)
            models[precision.value] = self.uniform(precision)
        casts = self._conversions()
        self.progress("build", len(precisions) + 1, len(precisions) + 1)
        pairs = {p: (t.built, t.compiled) for p, t in models.items()}
        if casts is not None:
            pairs["casts"] = (casts[0], casts[1])
        found = measure_models(
            pairs, file=file, fresh=fresh, deadline=deadline, progress=self.progress
        )
        times = {}
        if casts is not None:
            for region in found.models.pop("casts").regions:
                if region.seconds is not None and region.name in casts[2]:
                    times[casts[2][region.name]] = KernelTime(region.seconds, region.noise)
        for name, model in found.models.items():
            models[name].note(seconds=model.seconds)
        return LatencyTable(
            digest(self.prepared.graph),
            self.backend.spec.name,
            host_cpu().name,
            default_threads(),
            found.models,
            times,
            found.measured,
            found.reused,
        )

    def _conversions(self) -> tuple[Built, CompiledModel, dict[str, str]] | None:
        """Build a model of conversions only: region name -> key of the latency table."""
        from qcompiler.numerics import choose_qparams
        from qcompiler.passes.regions import analyse
        from qcompiler.types import DType, TensorType

        graph = self.prepared.graph
        held = analyse(graph, uniform(graph)).primary
        shapes = dict.fromkeys(_in_memory(v.shape) for v in held if not v.is_constant)
        if not shapes:
            return None
        chosen = sorted(shapes, key=math.prod)
        if len(chosen) > _CAST_SHAPES:
            at = np.linspace(0, len(chosen) - 1, _CAST_SHAPES).round().astype(int)
            chosen = [chosen[i] for i in dict.fromkeys(at.tolist())]
        casts = Graph("conversions", stage=Stage.INTEGER)
        q = choose_qparams(-1.0, 1.0, storage=DType.UINT8)
        keys: dict[str, str] = {}
        outputs = []
        for i, shape in enumerate(chosen):
            text = "x".join(map(str, shape))
            x = casts.add_input(f"x{i}", TensorType(shape, DType.FLOAT32))
            held_type = TensorType(shape, DType.UINT8, q)
            made = casts.add("quantize", [x], types=[held_type], name=f"quantize{i}")
            back = casts.add("dequantize", [made.output], name=f"dequantize{i}")
            keys[f"quantize{i}"] = f"quantize {text}"
            keys[f"dequantize{i}"] = f"dequantize {text}"
            outputs.append((f"y{i}", back.output))
        casts.set_outputs(outputs)
        shaped = PassManager(self.backend.passes()).run(casts, PassContext())
        built = self.backend.build(self.backend.lower(shaped), TuningBudget())
        plan = PrecisionPlan({})
        result = Quantized(None, casts, plan, {"model": "conversions", "plan": plan.digest()})
        return built, assemble(built, self.backend.spec, result), keys


def _in_memory(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape as the kernels hold it: pictures have their channels last."""
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape


class Judge:
    """Says what a joint model costs in accuracy, against the float model.

    Attributes:
        evaluation: Samples and metric, or a callable; None: only the loss is measured.
        metric: Name of the metric, or None.
        kind: "kl" or "mse": what the loss is.
    """

    def __init__(
        self,
        prepared: Prepared,
        evaluation: Evaluation | Callable[[CompiledModel], float] | None,
        cache: Cache,
        samples: int,
    ) -> None:
        from qcompiler.onnx_export import to_onnx
        from qcompiler.ort import Session
        from qcompiler.passes.sensitivity import head_of

        graph = prepared.graph
        self.evaluation = evaluation
        self.cache = cache
        self.metric: str | None = None
        self.baseline: float | None = None
        named = None
        if isinstance(evaluation, Evaluation):
            named = metric_of(evaluation.metric)
            self.metric = named.name
        elif evaluation is not None:
            self.metric = "custom"
        self.heads = {name: head_of(graph, v, "auto", named) for name, v in graph.outputs}
        kinds = {h.kind for h in self.heads.values()}
        self.kind = "mse" if kinds == {"mse"} else "kl"
        self.session = Session(to_onnx(graph).SerializeToString())
        self.replay = Replay(lambda feeds: self.session.run(dict(feeds)))
        self.batches = []
        if prepared.samples is not None:
            taken = 0
            for batch in prepared.samples.batches(InputSpec.of_graph(graph)):
                if taken >= samples:
                    break
                taken += batch.samples
                self.batches.append(batch)
        self.outputs = [self.session.run(dict(b.inputs)) for b in self.batches]
        self.stacked = {name: v.batch_axis != 0 for name, v in graph.outputs}
        self.key: list[object] = [
            prepared.sources, len(self.batches), self.metric,
            sorted(h.kind for h in self.heads.values()),
        ]  # fmt: skip
        if isinstance(evaluation, Evaluation):
            self.key.append(load_samples(evaluation.samples).digest())

    def judge(self, trial: Trial) -> Figures:
        """Measure loss and drop of a joint model, or find what was measured before."""
        if trial.figures.loss is not None:
            return trial.figures
        custom = self.evaluation is not None and not isinstance(self.evaluation, Evaluation)
        target = trial.compiled.target.name
        key = key_of(*self.key, digest(trial.quantized.graph), target)
        known = None if custom else self.cache.load("joint", key)
        if isinstance(known, dict) and {"loss", "drop", "slice_drop"} <= set(known):
            return trial.note(
                loss=known["loss"], drop=known["drop"], slice_drop=known["slice_drop"]
            )
        from qcompiler.measure import runnable

        model, _ = runnable(trial.compiled, trial.built)
        loss = self._loss(model)
        drop, slice_drop = self._drop(model)
        found = {"loss": loss, "drop": drop, "slice_drop": slice_drop}
        if not custom:
            self.cache.save("joint", key, found)
        return trial.note(**found)

    def _loss(self, model: CompiledModel) -> float:
        total, count = 0.0, 0
        for batch, reference in zip(self.batches, self.outputs, strict=True):
            found = model(dict(batch.inputs))
            for name, head in self.heads.items():
                cut = slice(None) if self.stacked[name] else slice(batch.samples)
                loss = head.loss(reference[name][cut], np.asarray(found[name])[cut])
                total += loss * batch.samples
            count += batch.samples
        mean = total / max(count, 1)
        return mean if math.isfinite(mean) else 1e30

    def _drop(self, model: CompiledModel) -> tuple[float | None, float | None]:
        if self.evaluation is None:
            return None, None
        if not isinstance(self.evaluation, Evaluation):
            score = float(self.evaluation(model))
            if self.baseline is None:
                wrapped = CompiledModel(
                    model.artifact, executor=_FloatExecutor(self.session, model)
                )
                self.baseline = float(self.evaluation(wrapped))
            return self.baseline - score, None
        self.replay.rewind()
        found = data.compare(model, self.replay, self.evaluation)
        worst = found.get("worst_slice") or {}
        drop = found["drop"]
        return (
            None if drop is None else float(drop),
            None if worst.get("drop") is None else float(worst["drop"]),
        )


class _FloatExecutor:
    """Runs the float network in ONNX Runtime behind a compiled model's interface."""

    def __init__(self, session: Any, model: CompiledModel) -> None:
        self.session = session
        self.names = tuple(model.inputs), tuple(model.outputs)

    def run(self, inputs: Sequence[Array], *, threads: int = 1) -> list[Array]:
        del threads
        found = self.session.run(dict(zip(self.names[0], inputs, strict=True)), self.names[1])
        return [found[name] for name in self.names[1]]


def race(
    trials: Mapping[str, Trial], *, rounds: int = 5, runs: int = 6, seconds: float = 6.0
) -> dict[str, float]:
    """Return the least seconds of one run of each model, all run in turn; note them in the trials.

    The least compares with the latency table: what else runs on the machine only adds to it.
    """
    inputs = {name: t.compiled.timed_inputs() for name, t in trials.items()}
    timed = benchmark.in_turn(
        {n: lambda t=t, x=inputs[n]: t.compiled(x) for n, t in trials.items()},  # type: ignore[misc]
        rounds=rounds,
        runs=runs,
        seconds=seconds,
    )
    for name, trial in trials.items():
        trial.note(seconds=timed[name].min_ms * 1e-3, median=timed[name].median_ms * 1e-3)
    return {name: t.min_ms * 1e-3 for name, t in timed.items()}


def records_file(cache: Cache, target: str, records: str | os.PathLike[str] | None) -> RecordFile:
    """Return where latencies are kept: the tuning records, or a file in the cache."""
    if records is not None:
        return RecordFile(os.fspath(records), target)
    return RecordFile(cache.folder / f"latency-{target}.jsonl", target)
