# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`precision="auto"`: the fastest plan that keeps the budget, by measured latency and sensitivity.

calibrate -> sensitivity of every product -> latency of every kernel at every precision -> solve,
build, evaluate, learn, solve again. Each step leaves what it found in the cache, so an interrupted
search goes on where it was, and another target starts with the sensitivities.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qcompiler import benchmark
from qcompiler.assignment_log import assignment_log, measured_log, reasons_of
from qcompiler.cache import Cache, cache_folder, key_of
from qcompiler.candidates import wanted_precisions
from qcompiler.cpu import host_cpu
from qcompiler.data import Budget, Evaluation, SampleSource, load_samples
from qcompiler.decisions import Network, network_of
from qcompiler.errors import DataError, InfeasibleBudgetError, UsageError
from qcompiler.interrupts import interruptible
from qcompiler.latency import runs_here
from qcompiler.metrics import SQNR_CEILING
from qcompiler.passmanager import Pass, PassContext, PassManager, ProgressFn, no_progress
from qcompiler.plan import PrecisionPlan, uniform
from qcompiler.printer import digest
from qcompiler.records import RecordFile
from qcompiler.regional import RegionOptions
from qcompiler.runtime import CompiledModel
from qcompiler.search import search
from qcompiler.search_regions import Regional
from qcompiler.targets.base import Backend
from qcompiler.tuning import Tuning
from qcompiler.types import Precision
from qcompiler.workshop import Judge, Prepared, Workshop, prepare, race, records_file

if TYPE_CHECKING:
    from qcompiler.latency import LatencyTable
    from qcompiler.onnx_import import ModelSource
    from qcompiler.passes.sensitivity_report import SensitivityReport

__all__ = ["SAMPLES", "Choice", "choose", "default_budget", "latency_of", "sensitivity_of"]

SAMPLES = 32
"""Calibration samples of the sensitivity analysis: losses are compared, not reported."""
_JOINT_SAMPLES = 128
"""Calibration samples on which joint models are compared with float."""
OFF = 1.25
"""Ratio of a whole run to the sum of its kernels beyond which latencies are measured again."""
_BUSY = 1.5
"""Ratio between a measured and a predicted latency that the user is told about."""
_ANALYSIS_SHARE = 0.3
"""Share of the wall-clock budget that the sensitivity analysis may take."""
_LEAST_SAMPLES = 4
_TUNING_SHARE = 0.6
"""Share of the wall-clock budget that kernel tuning gets, of what is left when it starts."""

Score = Callable[[CompiledModel], float]


@dataclass
class Choice:
    """The chosen plan and why.

    Attributes:
        plan: Precision per node.
        log: The decision log (docs/json.md, "assignment"); `finish` completes it.
        least: Least feasible limits, where the budget cannot be kept; else empty.
        sources: Digests of further data that steered the choice.
        notes: What the user should know, one sentence each.
        evaluate: What the result is to be scored with.
        tuning: Records that the build is to use; nothing further is tuned.
        budget: The budget in force, defaults filled in.
    """

    plan: PrecisionPlan
    log: dict[str, Any] | None
    least: dict[str, float] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    evaluate: Evaluation | Score | None = None
    budget: Budget = field(default_factory=Budget)
    tuning: Tuning | None = None

    def finish(self, compiled: CompiledModel) -> None:
        """Add the log to the report of the compiled model, with what that measured.

        Raises:
            InfeasibleBudgetError: No plan that was tried keeps the budget; `best` is the model.
        """
        if self.log is None or compiled.report is None:
            return
        log = measured_log(self.log, compiled.report)
        said = list(compiled.report.get("notes") or ())
        notes = [*said, *(n for n in self.notes if n not in said)]
        compiled.report = {**compiled.report, "assignment": log, "notes": notes}
        if log["infeasible"] is not None:
            raise InfeasibleBudgetError(
                log["infeasible"]["message"],
                least=dict(log["infeasible"]["least"]),
                best=compiled,
                hint="relax the limit to the figure named, or give more time or data",
            )


def choose(
    model: ModelSource,
    backend: Backend,
    *,
    calibration: SampleSource | None,
    evaluate: Evaluation | Score | None = None,
    budget: Budget | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    freeze: Mapping[str, Any] | None = None,
    tuning: Tuning | None = None,
    methods: str | Sequence[Pass] = (),
    overrides: Mapping[str, str | Precision] | None = None,
    regions: Mapping[str, RegionOptions] | None = None,
    seed: int = 0,
    progress: ProgressFn = no_progress,
) -> Choice:
    """Return the plan of least latency that keeps the budget.

    Args and errors: as `qcompiler.compile`.
    """
    from qcompiler.passes.methods import parse_methods

    wanted = parse_methods(methods) if isinstance(methods, str) else tuple(methods)
    clock = Clock(None if tuning is None else tuning.seconds)
    seconds: dict[str, float] = {}
    prepared = prepare(
        model, calibration=calibration, input_shapes=input_shapes, freeze=freeze,
        methods=wanted, regions=regions, evaluate=evaluate, seed=seed, progress=progress,
    )  # fmt: skip
    nothing = _nothing_to_choose(prepared, backend)
    if nothing is not None:
        plan = (
            uniform(prepared.graph, Precision.FP32) if not prepared.quantized else PrecisionPlan()
        )
        return Choice(
            plan,
            None,
            notes=[nothing],
            evaluate=evaluate,
            budget=budget or Budget(),
            tuning=only_records(tuning),
        )
    if prepared.table is None or calibration is None:
        raise DataError(
            "automatic precision needs calibration samples, got none",
            hint="give calibration=... (--calibration), or precision='fp32'",
        )
    limits, evaluation, by_default = default_budget(budget, evaluate, calibration, prepared)
    cache = Cache(cache_folder(None if tuning is None else tuning.records))
    notes: list[str] = []
    with interruptible():
        precisions = wanted_precisions(backend, prepared, limits, overrides)
        mark = time.perf_counter()
        sensitivity = sensitivity_of(
            prepared, precisions, cache, seed=seed, clock=clock, notes=notes, progress=progress
        )
        seconds["sensitivity"] = time.perf_counter() - mark
        mark = time.perf_counter()
        backend, known = _tuned_backend(
            prepared, backend, precisions, tuning, clock, cache, seed, progress
        )
        if tuning is not None and tuning.searches:
            seconds["tuning"] = time.perf_counter() - mark
        workshop = Workshop(prepared, backend, seed=seed, progress=progress)
        mark = time.perf_counter()
        file = records_file(cache, backend.spec.name, None if tuning is None else tuning.records)
        if clock.late():
            precisions = [p for p in precisions if p in (Precision.W8A8, Precision.FP32)]
            notes.append("the time was up before kernels were measured: only w8a8 and fp32 are "
                         "compared")  # fmt: skip
        table = trusted_table(workshop, precisions, file, clock.late)
        seconds["latency"] = time.perf_counter() - mark
        mark = time.perf_counter()
        network = network_of(prepared.graph, table, precisions, sensitivity)
        network = network.with_fixed(fixed_by(network, prepared, overrides))
        if limits.max_memory_mb is not None:
            network = network.with_memory()
        judge = Judge(prepared, evaluation, cache, _JOINT_SAMPLES)
        regional = Regional.of(prepared.graph, regions or {})
        network = network.with_groups(regional.nodes)
        trials = {p.value: workshop.uniform(p) for p in precisions}
        seconds["assign"] = time.perf_counter() - mark
        mark = time.perf_counter()
        outcome = search(
            network, workshop, judge, limits, uniform=trials, regional=regional,
            late=clock.late, progress=progress,
        )  # fmt: skip
        seconds["rounds"] = time.perf_counter() - mark
    log = assignment_log(outcome, table, limits, judge, trials, by_default, seconds)
    plan = outcome.network.plan(outcome.choices, reasons_of(log))
    if overrides:
        plan = plan.overridden(prepared.graph, overrides)
    sources = {}
    if isinstance(evaluation, Evaluation):
        sources["evaluation"] = load_samples(evaluation.samples).digest()
    notes += [log["statement"]] if by_default else []
    notes += [outcome.note] if outcome.note else []
    expected, took = outcome.predicted.seconds, outcome.trial.figures.seconds
    if expected and took and not 1 / _BUSY <= took / expected <= _BUSY:
        notes.append(
            f"one run took {took * 1e3:.3g} ms, its kernels add up to {expected * 1e3:.3g} ms: the "
            f"machine was busy, and another search may choose better"
        )
    return Choice(plan, log, dict(outcome.broken), sources, notes, evaluation, limits, known)


def trusted_table(
    workshop: Workshop,
    precisions: Sequence[Precision],
    file: RecordFile | None,
    late: Callable[[], bool] = lambda: False,
) -> LatencyTable:
    """Return a latency table that agrees with whole runs; a table that does not is made anew, once.

    What the records hold may come from a busy moment, or from before the machine changed.
    """
    table = workshop.latency_table(precisions, file, deadline=late)
    trials = {p.value: workshop.uniform(p) for p in precisions}
    if not runs_here(trials[precisions[0].value].compiled):
        return table
    seconds = race(trials, rounds=3)
    off = [p for p, s in seconds.items() if not 1 / OFF <= table.expected(p) / s <= OFF]
    if off:
        table = workshop.latency_table(precisions, file, fresh=True, deadline=late)
    else:
        for name, trial in trials.items():
            trial.note(seconds=seconds[name])
    return table


def _nothing_to_choose(prepared: Prepared, backend: Backend) -> str | None:
    from qcompiler.passes.single_node import units

    if prepared.quantized:
        return "the model is quantized already: its precisions and scales are kept"
    if not any(p.is_integer for p in backend.spec.precisions):
        return f"target {backend.spec.name} has float kernels only: everything stays float"
    if not units(prepared.graph):
        return "no operator of the model has an integer form that pays: everything stays float"
    return None


def default_budget(
    budget: Budget | None,
    evaluate: Evaluation | Score | None,
    calibration: SampleSource,
    prepared: Prepared,
) -> tuple[Budget, Evaluation | Score | None, bool]:
    """Return the budget in force, what scores it, and whether a limit on the drop was filled in.

    Without any limit on drop or latency, "auto" means: nearly as good as float. That is 1 point of
    top-1 or top-5; 1 % of a score of one's own; without labels a divergence of 0.01 nat of class
    scores, or an SQNR of 30 dB, on the calibration samples.

    Raises:
        UsageError: A limit on the drop without anything to evaluate.
    """
    given = budget or Budget()
    if given.max_drop is not None or given.max_slice_drop is not None:
        if evaluate is None:
            raise UsageError(
                "a limit on the drop needs something that measures it",
                hint="give evaluate=... (--evaluate and --metric)",
            )
        return given, evaluate, False
    if given.max_latency_ms is not None:
        return given, evaluate, False
    if evaluate is None:
        classes = _scores_classes(prepared)
        evaluate = Evaluation(calibration, "kl" if classes else "sqnr")
    if not isinstance(evaluate, Evaluation):
        return dataclasses.replace(given, max_drop=0.01), evaluate, True
    limit = {"top1": 1.0, "top5": 1.0, "kl": 0.01, "cosine": 0.01, "sqnr": SQNR_CEILING - 30.0}
    return dataclasses.replace(given, max_drop=limit.get(evaluate.metric, 0.01)), evaluate, True


def _scores_classes(prepared: Prepared) -> bool:
    from qcompiler.passes.sensitivity import head_of

    kinds = {head_of(prepared.graph, v, "auto", None).kind for _, v in prepared.graph.outputs}
    return "mse" not in kinds


class Clock:
    """The one wall-clock budget of a search; without a limit, time is never up.

    Attributes:
        limit: Seconds, or None.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self._started = time.perf_counter()

    def left(self) -> float:
        """Return the seconds that are left; infinity without a limit."""
        if self.limit is None:
            return math.inf
        return self.limit - (time.perf_counter() - self._started)

    def late(self) -> bool:
        """Whether time is up."""
        return self.left() <= 0


def fixed_by(
    network: Network, prepared: Prepared, overrides: Mapping[str, str | Precision] | None
) -> dict[str, str]:
    """Return what overrides bind: item -> precision.

    Raises:
        UsageError: As `PrecisionPlan.overridden`; a precision that is not among an item's options.
    """
    if not overrides:
        return {}
    plain = uniform(prepared.graph)
    forced = plain.overridden(prepared.graph, overrides)
    fixed = {}
    for item in network.problem.items:
        if forced.nodes[item.name] == plain.nodes[item.name]:
            continue
        wanted = forced.precision(item.name).value
        if item.name in network.followers and forced.precision(item.name).is_integer:
            continue  # it is in integers where its neighbours let it
        if wanted not in item.options:
            known = ", ".join(item.options)
            raise UsageError(
                f"node {item.name!r} cannot have the precision {wanted}: on this target it has "
                f"{known}",
                node=item.name,
            )
        fixed[item.name] = wanted
    return fixed


# -------------------------------------------------------------------------------- sensitivities


def sensitivity_of(
    prepared: Prepared,
    precisions: Sequence[Precision],
    cache: Cache,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    clock: Clock | None = None,
    notes: list[str] | None = None,
    progress: ProgressFn = no_progress,
) -> SensitivityReport:
    """Return what each product's rounding costs at the model's outputs, without labels.

    A finished analysis of the same network and data is taken from the cache if it has the widths,
    whatever the target was; an unfinished one goes on. Under a limit of time the analysis gets a
    share of it: fewer samples where it would take longer, and at the end products stay without an
    analysis; `notes` then gets a sentence.
    """
    from qcompiler.passes.sensitivity import Settings, measure_sensitivity
    from qcompiler.passes.sensitivity_report import SensitivityReport
    from qcompiler.passes.single_node import units

    assert prepared.table is not None
    assert prepared.samples is not None
    plain = [p for p in precisions if p.is_integer and p is not Precision.W4A8_GROUP]
    forms: set[Precision] = {p for p in precisions if p not in (*plain, Precision.FP32)}
    weights = {p.weight_bits for p in plain} | {8}
    activations = {p.activation_bits for p in plain} | {8}

    def key_for(count: int) -> str:
        assert prepared.table is not None
        return key_of(
            digest(prepared.graph), prepared.sources["calibration"], prepared.table.spec, count,
            seed,
        )  # fmt: skip

    known = cache.load("sensitivity", key_for(samples))
    if isinstance(known, dict):
        have_w, have_a = set(known.get("weight_bits", ())), set(known.get("activation_bits", ()))
        have_f = {Precision.parse(p) for p in known.get("forms", ())}
        if weights <= have_w and activations <= have_a and forms <= have_f:
            try:
                return SensitivityReport.from_json(known["report"])
            except (UsageError, KeyError):
                pass  # damaged: measured anew
        weights, activations, forms = weights | have_w, activations | have_a, forms | have_f
    room = math.inf if clock is None else clock.left() * _ANALYSIS_SHARE
    found = len(units(prepared.graph))
    if math.isfinite(room):
        one = _seconds_of_a_run(prepared) * found * (len(weights) + len(activations) + len(forms))
        while samples > _LEAST_SAMPLES and one / 2 * samples > room:  # half a run follows a product
            samples //= 2
    how = Settings(
        weight_bits=tuple(sorted(weights, reverse=True)),
        samples=samples,
        fisher_samples=0,
        seed=seed,
        activation_bits=tuple(sorted(activations, reverse=True)),
        forms=tuple(p for p in Precision if p in forms),
    )
    names = sorted(p.value for p in forms)
    key = key_for(samples)
    widths = (sorted(weights), sorted(activations), *([names] if names else []))
    part = cache.path("sensitivity-part", key_of(key, *widths))
    end = time.perf_counter() + room
    result = measure_sensitivity(
        prepared.graph, prepared.table, prepared.samples, settings=how, state=part,
        late=lambda: time.perf_counter() > end, progress=progress,
    )  # fmt: skip
    missing = found - len(result.nodes)
    if missing:
        if notes is not None:
            notes.append(
                f"time for {found - missing} of {found} products was enough in the analysis: the "
                f"others stay at w8a8 or in float"
            )
        return result
    cache.save(
        "sensitivity", key,
        {"weight_bits": sorted(weights), "activation_bits": sorted(activations),
         "forms": names, "report": result.to_json()},
    )  # fmt: skip
    part.unlink(missing_ok=True)
    return result


def _seconds_of_a_run(prepared: Prepared) -> float:
    """Return the seconds that the float model takes for one sample in ONNX Runtime."""
    from qcompiler.data import InputSpec
    from qcompiler.onnx_export import to_onnx
    from qcompiler.ort import Session

    assert prepared.samples is not None
    graph = prepared.graph
    session = Session(to_onnx(graph).SerializeToString())
    specs = InputSpec.of_graph(graph)
    batch = next(prepared.samples.batches(specs))
    times = benchmark.block(lambda: session.run(dict(batch.inputs)), runs=2, warmup=1)
    return min(times) / max(batch.samples, 1)


# -------------------------------------------------------------------------------------- tuning


def _tuned_backend(
    prepared: Prepared,
    backend: Backend,
    precisions: Sequence[Precision],
    tuning: Tuning | None,
    clock: Clock,
    cache: Cache,
    seed: int,
    progress: ProgressFn,
) -> tuple[Backend, Tuning | None]:
    """Return the backend with tuned kernels, after its share of the wall-clock budget.

    Beside it: the records that hold their parameters, None where there are none.

    Kernels of every precision compete for the same time: first those of W8A8, which any plan may
    keep, then the others.
    """
    if tuning is None:
        return backend, None
    records = tuning.records
    if records is None:
        records = cache.folder
        tuning = dataclasses.replace(tuning, records=records)
    file = RecordFile(os.fspath(records), backend.spec.name)
    if tuning.searches:
        workshop = Workshop(prepared, backend, seed=seed, progress=progress)
        some = [p for p in precisions if p.is_integer] or list(precisions)
        for i, precision in enumerate(some):
            limit = tuning
            if clock.limit is not None:
                left = clock.left() * _TUNING_SHARE
                share = left / 2 if i == 0 and len(some) > 1 else left / max(len(some) - i, 1)
                if share < 1.0:
                    break
                limit = dataclasses.replace(tuning, seconds=share)
            quantized = workshop.quantize(uniform(prepared.graph, precision))
            shaped = PassManager(backend.passes()).run(quantized.graph, PassContext())
            backend.tune(shaped, limit, seed=seed, progress=progress)
    if not file.path.exists():
        return backend, None
    tuned = backend.with_records(file.read(host_cpu().name))
    return tuned, Tuning(records=records)


def only_records(tuning: Tuning | None) -> Tuning | None:
    """Return the use of the records that exist, without further tuning."""
    if tuning is None or tuning.records is None or not os.path.exists(tuning.records):
        return None
    return Tuning(records=tuning.records)


def latency_of(
    model: ModelSource,
    backend: Backend,
    *,
    calibration: SampleSource,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    freeze: Mapping[str, Any] | None = None,
    records: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: ProgressFn = no_progress,
) -> LatencyTable:
    """Return the latency table of a model on a target (`qcompile analyze --target`).

    Args and errors: as `qcompiler.compile`; `records` holds tuned parameters and known latencies.
    """
    prepared = prepare(
        model, calibration=calibration, input_shapes=input_shapes, freeze=freeze, seed=seed,
        progress=progress,
    )  # fmt: skip
    cache = Cache(cache_folder(records))
    tuned = backend
    file = records_file(cache, backend.spec.name, records)
    if records is not None and file.path.exists():
        tuned = backend.with_records(file.read(host_cpu().name))
    workshop = Workshop(prepared, tuned, seed=seed, progress=progress)
    return workshop.latency_table(wanted_precisions(backend, prepared, Budget()), file)
