# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights on a grid that give a product's results with the least squared error.

The error of weights q * s against w on operands X is (q s - w)' H (q s - w) with H = X'X / P, for
each output channel on its own. `round_columns` decides column by column and moves the columns that
are still open against the error made (GPTQ); `descend` then moves single weights by whole steps
while that lowers the error. All of it runs for every output channel and group at once.

Source: GPTQ, Frantar et al., arXiv 2210.17323.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qcompiler.factors import FACTORS
from qcompiler.passes.patches import Patches
from qcompiler.types import Array

KICKS, KICKED, KICK_COLUMNS = 300, 0.08, 2000
"""Random changes tried, share of the codes that each changes, and columns gone over in all:
products of few columns get many."""
BLOCK = 64
"""Columns between two updates of all the columns that follow."""
HIDDEN = 0.05
"""What a row counts whose result the clamp hides."""
SMALL = 64
"""Columns up to which every scale is tried to the end."""
SWEEPS = 4
"""Rounds of `descend`, at most."""


@dataclass(frozen=True)
class Moments:
    """Second moments of the operands of a product, about their means.

    Attributes:
        h: [G, K, K] float64, with the damping on the diagonal.
        mean: Means of the operands [G, 1, K].
        damping: What was added to the diagonal [G, K, 1].
        weight: What each row counts [G, P, 1], 1 in the sum over the rows.
    """

    h: Array
    mean: Array
    damping: Array
    weight: Array


def moments(x: Array, visible: Array | None = None) -> Moments:
    """Return the moments of operands [G, P, K] without damping.

    Args:
        x: The operands.
        visible: Rows whose results the clamp does not hide [G, P]; the others count little.
            Default: all count alike.
    """
    groups, rows = x.shape[:2]
    if visible is None:
        weight = np.full((groups, rows, 1), 1 / rows, np.float32)
    else:
        weight = np.where(visible, np.float32(1), np.float32(HIDDEN))[:, :, None]
        weight /= weight.sum(1, keepdims=True)
    mean = (np.swapaxes(weight, 1, 2) @ x).astype(np.float32)
    centred = (x - mean) * np.sqrt(weight)
    h = (np.swapaxes(centred, 1, 2) @ centred).astype(np.float64)
    return Moments(h, mean, np.zeros((*h.shape[:2], 1)), weight)


def damped(m: Moments, damp: float) -> Moments:
    """Return moments with a share of each diagonal element added to it.

    A column that is always constant gets the mean of the others, so that its weights stay.
    """
    h, at = m.h.copy(), np.arange(m.h.shape[1])
    diagonal = h[:, at, at]
    level = diagonal.mean(1, keepdims=True)
    level = np.where(level > 0, level, 1.0)
    damping = damp * np.where(diagonal > 1e-9 * level, diagonal, level) + 1e-6 * level
    h[:, at, at] += damping
    return Moments(h, m.mean, damping[:, :, None], m.weight)


def solved(m: Moments, w: Array, cross: Array, target: Array) -> tuple[Array, Array]:
    """Return real weights [G, K, O] and bias [G, 1, O] with the least squared error to targets.

    The damping pulls towards the weights given.

    Args:
        m: Damped moments of the operands.
        w: Weights [G, K, O].
        cross: Moments of operands with targets [G, K, O], as `cross_moments` returns.
        target: Results to reach [G, P, O].
    """
    new_w = np.linalg.solve(m.h, cross + m.damping * w)
    return new_w, level_of(m, target) - m.mean @ new_w


def cross_moments(m: Moments, x: Array, target: Array) -> Array:
    """Return the moments of operands [G, P, K] with targets [G, P, O] about their means."""
    off = (target - level_of(m, target).astype(np.float32)) * m.weight
    # The operands need not be centred: the targets are.
    return np.asarray((np.swapaxes(x, 1, 2) @ off).astype(np.float64))


def level_of(m: Moments, target: Array) -> Array:
    """Return the means of targets [G, P, O] over the rows as they count."""
    return np.asarray((target * m.weight).sum(1, keepdims=True, dtype=np.float64))


def reachable(data: Patches, w: Array, bias: Array) -> tuple[Array, Array]:
    """Return what the product alone should give, and where that shows behind the clamp [G, P, O].

    Where the clamp hides the difference to the present weights, that is what they give.
    """
    z = data.x @ w + bias
    total, (low, high) = data.residual(z), data.clamp
    hidden = ((data.y <= low) & (total <= low)) | ((data.y >= high) & (total >= high))
    plain = data.y if data.add is None else data.y - data.add
    return np.where(hidden, z, plain), ~hidden


@dataclass(frozen=True)
class Columns:
    """The order in which columns are rounded, and how errors spread over those that follow.

    Attributes:
        order: Columns by falling variance [G, K].
        u: Upper triangle U with inv(H) = U'U, in that order [G, K, K], float32.
    """

    order: Array
    u: Array

    @classmethod
    def of(cls, m: Moments) -> Columns:
        """Return the columns of operands with these moments."""
        order = np.argsort(-np.diagonal(m.h, axis1=1, axis2=2), axis=1, kind="stable")
        h = np.take_along_axis(np.take_along_axis(m.h, order[:, :, None], 1), order[:, None, :], 2)
        u = np.swapaxes(np.linalg.cholesky(np.linalg.inv(h)), 1, 2)
        return cls(order, np.ascontiguousarray(u, np.float32))


def spread(s: Array, count: int) -> Array:
    """Return scales of rows [G, R], or of every weight [G, R, K], as [G, R, K]."""
    return s if s.ndim == 3 else np.broadcast_to(s[:, :, None], (*s.shape, count))


def round_columns(columns: Columns, w: Array, s: Array, limits: tuple[int, int]) -> Array:
    """Return codes for rows of weights, each with a scale of its own.

    Args:
        columns: The columns, from the moments of the operands.
        w: Real weights [G, R, K].
        s: Scales [G, R], or of every weight [G, R, K].
        limits: Least and greatest code.
    """
    order, u = columns.order, columns.u
    open_w = np.take_along_axis(w, order[:, None, :], 2).astype(np.float32)
    codes = np.empty_like(open_w)
    count = w.shape[2]
    s = spread(s.astype(np.float32), count)
    s = np.take_along_axis(s, np.broadcast_to(order[:, None, :], s.shape), 2)
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        errors = np.empty((*w.shape[:2], end - start), np.float32)
        part = open_w[:, :, start:end]
        for i in range(start, end):
            j = i - start
            q = np.clip(np.rint(part[:, :, j] / s[:, :, i]), *limits)
            codes[:, :, i] = q
            errors[:, :, j] = (part[:, :, j] - q * s[:, :, i]) / u[:, None, i, i]
            part[:, :, j:] -= errors[:, :, j, None] * u[:, None, i, i:end]
        if end < count:
            open_w[:, :, end:] -= errors @ u[:, start:end, end:]
    result = np.empty_like(codes)
    np.put_along_axis(result, np.broadcast_to(order[:, None, :], codes.shape), codes, 2)
    return result


def descend(m: Moments, codes: Array, w: Array, s: Array, limits: tuple[int, int]) -> Array:
    """Move single codes by whole steps while that lowers the error; shapes as `round_columns`."""
    q = codes.astype(np.float64)
    s = spread(s.astype(np.float64), q.shape[2])
    slope = (q * s - w) @ m.h
    for _ in range(SWEEPS):
        moved = 0
        for i in range(q.shape[2]):
            unit = s[:, :, i]
            best = q[:, :, i] - slope[:, :, i] / (m.h[:, None, i, i] * unit)
            best = np.clip(np.rint(best), *limits)
            step = best - q[:, :, i]
            changed = int(np.count_nonzero(step))
            if changed:
                moved += changed
                q[:, :, i] = best
                slope += (step * unit)[:, :, None] * m.h[:, None, i]
        if not moved:
            break
    return q


def squared_error(m: Moments, codes: Array, w: Array, s: Array) -> Array:
    """Return the error of each row [G, R]."""
    off = codes * spread(s, codes.shape[2]) - w
    return np.asarray(((off @ m.h) * off).sum(2))


def best_scales(
    m: Moments,
    w: Array,
    s: Array,
    shrinks: Array,
    limits: tuple[int, int],
    least: Array,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Return (codes [G, R, K], scales [G, R]): per row the shrunken scale with the least error.

    Args:
        m: Moments of the operands.
        w: Real weights [G, R, K].
        s: Scales that cover the weights [G, R].
        shrinks: Factors to try.
        limits: Least and greatest code.
        least: Least scale of each row [G, R].
        rng: For random changes of codes.
    """
    thorough, columns = w.shape[2] <= SMALL, Columns.of(m)
    best = np.full(s.shape, np.inf)
    codes, scale = np.zeros(w.shape), s.astype(np.float64)
    for shrink in shrinks:
        tried = np.maximum(s * shrink, least).astype(np.float32)
        q = round_columns(columns, w, tried, limits)
        if thorough:
            q = descend(m, q, w, tried, limits)
        error = squared_error(m, q, w, tried)
        better = error < best
        best = np.where(better, error, best)
        scale = np.where(better, tried, scale)
        codes[better] = q[better]
    if not thorough:
        codes = descend(m, codes, w, scale, limits)
    return kicked(m, codes, w, scale, limits, rng), scale


def group_scales(
    m: Moments,
    w: Array,
    groups: Array,
    shrinks: Array,
    limits: tuple[int, int],
    factors: Array,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Return (codes [G, R, K], scales [G, R, N]) where columns of a row share scales in groups.

    A group's scale is the one with the least error in its own weights, each counting as much as
    the columns still open cannot make up for, among the whole multiples of one scale per row
    (`factors`); then all scales of a row are tried larger and smaller together.

    Args:
        m: Moments of the operands.
        w: Real weights [G, R, K].
        groups: Group of each column [K], 0 to N - 1.
        shrinks: Factors to try on the scale that covers the weights of a group.
        limits: Least and greatest code.
        factors: Factors to try on all scales of a row.
        rng: For random changes of codes.
    """
    columns = Columns.of(m)
    held = np.empty(columns.order.shape)
    np.put_along_axis(held, columns.order, np.diagonal(columns.u, axis1=1, axis2=2), 1)
    cost = (1 / held**2)[:, None, :]
    top = max(limits[1], -limits[0])
    count = int(groups.max()) + 1
    members = [np.flatnonzero(groups == n) for n in range(count)]
    s = np.empty((*w.shape[:2], count))

    def choose(n: int, tries: Iterable[Array]) -> None:
        """Choose the scale of a group among some, all [G, R]."""
        part, weight = w[:, :, members[n]], cost[:, :, members[n]]
        best = np.full(w.shape[:2], np.inf)
        for tried in tries:
            q = np.clip(np.rint(part / tried[:, :, None]), *limits)
            error = (weight * (q * tried[:, :, None] - part) ** 2).sum(2)
            s[:, :, n] = np.where(error < best, tried, s[:, :, n])
            best = np.minimum(error, best)

    for n, at in enumerate(members):
        full = np.maximum(np.abs(w[:, :, at]).max(2) / top, np.finfo(np.float32).tiny)
        choose(n, (full * shrink for shrink in shrinks))
    unit = np.maximum(s.max(2) / FACTORS, np.finfo(np.float32).tiny)
    for n in range(count):
        near = np.rint(s[:, :, n] / unit)
        choose(n, (unit * np.clip(near + step, 1, FACTORS) for step in (0, -1, 1)))
    least = np.full(w.shape[:2], np.inf)
    codes, scale = np.zeros(w.shape), s
    for factor in factors:
        tried = (s * factor).astype(np.float32)
        q = round_columns(columns, w, tried[:, :, groups], limits)
        error = squared_error(m, q, w, tried[:, :, groups])
        better = error < least
        least = np.where(better, error, least)
        scale = np.where(better[:, :, None], tried, scale)
        codes[better] = q[better]
    every = scale[:, :, groups]
    codes = descend(m, codes, w, every, limits)
    return kicked(m, codes, w, every, limits, rng), scale


def kicked(
    m: Moments, codes: Array, w: Array, s: Array, limits: tuple[int, int], rng: np.random.Generator
) -> Array:
    """Leave local minima: change some codes at random, descend, and keep what is better."""
    best: Array = codes.copy()
    error = squared_error(m, codes, w, s)
    for _ in range(min(KICKS, KICK_COLUMNS // codes.shape[2])):
        kick = rng.choice([-1, 1], codes.shape) * (rng.random(codes.shape) < KICKED)
        tried = descend(m, np.clip(best + kick, *limits), w, s, limits)
        found = squared_error(m, tried, w, s)
        better = found < error
        best[better], error = tried[better], np.where(better, found, error)
    return best
