# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The post-training methods that keep accuracy, by name, and which ones a precision gets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from qcompiler.errors import UsageError
from qcompiler.ir import Graph
from qcompiler.passes.adaround import AdaRound
from qcompiler.passes.brecq import Brecq
from qcompiler.passes.correct_bias import CorrectBias
from qcompiler.passes.distill import Distill
from qcompiler.passes.equalize import Equalize
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.groups import Groups
from qcompiler.passes.method import Method
from qcompiler.passes.smooth import Smooth
from qcompiler.passmanager import Pass, parse_pass
from qcompiler.plan import PrecisionPlan, selected
from qcompiler.types import Precision

METHODS: dict[str, type[Method]] = {
    p.name: p for p in (Groups, Equalize, Smooth, AdaRound, Gptq, Brecq, Distill, CorrectBias)
}


def parse_methods(text: str) -> tuple[Method, ...]:
    """Return the methods of a comma-separated list of text forms; "none" stands for none.

    Example: `equalize,gptq{only=input:image},adaround{only=fusion iterations=500}`.

    Raises:
        UsageError: An unknown method, one that is repeated for the same nodes, or an option that it
            lacks.
    """
    if text.strip() == "none":
        return ()
    parts = [p.strip() for p in re.split(r",(?![^{]*\})", text) if p.strip()]
    found = tuple(m for p in parts if isinstance(m := parse_pass(p, METHODS), Method))
    if len({(m.name, m.only) for m in found}) < len(found):
        raise UsageError(f"methods {text!r}: each may be named once for the same nodes")
    return found


def check_scopes(graph: Graph, methods: Iterable[Pass]) -> None:
    """Check that the nodes that methods work on are there, before the long part.

    Raises:
        UsageError: A selector that selects nothing.
    """
    for method in methods:
        if isinstance(method, Method) and method.only:
            selected(graph, method.only)


DEFAULT_NARROW = {
    Precision.W4A8: "groups,equalize,gptq",
    Precision.W4A8_GROUP: "equalize,gptq",
}
"""Methods for weights of 4 bits, which round to nearest too coarsely: what `docs/accuracy.md`
measures as the default pipeline."""


def default_methods(precision: str | PrecisionPlan | os.PathLike[str]) -> str:
    """Return the methods that a precision gets where none are named.

    Eight bits need none. Weights of four bits rounded to nearest can ruin a network.

    Args:
        precision: As `qcompiler.compile` takes it. "auto" measures its plans without methods; a
            saved plan gets those that it was made with.

    Raises:
        UsageError: Unknown precision, or a plan that cannot be read.
    """
    if isinstance(precision, str) and precision == "auto":
        return ""
    if isinstance(precision, str) and not precision.endswith(".json"):
        return DEFAULT_NARROW.get(Precision.parse(precision), "")
    plan = precision
    if not isinstance(plan, PrecisionPlan):
        plan = PrecisionPlan.load(os.fspath(plan))
    if not plan.has_integers:
        return ""
    if plan.methods is not None:
        return plan.methods
    given = {d.precision for d in plan.nodes.values()}
    # A plan says itself which products have groups.
    return DEFAULT_NARROW[Precision.W4A8_GROUP] if given & DEFAULT_NARROW.keys() else ""
