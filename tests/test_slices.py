# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Scores of classes and named groups, and the limit on the worst of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.data import Budget, Evaluation, InputSpec, check_evaluation, compare
from qcompiler.errors import DataError, UsageError
from qcompiler.metrics import metric_of
from qcompiler.slices import MINIMUM, score_slices, worst
from qcompiler.types import DType

X = InputSpec("x", (2, 3), DType.FLOAT32, 0)


class Scores:
    """A classifier that returns its input; `flip` answers wrong on the first samples it sees."""

    inputs = {"x": X}  # noqa: RUF012

    def __init__(self, flip: int = 0) -> None:
        self.flip = flip

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        y = inputs["x"].copy()
        for row in y:
            if self.flip:
                row[:] = np.roll(row, 1)
                self.flip -= 1
        return {"y": y}


def one_hot(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.eye(3, dtype=np.float32)[labels]


def samples(groups: Any, labels: np.ndarray[Any, Any] | None = None) -> dict[str, Any]:
    count = len(groups)
    labels = np.zeros(count, np.int64) if labels is None else labels
    return {"x": one_hot(labels), "label": labels, "slice": np.asarray(groups)}


def test_a_group_that_the_average_hides_is_the_worst() -> None:
    groups = ["night"] * 12 + ["day"] * 88
    found = compare(Scores(flip=6), Scores(), Evaluation(samples(groups), "top1"))
    assert found["drop"] == pytest.approx(6.0)
    assert [(s["kind"], s["name"], s["samples"]) for s in found["slices"]] == [
        ("slice", "day", 88),
        ("slice", "night", 12),
        ("class", "0", 100),
    ]
    assert found["worst_slice"]["name"] == "night"
    assert found["worst_slice"]["drop"] == pytest.approx(50.0)
    assert (found["worst_slice"]["float"], found["worst_slice"]["compiled"]) == (1.0, 0.5)


def test_classes_come_from_the_labels() -> None:
    labels = np.arange(60) % 3
    found = compare(Scores(), Scores(), Evaluation({"x": one_hot(labels), "label": labels}, "top1"))
    assert [(s["kind"], s["name"], s["samples"]) for s in found["slices"]] == [
        ("class", "0", 20),
        ("class", "1", 20),
        ("class", "2", 20),
    ]


def test_a_small_group_is_listed_but_does_not_bind() -> None:
    groups = [1] * (MINIMUM - 1) + [2] * MINIMUM
    found = compare(Scores(flip=MINIMUM - 1), Scores(), Evaluation(samples(groups), "top1"))
    by_name = {s["name"]: s for s in found["slices"] if s["kind"] == "slice"}
    assert by_name["1"]["drop"] == pytest.approx(100.0)
    assert by_name["1"]["binds"] is False
    assert by_name["2"]["binds"] is True
    assert found["worst_slice"]["kind"] == "class"  # class 0 holds all 19 samples


def test_no_group_of_enough_samples_has_no_worst() -> None:
    groups = list("abcde")
    data = {"x": one_hot(np.zeros(5, np.int64)), "slice": np.asarray(groups)}
    found = compare(Scores(), Scores(), Evaluation(data, "mse"))
    assert len(found["slices"]) == 5
    assert found["worst_slice"] is None


@pytest.mark.parametrize("metric", ["top1", "top5", "mse", "cosine", "sqnr", "kl"])
def test_every_metric_is_scored_per_group(metric: str) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 40)
    theirs = {"y": rng.standard_normal((40, 7)).astype(np.float32)}
    ours = {"y": theirs["y"] + rng.standard_normal((40, 7)).astype(np.float32)}
    groups = np.asarray([True, False] * 20)
    scorer = metric_of(metric)
    found = score_slices(scorer, {"label": labels, "slice": groups}, ours, theirs)
    named = {s.name: s for s in found if s.kind == "slice"}
    for name, where in (("True", groups), ("False", ~groups)):
        alone = scorer.score({"y": ours["y"][where]}, {"label": labels[where]},
                             {"y": theirs["y"][where]})  # fmt: skip
        assert named[name].compiled == pytest.approx(alone)
        assert named[name].drop is not None


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(0, 60))
def test_shares_of_the_groups_add_up_to_the_whole(groups: list[str], wrong: int) -> None:
    n = len(groups)
    theirs = {"y": one_hot(np.zeros(n, np.int64))}
    ours = {"y": one_hot((np.arange(n) < wrong).astype(np.int64))}
    extras = {"label": np.zeros(n, np.int64), "slice": np.asarray(groups)}
    metric = metric_of("top1")
    found = [s for s in score_slices(metric, extras, ours, theirs) if s.kind == "slice"]
    assert sum(s.samples for s in found) == n
    total = sum((s.compiled or 0.0) * s.samples for s in found)
    assert total / n == pytest.approx(metric.score(ours, extras, theirs))
    least = worst(found)
    assert least is None or all((s.drop or 0) <= (least.drop or 0) for s in found if s.binds)


def test_a_metric_of_the_users_own_is_cut_to_named_groups_only(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.py").write_text(
        "def mean(o, s):\n    assert len(s['weight']) == len(o['y'])\n"
        "    return float((o['y'].sum(1) * s['weight']).mean()) + len(s['whole'])\n"
    )
    monkeypatch.chdir(tmp_path)
    data = samples(["a"] * 10 + ["b"] * 10)
    data["weight"] = np.repeat([1.0, 3.0], 10)
    data["whole"] = np.zeros(7)  # not one entry per sample: stays as it is
    found = compare(Scores(), Scores(), Evaluation(data, "pairs:mean"))
    assert [(s["kind"], s["name"], s["compiled"]) for s in found["slices"]] == [
        ("slice", "a", 8.0),
        ("slice", "b", 10.0),
    ]


def test_a_metric_that_fails_on_few_samples_has_no_score_there(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "picky.py").write_text(
        "def score(o, s):\n    if len(o['y']) < 10:\n        raise ValueError('too few')\n"
        "    if s['slice'][0] == 'bad':\n        raise ValueError('never')\n    return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    found = compare(Scores(), Scores(), Evaluation(samples(["b"] * 3 + ["a"] * 17), "picky:score"))
    assert [(s["name"], s["compiled"], s["binds"]) for s in found["slices"]] == [
        ("a", 1.0, True),
        ("b", None, False),
    ]
    with pytest.raises(DataError, match="slice 'bad': metric 'picky:score' failed"):
        compare(Scores(), Scores(), Evaluation(samples(["a"] * 3 + ["bad"] * 17), "picky:score"))


def test_a_score_that_is_no_number_is_none() -> None:
    metric = metric_of("top1")
    broken = type(metric)("own", True, 1.0, False, lambda o, s, r: math.nan)
    (found,) = score_slices(broken, {"slice": np.zeros(12, int)}, {"y": np.zeros((12, 2))}, None)
    assert (found.compiled, found.drop, found.binds) == (None, None, False)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (np.zeros(20), "'slice' is float64, expected text or integers"),
        (np.zeros(7, int), r"'slice' has shape \[7\], expected \[20\]: one name per sample"),
        (np.zeros((20, 2), int), r"'slice' has shape \[20, 2\], expected \[20\]"),
    ],
)
def test_slices_that_are_none(groups: Any, message: str) -> None:
    data = {"x": one_hot(np.zeros(20, np.int64)), "slice": groups}
    with pytest.raises(DataError, match=message):
        compare(Scores(), Scores(), Evaluation(data, "mse"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slice": np.zeros(7, int)}, r"'slice' has shape \[7\]"),
        ({"label": np.zeros(7, int)}, "7 labels for 20 samples"),
        ({"label": np.zeros(20)}, "labels are float64, expected integer class ids"),
        ({"x": np.zeros((20, 4), np.float32)}, "'x' has shape"),
        ({"x": np.full((20, 3), np.nan, np.float32)}, "holds NaN"),
    ],
)
def test_samples_that_do_not_fit_are_refused_before_compiling(
    changes: dict[str, Any], message: str
) -> None:
    data = {**samples(["a"] * 20), **changes}
    with pytest.raises(DataError, match=message):
        check_evaluation(Evaluation(data, "top1"), [X])


def test_samples_that_fit_are_let_through() -> None:
    check_evaluation(Evaluation(samples(["a"] * 21), "top1"), [X])
    check_evaluation(Evaluation([{"x": one_hot(np.zeros(2, np.int64))}], "mse"), [X])
    with pytest.raises(DataError, match="holds no samples"):
        check_evaluation(Evaluation([], "mse"), [X])


def test_without_slices_and_labels_there_are_none() -> None:
    data = {"x": one_hot(np.zeros(20, np.int64)), "score": np.zeros(20, np.float32)}
    found = compare(Scores(), Scores(), Evaluation(data, "mse"))
    assert (found["slices"], found["worst_slice"]) == ([], None)


def test_the_budget_takes_a_limit_on_the_slices() -> None:
    assert Budget(max_slice_drop=0.0).max_slice_drop == 0.0
    with pytest.raises(UsageError, match="budget max_slice_drop is -1, expected a number above 0"):
        Budget(max_slice_drop=-1)
    with pytest.raises(UsageError, match="budget max_slice_drop is nan, expected a finite"):
        Budget(max_slice_drop=math.nan)
