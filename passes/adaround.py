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

import dataclasses
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.data import Batch
from qcompiler.errors import UsageError
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import fake_quantize
from qcompiler.ops import Stage
from qcompiler.ort import Session
from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable
from qcompiler.passes.held_out import (
    FloatModel,
    Judge,
    quantized,
    shares,
    verdict,
    weighted_products,
)
from qcompiler.passes.insert_qdq import WeightGrids
from qcompiler.passes.single_node import Unit, prefix_model, units
from qcompiler.passmanager import Pass, PassContext
from qcompiler.plan import PrecisionPlan
from qcompiler.printer import digest
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
class AdaRound(Pass):
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

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Round, keeping per product and on the whole only what held-out samples approve."""
        plan, table = ctx.get(PrecisionPlan), ctx.get(CalibrationTable)
        ctx.put(WeightGrids())
        ctx.put(FloatModel(graph.clone()))
        work, held_out = shares(ctx.get(CalibrationSet), self.runs)
        batches, others = list(work), list(held_out)
        wanted = set(weighted_products(graph, plan))
        found = [u for u in units(graph) if u.node in wanted]
        if not found:
            return False
        judge = Judge(graph, others)
        before = judge.error(quantized(graph, plan, table))
        changed, grids = graph.clone(), dict[str, QuantParams]()
        started, better, reached = time.monotonic(), 0, 0
        for index, unit in enumerate(found):
            ctx.progress(self.name, index, len(found))
            if self.seconds is not None and time.monotonic() - started > self.seconds:
                break
            reached += 1
            qdq = quantized(changed, plan, table, WeightGrids(grids))
            grid = _grid(qdq.node(unit.node))
            rng = np.random.default_rng((ctx.seed, index))
            per_run = max(1, self.patches // len(batches))
            train = _collect(graph, qdq, unit, batches, per_run, rng)
            test = _collect(graph, qdq, unit, others, per_run, rng)
            node = changed.node(unit.node)
            rounded, improved = _round(node, grid, train, test, self.iterations, rng)
            better += improved
            grids[unit.node] = grid
            name = changed.fresh(f"{node.input(1).name}_rounded")
            changed.set_input(node, 1, changed.constant(rounded, name))
        ctx.progress(self.name, len(found), len(found))
        after = judge.error(quantized(changed, plan, table, WeightGrids(grids)))
        kept, line = verdict(self.name, before, after)
        detail = f"{better} of {len(found)} products are rounded better than to nearest"
        if reached < len(found):
            detail += f", {len(found) - reached} were not reached in {self.seconds:g} s"
        ctx.log.append(f"{line}; {detail}")
        if not kept:
            return False
        for name in grids:
            weights = changed.node(name).input(1)
            held = graph.constant(weights.array(), graph.fresh(weights.name))
            graph.set_input(graph.node(name), 1, held)
        ctx.put(WeightGrids(grids))
        ctx.put(dataclasses.replace(table, graph=digest(graph)))
        return True


def _grid(node: Node) -> QuantParams:
    """Return the grid of the weights of a product of Graph[QDQ]."""
    producer = node.input(1).producer
    q = None if producer is None else producer.input(0).qparams
    if q is None:
        raise UsageError(f"the weights of {node.name!r} are not quantized", node=node.name)
    return q


# ------------------------------------------------------------------------------ what is fitted


@dataclass(frozen=True)
class Patches:
    """Sampled rows of a product.

    Attributes:
        x: Operands [G, P, K], from the quantized network.
        y: Results to reach [G, P, O], after the fused addition and clamp, from the float network.
        add: What is added before the clamp [G, P, O], from the quantized network; None for nothing.
        clamp: (least, greatest) of the fused clamp.
    """

    x: Array
    y: Array
    add: Array | None
    clamp: tuple[float, float]

    def residual(self, z: Array, rows: Array | slice = slice(None)) -> Array:
        """Return the sum before the clamp, given the product's results."""
        return z if self.add is None else z + self.add[:, rows]


def _collect(
    graph: Graph, qdq: Graph, unit: Unit, batches: list[Batch], count: int, rng: np.random.Generator
) -> Patches:
    """Draw rows of a product from each run."""
    node = qdq.node(unit.node)
    result, other, clamp = _epilogue(graph, qdq, unit)
    x = node.input(0)
    inner = [x] if other is None or other is x else [x, other]
    quantized_run = Session(prefix_model(qdq, inner))
    float_run = Session(prefix_model(graph, [result]))
    xs, ys, adds = [], [], []
    for batch in batches:
        found = quantized_run.run({n: batch.inputs[n] for n in quantized_run.input_names})
        y = float_run.run({n: batch.inputs[n] for n in float_run.input_names})[result.name]
        rows = _positions(node, y.shape, count, rng)
        xs.append(_operands(node, found[x.name], rows))
        ys.append(_results(node, y, rows))
        if other is not None:
            adds.append(_results(node, found[other.name], rows))
    add = np.concatenate(adds, 1) if adds else None
    return Patches(np.concatenate(xs, 1), np.concatenate(ys, 1), add, clamp)


def _epilogue(
    graph: Graph, qdq: Graph, unit: Unit
) -> tuple[Value, Value | None, tuple[float, float]]:
    """Return the float value to reach, what is added in Graph[QDQ], and the clamp.

    Only a sum with a tensor of the same shape and one clamp are followed.
    """
    node = graph.node(unit.node)
    value, other = node.output, None
    lo, hi = -np.inf, np.inf
    for name in unit.members[1:]:
        reader = graph.node(name)
        if reader.op.name == "add" and other is None and lo == -np.inf:
            twin = qdq.node(name)
            twin_value = qdq.node(unit.node).output
            sides = [v for v in twin.operands if v is not twin_value]
            if len(sides) != 1 or sides[0].is_constant or sides[0].shape != value.shape:
                break
            other = sides[0]
        elif reader.op.name in ("relu", "clip"):
            if reader.op.name == "relu":
                lo = 0.0
            else:
                least, most = reader.attr("min"), reader.attr("max")
                lo = -np.inf if least is None else float(least)
                hi = np.inf if most is None else float(most)
            return reader.output, other, (lo, hi)
        else:
            break
        value = reader.output
    return value, other, (lo, hi)


def _positions(node: Node, shape: tuple[int, ...], count: int, rng: np.random.Generator) -> Array:
    """Draw distinct rows of a result: indices over all axes but the channels."""
    rows = int(np.prod(shape)) // shape[1 if node.op.name == "conv" else -1]
    chosen: Array = np.sort(rng.choice(rows, min(count, rows), replace=False))
    return chosen


def _groups(node: Node) -> int:
    return int(node.attr("group")) if node.op.name == "conv" else 1


def _results(node: Node, y: Array, rows: Array) -> Array:
    """Return rows of a result as [G, P, O]."""
    flat = np.moveaxis(y, 1, -1) if node.op.name == "conv" else y
    picked = flat.reshape(-1, flat.shape[-1])[rows]
    groups = _groups(node)
    moved: Array = picked.reshape(len(rows), groups, -1).transpose(1, 0, 2)
    return np.ascontiguousarray(moved)


def _operands(node: Node, x: Array, rows: Array) -> Array:
    """Return the operand rows that give those rows of the result, as [G, P, K]."""
    if node.op.name != "conv":
        picked: Array = x.reshape(-1, x.shape[-1])[rows]
        return picked[None]
    kernel = node.input(1).shape[2:]
    pads, strides, dilations = (node.attr(a) for a in ("pads", "strides", "dilations"))
    half = len(kernel)
    padded = np.pad(
        x, [(0, 0), (0, 0), *((pads[i], pads[half + i]) for i in range(half))]
    )  # what pads is real 0
    n, oh, ow = np.unravel_index(rows, (x.shape[0], *node.output.shape[2:]))
    ys = oh[:, None] * strides[0] + np.arange(kernel[0]) * dilations[0]
    xs = ow[:, None] * strides[1] + np.arange(kernel[1]) * dilations[1]
    taken = padded[n[:, None, None], :, ys[:, :, None], xs[:, None, :]]  # [P, kh, kw, C]
    flat = taken.transpose(0, 3, 1, 2).reshape(len(rows), _groups(node), -1)
    return np.ascontiguousarray(flat.transpose(1, 0, 2))


def _matrix(node: Node, w: Array) -> Array:
    """Return weights as [G, K, O]."""
    if node.op.name != "conv":
        return w[None]
    groups = _groups(node)
    return np.ascontiguousarray(w.reshape(groups, w.shape[0] // groups, -1).transpose(0, 2, 1))


def _unmatrix(node: Node, m: Array) -> Array:
    if node.op.name != "conv":
        matrix: Array = m[0]
        return matrix
    w: Array = np.ascontiguousarray(m.transpose(0, 2, 1)).reshape(node.input(1).shape)
    return w


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
    bias = node.optional(2)
    groups = _groups(node)
    outputs = train.y.shape[2]
    flat_bias = np.zeros((groups, 1, outputs), np.float32)
    if bias is not None:
        flat_bias = np.broadcast_to(bias.array(), (groups * outputs,)).reshape(groups, 1, outputs)
    shape = [1] * w.ndim
    axis = 0 if node.op.name == "conv" else 1
    shape[axis] = w.shape[axis]
    steps = np.broadcast_to(grid.scale.reshape(shape if grid.scale.ndim else [1] * w.ndim), w.shape)
    s = _matrix(node, np.ascontiguousarray(steps))
    found = _fit(_matrix(node, w), s, (grid.qmin, grid.qmax), flat_bias, train, iterations, rng)
    rounded = _unmatrix(node, found)
    errors = [
        float(np.mean((np.clip(test.residual(test.x @ m + flat_bias), *test.clamp) - test.y) ** 2))
        for m in (_matrix(node, nearest), found)
    ]
    if errors[1] < errors[0]:
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
    z = np.clip(data.residual(data.x @ nearest + bias), low, high)
    unit = float(np.mean((z - data.y) ** 2)) or 1.0  # what rounding to nearest costs
    weight = np.float32(w.size / (unit * data.y.shape[0] * data.y.shape[2]))
    for step in range(iterations):
        chosen = rng.integers(0, rows, min(BATCH, rows))
        x, y = data.x[:, chosen], data.y[:, chosen]
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
