# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Budgets, the verdicts of `qcompile check`, and their JUnit form."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from qcompiler.cli.check import accuracy_verdicts
from qcompiler.cli.compile import budget_problems
from qcompiler.cli.junit import Verdict, to_junit
from qcompiler.errors import DataError


def test_budget_problems_say_what_was_found_and_allowed() -> None:
    report = {
        "metric": {"drop": 1.5},
        "latency_ms": {"compiled": 2.0},
        "size_bytes": {"artifact": 3_000_000},
    }
    assert budget_problems(report, 2.0, 3.0, 4.0) == []
    assert budget_problems(report, None, None, None) == []
    assert budget_problems(report, 1.0, 1.5, 2.5) == [
        "the metric drops by 1.5, allowed are 1",
        "one call takes 2 ms, allowed are 1.5",
        "the artifact has 3.000 MB, allowed are 2.5",
    ]


def test_a_slice_that_lost_too_much_is_a_problem_of_the_budget() -> None:
    report: dict[str, Any] = {"size_bytes": {"artifact": 1}, "metric": FIGURES}
    assert budget_problems(report, None, None, None, 12.0) == []
    assert budget_problems(report, None, None, None, 11.5) == [
        "the metric drops by 12 on slice night (17 samples), allowed are 11.5"
    ]
    report["metric"] = {"worst_slice": None}
    assert budget_problems(report, None, None, None, 1.0) == [
        "the drop of no slice could be measured"
    ]


def test_what_could_not_be_measured_does_not_pass() -> None:
    report: dict[str, Any] = {"metric": None, "size_bytes": {"artifact": 1}}
    assert budget_problems(report, 1.0, 1.0, None) == [
        "the drop could not be measured",
        "the latency could not be measured on this machine",
    ]
    report["metric"] = {"drop": float("nan")}
    assert budget_problems(report, 1.0, None, None) == ["the metric drops by nan, allowed are 1"]


FIGURES: dict[str, Any] = {
    "name": "top1",
    "float": 0.9,
    "compiled": 0.88,
    "drop": 2.0,
    "samples": 100,
    "slices": [
        {"kind": "slice", "name": "day", "samples": 80, "float": 0.9, "compiled": 0.9,
         "drop": 0.0, "binds": True},
        {"kind": "slice", "name": "dusk", "samples": 3, "float": 1.0, "compiled": 0.0,
         "drop": 100.0, "binds": False},
        {"kind": "slice", "name": "night", "samples": 17, "float": 0.9, "compiled": 0.78,
         "drop": 12.0, "binds": True},
    ],
    "slice_minimum": 10,
}  # fmt: skip
FIGURES["worst_slice"] = FIGURES["slices"][2]


def test_the_verdict_on_slices_names_each_that_lost_too_much() -> None:
    accuracy, slices = accuracy_verdicts(FIGURES, 2.0, 5.0, 1.0)
    assert (accuracy.passed, accuracy.found, accuracy.limit) == (True, 2.0, 2.0)
    assert (slices.passed, slices.found, slices.limit) == (False, 12.0, 5.0)
    assert slices.message == ("worst of 2: slice night (17 samples), drop 12 points, allowed 5")
    assert slices.details == (
        "slice night: top1 0.78, float 0.9, drop 12 points, allowed 5, 17 samples",
        "1 groups of fewer than 10 samples do not bind",
    )
    assert accuracy_verdicts(FIGURES, None, 12.0, 1.0)[1].passed


def test_a_limit_on_slices_needs_slices() -> None:
    none = {**FIGURES, "slices": [], "worst_slice": None}
    with pytest.raises(DataError, match="--max-slice-drop: no groups in the evaluation samples"):
        accuracy_verdicts(none, None, 5.0, 1.0)
    small = {**FIGURES, "slices": FIGURES["slices"][1:2], "worst_slice": None}
    with pytest.raises(DataError, match="none of the 1 groups has 10 samples"):
        accuracy_verdicts(small, None, 5.0, 1.0)


JUNIT = {
    "testsuites": ({"tests", "failures", "errors", "time"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped", "time", "timestamp"},
        {"properties", "testcase"},
    ),
    "properties": (set(), {"property"}),
    "property": ({"name", "value"}, set()),
    "testcase": ({"classname", "name", "time"}, {"failure", "error", "system-out"}),
    "failure": ({"message", "type"}, set()),
    "error": ({"message", "type"}, set()),
    "system-out": (set(), set()),
}
"""Attributes and children of each element, as in Jenkins' schema junit-10.xsd."""


def check_junit(element: Any) -> None:
    attributes, children = JUNIT[element.tag]
    assert set(element.attrib) == attributes, element.tag
    for name in attributes & {"tests", "failures", "errors", "skipped"}:
        assert element.get(name).isdigit()
    for name in attributes & {"time"}:
        assert float(element.get(name)) >= 0
    for child in element:
        assert child.tag in children, f"{child.tag} in {element.tag}"
        check_junit(child)
    if element.tag == "testsuite":
        cases = element.findall("testcase")
        assert int(element.get("tests")) == len(cases)
        for name, tag in (("failures", "failure"), ("errors", "error")):
            assert int(element.get(name)) == sum(c.find(tag) is not None for c in cases)
        tags = [child.tag for child in element]
        assert tags == sorted(tags, key=("properties", "testcase").index)


def test_junit_has_the_structure_that_readers_expect() -> None:
    verdicts = [
        Verdict("accuracy", True, 0.1, 1.0, "top1 90 & more", 1.5),
        Verdict("slices", False, 5.0, 1.0, "worst of 2: slice \x00<a>", 0.0, ("slice \x1b",)),
        Verdict("latency", False, None, None, "", 0.25, problem="no room"),
    ]
    text = to_junit(verdicts, "net.qcm", {"target": "x86", "metric": None})
    root = ElementTree.fromstring(text)
    check_junit(root)
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    assert suite.get("time") == "1.750"
    accuracy, slices, latency = suite.findall("testcase")
    assert accuracy.findtext("system-out") == "top1 90 & more"
    failure = slices.find("failure")
    assert failure is not None
    assert failure.get("message") == "worst of 2: slice \ufffd<a>"
    assert failure.text == "worst of 2: slice \ufffd<a>\nslice \ufffd"
    error = latency.find("error")
    assert error is not None
    assert error.get("message") == "no room"
    assert {c.get("classname") for c in (accuracy, slices, latency)} == {"net.qcm"}
