# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Small assignment problems with every feature, and all their choices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import strategies as st

from qcompiler.assign import (
    Cast,
    Group,
    Item,
    Limits,
    Moment,
    Option,
    Problem,
    Requirement,
    Solution,
    is_allowed,
    totals,
)

FORMS = ("fp32", "w8a8", "w4a8")


def solutions(problem: Problem) -> Iterator[Solution]:
    """Yield every allowed choice."""
    names = [i.name for i in problem.items]
    for combination in itertools.product(*(i.options for i in problem.items)):
        choices = dict(zip(names, combination, strict=True))
        if is_allowed(problem, choices):
            yield totals(problem, choices)


def brute(problem: Problem, minimize: str, limits: Limits) -> float | None:
    """Return the least total over all choices."""
    found = [s for s in solutions(problem) if s.within(limits)]
    return min((s.total(minimize) for s in found), default=None)  # type: ignore[arg-type]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draw small problems with every feature."""
    count = draw(st.integers(1, 5))
    cost = st.integers(0, 1000).map(lambda v: v * 1e-7)
    loss = st.integers(0, 1000).map(lambda v: v * 1e-5)
    items = []
    for i in range(count):
        forms = draw(st.lists(st.sampled_from(FORMS), min_size=1, max_size=3, unique=True))
        options = {
            f: Option(draw(cost), draw(loss), float(draw(st.integers(0, 99)))) for f in forms
        }
        items.append(Item(f"n{i}", options))
    some = st.frozensets(st.sampled_from(FORMS), min_size=1, max_size=2)
    name = st.sampled_from([i.name for i in items])
    casts = []
    prices: dict[str, float] = {}
    for _ in range(draw(st.integers(0, 4))):
        key = draw(st.sampled_from(["a", "b", "c"]))
        price = prices.setdefault(key, draw(cost))
        source, target = draw(st.none() | name), draw(st.none() | name)
        casts.append(Cast(key, price, source, draw(some), target, draw(some)))
    ties = ()
    if count > 1 and draw(st.booleans()):
        ties = ((items[0].name, items[1].name),)
    requirements = []
    if draw(st.booleans()):
        any_of = tuple((draw(name), draw(some)) for _ in range(draw(st.integers(0, 2))))
        requirements.append(Requirement(draw(name), draw(some), any_of))
    fixed = {}
    if draw(st.booleans()):
        item = draw(st.sampled_from(items))
        fixed[item.name] = draw(st.sampled_from(sorted(item.options)))
    base = Option(draw(cost), draw(loss))
    held = st.dictionaries(
        name, st.fixed_dictionaries({f: st.integers(0, 50).map(float) for f in FORMS}), max_size=3
    )
    moments = tuple(
        Moment(
            draw(held),
            float(draw(st.integers(0, 9))),
            draw(st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 50).map(float))),
        )
        for _ in range(draw(st.integers(0, 3)))
    )
    groups = {
        "some": Group(draw(st.frozensets(name)), draw(st.frozensets(st.sampled_from(["a", "b"]))))
    }
    return Problem(
        tuple(items), tuple(casts), ties, tuple(requirements), fixed, base, moments, groups
    )
