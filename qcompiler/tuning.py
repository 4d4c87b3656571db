# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What a user says about tuning, and what tuning reports."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcompiler.errors import UsageError


@dataclass(frozen=True, slots=True)
class Tuning:
    """Tuning records to use, and how much measuring to add to them.

    With neither `seconds` nor `trials` nothing is measured: kernels use what the records say and
    the analytic defaults where they say nothing.

    Raises:
        UsageError: Neither records nor a limit, both limits, one out of range, or only one of
            `tracker` and `key`.
    """

    records: str | os.PathLike[str] | None = None
    """File of records, or a folder with one file per target. It need not exist before tuning."""
    seconds: float | None = None
    """Wall-clock limit of the search."""
    trials: int | None = None
    """Limit of measured candidates of the whole model; those in the records count."""
    tracker: str | None = None
    """Address of a tracker of TVM's RPC, "HOST:PORT": kernels are measured on the devices that it
    lends instead of on this machine."""
    key: str | None = None
    """Which of the tracker's devices."""

    def __post_init__(self) -> None:
        if (self.tracker is None) != (self.key is None):
            raise UsageError("a tracker and a key of its devices go together",
                             hint="--tracker HOST:PORT --key K")  # fmt: skip
        if self.tracker is not None:
            tracker_address(self.tracker)
        if self.seconds is not None and self.trials is not None:
            raise UsageError("tuning takes a limit in seconds or in trials, got both")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise UsageError(f"tuning seconds must be a number above 0, got {self.seconds!r}")
        if self.trials is not None and (isinstance(self.trials, bool) or self.trials < 1):
            raise UsageError(f"tuning trials must be a positive integer, got {self.trials!r}")
        if self.records is None and not self.searches:
            raise UsageError(
                "tuning was given neither records nor a limit",
                hint="Tuning(records='x86.jsonl'), or Tuning(seconds=60)",
            )

    @property
    def searches(self) -> bool:
        """Whether anything is to be measured."""
        return self.seconds is not None or self.trials is not None


def tracker_address(text: str) -> tuple[str, int]:
    """Return host and port of "HOST:PORT", where an IPv6 host is in brackets.

    Raises:
        UsageError: Not such a text.
    """
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(f"the tracker's address is HOST:PORT, got {text!r}")
    return host.strip("[]"), int(port)


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """One distinct kernel of a tuned model."""

    kernel: str
    workload: str
    nodes: tuple[str, ...]
    """Nodes that it computes."""
    default_ms: float | None
    """One call with the analytic parameters; None where they were not measured."""
    best_ms: float | None
    """One call with the chosen parameters."""
    ratio: float
    """Chosen over default, measured side by side."""
    params: Mapping[str, int | str]
    trials: int
    failures: tuple[str, ...] = ()
    """Candidates that did not build, hung, crashed, or gave a wrong result."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        return {
            "kernel": self.kernel,
            "workload": self.workload,
            "nodes": list(self.nodes),
            "default_ms": self.default_ms,
            "best_ms": self.best_ms,
            "ratio": self.ratio,
            "params": dict(self.params),
            "trials": self.trials,
            "failures": list(self.failures),
        }


@dataclass(frozen=True, slots=True)
class TuningOutcome:
    """What a run of the tuner left behind."""

    target: str
    machine: str
    """Processor that measured."""
    records: str
    """Path of the records."""
    tasks: tuple[TaskOutcome, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON.

        `latency_ms` sums the kernels that have parameters, each timed by itself on one thread, over
        one run of the model.
        """
        known = [t for t in self.tasks if t.default_ms is not None and t.best_ms is not None]
        default = sum((t.default_ms or 0.0) * len(t.nodes) for t in known)
        best = sum((t.best_ms or 0.0) * len(t.nodes) for t in known)
        return {
            "target": self.target,
            "machine": self.machine,
            "records": self.records,
            "latency_ms": {"default": default, "best": best},
            "trials": sum(t.trials for t in self.tasks),
            "unmeasured": len(self.tasks) - len(known),
            "tasks": [t.to_json() for t in self.tasks],
            "seconds": self.seconds,
            "notes": list(self.notes),
        }
