# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Regions that lose in integers go back to float: no compiled model is slower than float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler import fallback
from qcompiler.driver import quantize_model

pytestmark = [
    pytest.mark.timed,
    pytest.mark.isa("x86-avx2"),
    pytest.mark.usefixtures("own_cache"),
]

TARGET = "x86-avx2"


def loser() -> onnx.ModelProto:
    """Return small convolutions between functions that have no integer form."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for i in range(3):
        w = rng.standard_normal((8, 8, 1, 1)).astype(np.float32) * 0.3
        weights.append(numpy_helper.from_array(w, f"w{i}"))
        nodes += [
            helper.make_node("Exp", [last], [f"a{i}"]),
            helper.make_node("Conv", [f"a{i}", f"w{i}"], [f"b{i}"], name=f"conv{i}"),
            helper.make_node("Sin", [f"b{i}"], [f"c{i}"]),
        ]
        last = f"c{i}"
    shape = [1, 8, 48, 48]
    graph = helper.make_graph(
        nodes, "loser",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)],
        weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("precision", ["auto", "w8a8"])
def test_what_loses_in_integers_stays_float(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "OFF", 1e9)  # decide on a busy machine, too
    x = np.random.default_rng(1).standard_normal((16, 8, 48, 48)).astype(np.float32)
    model = qcompiler.compile(loser(), target=TARGET, calibration={"x": x}, precision=precision)
    assert model.report is not None
    log = model.report["assignment"]
    decided = model.plan["nodes"]
    assert [decided[f"conv{i}"]["precision"] for i in range(3)] == ["fp32"] * 3
    reason = decided["conv1"]["reason"]
    if precision == "w8a8":
        assert reason.startswith("integer was slower: ")
        assert reason.endswith("with casts")
        assert any("3 of 3 products went back" in n for n in model.report["notes"])
    else:
        assert "float" in reason or "not faster" in reason
    measured = log["measured"]
    assert measured["latency_ms"] <= measured["uniform_latency_ms"] * 1.05
    assert log["nodes"]["conv1"]["options"]["w8a8"]["latency_us"] > 0


def test_a_plan_file_is_taken_as_it_is(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((16, 8, 48, 48)).astype(np.float32)
    plan = quantize_model(loser(), calibration={"x": x}).plan
    path = tmp_path / "plan.json"
    plan.save(path)
    model = qcompiler.compile(loser(), target=TARGET, calibration={"x": x}, precision=path)
    assert model.plan["nodes"]["conv1"]["precision"] == "w8a8"
