# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Observers: streaming summaries of a tensor, and the range that quantization should cover.

Memory is O(bins) per tensor. The histogram keeps a fixed number of bins whose width is a power of
two times the first one and whose edges are multiples of the width; when a value falls outside, the
width doubles and neighbours merge, which is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from qcompiler.errors import CalibrationError, UsageError
from qcompiler.types import Array

ObserverName = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]

BINS = 4096
_LEVELS = 256  # codes of an 8-bit tensor: what clipping error is weighed against


@dataclass
class Histogram:
    """Counts of values in bins of equal width.

    Attributes:
        width: Width of a bin; 0 until a value other than 0 was seen.
        base: Index of the first bin: it starts at `base * width`.
        counts: int64 [BINS].
    """

    width: float = 0.0
    base: int = 0
    counts: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))
    zeros: int = 0

    def add(self, x: Array, lo: float, hi: float) -> None:
        """Count the elements of a flat float32 array whose least and greatest are lo and hi."""
        if lo == hi == 0.0:
            self.zeros += x.size
            return
        if self.width == 0.0:
            span = max(hi, 0.0) - min(lo, 0.0)
            self.width = 2.0 ** math.ceil(math.log2(span / (BINS - 2)))
            self.base = math.floor(min(lo, 0.0) / self.width)
        self._cover(lo, hi)
        # Every index is 0 or more, so that truncation is floor; float32 may round one past the end.
        index = (x * np.float32(1.0 / self.width) - np.float32(self.base)).astype(np.int32)
        found = np.bincount(index, minlength=BINS)
        self.counts += found[:BINS]
        self.counts[-1] += found[BINS:].sum()

    def _cover(self, lo: float, hi: float) -> None:
        """Widen the bins until they cover [lo, hi] and what was counted."""
        while True:
            first, last = math.floor(lo / self.width), math.floor(hi / self.width)
            used = np.flatnonzero(self.counts)
            if used.size:
                first = min(first, self.base + int(used[0]))
                last = max(last, self.base + int(used[-1]))
            if last - first < BINS:
                if first < self.base or last >= self.base + BINS:
                    self._shift(first)
                return
            self._merge()

    def _shift(self, base: int) -> None:
        moved = np.zeros(BINS, np.int64)
        used = np.flatnonzero(self.counts)
        moved[used + (self.base - base)] = self.counts[used]
        self.counts, self.base = moved, base

    def _merge(self) -> None:
        """Double the width; bins 2k and 2k + 1 (counted from real 0) become one."""
        odd = self.base % 2
        padded = np.concatenate([np.zeros(odd, np.int64), self.counts, np.zeros(odd, np.int64)])
        pairs = padded.reshape(-1, 2).sum(1)
        self.base = (self.base - odd) // 2
        self.counts = np.zeros(BINS, np.int64)
        self.counts[: pairs.size] = pairs
        self.width *= 2.0

    def bins(self) -> tuple[Array, Array]:
        """Return (centres, counts) of the bins in use, float64; zeros of empty batches included."""
        used = np.flatnonzero(self.counts)
        if not used.size:
            return np.zeros(1), np.full(1, max(self.zeros, 1), np.float64)
        cut = slice(int(used[0]), int(used[-1]) + 1)
        centres = (np.arange(cut.start, cut.stop) + self.base + 0.5) * self.width
        counts = self.counts[cut].astype(np.float64)
        if self.zeros:
            counts[np.abs(centres).argmin()] += self.zeros
        return centres, counts


@dataclass
class TensorStats:
    """Streaming summary of one tensor.

    Attributes:
        name: Name of the value, for messages.
        least: Least element seen.
        greatest: Greatest element seen.
        count: Elements seen.
        histogram: Counts, or None where the observer needs none.
    """

    name: str
    least: float = math.inf
    greatest: float = -math.inf
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    averages: tuple[float, float] | None = None
    histogram: Histogram | None = None

    def add(self, array: Array, momentum: float) -> None:
        """Take in the tensor of one run.

        Raises:
            CalibrationError: It holds NaN or infinity.
        """
        x = np.asarray(array, np.float32).reshape(-1)
        if not x.size:
            return
        lo, hi = float(x.min()), float(x.max())
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise CalibrationError(
                f"tensor {self.name!r} holds NaN or infinity during calibration",
                value=self.name,
                hint="check the samples and the model: a float overflow cannot be quantized",
            )
        self.least, self.greatest = min(self.least, lo), max(self.greatest, hi)
        self.count += x.size
        self.total += float(x.sum(dtype=np.float64))
        self.squares += float(np.dot(x, x))
        if self.averages is None:
            self.averages = (lo, hi)
        else:
            a, b = self.averages
            self.averages = (momentum * a + (1 - momentum) * lo, momentum * b + (1 - momentum) * hi)
        if self.histogram is not None:
            self.histogram.add(x, lo, hi)

    @property
    def mean(self) -> float:
        """Mean of the elements."""
        return self.total / max(self.count, 1)

    @property
    def deviation(self) -> float:
        """Standard deviation of the elements."""
        return math.sqrt(max(self.squares / max(self.count, 1) - self.mean**2, 0.0))


@dataclass(frozen=True)
class Observer:
    """How the range of a tensor is chosen from its summary.

    Attributes:
        kind: minmax: everything seen; moving_average: exponential average of each run's bounds;
            percentile: leaves out the share of elements beyond it on each side; entropy: least
            Kullback-Leibler divergence between the histogram and its quantized form; mse: least
            mean squared error of 8-bit quantization.
        percentile: Percent of elements to cover, for `percentile`.
        momentum: Weight of the past, for `moving_average`.
    """

    kind: ObserverName = "mse"
    percentile: float = 99.99
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.kind not in ("minmax", "moving_average", "percentile", "entropy", "mse"):
            raise UsageError(f"unknown observer {self.kind!r}")
        if not 50.0 < self.percentile <= 100.0:
            raise UsageError(f"percentile is {self.percentile}, expected a number in (50, 100]")
        if not 0.0 <= self.momentum < 1.0:
            raise UsageError(f"momentum is {self.momentum}, expected a number in [0, 1)")

    def start(self, name: str) -> TensorStats:
        """Return an empty summary with what this observer needs."""
        histogram = Histogram() if self.kind in ("percentile", "entropy", "mse") else None
        return TensorStats(name, histogram=histogram)

    def range(self, stats: TensorStats) -> tuple[float, float]:
        """Return the (least, greatest) real that quantization should cover; holds 0."""
        lo, hi = stats.least, stats.greatest
        if self.kind == "moving_average" and stats.averages is not None:
            lo, hi = stats.averages
        elif self.kind in _CHOICES and stats.histogram is not None and lo < hi:
            centres, counts = stats.histogram.bins()
            half = stats.histogram.width / 2
            chosen = _CHOICES[self.kind](centres, counts, half, self)
            lo, hi = max(lo, chosen[0]), min(hi, chosen[1])
        return min(lo, 0.0), max(hi, 0.0)


def percentile_range(
    centres: Array, counts: Array, half: float, observer: Observer
) -> tuple[float, float]:
    """Leave out the share (100 - percentile) % of the elements at each end."""
    share = np.cumsum(counts) / counts.sum()
    tail = 1.0 - observer.percentile / 100.0
    first = int(np.searchsorted(share, tail, side="right"))
    last = int(np.searchsorted(share, 1.0 - tail, side="left"))
    last = min(last, centres.size - 1)
    return float(centres[first] - half), float(centres[last] + half)


_SHRINKS = np.concatenate([np.linspace(1.0, 0.5, 51), np.linspace(0.48, 0.06, 22)])


def mse_range(
    centres: Array, counts: Array, half: float, observer: Observer
) -> tuple[float, float]:
    """Minimise rounding error plus clipping error over shrunken ranges.

    Rounding inside the range costs step^2 / 12 per element (uniform), clipping the squared
    distance to the nearer bound. Exact zeros round to themselves and cost nothing. Both ends shrink
    independently.
    """
    del observer
    lo, hi = min(float(centres[0]) - half, 0.0), max(float(centres[-1]) + half, 0.0)
    spread = np.where(np.abs(centres) <= half, 0.0, counts)  # the bin of exact zeros
    sums = [np.concatenate([[0.0], np.cumsum(counts * centres**k)]) for k in range(3)]
    inside = np.concatenate([[0.0], np.cumsum(spread)])
    lows = lo * _SHRINKS if lo < -half else np.array([lo])
    highs = hi * _SHRINKS if hi > half else np.array([hi])
    below = np.searchsorted(centres, lows, side="left")
    above = np.searchsorted(centres, highs, side="right")
    n0, n1, n2 = (s[below] for s in sums)
    clip_low = n2 - 2 * lows * n1 + lows**2 * n0
    m0, m1, m2 = (s[-1] - s[above] for s in sums)
    clip_high = m2 - 2 * highs * m1 + highs**2 * m0
    kept = inside[above][None, :] - inside[below][:, None]
    step = (highs[None, :] - lows[:, None]) / (_LEVELS - 1)
    error = clip_low[:, None] + clip_high[None, :] + kept * step**2 / 12
    i, j = np.unravel_index(int(error.argmin()), error.shape)
    return float(lows[i]), float(highs[j])


def entropy_range(
    centres: Array, counts: Array, half: float, observer: Observer
) -> tuple[float, float]:
    """Minimise KL(P || Q) over shrunken ranges.

    P is the histogram clipped to the range with the tails added to its end bins; Q is P gathered
    into 256 levels and spread evenly over the non-empty bins. The ranges are what lies within a
    shrinking threshold on |x|. Exact zeros are left out: zero is always represented, and after a
    relu its bin would decide alone.
    Source: TensorRT's calibrator (Migacz, GTC 2017), with 256 levels over an asymmetric range.
    """
    del observer
    zero = np.abs(centres) <= half
    around = counts[~zero][np.argsort(np.abs(centres[~zero]))[:2]]
    counts = np.where(zero, np.minimum(counts, around.mean() if around.size else 0.0), counts)
    lo, hi = min(float(centres[0]) - half, 0.0), max(float(centres[-1]) + half, 0.0)
    best, chosen = math.inf, (lo, hi)
    for shrink in _SHRINKS:
        threshold = max(-lo, hi) * float(shrink)
        a, b = max(lo, -threshold), min(hi, threshold)
        first = int(np.searchsorted(centres, a))
        last = int(np.searchsorted(centres, b, side="right"))
        if last - first < _LEVELS:
            break
        inner = counts[first:last]
        p = inner.copy()
        p[0] += counts[:first].sum()
        p[-1] += counts[last:].sum()
        level = ((centres[first:last] - a) / (b - a) * _LEVELS).astype(np.int64)
        level = np.clip(level, 0, _LEVELS - 1)
        mass = np.bincount(level, weights=inner, minlength=_LEVELS)
        filled = np.bincount(level, weights=(inner > 0).astype(np.float64), minlength=_LEVELS)
        q = np.where(inner > 0, (mass / np.maximum(filled, 1))[level], 0.0)
        divergence = _kl(p, q)
        if divergence < best:
            best, chosen = divergence, (a, b)
    return chosen


def _kl(p: Array, q: Array) -> float:
    """Return KL(P || Q) in nats, both smoothed so that empty bins of Q stay finite."""
    p, q = p / p.sum(), q / max(q.sum(), 1e-30)
    tiny = 1e-9
    mask = p > 0
    return float((p[mask] * np.log(p[mask] / np.maximum(q[mask], tiny))).sum())


_CHOICES: dict[str, Any] = {
    "percentile": percentile_range,
    "entropy": entropy_range,
    "mse": mse_range,
}
