# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Tuning records: what the tuner measured, as one text file per target that git can diff and merge.

A line is one JSON object with sorted keys, and lines are only ever appended, each by a single
write. So two writers never mix their lines, a kill leaves at most one torn line at the end (which
the next writer closes), and a merge is the union of both sides' lines in any order (with
`*.jsonl merge=union` in .gitattributes, without conflicts).

A *trial* is one candidate measured beside the untuned default. A *choice* closes the search for one
workload: the candidate that beat the default by more than noise, or the default itself. Only
choices decide how a model is compiled. A *latency* is the time of a kernel inside a running model,
known by a digest of its code; `qcompile compile --precision auto` reads and writes them.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from qcompiler.errors import TuningError
from qcompiler.tuning import TaskOutcome, Tuning, TuningOutcome

__all__ = [
    "GENERATOR_VERSION",
    "Record",
    "RecordFile",
    "Records",
    "Status",
    "WorkloadKey",
    "merge",
    "stable_text",
]

GENERATOR_VERSION = 7
"""Raised whenever a kernel generator changes what it emits: older records no longer apply."""

Stage = Literal["trial", "choice", "latency"]
Status = Literal["ok", "build failed", "wrong result", "timeout", "crashed"]

_SUFFIX = ".jsonl"


def stable_text(value: object) -> str:
    """Return one text for equal workloads, in every process and version of Python.

    Dataclasses are written as `Name(field=value, ...)`, tuples as `[a, b]`; floats keep all their
    digits.

    Raises:
        TypeError: A value of a type that has no stable text.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        inner = ", ".join(f"{f.name}={stable_text(getattr(value, f.name))}" for f in fields)
        return f"{type(value).__name__}({inner})"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(stable_text, value))}]"
    if value is None or isinstance(value, (bool, int, float, str)):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no stable text: {value!r}")


@dataclass(frozen=True, slots=True, order=True)
class WorkloadKey:
    """What a record is about; records of another key never apply."""

    target: str
    """Name of the target."""
    workload: str
    """`stable_text` of the workload and of the facts about it that change the code."""
    tvm: str
    """Version of TVM."""
    generator: int = GENERATOR_VERSION


@dataclass(frozen=True, slots=True)
class Record:
    """One measured candidate, or the choice for a workload."""

    key: WorkloadKey
    stage: Stage
    params: Mapping[str, int | str]
    """Fields of the generator's parameter class."""
    status: Status = "ok"
    seconds: float | None = None
    """Median time of one call; None where nothing was measured."""
    ratio: float | None = None
    """Median of time over the default's time in the same interleaved rounds: below 1 is faster.
    Unlike seconds it can be compared between sessions."""
    machine: str = ""
    """Processor that measured."""
    time: int = 0
    """Seconds since 1970: of two choices the later one holds."""
    note: str = ""
    """Why there is no result, where the status is not ok."""

    @property
    def identity(self) -> tuple[object, ...]:
        """Records of equal identity describe the same thing; the latest one counts."""
        params = () if self.stage == "choice" else tuple(sorted(self.params.items()))
        return (self.key, self.stage, self.machine, params)

    def to_line(self) -> str:
        """Return the record as one line of JSON with sorted keys, without the line's end."""
        doc: dict[str, Any] = {
            "generator": self.key.generator,
            "machine": self.machine,
            "params": dict(self.params),
            "stage": self.stage,
            "status": self.status,
            "target": self.key.target,
            "time": self.time,
            "tvm": self.key.tvm,
            "workload": self.key.workload,
        }
        if self.seconds is not None:
            doc["seconds"] = float(f"{self.seconds:.6g}")
        if self.ratio is not None:
            doc["ratio"] = round(self.ratio, 4)
        if self.note:
            doc["note"] = self.note
        return json.dumps(doc, sort_keys=True, ensure_ascii=True, allow_nan=False)

    @staticmethod
    def from_line(line: str) -> Record:
        """Return the record that a line holds.

        Raises:
            ValueError: The line is no record; the message says what is wrong with it.
        """
        doc = json.loads(line)
        if not isinstance(doc, dict):
            raise ValueError(f"expected an object, got {type(doc).__name__}")  # noqa: TRY004
        params = _member(doc, "params", dict)
        if not all(isinstance(v, (int, str)) and not isinstance(v, bool) for v in params.values()):
            raise ValueError("params must map names to integers or text")
        stage, status = _member(doc, "stage", str), _member(doc, "status", str)
        if stage not in get_args(Stage):
            raise ValueError(f"unknown stage {stage!r}")
        if status not in get_args(Status):
            raise ValueError(f"unknown status {status!r}")
        key = WorkloadKey(
            _member(doc, "target", str),
            _member(doc, "workload", str),
            _member(doc, "tvm", str),
            _member(doc, "generator", int),
        )
        return Record(
            key,
            stage,
            params,
            status,
            _number(doc, "seconds"),
            _number(doc, "ratio"),
            _member(doc, "machine", str),
            _member(doc, "time", int),
            str(doc.get("note", "")),
        )


def _member(doc: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in doc:
        raise ValueError(f"{name} is missing")
    value = doc[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")  # noqa: TRY004
    return value


def _number(doc: Mapping[str, Any], name: str) -> float | None:
    value = doc.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")  # noqa: TRY004
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def merge(*sources: Iterable[Record]) -> list[Record]:
    """Return the union, one record per identity (the latest), in a stable order."""
    latest: dict[tuple[object, ...], Record] = {}
    for source in sources:
        for record in source:
            found = latest.get(record.identity)
            if found is None or (record.time, record.to_line()) >= (found.time, found.to_line()):
                latest[record.identity] = record
    return sorted(latest.values(), key=lambda r: (r.key, r.stage, r.time, r.to_line()))


@dataclass
class Records:
    """Records in memory, for look-ups.

    Attributes:
        records: Merged records.
        notes: What was skipped while reading, one sentence each.
        machine: Processor whose records are preferred; "" takes the latest of any.
    """

    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: str = ""

    def __post_init__(self) -> None:
        self._used: dict[WorkloadKey, Record] = {}
        self._by_key: dict[WorkloadKey, list[Record]] = {}
        for record in self.records:
            self._by_key.setdefault(record.key, []).append(record)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def of(self, key: WorkloadKey, stage: Stage) -> list[Record]:
        """Return the records of a key, those of this machine only for trials."""
        return [
            r
            for r in self._by_key.get(key, ())
            if r.stage == stage and (stage == "choice" or r.machine == self.machine)
        ]

    def best(self, key: WorkloadKey) -> Record | None:
        """Return the choice for a workload: this machine's latest, else anyone's latest."""
        choices = [r for r in self.of(key, "choice") if r.status == "ok"]
        found = max(choices, key=lambda r: (r.machine == self.machine, r.time), default=None)
        if found is not None:
            self._used[key] = found
        return found

    def latency(self, key: WorkloadKey, *, anywhere: bool = False) -> Record | None:
        """Return the latest measured latency of a kernel, of this machine if there is one.

        Args:
            key: Of the kernel's code.
            anywhere: Take another machine's where this one has none.
        """
        found = [
            r
            for r in self._by_key.get(key, ())
            if r.stage == "latency" and (anywhere or r.machine == self.machine)
        ]
        return max(found, key=lambda r: (r.machine == self.machine, r.time), default=None)

    def used_digest(self) -> str | None:
        """Return the sha256 of the parameters that `best` gave so far, or None where it gave none.

        Records of other models in the same file, and times of measuring, leave it as it is.
        """
        if not self._used:
            return None
        h = hashlib.sha256()
        for key, record in sorted(self._used.items()):
            h.update(json.dumps([dataclasses.astuple(key), sorted(record.params.items())]).encode())
        return h.hexdigest()

    def add(self, record: Record) -> None:
        """Add a record that was just made."""
        self.records.append(record)
        known = self._by_key.setdefault(record.key, [])
        known[:] = [r for r in known if r.identity != record.identity]
        known.append(record)


class RecordFile:
    """A file of records of one target."""

    @classmethod
    def to_tune(cls, tuning: Tuning, target: str) -> RecordFile:
        """Return the file that a search adds to.

        Raises:
            TuningError: None was named.
        """
        if tuning.records is None:
            raise TuningError("tuning needs a file for its records, got none")
        return cls(tuning.records, target)

    def __init__(self, path: str | os.PathLike[str], target: str) -> None:
        """Name the file; nothing is read or made yet.

        Args:
            path: A file, or a folder in which the file is named after the target.
            target: Name of the target whose records are read and written.
        """
        self.path = Path(path)
        if self.path.is_dir():
            self.path = self.path / f"{target}{_SUFFIX}"
        self.target = target

    def outcome(
        self, records: Records, tasks: Iterable[TaskOutcome], started: float
    ) -> TuningOutcome:
        """Return what a search left behind that began at `started` (`time.monotonic`)."""
        return TuningOutcome(
            target=self.target,
            machine=records.machine,
            records=str(self.path),
            tasks=tuple(tasks),
            seconds=time.monotonic() - started,
            notes=tuple(records.notes),
        )

    def read(self, machine: str = "") -> Records:
        """Return the merged records of the target; a file that does not exist holds none.

        Lines that are no records are skipped with a note, as are those of other targets.

        Raises:
            TuningError: The file cannot be read, or not one of its lines is a record.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return Records(machine=machine)
        except OSError as error:
            raise TuningError(
                f"cannot read tuning records {self.path}: {error.strerror}",
                hint="name a file that `qcompile tune` wrote, or a new one",
            ) from error
        records, notes, foreign = [], [], 0
        bad = 0
        lines = data.split(b"\n")
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            try:
                record = Record.from_line(raw.decode())
            except ValueError as error:  # not JSON, not UTF-8, or not a record
                torn = number == len(lines)  # every whole line ends with a line feed
                bad += not torn
                what = "is torn (a writer was killed)" if torn else f"is no record ({error})"
                notes.append(f"{self.path}, line {number}: {what}; skipped")
                continue
            if record.key.target == self.target:
                records.append(record)
            else:
                foreign += 1
        if bad and not records and not foreign:
            raise TuningError(
                f"{self.path} holds no tuning records: {notes[0].rpartition(';')[0]}",
                hint="name a file that `qcompile tune` wrote, or a new one",
            )
        if foreign:
            notes.append(
                f"{self.path}: {foreign} records of other targets than {self.target} are skipped"
            )
        return Records(merge(records), notes, machine)

    def append(self, record: Record) -> None:
        """Append a record durably: when this returns, no kill takes it away.

        Raises:
            TuningError: The file cannot be written.
        """
        line = record.to_line().encode() + b"\n"
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)  # between the look at the end and the write
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    line = b"\n" + line  # closes what a killed writer left
                if os.write(handle, line) != len(line):
                    raise TuningError(f"cannot write tuning records {self.path}: the disk is full")
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise TuningError(
                f"cannot write tuning records {self.path}: {error.strerror}",
                hint="name a file in a folder that exists and can be written",
            ) from error


def now() -> int:
    """Return the time that records carry."""
    return int(time.time())
