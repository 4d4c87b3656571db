# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile compile --precision auto` and `--override`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run

from qcompiler.cli.options import parse_overrides
from qcompiler.errors import UsageError

DIGITS = Path(__file__).parents[1] / "models" / "digits_cnn"
BASE = ("compile", DIGITS / "model.onnx", "--calibration", DIGITS / "calib.npz")
pytestmark = [
    pytest.mark.timed,
    pytest.mark.isa("x86-avx2"),
    pytest.mark.usefixtures("own_cache"),
]


@pytest.mark.e2e
def test_auto_writes_the_log_and_the_lock_makes_it_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    art = tmp_path / "a.qcm"
    evaluation = ("--evaluate", DIGITS / "eval.npz", "--metric", "top1")
    asked = (*BASE, "--target", "x86-avx2", "--precision", "auto", *evaluation)
    status, out, err = run(
        capsys, *asked, "-o", art, "--max-drop", 1, "--override", "stem*=fp32", "--json"
    )
    assert status == 0, err
    report = json.loads(out)
    log = report["assignment"]
    assert report["budget"]["kept"]
    assert log["kept"]
    assert log["nodes"]["stem_1"]["precision"] == "fp32"
    assert log["nodes"]["stem_1"]["blocked_by"] == "override"
    assert report["precision"]["stem_1"]["precision"] == "fp32"
    assert report["digests"]["evaluation"]
    assert json.loads((tmp_path / "a.report.json").read_text())["assignment"] == log
    status, out, _ = run(capsys, "inspect", art, "--json")
    assert json.loads(out)["measured"]["assignment"] == log
    status, out, _ = run(capsys, "inspect", art)
    assert "plan, limits" in out
    assert "stopped by" in out
    status, out, err = run(
        capsys, *asked, "-o", tmp_path / "b.qcm", "--max-drop", 1, "--locked", art, "--json"
    )
    assert status == 0, err
    assert (tmp_path / "b.qcm").read_bytes() == art.read_bytes()


def test_an_interrupted_search_says_where_its_work_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompiler.compile", interrupted)
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    asked = (*BASE, "-o", tmp_path / "a.qcm", "--target", "x86-avx2")
    status, _, err = run(capsys, *asked, "--precision", "auto")
    assert status == 130
    assert f"interrupted: what was measured is kept in {tmp_path}" in err.replace("\n", "")
    status, _, err = run(capsys, *asked)
    assert (status, err) == (130, "interrupted\n")


@pytest.mark.e2e
def test_an_impossible_budget_is_status_1_and_the_best_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    art = tmp_path / "a.qcm"
    status, _, err = run(
        capsys, *BASE, "-o", art, "--target", "x86-avx2", "--precision", "auto",
        "--max-latency", 0.00001,
    )  # fmt: skip
    assert status == 1
    assert "budget not kept" in err
    assert art.is_file()


def test_overrides_as_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert parse_overrides(()) is None
    found = parse_overrides(("a=b*=w8a8", "op:matmul=fp32"))
    assert found == {"a=b*": "w8a8", "op:matmul": "fp32"}
    with pytest.raises(UsageError, match="expected SELECTOR=PRECISION"):
        parse_overrides(("w8a8",))
    with pytest.raises(UsageError, match="'x' is given twice"):
        parse_overrides(("x=fp32", "x=w8a8"))
    status, _, err = run(capsys, *BASE, "-o", tmp_path / "a.qcm", "--override", "nowhere=fp32")
    assert status == 2
    assert "no node is selected by 'nowhere'" in err
