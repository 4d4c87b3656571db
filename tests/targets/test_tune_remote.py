# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Tuning over TVM's RPC tracker, on loopback, with servers that die on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import qcompiler
from qcompiler.errors import TuningError, UsageError
from qcompiler.records import RecordFile
from qcompiler.tune_model import tune_model
from qcompiler.tuning import Tuning, tracker_address

pytestmark = pytest.mark.timed

pytest.importorskip("tornado", reason="TVM's tracker needs tornado ([tune])")
pytest.importorskip("psutil", reason="TVM's servers need psutil ([tune])")
pytest.importorskip("cloudpickle", reason="TVM's servers need cloudpickle ([tune])")

DIGITS = Path(__file__).parents[2] / "models" / "digits_cnn"
TARGET = "x86-64"
KEY = "board"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, so that its children die with it."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Farm:
    """A tracker and servers that registered with it."""

    def __init__(self, port: int, servers: list[subprocess.Popen[bytes]]) -> None:
        self.port = port
        self.servers = servers

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def summary(self) -> int:
        from tvm import rpc

        return len(rpc.connect_tracker("127.0.0.1", self.port).summary()["server_info"])


@contextlib.contextmanager
def farm(servers: int) -> Iterator[Farm]:
    port = free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            started(
                "tvm.exec.rpc_tracker",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--port-end",
                str(port + 1),
                "--silent",
            )
        )
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert time.monotonic() < deadline, "the tracker did not start"
            time.sleep(0.1)
        running = []
        for _ in range(servers):
            first = free_port()
            running.append(
                stack.enter_context(
                    started(
                        "tvm.exec.rpc_server",
                        "--host",
                        "127.0.0.1",
                        "--port",
                        str(first),
                        "--port-end",
                        str(first + 50),
                        "--key",
                        KEY,
                        "--tracker",
                        f"127.0.0.1:{port}",
                        "--silent",
                    )
                )
            )
        made = Farm(port, running)
        while made.summary() < servers:
            assert time.monotonic() < deadline, "the servers did not register"
            time.sleep(0.2)
        yield made


def tune(tuning: Tuning, on_trial: object = None) -> qcompiler.tuning.TuningOutcome:
    def progress(label: str, done: int, total: int) -> None:
        if label.startswith("tune") and callable(on_trial):
            on_trial(done)

    return tune_model(
        DIGITS / "model.onnx",
        tuning,
        target=TARGET,
        calibration=DIGITS / "calib.npz",
        progress=progress,
    )


def test_a_server_killed_half_way_costs_nothing(tmp_path: Path) -> None:
    records = tmp_path / "r.jsonl"
    killed: list[int] = []
    with farm(2) as devices:

        def on_trial(done: int) -> None:
            if done >= 6 and not killed:
                busy = max(devices.servers, key=cpu_seconds)  # the one that serves us
                kill(busy)
                killed.append(done)

        outcome = tune(
            Tuning(records=records, trials=14, tracker=devices.address, key=KEY), on_trial
        )
    assert killed
    assert outcome.machine == f"rpc {KEY}"
    found = list(RecordFile(records, TARGET).read())
    trials = [r for r in found if r.stage == "trial"]
    assert len(trials) >= 14
    assert {r.status for r in trials} == {"ok"}, [r.note for r in trials]
    assert {r.machine for r in trials} == {f"rpc {KEY}"}
    # The records serve a compilation, and choose nothing that computes other numbers.
    samples = np.load(DIGITS / "eval.npz")
    name = next(n for n in samples.files if n != "label")
    plain, tuned = (
        qcompiler.compile(
            DIGITS / "model.onnx", target=TARGET, calibration=DIGITS / "calib.npz", tuning=t
        )
        for t in (None, Tuning(records=records))
    )
    a, b = plain(samples[name][:4]), tuned(samples[name][:4])
    assert all(np.array_equal(a[k], b[k]) for k in a)


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    import psutil

    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    return float(sum(sum(p.cpu_times()[:2]) for p in family))


def test_all_servers_gone(tmp_path: Path) -> None:
    records = tmp_path / "r.jsonl"
    with farm(1) as devices:

        def on_trial(done: int) -> None:
            if done >= 4:
                kill(devices.servers[0])

        with pytest.raises(TuningError, match=r"no device to measure on|does not answer"):
            tune(Tuning(records=records, trials=40, tracker=devices.address, key=KEY), on_trial)
        while devices.summary():
            time.sleep(0.1)
        with pytest.raises(TuningError, match=r"no device of key 'other'; its keys: none"):
            tune(Tuning(records=records, trials=4, tracker=devices.address, key="other"))
    assert len(RecordFile(records, TARGET).read()) >= 4  # what was measured is kept


def test_no_tracker(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(TuningError, match=f"no tracker answers at {address}"):
        tune(Tuning(records=tmp_path / "r.jsonl", trials=4, tracker=address, key=KEY))


@pytest.mark.parametrize("text", ["board", "board:", ":9190", "board:x", "board:70000", "b:0"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="the tracker's address is HOST:PORT"):
        Tuning(seconds=1, tracker=text, key=KEY)


def test_addresses() -> None:
    assert tracker_address("board.lan:9190") == ("board.lan", 9190)
    assert tracker_address("[::1]:9190") == ("::1", 9190)
    with pytest.raises(UsageError, match="go together"):
        Tuning(seconds=1, tracker="board:9190")
