# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Never slower than float: regions whose integer form lost go back to float.

A uniform integer model that was measured slower than the float model in ONNX Runtime is looked at
again: our own float model is built beside it, every kernel and every conversion is timed, and the
exact assignment says which regions are faster in float, conversions included. Only what then
measures faster as a whole replaces the model that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcompiler.assign import Limits, front, solve, totals
from qcompiler.assignment_log import assignment_log
from qcompiler.auto import OFF, Choice, fixed_by, only_records, trusted_table
from qcompiler.cache import Cache, cache_folder
from qcompiler.cpu import host_cpu
from qcompiler.data import Budget, SampleSource
from qcompiler.decisions import CONVERSIONS, FLOAT, Network, network_of
from qcompiler.passmanager import Pass, ProgressFn, no_progress
from qcompiler.plan import Decision
from qcompiler.regional import RegionOptions
from qcompiler.search import Curve, Outcome
from qcompiler.targets.base import Backend
from qcompiler.targets.branches import guards_of
from qcompiler.tuning import Tuning
from qcompiler.types import Precision
from qcompiler.workshop import Judge, Trial, Workshop, prepare, race, records_file

if TYPE_CHECKING:
    from qcompiler.onnx_import import ModelSource
    from qcompiler.passes.keep_float import KeptFloat

__all__ = ["faster_in_float", "lost_to_float", "without_slower_regions"]

_PRODUCTS = frozenset({"qconv", "qmatmul", "qlstm", "qgru", "qrnn"})
_CASTS = 0.25
"""Share of the products' time that conversions take before integers are doubted."""
_NOISE = 0.05
"""Share by which one model must be slower than another before that counts."""
_GAIN = 0.1
"""Share of the time of the regions that go back to float, conversions included, that this must
save: what is not clear stays as it was asked for, and its bytes the same in every compilation."""
_EVEN = 0.01
"""Measured latencies of whole models this close are equal."""


def lost_to_float(report: Mapping[str, Any] | None) -> bool:
    """Whether a report gives a reason to doubt that integers paid.

    That is: the compiled model was slower than the float one in ONNX Runtime beyond noise, or its
    conversions take a notable share of the time of its integer products.
    """
    latency = (report or {}).get("latency_ms") or {}
    regions = [r for r in (report or {}).get("nodes") or () if r.get("latency_ms") is not None]
    casts = sum(r["latency_ms"] for r in regions if CONVERSIONS & set(r["ops"]))
    products = sum(r["latency_ms"] for r in regions if _PRODUCTS & set(r["ops"]))
    if casts > _CASTS * products:
        return True
    ours, theirs = latency.get("compiled"), latency.get("float")
    least = latency.get("min") or {}
    if ours is None or theirs is None:
        return False
    slower = ours > theirs * (1 + _NOISE)
    return bool(slower and least.get("compiled", ours) > least.get("float", theirs) * (1 + _NOISE))


def without_slower_regions(
    model: ModelSource,
    backend: Backend,
    precision: str,
    report: Mapping[str, Any] | None,
    *,
    calibration: SampleSource | None,
    methods: str | Sequence[Pass] = (),
    tuning: Tuning | None = None,
    overrides: Mapping[str, str | Precision] | None = None,
    kept: KeptFloat | None = None,
    **options: Any,
) -> Choice | None:
    """Return what to compile instead of a uniform model that lost to float, or None.

    `precision` is what was asked for: a name, or the path of a plan, which is taken as it is;
    `report` that of the model that was compiled; products that accuracy has `kept` in float stay
    so; the others are as in `qcompiler.compile`.
    """
    from qcompiler.passes.methods import parse_methods

    names = {p.value for p in Precision if p.is_integer}
    if precision.lower() not in names or calibration is None or not lost_to_float(report):
        return None
    if backend.spec.triple is None:  # no kernels to time, as on the reference target
        return None
    found = faster_in_float(
        model,
        backend,
        Precision.parse(precision),
        calibration=calibration,
        methods=parse_methods(methods) if isinstance(methods, str) else tuple(methods),
        tuning=tuning,
        overrides={**(overrides or {}), **(kept.overrides() if kept is not None else {})},
        **options,
    )
    if found is not None:
        found.tuning = only_records(tuning)
        if kept is not None:
            found.plan = found.plan.replaced(kept.nodes)
    return found


def faster_in_float(
    model: ModelSource,
    backend: Backend,
    precision: Precision,
    *,
    calibration: SampleSource,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    freeze: Mapping[str, Any] | None = None,
    tuning: Tuning | None = None,
    methods: Sequence[Pass] = (),
    overrides: Mapping[str, str | Precision] | None = None,
    regions: Mapping[str, RegionOptions] | None = None,
    seed: int = 0,
    progress: ProgressFn = no_progress,
) -> Choice | None:
    """Return the plan in which regions that lost are float, or None where nothing is faster.

    `precision` was asked for everywhere; the others are as in `qcompiler.compile`. A mixture with
    precisions beside it and float32 was chosen by hand, and stays.
    """
    known = {precision, Precision.W8A8, Precision.FP32}
    if not {Precision.parse(p) if isinstance(p, str) else p
            for p in (overrides or {}).values()} <= known:  # fmt: skip
        return None
    prepared = prepare(
        model, calibration=calibration, input_shapes=input_shapes, freeze=freeze,
        methods=methods, regions=regions, seed=seed, progress=progress,
    )  # fmt: skip
    if prepared.table is None or precision is Precision.FP32:
        return None
    if guards_of(prepared.graph):
        return None  # which branches run decides the times, and random inputs say nothing of it
    records = None if tuning is None else tuning.records
    cache = Cache(cache_folder(records))
    file = records_file(cache, backend.spec.name, records)
    if records is not None and file.path.exists():
        backend = backend.with_records(file.read(host_cpu().name))
    workshop = Workshop(prepared, backend, seed=seed, progress=progress)
    both = [precision, Precision.FP32]
    if Precision.W8A8 not in both:
        both.insert(1, Precision.W8A8)  # what the kernels between products compute in
    table = trusted_table(workshop, both, file)
    network = network_of(prepared.graph, table, both)
    network = network.with_fixed(fixed_by(network, prepared, overrides))
    allowed = {precision.value, FLOAT}
    start = {
        i.name: precision.value if precision.value in i.options else Precision.W8A8.value
        for i in network.problem.items
    }
    problem = network.problem
    if not problem.items:  # nothing to choose: no product has an integer form
        return None
    items = tuple(
        replace(i, options={k: o for k, o in i.options.items() if k in allowed | {start[i.name]}})
        for i in problem.items
    )
    network = replace(network, problem=replace(problem, items=items))
    best = solve(network.problem, "latency", Limits())
    before = totals(network.problem, start)
    if best is None:
        return None
    changed = [n for n, p in best.choices.items() if p != start[n]]
    paid = sum(network.problem.item(n).options[start[n]].latency for n in changed)
    paid += sum(c.latency for c in network.problem.casts if c.key in before.casts - best.casts)
    if before.latency - best.latency <= _GAIN * paid:
        return None
    trials: dict[str, Trial] = {
        precision.value: workshop.uniform(precision),
        FLOAT: workshop.uniform(Precision.FP32),
        "mixed": workshop.make(network.plan(best.choices, {})),
    }
    seconds = race(trials)
    for name, trial in trials.items():
        trial.note(seconds=seconds[name])
    for name in (precision.value, FLOAT):
        if not 1 / OFF <= table.expected(name) / seconds[name] <= OFF:
            return None  # a busy machine: nothing is decided on such figures
    asked = seconds[precision.value]
    others = {n: s for n, s in seconds.items() if n != precision.value}
    winner = "mixed" if others["mixed"] <= others[FLOAT] * (1 + _EVEN) else FLOAT
    if others[winner] > asked * (1 + _EVEN):
        return None  # the whole does not bear out what the regions said
    choices = dict(best.choices)
    if winner == FLOAT:
        choices = {n: network.problem.fixed.get(n, FLOAT) for n in choices}
    return _choice(network, choices, trials, winner, prepared, table, cache, start)


def _choice(
    network: Network,
    choices: Mapping[str, str],
    trials: dict[str, Trial],
    winner: str,
    prepared: Any,
    table: Any,
    cache: Cache,
    start: Mapping[str, str],
) -> Choice:
    """Return the plan with its reasons and its log."""
    solution = totals(network.problem, choices)
    reasons = {n: _reason(network, choices, n, start[n]) for n in choices}
    plan = network.plan(choices, {n: r for n, r in reasons.items() if r is not None})
    plan = plan.replaced({
        n: Decision(plan.precision(n), r)
        for n, r in reasons.items() if r is not None and n in plan.nodes
    })  # fmt: skip
    trial = trials[winner]
    outcome = Outcome(
        network, choices, solution, trial,
        replace(trial.figures, loss=None, drop=None, seconds=solution.latency, size=solution.size),
        Curve(), [], front(network.problem, points=4), "latency", math.inf, {},
        {n: t.figures.seconds or math.nan for n, t in trials.items()},
    )  # fmt: skip
    judge = Judge(prepared, None, cache, 1)
    log = assignment_log(outcome, table, Budget(), judge, trials, False, {})
    log["statement"] = "regions whose integer form was slower went back to float"
    for name, reason in reasons.items():
        entry = log["nodes"].get(name)
        if reason is not None and entry is not None:
            entry["reason"] = reason
    count = sum(1 for n in network.products if choices[n] == FLOAT)
    note = (
        f"{count} of {len(network.products)} products went back to float: their integer form was "
        f"measured slower, conversions included"
    )
    return Choice(plan, log, notes=[note])


def _reason(network: Network, choices: Mapping[str, str], name: str, asked: str) -> str | None:
    """Return why an item went back to float; None where it did not."""
    if choices[name] != FLOAT or name in network.problem.fixed:
        return None
    item = network.problem.item(name)
    if asked not in item.options:
        return None
    other = totals(network.problem, {**choices, name: asked}).latency
    here = totals(network.problem, choices).latency
    time = item.options[FLOAT].latency
    return (
        f"integer was slower: {(time + other - here) * 1e6:.3g} us against {time * 1e6:.3g} us "
        f"with casts"
    )
