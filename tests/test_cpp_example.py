# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""examples/cpp builds with CMake and runs a `.qcm` as Python does; it refuses what it must."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

import qcompiler
from qcompiler.runtime import CompiledModel

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "models/digits_cnn"

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None,
    reason="needs cmake and a C++ compiler",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.find_spec("tvm_ffi")
    assert spec is not None
    assert spec.origin is not None
    packages = Path(spec.origin).parent.parent
    build = tmp_path_factory.mktemp("cpp")
    for command in (
        ["cmake", "-S", str(ROOT / "examples/cpp"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Debug",
         f"-DTVM_PACKAGES={packages}"],
        ["cmake", "--build", str(build)],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "qcm_run"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qcm") / "digits.qcm"
    calibration = DIGITS / "calib.npz"
    qcompiler.compile(DIGITS / "model.onnx", calibration=calibration).save(path)
    return path


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_gives_what_python_gives(program: Path, artifact: Path, tmp_path: Path) -> None:
    model: CompiledModel = qcompiler.load(artifact)
    x = np.load(DIGITS / "eval.npz")["input"][:1]
    x.tofile(tmp_path / "x.bin")
    done = run(program, artifact, "-n", "3", tmp_path / "x.bin", tmp_path / "y.bin")
    assert done.returncode == 0, done.stderr
    assert "3 runs" in done.stdout
    (want,) = model(x).values()
    assert (tmp_path / "y.bin").read_bytes() == want.tobytes()
    listing = run(program, artifact).stdout
    assert listing == "input input: float32[1, 1, 8, 8]\noutput logits: float32[1, 10]\n"


def test_it_says_what_is_wrong(program: Path, artifact: Path, tmp_path: Path) -> None:
    assert run(program).returncode == 2
    assert "cannot read" in run(program, tmp_path / "nowhere.qcm").stderr
    (tmp_path / "short.qcm").write_bytes(artifact.read_bytes()[:5000])
    assert "is no archive" in run(program, tmp_path / "short.qcm").stderr
    (tmp_path / "x.bin").write_bytes(b"abc")
    done = run(program, artifact, tmp_path / "x.bin", tmp_path / "y.bin")
    assert done.returncode == 1
    assert "expected a file of 256 bytes" in done.stderr
    assert run(program, artifact, tmp_path / "x.bin").returncode == 2


def test_it_refuses_another_cpu(program: Path, artifact: Path, tmp_path: Path) -> None:
    """An artifact whose manifest asks for a feature that no CPU has."""
    with zipfile.ZipFile(artifact) as old, zipfile.ZipFile(tmp_path / "x.qcm", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "manifest.json":
                manifest = json.loads(data)
                manifest["target"]["cpu_features"] = ["quantum"]
                data = json.dumps(manifest).encode()
            new.writestr(name, data)
    done = run(program, tmp_path / "x.qcm")
    assert done.returncode == 1
    assert "lacks: quantum" in done.stderr
