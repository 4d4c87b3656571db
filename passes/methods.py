# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The post-training methods that keep accuracy, by name."""

from __future__ import annotations

import re

from qcompiler.errors import UsageError
from qcompiler.passes.adaround import AdaRound
from qcompiler.passes.brecq import Brecq
from qcompiler.passes.correct_bias import CorrectBias
from qcompiler.passes.equalize import Equalize
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.smooth import Smooth
from qcompiler.passmanager import Pass, parse_pass

METHODS: dict[str, type[Pass]] = {
    p.name: p for p in (Equalize, Smooth, AdaRound, Gptq, Brecq, CorrectBias)
}


def parse_methods(text: str) -> tuple[Pass, ...]:
    """Return the methods of a comma-separated list of text forms.

    Example: `equalize,adaround{iterations=500}`.

    Raises:
        UsageError: An unknown or repeated method, or an option that it lacks.
    """
    parts = [p.strip() for p in re.split(r",(?![^{]*\})", text) if p.strip()]
    found = tuple(parse_pass(p, METHODS) for p in parts)
    names = [m.name for m in found]
    if len(set(names)) < len(names):
        raise UsageError(f"methods {text!r}: each may be named once")
    return found
