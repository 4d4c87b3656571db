# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What the product promises, on real trained models and at full size.

Slow; run with `make test-slow PYTEST_ARGS="-k acceptance"`. The trained models are not part of the
project: their tests skip, saying so, where the folder is absent.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from by_path import imported
from outside_models import TRAINED

import qcompiler

MODELS = Path(__file__).parents[1] / "models"
pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def builders() -> ModuleType:
    return imported("builders", MODELS / "builders.py")


@pytest.mark.parametrize("name", TRAINED)
def test_accuracy_and_coverage(name: str) -> None:
    """Default settings, 128 samples: every product in integers, at most half a point lost."""
    catalogue = imported("catalogue", MODELS / "catalogue.py")
    reason = catalogue.skip_reason(name)
    if reason:
        pytest.skip(reason)
    model = catalogue.external(name, 128, 500)
    compiled = qcompiler.compile(
        model.path,
        calibration=model.calibration,
        evaluate=qcompiler.Evaluation(model.evaluation, model.metric),
    )
    assert compiled.report is not None
    metric = compiled.report["metric"]
    assert metric["samples"] >= 500
    assert metric["drop"] <= (0.007 if name == "minilm" else 0.5), metric
    ops = [op for node in compiled.report["nodes"] for op in node["ops"]]
    assert "conv" not in ops
    assert "matmul" not in ops
    assert "qconv" in ops or "qmatmul" in ops


@pytest.mark.parametrize(
    ("name", "precision", "samples"),
    [
        ("resnet20", "w4a8", 128),
        ("resnet56", "w4a8", 128),
        ("mobilenetv2", "w4a8", 128),
        ("resnet20", "w4a8-group", 128),
        ("resnet56", "w4a8-group", 128),
    ],
)
def test_accuracy_of_four_bit_weights(name: str, precision: str, samples: int) -> None:
    """All weights but the edges in 4 bits, reconstructed: 2 points are the most to lose."""
    catalogue = imported("catalogue", MODELS / "catalogue.py")
    reason = catalogue.skip_reason(name)
    if reason:
        pytest.skip(reason)
    model = catalogue.external(name, samples, 500)
    compiled = qcompiler.compile(
        model.path,
        precision=precision,
        calibration=model.calibration,
        evaluate=qcompiler.Evaluation(model.evaluation, model.metric),
    )
    assert compiled.report is not None
    metric = compiled.report["metric"]
    assert metric["samples"] >= 500
    assert metric["drop"] <= 2.0, metric
    products = [n for n in compiled.report["nodes"] if {"qconv", "qmatmul"} & set(n["ops"])]
    narrow = [n["precision"] for n in products if n["precision"].startswith("w4a8")]
    assert len(narrow) == len(products) - 2
    assert precision in narrow


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ResNet-50 and calibration samples on disk, compiled by the command line in a process."""
    folder = tmp_path_factory.mktemp("resnet50")
    model = folder / "resnet50.onnx"
    model.write_bytes(builders().resnet50().SerializeToString())
    samples = np.random.default_rng(0).standard_normal((32, 3, 224, 224)).astype(np.float32)
    np.savez(folder / "calib.npz", input=samples)
    return {"model": model, "calibration": folder / "calib.npz", "artifact": folder / "r.qcm"}


_COMPILE = """
import resource, sys, time
import qcompiler
start = time.perf_counter()
qcompiler.compile(sys.argv[1], calibration=sys.argv[2]).save(sys.argv[3])
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""

_LOAD = """
import sys, time
import numpy as np, tvm_ffi
start = time.perf_counter()
import qcompiler
model = qcompiler.load(sys.argv[1])
model(np.zeros((1, 3, 224, 224), np.float32))
print(time.perf_counter() - start)
assert "libtvm_compiler" not in open("/proc/self/maps").read()
"""


def in_process(program: str, *arguments: Path) -> list[float]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__))
    assert done.returncode == 0, done.stderr
    return [float(t) for t in done.stdout.split()]


def test_resnet50_compiles_in_time_and_memory(resnet50: dict[str, Path]) -> None:
    paths = (resnet50["model"], resnet50["calibration"], resnet50["artifact"])
    seconds, gigabytes = in_process(_COMPILE, *paths)
    assert seconds < 120
    assert gigabytes < 4
    size = resnet50["artifact"].stat().st_size
    parameters = len(qcompiler.load(resnet50["artifact"]).artifact.params.data)
    assert size <= 1.1 * parameters + 1e6
    (loading,) = in_process(_LOAD, resnet50["artifact"])
    assert loading < 1.0


def test_mobilenet_compiles_in_time(tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    model.write_bytes(builders().mobilenet_v2().SerializeToString())
    samples = np.random.default_rng(0).standard_normal((128, 3, 224, 224)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", input=samples)
    seconds, _ = in_process(_COMPILE, model, tmp_path / "calib.npz", tmp_path / "net.qcm")
    assert seconds < 60
