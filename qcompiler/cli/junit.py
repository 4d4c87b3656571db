# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Verdicts of a gate as JUnit XML, in the form that Jenkins, GitLab and GitHub's actions read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from xml.etree import ElementTree

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check.

    Attributes:
        name: "accuracy", "slices" or "latency".
        passed: Whether the limit is kept; True where there is no limit.
        found: The figure that is held against the limit; None where it could not be measured.
        limit: The limit, or None.
        message: The figures as a sentence.
        seconds: How long the check took.
        details: Further lines for who reads a failure.
        problem: Why the check could not be made, else empty.
    """

    name: str
    passed: bool
    found: float | None
    limit: float | None
    message: str
    seconds: float
    details: tuple[str, ...] = ()
    problem: str = ""


def to_junit(
    verdicts: Sequence[Verdict], suite: str, properties: Mapping[str, object] | None = None
) -> bytes:
    """Return the verdicts as a JUnit XML document in UTF-8, one test case each.

    A limit that is not kept is a `failure`, a check that could not be made an `error`.

    Args:
        verdicts: The verdicts.
        suite: What was checked; the class name of the cases.
        properties: What the reader of the file should know of the run.
    """
    counts = {
        "tests": str(len(verdicts)),
        "failures": str(sum(not v.passed and not v.problem for v in verdicts)),
        "errors": str(sum(bool(v.problem) for v in verdicts)),
        "time": f"{sum(v.seconds for v in verdicts):.3f}",
    }
    root = ElementTree.Element("testsuites", counts)
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    about = {"name": "qcompile check", **counts, "skipped": "0", "timestamp": stamp}
    group = ElementTree.SubElement(root, "testsuite", about)
    if properties:
        listed = ElementTree.SubElement(group, "properties")
        for name, value in properties.items():
            ElementTree.SubElement(listed, "property", name=_clean(name), value=_clean(value))
    for v in verdicts:
        case = ElementTree.SubElement(
            group,
            "testcase",
            classname=_clean(suite),
            name=_clean(v.name),
            time=f"{v.seconds:.3f}",
        )
        text = _clean("\n".join((v.message, *v.details)))
        if v.problem:
            problem = _clean(v.problem)
            ElementTree.SubElement(case, "error", message=problem, type="QCompilerError")
        elif v.passed:
            ElementTree.SubElement(case, "system-out").text = text
        else:
            message = _clean(v.message)
            failure = ElementTree.SubElement(case, "failure", message=message, type="limit")
            failure.text = text
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _clean(value: object) -> str:
    """Replace characters that XML cannot hold: names come from users' files."""
    return _NOT_XML.sub("\ufffd", str(value))
