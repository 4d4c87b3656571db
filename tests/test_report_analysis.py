# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import re

import pytest

from qcompiler.passes.calibrate import TensorRange
from qcompiler.passes.sensitivity_report import Effect, NodeSensitivity, SensitivityReport
from qcompiler.report_analysis import joint_drop, to_html


def node(name: str, along: float | None, loss: float = 1e-3) -> NodeSensitivity:
    return NodeSensitivity(
        node=name,
        op="conv",
        members=(name, f"{name}_relu"),
        operand="x",
        result=f"{name}_out",
        parameters=100,
        weight={
            "8": Effect(45.0, 0.9999, 1e-5, loss / 100, 0.0),
            "4": Effect(20.0, 0.99, 1e-3, loss, 1.5),
        },
        activation={"8": Effect(45.0, 0.9999, 1e-5, loss / 50, 0.0)},
        weight_error={"8": 0.01, "4": 2.0},
        fisher=50.0,
        along_sqnr=along,
    )


@pytest.fixture
def report() -> SensitivityReport:
    return SensitivityReport(
        graph="g",
        data="d",
        table="calibrate",
        samples=8,
        seed=0,
        losses={"y": "logits"},
        metric="top1",
        score=0.9,
        joint_score=0.85,
        joint_loss=0.25,
        nodes=(node("a", 42.0), node("b", 30.0, 5e-3), node("c", None)),
        tensors={"x": TensorRange((0.0, 1.0), (0.0, 2.0), 0.5, 0.2, 9, (5, 3, 0, 1))},
        first_jump="b",
    )


def test_the_verdict_names_the_drop_the_jump_and_the_dearest_product(
    report: SensitivityReport,
) -> None:
    page = to_html(report, "model.onnx")
    assert joint_drop(report) == pytest.approx(5.0)
    assert 'class="verdict bad"' in page
    assert "top1 85.00 % (float 90.00 %, drop +5.00)" in page
    assert "first jumps at b: its result is at 30.0 dB, nothing before it below 42.0 dB" in page
    assert "Alone, b costs most: 0.005 (weights, 4 bits)" in page
    fine = dataclasses.replace(report, joint_score=0.9)
    assert 'class="verdict good"' in to_html(fine, "model.onnx")
    unlabelled = dataclasses.replace(report, metric=None, score=None, joint_score=None)
    assert joint_drop(unlabelled) is None
    assert 'class="verdict"' in to_html(unlabelled, "model.onnx")
    elsewhere = dataclasses.replace(report, metric="no_such_module:score")
    assert joint_drop(elsewhere) is None


def test_each_product_has_one_row_per_change(report: SensitivityReport) -> None:
    page = to_html(report, "model.onnx")
    table = page[page.index("Every product and change") :]
    assert table.count("rowspan='3'") == 3 * 3  # name, weights, trace of three products
    assert "0.5</td>" in table  # half of 50 / 100 * 2.0: the loss that the trace expects
    assert "kernel, " not in table
    timed = to_html(report, "model.onnx", {"a": 0.0015}, "x86-avx2")
    assert "kernel, µs on x86-avx2" in timed
    assert "1.5</td>" in timed
    cells = re.findall(r"<td>(w8|w4|a8)</td>", table)
    assert cells == ["w8", "w4", "a8"] * 3


def test_the_network_has_each_products_own_error_beside_the_whole(
    report: SensitivityReport,
) -> None:
    page = to_html(report, "model.onnx")
    assert "first jump: b, 30.0 dB" in page
    assert "a alone: 42.0 dB" in page  # 45 dB of weights and 45 of activations
    assert "c alone" not in page  # not compared along the network
    narrow = dataclasses.replace(report, nodes=(dataclasses.replace(report.nodes[0], weight={}),))
    assert 'aria-label="histogram"' in page
    assert "a alone: 45.0 dB" in to_html(narrow, "model.onnx")
