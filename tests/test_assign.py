# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The assignment equals brute force and reproduces published configurations."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import time

import pytest
from assignment_problems import brute, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.assign import (
    Cast,
    Group,
    Item,
    Limits,
    Moment,
    Option,
    Problem,
    front,
    is_allowed,
    solve,
    totals,
)
from qcompiler.errors import AssignmentError

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "hawq_v3.json").read_text())


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 4000), st.integers(0, 400), st.booleans())
def test_equals_brute_force(problem: Problem, limit: int, size: int, by_latency: bool) -> None:
    minimize = "latency" if by_latency else "loss"
    limits = Limits(size=float(size))
    if by_latency:
        limits = Limits(loss=limit * 1e-5, size=float(size))
    else:
        limits = Limits(latency=limit * 1e-7, size=float(size))
    expected = brute(problem, minimize, limits)
    found = solve(problem, minimize, limits)  # type: ignore[arg-type]
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert is_allowed(problem, found.choices)
    assert found.within(limits)
    assert found.total(minimize) == pytest.approx(expected, rel=1e-6, abs=1e-12)  # type: ignore[arg-type]
    assert totals(problem, found.choices) == found


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 120), st.integers(0, 2000), st.booleans())
def test_limits_on_memory_and_on_groups_equal_brute_force(
    problem: Problem, memory: int, part: int, by_memory: bool
) -> None:
    minimize = "memory" if by_memory else "latency"
    own = Limits(latency=part * 1e-7, loss=part * 1e-5, size=part / 10)
    limits = Limits(memory=float(memory), groups={"some": own})
    expected = brute(problem, minimize, limits)
    found = solve(problem, minimize, limits)  # type: ignore[arg-type]
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.within(limits)
    assert found.total(minimize) == pytest.approx(expected, rel=1e-6, abs=1e-12)  # type: ignore[arg-type]


def test_memory_is_the_greatest_moment() -> None:
    items = tuple(Item(n, {"wide": Option(1.0), "narrow": Option(2.0)}) for n in "ab")
    both = {n: {"wide": 4.0, "narrow": 1.0} for n in "ab"}
    problem = Problem(items, moments=(Moment(both, 1.0), Moment({"a": both["a"]}, 5.0)))
    fast = solve(problem, "latency")
    assert fast is not None
    assert (fast.latency, fast.memory) == (2.0, 9.0)
    less = solve(problem, "latency", Limits(memory=6.0))
    assert less is not None
    assert less.choices == {"a": "narrow", "b": "wide"}
    assert less.memory == 6.0
    assert solve(problem, "latency", Limits(memory=5.9)) is None


def test_a_group_has_limits_of_its_own() -> None:
    items = tuple(Item(n, {"w8": Option(1, 4.0, 1.0), "w32": Option(2, 0.0, 4.0)}) for n in "abc")
    cast = Cast("q", 0.5, None, frozenset(), "a", frozenset({"w8"}))
    group = {"text": Group(frozenset("ab"), frozenset({"q"}))}
    problem = Problem(items, (cast,), groups=group)
    found = solve(problem, "latency", Limits(groups={"text": Limits(loss=4.0)}))
    assert found is not None
    assert found.choices == {"a": "w32", "b": "w8", "c": "w8"}  # b needs no conversion
    assert found.groups["text"] == Option(3.0, 4.0, 5.0)
    assert solve(problem, "loss", Limits(groups={"text": Limits(latency=2.4)})) is None
    with pytest.raises(AssignmentError, match="unknown items: z"):
        Problem(items, groups={"x": Group(frozenset("z"))})


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_choice_beats_the_front(problem: Problem) -> None:
    found = front(problem, points=64, step=0.0)
    names = [i.name for i in problem.items]
    everything = []
    for combination in itertools.product(*(i.options for i in problem.items)):
        choices = dict(zip(names, combination, strict=True))
        if is_allowed(problem, choices):
            everything.append(totals(problem, choices))
    if not everything:
        assert found == []
        return
    assert found[0].latency == pytest.approx(min(s.latency for s in everything))
    assert found[-1].loss == pytest.approx(min(s.loss for s in everything))
    for a, b in itertools.pairwise(found):
        assert a.latency < b.latency
        assert a.loss > b.loss
    for point in found:
        for other in everything:
            better = other.latency < point.latency * (1 - 1e-6) - 1e-12
            assert not (better and other.loss < point.loss * (1 - 1e-5) - 1e-12)


def test_an_excluded_choice_is_not_taken_again() -> None:
    items = tuple(Item(f"n{i}", {"a": Option(1.0), "b": Option(2.0 + i)}) for i in range(3))
    problem = Problem(items)
    first = solve(problem)
    assert first is not None
    second = solve(problem, excluded=[first.choices])
    assert second is not None
    assert second.choices == {"n0": "b", "n1": "a", "n2": "a"}


def test_a_shared_conversion_is_paid_once() -> None:
    options = {"fp32": Option(5.0), "w8a8": Option(3.0)}
    integer = frozenset({"w8a8"})
    casts = tuple(Cast("input", 3.5, None, frozenset(), n, integer) for n in ("a", "b"))
    alone = solve(Problem((Item("a", options),), casts[:1]))
    both = solve(Problem((Item("a", options), Item("b", options)), casts))
    assert alone is not None
    assert alone.choices == {"a": "fp32"}  # 3 + 3.5 > 5
    assert both is not None
    assert both.choices == {"a": "w8a8", "b": "w8a8"}  # 3 + 3 + 3.5 < 10
    assert both.latency == pytest.approx(9.5)
    assert both.casts == {"input"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Problem((Item("a", {}),)), "has no options"),
        (lambda: Problem((Item("a", {"x": Option(math.nan)}),)), "not finite"),
        (lambda: Problem((Item("a", {"x": Option(1)}),) * 2), "same name"),
        (lambda: Problem((Item("a", {"x": Option(1)}),), ties=(("a", "b"),)), "unknown items: b"),
        (lambda: Problem((Item("a", {"x": Option(1)}),), fixed={"a": "y"}), "no option 'y'"),
        (lambda: totals(Problem((Item("a", {"x": Option(1)}),)), {}), "no valid choice"),
    ],
)
def test_malformed_problems(make, message: str) -> None:
    with pytest.raises(AssignmentError, match=message):
        make()


# --------------------------------------------------------------------- published configurations


def hawq(model: str) -> tuple[Problem, Problem]:
    """Return the published problem with T4 latencies, and the same with bit operations."""
    d = GOLDEN["models"][model]
    layers = range(len(d["bops"]))

    def problem(cost: dict[str, list[float]]) -> Problem:
        items = tuple(
            Item(
                str(i),
                {
                    b: Option(
                        cost[b][i],
                        d["Hutchinson_trace"][i] * d[f"delta_weights_{b}bit_square"][i],
                        d["parameters"][i] * int(b) / 8,
                    )
                    for b in ("8", "4")
                },
            )
            for i in layers
        )
        return Problem(items, ties=tuple(tuple(map(str, t)) for t in d["ties"]))

    bops = {"8": [v / 16 for v in d["bops"]], "4": [v / 64 for v in d["bops"]]}
    return problem({"8": d["latency_int8"], "4": d["latency_int4"]}), problem(bops)


CASES = [(m, c) for m in GOLDEN["models"] for c in sorted(GOLDEN["models"][m]["published"])]


@pytest.mark.parametrize(("model", "case"), CASES)
def test_published_configurations(model: str, case: str) -> None:
    published = GOLDEN["models"][model]["published"][case]
    kind, share = case.split("_")
    by_latency, by_bops = hawq(model)
    problem = by_bops if kind == "bops" else by_latency
    resource = "size" if kind == "modelsize" else "latency"
    low, high = (
        math.fsum(getattr(i.options[b], resource) for i in problem.items) for b in ("4", "8")
    )
    limits = Limits(**{resource: low + (high - low) * float(share)})
    started = time.perf_counter()
    found = solve(problem, "loss", limits)
    assert time.perf_counter() - started < 2.0
    assert found is not None
    theirs = totals(problem, {str(i): b for i, b in enumerate(published)})
    assert theirs.within(limits)
    if (model, case) == ("resnet50", "modelsize_0.25"):
        # The published one is not optimal: stage3.unit6.conv1 can have 8 bits as well.
        assert found.loss < theirs.loss - 0.008
        worst = totals(problem, dict.fromkeys(found.choices, "4")).loss
        assert worst - found.loss == pytest.approx(0.83139, abs=1e-5)
        assert worst - theirs.loss == pytest.approx(0.82323, abs=1e-5)
    else:
        assert "".join(found.choices[str(i)] for i in range(len(published))) == published
