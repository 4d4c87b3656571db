# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Learn the rounding of all weights of a block together, against the block's float result.

Per block, in the order of the network: its products are rounded one after the other as `gptq` does;
then codes and biases are learned together by gradient descent on the squared error of the block's
result, with the quantized network before it and rounded activations inside. Every step computes
with rounded codes; slopes pass the rounding unchanged (a straight-through estimator) into real
numbers behind the codes. The best codes met are kept, and what held-out samples do not approve is
taken back, block by block. Blocks that hold more than convolutions, sums and clamps keep what
`gptq` found.

Source: BRECQ, Li et al., arXiv 2102.05426, for the blocks; without its Fisher weights, and with a
straight-through estimator in place of AdaRound's soft rounding, which loses what `gptq` gained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.errors import UsageError
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import dequantize
from qcompiler.ops import Stage
from qcompiler.passes.blocks import Block, Tiles, blocks_of, channel_major, tap_major
from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.insert_qdq import WeightGrids
from qcompiler.passes.method import Method
from qcompiler.passes.patches import collect
from qcompiler.passes.reconstruction import Reconstruction, Rounded
from qcompiler.passes.single_node import units
from qcompiler.passes.trails import Trail
from qcompiler.passmanager import PassContext
from qcompiler.plan import PrecisionPlan
from qcompiler.types import Array

TILE = 8
"""Side of a tile of a block's result."""
RATE = 5e-3
"""First step of Adam on the numbers behind the codes, in codes."""
BIAS_RATE = 1e-4
"""First step of Adam on a bias, as a share of its weights' sum of magnitudes."""
CHECKS, CHECKED = 10, 128
"""How often the codes are compared with the best so far, and on how many tiles."""

Weights = dict[str, tuple[Array, Array]]


@dataclass(frozen=True)
class Brecq(Method):
    """Learn the rounding of the weights of each block together."""

    name: ClassVar[str] = "brecq"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, CalibrationTable, PrecisionPlan)
    provides: ClassVar[tuple[type, ...]] = (CalibrationTable, WeightGrids)
    iterations: int = 400
    runs: int = 192  # calibration runs to learn from, at most
    tiles: int = 768  # tiles of each block's result to learn from, at most
    batch: int = 12  # tiles per iteration
    patches: int = 16384  # rows per product for the start, as gptq
    seconds: float | None = None  # time limit; products not reached are rounded to nearest

    def __post_init__(self) -> None:
        if min(self.iterations, self.runs, self.tiles, self.batch, self.patches) < 1:
            raise UsageError("brecq: iterations, runs, tiles, batch and patches must be at least 1")

    def improve(self, graph: Graph, ctx: PassContext) -> bool:
        """Round, keeping per block and on the whole only what held-out samples approve."""
        walk = Reconstruction.start(graph, ctx, self.runs)
        if walk is None:
            return False
        blocks = blocks_of(walk.exact, units(walk.exact), walk.units)
        better = learned = together = 0
        for number, block in enumerate(blocks):
            ctx.progress(self.name, number, len(blocks))
            if walk.expired(self.seconds):
                break
            rng = np.random.default_rng((ctx.seed, number))
            walk.advance(block.units[0].node)
            sets = self._tiles(walk, block, rng)
            kept = [t.mark() for t in (*walk.work, *walk.test)]
            better += self._one_by_one(walk, block, rng)
            if sets is None or any(u.node not in walk.done for u in block.units):
                continue
            together += 1
            if self._learn(walk, block, sets, rng):
                learned += 1
                for trail, mark in zip((*walk.work, *walk.test), kept, strict=True):
                    trail.back_to(mark)
        ctx.progress(self.name, len(blocks), len(blocks))
        detail = f", {learned} of {together} blocks better still together"
        return walk.finish(self.name, ctx, better, len(walk.done), self.seconds, detail)

    def _one_by_one(self, walk: Reconstruction, block: Block, rng: np.random.Generator) -> int:
        """Round the products of a block; return how many became better than to nearest."""
        start = Gptq(runs=self.runs, patches=self.patches)
        better = 0
        for unit in block.units:
            if walk.expired(self.seconds):
                break
            walk.advance(unit.node)
            per_run = max(1, self.patches // len(walk.work[0]))
            train, test = (collect(e, q, unit, per_run, rng) for e, q in (walk.work, walk.test))
            new, improved = start.rounded(walk, walk.changed.node(unit.node), train, test, rng)
            walk.put(unit.node, new)
            better += improved
        return better

    # ------------------------------------------------------------------------------- samples

    def _tiles(
        self, walk: Reconstruction, block: Block, rng: np.random.Generator
    ) -> tuple[_Set, _Set] | None:
        """Return the tiles to learn from and those held out; None for a block without tiles."""
        try:
            tiles = Tiles(block, walk.qdq, TILE)
        except ValueError:
            return None
        parts = []
        for exact, rounded in (walk.work, walk.test):
            per_run = max(1, self.tiles // max(len(walk.work[0]), 1))
            parts.append(_Set.of(tiles, exact, rounded, per_run, rng))
        return parts[0], parts[1]

    # ------------------------------------------------------------------------------ learning

    def _learn(
        self,
        walk: Reconstruction,
        block: Block,
        sets: tuple[_Set, _Set],
        rng: np.random.Generator,
    ) -> bool:
        """Learn the codes of a block; return whether they were taken over."""
        train, test = sets
        codes = {
            u.node: _Codes.of(walk.changed.node(u.node), walk.done[u.node]) for u in block.units
        }
        fixed: Weights = {
            n.name: _present(walk, n)
            for n in train.tiles.nodes
            if n.op.name == "conv" and n.name not in codes
        }
        before = {**fixed, **{n: c.hard() for n, c in codes.items()}}
        check = train.part(CHECKED, rng)
        best, kept = check.error(before, self.batch), dict(before)
        unit = best or 1.0
        for step in range(self.iterations):
            if walk.expired(self.seconds):
                break
            rows = rng.integers(0, len(train.y), min(self.batch, len(train.y)))
            given = {**fixed, **{n: c.hard() for n, c in codes.items()}}
            y, tape = train.tiles.forward(train.at(rows), given, train.masks, rows)
            slope = (y - train.y[rows]) * np.float32(2 / (unit * y.size))
            found = train.tiles.backward(slope, tape, given)
            rate = 0.5 * (1 + np.cos(np.pi * step / self.iterations))
            for n, c in codes.items():
                c.update(*found[n], rate)
            if (step + 1) % max(1, self.iterations // CHECKS) == 0:
                now = {**fixed, **{n: c.hard() for n, c in codes.items()}}
                error = check.error(now, self.batch)
                if error < best:
                    best, kept = error, now
        if not test.error(kept, self.batch) < test.error(before, self.batch):
            return False
        for name in codes:
            node = walk.changed.node(name)
            matrix, bias = kept[name]
            old = walk.done[name]
            walk.put(name, Rounded(channel_major(node, matrix), old.grid, bias))
        return True


class _Set:
    """Tiles of a block: its operands in the quantized network, its result in the float one."""

    def __init__(
        self, tiles: Tiles, x: dict[Value, Array], y: Array, masks: dict[Value, Array]
    ) -> None:
        self.tiles, self.x, self.y, self.masks = tiles, x, y, masks

    @classmethod
    def of(
        cls, tiles: Tiles, exact: Trail, rounded: Trail, count: int, rng: np.random.Generator
    ) -> _Set:
        """Cut tiles out of each run."""
        sources = {
            v: rounded.graph.node(node.name).input(i) for v, (node, i) in tiles.sources.items()
        }
        result = tiles.block.result
        xs: dict[Value, list[Array]] = {v: [] for v in sources}
        ys, where = [], []
        twins = list(sources.values())
        for got, want in zip(rounded.values(twins), exact.values([result]), strict=True):
            for at in tiles.positions(count, rng):
                for v, twin in sources.items():
                    xs[v].append(tiles.cut(v, got[twin.name], at))
                ys.append(tiles.cut(result, want[result.name], at))
                where += [at] * len(ys[-1])
        joined = {v: np.concatenate(parts) for v, parts in xs.items()}
        return cls(tiles, joined, np.concatenate(ys), tiles.masks(where))

    def part(self, most: int, rng: np.random.Generator) -> _Set:
        """Return so many of the tiles, at most."""
        if len(self.y) <= most:
            return self
        rows = np.sort(rng.choice(len(self.y), most, replace=False))
        masks = {v: a[rows] for v, a in self.masks.items()}
        return _Set(self.tiles, self.at(rows), self.y[rows], masks)

    def at(self, rows: Array | slice) -> dict[Value, Array]:
        """Return some tiles of the sources."""
        return {v: a[rows] for v, a in self.x.items()}

    def error(self, weights: Weights, batch: int) -> float:
        """Return the mean squared error of the result."""
        total = 0.0
        for i in range(0, len(self.y), batch):
            rows = slice(i, i + batch)
            y, _ = self.tiles.forward(self.at(rows), weights, self.masks, rows)
            total += float(((y - self.y[rows]) ** 2).sum(dtype=np.float64))
        return total / self.y.size


def _present(walk: Reconstruction, node: Node) -> tuple[Array, Array]:
    """Return the rounded weights and the bias that a product has now."""
    twin = walk.qdq.node(node.name)
    values = []
    for i in (1, 2):
        v = twin.optional(i)
        producer = None if v is None else v.producer
        if producer is None:
            values.append(np.zeros(node.output.shape[1], np.float32))
            continue
        q = producer.input(0)
        assert q.qparams is not None
        values.append(dequantize(q.array(), q.qparams))
    return tap_major(node, values[0]), values[1]


class _Codes:
    """The codes of a product's weights on their way, and its bias."""

    def __init__(
        self, codes: Array, s: Array, limits: tuple[int, int], bias: Array, step: Array
    ) -> None:
        self.codes, self.s, self.limits = codes, s, limits
        self.v = codes.copy()
        self.bias, self.bias_step = bias.astype(np.float32), step.astype(np.float32)
        self._moments = [np.zeros_like(a) for a in (self.v, self.v, self.bias, self.bias)]
        self._count = 0

    @classmethod
    def of(cls, node: Node, found: Rounded) -> _Codes:
        """Start from rounded weights."""
        grid = found.grid
        scale = np.broadcast_to(grid.scale, (found.weights.shape[0],))
        s = np.broadcast_to(scale.reshape(-1, 1, 1, 1), found.weights.shape)
        codes, steps = (tap_major(node, a) for a in (np.rint(found.weights / s), s))
        deviation = np.abs(found.weights).reshape(len(scale), -1).sum(1)
        return cls(codes, steps, (grid.qmin, grid.qmax), found.bias, BIAS_RATE * deviation)

    def hard(self) -> tuple[Array, Array]:
        """Return the weights and the bias."""
        return self.s * self.codes, self.bias

    def update(self, dw: Array, db: Array, rate: float) -> None:
        """Take a step of Adam against the slopes by weights and bias."""
        slope = dw * self.s
        self._count += 1
        self.v -= np.float32(rate * RATE) * self._adam(0, slope)
        np.clip(self.v, self.limits[0] - 0.49, self.limits[1] + 0.49, out=self.v)
        self.codes = np.rint(self.v)
        self.bias = self.bias - np.float32(rate) * self.bias_step * self._adam(2, db)

    def _adam(self, at: int, slope: Array) -> Array:
        first, second = self._moments[at : at + 2]
        first += np.float32(0.1) * (slope - first)
        second += np.float32(0.001) * (slope * slope - second)
        t = self._count
        step: Array = (first / np.float32(1 - 0.9**t)) / (
            np.sqrt(second / np.float32(1 - 0.999**t)) + np.float32(1e-8)
        )
        return step
