# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Scores of groups of samples: an average over all of them can hide that one group lost a lot.

Two arrays beside the inputs group the samples: `slice` (text, integers or booleans, one per sample)
as the user likes, and for the built-in metrics the integer `label` by class. A group of fewer than
`MINIMUM` samples is scored and listed, but no limit binds it: one changed answer among five samples
would be 20 points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from qcompiler.errors import DataError
from qcompiler.metrics import Metric, Outputs
from qcompiler.types import Array

MINIMUM = 10
"""Samples that a group needs to be held against a limit."""

Kind = Literal["class", "slice"]
Number = float


@dataclass(frozen=True, slots=True)
class SliceScore:
    """The score of one group.

    Attributes:
        kind: "class" for the samples of one label, "slice" for a group that the user named.
        name: The label, or the name.
        samples: Number of samples.
        float: Score of the float model; None without it, or where the metric gives no number.
        compiled: Score of the compiled model, likewise.
        drop: Loss in points of the metric, likewise.
        binds: Whether a limit of the drop holds for the group: it has `MINIMUM` samples and a drop.
    """

    kind: Kind
    name: str
    samples: int
    float: Number | None
    compiled: Number | None
    drop: Number | None
    binds: bool

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        return asdict(self)


def score_slices(
    metric: Metric, samples: Mapping[str, Array], compiled: Outputs, reference: Outputs | None
) -> list[SliceScore]:
    """Score a compiled model, and the float model, on every group of the samples.

    Outputs and arrays with one entry per sample are cut to the group; all others stay whole.

    Args:
        metric: The metric.
        samples: Arrays of the sample set that are not inputs, by name.
        compiled: Outputs of the compiled model on all samples, by name.
        reference: Outputs of the float model, or None.

    Returns:
        User-named groups first, then classes, each in the order of their names.

    Raises:
        DataError: `slice` does not give one name per sample, or the metric fails on a group.
    """
    count = max((len(a) for a in compiled.values() if a.ndim), default=0)
    found: list[SliceScore] = []
    for kind, keys in _groupings(metric, samples, count):
        for key in np.unique(keys):
            where = np.flatnonzero(keys == key)
            found.append(_scored(metric, kind, _name(key), where, samples, compiled, reference))
    return found


def check_slices(metric: Metric, samples: Mapping[str, Array], count: int) -> None:
    """Check that the array `slice`, where there is one, names a group for each of the samples.

    Raises:
        DataError: It does not.
    """
    _groupings(metric, samples, count)


def worst(found: list[SliceScore]) -> SliceScore | None:
    """Return the group with the largest drop among those that limits bind, or None."""
    binding = [s for s in found if s.binds and s.drop is not None]
    return max(binding, key=lambda s: s.drop or 0.0, default=None)


def _groupings(
    metric: Metric, samples: Mapping[str, Array], count: int
) -> list[tuple[Kind, Array]]:
    """Return (kind, the key of each sample) for every way of grouping."""
    groups: list[tuple[Kind, Array]] = []
    if "slice" in samples:
        names = np.asarray(samples["slice"])
        if names.dtype.kind not in "biuSU":
            raise DataError(
                f"'slice' is {names.dtype}, expected text or integers: the group of each sample",
                value="slice",
            )
        if names.shape not in ((count,), (count, 1)):
            raise DataError(
                f"'slice' has shape {list(names.shape)}, expected [{count}]: one name per sample",
                value="slice",
            )
        groups.append(("slice", names.reshape(-1)))
    labels = np.asarray(samples.get("label", ()))
    # What a metric of the user's own means on samples of one class only the user knows.
    if metric.built_in and labels.size == count and labels.dtype.kind in "iu" and count:
        groups.append(("class", labels.reshape(-1)))
    return groups


def _name(key: Any) -> str:
    value = key.item()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _scored(
    metric: Metric,
    kind: Kind,
    name: str,
    where: Array,
    samples: Mapping[str, Array],
    compiled: Outputs,
    reference: Outputs | None,
) -> SliceScore:
    total = max(len(a) for a in compiled.values() if a.ndim)

    def cut(arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {k: a[where] if a.ndim and len(a) == total else a for k, a in arrays.items()}

    extras, ours = cut(samples), cut(compiled)
    theirs = None if reference is None else cut(reference)
    try:
        after = _finite(metric.score(ours, extras, theirs))
        before = None if theirs is None else _finite(metric.score(theirs, extras, theirs))
    except DataError as error:
        if len(where) >= MINIMUM:
            raise DataError(f"{kind} {name!r}: {error.message}", value=error.value) from error
        after = before = None  # too few samples for this metric, and no limit binds them
    drop = None if before is None or after is None else metric.drop(before, after)
    binds = drop is not None and len(where) >= MINIMUM
    return SliceScore(kind, name, len(where), before, after, drop, binds)


def _finite(score: float) -> float | None:
    return float(score) if math.isfinite(score) else None
