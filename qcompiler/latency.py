# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The latency table: what every kernel takes on the target, per precision, and every conversion.

The model is built once per precision, everything in it at that precision; then the builds run in
turn, in rounds, with each kernel call timed where it runs, between its neighbours. A kernel is
known by the digest of its code, so equal kernels are measured together, and what the records hold
already is not measured again. Conversions between float and integers are timed in a model of
nothing else.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from qcompiler import benchmark
from qcompiler.artifact import check_runnable
from qcompiler.cpu import default_threads, host_cpu
from qcompiler.document import Document
from qcompiler.errors import UnsupportedByTargetError, UsageError
from qcompiler.passmanager import ProgressFn, no_progress
from qcompiler.records import Record, RecordFile, Records, WorkloadKey, now
from qcompiler.runtime import CompiledModel
from qcompiler.targets.base import Built

__all__ = [
    "KernelTime",
    "LatencyTable",
    "Measured",
    "ModelTimes",
    "RegionTime",
    "measure_models",
    "runs_here",
]

FORMAT = 1
"""Version of the JSON form."""

_ROUNDS = 5
_RUNS = 3
_WARMUP = 1
_BLOCK = 4
_ENOUGH = 12.0
"""Seconds of measuring after which no further round begins."""
_MOST_NOISE = 0.2
_LEAST = 2
"""Rounds that are measured in any case."""


@dataclass(frozen=True, slots=True)
class KernelTime:
    """Measured time of one kernel.

    Attributes:
        seconds: Of one call.
        noise: Share by which a repeated measurement differs.
    """

    seconds: float
    noise: float = 0.0


@dataclass(frozen=True, slots=True)
class RegionTime:
    """One fused region of a built model.

    Attributes:
        name: Of the region.
        ops: Its operators, after fusion.
        nodes: Nodes of the imported model that it computes.
        seconds: Of its kernels together; None where the target cannot tell.
        noise: Share by which a repeated measurement differs.
        size: Bytes of its constants.
    """

    name: str
    ops: tuple[str, ...]
    nodes: tuple[str, ...]
    seconds: float | None
    noise: float
    size: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "name": self.name,
            "ops": list(self.ops),
            "nodes": list(self.nodes),
            "latency_us": None if self.seconds is None else self.seconds * 1e6,
            "noise": self.noise,
            "size_bytes": self.size,
        }

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> RegionTime:
        """Return what `to_json` wrote."""
        us = doc["latency_us"]
        return cls(
            str(doc["name"]),
            tuple(map(str, doc["ops"])),
            tuple(map(str, doc["nodes"])),
            None if us is None else float(us) * 1e-6,
            float(doc["noise"]),
            int(doc["size_bytes"]),
        )


@dataclass(frozen=True, slots=True)
class ModelTimes:
    """A model built at one precision.

    Attributes:
        regions: In the order they run.
        calls: Number of kernel calls of one run.
        seconds: Median of one whole run; None where it was not measured.
        size: Bytes of the artifact's members.
    """

    regions: tuple[RegionTime, ...]
    calls: int
    seconds: float | None
    size: int

    @property
    def kernels(self) -> float:
        """Seconds of all kernels together."""
        return sum(r.seconds or 0.0 for r in self.regions)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "latency_ms": None if self.seconds is None else self.seconds * 1e3,
            "calls": self.calls,
            "size_bytes": self.size,
            "regions": [r.to_json() for r in self.regions],
        }

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> ModelTimes:
        """Return what `to_json` wrote."""
        ms = doc["latency_ms"]
        return cls(
            tuple(RegionTime.from_json(r) for r in doc["regions"]),
            int(doc["calls"]),
            None if ms is None else float(ms) * 1e-3,
            int(doc["size_bytes"]),
        )


@dataclass(frozen=True)
class LatencyTable(Document):
    """Measured latencies of a graph on a target.

    Attributes:
        graph: Digest of the FLOAT graph.
        target: Name of the target.
        machine: Processor that measured.
        threads: Threads of one run.
        models: Precision -> the model with everything at that precision.
        casts: "quantize 1x16x8x8" or "dequantize ..." -> time of one conversion.
        measured: Number of workloads that were measured for this table.
        reused: Number of workloads whose time the records held.
    """

    title: ClassVar[str] = "latency table"

    graph: str
    target: str
    machine: str
    threads: int
    models: Mapping[str, ModelTimes]
    casts: Mapping[str, KernelTime] = field(default_factory=dict)
    measured: int = 0
    reused: int = 0

    @property
    def overhead(self) -> float:
        """Seconds that a run takes per kernel call beyond the kernels: the virtual machine's."""
        found = sorted(
            (m.seconds - m.kernels) / m.calls
            for m in self.models.values()
            if m.seconds is not None and m.calls
        )
        # The lower quartile: what else runs on the machine only lengthens whole runs.
        return max(found[len(found) // 4], 0.0) if found else 0.0

    def regions(self, precision: str) -> list[dict[str, Any]]:
        """Return the regions of a model as reports have them; empty for one that was not built."""
        model = self.models.get(precision)
        return [] if model is None else [
            {"name": r.name, "nodes": list(r.nodes), "ops": list(r.ops),
             "latency_ms": None if r.seconds is None else r.seconds * 1e3}
            for r in model.regions
        ]  # fmt: skip

    def expected(self, precision: str) -> float:
        """Return the seconds of one run that the kernels of a model add up to."""
        model = self.models[precision]
        return model.kernels + model.calls * self.overhead

    def cast(self, kind: str, shape: Sequence[int]) -> float:
        """Return the seconds of a conversion; of an unmeasured size by the nearest one's rate."""
        wanted = int(np.prod(shape, dtype=np.int64))
        best: tuple[float, float] | None = None
        for key, held in self.casts.items():
            name, _, text = key.partition(" ")
            if name != kind:
                continue
            size = int(np.prod([int(d) for d in text.split("x") if d], dtype=np.int64))
            distance = abs(np.log(max(size, 1) / max(wanted, 1)))
            if best is None or distance < best[0]:
                best = (distance, held.seconds * max(wanted, 1) / max(size, 1))
        return 0.0 if best is None else best[1]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "format": FORMAT,
            "graph": self.graph,
            "target": self.target,
            "machine": self.machine,
            "threads": self.threads,
            "overhead_us": self.overhead * 1e6,
            "measured": self.measured,
            "reused": self.reused,
            "models": {p: m.to_json() for p, m in self.models.items()},
            "casts": {
                k: {"latency_us": t.seconds * 1e6, "noise": t.noise} for k, t in self.casts.items()
            },
        }

    @classmethod
    def from_json(cls, doc: object) -> LatencyTable:
        """Return the table that `to_json` wrote.

        Raises:
            UsageError: Not such a document, another format version, or damaged.
        """
        if not isinstance(doc, Mapping) or doc.get("format") != FORMAT:
            raise UsageError(f"not a latency table of format {FORMAT}")
        try:
            return cls(
                str(doc["graph"]),
                str(doc["target"]),
                str(doc["machine"]),
                int(doc["threads"]),
                {str(p): ModelTimes.from_json(m) for p, m in doc["models"].items()},
                {
                    str(k): KernelTime(float(t["latency_us"]) * 1e-6, float(t["noise"]))
                    for k, t in doc["casts"].items()
                },
                int(doc["measured"]),
                int(doc["reused"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"the latency table is damaged: {error!r}") from None


# ------------------------------------------------------------------------------------ measuring


@dataclass
class Measured:
    """Times of several built models.

    Attributes:
        models: Name -> times.
        measured: Number of workloads that were measured.
        reused: Number of workloads whose time the records held.
    """

    models: dict[str, ModelTimes]
    measured: int = 0
    reused: int = 0


def measure_models(
    built: Mapping[str, tuple[Built, CompiledModel]],
    *,
    file: RecordFile | None = None,
    fresh: bool = False,
    deadline: Callable[[], bool] = lambda: False,
    progress: ProgressFn = no_progress,
) -> Measured:
    """Return the time of every region of some built models.

    Args:
        built: Name -> what the backend built, and the model that runs it.
        file: Records that hold times of workloads, and get those measured now.
        fresh: Measure what the records hold as well.
        deadline: Whether time is up: no further round begins then.
        progress: Called per round.

    Raises:
        UnsupportedByTargetError: The target cannot run here, or cannot time its kernels, and the
            records lack some workload.
        TuningError: The records cannot be read or written.
    """
    machine, threads = host_cpu().name, default_threads()
    known = Records() if file is None or fresh else file.read(machine)
    keys = {name: _keys(b, m, threads) for name, (b, m) in built.items()}
    held: dict[str, Record] = {}
    for name, per_model in keys.items():
        here = runs_here(built[name][1])
        for workload, key in per_model.items():
            found = known.latency(key, anywhere=not here)
            if found is not None:
                held[workload] = found
    wanted = {w: k for per_model in keys.values() for w, k in per_model.items()}
    missing = {w: k for w, k in wanted.items() if w not in held}
    times = {w: KernelTime(r.seconds or 0.0, _noise(r)) for w, r in held.items()}
    if missing:
        runnable = {n: bm for n, bm in built.items() if set(keys[n]) & set(missing)}
        _check(runnable, missing)
        fresh_times = _rounds(runnable, deadline, progress)
        for workload, key in missing.items():
            took = fresh_times.get(workload)
            if took is None:
                continue
            times[workload] = took
            if file is not None:
                file.append(
                    Record(
                        key,
                        "latency",
                        {"threads": threads},
                        seconds=max(took.seconds, 1e-12),
                        ratio=1.0 + took.noise,
                        machine=machine,
                        time=now(),
                    )
                )
    models = {name: _times(b, m, times) for name, (b, m) in built.items()}
    return Measured(models, len(missing), len(held))


def runs_here(model: CompiledModel) -> bool:
    """Whether this machine can run a compiled model."""
    try:
        check_runnable(model.target, "the model")
    except UnsupportedByTargetError:
        return False
    return True


def _noise(record: Record) -> float:
    return max((record.ratio or 1.0) - 1.0, 0.0)


def _whole(built: Built, model: CompiledModel) -> str:
    """Return the workload of a whole run: the kernels in their order."""
    symbols = _symbols(built)
    parts = [built.workloads.get(s, "") for s in symbols]
    if not all(parts):  # a target that cannot tell: the library's bytes can
        parts = [hashlib.sha256(bytes(built.library or b"")).hexdigest(), *symbols]
        parts.append(str(model.artifact.sources.get("plan", "")))
    return "whole " + hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]


def _workloads(built: Built, model: CompiledModel) -> dict[str, str]:
    """Return kernel symbol -> its workload."""
    whole = _whole(built, model)
    return {s: built.workloads.get(s, f"{s} of {whole}") for s in _symbols(built)}


def _keys(built: Built, model: CompiledModel, threads: int) -> dict[str, WorkloadKey]:
    """Return the workloads of a model, each with the key of its record."""
    tvm = str(model.artifact.versions.get("tvm", ""))
    workloads = [*dict.fromkeys(_workloads(built, model).values()), _whole(built, model)]
    return {
        w: WorkloadKey(model.target.name, f"latency {w} threads={threads}", tvm) for w in workloads
    }


def _symbols(built: Built) -> list[str]:
    return [s for r in built.regions for s in r.symbols]


def _check(runnable: Mapping[str, tuple[Built, CompiledModel]], missing: Mapping[str, Any]) -> None:
    for built, model in runnable.values():
        hint = (
            f"{len(missing)} of its kernels have no measured latency: compile where the target "
            f"runs, with --records, and give those records here"
        )
        try:
            check_runnable(model.target, "the model")
        except UnsupportedByTargetError as error:
            raise UnsupportedByTargetError(
                f"latencies of target {model.target.name} cannot be measured here: {error.message}",
                hint=hint,
            ) from None
        if not _symbols(built):
            raise UnsupportedByTargetError(
                f"target {model.target.name} cannot tell what its kernels take",
                hint="automatic precision needs a target that compiles kernels, such as host",
            )


def _rounds(
    runnable: Mapping[str, tuple[Built, CompiledModel]],
    deadline: Callable[[], bool],
    progress: ProgressFn,
) -> dict[str, KernelTime]:
    """Measure all models in turn, several rounds."""
    inputs = {name: model.timed_inputs() for name, (_, model) in runnable.items()}
    calls: dict[str, list[list[float]]] = {name: [] for name in runnable}
    whole: dict[str, list[float]] = {name: [] for name in runnable}
    count = {
        name: benchmark.enough_runs(lambda m=model, x=inputs[name]: m(x), _BLOCK)  # type: ignore[misc]
        for name, (_, model) in runnable.items()
    }
    started = time.perf_counter()
    for index in range(_ROUNDS):
        late = deadline() or time.perf_counter() - started > _ENOUGH
        if index >= _LEAST and late:
            break
        for name, (_, model) in runnable.items():
            profile = model.profile(inputs[name], runs=max(_RUNS, count[name] // 2))
            calls[name].append([seconds for _, seconds in profile])
            block = benchmark.block(
                lambda model=model, x=inputs[name]: model(x),  # type: ignore[misc]
                runs=count[name],
                warmup=_WARMUP,
            )
            whole[name].append(min(block))  # as `profile` takes the least of its runs
        progress("measure", index + 1, _ROUNDS)
    samples: dict[str, list[list[float]]] = {}
    found: dict[str, KernelTime] = {}
    for name, (built, model) in runnable.items():
        workloads = _workloads(built, model)
        for i, symbol in enumerate(_symbols(built)):
            samples.setdefault(workloads[symbol], []).append(
                [r[i] for r in calls[name] if i < len(r)]
            )
        found[_whole(built, model)] = _summary([whole[name]])
    found.update({w: _summary(s) for w, s in samples.items()})
    return found


def _summary(samples: Sequence[Sequence[float]]) -> KernelTime:
    """Return the mean over the places of a kernel of each one's least over the rounds.

    The least is what the kernel takes; whatever else ran on the machine only adds to it.
    """
    least = [min(s) for s in samples if s]
    if not least:
        return KernelTime(0.0)
    spreads = []
    for s in samples:
        if len(s) > 1:
            first, second = sorted(s)[:2]  # how well the least repeats
            spreads.append((second - first) / max(first, 1e-12))
    noise = statistics.fmean(spreads) / len(samples) ** 0.5 if spreads else 0.0
    return KernelTime(statistics.fmean(least), min(noise, _MOST_NOISE))


def _times(built: Built, model: CompiledModel, times: Mapping[str, KernelTime]) -> ModelTimes:
    """Put the times of the kernels together to those of regions."""
    sizes: dict[str, int] = {}
    for name, array in zip(built.parameter_names, built.parameters, strict=True):
        owner = name.rpartition(".")[0] or name
        sizes[owner] = sizes.get(owner, 0) + array.nbytes
    workloads = _workloads(built, model)
    regions = []
    for r in built.regions:
        found = [times.get(workloads[s], KernelTime(0.0)) for s in r.symbols]
        total = sum(t.seconds for t in found)
        noise = sum(t.noise * t.seconds for t in found) / total if total else 0.0
        regions.append(
            RegionTime(
                r.name, r.ops, r.nodes, total if r.symbols else None, noise, sizes.get(r.name, 0)
            )
        )
    whole = times.get(_whole(built, model))
    size = sum(len(m) for m in model.artifact.members().values())
    return ModelTimes(tuple(regions), len(_symbols(built)), whole.seconds if whole else None, size)
