# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Loops in the assembly of ARM kernels."""

from __future__ import annotations

import re


def innermost_loops(text: str, mnemonic: str) -> list[list[str]]:
    """Instructions of each loop without inner jumps that holds `mnemonic`."""
    lines = [
        line.strip() for line in text.splitlines() if not re.search(r"\.loc\b|Ltmp|\.cfi", line)
    ]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:$", line)}
    jump = re.compile(r"(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s*(\.LBB\w+)")
    loops = []
    for end, line in enumerate(lines):
        found = jump.match(line)
        if found is None or labels.get(found.group(1), end) >= end:
            continue
        body = lines[labels[found.group(1)] + 1 : end]
        if not any(jump.match(inner) for inner in body) and any(mnemonic in i for i in body):
            loops.append(body)
    return loops


def spills(body: list[str]) -> list[str]:
    """Vector registers that a loop moves to or from the stack."""
    return [line for line in body if re.match(r"(ldr|str|ldp|stp)\s+[qd]\d+.*\[sp", line)]
