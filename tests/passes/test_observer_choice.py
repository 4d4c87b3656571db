# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The observer of each activation is the one whose range hurts its readers least."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qcompiler.data import Batch, load_samples
from qcompiler.ir import Graph
from qcompiler.passes.calibrate import Calibrate, CalibrationSet, CalibrationTable
from qcompiler.passes.observer_choice import CANDIDATES, candidate_ranges, choose_observers
from qcompiler.passes.observers import Observer, TensorStats
from qcompiler.passmanager import PassContext, PassManager, parse_pass
from qcompiler.types import Array


def summary(x: Array) -> TensorStats:
    stats = Observer("mse").start("x")
    stats.add(x, 0.9)
    return stats


@pytest.fixture
def net(load_text: Callable[..., Graph]) -> Graph:
    """Channel 0 of x holds rare outliers: w needs them, v ignores them."""
    w = np.ones((2, 4, 1, 1), np.float32)
    w[:, 0] = 30.0
    v = np.ones((2, 4, 1, 1), np.float32)
    v[:, 0] = 0.0
    return load_text(
        """(float[1,4,8,8] x, float[1,4,8,8] z) => (float[1,2,8,8] y, float[1,2,8,8] u) {
        y = Conv (x, w) u = Conv (z, v) }""",
        w=w,
        v=v,
    )


@pytest.fixture
def samples(rng: np.random.Generator) -> dict[str, Array]:
    x = rng.uniform(0, 1, (12, 4, 8, 8)).astype(np.float32)
    x[:, 0] = 0.0
    x[:, 0, 0, 0] = 40.0
    return {"x": x, "z": x.copy()}


def test_the_reader_decides(net: Graph, samples: dict[str, Array]) -> None:
    """The same activations get another range where the reader weighs them differently."""
    ranges = {n: candidate_ranges(summary(a), 98.0) for n, a in samples.items()}
    assert set(ranges["x"]) == set(CANDIDATES)
    batches = [Batch({n: a[i : i + 1] for n, a in samples.items()}, 1, 1) for i in range(4)]
    found = choose_observers(net, ranges, batches)
    assert ranges["x"][found["x"]][1] > 39
    assert found["z"] == "percentile"
    assert ranges["z"]["percentile"][1] < 2


def test_calibrate_auto(net: Graph, samples: dict[str, Array]) -> None:
    p = parse_pass("calibrate{observer=auto percentile=98}", {"calibrate": Calibrate})
    tables = []
    for q in (p, Calibrate()):
        ctx = PassContext()
        ctx.put(CalibrationSet.of(load_samples(samples), net))
        PassManager([q], given=tuple(ctx.artifacts)).run(net, ctx)
        tables.append(ctx.get(CalibrationTable))
        if q is p:
            assert "observers by measured error" in ctx.log[0]
            assert "percentile" in ctx.log[0]
    assert tables[0].tensors["z"].range[1] < 2
    assert tables[0].tensors["z"].bounds == tables[1].tensors["z"].bounds
