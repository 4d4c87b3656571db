# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""How many instructions an inference takes on an emulated Neoverse N1, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from by_path import imported

import qcompiler

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "models" / "digits_cnn"
TARGET = "arm-dotprod:neoverse-n1"


benchmark = imported("arm_benchmark", ROOT / "benchmarks/arm.py")


def _counter() -> object:
    try:
        return benchmark.counter()
    except benchmark.emulation.MissingError as error:
        pytest.skip(str(error))


def test_counts_repeat_and_know_dot_products(tmp_path: Path) -> None:
    """The same run takes the same instructions, and few rows have 8-bit dot products."""
    counter = _counter()
    calibration = dict(np.load(DIGITS / "calib.npz"))
    found = {}
    for target in (TARGET, "arm-neon"):
        model = qcompiler.compile(
            DIGITS / "model.onnx", target=target, precision="w8a8", calibration=calibration
        )
        path = tmp_path / "model.qcm"
        model.save(path)
        (name,) = model.inputs
        feeds = {name: calibration[name][: model.inputs[name].shape[0]]}
        outputs = {o: s.dtype.numpy for o, s in model.outputs.items()}
        found[target] = counter.count(str(path), feeds, outputs)  # type: ignore[attr-defined]
        if target == TARGET:
            again = counter.count(str(path), feeds, outputs)  # type: ignore[attr-defined]
            # Allocators and hash tables depend on addresses: a few instructions.
            assert again.instructions == pytest.approx(found[target].instructions, rel=0.01)
            assert again.dots == found[target].dots
    assert found["arm-neon"].dots == 0
    assert 0 < found[TARGET].dots < found[TARGET].instructions < found["arm-neon"].instructions
    for left, right in zip(
        found[TARGET].outputs.values(), found["arm-neon"].outputs.values(), strict=True
    ):
        np.testing.assert_array_equal(left, right)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2", "encoder"])
def test_at_most_four_fifths_of_the_instructions_of_onnx_runtime(name: str) -> None:
    """On the same QDQ model, against whichever form of it ONNX Runtime runs in fewer."""
    _counter()
    try:
        figures = benchmark.bench(name, TARGET)
    except benchmark.emulation.MissingError as error:
        pytest.skip(str(error))
    assert figures["ratio"] <= 0.8, benchmark.table([figures])
    # It is the same network, and ONNX Runtime multiplies by dot products too.
    for form in benchmark.FORMS:
        assert figures[form]["correlation"] > 0.98
        assert figures[form]["onnxruntime_dots"] > 0


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("gemm 24x256x192", 0.45),
        pytest.param("mobilenetv2", 0.5, marks=pytest.mark.slow),
        # Most of its float32 convolutions are Winograd's, with a third of the products.
        pytest.param("resnet20", 0.9, marks=pytest.mark.slow),
    ],
)
def test_half_precision_takes_fewer_instructions_than_float32(name: str, most: float) -> None:
    _counter()
    try:
        figures = benchmark.bench_floats(name, TARGET)
    except benchmark.emulation.MissingError as error:
        pytest.skip(str(error))
    assert figures["ratio"] <= most, benchmark.float_table([figures])
    assert 0 < figures["error"] <= 0.02
