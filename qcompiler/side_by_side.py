# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Time several runtimes beside each other, each in a process of its own.

Two runtimes in one process share caches of memory, thread pools and settings of the floating-point
unit; measured one after the other, they meet different moments of the machine. So every runner has
its own process, pinned to the same CPUs, and in every round each of them runs for a slice of time,
in turn. Whose turn it is not is stopped by a signal: the threads of a pool go on looking for work
for a while after a run, which would take a core from the next runner. A runner that is not
installed, fails or crashes is reported, and the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from qcompiler.benchmark import Timing
from qcompiler.cpu import allowed_cpus
from qcompiler.errors import QCompilerError, UsageError

SLICE_SECONDS = 0.05
"""How long one runner runs in one round, where one run is shorter."""
PREPARE_SECONDS = 900.0
"""How long a runner may take to load, compile or quantize its model."""
SLOW_SECONDS = 0.5
"""From this time of one run on, a runner is measured less often: figures so far apart from the
others' need no more, and nobody should wait for them."""
SLOW_TOTAL_SECONDS = 10.0
"""How long all measured runs of such a runner take together, 3 runs at least."""

_PR_SET_PDEATHSIG = 1
_STOP_SECONDS = 1.0

_BOOT = (
    "import json, sys; first = json.loads(sys.stdin.readline()); sys.path[:] = first['path']; "
    "from qcompiler.side_by_side import work; work(first)"
)
"""The worker gets this process's module search path: `-m` would put the working directory first."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Something to time.

    Attributes:
        name: Name in the result.
        factory: "module:function"; called in the worker with `options`, it returns (a function
            without arguments that runs the model once, a note about how it does so). It raises
            `QCompilerError` where that is not possible here.
        options: Keyword arguments of the factory, as JSON.
        environment: Variables of its process, beside those that this process has.
    """

    name: str
    factory: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a runner: either a timing or the reason why there is none.

    Attributes:
        timing: The times.
        note: How the runner does it.
        problem: Why there is no timing.
        peak_memory_mb: The most memory that its process had resident, Python and its libraries
            included, in MB; None where the system does not tell.
    """

    timing: Timing | None
    note: str = ""
    problem: str = ""
    peak_memory_mb: float | None = None


def pick_cpus(threads: int) -> tuple[int, ...]:
    """Return the CPUs to pin to: one per physical core first, then their second hyper-threads.

    Raises:
        UsageError: Fewer CPUs are allowed than threads wanted.
    """
    allowed = allowed_cpus()
    if not 1 <= threads <= len(allowed):
        raise UsageError(f"{threads} threads wanted, this process may use 1 to {len(allowed)}")
    firsts: list[int] = []
    seconds: list[int] = []
    seen: set[str] = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text() if siblings.exists() else str(cpu)
        (seconds if core in seen else firsts).append(cpu)
        seen.add(core)
    return tuple(sorted((firsts + seconds)[:threads]))


def measure(
    runners: Sequence[Runner],
    *,
    threads: int = 1,
    runs: int = 50,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Outcome]:
    """Time the runners in interleaved rounds.

    Args:
        runners: What to time.
        threads: Threads of every runner, and CPUs that all of them are pinned to.
        runs: Least number of measured runs of each, but of those that take longer than
            `SLOW_SECONDS`.
        progress: Called with (what is going on, done, total).

    Raises:
        UsageError: `threads` or `runs` out of range.
    """
    if runs < 1:
        raise UsageError(f"runs must be at least 1, got {runs}")
    cpus = pick_cpus(threads)
    say = progress or (lambda stage, done, total: None)
    outcomes: dict[str, Outcome] = {}
    workers: dict[str, _Worker] = {}
    with contextlib.ExitStack() as stack:
        for index, runner in enumerate(runners):
            say(f"prepare {runner.name}", index, len(runners))
            worker = stack.enter_context(_worker(runner, cpus))
            reply = worker.receive(PREPARE_SECONDS)
            if "problem" in reply:
                outcomes[runner.name] = Outcome(None, problem=reply["problem"])
            else:
                workers[runner.name] = worker
                worker.stop()
                worker.note = reply["note"]
                worker.plan(reply["seconds"], runs)
        rounds = max((worker.rounds for worker in workers.values()), default=0)
        rounds = max(rounds, min(10, runs))
        for index in range(rounds):
            say("measure", index, rounds)
            for name, worker in list(workers.items()):
                if worker.is_slow and not worker.has_turn(index, rounds):
                    continue
                worker.resume()
                worker.send({"runs": worker.slice, "warm": not worker.is_slow})
                reply = worker.receive(PREPARE_SECONDS)
                worker.stop()
                if "problem" in reply:
                    outcomes[name] = Outcome(None, problem=reply["problem"])
                    del workers[name]
                else:
                    worker.seconds += reply["seconds"]
                    worker.peak_memory_mb = reply["peak_memory_mb"]
        say("measure", rounds, rounds)
    for name, worker in workers.items():
        outcomes[name] = Outcome(
            _timing(worker.seconds, threads),
            worker.note,
            peak_memory_mb=worker.peak_memory_mb,
        )
    return {runner.name: outcomes[runner.name] for runner in runners}


def _timing(seconds: Sequence[float], threads: int) -> Timing:
    import numpy as np

    low, median, high = np.percentile(seconds, [25, 50, 75])
    return Timing(
        median_ms=float(median) * 1e3,
        min_ms=min(seconds) * 1e3,
        spread=float((high - low) / median) if median else 0.0,
        runs=len(seconds),
        threads=threads,
    )


# --- this side -----------------------------------------------------------------------------------


class _Worker:
    """A worker process, spoken to in lines of JSON."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        if process.stdin is None or process.stdout is None:
            raise QCompilerError("a worker needs pipes to its standard input and output")
        self.process = process
        self.questions = process.stdin
        self.answers = process.stdout
        self.slice = 1
        self.rounds = 1
        self.is_slow = False
        self.seconds: list[float] = []
        self.peak_memory_mb: float | None = None
        self.note = ""
        self._log = log
        self._buffer = b""

    def plan(self, seconds: float, runs: int) -> None:
        """Choose how many runs a turn has, and how many turns there are, by the time of one run."""
        self.is_slow = seconds > SLOW_SECONDS
        self.slice = max(1, min(50, round(SLICE_SECONDS / max(seconds, 1e-6))))
        self.rounds = -(-runs // self.slice)
        if self.is_slow:
            self.rounds = min(self.rounds, max(3, int(SLOW_TOTAL_SECONDS / seconds)))

    def has_turn(self, index: int, rounds: int) -> bool:
        """Say whether a slow runner runs in this round: its turns are spread evenly."""
        return (index + 1) * self.rounds // rounds > index * self.rounds // rounds

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; a worker that has died is noticed when its answer is read."""
        with contextlib.suppress(BrokenPipeError):
            self.questions.write(json.dumps(message).encode() + b"\n")
            self.questions.flush()

    def stop(self) -> None:
        """Stop all threads of the worker until `resume`, where the system can."""
        self._signal("SIGSTOP")
        if not hasattr(os, "waitid") or self.process.poll() is not None:
            return
        # The signal is only sent by now: the last thread may stop milliseconds later.
        options = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG
        deadline = time.monotonic() + _STOP_SECONDS
        while os.waitid(os.P_PID, self.process.pid, options) is None:
            if time.monotonic() > deadline:
                return
            time.sleep(0.0001)

    def resume(self) -> None:
        """Let the worker's threads go on."""
        self._signal("SIGCONT")

    def _signal(self, name: str) -> None:
        number = getattr(signal, name, None)
        if number is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the answer, or {"problem": ...} where none comes."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return {"problem": f"no answer within {seconds:.0f} s"}
                block = os.read(self.answers.fileno(), 1 << 16)
                if not block:
                    return {"problem": self._ending()}
                self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ending(self) -> str:
        """Say how the worker ended, with the last line that it wrote."""
        status = self.process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1][:300]}" if lines else ""
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"its process {how}{last}"


@contextlib.contextmanager
def _worker(runner: Runner, cpus: tuple[int, ...]) -> Iterator[_Worker]:
    threads = str(len(cpus))
    names = ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, threads), **runner.environment}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends them
        )
        worker = _Worker(process, log)
        try:
            worker.send(
                {
                    "path": [p or os.getcwd() for p in sys.path],
                    "parent": os.getpid(),
                    "cpus": cpus,
                    "factory": runner.factory,
                    "options": dict(runner.options),
                }
            )
            yield worker
        finally:
            process.kill()
            process.wait()
            worker.answers.close()
            with contextlib.suppress(BrokenPipeError):
                worker.questions.close()


# --- in the worker -------------------------------------------------------------------------------


def work(first: Mapping[str, Any]) -> None:
    """Be a worker: make the runner that the first message names, then time it when asked."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like an answer

    def answer(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    _end_with(first["parent"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, first["cpus"])
    try:
        run, note = _make(first["factory"], first["options"])
        for _ in range(4):
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if seconds > 4 * SLOW_SECONDS:
                break
        answer({"note": note, "seconds": seconds})
        for line in sys.stdin:
            turn = json.loads(line)
            if turn["warm"]:
                run()  # the caches are cold: another process has just run here
            times = []
            for _ in range(turn["runs"]):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            answer({"seconds": times, "peak_memory_mb": peak_memory_mb()})
    except QCompilerError as error:
        answer({"problem": str(error)})
    except Exception as error:  # of another runtime, which must not end the comparison
        text = str(error).strip().splitlines()
        answer({"problem": f"{type(error).__name__}: {text[0][:300] if text else ''}"})


def peak_memory_mb() -> float | None:
    """Return the most memory that this process has had resident, in MB; None if unknown.

    Linux's `VmHWM` is of this program alone; `ru_maxrss` starts, in a child, from what its parent
    had.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError, ValueError):
        return None


def _end_with(parent: int) -> None:
    """Let Linux end this process when its parent ends, however that happens.

    The parent stops its workers by a signal; stopped, they would not see that nobody asks any more.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _make(factory: str, options: Mapping[str, Any]) -> tuple[Callable[[], object], str]:
    import importlib

    module, _, function = factory.partition(":")
    made: tuple[Callable[[], object], str] = getattr(importlib.import_module(module), function)(
        **options
    )
    return made
