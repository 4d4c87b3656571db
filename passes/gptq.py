# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Round the weights of each product one column after the other, making up for what was lost.

For each product, on what the quantized network before it gives: the real weights and bias that
reach the float network's results with the least squared error; the scale of each output channel;
and the codes, column by column with the error spread over the columns still open. Convolutions are
matrix products over their patches. Late products of networks that read large pictures also learn
from magnified and mirrored views of these.

Source: GPTQ, Frantar et al., arXiv 2210.17323; aiming at the float results from quantized operands
as AdaRound does (arXiv 2004.10568, equation 25).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.errors import UsageError
from qcompiler.ir import Graph, Node
from qcompiler.numerics import fake_quantize
from qcompiler.ops import Stage
from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable
from qcompiler.passes.insert_qdq import WeightGrids
from qcompiler.passes.least_squares import (
    SMALL,
    Moments,
    best_scales,
    cross_moments,
    damped,
    group_scales,
    moments,
    reachable,
    solved,
)
from qcompiler.passes.method import Method
from qcompiler.passes.patches import Patches, bias_of, collect, matrix_of, weights_of
from qcompiler.passes.reconstruction import Reconstruction, Rounded
from qcompiler.passes.views import default_views
from qcompiler.passmanager import PassContext
from qcompiler.plan import PrecisionPlan
from qcompiler.types import Array, PerAxis, PerGroup, QuantParams

SHRINKS = np.linspace(1.0, 0.4, 13)
"""Scales to try, as shares of the one that covers every weight of the channel."""
FINE_SHRINKS = np.linspace(1.0, 0.4, 31)
"""The same for products of few columns."""
GROUP_SHRINKS = np.linspace(1.15, 0.7, 10)
"""The same for groups of columns; above 1 a weight of the sign with fewer codes fits too."""
FACTORS = np.linspace(1.1, 0.85, 6)
"""Factors to try on all the scales of an output channel with several."""
DAMPS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Pulls towards the weights given to try, as shares of each operand's variance."""


@dataclass(frozen=True)
class Gptq(Method):
    """Round weights column by column, spreading the error over the columns still open."""

    name: ClassVar[str] = "gptq"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, CalibrationTable, PrecisionPlan)
    provides: ClassVar[tuple[type, ...]] = (CalibrationTable, WeightGrids)
    runs: int = 192  # calibration runs to draw patches from, at most
    patches: int = 32768  # patches of activations per product, at most
    views: int | None = None  # more views of each picture, magnified and in a mirror;
    # None: 4 where the smaller side is over 64 pixels, else 0, since smaller ones showed no gain
    damp: float | None = None  # pull towards the weights given; None tries some, held out
    seconds: float | None = None  # time limit; products not reached are rounded to nearest

    def __post_init__(self) -> None:
        if self.runs < 1 or self.patches < 1:
            raise UsageError("gptq: runs and patches must be at least 1")
        if self.views is not None and self.views < 0:
            raise UsageError("gptq: views must be 0 or more")
        if self.damp is not None and not 0 < self.damp < np.inf:
            raise UsageError(f"gptq: damp is {self.damp}, expected a number above 0")

    def improve(self, graph: Graph, ctx: PassContext) -> bool:
        """Round, keeping per product and on the whole only what held-out samples approve."""
        walk = Reconstruction.start(graph, ctx, self.runs, grouped=True)
        if walk is None:
            return False
        views = self.views
        if views is None:
            views = default_views(v.type for v in graph.inputs)
        better = reached = 0
        wide = False
        for index, unit in enumerate(walk.units):
            ctx.progress(self.name, index, len(walk.units))
            if walk.expired(self.seconds):
                break
            reached += 1
            walk.advance(unit.node)
            wide = wide or walk.widen(unit.node, views, ctx.seed)
            rng = np.random.default_rng((ctx.seed, index))
            train, test = (
                collect(exact, rounded, unit, max(1, self.patches // len(exact)), rng)
                for exact, rounded in (walk.work, walk.test)
            )
            new, improved = self.rounded(walk, walk.changed.node(unit.node), train, test, rng)
            better += improved
            walk.put(unit.node, new)
        ctx.progress(self.name, len(walk.units), len(walk.units))
        return walk.finish(self.name, ctx, better, reached, self.seconds)

    def rounded(
        self,
        walk: Reconstruction,
        node: Node,
        train: Patches,
        test: Patches,
        rng: np.random.Generator,
    ) -> tuple[Rounded, bool]:
        """Return the new weights of a product, and whether they beat the present ones."""
        grid = walk.grid(node.name)
        w = matrix_of(node, node.input(1).array())
        bias = bias_of(node, w.shape[0], w.shape[2])
        m, aim, aim_bias = self._aim(w, bias, train, test)
        rows = np.ascontiguousarray(np.swapaxes(aim, 1, 2))
        top = max(grid.qmax, -grid.qmin)
        full = np.maximum(np.abs(rows).max(2) / top, np.finfo(np.float32).tiny)
        least = walk.least_scale(node.name, bias.reshape(-1)).reshape(full.shape)
        limits = (grid.qmin, grid.qmax)
        columns = grouped_columns(node, grid)
        if columns is not None:
            codes, parts = group_scales(m, rows, columns, GROUP_SHRINKS, limits, FACTORS, rng)
            every = parts[:, :, columns]
            found = np.swapaxes(codes * every, 1, 2).astype(np.float32)
            chosen = in_groups(grid, parts[0])
            return self._better(node, grid, found, chosen, aim_bias, train, test)
        shrinks = FINE_SHRINKS if w.shape[1] <= SMALL else SHRINKS
        codes, scale = best_scales(m, rows, full, shrinks, limits, least, rng)
        found = np.swapaxes(codes * scale[:, :, None], 1, 2).astype(np.float32)
        chosen = on_axis(grid, scale.reshape(-1), 0 if node.op.name == "conv" else 1)
        return self._better(node, grid, found, chosen, aim_bias, train, test)

    @staticmethod
    def _better(
        node: Node,
        grid: QuantParams,
        found: Array,
        chosen: QuantParams,
        aim_bias: Array,
        train: Patches,
        test: Patches,
    ) -> tuple[Rounded, bool]:
        """Return weights found [G, K, O] with their bias, or what rounding to nearest gives."""
        new_bias = fitted_bias(train, found, aim_bias.astype(np.float32))
        bias = bias_of(node, found.shape[0], found.shape[2])
        old = fake_quantize(node.input(1).array(), grid)
        flat = bias.reshape(-1).astype(np.float32)
        if test.error(found, new_bias) < test.error(matrix_of(node, old), bias):
            return Rounded(weights_of(node, found), chosen, new_bias.reshape(-1)), True
        return Rounded(old, grid, flat), False

    def _aim(
        self, w: Array, bias: Array, train: Patches, test: Patches
    ) -> tuple[Moments, Array, Array]:
        """Return damped moments, and the real weights and bias to come close to."""
        # One result per group: the rows that its clamp hides can be left out.
        alone = w.shape[2] == 1 and np.isfinite(train.clamp).any()
        target, shown = reachable(train, w, bias)
        plain = moments(train.x, shown[:, :, 0] if alone else None)
        cross = cross_moments(plain, train.x, target)
        best, chosen, pull = np.inf, (plain, w, bias), 0.0
        for damp in DAMPS if self.damp is None else (self.damp,):
            m = damped(plain, damp)
            found, shift = solved(m, w, cross, target)
            error = test.error(found.astype(np.float32), shift.astype(np.float32))
            if error < best or not np.isfinite(best):
                best, chosen, pull = error, (m, found, shift), damp
        if np.isfinite(train.clamp).any():  # what the clamp hides depends on the weights
            m, found, shift = chosen
            target, shown = reachable(train, found.astype(np.float32), shift.astype(np.float32))
            if alone:
                plain = moments(train.x, shown[:, :, 0])
                m = damped(plain, pull)
            cross = cross_moments(plain, train.x, target)
            chosen = (m, *solved(m, w, cross, target))
        return chosen


def fitted_bias(data: Patches, w: Array, bias: Array, rounds: int = 3) -> Array:
    """Return the bias [G, 1, O] with which weights give the mean of the results to reach."""
    for _ in range(rounds if np.isfinite(data.clamp).any() else 1):
        target, _ = reachable(data, w, bias)
        off = (target - (data.x @ w + bias)).mean(1, keepdims=True, dtype=np.float64)
        bias = (bias + off).astype(np.float32)
    return bias


def on_axis(grid: QuantParams, scale: Array, axis: int) -> QuantParams:
    """Return a grid with other scales, one per output channel."""
    zeros = np.zeros(scale.shape, np.int32)
    kind = grid.storage
    return QuantParams(scale.astype(np.float32), zeros, kind, grid.qmin, grid.qmax, PerAxis(axis))


def grouped_columns(node: Node, grid: QuantParams) -> Array | None:
    """Return the group of each of the K columns of a product; None without scales per group."""
    if not isinstance(grid.granularity, PerGroup):
        return None
    size, shape = grid.granularity.group_size, node.input(1).shape
    taps = int(np.prod(shape[2:])) if node.op.name == "conv" else 1
    column = np.arange(shape[1] * taps if node.op.name == "conv" else shape[0])
    return column // taps // size * taps + column % taps


def in_groups(grid: QuantParams, scale: Array) -> QuantParams:
    """Return a grid with other scales [O, N], N in the order of `grouped_columns`."""
    granularity = grid.granularity
    assert isinstance(granularity, PerGroup)
    if granularity.axis == 0:  # a matrix product: [K / size, O]
        scale = scale.T
    held = np.ascontiguousarray(scale.reshape(grid.scale.shape), np.float32)
    zeros = np.zeros(held.shape, np.int32)
    return QuantParams(held, zeros, grid.storage, grid.qmin, grid.qmax, granularity)
