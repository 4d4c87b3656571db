# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Learn for each weight whether to round it up or down, product by product.

For weights W on a grid of scale s the rounded ones are s * clip(floor(W / s) + h(V), qmin, qmax)
with h(V) in [0, 1]; V minimises the squared difference between the float kernel's result and that
of the rounded weights on what the quantized network before them gives, after the fused addition
and clamp, plus a term that drives h to 0 or 1. Only sampled patches of the activations are held.

Source: AdaRound, Nagel et al., arXiv 2004.10568 (asymmetric reconstruction, equations 22 to 25).
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
from qcompiler.passes.method import Method
from qcompiler.passes.patches import Patches, bias_of, collect, groups_of, matrix_of, weights_of
from qcompiler.passes.reconstruction import Reconstruction, Rounded
from qcompiler.passmanager import PassContext
from qcompiler.plan import PrecisionPlan
from qcompiler.types import Array, QuantParams

ZETA, GAMMA = 1.1, -0.1
"""Stretch of the sigmoid, so that h reaches 0 and 1 (the paper's values)."""
WARM_UP = 0.2
"""Share of the iterations without the term that drives h to 0 or 1."""
REGULARIZE = 0.01
RATE = 1e-2
"""Step of Adam on V."""
BATCH = 256
"""Patches per iteration."""


@dataclass(frozen=True)
class AdaRound(Method):
    """Learn the rounding of weights that the plan holds in few bits."""

    name: ClassVar[str] = "adaround"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, CalibrationTable, PrecisionPlan)
    provides: ClassVar[tuple[type, ...]] = (CalibrationTable, WeightGrids)
    iterations: int = 1000
    runs: int = 64  # calibration runs to draw patches from, at most
    patches: int = 3072  # patches of activations per product
    seconds: float | None = None  # time limit; products not reached are rounded to nearest

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.runs < 1 or self.patches < 1:
            raise UsageError("adaround: iterations, runs and patches must be at least 1")

    def improve(self, graph: Graph, ctx: PassContext) -> bool:
        """Round, keeping per product and on the whole only what held-out samples approve."""
        walk = Reconstruction.start(graph, ctx, self.runs)
        if walk is None:
            return False
        better = reached = 0
        for index, unit in enumerate(walk.units):
            ctx.progress(self.name, index, len(walk.units))
            if walk.expired(self.seconds):
                break
            reached += 1
            walk.advance(unit.node)
            rng = np.random.default_rng((ctx.seed, index))
            per_run = max(1, self.patches // len(walk.work[0]))
            train, test = (collect(e, q, unit, per_run, rng) for e, q in (walk.work, walk.test))
            node = walk.changed.node(unit.node)
            grid = walk.grid(unit.node)
            rounded, improved = _round(node, grid, train, test, self.iterations, rng)
            better += improved
            walk.put(unit.node, Rounded(rounded, grid, node.input(2).array()))
        ctx.progress(self.name, len(walk.units), len(walk.units))
        return walk.finish(self.name, ctx, better, reached, self.seconds)


# ---------------------------------------------------------------------------------- rounding


def _round(
    node: Node,
    grid: QuantParams,
    train: Patches,
    test: Patches,
    iterations: int,
    rng: np.random.Generator,
) -> tuple[Array, bool]:
    """Return weights on the grid, and whether they beat rounding to nearest on `test`."""
    w = node.input(1).array()
    nearest = fake_quantize(w, grid)
    flat_bias = bias_of(node, groups_of(node), train.y.shape[2])
    shape = [1] * w.ndim
    axis = 0 if node.op.name == "conv" else 1
    shape[axis] = w.shape[axis]
    steps = np.broadcast_to(grid.scale.reshape(shape if grid.scale.ndim else [1] * w.ndim), w.shape)
    s = matrix_of(node, np.ascontiguousarray(steps))
    found = _fit(matrix_of(node, w), s, (grid.qmin, grid.qmax), flat_bias, train, iterations, rng)
    rounded = weights_of(node, found)
    if test.error(found, flat_bias) < test.error(matrix_of(node, nearest), flat_bias):
        return rounded.astype(np.float32), True
    return nearest, False


def _fit(
    w: Array,
    s: Array,
    limits: tuple[int, int],
    bias: Array,
    data: Patches,
    iterations: int,
    rng: np.random.Generator,
) -> Array:
    """Return the learned weights [G, K, O] on their grid."""
    w, s = w.astype(np.float32), s.astype(np.float32)
    floor = np.floor(w / s)
    share = np.clip(w / s - floor, 1e-4, 1 - 1e-4)
    v = (-np.log((ZETA - GAMMA) / (share - GAMMA) - 1)).astype(np.float32)
    first, second = np.zeros_like(v), np.zeros_like(v)
    low, high = data.clamp
    rows = data.x.shape[1]
    start = int(WARM_UP * iterations)
    nearest = s * np.clip(np.rint(w / s), *limits)
    aim = data.target()
    unit = data.error(nearest, bias) or 1.0  # what rounding to nearest costs
    weight = np.float32(w.size / (unit * data.y.shape[0] * data.y.shape[2]))
    for step in range(iterations):
        chosen = rng.integers(0, rows, min(BATCH, rows))
        x, y = data.x[:, chosen], aim[:, chosen]
        sigmoid = 1 / (1 + np.exp(-v))
        stretched = sigmoid * (ZETA - GAMMA) + GAMMA
        h = np.clip(stretched, 0, 1)
        codes = floor + h
        soft = s * np.clip(codes, *limits)
        before = data.residual(x @ soft + bias, chosen)
        delta = np.clip(before, low, high) - y
        delta *= (before > low) & (before < high)
        slope = np.swapaxes(x, 1, 2) @ delta * (2 * weight / len(chosen))
        slope *= s * ((codes >= limits[0]) & (codes <= limits[1]))
        if step >= start:
            progress = (step - start) / max(iterations - start, 1)
            beta = 2 + 18 * 0.5 * (1 + np.cos(np.pi * progress))
            centre = 2 * h - 1
            slope -= (
                REGULARIZE * 2 * beta * np.sign(centre) * np.abs(centre) ** np.float32(beta - 1)
            ).astype(np.float32)
        slope *= sigmoid * (1 - sigmoid) * (ZETA - GAMMA) * ((stretched > 0) & (stretched < 1))
        first += 0.1 * (slope - first)
        second += 0.001 * (slope * slope - second)
        t = step + 1
        v -= RATE * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    result: Array = s * np.clip(floor + (v >= 0), *limits)
    return result
