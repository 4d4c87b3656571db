# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Which limits keep an assignment from being better, and what one step more of each would buy.

A limit binds if the best value of the objective changes once that limit alone is lifted. Its step
is the least value at which it changes. Both are answers of the exact program: no rule of thumb and
no order of precedence is involved. Limits may also bind only together, each one of them being
enough to stop what the others would let through.

Like `qcompiler.assign`, this is plain arithmetic: it knows no graph and no compiler.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from qcompiler.assign import Aim, Limits, Problem, Resource, Solution, solve

__all__ = ["Binding", "Bound", "Step", "Tried"]

_EVEN = 1e-9
"""Share by which two sums may differ and still be the same: the order of additions."""
_ALL = 8
"""Limits up to which all sets are looked at; of more, single limits and then one set."""


@dataclass(frozen=True, slots=True)
class Bound:
    """One limit with a name; several may limit one resource.

    Attributes:
        name: Of the limit.
        resource: What it limits.
        value: Greatest total; infinity: it limits nothing.
        group: The part of the problem that it holds for; None: the whole.
    """

    name: str
    resource: Resource
    value: float
    group: str | None = None

    @property
    def aim(self) -> Aim:
        """What is to be made least where this limit is to be as tight as possible."""
        return self.resource if self.group is None else (self.group, self.resource)


@dataclass(frozen=True, slots=True)
class Tried:
    """A choice of which more is known than the program says.

    Attributes:
        choices: Item -> option.
        broken: Limits that it was found to break. Lifting all of them makes it possible again;
            without any it was found to be no better, and is never an answer.
    """

    choices: Mapping[str, str]
    broken: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Step:
    """The next point at which relaxing some limits changes the optimum.

    Attributes:
        values: Limit -> its least value there.
        solution: The best choice there.
    """

    values: Mapping[str, float]
    solution: Solution


@dataclass
class Binding:
    """Asks what binds a problem under limits.

    Attributes:
        problem: What there is to choose.
        objective: What was made least.
        bounds: The limits; names are distinct.
        chosen: What was chosen; None where nothing keeps the limits, and then the question is
            which limits leave nothing to choose.
        tried: Choices of which more is known.
        gain: Share of the objective by which something is better; less is no change.
    """

    problem: Problem
    objective: Resource
    bounds: Sequence[Bound]
    chosen: Solution | None
    tried: Sequence[Tried] = ()
    gain: float = 1e-6
    _known: dict[frozenset[str], Solution | None] = field(default_factory=dict)

    def best(self, lifted: Collection[str] = ()) -> Solution | None:
        """Return the best choice with some limits lifted; None: there is none."""
        key = frozenset(lifted)
        if key not in self._known:
            self._known[key] = solve(
                self.problem, self.objective, self._limits(key), excluded=self._excluded(key)
            )
        return self._known[key]

    @property
    def reference(self) -> float:
        """The value of the objective that something better has to beat; infinity: anything has."""
        found = [s.total(self.objective) for s in (self.best(), self.chosen) if s is not None]
        return min(found, default=math.inf)

    @property
    def wanted(self) -> float:
        """The greatest value of the objective that counts as better."""
        value = self.reference
        return value - self.gain * abs(value) if math.isfinite(value) else value

    def improves(self, lifted: Collection[str]) -> bool:
        """Whether lifting limits changes the optimum."""
        found = self.best(lifted)
        return found is not None and self._better(found.total(self.objective))

    def sets(self) -> tuple[tuple[str, ...], ...]:
        """Return the smallest sets of limits that bind; () where none does.

        One limit each: every one of them binds by itself. Several: only lifting all limits of a
        set changes the optimum.
        """
        names = [b.name for b in self.bounds if math.isfinite(b.value)]
        if not self.improves(names):
            return ()
        most = len(names) if len(names) <= _ALL else 1
        for count in range(1, most + 1):
            found = [s for s in itertools.combinations(names, count) if self.improves(s)]
            if found:
                return tuple(found)
        kept = list(names)
        for name in names:  # what remains needs every one of its limits
            fewer = [n for n in kept if n != name]
            if self.improves(fewer):
                kept = fewer
        return (tuple(kept),)

    def step(self, names: Sequence[str]) -> Step | None:
        """Return the next point at which relaxing these limits changes the optimum.

        Of several limits, each in turn is made as tight as the ones before it allow. None: however
        far they are relaxed, nothing changes.
        """
        if not self.improves(names):
            return None
        by_name = {b.name: b for b in self.bounds}
        values: dict[str, float] = {}
        found: Solution | None = None
        for name in names:
            aim = by_name[name].aim
            lifted = frozenset(names)
            limits = self._limits(lifted, values).at_most(self.objective, self._room)
            found = solve(
                self.problem, aim, limits, then=self.objective, excluded=self._excluded(lifted)
            )
            if found is None:
                return None
            values[name] = found.total(aim)
        return None if found is None else Step(values, found)

    def exceeded(self, solution: Solution) -> dict[str, float]:
        """Return the limits that a choice breaks, with its totals."""
        over = {}
        for bound in self.bounds:
            total = solution.total(bound.aim)
            if math.isfinite(bound.value) and total > bound.value + _EVEN * abs(bound.value):
                over[bound.name] = total
        return over

    @property
    def _room(self) -> float:
        value = self.wanted
        return value + _EVEN * abs(value) if math.isfinite(value) else value

    def _better(self, value: float) -> bool:
        reference = self.reference
        if not math.isfinite(reference):
            return True
        return value <= self._room and value < reference

    def _limits(self, lifted: Collection[str], values: Mapping[str, float] | None = None) -> Limits:
        limits = Limits()
        for bound in self.bounds:
            value = (
                (values or {}).get(bound.name, math.inf) if bound.name in lifted else bound.value
            )
            if math.isfinite(value):
                limits = limits.at_most(bound.aim, value)
        return limits

    def _excluded(self, lifted: frozenset[str]) -> list[Mapping[str, str]]:
        chosen = None if self.chosen is None else self.chosen.choices
        return [
            t.choices for t in self.tried
            if not (t.broken and t.broken <= lifted) and t.choices != chosen
        ]  # fmt: skip
