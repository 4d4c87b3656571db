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

import numpy as np
import pytest
from command_line import run

from qcompiler.cli import options, shell
from qcompiler.errors import (
    CodegenError,
    InterruptedCompileError,
    PassError,
    QCompilerError,
    UsageError,
)

pytestmark = pytest.mark.usefixtures("own_folder")

MODEL = Path(__file__).resolve().parent.parent / "models" / "digits_cnn" / "model.onnx"
COMMANDS = ("compile", "analyze", "run", "check", "bench", "tune", "export", "inspect", "targets",
            "doctor")  # fmt: skip


# --- usage ---------------------------------------------------------------------------------------


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--version")
    assert (status, out) == (0, f"qcompile {importlib.metadata.version('qcompiler')}\n")
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in COMMANDS:
        assert f" {command} " in out
    assert "Exit status: 0 done and every budget kept" in " ".join(out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_json(capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert "--json" in out


def test_wrong_usage_is_json_where_json_was_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for argv in (["compile", "m.onnx"], ["run", "a.qcm", "--unknown"], ["bench"], ["frob"]):
        status, out, err = run(capsys, *argv, "--json")
        assert status == 2
        found = json.loads(out)
        assert found["exit_status"] == 2
        first = found["error"]["message"].split()[0]
        assert first in err
    status, out, _ = run(capsys, "inspect", "missing.onnx", "--json")
    assert status == 2
    assert "does not exist" in json.loads(out)["error"]["message"]
    status, out, _ = run(capsys, "targets", "--json")
    assert status == 0
    assert json.loads(out)["targets"]


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


@pytest.mark.parametrize(
    "command", [("export", "-o", "q.onnx"), ("analyze",), ("tune", "--records", "r.jsonl")]
)
def test_a_range_of_sizes_is_refused_where_one_is_needed(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    name, *rest = command
    data = ("--calibration", MODEL.with_name("calib.npz"))
    status, _, err = run(
        capsys, name, MODEL, *rest, *data, "--input-shape", "input:1..4x1x8x8", "--no-progress"
    )
    assert status == 2, err
    assert "input 'input' is given the range 1 to 4: one size is needed here" in err


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
