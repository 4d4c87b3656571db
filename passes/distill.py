# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Learn the weights of all products together, so that the network follows the float network.

What a method that goes product by product, or block by block, leaves is corrected where it shows:
codes, scales per output channel and biases of all products are learned by gradient descent on the
error of the outputs and of every block's result against the float network's, each over what it was
at first. No labels are needed: the float network is the teacher. Every step computes with rounded
codes and rounded activations; slopes pass the rounding unchanged into real numbers behind the
codes. Codes that a method before chose stay: their errors make up for each other, and flips of
single ones raised the error of the blocks in the one attempt measured with the final set-up.

Source: distillation, Hinton et al., arXiv 1503.02531; learned scales, Esser et al., arXiv
1902.08153; straight-through estimator, Bengio et al., arXiv 1308.3432.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.cpu import allowed_cpus
from qcompiler.data import Batch
from qcompiler.errors import UsageError
from qcompiler.ir import Graph
from qcompiler.numerics import quantize_bias
from qcompiler.ops import Stage
from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable
from qcompiler.passes.gptq import on_axis
from qcompiler.passes.insert_qdq import WeightGrids
from qcompiler.passes.lesson import ERRORS, Lesson, operand, summed
from qcompiler.passes.method import Method
from qcompiler.passes.reconstruction import Reconstruction, Rounded, operand_scale, put_product
from qcompiler.passes.views import is_picture, mirrored
from qcompiler.passmanager import PassContext
from qcompiler.plan import PrecisionPlan
from qcompiler.types import Array, DType, PerGroup, QuantParams, TensorType

CHECKS = 8
"""In how many parts the steps fall after which held-out runs are asked, in the second half."""
FIRST = 16
"""Runs that the errors at first are taken from."""
AT_ONCE = 4
"""Runs that a lesson reads at a time at most: sums must not hang on the number of cores."""
CODE_RATE = 1e-2
"""First step on the numbers behind codes that are nearest to the weights."""
ROOM = 0.49
"""How far the numbers behind the codes may go beyond the least and the greatest code."""


@dataclass(frozen=True)
class Distill(Method):
    """Learn codes, scales and biases of all products together from the float network."""

    name: ClassVar[str] = "distill"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, CalibrationTable, PrecisionPlan)
    provides: ClassVar[tuple[type, ...]] = (CalibrationTable, WeightGrids)
    epochs: int = 16  # times that each run is learned from
    runs: int = 192  # calibration runs to learn from, at most
    batch: int = 16  # runs per step
    code_rate: float | None = None  # first step of Adam on the numbers behind the codes, in codes;
    # None: 0.01, and 0 behind a method that has chosen the codes
    scale_rate: float = 4e-4  # the same on scales, as a share
    bias_rate: float = 4e-5  # the same on biases, as a share of the sum of the weights' magnitudes
    inner: float = 1.0  # what the blocks' results count, all together; the outputs count 1
    mirror: bool = True  # pictures (inputs [N, 3, H, W]) are also learned from in a mirror
    window: int = 128  # larger pictures are learned from in random windows of so many rows, columns
    seconds: float | None = None  # time limit; the rates fall with the time that is left

    def __post_init__(self) -> None:
        if min(self.epochs, self.runs, self.batch, self.window) < 1:
            raise UsageError("distill: epochs, runs, batch and window must be at least 1")
        rates = (self.code_rate or 0.0, self.scale_rate, self.bias_rate, self.inner)
        if not all(0 <= r < np.inf for r in rates):
            raise UsageError("distill: rates and inner must be 0 or more")

    def improve(self, graph: Graph, ctx: PassContext) -> bool:
        """Learn, and keep what held-out samples approve."""
        walk = Reconstruction.start(graph, ctx, self.runs, grouped=True)
        if walk is None:
            return False
        code_rate = self.code_rate
        if code_rate is None:
            code_rate = 0.0 if walk.grids else CODE_RATE
        lesson = Lesson(walk, self.window, math.gcd(self.batch, AT_ONCE))
        products = {u.node: Learned.of(walk, u.node) for u in walk.units}
        rng = np.random.default_rng(ctx.seed)
        steps = self.epochs * max(1, len(walk.runs) // self.batch)
        best, kept, done = walk.before, dict[str, Rounded](), 0
        order: list[int] = []
        with ThreadPoolExecutor(len(allowed_cpus())) as pool:

            def learn(rows: list[int]) -> dict[str, Array]:
                given = {k: a for n, p in products.items() for k, a in p.operands(n).items()}
                seen = [self._seen(walk.runs[i], lesson.window, rng) for i in rows]
                inputs = [
                    {**_joined(seen[i : i + lesson.count]), **given}
                    for i in range(0, len(seen), lesson.count)
                ]
                return summed(pool.map(lesson.run, inputs))

            rows = (list(range(min(FIRST, len(walk.runs)))) * FIRST)[:FIRST]
            first = learn(rows)[ERRORS] / len(rows) * self.batch
            lesson.shares = self._shares(first, lesson.outputs)
            while done < steps:
                ctx.progress(self.name, done, steps)
                share = max(done / steps, self._spent(walk))
                if share >= 1:
                    break
                while len(order) < self.batch:
                    order += rng.permutation(len(walk.runs)).tolist()
                rows, order = order[: self.batch], order[self.batch :]
                slopes = learn(rows)
                rate = 0.5 * (1 + np.cos(np.pi * share))
                rates = (rate * code_rate, rate * self.scale_rate, rate * self.bias_rate)
                for name, p in products.items():
                    p.update(name, slopes, rates)
                done += 1
                if done * 2 >= steps and done * CHECKS % steps < CHECKS:
                    error = walk.judge.error(_with(walk.qdq, products))
                    if error < best:
                        best, kept = error, {n: p.rounded() for n, p in products.items()}
        ctx.progress(self.name, steps, steps)
        for name, new in kept.items():
            walk.put(name, new)
        text = f"{len(walk.units)} products learned together in {done} of {steps} steps"
        return walk.take_over(self.name, ctx, text)

    def _spent(self, walk: Reconstruction) -> float:
        """Return the share of the time limit that has passed."""
        if self.seconds is None:
            return 0.0
        passed = time.monotonic() - walk.started
        return passed / self.seconds if self.seconds > 0 else 1.0

    def _shares(self, first: Array, outputs: int) -> Array:
        """Return what the squared error of each term counts, given what it is at first."""
        counts = np.full(first.shape, self.inner / max(1, len(first) - outputs))
        counts[:outputs] = 1 / max(1, outputs)
        shares: Array = (counts / np.maximum(first, np.finfo(np.float32).tiny)).astype(np.float32)
        return shares

    def _seen(self, batch: Batch, window: int | None, rng: np.random.Generator) -> dict[str, Array]:
        """Return the inputs of a run, pictures as they are or in a mirror, in a random window."""
        turned, place = self.mirror and bool(rng.random() < 0.5), rng.random(2)
        found = dict(batch.inputs)
        for name, x in found.items():
            if is_picture(TensorType(x.shape, DType.FLOAT32)):
                if window is not None:
                    top, left = (
                        int(p * max(1, n - window + 1))
                        for p, n in zip(place, x.shape[2:], strict=True)
                    )
                    x = x[:, :, top : top + window, left : left + window]
                found[name] = mirrored(x) if turned else x
        return found


def _joined(runs: list[dict[str, Array]]) -> dict[str, Array]:
    """Return the inputs of some runs joined along their first axes."""
    if len(runs) == 1:
        return runs[0]
    return {name: np.concatenate([r[name] for r in runs]) for name in runs[0]}


def _with(qdq: Graph, products: Mapping[str, Learned]) -> Graph:
    """Return a quantized graph with the present weights."""
    changed = qdq.clone()
    for name, p in products.items():
        put_product(changed, name, p.rounded())
    return changed


class Learned:
    """Codes, scales and bias of a product on their way.

    Args:
        codes: Codes in the shape of the weights, channels on `axis`.
        grid: Their grid, with a scale per channel, or per group along the summed axis; the scales
            of a channel's groups keep their ratios.
        bias: Bias [O].
        least: Least scale of each channel [O].
        operand_scale: Scale of what the product reads.
        axis: Axis of the output channels.
    """

    def __init__(
        self,
        codes: Array,
        grid: QuantParams,
        bias: Array,
        least: Array,
        operand_scale: float,
        axis: int,
    ) -> None:
        self.grid, self.axis, self.least, self._x = grid, axis, least, operand_scale
        self._others = tuple(i for i in range(codes.ndim) if i != axis)
        self._v = codes.astype(np.float32)
        granularity = grid.granularity
        self._groups = granularity if isinstance(granularity, PerGroup) else None
        shape = (codes.shape[axis],) if self._groups is None else grid.scale.shape
        self._s = np.broadcast_to(grid.scale, shape).astype(np.float32)
        others = tuple(i for i in range(self._s.ndim) if i != axis)
        self._apart = () if self._groups is None else others
        """Axes of scales that move together."""
        self._log = np.zeros_like(self._s.mean(self._apart, keepdims=True))
        self._bias = bias.astype(np.float32)
        if self._groups is None:
            self._reach = np.abs(self._v).sum(self._others) * self._s
        else:
            self._reach = np.abs(self._v * self._wide(self._s)).sum(self._others)
        self._moments = [[np.zeros_like(a)] * 2 for a in (self._v, self._log, self._bias)]
        self._count = 0

    @classmethod
    def of(cls, walk: Reconstruction, name: str) -> Learned:
        """Start from what a product has now."""
        node, grid = walk.qdq.node(name), walk.grid(name)
        weights = node.input(1).producer
        assert weights is not None
        bias = walk.changed.node(name).input(2).array()
        least = walk.least_scale(name, bias)
        if isinstance(grid.granularity, PerGroup):  # the bias stays float
            least = np.zeros(1, np.float32)
        axis = 0 if node.op.name == "conv" else 1
        codes = weights.input(0).array()
        return cls(codes, grid, bias, least, operand_scale(node), axis)

    def _codes(self) -> Array:
        return np.rint(self._v)

    def _scale(self) -> Array:
        scale: Array = np.maximum(self._s * np.exp(self._log), self.least).astype(np.float32)
        return scale

    def _wide(self, scale: Array) -> Array:
        """Return scales so that they fit the codes."""
        if self._groups is None:
            return np.expand_dims(scale, self._others)
        return np.repeat(scale, self._groups.group_size, self._groups.axis)

    def _per_channel(self, a: Array) -> Array:
        """Return the sums of what moves with one scale, given an array in the shape of codes."""
        return np.asarray(a.sum(self._others, keepdims=self._groups is not None))

    def operands(self, name: str) -> dict[str, Array]:
        """Return the present weights and bias as a lesson takes them, both as they are rounded."""
        scale, bias = self._scale(), self._bias
        if self._groups is None:
            held = quantize_bias(bias, self._x, scale).q
            bias = held * (np.float64(self._x) * scale.astype(np.float64)).astype(np.float32)
        weights = self._codes() * self._wide(scale)
        return {operand(name, 1): weights, operand(name, 2): bias.astype(np.float32)}

    def rounded(self) -> Rounded:
        """Return the present weights."""
        scale, old = self._scale(), self.grid
        weights = self._codes() * self._wide(scale)
        if self._groups is None:
            grid = on_axis(old, scale, self.axis)
        else:
            zero, granularity = old.zero_point, old.granularity
            grid = QuantParams(scale, zero, old.storage, old.qmin, old.qmax, granularity)
        return Rounded(weights, grid, self._bias.copy())

    def update(
        self, name: str, slopes: Mapping[str, Array], rates: tuple[float, float, float]
    ) -> None:
        """Take a step of Adam against the slopes; a product that has none stays.

        Args:
            name: Name of the product.
            slopes: What a lesson returns.
            rates: Size of a step of the numbers behind codes, of scales, of biases.
        """
        dw, db = slopes.get(operand(name, 1)), slopes.get(operand(name, 2))
        if dw is None or db is None:
            return
        self._count += 1
        d = dw * self._wide(self._scale())
        ds = self._per_channel(d * self._codes())
        code_rate, scale_rate, bias_rate = rates
        if code_rate:
            self._v -= np.float32(code_rate) * self._adam(0, d)
            np.clip(self._v, self.grid.qmin - ROOM, self.grid.qmax + ROOM, out=self._v)
        self._log -= np.float32(scale_rate) * self._adam(1, ds)
        step = self._reach * self._adam(2, db)
        self._bias = self._bias - np.float32(bias_rate) * step

    def _adam(self, at: int, slope: Array) -> Array:
        """Return the direction of a step; each number keeps its own pace."""
        first, second = self._moments[at]
        first = first + np.float32(0.1) * (slope - first)
        second = second + np.float32(0.01) * (slope * slope - second)
        self._moments[at] = [first, second]
        t = self._count
        step: Array = (first / np.float32(1 - 0.9**t)) / (
            np.sqrt(second / np.float32(1 - 0.99**t)) + np.float32(1e-12)
        )
        return step
