# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What binds, and what one step more would buy: equal to trying every choice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from assignment_problems import problems, solutions
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.assign import Item, Limits, Option, Problem, Solution, solve
from qcompiler.binding import Binding, Bound, Tried

GAIN = 0.01


@st.composite
def limits(draw: st.DrawFn) -> list[Bound]:
    """Draw limits on the resources that were not minimised, two of them on the loss."""
    loss = st.integers(0, 3000).map(lambda v: v * 1e-5)
    found = [Bound("drop", "loss", draw(loss)), Bound("slice", "loss", draw(loss))]
    found.append(Bound("size", "size", float(draw(st.integers(0, 300)))))
    found.append(Bound("memory", "memory", float(draw(st.integers(0, 120)))))
    found.append(Bound("part", "size", float(draw(st.integers(0, 150))), "some"))
    keep = draw(st.lists(st.sampled_from(found), min_size=1, max_size=5, unique=True))
    return [b for b in found if b in keep]


def kept(solution: Solution, bounds: Sequence[Bound], lifted: Sequence[str] = ()) -> bool:
    return all(
        solution.total(b.aim) <= b.value * (1 + 1e-9) for b in bounds if b.name not in lifted
    )


@settings(max_examples=200, deadline=None)
@given(problems(), limits(), st.data())
def test_what_binds_equals_brute_force(
    problem: Problem, bounds: list[Bound], data: st.DataObject
) -> None:
    every = list(solutions(problem))
    names = [b.name for b in bounds]
    some = st.sampled_from(every) if every else st.nothing()
    broken = st.frozensets(st.sampled_from(names))
    tried = [
        Tried(s.choices, why)
        for s, why in data.draw(st.lists(st.tuples(some, broken), max_size=3) if every else
                                st.just([]))
    ]  # fmt: skip

    def choices(lifted: Sequence[str]) -> list[Solution]:
        gone = [t.choices for t in tried if not (t.broken and t.broken <= set(lifted))]
        return [s for s in every if kept(s, bounds, lifted) and s.choices not in gone]

    def best(lifted: Sequence[str] = ()) -> float:
        return min((s.latency for s in choices(lifted)), default=math.inf)

    asked = Binding(problem, "latency", bounds, None, tried, GAIN)
    reference = best()
    assert asked.reference == pytest.approx(reference, rel=1e-9, abs=1e-15)
    wanted = reference * (1 - GAIN) if math.isfinite(reference) else math.inf

    def better(lifted: Sequence[str]) -> bool:
        value = best(lifted)
        return value < reference and value <= wanted * (1 + 1e-9)

    expected: tuple[tuple[str, ...], ...] = ()
    for count in range(1, len(names) + 1):
        expected = tuple(s for s in itertools.combinations(names, count) if better(s))
        if expected:
            break
    assert asked.sets() == expected
    for one in expected:
        step = asked.step(one)
        assert step is not None
        assert step.solution.latency <= wanted * (1 + 1e-9)
        # Its values are the least, each in turn.
        left = [s for s in choices(one) if s.latency <= wanted * (1 + 1e-9)]
        for bound in (b for b in bounds if b.name in one):
            least = min(s.total(bound.aim) for s in left)
            assert step.values[bound.name] == pytest.approx(least, rel=1e-9, abs=1e-12)
            assert (
                tried or least > bound.value
            )  # what was tried may break a limit that it keeps here
            left = [s for s in left if s.total(bound.aim) <= least * (1 + 1e-9)]
        # And nothing at these values is faster.
        assert step.solution.latency == pytest.approx(min(s.latency for s in left), rel=1e-6)
    for name in names:
        if expected and (name,) not in expected:
            assert (asked.step([name]) is None) == (not better([name]))


@settings(max_examples=100, deadline=None)
@given(problems(), limits())
def test_what_is_exceeded_is_what_a_choice_breaks(problem: Problem, bounds: list[Bound]) -> None:
    asked = Binding(problem, "latency", bounds, None)
    for solution in solutions(problem):
        over = asked.exceeded(solution)
        assert (not over) == kept(solution, bounds)
        for bound in bounds:
            assert (bound.name in over) == (solution.total(bound.aim) > bound.value * (1 + 1e-9))


ITEMS = (
    Item("x", {"w8a8": Option(10.0, 1.0, 2.0), "w4a8": Option(8.0, 9.0, 1.0)}),
    Item("y", {"w8a8": Option(10.0, 1.0, 2.0), "w4a8": Option(9.0, 2.0, 1.0)}),
)


def test_the_next_step_is_the_cheapest_gain() -> None:
    problem = Problem(ITEMS)
    bounds = [Bound("drop", "loss", 2.0)]
    asked = Binding(problem, "latency", bounds, solve(problem, "latency", Limits(loss=2.0)))
    step = asked.step(["drop"])
    assert step is not None
    assert step.solution.choices == {"x": "w8a8", "y": "w4a8"}
    assert step.values == {"drop": 3.0}
    assert asked.sets() == (("drop",),)
    fastest = Binding(problem, "latency", bounds, solve(problem))
    assert fastest.step(["drop"]) is None
    assert fastest.sets() == ()


def test_a_looser_limit_that_is_no_step_does_not_bind() -> None:
    problem = Problem(ITEMS)
    size = Bound("size", "size", 3.0)
    asked = Binding(problem, "latency", [Bound("drop", "loss", 3.0), size], None)
    assert asked.sets() == (("drop",),)  # the size of the fastest is less
    assert asked.step(["size"]) is None


def test_limits_that_bind_together_and_each_by_itself() -> None:
    fast = Item("x", {"slow": Option(9.0, 1.0, 1.0), "fast": Option(1.0, 5.0, 5.0)})
    asked = Binding(
        Problem((fast,)), "latency", [Bound("drop", "loss", 2.0), Bound("size", "size", 2.0)], None
    )
    assert asked.sets() == (("drop", "size"),)  # both have to give way
    both = asked.step(("drop", "size"))
    assert both is not None
    assert both.values == {"drop": 5.0, "size": 5.0}
    either = Item("x", {"slow": Option(9.0, 1.0, 1.0), "big": Option(2.0, 1.0, 9.0),
                        "coarse": Option(1.0, 9.0, 1.0)})  # fmt: skip
    asked = Binding(Problem((either,)), "latency", asked.bounds, None)
    assert asked.sets() == (("drop",), ("size",))


def test_many_limits_give_one_smallest_set() -> None:
    item = Item("x", {"slow": Option(9.0, 1.0, 1.0), "fast": Option(1.0, 5.0, 5.0)})
    loose = [Bound(f"free{i}", "size", 10.0 + i) for i in range(8)]
    bounds = [Bound("drop", "loss", 2.0), *loose, Bound("size", "size", 2.0)]
    assert Binding(Problem((item,)), "latency", bounds, None).sets() == (("drop", "size"),)


def test_nothing_to_choose_names_the_limits_that_leave_nothing() -> None:
    problem = Problem(ITEMS)
    bounds = [Bound("latency", "latency", 18.0), Bound("drop", "loss", 2.0)]
    asked = Binding(problem, "latency", bounds, None)
    assert asked.best() is None
    assert asked.sets() == (("latency",), ("drop",))
    tight = asked.step(["latency"])
    loose = asked.step(["drop"])
    assert tight is not None
    assert loose is not None
    assert tight.values == {"latency": 20.0}
    assert loose.values == {"drop": 10.0}


def test_what_was_tried_and_broke_a_limit_is_possible_without_it() -> None:
    problem = Problem(ITEMS)
    bounds = [Bound("drop", "loss", 3.5), Bound("size", "size", 4.0)]
    both = {"x": "w8a8", "y": "w4a8"}  # keeps both limits by the program, and was built
    chosen = solve(problem, "loss")
    broke = Binding(problem, "latency", bounds, chosen, [Tried(both, frozenset({"drop"}))])
    assert broke.sets() == (("drop",),)
    step = broke.step(["drop"])
    assert step is not None
    assert step.solution.choices == both
    slower = Binding(problem, "latency", bounds, chosen, [Tried(both)])
    step = slower.step(["drop"])
    assert step is not None
    assert step.solution.choices == {"x": "w4a8", "y": "w8a8"}
