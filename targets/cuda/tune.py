# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Search the tiles of products by measuring on the GPU of this machine.

Candidates of one product are compiled together, a few at a time, run beside the analytic choice in
interleaved rounds, and must give its result byte for byte. What was measured goes to the records at
once, so that a search that is stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompiler.cuda_driver import check_device, compile_source, driver
from qcompiler.cuda_executor import CudaExecutor
from qcompiler.errors import CodegenError, QCompilerError, UnsupportedByTargetError
from qcompiler.ir import Graph, Value
from qcompiler.manifest import TensorSpec
from qcompiler.passmanager import ProgressFn, no_progress
from qcompiler.records import Record, RecordFile, Records, WorkloadKey
from qcompiler.targets.cuda.arch import Arch
from qcompiler.targets.cuda.lowering import lower_graph
from qcompiler.targets.cuda.nvcc import compile_fatbin, find_nvcc
from qcompiler.targets.cuda.products import (
    Product,
    product_launch,
    tile_of,
    tiles_of,
    workload_text,
)
from qcompiler.targets.cuda.program import ALIGNMENT, Launch, Temporary, nbytes
from qcompiler.targets.cuda.source import module_source
from qcompiler.targets.cuda.tiles import Tile
from qcompiler.tuning import TaskOutcome, Tuning, TuningOutcome
from qcompiler.types import Array, DType

KERNELS = "cuda-kernels-1"
"""Version of the templates in records: raised when they change so that other tiles may win."""
_BATCH = 6  # candidates that are compiled together
_ROUNDS = 5
_REPEAT = 10  # launches per measurement: one alone is too short for the clock
_NOISE = 0.03  # a candidate must beat the default by more


def tile_params(tile: Tile) -> dict[str, int | str]:
    """Return a tile as a record has it."""
    return dataclasses.asdict(tile)


def product_key(p: Product, target: str) -> WorkloadKey:
    """Return the key of a product's records."""
    return WorkloadKey(target, workload_text(p), KERNELS)


@dataclass
class RecordedTiles:
    """Chooses the tile that the records say, else analytically.

    Attributes:
        records: Of the target.
        target: Name of the target.
        used: Number of products with a recorded tile.
        missing: Number of products without one.
    """

    records: Records
    target: str
    used: int = 0
    missing: int = 0

    def __call__(self, p: Product, arch: Arch) -> Tile:
        """Return the tile of a product."""
        found = self.records.best(product_key(p, self.target))
        if found is not None:
            wanted = dict(found.params)
            for tile in tiles_of(p, arch):
                if tile_params(tile) == wanted:
                    self.used += 1
                    return tile
        self.missing += 1
        return tile_of(p, arch)

    def summary(self) -> list[str]:
        """Return what happened, for the report."""
        total = self.used + self.missing
        return [
            *self.records.notes,
            f"tuning records were found for {self.used} of {total} products",
        ]


@dataclass
class _Task:
    """One distinct product of the model."""

    product: Product
    key: WorkloadKey
    nodes: list[str] = field(default_factory=list)
    base: float | None = None
    trials: list[Record] = field(default_factory=list)
    choice: Record | None = None


def tune_graph(
    graph: Graph,
    arch: Arch,
    target: str,
    tuning: Tuning,
    *,
    seed: int = 0,
    progress: ProgressFn = no_progress,
) -> TuningOutcome:
    """Tune the products of a shaped graph.

    Args:
        graph: Graph[INTEGER] after the target's passes.
        arch: The row.
        target: Name of the target, for the records.
        tuning: Where the records are, and the limits.
        seed: Seed of the operands.
        progress: Called after every product.

    Raises:
        TuningError: No file for the records, or it cannot be read or written.
        UnsupportedByTargetError: No GPU here runs the target, or a tracker was asked for.
    """
    file = RecordFile.to_tune(tuning, target)
    if tuning.tracker is not None:
        raise UnsupportedByTargetError(
            f"target {target} is tuned on the GPU of this machine, not over a tracker",
            hint="run `qcompile tune` where the GPU is; records are portable",
        )
    check_device(arch.isa, "what is tuned")
    gpu = driver()
    records = file.read(gpu.name)
    tasks = collect(graph, arch, target)
    for task in tasks:
        task.trials = records.of(task.key, "trial")
        task.choice = records.best(task.key)
    started = time.monotonic()
    deadline = None if tuning.seconds is None else started + tuning.seconds
    left = tuning.trials
    rng = np.random.default_rng(seed)
    # In turn, the products that take longest first: a limit then leaves none out altogether.
    order = sorted(tasks, key=lambda t: -t.product.macs * len(t.nodes))
    waiting = [(task, _batches(task, arch)) for task in order]
    closed = 0
    while waiting:
        again = []
        for task, batches in waiting:
            late = deadline is not None and time.monotonic() > deadline
            batch = [] if late or left == 0 else next(batches, [])
            chosen = batch if left is None else batch[:left]
            if chosen:
                made = _measure(task, arch, chosen, gpu.name, rng)
                left = None if left is None else left - len(made)
                for record in made:
                    file.append(record)
                task.trials += made
                again.append((task, batches))
                continue
            choice = _choice(task, arch, gpu.name)
            if choice is not None:
                file.append(choice)
                task.choice = choice
            closed += 1
            progress("tune", closed, len(order))
        waiting = again
    return file.outcome(records, (_outcome(t, arch) for t in tasks), started)


def collect(graph: Graph, arch: Arch, target: str) -> list[_Task]:
    """Return the distinct products of a graph."""
    tasks: dict[WorkloadKey, _Task] = {}
    seen: list[_Task] = []

    def note(p: Product, arch: Arch) -> Tile:
        key = product_key(p, target)
        seen.append(tasks.setdefault(key, _Task(p, key)))
        return tile_of(p, arch)

    lowered = lower_graph(graph, arch, choose=note)
    names = [
        step.name for step in lowered.steps for launch in step.launches
        if "product.cuh" in launch.kernel.files
    ]  # fmt: skip
    for name, task in zip(names, seen, strict=True):
        task.nodes.append(name)
    return list(tasks.values())


def _batches(task: _Task, arch: Arch) -> Iterator[list[Tile]]:
    """Return the tiles that were not measured yet, a few at a time."""
    known = [dict(r.params) for r in task.trials]
    open_ = [t for t in tiles_of(task.product, arch)[1:] if tile_params(t) not in known]
    for start in range(0, len(open_), _BATCH):
        yield open_[start : start + _BATCH]


def _measure(
    task: _Task, arch: Arch, tiles: Sequence[Tile], machine: str, rng: np.random.Generator
) -> list[Record]:
    """Time some tiles beside the default; return a record of each."""
    every = [tile_of(task.product, arch), *tiles]
    launches = {f"tile_{i}": product_launch(task.product, arch, t) for i, t in enumerate(every)}
    image = _compiled(launches, arch)
    feeds = _feeds(next(iter(launches.values())), rng)
    found: dict[str, CudaExecutor | str] = {}
    expected: bytes | None = None
    for name, launch in launches.items():
        try:
            made = _executor(name, launch, image)
            (result,) = made.run(feeds)
        except QCompilerError as error:
            if expected is None:
                raise  # the default itself: nothing can be compared with
            found[name] = f"crashed: {error.message}"
            continue
        expected = result.tobytes() if expected is None else expected
        same = result.tobytes() == expected
        found[name] = made if same else "wrong result: not the integers of the default"
    seconds: dict[str, list[float]] = {n: [] for n, e in found.items() if not isinstance(e, str)}
    for _ in range(_ROUNDS):
        for name, taken in seconds.items():
            executor = found[name]
            assert isinstance(executor, CudaExecutor)  # by the line that made `seconds`
            taken.append(statistics.median(executor.device_times(feeds, runs=3)) / _REPEAT)
    base = seconds["tile_0"]
    task.base = statistics.median(base)
    records = []
    for i, tile in enumerate(tiles, 1):
        entry = found[f"tile_{i}"]
        common: dict[str, Any] = {"machine": machine, "time": int(time.time())}
        if isinstance(entry, str):
            status, _, note = entry.partition(": ")
            records.append(
                Record(task.key, "trial", tile_params(tile), status, note=note, **common)  # type: ignore[arg-type]
            )
            continue
        taken = seconds[f"tile_{i}"]
        ratio = statistics.median(t / b for t, b in zip(taken, base, strict=True))
        median = max(statistics.median(taken), 1e-12)
        params = tile_params(tile)
        records.append(Record(task.key, "trial", params, "ok", median, max(ratio, 1e-4), **common))
    return records


def _compiled(launches: dict[str, Launch], arch: Arch) -> bytes:
    source = module_source({name: launch.kernel for name, launch in launches.items()})
    nvcc = find_nvcc()
    if nvcc is not None and nvcc.problem(arch.sm) is None:
        return compile_fatbin(nvcc, source, arch.sm)[0]
    return compile_source(source.encode(), driver().capability)


def _buffers(launch: Launch) -> list[Value | Temporary]:
    """Return what a launch reads at run time, each once."""
    read = [a for a in launch.arguments if isinstance(a, (Value, Temporary))]
    return list(dict.fromkeys(read))


def _size(buffer: Value | Temporary) -> int:
    return buffer.nbytes if isinstance(buffer, Temporary) else nbytes(buffer)


def _feeds(launch: Launch, rng: np.random.Generator) -> list[Array]:
    """Return bytes for every operand: random integers, or normal halves."""
    feeds: list[Array] = []
    for buffer in _buffers(launch):
        size = _size(buffer)
        if isinstance(buffer, Value) and buffer.dtype is DType.FLOAT16:
            halves = rng.standard_normal(size // 2).astype(np.float16)
            feeds.append(halves.view(np.uint8))
        else:
            feeds.append(rng.integers(0, 256, size, np.uint8))
    return feeds


def _executor(name: str, launch: Launch, image: bytes) -> CudaExecutor:
    """Return an executor that launches one kernel several times."""
    offset = 0
    places: dict[Value | Temporary, int] = {}
    for buffer in (*_buffers(launch), launch.result):
        places[buffer] = offset
        offset += -(-_size(buffer) // ALIGNMENT) * ALIGNMENT
    parameters: list[Array] = []
    arguments: list[list[Any]] = []
    for a in launch.arguments:
        if isinstance(a, (Value, Temporary)):
            arguments.append(["arena", places[a]])
        elif isinstance(a, np.ndarray):
            arguments.append(["parameter", len(parameters)])
            parameters.append(a)
        else:
            raise CodegenError(f"a product reads {type(a).__name__}")
    arguments.append(["arena", places[launch.result]])
    entry = {
        "kernel": name, "grid": list(launch.grid), "threads": launch.threads,
        "shared": launch.shared, "arguments": arguments,
    }  # fmt: skip
    program = {
        "arena": max(offset, ALIGNMENT),
        "inputs": [["arena", places[b]] for b in _buffers(launch)],
        "outputs": [["arena", places[launch.result]]],
        "kernels": {name: launch.shared},
        "launches": [entry] * _REPEAT,
    }
    return CudaExecutor(
        driver(), program, image, parameters,
        [TensorSpec((_size(b),), DType.UINT8) for b in _buffers(launch)],
        [TensorSpec((_size(launch.result),), DType.UINT8)],
    )  # fmt: skip


def _choice(task: _Task, arch: Arch, machine: str) -> Record | None:
    """Return the choice that the trials lead to; None where nothing is new."""
    good = [r for r in task.trials if r.status == "ok" and r.ratio is not None]
    latest = max((r.time for r in task.trials), default=None)
    if latest is None or (task.choice is not None and task.choice.time > latest):
        return None
    best = min(good, key=lambda r: r.ratio or 1.0, default=None)
    if best is None or (best.ratio or 1.0) > 1.0 - _NOISE:
        params, ratio = tile_params(tile_of(task.product, arch)), 1.0
        seconds = task.base
    else:
        params, ratio, seconds = dict(best.params), best.ratio or 1.0, best.seconds
    return Record(task.key, "choice", params, "ok", seconds, ratio, machine, int(time.time()))


def _outcome(task: _Task, arch: Arch) -> TaskOutcome:
    ratio = 1.0 if task.choice is None else task.choice.ratio or 1.0
    params = tile_params(tile_of(task.product, arch))
    return TaskOutcome(
        kernel="product",
        workload=task.key.workload,
        nodes=tuple(task.nodes),
        default_ms=None if task.base is None else task.base * 1e3,
        best_ms=None if task.base is None else task.base * 1e3 * ratio,
        ratio=ratio,
        params=params if task.choice is None else dict(task.choice.params),
        trials=len(task.trials),
        failures=tuple(f"{r.status}: {r.note}" for r in task.trials if r.status != "ok"),
    )
