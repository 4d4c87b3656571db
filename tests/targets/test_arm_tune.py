# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Tuning for ARM over TVM's RPC, on loopback: the boards are servers in C++ under emulation."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import emulation
import numpy as np
import pytest
import tvm
from by_path import imported

from qcompiler.cli import main as command_line
from qcompiler.driver import build_graph, quantize_model
from qcompiler.interpreter import run as interpret
from qcompiler.records import RecordFile
from qcompiler.registry import get_target
from qcompiler.targets.isa import isa_named, tvm_target, with_processor
from qcompiler.targets.kernels.gemm import (
    Epilogue,
    GemmValues,
    MatmulWorkload,
    default_params,
    pack_matmul,
)
from qcompiler.targets.tune_worker import SYMBOL, build
from qcompiler.tune_model import tune_model
from qcompiler.tuning import Tuning

pytest.importorskip("tornado", reason="TVM's tracker needs tornado ([tune])")
pytest.importorskip("psutil", reason="TVM's tracker needs psutil ([tune])")

HERE = Path(__file__).resolve().parent
DIGITS = HERE.parents[1] / "models" / "digits_cnn"
KEY = "board"
TARGET = "arm-dotprod:neoverse-n1"
emulated = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "runs")


remote = imported("test_tune_remote", HERE / "test_tune_remote.py")


@contextlib.contextmanager
def boards(count: int) -> Iterator[object]:
    """A tracker, and servers on emulated processors that registered with it."""
    rig = emulation.rig()
    program = emulation.compiled_program(emulation.ROOT / "examples/cpp/rpc_server.cpp", rig.site)
    with remote.farm(0) as farm, contextlib.ExitStack() as stack:
        for _ in range(count):
            command = rig.command(
                "arm-dotprod", program, "--tracker", farm.address, "--key", KEY,
                "--port", str(remote.free_port()),
            )  # fmt: skip
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.callback(remote.kill, process)
            farm.servers.append(process)
        deadline = time.monotonic() + 120
        while farm.summary() < count:
            assert time.monotonic() < deadline, "the servers did not register"
            time.sleep(0.5)
        yield farm


def test_the_tuner_builds_for_the_named_processor(tmp_path: Path) -> None:
    """Not for the row's own: the schedule of its instructions is another one."""
    seen = []
    compile_native = tvm.compile
    row = with_processor(isa_named("arm-dotprod"), "neoverse-n1")
    workload = MatmulWorkload((8, 32), (32, 16), Epilogue("int32"), a_dtype="int8")
    params = default_params(workload, row)
    packed = pack_matmul(workload, row, params, np.ones((32, 16), np.int8), GemmValues())

    def spy(module: object, target: object = None) -> object:
        seen.append(str(target))
        return compile_native(module, target=target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tvm, "compile", spy)
        path = str(tmp_path / "k.so")
        build("matmul", workload, (row.name, row.mcpu), params, packed.facts, packed.shapes, path)
    assert seen == [str(tvm_target(row))]
    assert re.search(r"neoverse-n1", seen[0])
    assert SYMBOL.encode() in Path(path).read_bytes()


@emulated
def test_the_server_says_how_it_is_called() -> None:
    rig = emulation.rig()
    program = emulation.compiled_program(emulation.ROOT / "examples/cpp/rpc_server.cpp", rig.site)
    command = rig.command("arm-dotprod", program, "--tracker", "nowhere")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "usage: rpc_server --tracker HOST:PORT --key KEY" in done.stderr


@pytest.mark.slow
@emulated
def test_a_board_killed_half_way_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, with two boards, one of which dies while it serves."""
    records = tmp_path / "records.jsonl"
    killed = []

    def on_trial(done: int) -> None:
        if done >= 3 and not killed:
            busy = max(farm.servers, key=remote.cpu_seconds)
            remote.kill(busy)
            killed.append(done)

    with boards(2) as farm:

        def progress(label: str, done: int, total: int) -> None:
            if label.startswith("tune"):
                on_trial(done)

        outcome = tune_model(
            DIGITS / "model.onnx",
            Tuning(records=records, trials=8, tracker=farm.address, key=KEY),
            target=TARGET,
            calibration=DIGITS / "calib.npz",
            progress=progress,
        )
        assert killed
        assert outcome.machine == f"rpc {KEY}"
        # What is measured already is not measured again; the board that is left serves the rest.
        status = command_line(
            ["tune", str(DIGITS / "model.onnx"), "--target", TARGET, "--tracker", farm.address,
             "--key", KEY, "--records", str(records), "--trials", "10",
             "--calibration", str(DIGITS / "calib.npz")]
        )  # fmt: skip
        assert status == 0, capsys.readouterr().err
    trials = [r for r in RecordFile(records, "arm-dotprod").read() if r.stage == "trial"]
    assert len(trials) >= 10
    assert {r.status for r in trials} == {"ok"}, [r.note for r in trials]
    assert {r.machine for r in trials} == {f"rpc {KEY}"}
    # The records serve a compilation, whose code computes what the interpreter does.
    calibration = dict(np.load(DIGITS / "calib.npz"))
    result = quantize_model(DIGITS / "model.onnx", calibration=calibration, precision="w8a8")
    built = build_graph(result.graph, get_target(TARGET), tuning=Tuning(records=records))
    assert built.library is not None
    (name,) = (v.name for v in built.graph.inputs)
    x = np.load(DIGITS / "eval.npz")[name][:1]
    with emulation.executor("arm-dotprod", built.library, built.parameters) as execute:
        (found,) = execute.run([x])
    (want,) = interpret(built.graph, {name: x}).values()
    np.testing.assert_array_equal(found, want)


@pytest.mark.slow
@emulated
def test_kernels_in_half_precision_are_tuned(tmp_path: Path) -> None:
    """Other tilings of them count as right: as near the interpreter as sums of halves are."""
    records = tmp_path / "records.jsonl"
    with boards(1) as farm:
        tuning = Tuning(records=records, trials=6, tracker=farm.address, key=KEY)
        outcome = tune_model(DIGITS / "model.onnx", tuning, target=TARGET, precision="fp16")
    assert outcome.tasks
    assert all("float16" in task.workload for task in outcome.tasks)
    trials = [r for r in RecordFile(records, "arm-dotprod").read() if r.stage == "trial"]
    assert len(trials) == 6
    assert {r.status for r in trials} == {"ok"}, [r.note for r in trials]
