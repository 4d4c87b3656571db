# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Choosing kernel parameters: by records, and by search."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler import driver
from qcompiler.cpu import host_cpu
from qcompiler.errors import TuningError, UnsupportedByTargetError, UsageError
from qcompiler.ir import Graph
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.records import Record, RecordFile, Records
from qcompiler.registry import get_target
from qcompiler.targets import tune_bench, tvm_tune
from qcompiler.targets.base import TuningBudget
from qcompiler.targets.choice import (
    RecordedChoice,
    Tunable,
    default_choice,
    params_dict,
    params_from,
    workload_key,
)
from qcompiler.targets.cpu_lowering import CpuLowering
from qcompiler.targets.isa import isa_named, tvm_target
from qcompiler.targets.tune_process import (
    Worker,
    WorkerCrashedError,
    WorkerError,
    WorkerTimeoutError,
)
from qcompiler.targets.tvm_lower import lower_graph
from qcompiler.targets.tvm_tune import collect_tasks, neighbours, shares_evenly, tune_graph
from qcompiler.tuning import Tuning, TuningOutcome

pytestmark = pytest.mark.timed

MODELS = Path(__file__).parents[2] / "models"
ISA = isa_named("x86-avx2")


@pytest.fixture(scope="module")
def quantized() -> driver.Quantized:
    digits = MODELS / "digits_cnn"
    return driver.quantize_model(digits / "model.onnx", calibration=digits / "calib.npz")


@pytest.fixture(scope="module")
def graph(quantized: driver.Quantized) -> Graph:
    """The bundled model, shaped for x86-avx2."""
    return PassManager(get_target("x86-avx2").passes()).run(quantized.graph, PassContext())


def lower_with(graph: Graph, choose: Any) -> Any:
    return lower_graph(graph, CpuLowering(ISA, choose), tvm_target(ISA))


def tunables(graph: Graph) -> list[Tunable]:
    """The kernels with parameters, one for each node."""
    found: dict[str, Tunable] = {}

    def collect(tunable: Tunable) -> Any:
        found[tunable.node.name] = tunable
        return default_choice(tunable)

    lower_with(graph, collect)
    return list(found.values())


def choice_record(tunable: Tunable, **changes: Any) -> Record:
    """A record that chooses the last candidate of a kernel's space."""
    key = workload_key(tunable, ISA.name, tunable.pack(tunable.default()))
    params = params_dict(tunable.space()[-1])
    return Record(key, "choice", {**params, **changes}, "ok", 1e-3, 0.5, "cpu", 1)


# --- records choose ------------------------------------------------------------------------------


def test_every_candidate_has_a_name_in_a_record(graph: Graph) -> None:
    for tunable in tunables(graph):
        space = tunable.space()
        assert space[0] == tunable.default()
        assert [params_from(tunable, params_dict(p)) for p in space] == list(space)


@pytest.mark.isa("x86-avx2")
def test_recorded_parameters_are_built_and_change_no_result(
    graph: Graph, quantized: driver.Quantized
) -> None:
    kernels = tunables(graph)
    records = Records([choice_record(t) for t in kernels])
    choose = RecordedChoice(records, ISA.name)
    backend = get_target("x86-avx2")
    models = []
    for choice in (default_choice, choose):
        lowered = lower_with(graph, choice)
        built = backend.build(lowered, TuningBudget())
        models.append(driver.assemble(built, backend.spec, quantized))
    assert choose.used == len(kernels) > 2
    assert choose.missing == 0
    assert models[0].artifact.library != models[1].artifact.library
    inputs = models[0].random_inputs()
    for name, expected in models[0](inputs).items():
        np.testing.assert_array_equal(models[1](inputs)[name], expected)


def test_records_outside_of_the_space_are_refused_with_a_note(graph: Graph) -> None:
    first, second = tunables(graph)[:2]
    wild = choice_record(first, mt=1000) if first.kernel != "depthwise" else choice_record(first)
    choose = RecordedChoice(Records([wild]), ISA.name)
    assert choose(first)[0] == first.default()
    assert "not among the kernel's candidates" in choose.notes[0]
    assert choose(second)[0] == second.default()
    assert (choose.used, choose.missing) == (0, 2)


def test_keys_name_all_that_changes_the_code(graph: Graph) -> None:
    kernels = tunables(graph)
    keys = {workload_key(t, ISA.name, t.pack(t.default())) for t in kernels}
    assert len(keys) > 1
    for key in keys:
        assert "Workload(" in key.workload
        assert "Facts(" in key.workload
        assert "\n" not in key.workload


# --- what is searched ----------------------------------------------------------------------------


def test_tasks_are_the_distinct_kernels_with_all_their_nodes(graph: Graph) -> None:
    tasks = collect_tasks(graph, ISA, ISA.name)
    nodes = [name for task in tasks for name in task.nodes]
    assert sorted(nodes) == sorted(t.node.name for t in tunables(graph))
    assert len({task.key for task in tasks}) == len(tasks)
    assert {task.tunable.kernel for task in tasks} == {"conv", "depthwise", "matmul"}


@dataclasses.dataclass(frozen=True)
class Point:
    size: int
    order: str


def test_neighbours_are_counted_in_steps_of_the_values_that_occur() -> None:
    space = [Point(size, order) for size in (1, 2, 64) for order in "mn"]
    found = neighbours(space, Point(64, "m"))
    assert found[0] == Point(64, "m")
    assert set(found[1:3]) == {Point(64, "n"), Point(2, "m")}
    assert found[-1] == Point(1, "n")


def test_candidates_that_threads_cannot_share_are_left_out(graph: Graph) -> None:
    for task in collect_tasks(graph, ISA, ISA.name):
        if task.tunable.kernel != "conv":
            continue
        whole = dataclasses.replace(task.default, m_block=10_000, n_block=10_000)
        assert not shares_evenly(task.tunable, whole, task.default)
        assert shares_evenly(task.tunable, task.default, task.default)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"records": "r", "seconds": 1, "trials": 1}, "got both"),
        ({"records": "r", "seconds": 0}, "seconds must be a number above 0"),
        ({"records": "r", "seconds": float("nan")}, "seconds must be a number above 0"),
        ({"records": "r", "trials": 0}, "trials must be a positive integer"),
        ({}, "neither records nor a limit"),
    ],
)
def test_limits_that_make_no_sense_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Tuning(**fields)


def test_backends_without_parameters_say_so(graph: Graph) -> None:
    backend = get_target("reference")
    with pytest.raises(UnsupportedByTargetError, match="reference has no kernels to tune"):
        backend.with_records(Records())
    with pytest.raises(UnsupportedByTargetError, match="reference has no kernels to tune"):
        backend.tune(graph, Tuning(seconds=1))


def test_a_cpu_that_lacks_the_features_is_named(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tvm_tune, "missing_features", lambda wanted: ("avx9",))
    with pytest.raises(UnsupportedByTargetError, match="this CPU lacks avx9"):
        tune_graph(graph, ISA, ISA.name, Tuning(records="r.jsonl", trials=1))


# --- the search ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(
    graph: Graph, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RecordFile, TuningOutcome, list[tuple[str, int, int]]]:
    """The bundled model after 12 trials, with the progress that was shown."""
    file = RecordFile(tmp_path_factory.mktemp("tuned"), ISA.name)
    shown: list[tuple[str, int, int]] = []
    outcome = tune_graph(
        graph,
        ISA,
        ISA.name,
        Tuning(records=file.path, trials=12),
        progress=lambda *step: shown.append(step),
    )
    return file, outcome, shown


@pytest.mark.isa("x86-avx2")
def test_a_search_keeps_its_limit_and_is_never_worse_than_the_default(tuned: Any) -> None:
    file, outcome, shown = tuned
    found = outcome.to_json()
    assert found["trials"] == 12
    assert found["unmeasured"] == 0
    assert 0 < found["latency_ms"]["best"] <= found["latency_ms"]["default"]
    for task in outcome.tasks:
        assert task.trials >= 1
        assert task.ratio == 1 or task.ratio < 0.98
        assert not task.failures
    records = file.read(host_cpu().name)
    assert sum(r.stage == "trial" for r in records) == 12
    assert all(r.status == "ok" for r in records)
    assert shown[-1][1:] == (12, 12)
    assert all("current" in label and "best" in label for label, _, _ in shown)


@pytest.mark.isa("x86-avx2")
def test_a_second_run_goes_on_where_the_first_stopped(tuned: Any, graph: Graph) -> None:
    file, outcome, _ = tuned
    before = file.path.read_text()
    again = tune_graph(graph, ISA, ISA.name, Tuning(records=file.path, trials=12))
    assert file.path.read_text() == before
    assert again.tasks == outcome.tasks


@pytest.mark.isa("x86-avx2")
def test_a_limit_below_the_number_of_kernels_is_kept(graph: Graph, tmp_path: Path) -> None:
    outcome = tune_graph(graph, ISA, ISA.name, Tuning(records=tmp_path / "r.jsonl", trials=1))
    found = outcome.to_json()
    assert found["trials"] == 1
    assert found["unmeasured"] == len(outcome.tasks) - 1


@pytest.fixture(scope="module")
def session(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tvm_tune._Session]:
    """A session on one small kernel whose default is measured and loaded."""
    folder = tmp_path_factory.mktemp("session")
    tasks = [t for t in collect_tasks(graph, ISA, ISA.name) if t.tunable.kernel == "conv"][:1]
    file = RecordFile(folder, ISA.name)
    with tvm_tune.WorkerPool(1) as pool:
        made = tvm_tune._Session(
            tasks, file, file.read("cpu"), pool, folder, Tuning(trials=99), 0, lambda *_: None
        )
        made.baseline(tasks)
        assert made.open(tasks[0])
        yield made
        made.bench.worker.stop()


_LOOPS = 'int __tvm_ffi_main(void *h, void *a, int n, void *r) { for (;;) __asm__(""); }'
_CRASHES = "int __tvm_ffi_main(void *h, void *a, int n, void *r) { __builtin_trap(); }"


def _library(folder: Path, name: str, code: str) -> str:
    (folder / f"{name}.c").write_text(code)
    path = folder / f"{name}.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(path), str(folder / f"{name}.c")], check=True
    )
    return str(path)


@pytest.mark.isa("x86-avx2")
def test_bad_candidates_are_recorded_and_never_chosen(
    session: tvm_tune._Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = session.tasks[0]
    candidates = task.untried()[:5]
    assert len(candidates) == 5
    path, arrays = session.build([(task, candidates[0])])[0]  # type: ignore[misc]
    session.trial(task, candidates[0], (path, [np.zeros_like(a) for a in arrays]))
    session.trial(task, candidates[1], WorkerError("no such intrinsic"))
    session.trial(task, candidates[2], (_library(tmp_path, "crash", _CRASHES), arrays))
    assert not session.bench.worker.alive
    assert session.open(task)
    monkeypatch.setattr(tune_bench, "_RUN_SECONDS", 0.5)
    session.trial(task, candidates[3], (_library(tmp_path, "loop", _LOOPS), arrays))
    monkeypatch.undo()
    # The next candidate gets a new worker, which knows the default again.
    session.trial(task, candidates[4], session.build([(task, candidates[4])])[0])
    statuses = [task.trials[tvm_tune._identity(p)].status for p in candidates]
    assert statuses == ["wrong result", "build failed", "crashed", "timeout", "ok"]
    notes = [task.trials[tvm_tune._identity(p)].note for p in candidates[:4]]
    assert "differs from the interpreter" in notes[0]
    assert "no such intrinsic" in notes[1]
    assert "ended with status" in notes[2]
    assert "more than 0.5 s" in notes[3]
    ranked = [p for _, p in task.ranked()]
    assert set(ranked) == {task.default, candidates[4]}
    assert not set(candidates) & set(task.untried())
    session.choose(task)
    assert task.choice is not None
    assert params_from(task.tunable, task.choice.params) in ranked
    assert len(session.file.read("cpu")) == len(task.trials) + 1


def test_a_worker_that_cannot_build_says_why() -> None:
    worker = Worker()
    try:
        with pytest.raises(WorkerError, match="TypeError"):
            worker.call("build", timeout=60)
        assert worker._process is not None
        worker._process.send_signal(signal.SIGSTOP)  # it cannot answer, however fast it is
        with pytest.raises(WorkerTimeoutError, match=r"more than 0\.05 s"):
            worker.call("build", timeout=0.05)
        assert not worker.alive
        assert worker._start().stdin is not None
        assert worker._process is not None
        worker._process.kill()
        with pytest.raises(WorkerCrashedError, match="ended with status -9"):
            worker.call("build", timeout=60)
    finally:
        worker.stop()


def test_tuning_needs_a_file(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="needs a file"):
        tune_graph(graph, ISA, ISA.name, Tuning(seconds=1))
