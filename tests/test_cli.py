# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The command line without a compilation: arguments, messages, exit statuses, reproducers.

Whole commands on real models are in test_cli_e2e.py.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from qcompiler.cli import main, options, shell
from qcompiler.cli.check import accuracy_verdicts
from qcompiler.cli.compile import budget_problems
from qcompiler.cli.junit import Verdict, to_junit
from qcompiler.cli.machine import required_pins
from qcompiler.errors import (
    CodegenError,
    DataError,
    InterruptedCompileError,
    PassError,
    QCompilerError,
    UsageError,
)

MODEL = Path(__file__).resolve().parent.parent / "models" / "digits_cnn" / "model.onnx"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("QCOMPILER_CRASH_DIR", raising=False)


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- usage ---------------------------------------------------------------------------------------


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--version")
    assert (status, out) == (0, f"qcompile {importlib.metadata.version('qcompiler')}\n")
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in ("compile", "run", "check", "bench", "export", "inspect", "targets", "doctor"):
        assert f" {command} " in out


@pytest.mark.parametrize(
    "argv",
    [
        ["frobnicate"],
        ["compile"],
        ["compile", "m.onnx"],
        ["compile", "m.onnx", "-o", "x.qcm", "--seed", "many"],
        ["compile", "m.onnx", "-o", "x.qcm", "--unknown-option"],
        ["run", "a.qcm", "--inputs", "i.npz", "-o", "o.npz", "--threads", "0"],
    ],
)
def test_wrong_usage_is_status_2_without_a_traceback(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    assert err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--evaluate", "e.npz"], "--evaluate needs --metric"),
        (["--metric", "top1"], "--metric needs --evaluate"),
        (["--max-drop", "1"], "--max-drop needs --evaluate"),
        (
            ["--evaluate", "e.npz", "--metric", "top1", "--max-drop", "-1"],
            "--max-drop -1.0: expected a number that is not negative",
        ),
        (
            ["--evaluate", "e.npz", "--metric", "top1", "--max-drop", "nan"],
            "--max-drop nan: expected a number that is not negative",
        ),
        (["--max-slice-drop", "1"], "--max-slice-drop needs --evaluate"),
        (
            ["--evaluate", "e.npz", "--metric", "top1", "--max-slice-drop", "inf"],
            "--max-slice-drop inf: expected a number that is not negative",
        ),
        (["--locked", "none.qcm"], "lock none.qcm does not exist"),
        (["--max-latency", "0"], "--max-latency 0.0: expected a number above 0"),
        (["--max-size", "inf"], "--max-size inf: expected a number above 0"),
        (["--input-shape", "x=1x3"], "--input-shape 'x=1x3': expected NAME:1x3x224x224"),
        (["--input-shape", "x:1x0"], "every extent must be at least 1"),
        (["--input-shape", "x:1", "--input-shape", "x:2"], "'x' is given twice"),
        (["--freeze", "x"], "--freeze 'x': expected NAME=VALUE"),
        (["--freeze", "x=one"], "--freeze 'x=one': expected a number, true, false, a list"),
        (["--freeze", 'x="text"'], "expected numbers, got <U4"),
        (["--freeze", "x=1", "--freeze", "x=2"], "'x' is given twice"),
        (["--freeze", "x=missing.npy"], "No such file or directory: 'missing.npy'"),
    ],
)
def test_options_that_make_no_sense(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    status, out, err = run(capsys, "compile", MODEL, "-o", "x.qcm", *argv)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_shapes_and_constants_are_parsed(tmp_path: Path) -> None:
    assert options.parse_shapes([]) is None
    assert options.parse_shapes(["a:1x3x224x224", "ns:b:7"]) == {
        "a": (1, 3, 224, 224),
        "ns:b": (7,),
    }
    np.save(tmp_path / "state.npy", np.arange(3))
    constants = options.parse_constants(
        ["a=1.5", "b=[[1, 2], [3, 4]]", "c=true", f"d={tmp_path}/state.npy"]
    )
    assert constants is not None
    assert constants["a"] == 1.5
    assert constants["b"].tolist() == [[1, 2], [3, 4]]
    assert constants["c"].dtype == np.bool_
    assert constants["d"].tolist() == [0, 1, 2]
    assert options.parse_constants([]) is None


# --- input and output paths ----------------------------------------------------------------------


def test_a_model_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "compile", "nowhere.onnx", "-o", "x.qcm")
    assert (status, err) == (2, "error: model nowhere.onnx does not exist\n")


def test_a_folder_and_an_empty_file_as_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = run(capsys, "compile", tmp_path, "-o", "x.qcm")
    assert (status, err) == (2, f"error: model {tmp_path} is a folder, expected a file\n")
    (tmp_path / "empty.onnx").touch()
    status, _, err = run(capsys, "compile", "empty.onnx", "-o", "x.qcm")
    assert (status, err) == (2, "error: model empty.onnx is empty\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_model_that_may_not_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"x")
    (tmp_path / "m.onnx").chmod(0)
    status, _, err = run(capsys, "compile", "m.onnx", "-o", "x.qcm")
    assert (status, err) == (2, "error: model m.onnx cannot be read: permission denied\n")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nowhere/x.qcm", "cannot write artifact nowhere/x.qcm: the folder nowhere does not exist"),
        (".", "cannot write artifact .: it is a folder"),
        ("/proc/x.qcm", "cannot write artifact /proc/x.qcm: "),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_first(
    capsys: pytest.CaptureFixture[str], output: str, message: str
) -> None:
    status, out, err = run(capsys, "compile", MODEL, "-o", output, "--target", "no-such-target")
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_writable_output_leaves_no_probe_behind(tmp_path: Path) -> None:
    assert shell.output_file(tmp_path / "x", "artifact") == tmp_path / "x"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "error: file f.qcm is empty"),
        (b"PK\x03\x04 and then nothing of the kind", "f.qcm"),
        (b"\x00\x01random", "f.qcm"),
    ],
)
def test_inspect_of_what_is_no_artifact(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "f.qcm").write_bytes(content)
    status, out, err = run(capsys, "inspect", "f.qcm")
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_inspect_of_another_kind_of_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "f.txt").write_text("text")
    status, _, err = run(capsys, "inspect", "f.txt")
    assert status == 2
    assert err == "error: f.txt is neither an artifact (.qcm) nor a model (.onnx)\n"


def test_inspect_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "inspect", MODEL, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert {o["name"] for o in found["operators"]} >= {"Conv", "Gemm"}
    assert found["problem"] is None
    assert found["inputs"] == [{"name": "input", "dtype": "float32", "shape": [1, 1, 8, 8]}]
    status, out, _ = run(capsys, "inspect", MODEL)
    assert status == 0
    assert "input   input: float32[1, 1, 8, 8]" in out
    assert "Conv" in out


def test_inspect_of_a_damaged_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(MODEL.read_bytes()[:5000])
    status, out, err = run(capsys, "inspect", "m.onnx")
    assert (status, out) == (2, "")
    assert "m.onnx" in err
    assert "Traceback" not in err


# --- how commands end ----------------------------------------------------------------------------


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `qcompile targets` end with an exception."""

    def use(error: BaseException) -> None:
        def raiser() -> tuple[str, ...]:
            raise error

        monkeypatch.setattr("qcompiler.registry.target_names", raiser)

    return use


def test_an_error_of_ours_is_one_message_with_its_hint(
    capsys: pytest.CaptureFixture[str], ending: Callable[[BaseException], None], tmp_path: Path
) -> None:
    ending(UsageError("[bold]no[/] such thing", hint="try [1, 2]"))
    status, out, err = run(capsys, "targets")
    assert (status, out) == (2, "")
    assert err == "error: [bold]no[/] such thing\nhint: try [1, 2]\n"
    assert list(tmp_path.iterdir()) == []


def test_an_error_with_json_is_a_document(
    capsys: pytest.CaptureFixture[str], ending: Callable[[BaseException], None]
) -> None:
    ending(QCompilerError("no", node="conv1", value="x", hint="h"))
    status, out, err = run(capsys, "targets", "--json")
    assert status == 2
    assert json.loads(out) == {
        "error": {
            "type": "QCompilerError",
            "message": "no",
            "hint": "h",
            "node": "conv1",
            "value": "x",
            "reproducer": None,
        },
        "exit_status": 2,
    }
    assert "error: no" in err


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero"),
        CodegenError("the linker refused it"),
        PassError("pass fuse failed", pass_spec="fuse", reproducer="/some/graph"),
        AssertionError(),
    ],
)
def test_a_defect_is_status_3_with_a_reproducer(
    capsys: pytest.CaptureFixture[str],
    ending: Callable[[BaseException], None],
    tmp_path: Path,
    error: BaseException,
) -> None:
    ending(error)
    status, out, err = run(capsys, "targets")
    assert (status, out) == (3, "")
    assert "Traceback" not in err
    assert "This is a defect of qcompiler" in err
    (folder,) = tmp_path.iterdir()
    assert str(folder) in err
    assert (folder / "command.txt").read_text() == "qcompile targets\n"
    trace = (folder / "traceback.txt").read_text()
    assert trace.startswith("Traceback")
    assert type(error).__name__ in trace
    about = json.loads((folder / "about.json").read_text())
    assert about["versions"]["apache-tvm"]
    assert about["pass"] == getattr(error, "pass_spec", None)


def test_the_reproducer_of_a_pass_is_part_of_it(
    capsys: pytest.CaptureFixture[str],
    ending: Callable[[BaseException], None],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    graph = tmp_path_factory.mktemp("pass")
    (graph / "graph.txt").write_text("the graph")
    ending(PassError("pass fuse failed", reproducer=str(graph), hint=f"look into {graph}"))
    status, _, err = run(capsys, "targets")
    assert status == 3
    assert "hint" not in err
    (folder,) = tmp_path.iterdir()
    assert (folder / "pass" / "graph.txt").read_text() == "the graph"


def test_a_reproducer_has_the_digests_of_the_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(file: Path) -> dict[str, Any]:
        raise RuntimeError("boom")

    monkeypatch.setattr("qcompiler.cli.inspect.describe_model", fail)
    monkeypatch.setenv("QCOMPILER_CRASH_DIR", str(tmp_path / "crashes"))
    (tmp_path / "a b.onnx").write_bytes(b"not a model")
    status, _, _ = run(capsys, "inspect", "a b.onnx")
    assert status == 3
    (folder,) = (tmp_path / "crashes").iterdir()
    assert (folder / "command.txt").read_text() == "qcompile inspect 'a b.onnx'\n"
    files = json.loads((folder / "about.json").read_text())["files"]
    digest = hashlib.sha256(b"not a model").hexdigest()
    assert files == {"a b.onnx": {"sha256": digest, "bytes": 11}}


def test_a_reproducer_goes_elsewhere_where_the_folder_cannot_be_written(
    capsys: pytest.CaptureFixture[str],
    ending: Callable[[BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    ending(RuntimeError("boom"))
    monkeypatch.setenv("QCOMPILER_CRASH_DIR", "/proc/no-such-folder")
    status, _, err = run(capsys, "targets")
    assert status == 3
    assert str(next(tmp_path.iterdir())) in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "interrupted\n"),
        (InterruptedCompileError("kept so far: x.qcm"), "interrupted: kept so far: x.qcm\n"),
    ],
)
def test_an_interrupt_is_status_130(
    capsys: pytest.CaptureFixture[str],
    ending: Callable[[BaseException], None],
    error: BaseException,
    message: str,
) -> None:
    ending(error)
    assert run(capsys, "targets") == (130, "", message)


def test_trouble_of_the_system_is_no_defect(
    capsys: pytest.CaptureFixture[str], ending: Callable[[BaseException], None], tmp_path: Path
) -> None:
    ending(OSError(28, "No space left on device", "/some/file"))
    assert run(capsys, "targets") == (2, "", "error: No space left on device: /some/file\n")
    ending(MemoryError())
    assert run(capsys, "targets") == (2, "", "error: out of memory\n")
    assert list(tmp_path.iterdir()) == []


# --- JSON ----------------------------------------------------------------------------------------


def test_json_values_are_plain() -> None:
    value = {1: np.float32(0.5), "a": (np.int64(3), Path("x")), "n": float("nan"), "b": True}
    assert shell.json_safe(value) == {"1": 0.5, "a": [3, "x"], "n": None, "b": True}


def test_with_json_nothing_else_reaches_standard_output() -> None:
    """Native code writes to descriptor 1 behind Python's back; that must not spoil the document."""
    code = (
        "import os, sys\n"
        "from qcompiler import registry\n"
        "real = registry.target_names\n"
        "def noisy():\n"
        "    print('from Python'); os.write(1, b'from C\\n'); return real()\n"
        "registry.target_names = noisy\n"
        "from qcompiler.cli import main\n"
        "sys.exit(main(['targets', '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["targets"]
    assert "from Python" in done.stderr
    assert "from C" in done.stderr


# --- targets, doctor -----------------------------------------------------------------------------


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


# --- budgets and verdicts ------------------------------------------------------------------------


def test_budget_problems_say_what_was_found_and_allowed() -> None:
    report = {
        "metric": {"drop": 1.5},
        "latency_ms": {"compiled": 2.0},
        "size_bytes": {"artifact": 3_000_000},
    }
    assert budget_problems(report, 2.0, 3.0, 4.0) == []
    assert budget_problems(report, None, None, None) == []
    assert budget_problems(report, 1.0, 1.5, 2.5) == [
        "the metric drops by 1.5, allowed are 1",
        "one call takes 2 ms, allowed are 1.5",
        "the artifact has 3.000 MB, allowed are 2.5",
    ]


def test_a_slice_that_lost_too_much_is_a_problem_of_the_budget() -> None:
    report: dict[str, Any] = {"size_bytes": {"artifact": 1}, "metric": FIGURES}
    assert budget_problems(report, None, None, None, 12.0) == []
    assert budget_problems(report, None, None, None, 11.5) == [
        "the metric drops by 12 on slice night (17 samples), allowed are 11.5"
    ]
    report["metric"] = {"worst_slice": None}
    assert budget_problems(report, None, None, None, 1.0) == [
        "the drop of no slice could be measured"
    ]


def test_what_could_not_be_measured_does_not_pass() -> None:
    report: dict[str, Any] = {"metric": None, "size_bytes": {"artifact": 1}}
    assert budget_problems(report, 1.0, 1.0, None) == [
        "the drop could not be measured",
        "the latency could not be measured on this machine",
    ]
    report["metric"] = {"drop": float("nan")}
    assert budget_problems(report, 1.0, None, None) == ["the metric drops by nan, allowed are 1"]


FIGURES: dict[str, Any] = {
    "name": "top1",
    "float": 0.9,
    "compiled": 0.88,
    "drop": 2.0,
    "samples": 100,
    "slices": [
        {"kind": "slice", "name": "day", "samples": 80, "float": 0.9, "compiled": 0.9,
         "drop": 0.0, "binds": True},
        {"kind": "slice", "name": "dusk", "samples": 3, "float": 1.0, "compiled": 0.0,
         "drop": 100.0, "binds": False},
        {"kind": "slice", "name": "night", "samples": 17, "float": 0.9, "compiled": 0.78,
         "drop": 12.0, "binds": True},
    ],
    "slice_minimum": 10,
}  # fmt: skip
FIGURES["worst_slice"] = FIGURES["slices"][2]


def test_the_verdict_on_slices_names_each_that_lost_too_much() -> None:
    accuracy, slices = accuracy_verdicts(FIGURES, 2.0, 5.0, 1.0)
    assert (accuracy.passed, accuracy.found, accuracy.limit) == (True, 2.0, 2.0)
    assert (slices.passed, slices.found, slices.limit) == (False, 12.0, 5.0)
    assert slices.message == ("worst of 2: slice night (17 samples), drop 12 points, allowed 5")
    assert slices.details == (
        "slice night: top1 0.78, float 0.9, drop 12 points, allowed 5, 17 samples",
        "1 groups of fewer than 10 samples do not bind",
    )
    assert accuracy_verdicts(FIGURES, None, 12.0, 1.0)[1].passed


def test_a_limit_on_slices_needs_slices() -> None:
    none = {**FIGURES, "slices": [], "worst_slice": None}
    with pytest.raises(DataError, match="--max-slice-drop: no groups in the evaluation samples"):
        accuracy_verdicts(none, None, 5.0, 1.0)
    small = {**FIGURES, "slices": FIGURES["slices"][1:2], "worst_slice": None}
    with pytest.raises(DataError, match="none of the 1 groups has 10 samples"):
        accuracy_verdicts(small, None, 5.0, 1.0)


JUNIT = {
    "testsuites": ({"tests", "failures", "errors", "time"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped", "time", "timestamp"},
        {"properties", "testcase"},
    ),
    "properties": (set(), {"property"}),
    "property": ({"name", "value"}, set()),
    "testcase": ({"classname", "name", "time"}, {"failure", "error", "system-out"}),
    "failure": ({"message", "type"}, set()),
    "error": ({"message", "type"}, set()),
    "system-out": (set(), set()),
}
"""Attributes and children of each element, as in Jenkins' schema junit-10.xsd."""


def check_junit(element: Any) -> None:
    attributes, children = JUNIT[element.tag]
    assert set(element.attrib) == attributes, element.tag
    for name in attributes & {"tests", "failures", "errors", "skipped"}:
        assert element.get(name).isdigit()
    for name in attributes & {"time"}:
        assert float(element.get(name)) >= 0
    for child in element:
        assert child.tag in children, f"{child.tag} in {element.tag}"
        check_junit(child)
    if element.tag == "testsuite":
        cases = element.findall("testcase")
        assert int(element.get("tests")) == len(cases)
        for name, tag in (("failures", "failure"), ("errors", "error")):
            assert int(element.get(name)) == sum(c.find(tag) is not None for c in cases)
        tags = [child.tag for child in element]
        assert tags == sorted(tags, key=("properties", "testcase").index)


def test_junit_has_the_structure_that_readers_expect() -> None:
    verdicts = [
        Verdict("accuracy", True, 0.1, 1.0, "top1 90 & more", 1.5),
        Verdict("slices", False, 5.0, 1.0, "worst of 2: slice \x00<a>", 0.0, ("slice \x1b",)),
        Verdict("latency", False, None, None, "", 0.25, problem="no room"),
    ]
    text = to_junit(verdicts, "net.qcm", {"target": "x86", "metric": None})
    root = ElementTree.fromstring(text)
    check_junit(root)
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    assert suite.get("time") == "1.750"
    accuracy, slices, latency = suite.findall("testcase")
    assert accuracy.findtext("system-out") == "top1 90 & more"
    failure = slices.find("failure")
    assert failure is not None
    assert failure.get("message") == "worst of 2: slice \ufffd<a>"
    assert failure.text == "worst of 2: slice \ufffd<a>\nslice \ufffd"
    error = latency.find("error")
    assert error is not None
    assert error.get("message") == "no room"
    assert {c.get("classname") for c in (accuracy, slices, latency)} == {"net.qcm"}


# --- progress ------------------------------------------------------------------------------------


def test_progress_is_silent_off_a_terminal_unless_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with shell.ProgressBars(None) as bars:
        bars("calibrate", 1, 2)
    assert capsys.readouterr() == ("", "")
    with shell.ProgressBars(True) as bars:
        for done in range(3):
            bars("calibrate", done, 2)
        bars("build", 0, 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "calibrate 0/2\ncalibrate 2/2\nbuild 0/1\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_result_that_cannot_be_printed_is_one_message() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qcompiler.cli", "targets", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == shell.BAD_INPUT
    assert done.stderr == "error: cannot print the result: No space left on device\n"
