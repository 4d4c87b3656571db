# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile tune`, and compiling with its records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run

import qcompiler
from qcompiler.cli.shell import ProgressBars

pytestmark = [pytest.mark.timed, pytest.mark.usefixtures("own_folder")]

DIGITS = Path(__file__).resolve().parent.parent / "models" / "digits_cnn"
MODEL, CALIBRATION = DIGITS / "model.onnx", DIGITS / "calib.npz"
TARGET = "x86-avx2"
TUNE = ("tune", MODEL, "--target", TARGET, "--calibration", CALIBRATION)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tune", MODEL), "Missing option '--records'"),
        ((*TUNE, "--records", "r", "--seconds", 1, "--trials", 1), "exclude each other"),
        ((*TUNE, "--records", "r", "--seconds", 0), "seconds must be a number above 0"),
        ((*TUNE, "--records", "r", "--trials", 0), "trials must be a positive integer"),
        ((*TUNE, "--records", "none/r"), "the folder none does not exist"),
        (("tune", "no.onnx", "--records", "r"), "no.onnx does not exist"),
        (
            ("tune", MODEL, "--target", "reference", "--records", "r", "--trials", 1),
            "target reference has no kernels to tune",
        ),
        (("compile", MODEL, "-o", "a.qcm", "--records", "r"), "tuning records r does not exist"),
        (("compile", MODEL, "-o", "a.qcm", "--tune-seconds", -1), "expected a number above 0"),
    ],
)
def test_bad_usage_is_named(
    capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], says: str
) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert says in err


def test_files_that_are_no_records_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrong = tmp_path / "notes.txt"
    wrong.write_text("hello\n")
    common = ("--calibration", CALIBRATION, "--records", wrong)
    for command in (
        ("tune", MODEL, "--target", TARGET, "--trials", 1, *common),
        ("compile", MODEL, "-o", "a.qcm", "--target", TARGET, *common),
    ):
        status, _, err = run(capsys, *command)
        assert status == 2
        assert "holds no tuning records" in err
    assert wrong.read_text() == "hello\n"


def test_an_interrupted_run_says_that_it_can_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompiler.tune_model.tune_model", interrupted)
    status, _, err = run(capsys, *TUNE, "--records", "r.jsonl")
    assert (status, err) == (130, "interrupted: nothing was measured yet\n")

    def late(*_: object, **__: object) -> None:
        Path("r.jsonl").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompiler.tune_model.tune_model", late)
    status, _, err = run(capsys, *TUNE, "--records", "r.jsonl")
    assert status == 130
    assert "interrupted: what was measured is in r.jsonl" in err
    assert "goes on from there" in err


def test_figures_after_a_colon_are_the_same_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars(True) as bars:
        for done in (1, 2):
            bars(f"tune: best {done} ms", done, 3)
    assert capsys.readouterr().err.splitlines() == ["tune: best 1 ms 1/3", "tune: best 2 ms 2/3"]


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "qcompiler.cli", *map(str, arguments)]


@pytest.mark.e2e
@pytest.mark.isa(TARGET)
def test_a_killed_run_resumes_and_its_records_compile(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    records = tmp_path / f"{TARGET}.jsonl"
    killed = subprocess.Popen(
        _command(*TUNE, "--records", tmp_path, "--trials", 10), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not records.exists() or records.read_bytes().count(b"\n") < 3:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    before = records.read_bytes()
    status, out, err = run(
        capsys, *TUNE, "--records", tmp_path, "--trials", 10, "--json", "--progress"
    )
    assert status == 0, err
    found = json.loads(out)
    assert records.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert found["trials"] == 10
    assert found["target"] == TARGET
    assert found["latency_ms"]["best"] <= found["latency_ms"]["default"]
    assert found["unmeasured"] == 0
    assert "tune: current" in err
    assert " ms, best " in err

    status, out, err = run(
        capsys,
        *("compile", MODEL, "-o", "a.qcm", "--target", TARGET, "--calibration", CALIBRATION),
        *("--records", tmp_path, "--json"),
    )
    assert status == 0, err
    notes = json.loads(out)["notes"]
    assert any("tuning records were found for" in note for note in notes)
    plain = qcompiler.compile(MODEL, target=TARGET, calibration=CALIBRATION)
    tuned = qcompiler.load("a.qcm")
    inputs = plain.random_inputs()
    expected = plain(inputs)
    for name, array in tuned(inputs).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.e2e
@pytest.mark.isa(TARGET)
def test_compile_tunes_first_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tunings: list[Any] = []
    from qcompiler.targets import tvm_tune

    whole = tvm_tune.tune_graph

    def watch(*arguments: Any, **options: Any) -> Any:
        tunings.append(arguments[3])
        return whole(*arguments, **options)

    monkeypatch.setattr(tvm_tune, "tune_graph", watch)
    model = qcompiler.compile(
        MODEL, target=TARGET, calibration=CALIBRATION, tuning=qcompiler.Tuning(trials=1)
    )
    assert tunings[0].trials == 1
    assert not Path(tunings[0].records).exists()
    assert model.report is not None
    assert any("tuning records were found for" in note for note in model.report["notes"])
