# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Sample sets, batching, metrics and evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qcompiler.data import (
    Budget,
    Evaluation,
    InputSpec,
    compare,
    evaluate,
    load_samples,
)
from qcompiler.errors import CalibrationError, DataError, UsageError
from qcompiler.metrics import SQNR_CEILING, metric_of
from qcompiler.types import DType

X = InputSpec("x", (2, 3), DType.FLOAT32, 0)
IDS = InputSpec("ids", (2, 4), DType.INT64, 0)
STATE = InputSpec("h", (1, 1, 5), DType.FLOAT32, None)


def rows(n: int, width: int = 3) -> np.ndarray:
    return np.arange(n * width, dtype=np.float32).reshape(n, width)


def batches(source, *specs, **kw):
    return list(load_samples(source).batches(specs, **kw))


# -------------------------------------------------------------------------------- sources


@pytest.fixture
def file(tmp_path):
    np.savez(tmp_path / "a.npz", x=rows(4), label=np.arange(4))
    return tmp_path / "a.npz"


def test_sources_hold_the_same(file, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    np.savez(folder / "1.npz", x=rows(4)[2:], label=np.arange(2, 4))
    np.savez(folder / "0.npz", x=rows(4)[:2], label=np.arange(2))
    parts = [{"x": rows(4)[i : i + 2], "label": np.arange(i, i + 2)} for i in (0, 2)]
    sources = [
        file,
        str(file),
        folder,
        {"x": rows(4), "label": np.arange(4)},
        parts,
        (p for p in parts),
        load_samples(file),
    ]
    for source in sources:
        samples = load_samples(source)
        for _ in range(2):  # repeatable
            got = list(samples.batches([X]))
            assert len(got) == 2
            np.testing.assert_array_equal(np.concatenate([b.inputs["x"] for b in got]), rows(4))
            np.testing.assert_array_equal(samples.extras([X])["label"], np.arange(4))


def test_a_generator_is_read_once():
    runs = []

    def samples():
        for i in range(3):
            runs.append(i)
            yield {"x": rows(2) + i}

    held = load_samples(samples())
    assert len(list(held.batches([X]))) == len(list(held.batches([X]))) == 3
    assert runs == [0, 1, 2]


def test_digest_depends_on_names_dtypes_shapes_and_elements():
    digests = [
        load_samples(s).digest()
        for s in (
            {"x": rows(2)},
            {"y": rows(2)},
            {"x": rows(2).astype(np.float64)},
            {"x": rows(2).reshape(3, 2)},
            {"x": rows(2) + 1},
        )
    ]
    assert len(set(digests)) == 5
    assert load_samples({"x": rows(2)}).digest() == digests[0]
    assert (
        load_samples([{"b": rows(1), "a": rows(2)}]).digest()
        == load_samples([{"a": rows(2), "b": rows(1)}]).digest()
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none.npz", "no sample file"),
        (lambda p: p, "holds no .npz files"),
        (lambda p: 5, "samples cannot be read from a int"),
    ],
)
def test_bad_sources(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        load_samples(make(tmp_path))


def test_damaged_files(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(DataError, match=r"cannot read the samples .*a\.npz"):
        batches(tmp_path / "a.npz", X)
    np.savez(tmp_path / "b.npz", x=np.array([{}], object))
    with pytest.raises(DataError, match=r"cannot read the samples .*b\.npz"):
        batches(tmp_path / "b.npz", X)
    with open(tmp_path / "c.npz", "wb") as f:
        np.save(f, rows(2))
    with pytest.raises(DataError, match=r"c\.npz' is a single array"):
        batches(tmp_path / "c.npz", X)


def test_elements_that_are_no_dicts():
    with pytest.raises(DataError, match="expected dicts of arrays, got a ndarray"):
        batches([rows(2)], X)
    with pytest.raises(DataError, match="'x' is not a numeric array"):
        batches([{"x": object()}], X)


# ------------------------------------------------------------------------------- batching


def test_the_last_batch_is_filled_with_its_last_sample():
    got = batches({"x": rows(5)}, X)
    assert [(b.samples, b.size) for b in got] == [(2, 2), (2, 2), (1, 2)]
    np.testing.assert_array_equal(got[2].inputs["x"], rows(5)[[4, 4]])


def test_one_axis_more_holds_whole_inputs():
    got = batches({"x": rows(6).reshape(3, 2, 3)}, X)
    assert len(got) == 3
    np.testing.assert_array_equal(got[1].inputs["x"], rows(6)[2:4])


def test_a_state_given_once_serves_every_run():
    h = np.ones((1, 1, 5), np.float32)
    got = batches({"x": rows(4), "h": h}, X, STATE)
    assert len(got) == 2
    for b in got:
        np.testing.assert_array_equal(b.inputs["h"], h)
    per_run = np.stack([h, 2 * h])
    got = batches({"x": rows(4), "h": per_run}, X, STATE)
    assert [float(b.inputs["h"].max()) for b in got] == [1.0, 2.0]


def test_values_keep_their_meaning():
    got = batches({"x": rows(2).astype(np.float64), "ids": np.ones((2, 4), np.int32)}, X, IDS)
    assert got[0].inputs["x"].dtype == np.float32
    assert got[0].inputs["ids"].dtype == np.int64


@pytest.mark.parametrize(
    ("samples", "message", "hint"),
    [
        ({"X": rows(2)}, "lacks the model input x: it holds X", "takes x float32[2, 3]"),
        ({}, "lacks the model input x: it holds nothing", "freeze an input"),
        ({"x": rows(2, 4)}, r"'x' has shape \[2, 4\], expected \[N, 3\]", None),
        ({"x": rows(2)[0]}, r"'x' has shape \[3\], expected \[N, 3\]", None),
        ({"x": rows(2).astype(np.uint8)}, "'x' is uint8, the model takes float32", "silently"),
        ({"x": rows(2) > 1}, "'x' is bool, the model takes float32", None),
        ({"x": rows(0)}, "holds no samples", "at least one sample"),
        ({"x": rows(2) * np.nan}, r"'x' holds NaN or infinity, first at index \[0, 0\]", None),
    ],
)
def test_samples_that_do_not_fit(samples, message, hint):
    for kind in (DataError, CalibrationError):
        with pytest.raises(kind, match=message) as caught:
            batches(samples, X, error=kind)
        assert (hint or "") in (caught.value.hint or "")


def test_several_missing_inputs_are_listed():
    with pytest.raises(DataError, match="lacks the model inputs x, ids: it holds label"):
        batches({"label": np.arange(2)}, X, IDS)


def test_different_numbers_of_samples():
    with pytest.raises(DataError, match="different numbers of samples: x 3, ids 4"):
        batches({"x": rows(3), "ids": np.ones((4, 4), np.int64)}, X, IDS)


def test_integers_that_do_not_fit():
    small = InputSpec("x", (1, 3), DType.INT8, 0)
    with pytest.raises(DataError, match="'x' is int64, the model takes int8"):
        batches({"x": np.full((1, 3), 300)}, small)


# -------------------------------------------------------------------------------- metrics


SCORES = np.array([[1, 5, 2, 0], [9, 1, 8, 0], [0, 0, 0, 0]], np.float32)


def score(metric: str, outputs, samples=None, reference=None) -> float:
    return metric_of(metric).score(outputs, samples or {}, reference)


def test_top_k():
    labels = {"label": np.array([1, 2, 0])}
    assert score("top1", {"y": SCORES}, labels) == pytest.approx(2 / 3)
    assert score("top5", {"y": SCORES}, labels) == 1.0
    assert score("top1", {"y": SCORES.reshape(3, 4, 1, 1)}, labels) == pytest.approx(2 / 3)


def test_top1_without_labels_is_agreement_with_float():
    other = SCORES.copy()
    other[0, 2] = 7
    assert score("top1", {"y": SCORES}, {}, {"y": other}) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("outputs", "samples", "message"),
    [
        ({"y": SCORES}, {}, "needs an array 'label'"),
        ({"y": SCORES}, {"label": np.arange(4)}, "4 labels for 3 samples"),
        ({"y": SCORES}, {"label": np.array([0.0, 1, 2])}, "labels are float64"),
        (
            {"y": SCORES},
            {"label": np.array([0, 1, 9])},
            "run from 0 to 9, output 'y' has 4 classes",
        ),
        ({"y": SCORES, "z": SCORES}, {"label": np.arange(3)}, "needs one output"),
        ({"y": SCORES[:, 0]}, {"label": np.arange(3)}, r"the model returns y \[3\]"),
    ],
)
def test_top_k_that_cannot_be_computed(outputs, samples, message):
    with pytest.raises(DataError, match=message):
        score("top1", outputs, samples)


def test_distances():
    a, b = {"y": SCORES}, {"y": SCORES + np.float32(1)}
    assert score("mse", b, {}, a) == 1.0
    assert score("mse", a, {}, a) == 0.0
    assert score("cosine", a, {}, a) == 1.0
    assert score("cosine", {"y": -SCORES[:2]}, {}, {"y": SCORES[:2]}) == pytest.approx(-1.0)
    assert score("sqnr", b, {}, a) == pytest.approx(10 * math.log10((SCORES**2).sum() / 12))
    assert score("sqnr", a, {}, a) == SQNR_CEILING
    p = np.exp(SCORES) / np.exp(SCORES).sum(1, keepdims=True)
    q = np.exp(SCORES + 2) / np.exp(SCORES + 2).sum(1, keepdims=True)
    assert score("kl", {"y": SCORES + 2}, {}, {"y": SCORES}) == pytest.approx(0, abs=1e-9)
    other = SCORES[:, ::-1]
    wrong = np.exp(other) / np.exp(other).sum(1, keepdims=True)
    expected = float((p * np.log(p / wrong)).sum(1).mean())
    assert score("kl", {"y": other}, {}, {"y": SCORES}) == pytest.approx(expected, rel=1e-5)
    assert score("kl", {"y": wrong}, {}, {"y": q}) == pytest.approx(expected, rel=1e-5)
    assert metric_of("kl").drop(0.0, 0.25) == 0.25
    with pytest.raises(UsageError, match="metric mse compares with the float model"):
        score("mse", a)


@pytest.mark.parametrize(
    ("metric", "before", "after", "drop"),
    [("top1", 0.9, 0.89, 1.0), ("mse", 0.0, 0.5, 0.5), ("cosine", 1.0, 0.9, 0.1)],
)
def test_drop_in_points(metric, before, after, drop):
    assert metric_of(metric).drop(before, after) == pytest.approx(drop)


def test_custom_metric(tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text(
        "def width(outputs, samples):\n    return outputs['y'].shape[1] + samples['k'][0]\n"
        "def error(outputs, samples):\n    return 1.0\n"
        "error.lower_is_better = True\nvalue = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert score("my_metric:width", {"y": SCORES}, {"k": np.array([2])}) == 6.0
    assert metric_of("my_metric:error").drop(1.0, 1.5) == 0.5
    for name, message in (
        ("my_metric:none", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        ("my_metric:value", "is not a function"),
        ("accuracy", "unknown metric 'accuracy': expected top1"),
    ):
        with pytest.raises(UsageError, match=message):
            Evaluation({"x": rows(2)}, name)


# ------------------------------------------------------------------------------- evaluation


class Model:
    """Doubles its input; a stand-in for a compiled model."""

    inputs = {"x": X}  # noqa: RUF012
    outputs: dict[str, InputSpec] = {}  # noqa: RUF012

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = np.float32(factor)

    def __call__(self, inputs):
        assert inputs["x"].shape == (2, 3)
        return {"y": inputs["x"] * self.factor, "total": inputs["x"].sum()}


class Classifier(Model):
    def __call__(self, inputs):
        return {"y": inputs["x"] * self.factor}


def test_evaluate_cuts_off_filled_rows():
    e = Evaluation({"x": rows(5), "label": np.array([2, 2, 2, 2, 0])}, "top1")
    assert evaluate(Classifier(), e) == pytest.approx(0.8)
    assert evaluate(Classifier(), e, inputs=[X]) == pytest.approx(0.8)


def test_compare():
    labelled = {"x": rows(5), "label": np.array([2, 2, 2, 2, 0])}
    found = compare(Classifier(-1.0), Classifier(), Evaluation(labelled, "top1"))
    assert found["name"] == "top1"
    assert (found["float"], found["compiled"], found["drop"]) == pytest.approx((0.8, 0.2, 60.0))
    assert found["samples"] == 5
    found = compare(Classifier(3.0), Classifier(2.0), Evaluation({"x": rows(4)}, "mse"))
    assert found["float"] == 0.0
    assert found["drop"] == pytest.approx(float((rows(4) ** 2).mean()))
    found = compare(Classifier(), None, Evaluation(labelled, "top1"))
    assert (found["float"], found["drop"]) == (None, None)


def test_outputs_that_are_not_per_sample_are_stacked(tmp_path, monkeypatch):
    (tmp_path / "look_at.py").write_text(
        "def outputs(o, s):\n    return 10 * o['total'].shape[0] + o['y'].shape[0]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert evaluate(Model(), Evaluation({"x": rows(5)}, "look_at:outputs")) == 35.0


def test_evaluation_of_a_generator_repeats():
    e = Evaluation(({"x": rows(2), "label": np.array([2, 2])} for _ in range(2)), "top1")
    assert evaluate(Classifier(), e) == evaluate(Classifier(), e) == 1.0


def test_a_model_without_inputs():
    with pytest.raises(UsageError, match="does not say what inputs it takes"):
        evaluate(lambda inputs: inputs, Evaluation({"x": rows(2)}, "top1"))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_drop": -1.0}, "max_drop is -1.0"),
        ({"max_latency_ms": 0}, "max_latency_ms is 0, expected a number above 0"),
        ({"max_size_mb": math.inf}, "max_size_mb is inf, expected a finite number"),
        ({"max_drop": "much"}, "max_drop is 'much'"),
    ],
)
def test_budget_limits(limits, message):
    with pytest.raises(UsageError, match=message):
        Budget(**limits)


def test_budget():
    assert Budget() == Budget(None, None, None)
    assert Budget(max_drop=0).max_drop == 0
