# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Which option each item takes: an exact mixed-integer program, and its Pareto front.

Items are kernels, options are precisions. An option has a latency, a loss, a size and memory; a
conversion between two items costs latency when their options disagree, once per converted value.
The program minimises latency or loss under limits on the others, so that no smaller value exists.

This module knows no graph, no target and no compiler: it is plain arithmetic over
`scipy.optimize.milp` (the HiGHS solver).

Sources: the integer program of HAWQ-V3 (arXiv 2011.10680, section 3.3), with conversions as
variables of their own: y >= x_source + x_target - 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from qcompiler.errors import AssignmentError

Resource = Literal["latency", "loss", "size", "memory"]
RESOURCES: tuple[Resource, ...] = ("latency", "loss", "size", "memory")
Aim = Resource | tuple[str, Resource]
"""What can be made least: a total, or that of one group (its name first)."""

_TOLERANCE = 1e-9
"""Share of a limit by which a sum may pass it: the order of additions, nothing else."""
_SCALE = 1e4
"""What the objective's greatest coefficient becomes: HiGHS stops within 1e-6 of the optimum."""
_ATTEMPTS = 4
"""Choices that may pass a limit, within the solver's tolerance, before a margin is kept."""
_MARGIN = 4e-6
"""Share of a limit that is then kept: HiGHS allows 1e-6."""
_TIME = 60.0
"""Seconds that one program may take; real ones need milliseconds."""
_PATIENCE = 10
"""How many times as long it may take once more: where other programs have the processors."""
_OUT_OF_TIME = 1
"""SciPy's status of a solver that met its time limit."""

Forms = frozenset[str]
_GROUPED: tuple[Resource, ...] = ("latency", "loss", "size")


@dataclass(frozen=True, slots=True)
class Option:
    """What one choice costs; the units are the caller's."""

    latency: float
    loss: float = 0.0
    size: float = 0.0
    memory: float = 0.0


@dataclass(frozen=True, slots=True)
class Item:
    """Something that takes exactly one of its options."""

    name: str
    options: Mapping[str, Option]


@dataclass(frozen=True, slots=True)
class Cast:
    """A conversion that is needed when a source has one of some forms and a reader one of others.

    Attributes:
        key: Casts of equal key are one conversion: it is paid once.
        latency: What it costs.
        source: Item that makes the value; None: it always has the form (a model's input).
        source_forms: Options of the source that need the conversion.
        target: Item that reads it; None: it always wants the form (a model's output).
        target_forms: Options of the reader that need it.
    """

    key: str
    latency: float
    source: str | None = None
    source_forms: Forms = frozenset()
    target: str | None = None
    target_forms: Forms = frozenset()


@dataclass(frozen=True, slots=True)
class Requirement:
    """An item may take one of `forms` only if some other item takes one of its forms."""

    item: str
    forms: Forms
    any_of: tuple[tuple[str, Forms], ...]


@dataclass(frozen=True, slots=True)
class Moment:
    """What is held at one moment of a run; the greatest moment counts as memory.

    Attributes:
        held: Item -> option -> what it then holds.
        base: What is held whatever is chosen.
        casts: Key of a conversion -> what its result holds where it is needed.
    """

    held: Mapping[str, Mapping[str, float]]
    base: float = 0.0
    casts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """A part of the items, and the conversions that count as its own."""

    items: frozenset[str]
    casts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Problem:
    """What there is to choose.

    Attributes:
        items: In any order; names are distinct.
        casts: Conversions.
        ties: Groups of items that take the same option.
        requirements: What some options need of others.
        fixed: Item -> the option that it must take.
        base: What is paid whatever is chosen.
        moments: Moments of a run; none: memory is the sum of the options'.
        groups: Parts that limits of their own may hold for.
    """

    items: tuple[Item, ...]
    casts: tuple[Cast, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    requirements: tuple[Requirement, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)
    base: Option = field(default_factory=lambda: Option(0.0))
    moments: tuple[Moment, ...] = ()
    groups: Mapping[str, Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {i.name for i in self.items}
        if len(names) != len(self.items):
            raise AssignmentError("two items of an assignment have the same name")
        for item in self.items:
            if not item.options:
                raise AssignmentError(f"item {item.name!r} has no options", node=item.name)
            figures = (v for o in item.options.values() for v in dataclasses.astuple(o))
            if not all(math.isfinite(v) for v in figures):
                raise AssignmentError(
                    f"item {item.name!r} has a cost that is not finite", node=item.name
                )
        used = {n for t in self.ties for n in t} | set(self.fixed)
        used |= {r.item for r in self.requirements}
        used |= {n for r in self.requirements for n, _ in r.any_of}
        used |= {n for c in self.casts for n in (c.source, c.target) if n is not None}
        used |= {n for m in self.moments for n in m.held}
        used |= {n for g in self.groups.values() for n in g.items}
        if used - names:
            raise AssignmentError(f"unknown items: {', '.join(sorted(used - names))}")
        for name, option in self.fixed.items():
            if option not in self.item(name).options:
                raise AssignmentError(f"item {name!r} has no option {option!r}", node=name)

    def item(self, name: str) -> Item:
        """Return the item of that name."""
        return next(i for i in self.items if i.name == name)


@dataclass(frozen=True)
class Limits:
    """Greatest allowed totals; `groups` has those of parts: latency, loss and size."""

    latency: float = math.inf
    loss: float = math.inf
    size: float = math.inf
    memory: float = math.inf
    groups: Mapping[str, Limits] = field(default_factory=dict)

    def at_most(self, of: Aim, value: float) -> Limits:
        """Return these limits with one more."""
        if isinstance(of, tuple):
            group, resource = of
            own = self.groups.get(group, Limits()).at_most(resource, value)
            return dataclasses.replace(self, groups={**self.groups, group: own})
        return dataclasses.replace(self, **{of: min(getattr(self, of), value)})


@dataclass(frozen=True)
class Solution:
    """A choice per item and what it amounts to, base included.

    Attributes:
        choices: Item -> option.
        latency, loss, size, memory: Totals.
        casts: Keys of the conversions that it needs.
        groups: Group -> its own totals, as far as its items go.
    """

    choices: Mapping[str, str]
    latency: float
    loss: float
    size: float
    memory: float
    casts: frozenset[str] = frozenset()
    groups: Mapping[str, Option] = field(default_factory=dict)

    def total(self, of: Aim) -> float:
        """Return one of the totals, or of a group's."""
        if isinstance(of, tuple):
            return float(getattr(self.groups[of[0]], of[1]))
        return float(getattr(self, of))

    def within(self, limits: Limits) -> bool:
        """Whether every total keeps its limit."""
        if not all(_keeps(self.total(r), getattr(limits, r)) for r in RESOURCES):
            return False
        return all(
            _keeps(getattr(self.groups[name], r), getattr(own, r))
            for name, own in limits.groups.items()
            for r in _GROUPED
        )


def _keeps(value: float, limit: float) -> bool:
    return value <= limit + _TOLERANCE * abs(limit) if math.isfinite(limit) else True


def totals(problem: Problem, choices: Mapping[str, str]) -> Solution:
    """Return what a choice per item amounts to.

    Raises:
        AssignmentError: An item without a choice, or a choice that is not among its options.
    """
    picked: list[Option] = [problem.base]
    for item in problem.items:
        option = item.options.get(choices.get(item.name, ""))
        if option is None:
            raise AssignmentError(f"item {item.name!r} has no valid choice", node=item.name)
        picked.append(option)
    casts = {c.key: c.latency for c in problem.casts if _needed(c, choices)}
    moments = (
        m.base
        + math.fsum(h[choices[n]] for n, h in m.held.items() if choices[n] in h)
        + math.fsum(v for key, v in m.casts.items() if key in casts)
        for m in problem.moments
    )
    return Solution(
        {i.name: choices[i.name] for i in problem.items},
        math.fsum(o.latency for o in picked) + math.fsum(casts.values()),
        math.fsum(o.loss for o in picked),
        math.fsum(o.size for o in picked),
        math.fsum(o.memory for o in picked) + max(moments, default=0.0),
        frozenset(casts),
        {n: _group_total(problem, g, choices, casts) for n, g in problem.groups.items()},
    )


def _group_total(
    problem: Problem, group: Group, choices: Mapping[str, str], casts: Mapping[str, float]
) -> Option:
    picked = [i.options[choices[i.name]] for i in problem.items if i.name in group.items]
    paid = math.fsum(s for key, s in casts.items() if key in group.casts)
    return Option(
        math.fsum(o.latency for o in picked) + paid,
        math.fsum(o.loss for o in picked),
        math.fsum(o.size for o in picked),
        math.fsum(o.memory for o in picked),
    )


def _needed(cast: Cast, choices: Mapping[str, str]) -> bool:
    made = cast.source is None or choices[cast.source] in cast.source_forms
    return made and (cast.target is None or choices[cast.target] in cast.target_forms)


def is_allowed(problem: Problem, choices: Mapping[str, str]) -> bool:
    """Whether a choice per item keeps ties, requirements and what is fixed."""
    if any(choices[n] != option for n, option in problem.fixed.items()):
        return False
    if any(len({choices[n] for n in tie}) > 1 for tie in problem.ties):
        return False
    return all(
        choices[r.item] not in r.forms or any(choices[n] in forms for n, forms in r.any_of)
        for r in problem.requirements
    )


def solve(
    problem: Problem,
    minimize: Aim = "latency",
    limits: Limits | None = None,
    *,
    then: Aim | None = None,
    excluded: Sequence[Mapping[str, str]] = (),
) -> Solution | None:
    """Return the best choice, or None where no choice keeps the limits.

    Args:
        problem: What there is to choose.
        minimize: What to make least.
        limits: Greatest totals.
        then: What to make least among the choices that are best (within 1e-9).
        excluded: Choices that must not be taken again; each may name some of the items.

    Raises:
        AssignmentError: The solver gave up.
    """
    bounds = limits or Limits()
    program = _Program(problem)
    found = program.solve(minimize, bounds, excluded)
    if found is None or then is None:
        return found
    best = found.total(minimize)
    tight = bounds.at_most(minimize, best + abs(best) * _TOLERANCE)
    second = program.solve(then, tight, excluded)
    return found if second is None or second.total(then) > found.total(then) else second


def front(
    problem: Problem,
    limits: Limits | None = None,
    *,
    points: int = 16,
    step: float = 1e-3,
) -> list[Solution]:
    """Return choices of which none is better in both latency and loss, the fastest first.

    The two ends are exact. Between them the widest gap in latency is split at its middle, each
    time by the exact program, until there are enough points or every gap is narrower than `step`
    of the whole range. Whatever lies between two neighbours, no choice beats the front there.

    Args:
        problem: What there is to choose.
        limits: Greatest totals.
        points: Points to return at most.
        step: Narrowest gap to split, as a share of the range of latencies.
    """
    bounds = limits or Limits()
    fastest = solve(problem, "latency", bounds, then="loss")
    safest = solve(problem, "loss", bounds, then="latency")
    if fastest is None or safest is None:
        return []
    found = _distinct([fastest, safest])
    width = safest.latency - fastest.latency
    gaps = [(fastest, safest)] if len(found) > 1 else []
    while gaps and len(found) < points:
        gaps.sort(key=lambda g: g[1].latency - g[0].latency)
        low, high = gaps.pop()
        if high.latency - low.latency <= step * width:
            break
        middle = (low.latency + high.latency) / 2
        limit = dataclasses.replace(bounds, latency=min(bounds.latency, middle))
        point = solve(problem, "loss", limit, then="latency")
        if point is None or point.loss >= low.loss - abs(low.loss) * _TOLERANCE:
            # Nothing better up to the middle: the next point lies above it.
            above = dataclasses.replace(bounds, loss=_below(low.loss))
            point = solve(problem, "latency", above, then="loss")
            if point is None or point.latency >= high.latency - step * width:
                continue
        found.append(point)
        gaps += [(low, point), (point, high)]
    return _distinct(found)


def _below(value: float) -> float:
    return value - max(abs(value) * 1e-6, 1e-15)


def _distinct(found: Iterable[Solution]) -> list[Solution]:
    """Return the solutions that no other one dominates, the fastest first."""
    kept: list[Solution] = []
    for point in sorted(found, key=lambda s: (s.latency, s.loss)):
        if not kept or point.loss < kept[-1].loss - abs(kept[-1].loss) * _TOLERANCE:
            kept.append(point)
    return kept


class _Program:
    """Matrices of a problem; variables are one per item and option, then one per conversion."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.index: dict[tuple[str, str], int] = {}
        for item in problem.items:
            for option in item.options:
                self.index[item.name, option] = len(self.index)
        self.binary = len(self.index)
        self.casts = {
            key: self.binary + i
            for i, key in enumerate(dict.fromkeys(c.key for c in problem.casts))
        }
        self.moment = self.binary + len(self.casts)  # the greatest moment, in units of `peak`
        self.count = self.moment + (1 if problem.moments else 0)
        held = (
            m.base
            + sum(max(h.values(), default=0.0) for h in m.held.values())
            + sum(m.casts.values())
            for m in problem.moments
        )
        self.peak = max(held, default=0.0) or 1.0
        self.rows: list[dict[int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self._structure()
        self.costs = {r: self._costs(r) for r in RESOURCES}

    def solve(
        self, minimize: Aim, limits: Limits, excluded: Sequence[Mapping[str, str]]
    ) -> Solution | None:
        """Solve; a choice that passes a limit within the solver's tolerance is ruled out."""
        passed: list[Mapping[str, str]] = []
        for attempt in range(2 * _ATTEMPTS):
            margin = 0.0 if attempt < _ATTEMPTS else _MARGIN * 4 ** (attempt - _ATTEMPTS)
            chosen = self._run(minimize, limits, [*excluded, *passed], margin)
            if chosen is None:
                return None
            solution = totals(self.problem, chosen)
            if solution.within(limits):
                return solution
            passed.append(chosen)
        raise AssignmentError("the solver cannot separate choices this close to a limit")

    def _costs(self, resource: Resource) -> npt.NDArray[np.float64]:
        cost = np.zeros(self.count)
        for item in self.problem.items:
            for name, option in item.options.items():
                cost[self.index[item.name, name]] = getattr(option, resource)
        if resource == "latency":
            for cast in self.problem.casts:
                cost[self.casts[cast.key]] = max(cost[self.casts[cast.key]], cast.latency)
        if resource == "memory" and self.problem.moments:
            cost[self.moment] = self.peak
        return cost

    def _of_group(self, group: Group, resource: Resource) -> npt.NDArray[np.float64]:
        """Return the costs of one group; those of all others are 0."""
        cost: npt.NDArray[np.float64] = self.costs[resource].copy()
        for (item, _), i in self.index.items():
            if item not in group.items:
                cost[i] = 0.0
        for key, i in self.casts.items():
            if key not in group.casts:
                cost[i] = 0.0
        return cost

    def _row(self, row: dict[int, float], low: float, high: float) -> None:
        self.rows.append(row)
        self.low.append(low)
        self.high.append(high)

    def _of(self, item: str, forms: Iterable[str]) -> list[int]:
        return [self.index[item, f] for f in forms if (item, f) in self.index]

    def _structure(self) -> None:
        p = self.problem
        for item in p.items:
            self._row(dict.fromkeys(self._of(item.name, item.options), 1.0), 1, 1)
        for tie in p.ties:
            first = tie[0]
            for other in tie[1:]:
                options = {*p.item(first).options, *p.item(other).options}
                for option in sorted(options):
                    a, b = self._of(first, [option]), self._of(other, [option])
                    self._row({**dict.fromkeys(a, 1.0), **dict.fromkeys(b, -1.0)}, 0, 0)
        for r in p.requirements:
            row = dict.fromkeys(self._of(r.item, r.forms), 1.0)
            for name, forms in r.any_of:
                for i in self._of(name, forms):
                    row[i] = row.get(i, 0.0) - 1.0
            self._row(row, -np.inf, 0)
        for name, option in p.fixed.items():
            self._row({self.index[name, option]: 1.0}, 1, 1)
        for cast in p.casts:  # y >= source + target - 1
            row = {self.casts[cast.key]: -1.0}
            ends = 0
            for end, forms in ((cast.source, cast.source_forms), (cast.target, cast.target_forms)):
                if end is not None:
                    ends += 1
                    for i in self._of(end, forms):
                        row[i] = row.get(i, 0.0) + 1.0
            self._row(row, -np.inf, max(ends - 1, 0) if ends else -1)
        for moment in p.moments:  # the greatest moment >= each one
            row = {self.moment: -1.0}
            for name, held in moment.held.items():
                for option, value in held.items():
                    for i in self._of(name, [option]):
                        row[i] = row.get(i, 0.0) + value / self.peak
            for key, value in moment.casts.items():
                if key in self.casts:
                    row[self.casts[key]] = value / self.peak
            self._row(row, -np.inf, -moment.base / self.peak)

    def _bounds(self, limits: Limits) -> list[tuple[npt.NDArray[np.float64], float, float]]:
        """Return costs, limit and the room that the limit leaves, of every finite limit."""
        found = []
        for resource in RESOURCES:
            limit = float(getattr(limits, resource))
            if math.isfinite(limit):
                base = float(getattr(self.problem.base, resource))
                found.append((self.costs[resource], limit, limit - base))
        for name, own in limits.groups.items():
            for resource in _GROUPED:
                limit = float(getattr(own, resource))
                if math.isfinite(limit):
                    group = self.problem.groups[name]
                    found.append((self._of_group(group, resource), limit, limit))
        return found

    def _run(
        self,
        minimize: Aim,
        limits: Limits,
        excluded: Sequence[Mapping[str, str]],
        margin: float,
    ) -> dict[str, str] | None:
        rows, low, high = list(self.rows), list(self.low), list(self.high)
        upper = np.ones(self.count)
        upper[self.moment :] = np.inf
        for cost, limit, left in self._bounds(limits):
            room = left + abs(limit) * _TOLERANCE
            if room > 0 and not (cost < 0).any():
                # What alone is too much is ruled out; the row is then scaled by the room there is,
                # however small that is beside the greatest cost.
                alone = cost > room
                alone[self.moment :] = False
                upper[alone] = 0.0
                cost = np.where(alone, 0.0, cost)
                scale = room
            else:
                scale = float(np.abs(cost).max(initial=0.0)) or 1.0
            rows.append({int(i): float(cost[i]) / scale for i in np.flatnonzero(cost)})
            low.append(-np.inf)
            high.append(room / scale - margin)
        for choice in excluded:
            taken = [self.index[n, o] for n, o in choice.items() if (n, o) in self.index]
            rows.append(dict.fromkeys(taken, 1.0))
            low.append(-np.inf)
            high.append(len(choice) - 1)
        if isinstance(minimize, tuple):
            cost = self._of_group(self.problem.groups[minimize[0]], minimize[1])
        else:
            cost = self.costs[minimize]
        scale = float(np.abs(cost).max(initial=0.0)) or 1.0
        integrality = np.zeros(self.count)
        integrality[: self.binary] = 1
        matrix = _matrix(rows, self.count)
        for time in (_TIME, _PATIENCE * _TIME):
            result: Any = milp(
                cost * (_SCALE / scale),
                constraints=LinearConstraint(matrix, low, high),
                bounds=Bounds(0, upper),
                integrality=integrality,
                options={"mip_rel_gap": 0.0, "time_limit": time},
            )
            if result.status != _OUT_OF_TIME:
                break
        if result.status == 2:  # infeasible
            return None
        if result.x is None or result.status != 0:
            raise AssignmentError(
                f"the assignment was not solved: {result.message}",
                hint="the same command goes on where it was; a machine that does nothing else "
                "solves it sooner, and overrides leave less to solve",
            )
        chosen: dict[str, str] = {}
        for (item, option), i in self.index.items():
            if result.x[i] > 0.5:
                chosen[item] = option
        return chosen


def _matrix(rows: Sequence[Mapping[int, float]], columns: int) -> Any:
    data = [v for row in rows for v in row.values()]
    at = [c for row in rows for c in row]
    ends = np.cumsum([0, *(len(row) for row in rows)])
    return csr_matrix((data, at, ends), shape=(len(rows), columns))
