# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Observers against exact answers, and the calibration pass on a small graph."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.data import load_samples
from qcompiler.errors import CalibrationError, UsageError
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.numerics import choose_qparams, fake_quantize
from qcompiler.passes.calibrate import Calibrate, CalibrationSet, CalibrationTable, observed_values
from qcompiler.passes.observers import BINS, Histogram, Observer, TensorStats
from qcompiler.passmanager import ModifiedInstrument, PassContext, PassManager, parse_pass
from qcompiler.printer import digest
from qcompiler.types import DType, TensorType


def stats(observer: Observer, *arrays: np.ndarray) -> TensorStats:
    s = observer.start("t")
    for a in arrays:
        s.add(a, observer.momentum)
    return s


def chosen(kind: str, *arrays: np.ndarray, **options: float) -> tuple[float, float]:
    observer = Observer(kind, **options)
    return observer.range(stats(observer, *arrays))


def squared_error(x: np.ndarray, lo: float, hi: float) -> float:
    return float(((fake_quantize(x, choose_qparams(lo, hi)) - x) ** 2).mean())


# ------------------------------------------------------------------------------- histogram


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e2)), min_size=1, max_size=8))
def test_histogram_counts_every_element_in_its_bin(parts):
    rng = np.random.default_rng(0)
    h = Histogram()
    everything = []
    for mean, spread in parts:
        x = rng.normal(mean, spread, 200).astype(np.float32)
        h.add(x, float(x.min()), float(x.max()))
        everything.append(x)
    x = np.sort(np.concatenate(everything)).astype(np.float64)
    assert h.counts.sum() == x.size
    assert h.counts.size == BINS
    centres, counts = h.bins()
    # The n-th smallest element lies in the bin that holds the n-th count.
    at = np.searchsorted(np.cumsum(counts), np.arange(x.size), side="right")
    slack = h.width * (0.5 + 1e-3 + BINS * 2.0**-23)
    assert (np.abs(centres[at] - x) <= slack).all()


def test_histogram_resolution_does_not_depend_on_the_order():
    small, large = np.linspace(-1, 1, 500, dtype=np.float32), np.float32([900.0])
    widths = []
    for order in ((small, large), (large, small)):
        h = Histogram()
        for x in order:
            h.add(x, float(x.min()), float(x.max()))
        widths.append(h.width)
    assert max(widths) <= 2 * min(widths)
    assert max(widths) * BINS >= 901


def test_histogram_of_zeros_then_values():
    h = Histogram()
    h.add(np.zeros(5, np.float32), 0.0, 0.0)
    assert h.bins()[1].sum() == 5
    h.add(np.float32([1.0, 2.0]), 1.0, 2.0)
    centres, counts = h.bins()
    assert counts.sum() == 7
    assert counts[np.abs(centres - 0.0).argmin()] >= 5


# ------------------------------------------------------------------------------- observers


def test_minmax_and_zero():
    a, b = np.float32([1.0, 2.0]), np.float32([3.0, 1.5])
    assert chosen("minmax", a, b) == (0.0, 3.0)
    assert chosen("minmax", -a, b) == (-2.0, 3.0)


def test_moving_average():
    lo, hi = chosen("moving_average", np.float32([-1, 1]), np.float32([-3, 2]), momentum=0.75)
    assert (lo, hi) == (-1.5, 1.25)


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_percentile_against_numpy(percent, rng):
    x = rng.normal(size=50_000).astype(np.float32)
    lo, hi = chosen("percentile", *np.split(x, 10), percentile=percent)
    want = np.percentile(x, [100 - percent, percent])
    np.testing.assert_allclose((lo, hi), want, atol=0.02)
    assert chosen("percentile", x, percentile=100.0) == (x.min(), x.max())


@pytest.mark.parametrize("kind", ["mse", "entropy"])
def test_no_outliers_nothing_clipped(kind, rng):
    x = rng.uniform(-1, 1, 50_000).astype(np.float32)
    lo, hi = chosen(kind, x)
    assert lo < -0.98
    assert hi > 0.98


def test_mse_is_near_the_best_range(rng):
    x = rng.laplace(size=100_000).astype(np.float32)
    x[:3] = [80.0, -60.0, 75.0]
    lo, hi = chosen("mse", x)
    grid = [
        squared_error(x, a, b) for a in np.linspace(-60, -3, 24) for b in np.linspace(3, 80, 24)
    ]
    assert squared_error(x, lo, hi) <= 1.05 * min(grid)
    assert squared_error(x, lo, hi) < 0.9 * squared_error(x, x.min(), x.max())


def test_exact_zeros_cost_nothing(rng):
    """After a relu most elements are 0; they must not pull the range in."""
    x = np.abs(rng.normal(size=20_000)).astype(np.float32)
    full = chosen("mse", x)
    many = chosen("mse", np.concatenate([x, np.zeros(400_000, np.float32)]))
    assert many[1] == pytest.approx(full[1], rel=0.02)
    assert chosen("entropy", np.concatenate([x, np.zeros(400_000, np.float32)]))[1] > 2.5


def test_entropy_clips_a_lone_outlier(rng):
    x = rng.normal(size=100_000).astype(np.float32)
    x[0] = 50.0
    assert chosen("entropy", x)[1] < 30.0


@pytest.mark.parametrize("kind", ["minmax", "moving_average", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_constant_tensors(kind, value):
    lo, hi = chosen(kind, np.full(10, value, np.float32))
    assert lo == min(value, 0.0)
    assert hi == max(value, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_name_the_tensor(bad):
    with pytest.raises(CalibrationError, match="tensor 't' holds NaN or infinity") as caught:
        stats(Observer("minmax"), np.float32([1.0, bad]))
    assert caught.value.value == "t"


def test_mean_and_deviation(rng):
    x = rng.normal(3, 2, 10_000).astype(np.float32)
    s = stats(Observer("minmax"), x[:1000], x[1000:])
    assert s.mean == pytest.approx(float(x.mean()), rel=1e-3)
    assert s.deviation == pytest.approx(float(x.std()), rel=1e-3)
    assert s.histogram is None  # O(1) memory where no histogram is needed


def test_options_are_checked():
    with pytest.raises(UsageError, match="percentile is 20"):
        Calibrate(observer="percentile", percentile=20.0)
    with pytest.raises(UsageError, match="momentum is 1"):
        Calibrate(momentum=1.0)
    with pytest.raises(UsageError, match="unknown observer 'best'"):
        Observer("best")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ pass


def network(batch: int = 1) -> Graph:
    g = Graph("net")
    rng = np.random.default_rng(0)
    x = g.add_input("x", TensorType((batch, 8), DType.FLOAT32), 0)
    w = g.constant(rng.normal(size=(8, 8)).astype(np.float32), "w")
    h = g.add("relu", [g.add("matmul", [x, w], name="fc1").output], name="act").output
    y = g.add("matmul", [g.add("tanh", [h], name="root").output, w], name="fc2").output
    g.set_outputs([("y", y)])
    return g


def calibrated(graph: Graph, x: np.ndarray, **options: object) -> CalibrationTable:
    ctx = PassContext()
    ctx.put(CalibrationSet.of(load_samples({"x": x}), graph))
    passes = [Calibrate(**options)]
    PassManager(passes, [ModifiedInstrument()], given=(CalibrationSet,)).run(graph, ctx)
    return ctx.get(CalibrationTable)


def test_ranges_are_those_of_the_float_graph(rng):
    g = network()
    x = rng.normal(size=(20, 8)).astype(np.float32)
    table = calibrated(g, x, observer="minmax")
    assert list(table.tensors) == ["x", "act.out", "root.out"]
    seen: dict[str, list[np.ndarray]] = {}
    for row in x:
        run(g, {"x": row[None]}, observe=lambda v, a: seen.setdefault(v.name, []).append(a))
    for name, found in table.tensors.items():
        a = np.stack(seen[name])
        np.testing.assert_allclose(found.bounds, (a.min(), a.max()), rtol=1e-5, atol=1e-6)
        assert found.count == a.size
    assert table.samples == 20
    assert table.graph == digest(g)
    assert table.spec == "calibrate{observer=minmax}"


def test_every_operand_of_a_product_is_observed():
    """A plan that leaves some products float may quantize values that the full plan does not."""
    names = [v.name for v in observed_values(network())]
    assert names == ["x", "act.out", "root.out"]


def test_filled_up_rows_do_not_count(rng):
    x = rng.normal(size=(5, 8)).astype(np.float32)
    whole = calibrated(network(), x, observer="minmax")
    batched = calibrated(network(batch=4), x, observer="minmax")
    assert batched.tensors["x"].count == whole.tensors["x"].count == 40
    assert batched.samples == 5


def test_progress(rng):
    ctx = PassContext()
    g = network()
    calls: list[tuple[str, int, int]] = []
    ctx.progress = lambda *call: calls.append(call)
    ctx.put(CalibrationSet.of(load_samples({"x": np.ones((3, 8), np.float32)}), g))
    Calibrate().run(g, ctx)
    assert calls == [("calibrate", i, 3) for i in range(4)]


def test_nan_inside_the_model_names_the_tensor(rng):
    g = network()
    root = g.node("root")
    x = g.inputs[0]
    g.set_input(root, 0, g.add("log", [x], name="log", before=root).output)  # of negative numbers
    with pytest.raises(CalibrationError, match=r"tensor 'root.out' holds NaN"):
        calibrated(g, rng.normal(size=(4, 8)).astype(np.float32))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"x": np.zeros((0, 8), np.float32)}, "holds no samples"),
        ({"X": np.zeros((1, 8), np.float32)}, "lacks the model input x: it holds X"),
        ({"x": np.zeros((1, 9), np.float32)}, r"'x' has shape \[1, 9\], expected \[N, 8\]"),
        ({"x": np.zeros((1, 8), np.uint8)}, "'x' is uint8, the model takes float32"),
        ({"x": np.full((1, 8), np.inf, np.float32)}, "'x' holds NaN or infinity"),
    ],
)
def test_samples_that_do_not_fit(samples, message):
    with pytest.raises(CalibrationError, match=message):
        CalibrationSet.of(load_samples(samples), network())


def test_table_survives_json(tmp_path, rng):
    table = calibrated(network(), rng.normal(size=(6, 8)).astype(np.float32))
    table.save(tmp_path / "t.json")
    assert CalibrationTable.load(tmp_path / "t.json") == table
    assert sum(table.tensors["x"].histogram) == 48


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the calibration table"),
        ('{"format": 9}', "not a calibration table of format 1"),
        ('{"format": 1, "tensors": {"a": {}}}', "the calibration table is damaged"),
    ],
)
def test_damaged_tables(tmp_path, text, message):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        CalibrationTable.load(tmp_path / "t.json")


def test_text_form():
    p = Calibrate(observer="percentile", percentile=99.9)
    assert p.spec() == "calibrate{observer=percentile percentile=99.9}"
    assert parse_pass(p.spec(), {"calibrate": Calibrate}) == p
    assert json.dumps(CalibrationTable().to_json())
