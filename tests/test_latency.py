# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The latency table: its text form, what the records keep, and how it becomes a problem."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qcompiler import benchmark
from qcompiler.assign import solve, totals
from qcompiler.cpu import host_cpu
from qcompiler.decisions import FLOAT, INTEGER, Network, network_of
from qcompiler.errors import UsageError
from qcompiler.latency import KernelTime, LatencyTable, measure_models
from qcompiler.plan import PrecisionPlan
from qcompiler.records import RecordFile
from qcompiler.registry import get_target
from qcompiler.search import Curve
from qcompiler.types import Precision
from qcompiler.workshop import Workshop, prepare

pytestmark = [pytest.mark.timed, pytest.mark.isa("x86-avx2")]

HYBRID = Path(__file__).parents[1] / "models" / "digits_hybrid"
BOTH = [Precision.W8A8, Precision.W8A7, Precision.FP32]


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    prepared = prepare(HYBRID / "model.onnx", calibration=HYBRID / "calib.npz")
    return Workshop(prepared, get_target("x86-avx2"))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RecordFile:
    return RecordFile(tmp_path_factory.mktemp("records") / "r.jsonl", "x86-avx2")


@pytest.fixture(scope="module")
def table(workshop: Workshop, records: RecordFile) -> LatencyTable:
    return workshop.latency_table(BOTH, records)


@pytest.fixture(scope="module")
def network(workshop: Workshop, table: LatencyTable) -> Network:
    return network_of(workshop.prepared.graph, table, BOTH)


def test_every_region_has_a_time(table: LatencyTable) -> None:
    assert set(table.models) == {"w8a8", "w8a7", "fp32"}
    assert table.measured > 20
    assert table.reused == 0
    for model in table.models.values():
        assert model.calls == len([r for r in model.regions if r.seconds is not None])
        assert all(r.seconds is not None and r.seconds > 0 for r in model.regions)
        assert model.seconds is not None
        assert model.seconds > model.kernels * 0.5
        assert sum(r.size for r in model.regions) < model.size
    assert table.overhead >= 0
    assert table.cast("quantize", (1, 8, 8, 16)) > 0
    assert table.cast("quantize", (4, 8, 8, 16)) > table.cast("quantize", (1, 8, 8, 16))
    assert table.cast("nothing", (1,)) == 0.0


def test_the_table_survives_the_way_through_a_file(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    found = LatencyTable.load(path)
    for name, model in table.models.items():
        same = found.models[name]
        assert [(r.name, r.ops, r.nodes, r.size) for r in same.regions] == [
            (r.name, r.ops, r.nodes, r.size) for r in model.regions
        ]
        assert [r.seconds for r in same.regions] == pytest.approx(
            [r.seconds for r in model.regions]
        )
        assert (same.calls, same.size) == (model.calls, model.size)
        assert same.seconds == pytest.approx(model.seconds)
    assert found.casts.keys() == table.casts.keys()
    assert found.overhead == pytest.approx(table.overhead, abs=1e-12)
    with pytest.raises(UsageError, match="not a latency table of format 1"):
        LatencyTable.from_json({"format": 2})
    with pytest.raises(UsageError, match="latency table is damaged"):
        LatencyTable.from_json({"format": 1})
    with pytest.raises(UsageError, match="cannot read the latency table"):
        LatencyTable.load(tmp_path / "none.json")


def test_what_the_records_hold_is_not_measured_again(
    workshop: Workshop, table: LatencyTable, records: RecordFile
) -> None:
    assert len(records.read(host_cpu().name)) == table.measured
    again = workshop.latency_table(BOTH, records)
    assert again.measured == 0
    assert again.reused == table.measured
    for name, model in table.models.items():
        same = again.models[name]
        assert [r.seconds for r in same.regions] == pytest.approx(
            [r.seconds for r in model.regions], rel=1e-4
        )
    anew = workshop.latency_table([Precision.FP32], records, fresh=True)
    assert anew.measured > 0
    assert anew.reused == 0


def test_equal_kernels_are_measured_together(workshop: Workshop) -> None:
    built = workshop.uniform(Precision.FP32).built
    symbols = [s for r in built.regions for s in r.symbols]
    assert set(built.workloads) >= set(symbols)
    assert len(set(built.workloads.values())) < len(symbols)
    trial = workshop.uniform(Precision.FP32)
    found = measure_models({"float": (trial.built, trial.compiled)})
    by_symbol: dict[str, set[float | None]] = {}
    for region, times in zip(built.regions, found.models["float"].regions, strict=True):
        by_symbol.setdefault(region.symbols[0], set()).add(times.seconds)
    assert all(len(s) == 1 for s in by_symbol.values())


# ------------------------------------------------------------------------------ the problem


def test_uniform_choices_sum_to_what_was_measured(network: Network, table: LatencyTable) -> None:
    for precision in (INTEGER, FLOAT):
        choices = {
            i.name: precision if precision in i.options else INTEGER for i in network.problem.items
        }
        expected = table.expected(precision)
        assert totals(network.problem, choices).latency == pytest.approx(expected, rel=0.02)


def test_any_solution_is_a_plan_that_the_passes_follow(
    network: Network, workshop: Workshop
) -> None:
    """What the problem calls integer is integer after the passes, and float stays float."""
    rng = np.random.default_rng(3)
    for _ in range(4):
        fixed = {
            name: str(rng.choice([FLOAT, INTEGER]))
            for name in network.products
            if rng.random() < 0.6
        }
        solution = solve(network.with_fixed(fixed).problem)
        assert solution is not None
        plan = workshop.quantize(network.plan(solution.choices, {})).plan
        for name in network.products:
            wanted = Precision.parse(solution.choices[name])
            assert plan.precision(name) is wanted, name
        for name in network.followers:
            is_integer = plan.precision(name).is_integer
            assert is_integer == (solution.choices[name] != FLOAT), name


def test_a_conversion_is_paid_where_neighbours_disagree(network: Network) -> None:
    name = next(n for n in network.products if "res1" in n)
    alone = {i.name: FLOAT for i in network.problem.items}
    alone[name] = INTEGER
    both = totals(network.problem, alone)
    kinds = {network.casts[k][1:] for k in both.casts}
    assert (FLOAT, INTEGER) in kinds
    assert (INTEGER, FLOAT) in kinds
    assert not totals(network.problem, dict.fromkeys(alone, FLOAT)).casts


def test_choices_of_a_plan_round_trip(network: Network) -> None:
    choices = {
        i.name: FLOAT if n % 3 == 0 else INTEGER for n, i in enumerate(network.problem.items)
    }
    plan = network.plan(choices, {next(iter(choices)): "because"})
    assert isinstance(plan, PrecisionPlan)
    assert network.choices(plan) == choices
    assert plan.reason(next(iter(choices))) == "because"


def test_narrow_activations_are_shared_by_all_readers(network: Network) -> None:
    readers = [r for r in network.problem.requirements if r.forms == frozenset({"w8a7"})]
    assert readers  # query, key and value read one tensor
    one = readers[0]
    forced = network.with_fixed({one.item: "w8a7", one.any_of[0][0]: INTEGER})
    assert solve(forced.problem) is None


# ------------------------------------------------------------------------------ loss and drop


def test_the_curve_never_falls_and_inverts() -> None:
    curve = Curve()
    assert curve.drop(1.0) is None
    assert curve.loss(1.0, 5.0) == 5.0
    for loss, drop in ((1e-3, 0.5), (1e-4, 0.6), (1e-2, 2.0), (0.0, 0.0)):
        curve.add(loss, drop)
    curve.add(None, 1.0)
    curve.add(float("inf"), 1.0)
    drops = [curve.drop(v) for v in np.geomspace(1e-6, 1e-1, 60)]
    assert all(d is not None for d in drops)
    assert drops == sorted(drops)  # type: ignore[type-var]
    assert curve.drop(1e-4) == pytest.approx(0.55)  # the two that contradict are pooled
    assert curve.drop(1e-2) == pytest.approx(2.0)
    limit = curve.loss(1.0, 1.0)
    assert 1e-3 < limit < 1e-2
    assert curve.drop(limit) == pytest.approx(1.0, abs=1e-6)
    assert curve.loss(5.0, 1e-2) == 1e-2


def test_kernel_times_are_plain() -> None:
    assert KernelTime(1.0) == KernelTime(1.0, 0.0)


def test_runners_are_timed_in_turn() -> None:
    calls: list[str] = []

    def runner(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            time.sleep(seconds)

        return run

    found = benchmark.in_turn({"a": runner("a", 1e-3), "b": runner("b", 2e-3)}, rounds=3, runs=4)
    assert found["a"].runs >= 12
    assert 1 <= found["a"].min_ms <= found["a"].median_ms
    assert found["b"].min_ms >= 2
    blocks = [name for name, _ in itertools.groupby(calls)]
    assert blocks == ["a", "b"] * 4  # once to see how many runs a block has, then three rounds
    late = benchmark.in_turn({"a": runner("a", 1e-3)}, rounds=50, runs=3, seconds=0.0)
    assert late["a"].runs == 2 * 3  # two rounds in any case, no more
