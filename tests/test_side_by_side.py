# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qcompiler import side_by_side
from qcompiler.cpu import allowed_cpus
from qcompiler.errors import UsageError
from qcompiler.side_by_side import Runner, measure, pick_cpus

pytestmark = pytest.mark.timed

FACTORIES = """
    import os
    import sys
    import time

    from qcompiler.errors import QCompilerError


    def sleeper(seconds, note="sleeps"):
        return (lambda: time.sleep(seconds)), note


    def missing():
        raise QCompilerError("not installed", hint="install it")


    def bug():
        raise ZeroDivisionError("of another runtime")


    def crash():
        os.kill(os.getpid(), 11)


    def late_exit():
        calls = []

        def run():
            calls.append(1)
            if len(calls) > 6:
                print("the last words", file=sys.stderr)
                os._exit(7)

        return run, ""


    def leaves_a_thread(path):
        import threading

        def tick():
            with open(path, "w", buffering=1) as file:
                while True:
                    file.write(f"{time.monotonic()}\\n")
                    time.sleep(0.001)

        threading.Thread(target=tick, daemon=True).start()
        return (lambda: time.sleep(0.01)), ""


    def notes_its_runs(path):
        def run():
            begin = time.monotonic()
            time.sleep(0.01)
            with open(path, "a") as file:
                file.write(f"{begin} {time.monotonic()}\\n")

        return run, ""


    def noisy():
        def run():
            print("not an answer")
            os.write(1, b"nor is this\\n")

        return run, ""


    def hanging():
        time.sleep(60)


    def gets(name, path):
        with open(path, "w") as file:
            file.write(os.environ.get(name, ""))
        return (lambda: None), ""


    def holds(megabytes):
        block = bytearray(megabytes * 1_000_000)
        for at in range(0, len(block), 4096):
            block[at] = 1
        return (lambda: None), ""


    def logger(path):
        def run():
            with open(path, "a") as file:
                file.write(f"{os.getpid()} {sorted(os.sched_getaffinity(0))} "
                           f"{os.environ['TVM_NUM_THREADS']}\\n")
            time.sleep(0.03)

        return run, ""
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "bench_factories.py").write_text(textwrap.dedent(FACTORIES))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "bench_factories"


def test_times_what_it_is_given(factories: str) -> None:
    found = measure(
        [
            Runner("slow", f"{factories}:sleeper", {"seconds": 0.02}),
            Runner("fast", f"{factories}:sleeper", {"seconds": 0.005, "note": "naps"}),
        ],
        runs=10,
    )
    slow, fast = found["slow"].timing, found["fast"].timing
    assert slow is not None
    assert fast is not None
    assert 20 <= slow.min_ms <= slow.median_ms
    assert 5 <= fast.min_ms <= fast.median_ms
    assert fast.min_ms < 20
    assert fast.runs >= 10
    assert slow.runs >= 10
    assert slow.threads == 1
    assert (found["slow"].note, found["fast"].note) == ("sleeps", "naps")


def test_problems_are_reported_and_the_others_go_on(factories: str) -> None:
    found = measure(
        [
            Runner("missing", f"{factories}:missing"),
            Runner("bug", f"{factories}:bug"),
            Runner("crash", f"{factories}:crash"),
            Runner("late", f"{factories}:late_exit"),
            Runner("good", f"{factories}:sleeper", {"seconds": 0.001}),
        ],
        runs=20,
    )
    assert found["missing"].problem == "not installed (install it)"
    assert found["bug"].problem == "ZeroDivisionError: of another runtime"
    assert found["crash"].problem == "its process was killed by signal 11"
    assert found["late"].problem == "its process ended with status 7: the last words"
    assert all(found[name].timing is None for name in ("missing", "bug", "crash", "late"))
    assert found["good"].timing is not None
    assert list(found) == ["missing", "bug", "crash", "late", "good"]


def test_output_of_a_runner_is_no_answer(factories: str) -> None:
    found = measure([Runner("noisy", f"{factories}:noisy")], runs=2)
    assert found["noisy"].timing is not None


def test_a_runner_that_hangs_is_given_up(factories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "PREPARE_SECONDS", 1.5)
    found = measure([Runner("hanging", f"{factories}:hanging")], runs=1)
    assert found["hanging"].problem == "no answer within 2 s"


def test_runners_have_processes_of_their_own_and_take_turns(factories: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    runners = [Runner(n, f"{factories}:logger", {"path": str(log)}) for n in ("a", "b")]
    measure(runners, runs=10)
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    pids = [pid for pid, _ in lines]
    assert len(set(pids)) == 2
    assert str(os.getpid()) not in pids
    turns = sum(x != y for x, y in itertools.pairwise(pids))
    assert turns >= 10  # ten rounds of two runners, not two blocks
    assert {rest for _, rest in lines} == {f"[{pick_cpus(1)[0]}] 1"}


def test_threads_left_behind_do_not_run_in_the_turns_of_others(
    factories: str, tmp_path: Path
) -> None:
    """One runner leaves a thread that notes the time for ever; the other notes its turns."""
    runners = [
        Runner("busy", f"{factories}:leaves_a_thread", {"path": str(tmp_path / "thread")}),
        Runner("other", f"{factories}:notes_its_runs", {"path": str(tmp_path / "runs")}),
    ]
    outcomes = measure(runners, runs=10)
    assert all(outcome.timing for outcome in outcomes.values())
    ticks = [float(line) for line in (tmp_path / "thread").read_text().split()]
    turns = [tuple(map(float, line.split())) for line in (tmp_path / "runs").open()]
    # The first runs prepare the other runner, when the first one is stopped already.
    inside = sum(any(begin < tick < end for begin, end in turns) for tick in ticks)
    assert len(ticks) > 10
    assert inside == 0


def test_progress_is_told(factories: str) -> None:
    calls: list[tuple[str, int, int]] = []
    measure(
        [Runner("a", f"{factories}:sleeper", {"seconds": 0.001})],
        runs=1,
        progress=lambda *call: calls.append(call),
    )
    assert calls[0] == ("prepare a", 0, 1)
    assert calls[-1][0] == "measure"
    assert calls[-1][1] == calls[-1][2]


def test_pick_cpus_takes_as_many_as_asked_for() -> None:
    everything = allowed_cpus()
    assert pick_cpus(len(everything)) == everything
    assert len(pick_cpus(1)) == 1


@pytest.mark.parametrize("threads", [0, -1, 10_000])
def test_threads_out_of_range(threads: int) -> None:
    with pytest.raises(UsageError, match=f"{threads} threads wanted, this process may use 1 to"):
        pick_cpus(threads)


def test_runs_out_of_range() -> None:
    with pytest.raises(UsageError, match="runs must be at least 1, got 0"):
        measure([], runs=0)


def test_a_runner_has_its_own_environment(factories: str, tmp_path: Path) -> None:
    options = {"name": "OF_ONE_RUNNER", "path": str(tmp_path / "with")}
    runners = [
        Runner("with", f"{factories}:gets", options, {"OF_ONE_RUNNER": "yes"}),
        Runner("without", f"{factories}:gets", {**options, "path": str(tmp_path / "without")}),
    ]
    measure(runners, runs=1)
    assert (tmp_path / "with").read_text() == "yes"
    assert (tmp_path / "without").read_text() == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells the peak memory")
def test_peak_memory_is_that_of_the_runner_alone(factories: str) -> None:
    mine = bytearray(300_000_000)  # of the parent: no part of what its children have
    mine[::4096] = b"x" * len(mine[::4096])
    found = measure(
        [
            Runner("small", f"{factories}:holds", {"megabytes": 1}),
            Runner("large", f"{factories}:holds", {"megabytes": 101}),
        ],
        runs=1,
    )
    small, large = (found[name].peak_memory_mb for name in ("small", "large"))
    assert small is not None
    assert large is not None
    assert large - small == pytest.approx(100, abs=10)
    assert small < 200


def test_a_slow_runner_runs_less_often(factories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "SLOW_SECONDS", 0.05)
    monkeypatch.setattr(side_by_side, "SLOW_TOTAL_SECONDS", 0.5)
    found = measure(
        [
            Runner("slow", f"{factories}:sleeper", {"seconds": 0.1}),
            Runner("fast", f"{factories}:sleeper", {"seconds": 0.02}),
        ],
        runs=40,
    )
    slow, fast = found["slow"].timing, found["fast"].timing
    assert slow is not None
    assert fast is not None
    assert 3 <= slow.runs <= 5
    assert fast.runs >= 40


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux ends them")
def test_workers_end_when_the_parent_is_killed(factories: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import sys; sys.path[:0] = sys.argv[1:2]\n"
        "from qcompiler.side_by_side import Runner, measure\n"
        f"runners = [Runner(n, '{factories}:logger', {{'path': {str(log)!r}}}) for n in 'ab']\n"
        "measure(runners, runs=10_000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = log.read_text().splitlines() if log.exists() else []
        workers = {int(line.split()[0]) for line in lines if " " in line}
        if len(workers) == 2:
            break
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert len(workers) == 2
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, workers))


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
