# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The main job, end to end: `compile` takes a model, data, a target and a budget.

ONNX -> Graph[FLOAT] -> canonicalize -> calibrate -> insert_qdq -> fuse -> Graph[INTEGER]
     -> the target's passes -> kernels -> library + parameters -> CompiledModel
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qcompiler.artifact import Artifact, ParamBlock
from qcompiler.cpu import host_cpu
from qcompiler.data import (
    Budget,
    Evaluation,
    InputSpec,
    SampleSource,
    check_evaluation,
    load_samples,
)
from qcompiler.dynamic_compile import build_sizes, joined, ranges_of
from qcompiler.errors import (
    DataError,
    TuningError,
    UnsupportedByTargetError,
    UsageError,
)
from qcompiler.example import example_of
from qcompiler.infinite import takes_infinity
from qcompiler.interrupts import interruptible
from qcompiler.ir import Graph
from qcompiler.limits import check_budget, check_measurable
from qcompiler.lock import Lock
from qcompiler.locked import check_given, decided_by, note_search
from qcompiler.manifest import TargetInfo, TensorSpec
from qcompiler.ops import Stage
from qcompiler.passmanager import (
    Instrument,
    Pass,
    PassContext,
    PassManager,
    ProgressFn,
    TimeInstrument,
    no_progress,
)
from qcompiler.plan import PrecisionPlan, edges_in_eight_bits, found_in, is_name, uniform
from qcompiler.printer import digest
from qcompiler.records import RecordFile, Records
from qcompiler.regional import (
    RegionOptions,
    Regions,
    as_rules,
    check_regions,
    options_of,
    overrides_with,
)
from qcompiler.registry import get_target
from qcompiler.runtime import CompiledModel
from qcompiler.targets.base import Backend, Built, TargetSpec, TuningBudget
from qcompiler.tuning import Tuning
from qcompiler.types import UNCALIBRATED, Array, Precision

_NOT_EXPORTED = frozenset(p.value for p in UNCALIBRATED)

if TYPE_CHECKING:
    from qcompiler.auto import Choice
    from qcompiler.onnx_import import ModelSource
    from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable
    from qcompiler.passes.insert_qdq import WeightGrids
    from qcompiler.passes.keep_float import KeptFloat


@dataclass
class Quantized:
    """A model after the passes that do not depend on the target's code.

    Attributes:
        float_graph: The canonical FLOAT graph, or None for a model imported as QDQ.
        graph: Graph[INTEGER].
        plan: Precision and reason per node.
        sources: Digests of model, calibration data and plan.
        samples: Number of calibration samples.
        calibration: The calibration samples; None where none were needed.
        table: What calibration found about each value; None likewise.
        methods: Names of the post-training methods that ran.
        prepared: What they made of the FLOAT graph, and the grids of weights that they rounded;
            None without methods.
        kept: Products that stay float because 8 bits do not hold their operands.
    """

    float_graph: Graph | None
    graph: Graph
    plan: PrecisionPlan
    sources: dict[str, str] = field(default_factory=dict)
    samples: int = 0
    log: list[str] = field(default_factory=list)
    calibration: CalibrationSet | None = None
    table: CalibrationTable | None = None
    methods: tuple[str, ...] = ()
    prepared: tuple[Graph, WeightGrids] | None = None
    kept: KeptFloat | None = None


def compile(
    model: ModelSource,
    *,
    target: str | TargetSpec = "host",
    calibration: SampleSource | None = None,
    precision: str | PrecisionPlan | os.PathLike[str] = "w8a8",
    evaluate: Evaluation | Callable[[CompiledModel], float] | None = None,
    budget: Budget | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    freeze: Mapping[str, Array | float | bool] | None = None,
    tuning: Tuning | None = None,
    methods: str | Sequence[Pass] | None = None,
    seed: int = 0,
    locked: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, str | Precision] | None = None,
    regions: Regions | None = None,
    progress: ProgressFn | None = None,
) -> CompiledModel:
    """Compile a trained ONNX model for a target.

    Args:
        model: Path of an ONNX file, or a ModelProto.
        target: Target name ("host" picks the best row for this CPU) or a TargetSpec.
        calibration: Representative samples (see `qcompiler.data.load_samples`); needed for integer
            precisions unless the model is already quantized.
        precision: "w8a8", "w4a8" (first and last products keep 8 bits), "w4a8-group" and others;
            without calibration "fp32", "fp16", "w8", "w4", "w8a8-dynamic" (docs/precisions.md); a
            PrecisionPlan, or the path of a saved plan; "auto" searches the fastest plan that keeps
            the budget, by latency measured on the target (`qcompiler.auto`).
        evaluate: Labelled samples and a metric, or a callable that scores a CompiledModel (higher
            is better); measures what compilation costs.
        budget: Limits that the result must keep.
        input_shapes: Shapes of inputs with symbolic dimensions, by name. An extent that is a pair
            (least, greatest) is chosen by each call: `{"ids": (1, (1, 128))}`.
        freeze: Inputs bound to constants, by name.
        tuning: Tuning records to use, and limits of further tuning; None uses the analytic
            defaults.
        methods: Post-training methods that keep accuracy, as passes or as text:
            "equalize,adaround"; what held-out calibration samples do not approve is undone. None
            takes `default_methods` of the precision: some for 4-bit weights, none for others, and
            for a saved plan those that it was made with.
        seed: Seed of everything random.
        locked: Artifact or lock file to make again: whatever differs from it is refused, and its
            plan is taken where "auto" would search for one.
        overrides: Precisions forced by selector: a node name, a pattern over node names, `op:NAME`,
            or a region (`input:NAME`, `fusion`); later ones win.
        regions: What is asked of regions of a model with several inputs (docs/hybrid.md), by
            selector: `{"input:image": RegionOptions("w8a8", observer="percentile")}`.
        progress: Called with (what is going on, units done, units in total).

    Returns:
        A model that runs, with `report` holding the measured figures.

    Raises:
        UsageError: Options that make no sense, alone or together, or a plan that cannot be read.
        ModelError: The model cannot be read, or holds operators that cannot be compiled.
        ShapeError: Extents of inputs that stay open, or do not fit.
        DataError: The samples do not fit the model, or there are none where they are needed.
        UnknownTargetError: No such target.
        UnsupportedByTargetError: The target lacks what was asked for, or cannot be measured here.
        TuningError: Tuning records cannot be read or written, or nothing lends a device.
        InfeasibleBudgetError: The budget is not kept; its `best` is the compiled model.
        LockError: Something differs from `locked`; all of it is listed.
    """
    from qcompiler.passes.methods import default_methods

    started = time.perf_counter()
    report_progress = progress or no_progress
    backend = get_target(target)
    asked = options_of(regions)
    check_measurable(budget, evaluate, asked, searched=precision == "auto")
    overrides = overrides_with(asked, overrides)
    ranges = ranges_of(model, input_shapes)
    chosen = methods is not None
    if methods is None:
        methods = "" if ranges is not None else default_methods(precision)
    decided = decided_by(backend.spec, methods, input_shapes, freeze, seed, asked)
    lock = None if locked is None else Lock.load(locked)
    calibration = None if calibration is None else load_samples(calibration)
    if lock is not None:
        check_given(lock, decided, model, calibration, evaluate, tuning)
        if lock.gives_plan(precision):
            precision = lock.precision_plan()
            decided = decided.searched(
                lock.options.get("precision"), lock.digests.get("evaluation")
            )
    if ranges is not None:
        input_shapes = ranges.shapes_of(calibration)
    choice: Choice | None = None
    if isinstance(precision, str) and precision == "auto":
        from qcompiler.auto import choose

        choice = choose(
            model,
            backend,
            calibration=calibration,
            evaluate=evaluate,
            budget=budget,
            input_shapes=input_shapes,
            freeze=freeze,
            tuning=tuning,
            methods=methods,
            overrides=overrides,
            regions=asked,
            seed=seed,
            progress=report_progress,
        )
        decided = decided.searched("auto")
        precision, evaluate, tuning = choice.plan, choice.evaluate, choice.tuning
    clock = TimeInstrument()
    result = quantize_model(
        model,
        spec=backend.spec,
        calibration=calibration,
        precision=precision,
        input_shapes=input_shapes,
        freeze=freeze,
        methods=methods,
        methods_chosen=chosen,
        overrides=overrides,
        regions=asked,
        seed=seed,
        progress=report_progress,
        instruments=(clock,),
        evaluate=evaluate if isinstance(evaluate, Evaluation) and ranges is None else None,
    )
    if choice is not None:
        result.sources.update(choice.sources)
        result.log.extend(choice.notes)
    if lock is not None:
        lock.check_plan(result.plan, result.sources["plan"])
    if ranges is None:
        built = build_graph(result.graph, backend, report_progress, tuning=tuning, seed=seed)
        compiled = assemble(built, backend.spec, result, decided)
    else:
        parts, dynamic = build_sizes(
            model,
            ranges,
            result,
            backend,
            lambda g: build_graph(g, backend, report_progress, tuning=tuning, seed=seed),
            freeze=freeze,
            progress=report_progress,
        )
        built = parts[-1]
        whole = assemble(built, backend.spec, result, decided).artifact
        compiled = CompiledModel(joined(whole, parts, dynamic))
    result.log.extend(built.notes)
    compiled.example = example_of(compiled.inputs, calibration)
    if lock is not None:
        lock.check_result(compiled.artifact)
    from qcompiler.measure import measured_report

    compiled.report = measured_report(
        compiled,
        built,
        result,
        model=model,
        evaluate=evaluate,
        frozen=bool(freeze),
        seconds=time.perf_counter() - started,
        pass_seconds=clock.seconds,
        progress=report_progress,
    )
    if ranges is None:
        from qcompiler.region_measure import measure_regions

        measure_regions(
            compiled.report, result, backend, compiled, evaluate, asked, report_progress
        )
    if choice is None and lock is None and ranges is None and isinstance(precision, str):
        from qcompiler.fallback import without_slower_regions

        given = {d.precision for d in result.plan.nodes.values()}
        groups = precision == Precision.W4A8.value and Precision.W4A8_GROUP in given
        choice = without_slower_regions(
            model,
            backend,
            Precision.W4A8_GROUP.value if groups else precision,
            compiled.report,
            calibration=calibration,
            input_shapes=input_shapes,
            freeze=freeze,
            tuning=tuning,
            methods=methods,
            overrides=overrides,
            regions=asked,
            seed=seed,
            progress=report_progress,
            kept=result.kept,
        )
        if choice is not None:
            compiled = compile(
                model,
                target=target,
                calibration=calibration,
                precision=choice.plan,
                evaluate=evaluate,
                input_shapes=input_shapes,
                freeze=freeze,
                tuning=choice.tuning,
                methods=methods if choice.plan.has_integers else (),
                regions={s: dataclasses.replace(r, precision=None) for s, r in asked.items()},
                seed=seed,
                progress=progress,
            )
            note_search(compiled, precision)
    if choice is not None:
        choice.finish(compiled)
    check_budget(compiled, budget, asked)
    return compiled


def quantize_model(
    model: ModelSource,
    *,
    spec: TargetSpec | None = None,
    calibration: SampleSource | None = None,
    precision: str | PrecisionPlan | os.PathLike[str] = "w8a8",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    freeze: Mapping[str, Array | float | bool] | None = None,
    methods: str | Sequence[Pass] = (),
    methods_chosen: bool = True,
    overrides: Mapping[str, str | Precision] | None = None,
    regions: Mapping[str, RegionOptions] | None = None,
    seed: int = 0,
    progress: ProgressFn = no_progress,
    instruments: Sequence[Instrument] = (),
    stage: Stage = Stage.INTEGER,
    evaluate: Evaluation | None = None,
) -> Quantized:
    """Run every pass up to Graph[INTEGER], or up to Graph[QDQ] for export.

    Args and errors: as `compile`; `spec` limits the precisions, `stage` says where to stop, samples
    of `evaluate` are only checked: what does not fit is said before the long part. Methods that
    nobody chose are left out where the model is quantized already.
    """
    from qcompiler.onnx_import import load_onnx, model_digest
    from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable, RegionObservers
    from qcompiler.passes.canonicalize import canonicalize_passes
    from qcompiler.passes.float_products import FloatProducts
    from qcompiler.passes.fuse import Fuse
    from qcompiler.passes.groups import Groups
    from qcompiler.passes.insert_qdq import InsertQdq, WeightGrids, quantize_passes
    from qcompiler.passes.keep_float import AskedFor, KeepFloat, KeptFloat
    from qcompiler.passes.methods import check_scopes, parse_methods
    from qcompiler.passes.narrow_products import NarrowProducts

    wanted = parse_methods(methods) if isinstance(methods, str) else tuple(methods)

    progress("import", 0, 1)
    samples = None if calibration is None else load_samples(calibration)
    shapes = {} if samples is None else samples.shapes()
    graph = load_onnx(model, input_shapes=input_shapes, freeze=freeze, sample_shapes=shapes)
    sources = {"model": model_digest(model)}
    if evaluate is not None:
        check_evaluation(evaluate, InputSpec.of_graph(graph))
    progress("import", 1, 1)
    ctx = PassContext(seed=seed, progress=progress)
    imported_qdq = graph.stage is Stage.QDQ
    if imported_qdq and not methods_chosen:
        wanted = ()
    _check_methods(wanted, imported_qdq)
    graph = PassManager(canonicalize_passes(), instruments).run(graph, ctx)
    check_regions(graph, regions or {})
    check_scopes(graph, wanted)
    if imported_qdq:
        integer = PassManager(_passes_of_imports(precision), instruments).run(graph, ctx)
        found = ctx.get(FloatProducts)
        plan = found_in(integer, found.reasons)
        ctx.log.extend(f"{name} stays float: {why}" for name, why in found.reasons.items())
        sources["plan"] = plan.digest()
        graph = integer if stage is Stage.INTEGER else graph
        return Quantized(None, graph, plan, sources, 0, ctx.log)
    plan = _plan(precision, graph, spec)
    asked = plan.overridden(graph, overrides) if overrides else plan
    by_name = frozenset(n for n, d in asked.nodes.items() if d != plan.nodes.get(n))
    plan = asked
    held: tuple[Pass, ...] = (KeepFloat(),) if is_name(precision) else ()  # a plan stays as it is
    if wanted and not plan.has_integers:
        raise UsageError("the methods serve integer precisions; the plan has none",
                         hint="leave them out, or ask for an integer precision")  # fmt: skip
    if stage is not Stage.INTEGER and plan.has_narrow:
        named = sorted({d.precision.value for d in plan.nodes.values()} & _NOT_EXPORTED)
        raise UsageError(
            f"a QDQ model cannot say what precision {', '.join(named)} computes",
            hint="compile it instead, or export at fp32 or a wNaM precision",
        )
    sources["graph"] = digest(graph)
    ctx.put(plan)
    count = 0
    grouped = is_name(precision) and (spec is None or Precision.W4A8_GROUP in spec.precisions)
    running = [m for m in wanted if grouped or not isinstance(m, Groups)]  # a plan stays as it is
    passes = [
        p
        for p in quantize_passes(plan, (*held, *running))
        if stage is Stage.INTEGER or not isinstance(p, (Fuse, NarrowProducts))
    ]
    if plan.has_integers:
        if samples is None:
            raise DataError(
                "integer precision needs calibration samples, got none",
                hint="give calibration=... (--calibration), or precision='fp32'",
            )
        loaded = CalibrationSet.of(samples, graph)
        ctx.put(loaded)
        ctx.put(RegionObservers(as_rules(regions or {})))
        sources["calibration"] = loaded.digest
        count = len(loaded)
        ctx.put(AskedFor(by_name))
    start, prepared = graph, None
    if wanted:
        cut = next(i for i, p in enumerate(passes) if isinstance(p, InsertQdq))
        given = tuple(ctx.artifacts)
        start = PassManager(passes[:cut], instruments, given=given).run(graph, ctx)
        prepared = (start, ctx.find(WeightGrids) or WeightGrids())
        passes = passes[cut:]
    integer = PassManager(passes, instruments, given=tuple(ctx.artifacts)).run(start, ctx)
    ran = ",".join(m.spec() for m in wanted)
    plan = dataclasses.replace(ctx.get(PrecisionPlan), methods=ran)
    sources["plan"] = plan.digest()
    return Quantized(
        graph,
        integer,
        plan,
        sources,
        count,
        ctx.log,
        ctx.find(CalibrationSet),
        ctx.find(CalibrationTable),
        tuple(m.name for m in wanted),
        prepared,
        ctx.find(KeptFloat),
    )


def _passes_of_imports(precision: str | PrecisionPlan | os.PathLike[str]) -> list[Pass]:
    """Return what makes integer operators of a model that is quantized already."""
    from qcompiler.passes.block_products import BlockProducts
    from qcompiler.passes.fuse import Fuse
    from qcompiler.passes.widen_integers import WidenIntegers

    if precision == Precision.W8A8_DYNAMIC.value:  # what the model leaves open
        return [WidenIntegers(), Fuse(), BlockProducts()]
    return [WidenIntegers(), Fuse()]


def _check_methods(methods: Sequence[Pass], quantized: bool) -> None:
    if methods and quantized:
        raise UsageError("the model is quantized already: its weights and scales are kept",
                         hint="leave the methods out, or start from the float model")  # fmt: skip


def _plan(
    precision: str | PrecisionPlan | os.PathLike[str], graph: Graph, spec: TargetSpec | None
) -> PrecisionPlan:
    if isinstance(precision, PrecisionPlan):
        return precision
    if is_name(precision):
        wanted = Precision.parse(precision)
        if spec is not None and wanted not in spec.precisions:
            known = ", ".join(p.value for p in spec.precisions)
            raise UnsupportedByTargetError(
                f"target {spec.name} has no kernels for precision {wanted.value}: it has {known}"
            )
        plan = uniform(graph, wanted)
        if wanted.is_integer and wanted.weight_bits <= 4:
            return edges_in_eight_bits(graph, plan)
        return plan
    return PrecisionPlan.load(pathlib.Path(precision))


def build_graph(
    graph: Graph,
    backend: Backend,
    progress: ProgressFn = no_progress,
    *,
    tuning: Tuning | None = None,
    seed: int = 0,
) -> Built:
    """Run the target's passes on Graph[INTEGER], tune if asked to, lower and build it."""
    with interruptible():
        shaped = PassManager(backend.passes()).run(graph, PassContext(progress=progress))
        records = None
        if tuning is not None:
            records = _tuned(shaped, backend, tuning, seed, progress)
            backend = backend.with_records(records)
        built = backend.build(backend.lower(shaped, progress), TuningBudget(), progress)
        used = None if records is None else records.used_digest()
        return dataclasses.replace(built, records=used)


def _tuned(
    graph: Graph, backend: Backend, tuning: Tuning, seed: int, progress: ProgressFn
) -> Records:
    """Return the records that choose the parameters, after more tuning where it is asked for."""
    with tempfile.TemporaryDirectory(prefix="qcompiler-records-") as folder:
        if tuning.records is None:
            tuning = dataclasses.replace(tuning, records=folder)
        file = RecordFile(os.fspath(tuning.records or folder), backend.spec.name)
        if tuning.searches:
            backend.tune(graph, tuning, seed=seed, progress=progress)
        elif not file.path.exists():
            raise TuningError(
                f"there are no tuning records at {file.path}",
                hint="make some with `qcompile tune`, or give a limit for tuning now",
            )
        return file.read(host_cpu().name)


def assemble(
    built: Built, spec: TargetSpec, result: Quantized, decided: Lock | None = None
) -> CompiledModel:
    """Return the model of what a backend built, with a lock where it is known what decided it."""
    graph = built.graph
    sources = {**result.sources, **(decided.digests if decided is not None else {})}
    if built.records is not None:
        sources["records"] = built.records
    lock = None if decided is None else dataclasses.replace(decided, digests=sources).to_json()
    names = _distinct(built.parameter_names)
    infinite = takes_infinity(graph)
    artifact = Artifact(
        target=TargetInfo(
            name=spec.name,
            architecture=(spec.triple or "any").split("-")[0],
            cpu_features=spec.cpu_features,
            isa=spec.isa or "",
            triple=spec.triple or "",
            mcpu=spec.mcpu or "",
        ),
        inputs={
            v.name: TensorSpec(v.shape, v.dtype, v.batch_axis, v.qparams, v.name in infinite)
            for v in graph.inputs
        },
        outputs={
            name: TensorSpec(v.shape, v.dtype, v.batch_axis, v.qparams) for name, v in graph.outputs
        },
        params=ParamBlock.from_arrays(dict(zip(names, built.parameters, strict=True))),
        library=built.library,
        plan=result.plan.to_json(),
        executor=built.executor,
        extras=dict(built.members),
        sources=sources,
        lock=lock,
    )
    return CompiledModel(artifact)


def _distinct(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    out = []
    for name in names:
        count = seen.get(name, 0)
        seen[name] = count + 1
        out.append(f"{name}#{count}" if count else name)
    return out
