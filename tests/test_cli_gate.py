# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The gate of a CI job on the bundled model: `qcompile check`, and the limit on slices."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import onnxruntime
import pytest
from command_line import run

import qcompiler

MODELS = Path(__file__).resolve().parent.parent / "models" / "digits_cnn"
MODEL, CALIBRATION, EVALUATION = (MODELS / n for n in ("model.onnx", "calib.npz", "eval.npz"))

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("own_folder")]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("gate") / "net.qcm"
    qcompiler.compile(MODEL, calibration=CALIBRATION).save(path)
    return path


def test_check_passes_and_writes_junit(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    status, out, err = run(
        capsys,
        *("check", artifact, MODEL, "--evaluate", EVALUATION, "--metric", "top1"),
        *("--max-drop", "1", "--max-latency-ratio", "1000", "--junit", "j.xml", "--json"),
    )
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["passed"] is True
    assert [c["name"] for c in found["checks"]] == ["accuracy", "latency"]
    assert found["metric"]["drop"] <= 1
    assert found["latency_ms"]["ratio"] > 0
    (suite,) = ElementTree.parse("j.xml").getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")
    assert [c.get("name") for c in suite.findall("testcase")] == ["accuracy", "latency"]
    properties = {p.get("name"): p.get("value") for p in suite.findall("properties/property")}
    assert properties["artifact.sha256"] == hashlib.sha256(artifact.read_bytes()).hexdigest()
    assert properties["metric"] == "top1"


def _grouped(path: str, night: int) -> None:
    """Write the evaluation samples in two groups: the last ones become noise.

    The label of noise is what the float model sees in it, so that float loses nothing there, and
    integers do.
    """
    data = dict(np.load(EVALUATION))
    (name,) = data.keys() - {"label"}
    noise = np.random.default_rng(0).random((night, *data[name].shape[1:]), np.float32)
    session = onnxruntime.InferenceSession(MODEL)
    data[name][-night:] = noise
    rows = [session.run(None, {name: x[None]})[0].argmax() for x in noise]
    data["label"][-night:] = rows
    data["slice"] = np.repeat(["day", "night"], [len(data["label"]) - night, night])
    np.savez(path, **data)


def test_check_holds_the_worst_slice_against_its_limit(
    capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    _grouped("grouped.npz", 100)
    given = ("check", artifact, MODEL, "--evaluate", "grouped.npz", "--metric", "top1")
    status, out, _ = run(capsys, *given, "--max-slice-drop", "50", "--junit", "j.xml", "--json")
    assert status == 0
    found = json.loads(out)
    assert [c["name"] for c in found["checks"]] == ["accuracy", "slices"]
    names = {(s["kind"], s["name"]) for s in found["metric"]["slices"]}
    assert names == {("slice", "day"), ("slice", "night")} | {("class", str(i)) for i in range(10)}
    worst = max(s["drop"] for s in found["metric"]["slices"] if s["binds"])
    assert found["metric"]["worst_slice"]["drop"] == found["checks"][1]["found"] == worst


def test_check_that_cannot_be_made_leaves_an_error_for_the_ci_job(
    capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    data = dict(np.load(EVALUATION))
    data.pop("label")
    np.savez("unlabelled.npz", **data)
    status, _, err = run(
        capsys,
        *("check", artifact, MODEL, "--evaluate", "unlabelled.npz", "--metric", "mse"),
        *("--max-slice-drop", "1", "--junit", "j.xml"),
    )
    assert status == 2
    assert "--max-slice-drop: no groups in the evaluation samples" in err
    (suite,) = ElementTree.parse("j.xml").getroot()
    assert suite.get("errors") == "1"
    error = suite.find("testcase/error")
    assert error is not None
    assert "no groups" in str(error.get("message"))


def test_compile_keeps_a_limit_on_the_worst_slice(capsys: pytest.CaptureFixture[str]) -> None:
    _grouped("grouped.npz", 100)
    given = ("compile", MODEL, "-o", "a.qcm", "--calibration", CALIBRATION, "--precision", "w4a8")
    given += ("--methods", "none")  # rounded to nearest it loses enough
    status, out, err = run(
        capsys,
        *given,
        *("--target", "reference", "--evaluate", "grouped.npz", "--metric", "top1"),
        *("--max-slice-drop", "0"),
    )
    assert "Worst slice: " in out
    report = json.loads(Path("a.report.json").read_text())
    worst = report["metric"]["worst_slice"]
    groups = {s["name"]: s for s in report["metric"]["slices"]}
    assert (groups["night"]["samples"], groups["night"]["float"]) == (100, 1.0)
    assert groups["night"]["drop"] > groups["day"]["drop"]
    assert worst["drop"] == max(s["drop"] for s in groups.values()) > 0
    assert report["budget"]["max_slice_drop"] == 0
    assert report["budget"]["kept"] is False
    assert status == 1
    assert f"on {worst['kind']} {worst['name']} ({worst['samples']} samples), allowed" in err


def test_check_that_is_not_met_is_status_1(
    capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    status, out, _ = run(
        capsys,
        *("check", artifact, MODEL, "--max-latency-ratio", "0.000001", "--junit", "j.xml"),
    )
    assert status == 1
    assert "failed" in out
    (suite,) = ElementTree.parse("j.xml").getroot()
    assert suite.get("failures") == "1"
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert "allowed 1e-06" in str(failure.get("message"))


def test_check_needs_something_to_check(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    status, _, err = run(capsys, "check", artifact, MODEL)
    assert status == 2
    assert "nothing to check" in err


def test_check_says_that_the_artifact_is_of_another_model(
    capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    proto = onnx.load(MODEL)
    proto.doc_string = "another file, the same network"
    onnx.save(proto, "other.onnx")
    status, _, err = run(
        capsys, "check", artifact, "other.onnx", "--evaluate", EVALUATION, "--metric", "top1"
    )
    assert status == 0
    assert "was compiled from another model than other.onnx" in err
