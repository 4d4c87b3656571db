# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The limits of a search as those of its program: which bind, and what more of each would buy.

A budget is in points, milliseconds and megabytes of a built model; the program counts losses,
seconds and bytes of kernels. What the search learned turns one into the other: the curve from loss
to drop, joint models that broke a limit, and the factors between sums and whole models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.assign import Resource, Solution, totals
from qcompiler.binding import Binding, Bound, Step, Tried
from qcompiler.data import Budget
from qcompiler.errors import AssignmentError
from qcompiler.search import GAIN, SLACK, Curve, Outcome, Round
from qcompiler.workshop import Figures, Trial

__all__ = ["Limit", "Limiting", "points_of"]

_RESOURCE: Mapping[str, Resource] = {
    "max_drop": "loss",
    "max_slice_drop": "loss",
    "max_latency_ms": "latency",
    "max_size_mb": "size",
    "max_memory_mb": "memory",
}
_EVEN = 1e-9
_NAMED = 3
"""Changes that a sentence names."""


@dataclass(frozen=True)
class Limit:
    """One limit that was given.

    Attributes:
        value: As given, in `unit`.
        unit: Of the value.
        bound: The limit as the program has it.
        read: Turns a total of the program into the unit.
        predicted: Of the chosen plan, in the unit.
    """

    value: float
    unit: str
    bound: Bound
    read: Callable[[float], float | None]
    predicted: float | None


class Limiting:
    """The limits of a finished search.

    Attributes:
        limits: Name -> limit; those of a region are named "SELECTOR max_drop".
        asked: The question to the program.
        sets: The smallest sets of limits that bind, the answer.
        problem: Why there is no answer; else empty.
    """

    def __init__(
        self,
        outcome: Outcome,
        budget: Budget,
        metric: str | None = None,
        trials: Mapping[str, Trial] | None = None,
    ) -> None:
        self.outcome = outcome
        self.budget = budget
        self.metric = metric
        self.chosen = outcome.solution
        self.by_latency = outcome.objective == "latency"
        self.broken = {id(r): _broken(r, budget, outcome) for r in outcome.rounds}
        self.uniform = [t.figures for t in (trials or {}).values()]
        self.limits = dict(self._whole()) | dict(self._regional())
        tried = [Tried(r.choices, frozenset(self.broken[id(r)])) for r in outcome.rounds]
        self.asked = Binding(
            outcome.network.problem,
            outcome.objective,
            [limit.bound for limit in self.limits.values()],
            None if outcome.broken else self.chosen,
            tried,
            GAIN,
        )
        self.problem = ""
        self.sets: tuple[tuple[str, ...], ...] = ()
        try:
            self.sets = self._sets()
        except AssignmentError as error:  # the choice stands: only its explanation is lost
            self.problem = error.message

    # ---------------------------------------------------------------------------- what there is

    def _whole(self) -> list[tuple[str, Limit]]:
        found = []
        for name, resource in _RESOURCE.items():
            value = getattr(self.budget, name)
            if value is None or (resource == "loss" and not self.by_latency):
                continue
            read, room = self._scale(name)
            found.append((name, self._limit(name, float(value), resource, room, read)))
        return found

    def _regional(self) -> list[tuple[str, Limit]]:
        found = []
        for selector, region in (self.outcome.regions or {}).items():
            own = self.outcome.bounds.groups.get(selector)
            for limit, value in region["limits"].items():
                if own is None or limit not in _RESOURCE:
                    continue
                name, resource = f"{selector} {limit}", _RESOURCE[limit]
                read = {"loss": self._reader(name, self.outcome.curve, selector),
                        "latency": lambda v: v * 1e3}.get(resource, lambda v: v * 1e-6)  # fmt: skip
                room = float(getattr(own, resource))
                found.append((name, self._limit(name, value, resource, room, read, selector)))
        return found

    def _limit(
        self, name: str, value: float, resource: Resource, room: float,
        read: Callable[[float], float | None], group: str | None = None,
    ) -> Limit:  # fmt: skip
        bound = Bound(name, resource, room, group)
        has = self.chosen.total(bound.aim)
        if name not in self.outcome.broken:  # it was measured to keep it, whatever is predicted
            bound = Bound(name, resource, max(room, has), group)
        unit = {"latency": "ms", "size": "MB", "memory": "MB"}.get(resource)
        return Limit(value, unit or points_of(self.metric), bound, read, read(has))

    def _scale(self, name: str) -> tuple[Callable[[float], float | None], float]:
        """Return what reads a total of the whole in the limit's unit, and the program's limit."""
        value, outcome = float(getattr(self.budget, name)), self.outcome
        if name == "max_latency_ms":
            rate = outcome.rate * (1.0 if self.by_latency else 1 / (1 - SLACK))
            if name in outcome.broken:  # nothing was learned: the limit left nothing to build
                rate *= max(_ratio(outcome.trial.figures.typical, outcome.predicted.seconds), 1.0)
            return (lambda v: v * rate * 1e3), value * 1e-3 / rate
        if name == "max_size_mb":
            return (lambda v: v * 1e-6), value * 1e6
        if name == "max_memory_mb":
            factor = _ratio(outcome.predicted.memory, self.chosen.memory)
            return (lambda v: v * factor * 1e-6), value * 1e6 / factor
        curve = outcome.curve if name == "max_drop" else self._slices()
        items = outcome.network.problem.items
        most = sum(max(o.loss for o in i.options.values()) for i in items)
        room = curve.loss(value, most)
        room = math.inf if room >= most else room
        kept = [self._loss(r) for r in outcome.rounds if not self.broken[id(r)]]
        least = max(kept, default=0.0)
        failed = [v for v, _ in self._failed(name) if v > max(least, self.chosen.loss)]
        if failed:  # what was measured too much is above the limit, whatever the curve says
            room = min(room, min(failed) * (1 - 1e-6))
        return self._reader(name, curve), room

    def _reader(
        self, name: str, curve: Curve, selector: str | None = None
    ) -> Callable[[float], float | None]:
        """Return what turns a loss into a drop: by the curve, and no less than was measured."""
        failed = self._failed(name, selector)

        def read(loss: float) -> float | None:
            expected = curve.drop(loss)
            known = [drop for at, drop in failed if at <= loss * (1 + 1e-9)]
            found = [*known, *([] if expected is None else [expected])]
            return max(found, default=None)

        return read

    def _failed(self, name: str, selector: str | None = None) -> list[tuple[float, float]]:
        """Return (loss, drop) of joint models that were measured to break a limit on the drop."""
        return [
            (self._loss(r, selector), self.broken[id(r)][name])
            for r in self.outcome.rounds
            if name in self.broken[id(r)]
        ]

    def _loss(self, made: Round, selector: str | None = None) -> float:
        found = totals(self.outcome.network.problem, made.choices)
        return found.total("loss" if selector is None else (selector, "loss"))

    def _slices(self) -> Curve:
        curve = Curve()
        measured: list[Figures] = [*self.uniform, *(r.measured for r in self.outcome.rounds)]
        for f in measured:
            curve.add(f.loss, f.slice_drop)
        return curve

    # --------------------------------------------------------------------------------- what binds

    def _sets(self) -> tuple[tuple[str, ...], ...]:
        broken = self.outcome.broken
        if broken and self.asked.best() is not None:
            return (tuple(broken),)  # the program finds plans, and measurements refute them
        return self.asked.sets()

    @property
    def names(self) -> list[str]:
        """Limits that bind, by themselves or with others."""
        return list(dict.fromkeys(n for s in self.sets for n in s))

    def binding(self) -> dict[str, Any]:
        """Return the decision log's `binding`."""
        together = len(self.sets[0]) if self.sets else 0
        return {
            "any_of": [list(s) for s in self.sets],
            "step": self._step(self.sets[0]) if together > 1 else None,
            "sentence": self._sentence(together),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the decision log's `limits`: what one step more of each would buy."""
        found = {}
        for name, limit in self.limits.items():
            step = self._step((name,))
            said = f"more of {name} alone would buy nothing" if step is None else step["sentence"]
            found[name] = {
                "limit": limit.value,
                "unit": limit.unit,
                "predicted": limit.predicted,
                "binds": name in self.names,
                "step": step,
                "sentence": said,
            }
        return found

    def exceeded(self, solution: Solution) -> dict[str, float]:
        """Return the limits that a choice would exceed, and by how much, in their units.

        What the chosen plan itself exceeds counts from there: the choice would make it worse.
        """
        over = {}
        for name, total in self.asked.exceeded(solution).items():
            limit = self.limits[name]
            has = self.chosen.total(limit.bound.aim)
            least = limit.value
            if name in self.outcome.broken:
                if total <= has * (1 + _EVEN):
                    continue
                least = max(limit.value, limit.read(has) or 0.0)
            found = limit.read(total)
            over[name] = 0.0 if found is None else max(found - least, 0.0)
        return over

    def _sentence(self, together: int) -> str:
        if self.problem:
            return f"what binds is not known: {self.problem}"
        if self.outcome.broken:
            what = "the limits cannot be kept"
            return f"{what}: {self._names()} would have to give way" if self.sets else what
        if self.sets:
            verb = "bind together" if together > 1 else "binds" if len(self.sets) == 1 else "bind"
            each = ", each by itself" if together == 1 and len(self.sets) > 1 else ""
            unbuilt = self._unbuilt()
            names = " and ".join(self.names) if together == 1 else self._names()
            return f"{names} {verb}{each}" + (f"; {unbuilt}" if unbuilt else "")
        if self.outcome.note:
            return f"no limit binds: {self.outcome.note}"
        what = "faster" if self.by_latency else "closer to float"
        return f"no limit binds: {self._unbuilt() or f'without any limit nothing is {what}'}"

    def _names(self) -> str:
        return " or ".join(" and ".join(s) for s in self.sets)

    def _unbuilt(self) -> str:
        """Return that a better plan within all limits was not built, where there is one."""
        best = self.asked.best()
        if best is None:
            return ""
        before, after = (s.total(self.outcome.objective) for s in (self.chosen, best))
        if after >= before - GAIN * abs(before):
            return ""
        why = "others as good by prediction were built, and measurements did not bear it out"
        if not self.refuted(best):
            why = "the search ended before it was built"
        return (
            f"a plan within all limits that was not built is predicted to "
            f"{self._buys(best, self.chosen)}, but {why}"
        )

    def refuted(self, solution: Solution) -> bool:
        """Whether a built plan was as good by prediction as a choice, and was not chosen."""
        objective, problem = self.outcome.objective, self.outcome.network.problem
        value = solution.total(objective)
        most = value + GAIN * abs(value)
        return any(
            not self.broken[id(r)]
            and r.choices != self.chosen.choices
            and totals(problem, r.choices).total(objective) <= most
            for r in self.outcome.rounds
        )

    def _step(self, names: Sequence[str]) -> dict[str, Any] | None:
        """Return what the next step of limits would buy, as data and as a sentence."""
        if self.problem:
            return None
        if self.outcome.broken and self.asked.best() is not None:
            return self._least(names)
        step = self.asked.step(names)
        if step is None:
            return None
        to, more = {}, {}
        for name in names:
            limit = self.limits[name]
            value = limit.read(step.values[name])
            to[name] = None if value is None else max(value, limit.value)
            more[name] = None if value is None else max(value - limit.value, 0.0)
        priced = " and ".join(
            f"more of {n}"
            if more[n] is None
            else f"{more[n]:.3g} {self.limits[n].unit} more of {n}"
            for n in names
        )
        only = "only together: " if len(names) > 1 else ""
        return {
            "limit": " and ".join(names),
            "from": self.limits[names[0]].value,
            "to": to[names[0]],
            "values": to,
            **self._gains(step),
            "sentence": f"{only}{priced} would {self._buys(step.solution)}"
            f"{self._changes_text(step.solution)}",
        }

    def _least(self, names: Sequence[str]) -> dict[str, Any] | None:
        """Return the least value of a limit that was measured, where none keeps it."""
        name = names[0]
        if len(names) > 1 or name not in self.outcome.broken:
            return None
        limit, least = self.limits[name], self.outcome.broken[name]
        return {
            "limit": name, "from": limit.value, "to": least, "values": {name: least},
            "saves_us": None, "loss": None, "drop": None, "changes": {},
            "sentence": f"{name} {least:.4g} {limit.unit} would be kept by the plan that comes "
            f"closest",
        }  # fmt: skip

    def _gains(self, step: Step) -> dict[str, Any]:
        found, before = step.solution, self._before
        now, then = (self.outcome.curve.drop(s.loss) for s in (before, found))
        return {
            "saves_us": (before.latency - found.latency) * 1e6,
            "loss": found.loss - before.loss,
            "drop": None if now is None or then is None else then - now,
            "changes": self._changes(found),
        }

    def _changes(self, found: Solution) -> dict[str, str]:
        return {n: p for n, p in found.choices.items() if self.chosen.choices[n] != p}

    def _changes_text(self, found: Solution) -> str:
        changes = self._changes(found)
        if not changes:
            return ""
        products = [n for n in changes if n in self.outcome.network.products]
        named = (products or list(changes))[:_NAMED]
        rest = len(changes) - len(named)
        names = ", ".join(f"{n} to {changes[n]}" for n in named)
        return f": {names}" + (f" and {rest} more" if rest else "")

    @property
    def _before(self) -> Solution:
        """What a step is compared with: the best plan within all limits, built or not."""
        best = None if self.outcome.broken else self.asked.best()
        objective = self.outcome.objective
        if best is None or self.chosen.total(objective) <= best.total(objective):
            return self.chosen
        return best

    def _buys(self, found: Solution, than: Solution | None = None) -> str:
        before = than or self._before
        if self.outcome.broken:
            return "leave a plan that keeps the others"
        if self.by_latency:
            return f"save {(before.latency - found.latency) * 1e6:.3g} us"
        now, then = (self.outcome.curve.drop(s.loss) for s in (before, found))
        lost = f"lower the loss from {before.loss:.3g} to {found.loss:.3g}"
        if now is None or then is None or now <= then:
            return lost
        return f"{lost}, which is {now - then:.3g} {points_of(self.metric)}"


def points_of(metric: str | None, count: float = 2) -> str:
    """Return the unit of a drop of a metric."""
    if metric in ("top1", "top5"):
        return "percentage point" if count == 1 else "percentage points"
    return {"kl": "nat", "sqnr": "dB"}.get(metric or "", "points")


def _broken(made: Round, budget: Budget, outcome: Outcome) -> dict[str, float]:
    """Return the limits that a joint model was measured to break, those of regions included."""
    found = dict(made.measured.broken(budget))
    for selector, figures in made.regions.items():
        limits = Budget(**((outcome.regions or {}).get(selector) or {"limits": {}})["limits"])
        found |= {f"{selector} {n}": v for n, v in figures.broken(limits).items()}
    return found


def _ratio(whole: float | None, summed: float | None) -> float:
    return whole / summed if whole and summed and whole > 0 and summed > 0 else 1.0
