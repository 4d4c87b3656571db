# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Tuning records: durable, mergeable, and never trusted blindly."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcompiler.errors import TuningError
from qcompiler.records import Record, RecordFile, Records, WorkloadKey, merge, stable_text

KEY = WorkloadKey("x86-avx2", "ConvWorkload(n=1)", "0.27.0")


def record(**changes: object) -> Record:
    plain = Record(KEY, "trial", {"mt": 4, "order": "n"}, "ok", 1e-3, 0.9, "cpu", 100)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Inner:
    x: tuple[int, ...]
    y: float


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str | None = None


def test_stable_text_spells_every_field() -> None:
    text = stable_text(Outer(Inner((1, 2), 0.1)))
    assert text == "Outer(inner=Inner(x=[1, 2], y=0.1), name=None)"
    assert stable_text(Outer(Inner((1, 2), 0.1 + 1e-18))) == text
    assert stable_text(Outer(Inner((1, 2), 0.10000000000000002))) != text
    with pytest.raises(TypeError, match="set has no stable text"):
        stable_text(Outer(Inner({1}, 0.0)))  # type: ignore[arg-type]


def test_a_record_survives_the_way_through_the_file(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "r.jsonl", "x86-avx2")
    late = record(status="timeout", seconds=None, ratio=None, params={"mt": 5}, note="took 10 s")
    written = [record(), record(stage="choice"), late]
    for one in written:
        file.append(one)
    assert sorted(r.to_line() for r in file.read()) == sorted(r.to_line() for r in written)
    for line in file.path.read_text().splitlines():
        keys = list(json.loads(line))
        assert keys == sorted(keys)


def test_a_folder_gets_one_file_per_target(tmp_path: Path) -> None:
    RecordFile(tmp_path, "x86-avx2").append(record())
    assert (tmp_path / "x86-avx2.jsonl").exists()
    assert not len(RecordFile(tmp_path, "x86-64").read())


def test_a_torn_last_line_is_skipped_and_closed_by_the_next_writer(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "r.jsonl", "x86-avx2")
    file.append(record())
    with file.path.open("a") as stream:
        stream.write(record(params={"mt": 9}).to_line()[:40])
    found = file.read()
    assert len(found) == 1
    assert "line 2: is torn" in found.notes[0]
    file.append(record(params={"mt": 7}))
    found = file.read()
    assert sorted(r.params["mt"] for r in found) == [4, 7]
    assert "line 2: is no record" in found.notes[0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "Expecting value"),
        ("[1]", "expected an object"),
        ('{"params": {}}', "stage is missing"),
        (record().to_line().replace('"ok"', '"fine"'), "unknown status 'fine'"),
        (record().to_line().replace('"trial"', '"guess"'), "unknown stage 'guess'"),
        (record().to_line().replace("0.001", "-1"), "seconds must be a positive number"),
        (record().to_line().replace('"mt": 4', '"mt": [4]'), "params must map"),
        (record().to_line().replace('"time": 100', '"time": "now"'), "time must be of type int"),
    ],
)
def test_a_corrupt_line_is_skipped_with_its_number(tmp_path: Path, line: str, says: str) -> None:
    file = RecordFile(tmp_path / "r.jsonl", "x86-avx2")
    file.append(record())
    file.path.write_text(f"{file.path.read_text()}{line}\n{record(params={'mt': 1}).to_line()}\n")
    found = file.read()
    assert len(found) == 2
    assert "line 2: is no record" in found.notes[0]
    assert says in found.notes[0]


def test_files_that_are_no_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x07\xff\xfe\nmore\n")
    with pytest.raises(TuningError, match=r"holds no tuning records: .*line 1"):
        RecordFile(path, "x86-avx2").read()
    with pytest.raises(TuningError, match="cannot read tuning records"):
        RecordFile(path / "below", "x86-avx2").read()
    with pytest.raises(TuningError, match=r"cannot write tuning records .*No such file"):
        RecordFile(tmp_path / "missing" / "r.jsonl", "x86-avx2").append(record())


def test_records_of_other_targets_are_skipped_with_a_note(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "r.jsonl", "x86-avx2")
    file.append(record(key=dataclasses.replace(KEY, target="cuda-sm80")))
    file.append(record())
    found = file.read()
    assert len(found) == 1
    assert "1 records of other targets" in found.notes[0]


def test_merging_keeps_the_latest_of_each_identity_whatever_the_order() -> None:
    old, new = record(seconds=2e-3), record(time=200)
    other, choice = record(machine="elsewhere"), record(stage="choice")
    later = record(stage="choice", params={"mt": 2}, time=300)
    merged = merge([old, new], [other, choice], [later, new])
    assert merged == merge([later], [new, choice, other, old])
    assert {(r.machine, r.stage): r for r in merged} == {
        ("cpu", "trial"): new,
        ("elsewhere", "trial"): other,
        ("cpu", "choice"): later,
    }


def test_best_is_the_latest_choice_of_this_machine_else_of_any() -> None:
    here = record(stage="choice", time=1)
    there = record(stage="choice", machine="other", params={"mt": 2}, time=2)
    failed = record(stage="choice", machine="third", status="crashed", time=3)
    records = Records([here, there, failed, record()], machine="cpu")
    assert records.best(KEY) is here
    assert Records([there, failed], machine="cpu").best(KEY) is there
    assert records.best(dataclasses.replace(KEY, tvm="0.28")) is None
    assert records.best(dataclasses.replace(KEY, generator=99)) is None
    newer = record(stage="choice", params={"mt": 3}, time=5)
    records.add(newer)
    assert records.best(KEY) is newer


_WRITER = """
import sys
from qcompiler.records import Record, RecordFile, WorkloadKey
file = RecordFile(sys.argv[1], "t")
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    file.append(Record(WorkloadKey("t", "w" * 3000, "v"), "trial", {"i": i, "who": sys.argv[2]}))
"""


def _writer(path: Path, name: str, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), name, str(count)], stdout=subprocess.PIPE
    )


def test_two_writers_never_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    writers = [_writer(path, name, 60) for name in ("a", "b")]
    assert [w.wait() for w in writers] == [0, 0]
    for w in writers:
        w.communicate()
    found = RecordFile(path, "t").read()
    assert not found.notes
    assert len(found) == 120


def test_a_killed_writer_loses_at_most_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    writer = _writer(path, "a", 1_000_000)
    assert writer.stdout is not None
    writer.stdout.readline()
    while not path.exists() or path.stat().st_size < 20_000:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    file = RecordFile(path, "t")
    before = file.read()
    assert sorted(int(r.params["i"]) for r in before) == list(range(len(before)))
    file.append(Record(WorkloadKey("t", "w", "v"), "choice", {"i": -1}))
    assert len(file.read()) == len(before) + 1
