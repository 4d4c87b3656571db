# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The tuner: searches the kernels' parameters by measuring, and writes what it finds as records.

A task is one distinct workload of a model. Every candidate is built in worker processes, several at
once; then, with all of them idle, each is run, compared with the interpreter's result, and timed in
rounds interleaved with the untuned default, so that a slow moment of the machine hits both. Only
the ratio to the default counts. A task ends with a choice: the candidate that stays faster than the
default by more than noise in a longer comparison, else the default.

Every trial is recorded before the next one starts, so a killed run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.cpu import default_threads, missing_features
from qcompiler.errors import UnsupportedByTargetError
from qcompiler.ir import Graph
from qcompiler.passmanager import ProgressFn, no_progress
from qcompiler.records import Record, RecordFile, Records, Status, WorkloadKey, now
from qcompiler.targets.choice import (
    Tunable,
    default_choice,
    params_dict,
    params_from,
    workload_key,
)
from qcompiler.targets.cpu_lowering import CpuLowering
from qcompiler.targets.isa import Isa
from qcompiler.targets.tune_bench import Remote, TaskBench, machine_of
from qcompiler.targets.tune_process import WorkerError, WorkerPool
from qcompiler.tuning import TaskOutcome, Tuning, TuningOutcome, tracker_address

__all__ = ["Task", "collect_tasks", "neighbours", "tune_graph"]

_BUILD_SECONDS = 60.0
_FIRST = 6
"""Candidates measured in the order of the cost model, before the search goes by neighbours."""
_BATCH = 4
"""Candidates built at once."""
_FINALISTS = 3
_NOISE = 0.02
"""A winner must be faster than the default by more than this share of its time."""
_WINS = 0.75
"""And faster in this share of the rounds: by chance, once in 300 comparisons of 31 rounds."""
_FINAL_ROUNDS = 31
_EVEN = 0.9
"""A candidate must share its work among 2 to 16 threads this well, against the default."""

Params = Any
_Identity = tuple[tuple[str, "int | str"], ...]


def _identity(params: Params) -> _Identity:
    return tuple(sorted(params_dict(params).items()))


@dataclass(eq=False)
class Task:
    """One workload to tune.

    Attributes:
        key: Of its records.
        tunable: The first of the kernels with that key.
        default: The untuned parameters.
        nodes: Names of the nodes that such a kernel computes; each is one call of it.
        trials: What was measured, by parameters.
        choice: The latest choice, if there is one.
    """

    key: WorkloadKey
    tunable: Tunable
    default: Params
    nodes: list[str] = field(default_factory=list)
    trials: dict[_Identity, Record] = field(default_factory=dict)
    choice: Record | None = None
    measured: int = 0

    @property
    def base(self) -> float | None:
        """Seconds of one call with the default parameters, or None where they do not run."""
        found = self.trials.get(_identity(self.default))
        return None if found is None or found.status != "ok" else found.seconds

    @property
    def seconds(self) -> float:
        """Seconds of all calls in one run of the model, untuned; 0 where unknown."""
        return (self.base or 0.0) * len(self.nodes)

    @property
    def ratio(self) -> float:
        """The choice's time over the default's."""
        if self.choice is None or self.choice.ratio is None:
            return 1.0
        return self.choice.ratio

    def untried(self) -> list[Params]:
        """Candidates that were not measured, likely ones first."""
        return [
            p
            for p in self.tunable.space()
            if _identity(p) not in self.trials and shares_evenly(self.tunable, p, self.default)
        ]

    def ranked(self) -> list[tuple[float, Params]]:
        """Return (ratio, params) of the candidates that ran, the fastest first."""
        found = []
        for params in self.tunable.space():
            trial = self.trials.get(_identity(params))
            if trial is not None and trial.status == "ok" and trial.ratio is not None:
                found.append((trial.ratio, params))
        return sorted(found, key=lambda pair: pair[0])


def collect_tasks(graph: Graph, isa: Isa, target: str) -> list[Task]:
    """Return the distinct workloads with parameters of a graph shaped for the target."""
    tasks: dict[WorkloadKey, Task] = {}

    def collect(tunable: Tunable) -> tuple[Params, Any]:
        params, packed = default_choice(tunable)
        key = workload_key(tunable, target, packed)
        task = tasks.setdefault(key, Task(key, tunable, params))
        task.nodes.append(tunable.node.name)
        return params, packed

    lowering = CpuLowering(isa, collect)
    for node in graph.nodes:
        lowering(node)
    return list(tasks.values())


def shares_evenly(tunable: Tunable, params: Params, default: Params) -> bool:
    """Whether 2, 4, 8 and 16 threads share a candidate's tasks about as evenly as the default's.

    Trials run on one thread, where a kernel cut into too few tasks looks as good as any.
    """
    if tunable.kernel == "depthwise":
        return True  # its tasks hardly depend on the parameters
    from qcompiler.targets.kernels.plan import geometry_of, tile_plan

    geometry = geometry_of(tunable.workload, tunable.isa)

    def share(p: Params, threads: int) -> float:
        plan = tile_plan(geometry, p)
        tasks = plan.row_blocks * plan.col_blocks * geometry.batch
        return tasks / (-(-tasks // threads) * threads)

    return all(share(params, n) >= _EVEN * share(default, n) for n in (2, 4, 8, 16))


def neighbours(space: Sequence[Params], around: Params) -> list[Params]:
    """Return a space sorted by the distance from one of its members.

    The distance is counted in steps: along a field, between neighbouring values that occur.
    """
    fields = [f.name for f in dataclasses.fields(around)]
    ladders = {name: sorted({getattr(p, name) for p in space}, key=_order) for name in fields}

    def distance(p: Params) -> int:
        return sum(
            abs(ladder.index(getattr(p, name)) - ladder.index(getattr(around, name)))
            for name, ladder in ladders.items()
        )

    return sorted(space, key=distance)


def _order(value: int | str) -> tuple[bool, int, str]:
    number = isinstance(value, int)
    return (not number, int(value) if number else 0, str(value))


class _Session:
    """One run of the tuner."""

    def __init__(
        self,
        tasks: list[Task],
        file: RecordFile,
        records: Records,
        pool: WorkerPool,
        folder: Path,
        tuning: Tuning,
        seed: int,
        progress: ProgressFn,
        remote: Remote | None = None,
    ) -> None:
        self.tasks = tasks
        self.file = file
        self.records = records
        self.pool = pool
        self.folder = folder
        self.seed = seed
        self.progress = progress
        self.bench = TaskBench(remote)
        self.started = time.monotonic()
        self.seconds = tuning.seconds
        self.trials = tuning.trials
        self.built = 0
        self.current: tuple[Task, float] | None = None

    # Limits.

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def measured(self) -> int:
        """Trials, those of earlier runs included."""
        return sum(len(task.trials) for task in self.tasks)

    def over(self) -> bool:
        """Whether the budget is used up."""
        if self.trials is not None:
            return self.measured >= self.trials
        return self.seconds is not None and self.spent >= self.seconds

    def show(self) -> None:
        """Report the total latency: with the candidate just measured, and with the best."""
        best = sum(task.seconds * min(task.ratio, _best_ratio(task)) for task in self.tasks)
        now_total = best
        if self.current is not None:
            task, ratio = self.current
            now_total += task.seconds * (ratio - min(task.ratio, _best_ratio(task)))
        done, total = self.measured, self.trials or 0
        if self.trials is None and self.seconds is not None:
            done, total = int(min(self.spent, self.seconds)), int(self.seconds)
        label = f"tune: current {now_total * 1e3:.3f} ms, best {best * 1e3:.3f} ms"
        self.progress(label, min(done, total), total)

    # Trials.

    def record(
        self,
        task: Task,
        params: Params,
        status: Status,
        seconds: float | None = None,
        ratio: float | None = None,
        note: str = "",
        *,
        choice: bool = False,
    ) -> Record:
        """Write a record and remember it."""
        made = Record(
            task.key,
            "choice" if choice else "trial",
            params_dict(params),
            status,
            # As the file has them, so that a resumed run sees the same numbers.
            None if seconds is None else float(f"{seconds:.6g}"),
            None if ratio is None else round(ratio, 4),
            self.records.machine,
            now(),
            note,
        )
        self.file.append(made)
        self.records.add(made)
        if choice:
            task.choice = made
        else:
            task.trials[_identity(params)] = made
            task.measured += 1
        return made

    def build(self, wanted: Sequence[tuple[Task, Params]]) -> list[tuple[str, Any] | WorkerError]:
        """Build kernels in parallel; return (path, packed constants) or what went wrong of each."""
        jobs, packs, paths = [], [], []
        for task, params in wanted:
            packed = task.tunable.pack(params)
            self.built += 1
            path = str(self.folder / f"k{self.built}.so")
            t = task.tunable
            row = (t.isa.name, t.isa.mcpu)
            jobs.append((t.kernel, t.workload, row, params, packed.facts, packed.shapes, path))
            packs.append(packed.arrays)
            paths.append(path)
        errors = self.pool.map("build", jobs, _BUILD_SECONDS)
        return [
            (path, arrays) if error is None else error
            for path, arrays, error in zip(paths, packs, errors, strict=True)
        ]

    def baseline(self, tasks: Sequence[Task]) -> None:
        """Measure the defaults of tasks that have no record of theirs on this machine."""
        todo = [t for t in tasks if _identity(t.default) not in t.trials]
        while todo and not self.over():
            most = _BATCH if self.trials is None else min(_BATCH, self.trials - self.measured)
            group, todo = todo[:most], todo[most:]
            for task, built in zip(group, self.build([(t, t.default) for t in group]), strict=True):
                if isinstance(built, WorkerError):
                    self.record(task, task.default, _build_status(built), note=str(built))
                    continue
                try:
                    self.bench.open(task.tunable, self.seed)
                    right, rough = self.bench.load(0, *built)
                    if not right:
                        self.record(task, task.default, "wrong result")
                        continue
                    times = self.bench.compare([0], _rounds(rough))[0]
                except WorkerError as error:
                    self.record(task, task.default, _run_status(error), note=str(error))
                    continue
                self.record(task, task.default, "ok", float(np.median(times)), 1.0)
                self.show()

    def search(self, task: Task, until: float, most: int | None) -> None:
        """Measure candidates of a task until a time or number of trials, then choose."""
        rng = random.Random(f"{self.seed} {task.key.workload}")
        if self.open(task):
            count = 0
            while not self.over() and time.monotonic() < until and (most is None or count < most):
                limit = _BATCH if most is None else min(_BATCH, most - count)
                if self.trials is not None:
                    limit = min(limit, self.trials - self.measured)
                batch = self.next_batch(task, rng, limit)
                if not batch:
                    break
                for params, built in zip(
                    batch, self.build([(task, p) for p in batch]), strict=True
                ):
                    self.trial(task, params, built)
                    count += 1
                    self.show()
            self.choose(task)

    def open(self, task: Task) -> bool:
        """Load a task's default; whether that went well."""
        built = self.build([(task, task.default)])[0]
        if isinstance(built, WorkerError):
            return False
        try:
            self.bench.open(task.tunable, self.seed)
            right, _ = self.bench.load(0, *built)
        except WorkerError:
            return False
        return right

    def next_batch(self, task: Task, rng: random.Random, limit: int) -> list[Params]:
        """Return what to try next: by the cost model, then around the best, at last anything."""
        untried = task.untried()
        if len(task.trials) <= _FIRST or not untried:
            return untried[:limit]
        ranked = task.ranked()
        best = ranked[0][1] if ranked else task.default
        near = neighbours([*untried, best], best)
        near.remove(best)
        # One in four goes anywhere: the fastest may not be near what was tried.
        batch = near[: max(1, limit - limit // 4)]
        rest = [p for p in near if p not in batch]
        return batch + rng.sample(rest, min(len(rest), limit - len(batch)))

    def trial(self, task: Task, params: Params, built: tuple[str, Any] | WorkerError) -> None:
        """Check and time one candidate, and record what came of it."""
        if isinstance(built, WorkerError):
            self.record(task, params, _build_status(built), note=str(built))
            return
        try:
            right, rough = self.bench.load(1, *built)
            if not right:
                self.record(task, params, "wrong result", note="differs from the interpreter")
                return
            times = self.bench.compare([0, 1], _rounds(rough))
        except WorkerError as error:
            self.record(task, params, _run_status(error), note=str(error))
            return
        ratio = _median_ratio(times[1], times[0])
        self.record(task, params, "ok", float(np.median(times[1])), ratio)
        self.current = (task, ratio)

    def choose(self, task: Task) -> None:
        """Compare the fastest candidates with the default at length and record the choice."""
        known = _identity(task.default)
        finalists = [p for r, p in task.ranked() if r < 1 and _identity(p) != known][:_FINALISTS]
        before = None if task.choice is None else params_from(task.tunable, task.choice.params)
        if before is not None and _identity(before) != known and before not in finalists:
            finalists.append(before)
        if task.choice is not None and before is not None and not task.measured:
            return  # nothing new since
        loaded: dict[int, Params] = {}
        times: dict[int, list[float]] = {}
        builds = self.build([(task, p) for p in finalists])
        try:
            for number, (params, built) in enumerate(zip(finalists, builds, strict=True), 2):
                if not isinstance(built, WorkerError) and self.bench.load(number, *built)[0]:
                    loaded[number] = params
            times = self.bench.compare([0, *loaded], _FINAL_ROUNDS)
        except WorkerError:
            loaded = {}  # kernels that ran before: the machine's trouble; the default is safe
        base = np.array(times.get(0, [task.base or 1.0]))
        winner, ratio, seconds = task.default, 1.0, float(np.median(base))
        for number, params in loaded.items():
            found = np.array(times[number])
            median = _median_ratio(found, base)
            if median < min(ratio, 1 - _NOISE) and np.mean(found < base) >= _WINS:
                winner, ratio, seconds = params, median, float(np.median(found))
        self.record(task, winner, "ok", seconds, ratio, choice=True)
        task.measured = 0

    def run(self) -> None:
        """Measure the defaults, then give each task a share of the budget by its latency."""
        self.baseline(self.tasks)
        self.show()
        while not self.over():
            open_tasks = [t for t in self.tasks if t.base is not None and t.untried()]
            if not open_tasks:
                break
            open_tasks.sort(key=lambda t: -t.seconds)
            left = sum(t.seconds for t in open_tasks)
            for task in open_tasks:
                if self.over():
                    break
                share = task.seconds / left if left else 1.0
                left -= task.seconds
                until, most = float("inf"), None
                if self.trials is not None:
                    most = max(1, round(share * (self.trials - self.measured)))
                elif self.seconds is not None:
                    until = time.monotonic() + share * (self.seconds - self.spent)
                self.search(task, until, most)
        # A killed run may have measured without choosing.
        for task in self.tasks:
            tried = task.base is not None and len(task.trials) > 1
            if task.choice is None and tried and self.open(task):
                self.choose(task)
        self.current = None
        self.show()


def _best_ratio(task: Task) -> float:
    if task.choice is not None and not task.measured:
        return task.ratio
    ranked = task.ranked()
    return min(1.0, ranked[0][0]) if ranked else 1.0


def _rounds(seconds: float) -> int:
    """Return how many rounds make a trial: at least 7, more where a call is short."""
    return int(min(25, max(7, 0.05 / max(seconds, 1e-6))))


def _median_ratio(times: Iterable[float], base: Iterable[float]) -> float:
    return float(np.median(np.array(list(times)) / np.array(list(base))))


def _build_status(error: WorkerError) -> Status:
    return "timeout" if error.status == "timeout" else "build failed"


def _run_status(error: WorkerError) -> Status:
    return "timeout" if error.status == "timeout" else "crashed"


def tune_graph(
    graph: Graph,
    isa: Isa,
    target: str,
    tuning: Tuning,
    *,
    seed: int = 0,
    progress: ProgressFn = no_progress,
) -> TuningOutcome:
    """Tune the kernels of a graph that is shaped for a CPU target.

    Args:
        graph: Graph[INTEGER] after the target's passes.
        isa: The row.
        target: Name of the target, for the records.
        tuning: Where the records are, and the limits.
        seed: Seed of the operands and of the search.
        progress: Called after every trial.

    Raises:
        TuningError: The records cannot be read or written, or a tracker lends no device.
        UnsupportedByTargetError: This machine cannot run the target's code.
    """
    file = RecordFile.to_tune(tuning, target)
    remote = _remote(tuning)
    missing = missing_features(isa.cpu_features) if remote is None else ()
    if missing:
        raise UnsupportedByTargetError(
            f"cannot tune for {target} here: this CPU lacks {', '.join(missing)}",
            hint="tune on a machine that has them, or over a tracker; records are portable",
        )
    records = file.read(machine_of(remote))
    tasks = collect_tasks(graph, isa, target)
    for task in tasks:
        task.trials = {tuple(sorted(r.params.items())): r for r in records.of(task.key, "trial")}
        task.choice = records.best(task.key)
        since = 0 if task.choice is None else task.choice.time
        task.measured = sum(r.time > since for r in task.trials.values())
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="qcompiler-tune-") as folder,
        WorkerPool(min(default_threads(), _BATCH)) as pool,
    ):
        session = _Session(tasks, file, records, pool, Path(folder), tuning, seed, progress, remote)
        try:
            session.bench.connect()  # a tracker that does not answer shows before the builds
            session.run()
        finally:
            session.bench.worker.stop()
    return file.outcome(records, (_outcome(task) for task in tasks), started)


def _remote(tuning: Tuning) -> Remote | None:
    if tuning.tracker is None or tuning.key is None:
        return None
    return (*tracker_address(tuning.tracker), tuning.key)


def _outcome(task: Task) -> TaskOutcome:
    failed = [r for r in task.trials.values() if r.status != "ok"]
    base = task.base
    return TaskOutcome(
        kernel=task.tunable.kernel,
        workload=task.key.workload,
        nodes=tuple(task.nodes),
        default_ms=None if base is None else base * 1e3,
        best_ms=None if base is None else base * 1e3 * task.ratio,
        ratio=task.ratio,
        params=dict(task.choice.params) if task.choice else params_dict(task.default),
        trials=len(task.trials),
        failures=tuple(f"{dict(r.params)}: {r.status} {r.note}".strip() for r in failed),
    )
