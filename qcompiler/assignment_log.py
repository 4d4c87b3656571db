# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The decision log: why each node has its precision, as data (docs/json.md, "assignment").

For each product it says what every precision would take and cost, what kept it from the next faster
one, and what relaxing the binding limit by one step would buy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcompiler.assign import is_allowed, next_step, totals
from qcompiler.data import Budget
from qcompiler.decisions import FLOAT, INTEGER
from qcompiler.latency import LatencyTable
from qcompiler.search import Outcome, counts
from qcompiler.types import Precision
from qcompiler.workshop import Figures, Judge, Trial

if TYPE_CHECKING:
    from qcompiler.decisions import Network

__all__ = ["assignment_log", "measured_log", "reasons_of"]

FORMAT = 1
"""Version of the document."""

_UNITS = {"kl": "nat", "mse": ""}
_STEP = 2e-3
"""Share of the latency that one step of relaxing must save."""


def assignment_log(
    outcome: Outcome,
    table: LatencyTable,
    budget: Budget,
    judge: Judge,
    trials: Mapping[str, Trial],
    by_default: bool,
    seconds: Mapping[str, float],
    overrides: Mapping[str, str | Precision] | None = None,
) -> dict[str, Any]:
    """Return the log of a search; `measured_log` adds what the built artifact measured."""
    network = outcome.network
    binding = _binding(outcome, budget)
    relax = _relax(outcome, budget, binding)
    nodes = _Nodes(outcome, budget, binding, set(overrides or ())).all()
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
        "nodes": nodes,
        "casts": [
            {"value": v, "from": a, "to": b, "latency_us": _cast_us(network, key)}
            for key in sorted(outcome.solution.casts)
            for v, a, b in (network.casts[key],)
        ],
        "rounds": [r.to_json(i + 1) for i, r in enumerate(outcome.rounds)],
        "bound_by": binding,
        "relax": relax,
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
        found[name] = _reason(entry, log, figures=False)
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
        points = _points(metric, budget.max_drop)
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


def _points(metric: str | None, count: float) -> str:
    if metric in ("top1", "top5"):
        return "percentage point" if count == 1 else "percentage points"
    return {"kl": "nat", "sqnr": "dB"}.get(metric or "", "points")


def _binding(outcome: Outcome, budget: Budget) -> str | None:
    """Return the limit that keeps the choice from being better, or None."""
    if outcome.broken:
        return next(iter(outcome.broken))
    if outcome.objective == "loss":
        limited = budget.max_latency_ms is not None or budget.max_size_mb is not None
        if not limited or outcome.solution.loss <= 0:
            return None
        return "max_latency_ms" if budget.max_latency_ms is not None else "max_size_mb"
    fastest = outcome.front[0] if outcome.front else outcome.solution
    if outcome.solution.latency <= fastest.latency * (1 + _STEP):
        return None
    failed = [r for r in outcome.rounds if not r.kept]
    worse = [r for r in failed if totals(outcome.network.problem, r.choices).latency
             < outcome.solution.latency]  # fmt: skip
    expected = outcome.curve.drop(fastest.loss)
    limit = budget.max_drop
    if not worse and (limit is None or expected is None or expected <= limit):
        return None  # the rest is within what measurements tell apart
    for made in worse:
        return next(iter(made.measured.broken(budget)), "max_drop")
    return "max_drop"


def _relax(outcome: Outcome, budget: Budget, binding: str | None) -> dict[str, Any] | None:
    """Return what one more step of the limit would buy."""
    if binding not in ("max_drop", "max_slice_drop") or outcome.broken:
        return None
    problem, chosen = outcome.network.problem, outcome.solution
    step = next_step(problem, chosen, outcome.bounds, gain=_STEP)
    if step is None or step.loss <= chosen.loss:
        return None
    changes = {n: p for n, p in step.choices.items() if chosen.choices[n] != p}
    limit = float(getattr(budget, binding))
    expected = outcome.curve.drop(step.loss)
    now = outcome.curve.drop(chosen.loss)
    more = None if expected is None or now is None else max(expected - now, 0.0)
    saves = (chosen.latency - step.latency) * 1e6
    names = ", ".join(f"{n} to {p}" for n, p in list(changes.items())[:3])
    rest = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    price = "a greater loss" if more is None else f"about {more:.3g} more"
    return {
        "limit": binding,
        "from": limit,
        "to": None if more is None else limit + more,
        "saves_us": saves,
        "loss": step.loss - chosen.loss,
        "changes": changes,
        "sentence": f"{price} of {binding} would save {saves:.3g} us: {names}{rest}",
    }


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
        rate = _rate(outcome)
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


def _rate(outcome: Outcome) -> float:
    """Return the factor that the search learned between predicted and measured latency."""
    expected = outcome.predicted.seconds
    if expected is None or outcome.solution.latency <= 0:
        return 1.0
    return expected / outcome.solution.latency


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else seconds * 1e3


def _seconds(trials: Mapping[str, Trial], precision: str) -> float | None:
    found = trials.get(precision)
    return None if found is None else found.figures.seconds


def _cast_us(network: Network, key: str) -> float:
    return max(c.latency for c in network.problem.casts if c.key == key) * 1e6


class _Nodes:
    """The entries of all nodes."""

    def __init__(
        self, outcome: Outcome, budget: Budget, binding: str | None, forced: set[str]
    ) -> None:
        self.outcome = outcome
        self.network = outcome.network
        self.budget = budget
        self.binding = binding
        self.forced = forced
        self.solution = outcome.solution
        self.slope = self._slope()

    def all(self) -> dict[str, Any]:
        """Return node -> entry, in the graph's order."""
        found: dict[str, Any] = {}
        plan = self.network.plan(self.outcome.choices, {})
        for node in self.network.graph.nodes:
            owner = self.network.units.get(node.name)
            if owner == node.name and node.name in self.network.products:
                found[node.name] = self._product(node.name, node.op.name)
                continue
            found[node.name] = {
                "precision": plan.precision(node.name).value,
                "reason": plan.reason(node.name),
                "op": node.op.name,
                "region": owner or node.name,
                "options": {},
                "latency_us": None, "measured_us": None, "gained_us": None, "loss": None,
                "cost": None, "blocked_by": None, "next_step": None,
            }  # fmt: skip
        return found

    def _slope(self) -> float | None:
        """Return points of drop per unit of loss at the chosen plan."""
        drop = self.outcome.predicted.drop
        if drop is None or self.solution.loss <= 0:
            return None
        return max(drop, 0.0) / self.solution.loss

    def _cost(self, loss: float) -> float | None:
        return None if self.slope is None else loss * self.slope

    def _product(self, name: str, op: str) -> dict[str, Any]:
        item = self.network.problem.item(name)
        chosen = self.solution.choices[name]
        measured = self.network.latency[name]
        option = item.options[chosen]
        faster = sorted(
            (p for p, o in item.options.items() if o.latency < option.latency),
            key=lambda p: item.options[p].loss,
        )
        blocked, step = self._blocked(name, chosen, faster)
        entry: dict[str, Any] = {
            "precision": chosen,
            "reason": "",
            "op": op,
            "region": name,
            "options": {
                p: {
                    "latency_us": measured.get(p, o.latency) * 1e6,
                    "loss": o.loss,
                    "drop": self._cost(o.loss),
                    "size_bytes": round(o.size),
                }
                for p, o in item.options.items()
            },
            "latency_us": option.latency * 1e6,
            "measured_us": None,
            "gained_us": self._gained(name),
            "loss": option.loss,
            "cost": self._cost(option.loss),
            "blocked_by": blocked,
            "next_step": step,
        }
        entry["reason"] = _reason(entry, {"bound_by": self.binding, "note": self.outcome.note})
        return entry

    def _gained(self, name: str) -> float | None:
        """Return microseconds that the choice saves against float here, conversions included."""
        item = self.network.problem.item(name)
        if FLOAT not in item.options:
            return None
        other = {**self.solution.choices, name: FLOAT}
        return (totals(self.network.problem, other).latency - self.solution.latency) * 1e6

    def _blocked(
        self, name: str, chosen: str, faster: list[str]
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Return what keeps a product from its next faster precision, and that step."""
        problem = self.network.problem
        if name in problem.fixed:
            return "override", None
        if not faster:
            return ("slower" if len(problem.item(name).options) > 1 else None), None
        for precision in faster:
            choices = {**self.solution.choices, name: precision}
            other = totals(problem, choices)
            saves = self.solution.latency - other.latency
            step = {
                "precision": precision,
                "saves_us": saves * 1e6,
                "loss": other.loss - self.solution.loss,
                "cost": self._cost(max(other.loss - self.solution.loss, 0.0)),
            }
            if not is_allowed(problem, choices):
                return "tied", step
            if saves <= 0:
                return "casts", step
            return self.binding or "slower", step
        return None, None


def _reason(entry: Mapping[str, Any], log: Mapping[str, Any], *, figures: bool = True) -> str:
    """Return the reason of a product as a sentence fragment."""
    precision, blocked, step = entry["precision"], entry["blocked_by"], entry["next_step"]
    options = entry["options"]
    if blocked == "override":
        return "asked for by an override"
    if precision == FLOAT:
        others = [p for p in options if p != FLOAT]
        if not others:
            return "no integer precision was measured for it"
        if log.get("note"):
            return str(log["note"])
        best = min(others, key=lambda p: options[p]["latency_us"])
        ours, theirs = options[FLOAT]["latency_us"], options[best]["latency_us"]
        if theirs < ours and str(blocked).startswith("max_"):
            text = f"{best} would break the budget: {blocked} binds"
            if figures and entry["next_step"]:
                text += f" (it would save {ours - theirs:.3g} us)"
            return text
        if not figures:
            return "integers were not faster, conversions included"
        return f"integer was slower: {theirs:.3g} us against {ours:.3g} us, without conversions"
    if step is None:
        return "the fastest precision here" + ("" if blocked else ", and the only one")
    name = step["precision"]
    if blocked in ("casts", "tied", "slower"):
        why = {
            "casts": "conversions would cost more than it saves",
            "tied": "what reads the same value does not share it",
            "slower": "the model as a whole was not faster with it",
        }[blocked]
        return f"not {name}: {why}"
    if not figures:
        return f"not {name}: {blocked} binds"
    cost = "" if step["cost"] is None else f" and cost {step['cost']:.3g} points"
    return f"{name} would save {step['saves_us']:.3g} us{cost}: {blocked} binds"
