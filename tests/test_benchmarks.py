# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The comparison of whole models (benchmarks/models.py)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "digits_cnn" / "model.onnx"


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("bench_models", ROOT / "benchmarks/models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_models", module)
    spec.loader.exec_module(module)
    return module


def figures(median: float) -> dict[str, Any]:
    return {"median_ms": median, "min_ms": 0.9 * median, "spread": 0.05, "peak_memory_mb": 60.0}


TIMES = {
    "qcompiler w8a8": figures(4.0),
    "qcompiler w7a8": figures(3.0),
    "qcompiler fp32": figures(10.0),
    "onnxruntime": figures(8.0),
    "onnxruntime-int8": figures(6.0),
    "openvino": figures(9.0),
    "openvino-int8": figures(4.5),
    "tvm": {"problem": "not installed"},
}


def test_ratios_compare_like_with_like(models: ModuleType) -> None:
    """int8 against the best int8 and float against the best float, whatever is faster."""
    found = models.ratios(TIMES)
    assert found == pytest.approx({"w8a8": 1.125, "w7a8": 1.5, "fp32": 0.8})
    assert models.ratios({"qcompiler w8a8": figures(1.0)}) == {}


def test_tables_say_what_is_missing(models: ModuleType) -> None:
    rows = [{"model": "net", "threads_1": TIMES}]
    line = models.table(rows, 1).splitlines()[-1]
    assert line.startswith("| net | 4.00 (±5%) | 3.00 (±5%) |")
    assert line.endswith("| - | 1.12 | 1.50 | 0.80 |")
    assert "3.60 ms, 60 MB" in models.memory_table(rows, 1)
    assert "not installed" in models.memory_table(rows, 1)


@pytest.mark.slow
def test_the_comparison_runs_a_model_of_ones_own(tmp_path: Path) -> None:
    command = [
        *(sys.executable, ROOT / "benchmarks" / "models.py", "--models", MODEL, "--threads", "1"),
        *("--peers", "onnxruntime,tvm", "--runs", "2", "--layers", "2", "--keep", tmp_path),
        *("--json", tmp_path / "all.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "all.json").read_text())["models"][0]
    times = found["threads_1"]
    assert {"qcompiler w8a8", "qcompiler fp32", "onnxruntime-int8", "tvm"} <= set(times)
    assert not [name for name, figures in times.items() if "problem" in figures]
    assert len(found["ours"]["w8a8"]["threads_1"]["layers"]) > 2
    assert "of the peak" in done.stdout
    # No module of benchmarks/ may stand for a package of the same name in the workers.
    assert times["qcompiler w8a8"]["peak_memory_mb"] < times["onnxruntime"]["peak_memory_mb"]


def test_a_chart_of_an_unknown_kind_is_refused_at_once() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "models.py", "--chart", "x.gif"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "models.py: chart x.gif: the file must end in .png" in done.stderr
