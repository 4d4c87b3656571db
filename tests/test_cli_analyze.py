# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command_line import run

from qcompiler.passes.sensitivity_report import SensitivityReport

MODELS = Path(__file__).resolve().parent.parent / "models" / "digits_cnn"
MODEL, CALIBRATION, EVALUATION = (MODELS / n for n in ("model.onnx", "calib.npz", "eval.npz"))


def test_analyze_the_bundled_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, state = tmp_path / "r.html", tmp_path / "s.json"
    command = [
        *("analyze", MODEL, "--calibration", CALIBRATION, "--evaluate", EVALUATION),
        *("--metric", "top1", "--samples", 8, "--workers", 2, "--report", page, "--state", state),
    ]
    status, out, _ = run(capsys, *command, "--json")
    assert status == 0
    document = json.loads(out)
    found = SensitivityReport.from_json(document["sensitivity"])
    assert found.metric == "top1"
    assert found.samples == 8
    assert document["latency_ms"] is None
    assert set(json.loads(state.read_text())["nodes"]) == {n.node for n in found.nodes}

    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert "src=" not in text
    for svg in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg[: svg.index("</svg>")] + "</svg>")
    for n in found.nodes:
        assert n.node in text

    status, out, _ = run(capsys, *command)  # from the state
    assert status == 0
    assert "Everything in 8 bits: loss" in out
    assert found.nodes[0].node in out


@pytest.mark.e2e
def test_kernel_times_on_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(
        capsys,
        *("analyze", MODEL, "--calibration", CALIBRATION, "--samples", 1, "--bits", 4),
        *("--target", "host", "--json"),
    )
    document = json.loads(out)
    assert status == 0
    assert set(document["latency_ms"]) == {n["node"] for n in document["sensitivity"]["nodes"]}
    assert all(ms > 0 for ms in document["latency_ms"].values())
    table = document["latency"]
    assert {"w8a8", "fp32"} <= set(table["models"])
    for model in table["models"].values():
        assert model["calls"] > 5
        assert model["latency_ms"] > 0
        assert all(r["latency_us"] > 0 for r in model["regions"])
    assert {k.split()[0] for k in table["casts"]} == {"quantize", "dequantize"}
    assert all(c["latency_us"] > 0 for c in table["casts"].values())


@pytest.mark.e2e
def test_latencies_by_precision_are_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    records = tmp_path / "r.jsonl"
    base = ("analyze", MODEL, "--calibration", CALIBRATION, "--samples", 1, "--bits", 4)
    status, out, _ = run(capsys, *base, "--target", "host", "--records", records)
    assert status == 0
    assert "microseconds on x86-" in out
    assert "one run" in out
    assert "dequantize: " in out
    assert '"stage": "latency"' in records.read_text()
    status, out, err = run(capsys, *base, "--target", "reference")
    assert status == 0
    assert "cannot tell what its kernels take" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "needs calibration samples"),
        (["--calibration", CALIBRATION, "--bits", "16"], "expected widths from 2 to 8"),
        (["--calibration", CALIBRATION, "--bits", "x"], "expected widths from 2 to 8"),
        (["--calibration", CALIBRATION, "--workers", "-1"], "at least 1"),
        (["--calibration", CALIBRATION, "--loss", "l1"], "expected auto, kl or mse"),
        (["--calibration", CALIBRATION, "--memory", "-1"], "expected megabytes"),
        (["--calibration", CALIBRATION, "--metric", "top1"], "needs --evaluate"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], argv: list[object], message: str) -> None:
    status, _, err = run(capsys, "analyze", MODEL, *argv)
    assert status == 2
    assert message in err
