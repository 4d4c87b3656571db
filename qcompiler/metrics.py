# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics of a model's outputs: top-k against labels, distances to the float model's outputs."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qcompiler.errors import DataError, UsageError
from qcompiler.types import Array

Outputs = Mapping[str, Array]
MetricFn = Callable[[Outputs, Mapping[str, Array]], float]
"""metric(outputs by name, arrays of the sample set that are not inputs) -> score."""

SQNR_CEILING = 120.0
"""dB; equal outputs count as this, so that differences stay finite. float32 itself has ~140."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric and how to read it.

    Attributes:
        name: What the user asked for.
        higher_is_better: Direction.
        points: Factor from a difference to points of a budget: 100 for shares (percentage points).
        needs_reference: Whether it compares with the float model's outputs.
        built_in: Whether it is one of ours, not a function of the user's.
        score: Outputs, extra sample arrays and reference outputs -> score.
    """

    name: str
    higher_is_better: bool
    points: float
    needs_reference: bool
    score: Callable[[Outputs, Mapping[str, Array], Outputs | None], float]
    built_in: bool = True

    def drop(self, before: float, after: float) -> float:
        """Return by how many points `after` is worse than `before` (negative: better)."""
        worse = before - after if self.higher_is_better else after - before
        return worse * self.points


def metric_of(name: str) -> Metric:
    """Return the metric of that name: top1, top5, mse, cosine, sqnr, kl, or `module:function`.

    A function gets (outputs, samples) and returns a float, higher meaning better unless it has a
    true attribute `lower_is_better`; a difference of it counts in its own unit.

    Raises:
        UsageError: Unknown name, or a function that cannot be imported.
    """
    if name in ("top1", "top5"):
        k = int(name[3:])
        return Metric(name, True, 100.0, False, lambda o, s, r: top_k(o, s, r, k))
    distances: dict[str, tuple[Callable[[Outputs, Outputs], float], bool]] = {
        "mse": (mse, False), "cosine": (cosine, True), "sqnr": (sqnr, True), "kl": (kl, False)
    }  # fmt: skip
    if name in distances:
        fn, higher = distances[name]
        return Metric(name, higher, 1.0, True, lambda o, s, r: fn(o, _required(name, r)))
    if ":" in name:
        custom = _imported(name)
        higher = not getattr(custom, "lower_is_better", False)
        return Metric(name, higher, 1.0, False, lambda o, s, r: _called(name, custom, o, s), False)
    raise UsageError(
        f"unknown metric {name!r}: expected top1, top5, mse, cosine, sqnr, kl or module:function"
    )


def _imported(name: str) -> MetricFn:
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:  # a script's own folder is not on the path of `qcompile`
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"metric {name!r} cannot be imported: {error}") from None
    if not callable(found):
        raise UsageError(f"metric {name!r} is not a function")
    fn: MetricFn = found
    return fn


def _called(name: str, fn: MetricFn, outputs: Outputs, samples: Mapping[str, Array]) -> float:
    try:
        return float(fn(outputs, samples))
    except Exception as error:  # the user's code: whatever it raises is about their metric
        raise DataError(f"metric {name!r} failed: {type(error).__name__}: {error}") from error


def _required(name: str, reference: Outputs | None) -> Outputs:
    if reference is None:
        raise UsageError(f"metric {name} compares with the float model, which is not given")
    return reference


def labels_of(label: Array, count: int) -> Array:
    """Return the array `label` as [count] class ids.

    Raises:
        DataError: Another number of labels than samples, or no integers.
    """
    labels = np.asarray(label).reshape(-1)
    if labels.size != count:
        raise DataError(f"{labels.size} labels for {count} samples", value="label")
    if labels.dtype.kind not in "iu":
        raise DataError(f"labels are {labels.dtype}, expected integer class ids", value="label")
    return labels


def top_k(
    outputs: Outputs, samples: Mapping[str, Array], reference: Outputs | None, k: int
) -> float:
    """Return the share of samples whose class is among the k greatest scores.

    The class is `label`, or without labels the float model's first choice. Among equal scores the
    lower class id comes first.

    Raises:
        DataError: Neither labels nor a reference, or a number of labels that does not fit.
    """
    name, scores = _scores(outputs)
    n = len(scores)
    if "label" in samples:
        labels = labels_of(samples["label"], n)
    elif reference is not None:
        labels = _scores(reference)[1].argmax(1)
    else:
        raise DataError(
            f"top{k} needs an array 'label' in the samples, or the float model to compare with"
        )
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise DataError(
            f"labels run from {labels.min()} to {labels.max()}, output {name!r} has "
            f"{scores.shape[1]} classes",
            value="label",
        )
    first = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((first == labels[:, None]).any(1).mean())


def _scores(outputs: Outputs) -> tuple[str, Array]:
    """Return (name, scores [N, classes]) of the output that scores classes."""
    found = [
        (name, a.reshape(len(a), -1))
        for name, a in outputs.items()
        if a.ndim >= 2 and a.dtype.kind == "f" and max(a.shape[1:]) == math.prod(a.shape[1:]) > 1
    ]
    if len(found) != 1:
        shapes = ", ".join(f"{n} {list(a.shape)}" for n, a in outputs.items())
        raise DataError(
            f"top-k needs one output [N, classes]; the model returns {shapes}",
            hint="use a metric module:function",
        )
    return found[0]


def _pairs(outputs: Outputs, reference: Outputs) -> list[tuple[Array, Array]]:
    return [
        (np.asarray(a, np.float64), np.asarray(reference[name], np.float64))
        for name, a in outputs.items()
    ]


def mse(outputs: Outputs, reference: Outputs) -> float:
    """Return the mean squared difference, averaged over the outputs."""
    return float(np.mean([np.mean((a - b) ** 2) for a, b in _pairs(outputs, reference)]))


def cosine(outputs: Outputs, reference: Outputs) -> float:
    """Return the mean cosine between each sample's output and the float model's."""
    found = []
    for a, b in _pairs(outputs, reference):
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        same = (a == b).all(1)
        found.append(np.where(same, 1.0, (a * b).sum(1) / np.where(norm == 0, 1.0, norm)).mean())
    return float(np.mean(found))


def sqnr(outputs: Outputs, reference: Outputs) -> float:
    """Return 10 log10(sum y^2 / sum (y - y')^2) in dB, averaged over the outputs."""
    found = []
    for a, b in _pairs(outputs, reference):
        noise, signal = ((a - b) ** 2).sum(), (b**2).sum()
        level = 10 * math.log10(signal / noise) if noise and signal else math.inf
        found.append(min(level, SQNR_CEILING) if not noise or signal else 0.0)
    return float(np.mean(found))


def kl(outputs: Outputs, reference: Outputs) -> float:
    """Return the KL divergence from the float model's class distributions, in nat.

    Classes lie along an output's last axis. Rows of the float model that are not negative and add
    up to 1 are probabilities, all others are scores of a softmax. Averaged over rows and outputs.
    """
    found = []
    for a, b in _pairs(outputs, reference):
        both = [v.reshape(-1, v.shape[-1]) if v.ndim else v.reshape(1, 1) for v in (a, b)]
        p = both[1]
        are = p.size and float(p.min()) >= 0 and np.allclose(p.sum(1), 1, atol=1e-3)
        log_a, log_b = (_log_probabilities(v, bool(are)) for v in both)
        found.append(float((np.exp(log_b) * (log_b - log_a)).sum(1).mean()) if p.size else 0.0)
    return max(float(np.mean(found)), 0.0)


def _log_probabilities(y: Array, are_probabilities: bool) -> Array:
    if are_probabilities:
        logs: Array = np.log(np.maximum(y, 1e-12))
        return logs
    shifted = y - y.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result
