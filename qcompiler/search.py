# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The search for a plan: solve, build, measure, learn, and solve again.

A sum of single losses only estimates the loss of the whole, and a loss only estimates the drop of a
metric. So every solution is built and evaluated. What that shows is learned twice: as factors
between joint and summed losses, and as a curve from loss to drop; and the limit on the loss moves
between the last solution that kept the budget and the first that did not.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qcompiler.assign import RESOURCES, Limits, Resource, Solution, front, solve, totals
from qcompiler.data import Budget
from qcompiler.decisions import FLOAT, INTEGER, Network
from qcompiler.errors import AssignmentError
from qcompiler.latency import runs_here
from qcompiler.passmanager import ProgressFn, no_progress
from qcompiler.search_regions import Regional
from qcompiler.types import Precision
from qcompiler.workshop import Figures, Judge, Trial, Workshop, race

__all__ = ["GAIN", "SLACK", "Curve", "Outcome", "Round", "search"]

_ROUNDS = 8
GAIN = 0.004
"""Share of the latency below which a further solution is not worth building."""
_FRONT = 20
_MOST_RATE = 4.0
"""Greatest factor between joint and summed losses that a uniform model teaches."""
_EVEN = 0.01
"""Measured latencies this close are equal."""
SLACK = 0.01
"""Share of a latency limit that is kept in hand: measurements differ."""


@dataclass
class Curve:
    """Drop of the metric as a function of the loss: measured points, never falling."""

    points: list[tuple[float, float]] = field(default_factory=list)

    def add(self, loss: float | None, drop: float | None) -> None:
        """Take in a measured joint model."""
        if loss is not None and drop is not None and math.isfinite(loss) and math.isfinite(drop):
            self.points.append((max(loss, 0.0), drop))

    @property
    def monotone(self) -> list[tuple[float, float]]:
        """Points of the closest curve that never falls (pool adjacent violators)."""
        blocks: list[list[float]] = []  # sum of drops, count, then the losses
        for loss, drop in sorted(self.points):
            blocks.append([drop, 1.0, loss])
            while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
                last = blocks.pop()
                blocks[-1] = [blocks[-1][0] + last[0], blocks[-1][1] + last[1],
                              *blocks[-1][2:], *last[2:]]  # fmt: skip
        return [(loss, b[0] / b[1]) for b in blocks for loss in b[2:]]

    def drop(self, loss: float) -> float | None:
        """Return the drop to expect; None where nothing was measured."""
        known = self.monotone
        if not known:
            return None
        losses = [p[0] for p in known]
        at = bisect.bisect_left(losses, loss)
        if at < len(known) and losses[at] == loss:
            return known[at][1]
        if at == 0:  # from no loss at all, which costs nothing
            first, drop = known[0]
            return drop * loss / first if first > 0 else drop
        low, high = known[at - 1], known[at] if at < len(known) else None
        if high is None:  # beyond: on with the overall rate
            return low[1] * loss / low[0] if low[0] > 0 else low[1]
        if low[0] <= 0:
            return low[1] + (high[1] - low[1]) * loss / high[0]
        share = math.log(loss / low[0]) / math.log(high[0] / low[0])
        return low[1] + (high[1] - low[1]) * share

    def loss(self, drop: float, most: float) -> float:
        """Return the greatest loss, up to `most`, at which the drop is at most `drop`."""
        expected = self.drop(most)
        if expected is None or expected <= drop:
            return most
        low, high = 0.0, most
        for _ in range(80):
            middle = (low + high) / 2
            found = self.drop(middle)
            low, high = (middle, high) if found is not None and found <= drop else (low, middle)
        return low


@dataclass
class Round:
    """One joint model that was built and evaluated."""

    choices: Mapping[str, str]
    predicted: Figures
    measured: Figures
    kept: bool
    learned: str
    trial: Trial | None = None
    regions: Mapping[str, Figures] = field(default_factory=dict)

    def to_json(self, number: int) -> dict[str, Any]:
        """Return the JSON form that reports hold."""
        return {
            "round": number,
            "predicted": self.predicted.to_json(),
            "measured": self.measured.to_json(),
            "kept": self.kept,
            "counts": counts(self.choices),
            "learned": self.learned,
        }


def counts(choices: Mapping[str, str], names: Sequence[str] | None = None) -> dict[str, int]:
    """Return how many items have each precision, the commonest first."""
    found: dict[str, int] = {}
    for name, precision in choices.items():
        if names is None or name in names:
            found[precision] = found.get(precision, 0) + 1
    return dict(sorted(found.items(), key=lambda p: (-p[1], p[0])))


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        network: The problem with what was learned.
        choices: The best choice: it keeps the budget, or comes closest.
        solution: Its totals by the learned problem.
        trial: Its joint model.
        predicted: What the problem says of it.
        curve: From loss to drop.
        rounds: All joint models, in order.
        front: The Pareto front of the learned problem.
        objective: What was minimised.
        limit: The limit on the loss (or on the latency) that the choice was solved under.
        broken: Limits that it does not keep, with the least feasible value found.
        seconds: Measured latencies in the last race: "chosen", "float", "w8a8".
        note: Why the choice is not the solver's, where it is not; else empty.
        regions: Limits of single regions and what they cost, for the log; None without any.
        bounds: What the program kept at last, besides loss and latency.
        unfinished: Time, or the number of joint models, was up before nothing better was left.
    """

    network: Network
    choices: Mapping[str, str]
    solution: Solution
    trial: Trial
    predicted: Figures
    curve: Curve
    rounds: list[Round]
    front: list[Solution]
    objective: Literal["latency", "loss"]
    limit: float
    broken: dict[str, float]
    seconds: dict[str, float]
    note: str = ""
    regions: dict[str, Any] | None = None
    bounds: Limits = field(default_factory=Limits)
    unfinished: bool = False

    @property
    def rate(self) -> float:
        """The factor that was learned between predicted and measured latency."""
        expected = self.predicted.seconds
        if expected is None or self.solution.latency <= 0:
            return 1.0
        return expected / self.solution.latency


class Search:
    """One search; see `search`."""

    def __init__(
        self,
        network: Network,
        workshop: Workshop,
        judge: Judge,
        budget: Budget,
        regional: Regional,
        late: Callable[[], bool],
        progress: ProgressFn,
        most: int,
    ) -> None:
        self.network = network
        self.workshop = workshop
        self.judge = judge
        self.budget = budget
        self.regional = regional
        self.late = late
        self.progress = progress
        self.most = most
        self.curve = Curve()
        self.rounds: list[Round] = []
        self.by_choice: dict[tuple[tuple[str, str], ...], Round] = {}
        self.latency_rate = 1.0
        self.memory_rate = 1.0

    def limits(self, limits: Limits) -> Limits:
        """Return limits with those that follow from what was learned."""
        problem = self.network.problem
        if self.budget.max_memory_mb is not None:
            room = self.budget.max_memory_mb * 1e6 / self.memory_rate
            limits = dataclasses.replace(limits, memory=room)
        if not self.regional.limits:
            return limits
        most = sum(max(o.loss for o in i.options.values()) for i in problem.items)
        return dataclasses.replace(limits, groups=self.regional.bounds(self.curve, most))

    def measured(self, trial: Trial, choices: Mapping[str, str], drops: bool) -> dict[str, Figures]:
        """Return what regions with limits cost in a joint model; drops cost a build each."""
        return self.regional.measure(
            self.network, self.workshop, self.judge, trial, choices, drops=drops
        )

    def note_memory(self, trial: Trial, choices: Mapping[str, str]) -> None:
        """Learn how much more memory a built model takes than its values: plans have gaps."""
        expected = totals(self.network.problem, choices).memory
        if trial.figures.memory is not None and expected > 0:
            self.memory_rate = max(self.memory_rate, trial.figures.memory / expected)

    # -------------------------------------------------------------------------- joint models

    def predicted(self, solution: Solution) -> Figures:
        """Return what is expected of a solution."""
        return Figures(
            solution.loss,
            self.curve.drop(solution.loss),
            solution.latency * self.latency_rate,
            solution.size,
            memory=solution.memory * self.memory_rate if self.network.problem.moments else None,
        )

    def attempt(self, choices: Mapping[str, str], why: str = "") -> Round:
        """Build and evaluate the joint model of a choice, once."""
        key = tuple(sorted(choices.items()))
        if key in self.by_choice:
            return self.by_choice[key]
        solution = totals(self.network.problem, choices)
        predicted = self.predicted(solution)
        self.progress("search", len(self.rounds), self.most)
        trial = self.workshop.make(self.network.plan(choices, {}))
        self.judge.judge(trial)
        if trial.figures.seconds is None and self.timed():
            race({"this": trial}, rounds=2, runs=5)
        limits = dataclasses.replace(self.budget, max_latency_ms=None)
        kept = trial.figures.keeps(limits)
        regions = self.measured(trial, choices, kept)
        learned = self.regional.learn(regions, solution) or why
        kept = kept and not self.regional.broken(regions)
        if "max_memory_mb" in trial.figures.broken(self.budget):
            self.note_memory(trial, choices)
        made = Round(dict(choices), predicted, trial.figures, kept, learned, trial, regions)
        self.rounds.append(made)
        self.by_choice[key] = made
        self.curve.add(trial.figures.loss, trial.figures.drop)
        self.progress("search", len(self.rounds), self.most)
        return made

    def timed(self) -> bool:
        """Whether the target runs here."""
        return runs_here(self.workshop.uniform(Precision.FP32).compiled)

    def learn(self, made: Round) -> str:
        """Scale losses by what a joint model showed; return what was learned as a sentence."""
        solution = totals(self.network.problem, made.choices)
        loss = made.measured.loss
        if loss is None or solution.loss <= 0 or loss <= 0:
            return ""
        ratio = loss / solution.loss
        if 0.8 <= ratio <= 1.25:
            return "" if made.kept else "the losses add up as predicted; the limit moves down"
        factor = min(max(ratio, 0.1), 10.0)
        used = {p for p in made.choices.values() if p != FLOAT}
        rates = {
            p: self.network.rates.get(p, 1.0) * (factor if p in used else 1.0)
            for p in {*self.network.rates, *used}
        }
        self.network = self.network.with_rates(rates)
        return f"losses add up to {ratio:.3g} times their sum"

    # --------------------------------------------------------------------------- least latency

    def least_latency(self, limits: Limits) -> Iterator[Round]:
        """Yield joint models, ever closer to the fastest one that keeps the budget."""
        start = limits
        limits = self.limits(start)
        problem = self.network.problem
        fastest = solve(problem, "latency", limits, then="loss")
        if fastest is None:  # the least that there is
            for resource in self._unkept(limits):
                least = solve(problem, resource, then="loss")
                if least is not None:
                    yield self.attempt(least.choices)
            return
        excluded: list[Mapping[str, str]] = []
        good: Solution | None = None
        bad: float | None = None
        for known in self.rounds:  # uniform models are solutions, too
            found = totals(problem, known.choices)
            if known.kept and (good is None or found.latency < good.latency):
                good = found
        while len(self.rounds) < self.most and not self.late():
            problem, limits = self.network.problem, self.limits(start)
            top = solve(problem, "latency", limits, then="loss", excluded=excluded)
            if top is None:
                return
            if good is not None:
                good = totals(problem, good.choices)
                if top.latency >= good.latency * (1 - GAIN):
                    return
            most = top.loss if bad is None else min(top.loss, bad)
            limit = self._next_limit(most, good, bad)
            bound = dataclasses.replace(limits, loss=min(limits.loss, limit))
            point = solve(problem, "latency", bound, then="loss", excluded=excluded)
            if point is None or (good is not None and point.latency >= good.latency * (1 - GAIN)):
                if bad is not None and good is not None and most > good.loss * 1.02:
                    # Nothing faster up to there: look between there and what failed.
                    bound = dataclasses.replace(limits, loss=_below(bad))
                    point = solve(problem, "latency", bound, then="loss", excluded=excluded)
                if point is None or (
                    good is not None and point.latency >= good.latency * (1 - GAIN)
                ):
                    return
            made = self.attempt(point.choices)
            excluded.append(point.choices)
            made.learned = self.learn(made) or made.learned
            after = totals(self.network.problem, point.choices)
            if made.kept:
                if good is None or after.latency < good.latency:
                    good = after
                if bad is not None and bad <= after.loss:
                    bad = None
            else:
                bad = after.loss if bad is None else min(bad, after.loss)
                if not made.learned:
                    made.learned = "the limit on the loss moves down"
            yield made

    def _unkept(self, limits: Limits) -> list[Resource]:
        """Return the resources whose limit no choice keeps by itself; size where none is so."""
        alone = [
            r
            for r in RESOURCES
            if math.isfinite(getattr(limits, r))
            and solve(self.network.problem, r, Limits(**{r: getattr(limits, r)})) is None
        ]
        if alone:
            return alone
        parts = [r for r in RESOURCES for own in limits.groups.values()
                 if math.isfinite(getattr(own, r))]  # fmt: skip
        return list(dict.fromkeys(parts)) or ["size"]

    def _next_limit(self, most: float, good: Solution | None, bad: float | None) -> float:
        """Return the limit on the loss to solve under next."""
        low = 0.0 if good is None else good.loss
        wanted = most
        if self.budget.max_drop is not None:
            wanted = self.curve.loss(self.budget.max_drop, most)
        high = most if bad is None else min(most, _below(bad))
        if bad is None:
            return max(wanted, low * 1.05) if good is not None else wanted
        middle = math.sqrt(max(low, high * 1e-3) * high)
        return min(max(min(wanted, high), low * 1.05), max(middle, low * 1.05))

    # ------------------------------------------------------------------------------ least loss

    def least_loss(self, limits: Limits) -> Iterator[Round]:
        """Yield joint models of least loss within a latency, ever closer to the limit."""
        target = limits.latency
        room = target * (1 - SLACK)
        excluded: list[Mapping[str, str]] = []
        while len(self.rounds) < self.most and not self.late():
            bound = dataclasses.replace(self.limits(limits), latency=room / self.latency_rate)
            point = solve(self.network.problem, "loss", bound, then="latency", excluded=excluded)
            if point is None:
                return
            best = min(
                (r.measured.loss for r in self.rounds
                 if r.kept and _in_time(r, self.budget) and r.measured.loss is not None),
                default=math.inf,
            )  # fmt: skip
            if point.loss >= best * (1 - GAIN):
                return  # by all that was learned, nothing better is left
            made = self.attempt(point.choices)
            made.learned = self.learn(made) or made.learned
            excluded.append(point.choices)
            yield made
            seconds = made.measured.typical
            if not made.kept:
                made.learned = made.learned or "another limit was not kept"
                continue
            if seconds is None or not math.isfinite(target) or seconds <= target:
                continue
            self.latency_rate *= max(seconds / (point.latency * self.latency_rate), 1.0)
            made.kept = False
            made.learned = f"it takes {seconds / point.latency:.3g} times the sum of its kernels"
            room = target * (1 - SLACK)


def _below(value: float) -> float:
    return value * (1 - 1e-6)


def search(
    network: Network,
    workshop: Workshop,
    judge: Judge,
    budget: Budget,
    *,
    uniform: Mapping[str, Trial],
    regional: Regional | None = None,
    late: Callable[[], bool] = lambda: False,
    rounds: int = _ROUNDS,
    progress: ProgressFn = no_progress,
) -> Outcome:
    """Return the best plan for a budget.

    With a limit on the drop the latency is made least; with limits on latency or size alone, the
    loss. The result was built and measured, and so was our own float model beside it: it is never
    the slower one.

    Args:
        network: The problem.
        workshop: Makes joint models.
        judge: Evaluates them.
        budget: Limits.
        uniform: Precision -> the model with everything at that precision, built and judged.
        regional: Limits of single regions.
        late: Whether time is up.
        rounds: Joint models to build at most, beyond the uniform ones.
        progress: Called per joint model.
    """
    work = Search(
        network, workshop, judge, budget, regional or Regional(), late, progress,
        rounds + len(uniform),
    )  # fmt: skip
    for precision, trial in uniform.items():
        judge.judge(trial)
        work.curve.add(trial.figures.loss, trial.figures.drop)
        rate = _uniform_rate(network, precision, trial)
        if rate is not None:
            work.network = work.network.with_rates({**work.network.rates, precision: rate})
    for precision, trial in uniform.items():
        choices = work.network.choices(trial.plan)
        if precision in (FLOAT, INTEGER):
            work.note_memory(trial, choices)
        if any(choices[n] != o for n, o in network.problem.fixed.items()):
            continue
        key = tuple(sorted(choices.items()))
        if key in work.by_choice or precision not in (FLOAT, INTEGER):
            if key in work.by_choice:
                continue
            if set(choices.values()) - {precision, INTEGER, FLOAT}:
                continue
        kept = trial.figures.keeps(dataclasses.replace(budget, max_latency_ms=None))
        predicted = work.predicted(totals(work.network.problem, choices))
        regions = work.measured(trial, choices, kept)
        kept = kept and not work.regional.broken(regions)
        made = Round(choices, predicted, trial.figures, kept, f"everything in {precision}", trial,
                     regions)  # fmt: skip
        work.rounds.append(made)
        work.by_choice[key] = made
    limits = Limits(size=math.inf if budget.max_size_mb is None else budget.max_size_mb * 1e6)
    objective: Literal["latency", "loss"] = "latency"
    if budget.max_drop is None and budget.max_slice_drop is None:
        objective = "loss"
        if budget.max_latency_ms is not None:
            limits = dataclasses.replace(limits, latency=budget.max_latency_ms * 1e-3)
    steps = work.least_latency(limits) if objective == "latency" else work.least_loss(limits)
    for _ in steps:
        pass
    if not work.rounds:  # overrides rule the uniform models out, and nothing keeps the limits
        safest = solve(work.network.problem, "loss", then="latency")
        if safest is None:
            raise AssignmentError(
                "the overrides contradict each other: no plan has all of them",
                hint="nodes that read one value share its width; leave some of them out",
            )
        work.attempt(safest.choices)
    return _finished(work, objective, limits)


def _uniform_rate(network: Network, precision: str, trial: Trial) -> float | None:
    """Return measured over summed loss of a uniform model, where that says something."""
    if precision == FLOAT or trial.figures.loss is None:
        return None
    choices = network.choices(trial.plan)
    summed = totals(network.problem, choices).loss
    if summed <= 0 or trial.figures.loss <= 0:
        return None
    # Where everything is coarse, errors feed on each other: that says little of single coarse ones.
    return min(max(trial.figures.loss / summed, 1 / _MOST_RATE), _MOST_RATE)


def _finished(work: Search, objective: Literal["latency", "loss"], limits: Limits) -> Outcome:
    """Choose among what was built: by a race of all that keep the budget."""
    budget = work.budget
    kept = [r for r in work.rounds if r.kept and r.trial is not None]
    by_name: dict[str, Round] = {}
    note = ""
    floats = [r for r in work.rounds if set(r.choices.values()) <= {FLOAT}]
    eights = [r for r in work.rounds if set(r.choices.values()) <= {INTEGER, FLOAT}]
    timed = work.timed()
    if objective == "latency":
        ordered = sorted(kept, key=lambda r: r.measured.seconds or totals(
            work.network.problem, r.choices).latency)  # fmt: skip
        picked = ordered[:3]
    else:
        within = [r for r in kept if _in_time(r, budget)]
        picked = sorted(within, key=lambda r: r.measured.loss or 0.0)[:1]
    for i, r in enumerate(picked):
        by_name[f"{i}"] = r
    for name, group in (("float", floats), ("w8a8", [r for r in eights if r not in floats])):
        if group:
            by_name.setdefault(name, group[0])
    seconds: dict[str, float] = {}
    if timed and by_name:
        trials = {n: r.trial for n, r in by_name.items() if r.trial is not None}
        seconds = race(trials)
        for n, r in by_name.items():
            if r.trial is not None:
                r.measured = r.trial.note(seconds=seconds[n])
    broken: dict[str, float] = {}
    if picked:
        chosen = picked[0]
        if timed and objective == "latency":
            raced = [r for r in by_name.values() if r.kept]
            best = min(r.measured.seconds or math.inf for r in raced)
            # What is not slower than measurements can tell goes to the smaller loss: float first.
            even = [r for r in raced if (r.measured.seconds or math.inf) <= best * (1 + _EVEN)]
            chosen = min(even, key=lambda r: (r.measured.loss or 0.0, r.measured.seconds))
            if chosen in floats:
                note = "no integer plan was faster than float"
        broken = {**chosen.measured.broken(budget), **work.regional.broken(chosen.regions)}
    else:
        chosen, broken = _closest(work, budget)
    solution = totals(work.network.problem, chosen.choices)
    bounds = dataclasses.replace(work.limits(limits), latency=math.inf)
    points = front(work.network.problem, bounds, points=_FRONT)
    assert chosen.trial is not None  # every round has one until reports are made
    found = dict(seconds)
    found["chosen"] = chosen.measured.seconds or math.nan
    limit = solution.loss if objective == "latency" else limits.latency
    unfinished = len(work.rounds) >= work.most or work.late()
    return Outcome(
        work.network, chosen.choices, solution, chosen.trial, work.predicted(solution), work.curve,
        work.rounds, points, objective, limit, broken, found, note,
        work.regional.to_json(work.network, solution, chosen.regions), bounds,
        unfinished,
    )  # fmt: skip


def _in_time(made: Round, budget: Budget) -> bool:
    limit, seconds = budget.max_latency_ms, made.measured.typical
    return limit is None or seconds is None or seconds * 1e3 <= limit


def _closest(work: Search, budget: Budget) -> tuple[Round, dict[str, float]]:
    """Return the joint model that breaks the budget least, and the least feasible limits."""

    def broken(made: Round) -> dict[str, float]:
        return {**made.measured.broken(budget), **work.regional.broken(made.regions)}

    def excess(made: Round) -> float:
        limits = ((limit_of(budget, work.regional.limits, n), v) for n, v in broken(made).items())
        return sum(v / max(limit, 1e-9) for limit, v in limits)

    best = min(work.rounds, key=excess)
    return best, broken(best)


def limit_of(budget: Budget, regions: Mapping[str, Budget], name: str) -> float:
    """Return the limit of a name as `Outcome.broken` has it: of the whole, or of a region."""
    selector, _, limit = name.rpartition(" ")
    return float(getattr(regions[selector] if selector else budget, limit))
