# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Fair timing: warm-up, interleaved rounds, medians and minima instead of means."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qcompiler.errors import UsageError


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of repeated runs of one thing.

    Attributes:
        median_ms: Median time of one run, milliseconds.
        min_ms: Least time, milliseconds.
        spread: Distance of the quartiles divided by the median; above 0.1 the machine was busy.
        runs: Number of runs measured.
        threads: Number of threads each run used.
    """

    median_ms: float
    min_ms: float
    spread: float
    runs: int
    threads: int

    def to_json(self) -> dict[str, float | int]:
        """Return the figures as JSON."""
        return {
            "median_ms": self.median_ms,
            "min_ms": self.min_ms,
            "spread": self.spread,
            "runs": self.runs,
            "threads": self.threads,
        }


def measure(
    runners: Mapping[str, Callable[[], object]],
    *,
    runs: int = 30,
    warmup: int = 3,
    threads: int = 1,
) -> dict[str, Timing]:
    """Time several runners side by side.

    Every round runs each of them once, in turn, so that a slow moment of the machine hits all of
    them alike and ratios stay true.

    Args:
        runners: What to time, by name.
        runs: Measured rounds.
        warmup: Rounds before the first measured one.
        threads: What to report as the number of threads; each runner sees to it by itself.

    Raises:
        UsageError: `runs` below 1 or `warmup` below 0.
    """
    if runs < 1 or warmup < 0:
        raise UsageError(f"runs must be at least 1 and warmup at least 0, got {runs} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for index in range(warmup + runs):
        for name, run in runners.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if index >= warmup:
                seconds[name].append(elapsed)
    timings = {}
    for name, values in seconds.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        timings[name] = Timing(
            median_ms=float(median) * 1e3,
            min_ms=min(values) * 1e3,
            spread=float((high - low) / median) if median else 0.0,
            runs=runs,
            threads=threads,
        )
    return timings


def block(run: Callable[[], object], *, runs: int, warmup: int) -> list[float]:
    """Return the seconds of each of `runs` runs, one after another, after `warmup` unmeasured ones.

    For runners that disturb each other's next run (thread pools that spin), where `measure` would
    blame the wrong one: time blocks of each in turn, with a pause between.
    """
    seconds = []
    for index in range(warmup + runs):
        start = time.perf_counter()
        run()
        if index >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds


_PAUSE = 0.015  # seconds
_BLOCK_SECONDS = 3e-3
_MOST_RUNS = 100
_LEAST_ROUNDS = 2


def enough_runs(run: Callable[[], object], least: int) -> int:
    """Return how many runs make a block of some milliseconds: short ones are noisier."""
    run()
    took = min(block(run, runs=2, warmup=0))
    return int(min(max(_BLOCK_SECONDS / max(took, 1e-7), least), _MOST_RUNS))


def in_turn(
    runners: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    runs: int = 6,
    seconds: float = 6.0,
    threads: int = 1,
) -> dict[str, Timing]:
    """Time runners in blocks, in turn, with pauses in which the threads of others go to sleep.

    Every latency that is reported, predicted or held against a limit is measured so: budgets and
    reports take the median, predictions (sums of least times of kernels) are compared with the
    least.

    Args:
        runners: What to time, by name.
        rounds: Blocks of each, at most.
        runs: Runs of a block, at least; short ones get more.
        seconds: After which no further round begins, apart from the first two.
        threads: What to report as the number of threads.
    """
    found: dict[str, list[float]] = {name: [] for name in runners}
    count = {name: enough_runs(run, runs) for name, run in runners.items()}
    started = time.perf_counter()
    for index in range(rounds):
        if index >= _LEAST_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name, run in runners.items():
            time.sleep(_PAUSE)
            found[name] += block(run, runs=count[name], warmup=1)
    timings = {}
    for name, values in found.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        spread = float((high - low) / median) if median else 0.0
        timings[name] = Timing(float(median) * 1e3, min(values) * 1e3, spread, len(values), threads)
    return timings
