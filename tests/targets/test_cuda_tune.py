# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Tuning tiles on the emulated GPU: what is measured is recorded, resumed and used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_emulator import emulator

from qcompiler import cuda_driver
from qcompiler.errors import TuningError, UnsupportedByTargetError
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.records import Record, RecordFile, Records
from qcompiler.targets.cuda import backend, tune
from qcompiler.targets.cuda.arch import ARCHES
from qcompiler.tuning import Tuning
from qcompiler.types import DType, PerAxis, QuantParams, TensorType

needs_emulator = pytest.mark.skipif(
    emulator.skip_reason() is not None, reason=emulator.skip_reason() or "emulator"
)
TARGET = "cuda-sm80"
ARCH = ARCHES[TARGET]


def network() -> Graph:
    """Three products of two shapes."""
    graph = Graph("net", Stage.INTEGER)
    q = QuantParams(np.float32(0.05), np.int32(3), DType.UINT8, 0, 255)
    v = graph.add_input("x", TensorType((24, 64), DType.UINT8, q))
    for i, columns in enumerate((64, 64, 32)):
        data = np.arange(64 * columns).reshape(64, columns) % 11 - 5
        wq = QuantParams(
            np.full(columns, 0.01), np.zeros(columns), DType.INT8, -127, 127, PerAxis(1)
        )
        w = graph.constant(data.astype(np.int8), "w", wq)
        out = TensorType((24, columns), DType.UINT8, q)
        v = graph.add("qmatmul", [v, w], types=[out], name=f"product{i}").output
    graph.set_outputs([("y", v)])
    return graph


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure little: what an emulated GPU takes means nothing."""
    monkeypatch.setattr(tune, "find_nvcc", lambda: None)
    monkeypatch.setattr(tune, "_ROUNDS", 1)
    monkeypatch.setattr(tune, "_REPEAT", 1)
    monkeypatch.setattr(tune, "_BATCH", 2)


@needs_emulator
def test_products_are_measured_in_turn_and_recorded(quick: None, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    made = backend.make(TARGET)
    with emulator.driver_environment():
        outcome = made.tune(network(), Tuning(records=path, trials=3))
        assert [t.nodes for t in outcome.tasks] == [("product0", "product1"), ("product2",)]
        assert [t.trials for t in outcome.tasks] == [2, 1]
        assert outcome.machine == "emulated GPU"
        assert all(t.default_ms is not None and not t.failures for t in outcome.tasks)
        again = made.tune(network(), Tuning(records=path, trials=1))
    assert sum(t.trials for t in again.tasks) == 4  # those in the records count
    stages = [r.stage for r in RecordFile(path, TARGET).read("emulated GPU")]
    assert stages.count("trial") == 4
    assert stages.count("choice") >= 2


@needs_emulator
def test_a_tile_with_other_integers_is_a_failure(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tune.product_launch

    def broken(p: Any, arch: Any, tile: Any) -> Any:
        import dataclasses

        launch = original(p, arch, tile)
        if tile == tune.tile_of(p, arch):
            return launch
        text = launch.kernel.text.replace("int ZERO = 3", "int ZERO = 4")
        assert text != launch.kernel.text
        kernel = dataclasses.replace(launch.kernel, text=text)
        return dataclasses.replace(launch, kernel=kernel)

    monkeypatch.setattr(tune, "product_launch", broken)
    with emulator.driver_environment():
        outcome = backend.make(TARGET).tune(
            network(), Tuning(records=tmp_path / "r.jsonl", trials=2)
        )
    assert outcome.tasks[0].failures == ("wrong result: not the integers of the default",) * 2
    assert outcome.tasks[0].ratio == 1.0
    assert outcome.tasks[0].params == tune.tile_params(
        tune.tile_of(tune.collect(network(), ARCH, TARGET)[0].product, ARCH)
    )


def test_recorded_tiles_are_used() -> None:
    graph = network()
    first, second = tune.collect(graph, ARCH, TARGET)
    wanted = tune.tiles_of(first.product, ARCH)[-1]
    good = Record(first.key, "choice", tune.tile_params(wanted), time=1)
    strange = Record(second.key, "choice", {**tune.tile_params(wanted), "bm": 7}, time=1)
    made = backend.make(TARGET).with_records(Records([good, strange]))
    lowered = made.lower(graph)
    assert lowered.notes == ["tuning records were found for 2 of 3 products"]
    by_name = {step.name: step.launches[0] for step in lowered.steps}
    assert f"BM = {wanted.bm};" in by_name["product0"].kernel.text
    assert f"STAGES = {wanted.stages};" in by_name["product0"].kernel.text
    assert "BM = 7;" not in by_name["product2"].kernel.text


def test_tuning_needs_a_file() -> None:
    class Nowhere:
        records = None

    with pytest.raises(TuningError, match="needs a file for its records"):
        tune.tune_graph(network(), ARCH, TARGET, Nowhere())  # type: ignore[arg-type]


def test_tuning_goes_to_the_gpu_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = backend.make(TARGET)
    remote = Tuning(records=tmp_path / "r", trials=1, tracker="host:9190", key="gpu")
    with pytest.raises(UnsupportedByTargetError, match="not over a tracker"):
        made.tune(network(), remote)
    monkeypatch.setenv(cuda_driver.LIBCUDA, str(tmp_path / "libcuda.so.1"))
    cuda_driver.driver.cache_clear()
    with pytest.raises(UnsupportedByTargetError, match="no NVIDIA driver"):
        made.tune(network(), Tuning(records=tmp_path / "r", trials=1))
