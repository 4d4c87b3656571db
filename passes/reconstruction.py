# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What the methods that round weights by data share: the walk along both networks and the verdict.

Products get new weights in the order of the network. The float network and the quantized one, with
the products before already changed, are walked along side by side, on the runs to learn from and on
the runs held out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from qcompiler.data import Batch
from qcompiler.errors import UsageError
from qcompiler.ir import Graph, Node
from qcompiler.numerics import least_weight_scale, quantize, quantize_bias
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
from qcompiler.passes.single_node import Unit, units
from qcompiler.passes.trails import MEMORY, Trail, most_live
from qcompiler.passes.views import is_picture, view
from qcompiler.passes.weights import bias_qparams
from qcompiler.passmanager import PassContext
from qcompiler.plan import PrecisionPlan
from qcompiler.printer import digest
from qcompiler.types import Array, Precision, QuantParams


@dataclass
class Rounded:
    """New weights of a product.

    Attributes:
        weights: On the grid, in the product's shape.
        grid: The grid.
        bias: Bias [O].
    """

    weights: Array
    grid: QuantParams
    bias: Array


@dataclass
class Reconstruction:
    """A network on its way from float weights to rounded ones.

    Attributes:
        graph: The graph given.
        exact: FLOAT graph whose results are the aim.
        changed: Copy of the graph given that takes the new weights.
        qdq: The same quantized; takes them too.
        units: Products to change, in order.
        work: Trails (exact, quantized) on the runs to learn from.
        test: Trails on the runs held out.
        before: Error held out of the graph given.
        runs: The runs to learn from.
    """

    graph: Graph
    exact: Graph
    changed: Graph
    qdq: Graph
    units: tuple[Unit, ...]
    work: tuple[Trail, Trail]
    test: tuple[Trail, Trail]
    judge: Judge
    before: float
    grids: dict[str, QuantParams] = field(default_factory=dict)
    done: dict[str, Rounded] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    runs: list[Batch] = field(default_factory=list)

    @classmethod
    def start(
        cls, graph: Graph, ctx: PassContext, runs: int, grouped: bool = False
    ) -> Reconstruction | None:
        """Return the start of a walk; None where there is no product to change.

        Products that the plan holds in fewer than 8 bits are changed; all of them where there is
        none. With fewer runs than asked for, where the live values take too much memory.

        Args:
            graph: The graph to change.
            ctx: Plan, table and samples.
            runs: Calibration runs to learn from, at most.
            grouped: Whether products whose weights share scales in groups are changed too.
        """
        plan, table = ctx.get(PrecisionPlan), ctx.get(CalibrationTable)
        names = weighted_products(graph, plan)
        if not grouped:
            names = [n for n in names if plan.precision(n) is not Precision.W4A8_GROUP]
        narrow = {n for n in names if plan.precision(n).weight_bits < 8}
        wanted = narrow or set(names)
        found = tuple(u for u in units(graph) if u.node in wanted)
        if not found:
            return None
        known = ctx.find(FloatModel)
        exact = (graph if known is None else known.graph).clone()
        ctx.put(FloatModel(exact))
        given = ctx.find(WeightGrids) or WeightGrids()
        changed = graph.clone()
        for unit in found:
            _give_bias(changed, changed.node(unit.node))
        qdq = quantized(changed, plan, table, given)
        room = max(4, MEMORY // max(most_live(exact), 1))
        work, held_out = shares(ctx.get(CalibrationSet), min(runs, room))
        learn, others = list(work), list(held_out)
        judge = Judge(exact, others)
        test = others[: max(1, min(room, len(learn) // 2))]
        return cls(
            graph,
            exact,
            changed,
            qdq,
            found,
            (Trail(exact, learn), Trail(qdq, learn)),
            (Trail(exact, test), Trail(qdq, test)),
            judge,
            judge.error(quantized(graph, plan, table, given)),
            dict(given.nodes),
            runs=learn,
        )

    def widen(self, name: str, views: int, seed: int) -> bool:
        """Learn from more views of the pictures from here on, once that takes little memory.

        Args:
            name: The product that the walk is at.
            views: Views of each run.
            seed: Chooses them.

        Returns:
            Whether the views have joined, or there are none to join.
        """
        types = {v.name: v.type for v in self.exact.inputs}
        if views == 0 or not any(is_picture(t) for t in types.values()):
            return True
        at = self.exact.nodes.index(self.exact.node(name))
        if (1 + views) * len(self.runs) * most_live(self.exact, at) > MEMORY // 4:
            return False

        def more() -> Iterator[Batch]:
            rng = np.random.default_rng((seed, views))
            for _ in range(views):
                for batch in self.runs:
                    yield view(batch, types, rng)

        for trail in self.work:
            trail.join(more())
        return True

    def expired(self, seconds: float | None) -> bool:
        """Whether the time is up."""
        return seconds is not None and time.monotonic() - self.started > seconds

    def advance(self, name: str) -> None:
        """Walk up to a product."""
        for exact, rounded in (self.work, self.test):
            exact.advance(self.exact.node(name))
            rounded.advance(self.qdq.node(name))

    def grid(self, name: str) -> QuantParams:
        """Return the grid of the weights that a product has now."""
        producer = self.qdq.node(name).input(1).producer
        q = None if producer is None else producer.input(0).qparams
        if q is None:
            raise UsageError(f"the weights of {name!r} are not quantized", node=name)
        return q

    def least_scale(self, name: str, bias: Array) -> Array:
        """Return the least scale of each output channel with which a bias fits int32."""
        return least_weight_scale(bias, operand_scale(self.qdq.node(name)))

    def put(self, name: str, new: Rounded) -> None:
        """Give a product its new weights."""
        put_product(self.qdq, name, new)
        node = self.changed.node(name)
        for i, data in ((1, new.weights), (2, new.bias)):
            base = self.changed.fresh(f"{node.input(i).name}_rounded")
            self.changed.set_input(node, i, self.changed.constant(data.astype(np.float32), base))
        self.grids[name] = new.grid
        self.done[name] = new

    def finish(
        self,
        name: str,
        ctx: PassContext,
        better: int,
        reached: int,
        seconds: float | None,
        detail: str = "",
    ) -> bool:
        """Take the new weights over as `take_over` does, and say how many products gained.

        Args:
            name: Name of the method.
            ctx: Takes the line of the log, the grids and the table.
            better: Products that are rounded better than to nearest.
            reached: Products that were reached in time.
            seconds: The time limit.
            detail: More for the log.

        Returns:
            Whether the graph given was modified.
        """
        text = f"{better} of {len(self.units)} products are rounded better than to nearest{detail}"
        if reached < len(self.units):
            within = "" if seconds is None else f" in {seconds:g} s"
            text += f", {len(self.units) - reached} were not reached{within}"
        return self.take_over(name, ctx, text)

    def take_over(self, name: str, ctx: PassContext, text: str) -> bool:
        """Take the new weights over where they are better held out, and say so in the log.

        Args:
            name: Name of the method.
            ctx: Takes the line of the log, the grids and the table.
            text: What the method did, for the log.

        Returns:
            Whether the graph given was modified.
        """
        plan, table = ctx.get(PrecisionPlan), ctx.get(CalibrationTable)
        after = self.judge.error(quantized(self.changed, plan, table, WeightGrids(self.grids)))
        kept, line = verdict(name, self.before, after)
        ctx.log.append(f"{line}; {text}")
        if not kept or not self.done:
            return False
        for product in self.done:
            source, node = self.changed.node(product), self.graph.node(product)
            for i in (1, 2):
                v = source.input(i)
                data = self.graph.constant(v.array(), self.graph.fresh(v.name))
                self.graph.set_input(node, i, data)
        ctx.put(WeightGrids(dict(self.grids)))
        ctx.put(dataclasses.replace(table, graph=digest(self.graph)))
        return True


def operand_scale(node: Node) -> float:
    """Return the scale of what a product of a QDQ graph reads."""
    producer = node.input(0).producer
    q = None if producer is None else producer.input(0).qparams
    if q is None:
        raise UsageError(f"what {node.name!r} reads is not quantized", node=node.name)
    return float(q.s)


def put_product(qdq: Graph, name: str, new: Rounded) -> None:
    """Replace the weights and the bias of a product of a QDQ graph."""
    node = qdq.node(name)
    weights, bias = node.input(1).producer, node.input(2).producer
    assert weights is not None
    old = weights.input(0).name
    qdq.set_input(weights, 0, qdq.constant(quantize(new.weights, new.grid), old, new.grid))
    if bias is None:  # beside scales per group it stays float
        qdq.set_input(node, 2, qdq.constant(new.bias.astype(np.float32), node.input(2).name))
        return
    x = operand_scale(node)
    ints = quantize_bias(new.bias, x, new.grid.scale).q
    held = qdq.constant(ints, bias.input(0).name, bias_qparams(x, new.grid))
    qdq.set_input(bias, 0, held)


def _give_bias(graph: Graph, node: Node) -> None:
    """Give a product a bias per output channel."""
    channels = node.input(1).shape[0 if node.op.name == "conv" else 1]
    bias = node.optional(2)
    if bias is not None and bias.shape == (channels,):
        return
    data = np.zeros(channels, np.float32)
    if bias is not None:
        data = np.broadcast_to(bias.array(), (channels,)).astype(np.float32)
    graph.set_input(node, 2, graph.constant(data, graph.fresh(f"{node.name}_bias")))
