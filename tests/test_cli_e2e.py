# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The command line on the bundled model, as a user or a CI job drives it."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from command_line import run

MODELS = Path(__file__).resolve().parent.parent / "models" / "digits_cnn"
MODEL, CALIBRATION, EVALUATION = (MODELS / n for n in ("model.onnx", "calib.npz", "eval.npz"))

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("own_folder")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The bundled model compiled once, with everything that the command writes."""
    folder = tmp_path_factory.mktemp("compiled")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "qcompiler.cli",
            *("compile", MODEL, "-o", folder / "net.qcm", "--calibration", CALIBRATION),
            *("--evaluate", EVALUATION, "--metric", "top1", "--max-drop", "1"),
            *("--report", folder / "net.html", "--json"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {"folder": folder, "out": done.stdout, "err": done.stderr}


@pytest.fixture
def artifact(compiled: dict[str, Any]) -> Path:
    path: Path = compiled["folder"] / "net.qcm"
    return path


# --- compile -------------------------------------------------------------------------------------


def test_compile_json_has_the_documented_fields(compiled: dict[str, Any]) -> None:
    found = json.loads(compiled["out"])
    assert found["artifact"].endswith("net.qcm")
    assert found["target"].startswith("x86")
    assert found["metric"]["name"] == "top1"
    assert found["metric"]["float"] > 0.95
    drop = 100 * (found["metric"]["float"] - found["metric"]["compiled"])
    assert found["metric"]["drop"] == pytest.approx(drop)
    assert found["metric"]["drop"] <= 1
    assert found["latency_ms"]["compiled"] > 0
    assert found["latency_ms"]["float"] > 0
    size = found["size_bytes"]
    assert size["artifact"] == (compiled["folder"] / "net.qcm").stat().st_size
    assert size["model"] == MODEL.stat().st_size
    assert 0 < size["parameters"] < size["artifact"]
    assert found["precision"]
    assert all(e["precision"] and e["reason"] for e in found["precision"].values())
    assert any(e["precision"] == "w8a8" for e in found["precision"].values())
    for node in found["nodes"]:
        assert {"name", "ops", "precision", "latency_ms"} <= set(node)
    assert found["versions"]["apache-tvm"]
    assert found["digests"]["model"]
    assert found["seconds"]
    assert found["budget"]["kept"] is True


def test_compile_writes_artifact_page_and_figures_and_nothing_else(
    compiled: dict[str, Any],
) -> None:
    folder = compiled["folder"]
    assert sorted(p.name for p in folder.iterdir()) == ["net.html", "net.qcm", "net.report.json"]
    assert json.loads((folder / "net.report.json").read_text()) == json.loads(compiled["out"])
    page = (folder / "net.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<svg") >= 4
    assert "Budget kept" in page


def test_compile_keeps_standard_error_quiet(compiled: dict[str, Any]) -> None:
    assert compiled["err"] == ""


def test_compile_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys,
        *("compile", MODEL, "-o", "net.qcm", "--calibration", CALIBRATION),
        *("--target", "reference", "--progress"),
    )
    assert status == 0
    assert "model.onnx on reference" in out
    assert "size" in out
    assert "smaller" in out or "larger" in out
    assert "Nodes by precision" in out
    assert "import 1/1" in err
    assert Path("net.qcm").exists()


def test_a_budget_that_is_not_kept_is_status_1_and_the_artifact_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = run(
        capsys,
        *("compile", MODEL, "-o", "net.qcm", "--calibration", CALIBRATION),
        *("--target", "reference", "--max-size", "0.001", "--json"),
    )
    assert status == 1
    found = json.loads(out)
    assert found["budget"]["kept"] is False
    assert "allowed are 0.001" in found["budget"]["problems"][0]
    assert "budget not kept: the artifact has" in err
    assert "The best so far is written to net.qcm." in err
    assert Path("net.qcm").exists()


def _noise(**changes: Any) -> dict[str, Any]:
    arrays: dict[str, Any] = {"input": np.zeros((4, 1, 8, 8), np.float32), **changes}
    return {name: array for name, array in arrays.items() if array is not None}


def _with_nan() -> np.ndarray[Any, Any]:
    array = np.zeros((4, 1, 8, 8), np.float32)
    array[2, 0, 3, 3] = np.nan
    return array


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (_noise(input=None, image=np.zeros((4, 1, 8, 8), np.float32)), ["input", "image"]),
        (_noise(input=None), ["input"]),
        (_noise(input=np.zeros((4, 1, 8, 9), np.float32)), ["input", "[4, 1, 8, 9]"]),
        (_noise(input=np.zeros((4, 8), np.float32)), ["input", "[4, 8]"]),
        (_noise(input=np.zeros((4, 1, 8, 8), np.uint8)), ["input", "uint8"]),
        (_noise(input=np.zeros((0, 1, 8, 8), np.float32)), ["no samples"]),
        (_noise(input=_with_nan()), ["input", "NaN"]),
        (_noise(input=np.full((4, 1, 8, 8), np.inf, np.float32)), ["input", "infinity"]),
    ],
)
def test_calibration_data_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], arrays: dict[str, Any], words: list[str]
) -> None:
    np.savez("calibration.npz", **arrays)
    status, out, err = run(
        capsys, "compile", MODEL, "-o", "net.qcm", "--calibration", "calibration.npz"
    )
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert not Path("net.qcm").exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"not an archive", "c.npz"), (b"PK\x03\x04cut off", "c.npz"), (None, "absent.npz")],
)
def test_a_calibration_file_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], content: bytes | None, name: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    status, _, err = run(capsys, "compile", MODEL, "-o", "net.qcm", "--calibration", name)
    assert status == 2
    assert name in err
    assert "Traceback" not in err


def test_calibration_is_needed_for_integers(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "compile", MODEL, "-o", "net.qcm")
    assert status == 2
    assert "calibration" in err


def _truncated() -> bytes:
    return MODEL.read_bytes()[:20_000]


@pytest.mark.parametrize(
    "content",
    [b"\x00\x01\x02\x03" * 100, b"hello, this is text", _truncated(), b"\x08\x08"],
    ids=["random", "text", "truncated", "no-graph"],
)
def test_a_model_that_is_none(capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    Path("m.onnx").write_bytes(content)
    status, out, err = run(
        capsys, "compile", "m.onnx", "-o", "net.qcm", "--calibration", CALIBRATION
    )
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert "m.onnx" in err
    assert "Traceback" not in err
    assert not Path("net.qcm").exists()


def test_unknown_targets_and_precisions(capsys: pytest.CaptureFixture[str]) -> None:
    base = ("compile", MODEL, "-o", "net.qcm", "--calibration", CALIBRATION)
    status, _, err = run(capsys, *base, "--target", "x86-avx3")
    assert status == 2
    assert "unknown target 'x86-avx3': known are host, arm-dotprod" in err
    assert "hint: did you mean 'x86-avx2'?" in err
    status, _, err = run(capsys, *base, "--precision", "w3a5")
    assert status == 2
    assert "w3a5" in err
    status, _, err = run(capsys, *base, "--precision", "plan.json")
    assert status == 2
    assert "plan.json" in err


@pytest.mark.parametrize("precision", ["fp16", "w8", "w4", "w8a8-dynamic"])
def test_precisions_without_calibration_data(
    capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    status, out, _ = run(
        capsys, "compile", MODEL, "-o", "net.qcm", "--precision", precision, "--json"
    )
    assert status == 0
    found = json.loads(out)
    precisions = {e["precision"] for e in found["precision"].values()}
    if precision == "w8a8-dynamic":
        assert precisions == {"fp32", precision}
        return
    assert precision in precisions
    assert found["size_bytes"]["parameters"] < 0.6 * found["size_bytes"]["model"]
    status, out, _ = run(
        capsys,
        *("check", "net.qcm", MODEL, "--evaluate", EVALUATION, "--metric", "top1"),
        *("--max-drop", "1", "--json"),
    )
    assert status == 0


def test_precisions_that_a_qdq_model_cannot_say(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("export", MODEL, "-o", "q.onnx", "--calibration", CALIBRATION, "--precision", "w4")
    status, _, err = run(capsys, *given)
    assert status == 2
    assert "a QDQ model cannot say what precision w4 computes" in err
    assert not Path("q.onnx").exists()


def test_an_input_shape_for_no_input(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(
        capsys,
        *("compile", MODEL, "-o", "net.qcm", "--calibration", CALIBRATION),
        *("--input-shape", "picture:1x1x8x8"),
    )
    assert status == 2
    assert "picture" in err


def test_metrics_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    base = (
        "compile",
        MODEL,
        "-o",
        "net.qcm",
        "--calibration",
        CALIBRATION,
        "--target",
        "reference",
    )
    status, _, err = run(capsys, *base, "--evaluate", EVALUATION, "--metric", "top3")
    assert status == 2
    assert "top3" in err
    np.savez("wrong.npz", input=np.zeros((4, 1, 8, 8), np.float32), label=np.zeros(3, np.int64))
    status, _, err = run(capsys, *base, "--evaluate", "wrong.npz", "--metric", "top1")
    assert status == 2
    assert "3 labels for 4 samples" in err


def test_a_metric_of_the_users_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "my_metric_of_the_test.py").write_text(
        "import numpy as np\n"
        "def errors(outputs, samples):\n"
        "    return float((outputs['logits'].argmax(1) == samples['label']).mean())\n"
    )
    status, out, err = run(
        capsys,
        *("compile", MODEL, "-o", "net.qcm", "--calibration", CALIBRATION),
        *("--evaluate", EVALUATION, "--metric", "my_metric_of_the_test:errors", "--json"),
    )
    assert status == 0, err
    metric = json.loads(out)["metric"]
    assert 0.9 < metric["compiled"] <= 1
    assert 0.9 < metric["float"] <= 1


def test_a_metric_of_the_users_own_that_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "my_broken_metric.py").write_text("def score(outputs, samples): return 1 / 0\n")
    status, _, err = run(
        capsys,
        *("compile", MODEL, "-o", "net.qcm", "--calibration", CALIBRATION),
        *("--evaluate", EVALUATION, "--metric", "my_broken_metric:score"),
        *("--target", "reference"),
    )
    assert status == 2
    assert "metric 'my_broken_metric:score' failed: ZeroDivisionError: division by zero" in err
    assert not Path("net.qcm").exists()


def test_interrupt_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Ctrl-C at several moments of a compilation: status 130, one word, no files."""
    for seconds in (0.3, 1.0, 2.5):
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "qcompiler.cli",
                *("compile", MODEL, "-o", tmp_path / "net.qcm", "--calibration", CALIBRATION),
                *("--evaluate", EVALUATION, "--metric", "top1", "--target", "reference"),
            ],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if process.returncode == 0:
            break  # the machine was faster than this interrupt; the earlier ones have counted
        assert process.returncode in (130, -signal.SIGINT), err
        assert list(tmp_path.iterdir()) == []
        if process.returncode == 130:
            assert "Traceback" not in err


# --- run -----------------------------------------------------------------------------------------


def test_run_gives_the_results_of_the_model(
    capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    status, out, err = run(
        capsys, "run", artifact, "--inputs", EVALUATION, "-o", "out.npz", "--threads", "1"
    )
    assert (status, out) == (0, "")
    assert "also holds label; these are not inputs" in err
    with np.load("out.npz") as results, np.load(EVALUATION) as samples:
        (name,) = results.files
        logits = results[name]
        assert logits.shape == (len(samples["label"]), 10)
        assert (logits.argmax(1) == samples["label"]).mean() > 0.95


def test_run_says_as_json_what_it_wrote(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    given = (artifact, "--inputs", EVALUATION, "-o", "out.npz")
    status, out, err = run(capsys, "run", *given, "--json", "--threads", "1")
    assert status == 0
    assert "wrote out.npz" in err
    found = json.loads(out)
    with np.load("out.npz") as results:
        (name,) = results.files
        logits = results[name]
    about = found["outputs"][name]
    assert about["shape"] == list(logits.shape)
    assert about["dtype"] == "float32"
    assert about["finite"] == logits.size
    assert about["min"] == pytest.approx(float(logits.min()))
    assert about["sha256"] == hashlib.sha256(logits.tobytes()).hexdigest()
    assert found["given"]["input"] == {"dtype": "float32", "shape": [len(logits), 1, 8, 8]}
    assert found["ignored"] == ["label"]
    assert found["threads"] == 1
    assert found["output"] == "out.npz"
    assert found["size_bytes"] == Path("out.npz").stat().st_size
    assert found["seconds"]["run"] > 0
    again = json.loads(run(capsys, "run", *given, "--json", "--threads", "2")[1])
    assert again["outputs"] == found["outputs"]
    status, out, _ = run(capsys, "run", artifact, "--inputs", "none.npz", "-o", "o.npz", "--json")
    assert status == 2
    assert "none.npz does not exist" in json.loads(out)["error"]["message"]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"picture": np.zeros((1, 1, 8, 8), np.float32)}, ["missing input"]),
        ({"input": np.zeros((1, 1, 8, 9), np.float32)}, ["'input' has shape [1, 1, 8, 9]"]),
        ({"input": np.zeros((1, 1, 8, 8), np.uint8)}, ["'input' has dtype uint8"]),
        ({"input": np.zeros((0, 1, 8, 8), np.float32)}, ["'input' holds no samples"]),
        ({"input": np.full((1, 1, 8, 8), np.nan, np.float32)}, ["'input' holds 64 values", "NaN"]),
    ],
)
def test_inputs_that_do_not_fit(
    capsys: pytest.CaptureFixture[str],
    artifact: Path,
    arrays: dict[str, Any],
    words: list[str],
) -> None:
    np.savez("in.npz", **arrays)
    status, _, err = run(capsys, "run", artifact, "--inputs", "in.npz", "-o", "out.npz")
    assert status == 2
    for word in words:
        assert word in err
    assert "Traceback" not in err
    assert not Path("out.npz").exists()


def test_inputs_that_cannot_be_read(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    Path("in.npz").write_bytes(b"PK\x03\x04 not an archive")
    np.save("single.npy", np.zeros(3))
    np.savez("objects.npz", input=np.array([{}], object))
    for name, words in (
        ("in.npz", "in.npz is not a readable .npz file"),
        ("single.npy", "single.npy is a single .npy array"),
        ("objects.npz", "objects.npz is not a readable .npz file"),
        ("absent.npz", "input file absent.npz does not exist"),
    ):
        status, _, err = run(capsys, "run", artifact, "--inputs", name, "-o", "out.npz")
        assert status == 2
        assert words in err


@pytest.mark.parametrize("damage", ["truncated", "altered", "text"])
def test_an_artifact_that_is_damaged(
    capsys: pytest.CaptureFixture[str], artifact: Path, damage: str
) -> None:
    data = bytearray(artifact.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "altered":
        data[len(data) // 2] ^= 1
    else:
        data = bytearray(b"text")
    Path("bad.qcm").write_bytes(data)
    for command in (
        ("run", "bad.qcm", "--inputs", EVALUATION, "-o", "out.npz"),
        ("inspect", "bad.qcm"),
        ("check", "bad.qcm", MODEL, "--evaluate", EVALUATION, "--metric", "top1"),
        ("bench", "bad.qcm"),
    ):
        status, _, err = run(capsys, *command)
        assert status == 2
        assert "bad.qcm" in err
        assert "Traceback" not in err


# --- inspect, bench, export ----------------------------------------------------------------------


def test_inspect_shows_inputs_plan_and_digest(
    capsys: pytest.CaptureFixture[str], artifact: Path, compiled: dict[str, Any]
) -> None:
    status, out, _ = run(capsys, "inspect", artifact)
    assert status == 0
    assert "input   input: float32[1, 1, 8, 8]" in out
    assert "precision of each node" in out
    for node in json.loads(compiled["out"])["precision"]:
        assert node in out
    status, out, err = run(capsys, "inspect", artifact, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["manifest"]["format"] == "qcm"


def test_inspect_shows_what_the_report_beside_it_measured(
    capsys: pytest.CaptureFixture[str], compiled: dict[str, Any], artifact: Path, tmp_path: Path
) -> None:
    report = json.loads((compiled["folder"] / "net.report.json").read_text())
    status, out, _ = run(capsys, "inspect", artifact, "--json")
    assert status == 0
    assert json.loads(out)["measured"]["metric"] == report["metric"]
    _, out, _ = run(capsys, "inspect", artifact)
    assert "measured, worst slice" in out
    assert "lock, versions" in out
    rows = [line.split("│")[1].strip() for line in out.splitlines() if line.count("│") == 4]
    assert rows == list(report["precision"])  # in the order of the network
    # A report of another artifact, and none.
    shutil.copy(artifact, tmp_path / "copy.qcm")
    assert (
        json.loads(run(capsys, "inspect", tmp_path / "copy.qcm", "--json")[1])["measured"] is None
    )
    report["digests"]["artifact"] = "0" * 64
    (tmp_path / "copy.report.json").write_text(json.dumps(report))
    assert (
        json.loads(run(capsys, "inspect", tmp_path / "copy.qcm", "--json")[1])["measured"] is None
    )
    (tmp_path / "copy.report.json").write_text("[1")
    assert run(capsys, "inspect", tmp_path / "copy.qcm")[0] == 0


def test_bench_gives_the_documented_figures(
    capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    status, out, err = run(
        capsys,
        *("bench", artifact, "--model", MODEL, "--peers", "onnxruntime"),
        *("--calibration", CALIBRATION, "--runs", "20", "--json"),
    )
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert list(found["runners"]) == ["qcompiler", "onnxruntime", "onnxruntime-int8"]
    for figures in found["runners"].values():
        assert {"median_ms", "min_ms", "runs", "threads", "ratio", "spread"} <= set(figures)
        assert figures["min_ms"] <= figures["median_ms"]
        assert figures["runs"] >= 20
        assert figures["threads"] == 1
        assert figures["peak_memory_mb"] > 20
    assert found["runners"]["qcompiler"]["ratio"] == 1
    assert found["breakdown"] is None


def test_bench_shows_layers_and_draws_them(
    capsys: pytest.CaptureFixture[str], artifact: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    chart = tmp_path / "chart.svg"
    base = ("bench", artifact, "--runs", "5", "--layers", "3")
    status, out, err = run(capsys, *base, "--chart", chart)
    assert status == 0
    assert "the 3 slowest of" in out
    assert "measured with" in out
    assert f"wrote {chart}" in err
    assert "of the time" in chart.read_text()
    status, out, _ = run(capsys, *base, "--json")
    parts = json.loads(out)["breakdown"]
    assert {"name", "kernel", "ms", "gmacs", "share_of_peak"} <= set(parts["layers"][0])
    assert any(layer["macs"] for layer in parts["layers"])  # from the report beside the artifact
    status, _, err = run(capsys, "bench", artifact, "--chart", tmp_path / "chart.gif")
    assert status == 2
    assert "must end in .png" in err


def test_bench_alone_and_its_mistakes(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    status, out, _ = run(capsys, "bench", artifact, "--runs", "5")
    assert status == 0
    assert "qcompiler" in out
    status, _, err = run(capsys, "bench", artifact, "--peers", "onnxruntime")
    assert status == 2
    assert "--peers needs --model" in err
    status, _, err = run(capsys, "bench", artifact, "--model", MODEL, "--peers", "glow")
    assert status == 2
    assert "unknown peer 'glow'" in err
    status, _, err = run(capsys, "bench", artifact, "--threads", str(10_000))
    assert status == 2
    assert "10000 threads wanted" in err


def test_export_runs_in_onnxruntime_with_the_same_accuracy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = run(
        capsys, "export", MODEL, "-o", "q.onnx", "--calibration", CALIBRATION, "--json"
    )
    assert (status, err) == (0, "")
    assert json.loads(out)["quantize_nodes"] > 0
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession("q.onnx", options)
    operators = {node.op_type for node in onnx.load("q.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    with np.load(EVALUATION) as samples:
        right = sum(
            session.run(None, {"input": image[None]})[0].argmax() == label
            for image, label in zip(samples["input"], samples["label"], strict=True)
        )
        assert right / len(samples["label"]) > 0.95


def test_the_same_inputs_give_the_same_bytes(
    capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    status, _, err = run(capsys, "compile", MODEL, "-o", "again.qcm", "--calibration", CALIBRATION)
    assert status == 0, err
    assert Path("again.qcm").read_bytes() == artifact.read_bytes()
