# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The decision log: why each node has its precision, as data (docs/json.md, "assignment").

For each product it says what every precision would take and cost and what stops it, and for each
limit whether it binds and what relaxing it by one step would buy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcompiler.assign import totals
from qcompiler.assignment_limits import Limiting, points_of
from qcompiler.assignment_nodes import node_entries, reason_of
from qcompiler.data import Budget
from qcompiler.decisions import FLOAT, INTEGER
from qcompiler.latency import LatencyTable
from qcompiler.search import Outcome, counts
from qcompiler.workshop import Figures, Judge, Trial

if TYPE_CHECKING:
    from qcompiler.decisions import Network

__all__ = ["assignment_log", "measured_log", "reasons_of"]

FORMAT = 1
"""Version of the document."""

_UNITS = {"kl": "nat", "mse": ""}


def assignment_log(
    outcome: Outcome,
    table: LatencyTable,
    budget: Budget,
    judge: Judge,
    trials: Mapping[str, Trial],
    by_default: bool,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Return the log of a search; `measured_log` adds what the built artifact measured."""
    network = outcome.network
    limiting = Limiting(outcome, budget, judge.metric, trials)
    binding, limits = limiting.binding(), limiting.to_json()
    bound = limiting.names
    measured = outcome.trial.figures
    least = outcome.broken
    return {
        "format": FORMAT,
        "objective": outcome.objective,
        "statement": _statement(outcome, budget, judge.metric, by_default),
        "budget": {
            "max_drop": budget.max_drop,
            "max_latency_ms": budget.max_latency_ms,
            "max_size_mb": budget.max_size_mb,
            "max_slice_drop": budget.max_slice_drop,
            "max_memory_mb": budget.max_memory_mb,
            "default": by_default,
        },
        "metric": judge.metric,
        "loss_kind": judge.kind,
        "loss_unit": _UNITS[judge.kind],
        "kept": not least,
        "infeasible": None if not least else {
            "message": infeasible_message(least, budget, outcome.regions), "least": dict(least),
        },
        "predicted": outcome.predicted.to_json(),
        "measured": {
            **measured.to_json(),
            "median_ms": _ms(measured.typical),
            "float_latency_ms": _ms(_seconds(trials, FLOAT)),
            "uniform_latency_ms": _ms(_seconds(trials, INTEGER)),
        },
        "front": _front(outcome),
        "uniform": {p: t.figures.to_json() for p, t in trials.items()},
        "nodes": node_entries(outcome, limiting),
        "casts": [
            {"value": v, "from": a, "to": b, "latency_us": _cast_us(network, key)}
            for key in sorted(outcome.solution.casts)
            for v, a, b in (network.casts[key],)
        ],
        "rounds": [r.to_json(i + 1) for i, r in enumerate(outcome.rounds)],
        "bound_by": bound[0] if bound else None,
        "relax": binding["step"] or (limits[bound[0]]["step"] if bound else None),
        "binding": binding,
        "limits": limits,
        "latency": {
            "machine": table.machine,
            "target": table.target,
            "threads": table.threads,
            "measured": table.measured,
            "reused": table.reused,
            "overhead_us": table.overhead * 1e6,
        },
        "seconds": dict(seconds),
        "note": outcome.note,
        "regions": outcome.regions,
    }  # fmt: skip


def reasons_of(log: Mapping[str, Any]) -> dict[str, str]:
    """Return item -> reason for the plan.

    They hold no measured figures: those would make equal plans differ.
    """
    found = {}
    for name, entry in log["nodes"].items():
        if not entry["options"]:
            continue
        found[name] = reason_of(entry, log["note"], log["objective"], figures=False)
    return found


def measured_log(log: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the log with what the report of the built artifact says."""
    found: dict[str, Any] = copy.deepcopy(dict(log))
    measured = found["measured"]
    metric, latency = report.get("metric") or {}, report.get("latency_ms") or {}
    if metric.get("drop") is not None:
        measured["drop"] = metric["drop"]
    if measured["latency_ms"] is None:
        measured["latency_ms"] = latency.get("compiled")
    size = (report.get("size_bytes") or {}).get("artifact")
    if size is not None:
        measured["size_bytes"] = size
    decided = report.get("precision") or {}
    for name, entry in found["nodes"].items():
        if name in decided:
            entry["precision"] = decided[name]["precision"]
            if not entry["options"]:
                entry["reason"] = decided[name]["reason"]
    for region in report.get("nodes") or ():
        for name in region.get("nodes") or ():
            node = found["nodes"].get(name)
            if node is not None and node["options"] and region.get("latency_ms") is not None:
                node["measured_us"] = region["latency_ms"] * 1e3
                break
    return found


def infeasible_message(
    least: Mapping[str, float], budget: Budget, regions: Mapping[str, Any] | None = None
) -> str:
    """Return what cannot be kept, as a sentence."""
    parts = []
    for name, value in least.items():
        selector, _, limit = name.rpartition(" ")
        allowed = regions[selector]["limits"][limit] if selector and regions else None
        wanted = getattr(budget, limit) if allowed is None else allowed
        parts.append(f"{name} {wanted:g} was not reached, the least found is {value:.4g}")
    return "no plan that was tried keeps the budget: " + "; ".join(parts)


# ---------------------------------------------------------------------------------------- parts


def _statement(outcome: Outcome, budget: Budget, metric: str | None, by_default: bool) -> str:
    limits = []
    if budget.max_drop is not None:
        points = points_of(metric, budget.max_drop)
        where = "from float" if metric in ("kl", "mse") else "below float"
        limits.append(f"{metric or 'the metric'} at most {budget.max_drop:g} {points} {where}")
    if budget.max_slice_drop is not None:
        limits.append(f"no group of samples more than {budget.max_slice_drop:g} below float")
    if budget.max_latency_ms is not None:
        limits.append(f"one run at most {budget.max_latency_ms:g} ms")
    if budget.max_size_mb is not None:
        limits.append(f"at most {budget.max_size_mb:g} MB")
    if budget.max_memory_mb is not None:
        limits.append(f"at most {budget.max_memory_mb:g} MB of memory between kernels")
    for selector, region in (outcome.regions or {}).items():
        own = ", ".join(f"{k} {v:g}" for k, v in region["limits"].items())
        limits.append(f"{selector} within {own}")
    what = "the least latency" if outcome.objective == "latency" else "the least loss"
    text = f"{what} with {' and '.join(limits)}" if limits else what
    return f"{text} (the default limit: none was given)" if by_default else text


def _front(outcome: Outcome) -> list[dict[str, Any]]:
    """Return the front with the choice in it, and the measured figures of built points."""
    problem = outcome.network.problem
    products = list(outcome.network.products)
    points = list(outcome.front)
    chosen = outcome.solution
    same = [i for i, p in enumerate(points) if p.choices == chosen.choices]
    if not same:
        points.append(chosen)
    built = {tuple(sorted(r.choices.items())): r for r in outcome.rounds}
    entries = []
    for point in sorted(points, key=lambda s: (s.latency, s.loss)):
        made = built.get(tuple(sorted(point.choices.items())))
        found = totals(problem, point.choices)
        figures = made.measured if made is not None else Figures()
        rate = outcome.rate
        entries.append({
            "drop": outcome.curve.drop(found.loss),
            "loss": found.loss,
            "latency_ms": found.latency * rate * 1e3,
            "size_bytes": round(found.size),
            "counts": counts(point.choices, products),
            "chosen": point.choices == chosen.choices,
            "measured_drop": figures.drop,
            "measured_latency_ms": _ms(figures.seconds),
        })  # fmt: skip
    return entries


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else seconds * 1e3


def _seconds(trials: Mapping[str, Trial], precision: str) -> float | None:
    found = trials.get(precision)
    return None if found is None else found.figures.seconds


def _cast_us(network: Network, key: str) -> float:
    return max(c.latency for c in network.problem.casts if c.key == key) * 1e6
