# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile targets` and `qcompile doctor`: what this machine can build and run."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from command_line import run

from qcompiler.cli.machine import required_pins

pytestmark = pytest.mark.usefixtures("own_folder")


def test_targets_lists_names_and_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "targets", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    rows = {row["name"]: row for row in found["targets"]}
    assert rows["reference"]["runs_here"] is True
    assert found["host"] in rows
    assert rows[found["host"]]["runs_here"] is True
    assert "w8a8" in rows["x86-avx2"]["precisions"]
    arm = rows["arm-dotprod"]
    assert arm["architecture"] == "aarch64"
    assert arm["cpu_features"] == ["asimd", "asimddp", "asimdhp"]
    assert arm["multiplies_halves"] is True
    assert rows["arm-neon"]["multiplies_halves"] is False
    assert arm["processor"] == "cortex-a76"
    assert "neoverse-n1" in arm["processors"]
    assert arm["builds_here"] is (arm["build_obstacle"] == "")
    status, out, _ = run(capsys, "targets")
    assert status == 0
    for name in rows:
        assert name in out


def test_doctor_finds_this_machine_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "doctor", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["ok"] is True
    by_name = {f["name"]: f for f in found["findings"]}
    assert by_name["apache-tvm"]["detail"].endswith("(pinned)")
    assert by_name["C compiler"]["state"] == "ok"
    assert by_name["TVM runtime"]["state"] == "ok"
    assert "qemu-aarch64-static" in by_name
    assert "linker for aarch64" in by_name
    assert "nvcc" in by_name
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "Everything needed is here." in out


def test_doctor_names_a_wrong_pin_and_a_missing_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda n: "9.9" if n == "apache-tvm-ffi" else real(n)
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 1
    by_name = {f["name"]: f for f in json.loads(out)["findings"]}
    wanted = required_pins()["apache-tvm-ffi"]
    assert by_name["apache-tvm-ffi"] == {
        "name": "apache-tvm-ffi",
        "state": "broken",
        "detail": f"9.9, expected {wanted}",
        "fix": f"pip install apache-tvm-ffi=={wanted}",
    }
    assert by_name["C compiler"]["state"] == "broken"


def test_the_pins_are_those_that_are_known_to_work() -> None:
    """The newer tvm-ffi crashes the process in Schedule.tensorize; see docs/adr/0006."""
    assert required_pins() == {
        "apache-tvm": "0.27.0.post1",
        "apache-tvm-ffi": "0.1.14.post1",
    }
    for package, version in required_pins().items():
        assert importlib.metadata.version(package) == version
