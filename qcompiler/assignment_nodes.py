# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The entries of the decision log's nodes: what each precision would take, and what stops it.

Each answer is about one product alone: it moves to another precision, kernels without a product of
their own follow as they like, and all other products stay. What then breaks a limit, or a rule, or
does not pay, is what stopped that precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qcompiler.assign import Solution, is_allowed, solve, totals
from qcompiler.assignment_limits import Limiting
from qcompiler.decisions import FLOAT
from qcompiler.errors import AssignmentError
from qcompiler.search import GAIN, Outcome

__all__ = ["RULES", "node_entries", "reason_of"]

RULES: Mapping[str, str] = {
    "override": "asked for by an override",
    "casts": "conversions would cost more than it saves",
    "even": "it would save less than measurements tell apart",
    "measured": "the whole was built with it, and was no better",
    "near": "plans as good by prediction were built, and measurements did not bear it out",
    "closest": "no plan keeps the limits, and the one that comes closest was taken as it is",
    "untried": "it was not built before the search ended",
}
"""What stops a precision, besides limits, `tied`, `slower` and `loss`."""


@dataclass(frozen=True)
class Move:
    """One product at another precision, everything else as chosen.

    Attributes:
        precision: Its precision then.
        stopped: What stops it: a limit, or a rule (see docs/json.md).
        over: Limits that it would exceed -> by how much, in their units.
        tied: Products that would have to change with it.
        saves: Seconds of the whole.
        loss: More loss of the whole.
        better: Whether the objective would be, limits apart, by the product's own figures.
    """

    precision: str
    stopped: str
    over: Mapping[str, float]
    tied: tuple[str, ...]
    saves: float
    loss: float
    better: bool


def node_entries(outcome: Outcome, limiting: Limiting) -> dict[str, Any]:
    """Return node -> entry, in the graph's order."""
    return _Nodes(outcome, limiting).all()


class _Nodes:
    def __init__(self, outcome: Outcome, limiting: Limiting) -> None:
        self.outcome = outcome
        self.limiting = limiting
        self.network = outcome.network
        self.problem = outcome.network.problem
        self.solution = outcome.solution
        self.by_latency = outcome.objective == "latency"
        self.slope = self._slope()
        self.neighbours = self._neighbours()

    def all(self) -> dict[str, Any]:
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
        item = self.problem.item(name)
        chosen = self.solution.choices[name]
        measured = self.network.latency[name]
        option = item.options[chosen]
        moves = {p: self._move(name, p) for p in item.options if p != chosen}
        ahead = sorted(
            (m for m in moves.values() if m.better), key=lambda m: (m.loss, -m.saves)
        )  # fmt: skip
        if not self.by_latency:
            ahead.sort(key=lambda m: -m.saves)
        blocked = None
        if name in self.problem.fixed:
            blocked, ahead = "override", []
        elif ahead:
            blocked = ahead[0].stopped
        elif moves:
            blocked = "slower" if self.by_latency else "loss"
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
                    **self._stopped(moves.get(p)),
                }
                for p, o in item.options.items()
            },
            "latency_us": option.latency * 1e6,
            "measured_us": None,
            "gained_us": self._gained(name),
            "loss": option.loss,
            "cost": self._cost(option.loss),
            "blocked_by": blocked,
            "next_step": self._step(ahead[0]) if ahead else None,
        }
        entry["reason"] = reason_of(entry, self.outcome.note, self.outcome.objective)
        return entry

    def _stopped(self, move: Move | None) -> dict[str, Any]:
        if move is None:
            return {"blocked_by": None, "over": {}}
        return {"blocked_by": move.stopped, "over": dict(move.over)}

    def _step(self, move: Move) -> dict[str, Any]:
        return {
            "precision": move.precision,
            "saves_us": move.saves * 1e6,
            "loss": move.loss,
            "cost": self._cost(max(move.loss, 0.0)),
            "over": {
                n: {"by": by, "unit": self.limiting.limits[n].unit} for n, by in move.over.items()
            },
            "tied": list(move.tied),
        }

    def _gained(self, name: str) -> float | None:
        """Return microseconds that the choice saves against float here, conversions included."""
        item = self.problem.item(name)
        if FLOAT not in item.options:
            return None
        other = {**self.solution.choices, name: FLOAT}
        return (totals(self.problem, other).latency - self.solution.latency) * 1e6

    # ------------------------------------------------------------------------------- one product

    def _move(self, name: str, precision: str) -> Move:
        """Return what moving one product alone would do."""
        options = self.problem.item(name).options
        now, then = options[self.solution.choices[name]], options[precision]
        better = then.latency < now.latency if self.by_latency else then.loss < now.loss
        choices = {**self.solution.choices, name: precision}
        other = totals(self.problem, choices)
        tied: tuple[str, ...] = ()
        allowed = is_allowed(self.problem, choices)
        if better and name not in self.problem.fixed and (
            not allowed or (self.by_latency and other.latency >= self.solution.latency)
        ):  # fmt: skip
            led = self._led(name, precision)
            if led is not None:
                other, allowed = led, True
            elif not allowed:
                tied = self._tied(name, choices)
        saves = self.solution.latency - other.latency
        over = self.limiting.exceeded(other)
        stopped = self._why(name, precision, other, better, allowed, over)
        return Move(
            precision, stopped, over, tied, saves, other.loss - self.solution.loss, better
        )  # fmt: skip

    def _why(
        self, name: str, precision: str, other: Solution, better: bool, allowed: bool,
        over: Collection[str],
    ) -> str:  # fmt: skip
        before, after = (s.total(self.outcome.objective) for s in (self.solution, other))
        if name in self.problem.fixed:
            return "override"
        if not better:
            measured = self.network.latency[name]
            now, then = (measured.get(p) for p in (self.solution.choices[name], precision))
            even = now is not None and then is not None and then < now
            return "loss" if not self.by_latency else "even" if even else "slower"
        if not allowed:
            return "tied"
        if after >= before:
            return "casts" if self.by_latency else "loss"
        for limit in over:
            return limit
        for made in self.outcome.rounds:
            if made.choices == other.choices:
                broken = self.limiting.broken[id(made)]
                return next(iter(broken), "measured")
        if after > before * (1 - GAIN):
            return "even"
        if self.outcome.broken:
            return "closest"
        return "near" if self.limiting.refuted(other) else "untried"

    def _led(self, name: str, precision: str) -> Solution | None:
        """Return the whole with one product moved and the kernels without one following it.

        None where a rule forbids it. Only what the product reaches through such kernels is solved
        for: beyond the next products nothing changes.
        """
        near, ends = {name}, [name]
        while ends:
            at = ends.pop()
            if at != name and at in self.network.products:
                continue
            more = self.neighbours.get(at, set()) - near
            near |= more
            ends += more
        p = self.problem
        local = dataclasses.replace(
            p,
            items=tuple(i for i in p.items if i.name in near),
            casts=tuple(c for c in p.casts if {c.source, c.target} <= near | {None}),
            ties=tuple(t for t in p.ties if set(t) <= near),
            requirements=tuple(
                r for r in p.requirements if {r.item, *(n for n, _ in r.any_of)} <= near
            ),
            fixed={
                n: self.solution.choices[n]
                for n in near if n in self.network.products or n in p.fixed
            } | {name: precision},
            moments=(),
            groups={},
        )  # fmt: skip
        try:
            found = solve(local)
        except AssignmentError:
            return None
        if found is None:
            return None
        choices = {**self.solution.choices, **found.choices}
        return totals(p, choices) if is_allowed(p, choices) else None

    def _neighbours(self) -> dict[str, set[str]]:
        """Return item -> items that a conversion or a rule joins it to."""
        p = self.problem
        joined = [{c.source, c.target} - {None} for c in p.casts]
        joined += [{r.item, *(n for n, _ in r.any_of)} for r in p.requirements]
        joined += [set(t) for t in p.ties]
        found: dict[str, set[str]] = {}
        for together in joined:
            for name in together:
                if name is not None:
                    found.setdefault(name, set()).update(n for n in together if n is not None)
        return found

    def _tied(self, name: str, choices: Mapping[str, str]) -> tuple[str, ...]:
        """Return the products that a rule binds to one that moves."""
        found: dict[str, None] = {}
        for tie in self.problem.ties:
            if name in tie:
                found.update(dict.fromkeys(tie))
        for r in self.problem.requirements:
            broken = choices[r.item] in r.forms and not any(choices[n] in f for n, f in r.any_of)
            if broken:
                found.update(dict.fromkeys((r.item, *(n for n, _ in r.any_of))))
        return tuple(n for n in found if n != name and n in self.network.products)


# ------------------------------------------------------------------------------------- sentences


def reason_of(
    entry: Mapping[str, Any], note: str = "", objective: str = "latency", *, figures: bool = True
) -> str:
    """Return the reason of a product as a sentence fragment."""
    precision, blocked, step = entry["precision"], entry["blocked_by"], entry["next_step"]
    options = entry["options"]
    if blocked == "override":
        return RULES["override"]
    if precision == FLOAT:
        others = [p for p in options if p != FLOAT]
        if not others:
            return "no integer precision was measured for it"
        if note:
            return note
        if step is None and objective == "latency":
            if not figures:
                return "integers were not faster, conversions included"
            best = min(others, key=lambda p: options[p]["latency_us"])
            ours, theirs = options[FLOAT]["latency_us"], options[best]["latency_us"]
            return f"integer was slower: {theirs:.3g} us against {ours:.3g} us, without conversions"
    if step is None:
        best_of = (
            "the fastest precision here" if objective == "latency" else "what loses least here"
        )
        return best_of + ("" if len(options) > 1 else ", and the only one")
    name = step["precision"]
    if blocked == "tied":
        those = ", ".join(step["tied"][:2]) + (" and others" if len(step["tied"]) > 2 else "")
        return f"not {name}: {those or 'what reads the same value'} would have to change with it"
    if blocked in RULES:
        return f"not {name}: {RULES[blocked]}"
    every = " and ".join(step["over"]) or blocked
    if not figures:
        return f"not {name}: it would exceed {every}"
    by = " and ".join(f"{n} by {o['by']:.3g} {o['unit']}" for n, o in step["over"].items())
    if objective == "latency":
        return f"{name} would save {step['saves_us']:.3g} us and exceed {by or every}"
    return f"{name} would lower the loss by {-step['loss']:.3g} and exceed {by or every}"
