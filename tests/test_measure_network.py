# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What the report shows of a network's inside, on the bundled model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from qcompiler import measure_network
from qcompiler.driver import Quantized, build_graph, quantize_model
from qcompiler.interpreter import run
from qcompiler.numerics import dequantize
from qcompiler.registry import get_target

pytestmark = pytest.mark.timed

MODELS = Path(__file__).resolve().parent.parent / "models" / "digits_cnn"
MODEL, CALIBRATION = MODELS / "model.onnx", MODELS / "calib.npz"


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    return quantize_model(MODEL, calibration=CALIBRATION)


@pytest.mark.parametrize("target", ["reference", "x86-avx2"])
def test_regions_read_what_the_network_says(quantized: Quantized, target: str) -> None:
    built = build_graph(quantized.graph, get_target(target))
    names = [r.name for r in built.regions]
    found = {
        n: {names[i] for i in r} for n, r in zip(names, measure_network.reads(built), strict=True)
    }
    first, second = (next(n for n in names if n.startswith(p)) for p in ("res1", "res2"))
    stem = next(n for n in names if n.startswith("stem"))
    assert found[first] == {stem}
    assert found[second] == {first, stem}  # the shortcut
    assert found[names[0]] == set()
    assert all(found[n] for n in names[1:])


def test_the_error_is_that_of_the_interpreter(
    quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_network, "_RUNS", 1)
    found = measure_network.error_along(quantized)
    assert found is not None
    assert found["samples"] == 1
    levels = {v["value"]: v["sqnr"] for v in found["values"]}
    assert next(iter(levels)) == "input"
    assert list(levels)[-1] == "logits"
    assert all(10 < s <= 120 for s in levels.values())
    # One value, step by step.
    floats = quantized.float_graph
    assert floats is not None
    x = np.load(CALIBRATION)["input"][:1]
    value = next(v for v in floats.values() if v.name == "res1.relu")
    held = next(v for v in quantized.graph.values() if v.name == "res1.relu_q")
    assert held.qparams is not None
    y = run(floats, {"input": x}, keep=[value])["res1.relu"].astype(np.float64)
    z = run(quantized.graph, {"input": x}, keep=[held])["res1.relu_q"]
    noise = ((y - dequantize(z, held.qparams)) ** 2).sum()
    assert levels["res1.relu"] == pytest.approx(10 * math.log10((y * y).sum() / noise))


def test_methods_that_rescale_have_no_error_along() -> None:
    scaled = quantize_model(MODEL, calibration=CALIBRATION, methods="equalize")
    assert scaled.methods == ("equalize",)
    assert measure_network.error_along(scaled) is None


def test_a_float_model_has_neither_error_nor_ranges() -> None:
    floats = quantize_model(MODEL, precision="fp32")
    assert measure_network.error_along(floats) is None
    assert measure_network.ranges(floats) == {}


def test_ranges_are_those_of_the_values_that_are_quantized(quantized: Quantized) -> None:
    found = measure_network.ranges(quantized)
    held = {v.name.removesuffix("_q") for v in quantized.graph.values() if v.type.is_quantized}
    assert set(found) <= held
    assert "input" in found
    for entry in found.values():
        assert entry["bounds"][0] <= entry["bounds"][1]
        assert sum(entry["histogram"]) > 0
