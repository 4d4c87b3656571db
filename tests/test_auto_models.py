# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`precision="auto"` on trained networks and an encoder (slow; a quiet machine is best)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_path import imported

import qcompiler
from qcompiler.auto import choose
from qcompiler.data import Budget, Evaluation
from qcompiler.errors import InfeasibleBudgetError
from qcompiler.registry import get_target

MODELS = Path(__file__).parents[1] / "models"
pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.isa("x86-avx2")]


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))


def trained(name: str) -> Any:
    catalogue = imported("catalogue", MODELS / "catalogue.py")
    why = catalogue.skip_reason(name)
    if why is not None:
        pytest.skip(why)
    return catalogue.external(name, calib=128, eval=500)


def check(log: dict[str, Any], limit: float) -> None:
    """Hold a log against what automatic precision promises."""
    assert log["kept"], log["infeasible"]
    measured, predicted = log["measured"], log["predicted"]
    assert measured["drop"] <= limit
    assert measured["latency_ms"] <= measured["uniform_latency_ms"] * 1.01
    assert measured["latency_ms"] <= measured["float_latency_ms"] * 1.01
    assert predicted["latency_ms"] == pytest.approx(measured["latency_ms"], rel=0.15)
    assert len(log["front"]) >= 6


@pytest.mark.parametrize("name", ["resnet56", "mobilenetv2"])
def test_trained_networks(name: str) -> None:
    model = trained(name)
    started = time.perf_counter()
    compiled = qcompiler.compile(
        model.path, target="x86-avx2", calibration=model.calibration, precision="auto",
        evaluate=Evaluation(model.evaluation, model.metric), budget=Budget(max_drop=1.0),
    )  # fmt: skip
    assert time.perf_counter() - started < 600
    assert compiled.report is not None
    check(compiled.report["assignment"], 1.0)
    assert compiled.report["metric"]["drop"] <= 1.0


def test_an_encoder_without_labels() -> None:
    catalogue = imported("catalogue", MODELS / "catalogue.py")
    model = catalogue.built("encoder").build()
    x = np.random.default_rng(5).standard_normal((16, 128, 384)).astype(np.float32)
    found = choose(
        model, get_target("x86-avx2"), calibration={"input": x},
        evaluate=Evaluation({"input": x[:8]}, "sqnr"), budget=Budget(max_drop=95.0),
    )  # fmt: skip
    assert found.log is not None
    check(found.log, 95.0)
    with pytest.raises(InfeasibleBudgetError) as info:
        qcompiler.compile(
            model, target="x86-avx2", calibration={"input": x}, precision="auto",
            budget=Budget(max_latency_ms=0.01),
        )  # fmt: skip
    assert info.value.least["max_latency_ms"] > 0.01
