# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Rounding by reconstruction: trails, least squares, blocks, and the passes made of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from calibrated import apply, pictures, prepared, residual_net, residual_weights

from qcompiler.errors import UsageError
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.numerics import quantize
from qcompiler.passes.blocks import Tiles, blocks_of, channel_major, tap_major
from qcompiler.passes.brecq import Brecq, _Set
from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.held_out import Judge, quantized, shares
from qcompiler.passes.insert_qdq import InsertQdq, WeightGrids
from qcompiler.passes.least_squares import (
    Columns,
    best_scales,
    damped,
    descend,
    moments,
    round_columns,
    squared_error,
)
from qcompiler.passes.reconstruction import Reconstruction
from qcompiler.passes.single_node import units
from qcompiler.passes.trails import Trail, live_values, most_live, recomputed_nodes
from qcompiler.passmanager import Pass, PassContext, PassManager
from qcompiler.plan import PrecisionPlan, uniform
from qcompiler.types import Array


@pytest.fixture
def net(load_text: Callable[..., Graph], rng: np.random.Generator) -> Graph:
    return load_text(residual_net(4), **residual_weights(4, rng))


@pytest.fixture
def samples(rng: np.random.Generator) -> dict[str, Array]:
    return pictures(4, rng)


def held_out_error(graph: Graph, after: Graph, ctx: PassContext) -> tuple[float, float]:
    """Return the error of rounding to nearest, and of the graph that a method left."""
    plan, table = ctx.get(PrecisionPlan), ctx.get(CalibrationTable)
    judge = Judge(graph, list(shares(ctx.get(CalibrationSet), 8)[1]))
    grids = ctx.get(WeightGrids)
    return judge.error(quantized(graph, plan, table)), judge.error(
        quantized(after, plan, table, grids)
    )


# --------------------------------------------------------------------------------------- trails


def test_a_trail_gives_what_a_whole_run_gives(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    qdq = quantized(net, ctx.get(PrecisionPlan), ctx.get(CalibrationTable))
    batches = list(ctx.get(CalibrationSet))[:2]
    for graph in (net, qdq):
        trail = Trail(graph, batches)
        seen: dict[str, Array] = {}
        run(graph, batches[1].inputs, observe=lambda v, a, into=seen: into.update({v.name: a}))
        for node in graph.nodes:
            if node.op.name != "conv":
                continue
            trail.advance(node)
            wanted = [node.input(0), node.output]
            got = list(trail.values(wanted))[1]
            for v in wanted:
                np.testing.assert_allclose(got[v.name], seen[v.name], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="lies before the cut"):
        trail.advance(qdq.nodes[0])


def test_a_trail_runs_only_what_lies_between_two_cuts(
    net: Graph, samples: dict[str, Array]
) -> None:
    """Of a quantized graph only weights and the last dequantizing run again, not all before it."""
    ctx = prepared(net, samples)
    qdq = quantized(net, ctx.get(PrecisionPlan), ctx.get(CalibrationTable))
    for graph in (net, qdq):
        again = recomputed_nodes(graph)
        assert not {n.op.name for n in again} - {"dequantize"}
        trail = Trail(graph, list(ctx.get(CalibrationSet))[:1])
        last = [n for n in graph.nodes if n.op.name == "conv"][-1]
        trail.advance(last)
        assert "x" not in trail.mark()[1][0]
        live = live_values(graph, graph.nodes.index(last), again)
        assert set(trail.mark()[1][0]) == {v.name for v in live}
        x = last.input(0)
        assert (x if x.producer not in again else x.producer.input(0)) in live


def test_runs_that_join_later_catch_up(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    qdq = quantized(net, ctx.get(PrecisionPlan), ctx.get(CalibrationTable))
    batches = list(ctx.get(CalibrationSet))[:3]
    for graph in (net, qdq):
        whole, joined = Trail(graph, batches), Trail(graph, batches[:1])
        for at, node in enumerate(n for n in graph.nodes if n.op.name == "conv"):
            for trail in (whole, joined):
                trail.advance(node)
            if at == 2:
                joined.join(batches[1:])
            if at >= 2:
                pairs = zip(whole.values([node.output]), joined.values([node.output]), strict=True)
                for want, got in pairs:
                    np.testing.assert_array_equal(got[node.output.name], want[node.output.name])


def test_a_trail_holds_integers_and_follows_new_weights(
    net: Graph, samples: dict[str, Array]
) -> None:
    ctx = prepared(net, samples)
    qdq = quantized(net, ctx.get(PrecisionPlan), ctx.get(CalibrationTable))
    batches = list(ctx.get(CalibrationSet))[:1]
    trail = Trail(qdq, batches)
    convs = [n for n in qdq.nodes if n.op.name == "conv"]
    trail.advance(convs[1])
    held = trail.mark()[1][0]
    assert {a.dtype for a in held.values()} == {np.dtype(np.uint8)}
    mark = trail.mark()
    before = next(trail.values([convs[1].output]))[convs[1].output.name]
    weights = convs[1].input(1).producer
    assert weights is not None
    old = weights.input(0)
    flipped = qdq.constant(-old.array(), old.name, old.qparams)
    qdq.set_input(weights, 0, flipped)
    trail.advance(convs[2])
    trail.back_to(mark)
    after = next(trail.values([convs[1].output]))[convs[1].output.name]
    bias = convs[1].input(2).producer
    assert bias is not None
    assert np.abs(after - before).max() > 0.1  # the weights count although they lie before the cut
    assert most_live(net) >= 8 * 5 * 5 * 4


# -------------------------------------------------------------------------------- least squares


def test_columns_make_up_for_each_other(rng: np.random.Generator) -> None:
    """The error on correlated operands is below that of rounding to nearest, and descent helps."""
    mix = rng.standard_normal((24, 24)) * np.linspace(0.05, 1.5, 24)
    x = (rng.standard_normal((1, 600, 24)) @ mix).astype(np.float32)
    m = damped(moments(x), 0.01)
    w = rng.standard_normal((1, 12, 24))
    s = np.abs(w).max(2) / 7
    nearest = np.clip(np.rint(w / s[:, :, None]), -8, 7)
    codes = round_columns(Columns.of(m), w, s, (-8, 7))
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert (codes == np.rint(codes)).all()
    better = descend(m, codes, w, s, (-8, 7))
    errors = [squared_error(m, q, w, s).sum() for q in (nearest, codes, better)]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] <= errors[1]
    found, scale = best_scales(m, w, s, np.linspace(1, 0.5, 6), (-8, 7), np.zeros_like(s), rng)
    assert (squared_error(m, found, w, scale) <= 1.0001 * squared_error(m, better, w, s)).all()


def test_small_products_are_solved_nearly_exactly(rng: np.random.Generator) -> None:
    """Three weights of two bits: close to the best of all codes."""
    x = (rng.standard_normal((1, 200, 3)) @ rng.standard_normal((3, 3))).astype(np.float32)
    m = damped(moments(x), 1e-6)
    w, s = rng.standard_normal((1, 40, 3)), np.full((1, 40), 0.6)
    q = descend(m, round_columns(Columns.of(m), w, s, (-2, 1)), w, s, (-2, 1))
    every = np.array(list(itertools.product(range(-2, 2), repeat=3)), float)
    least = [
        squared_error(m, every[None], np.broadcast_to(w[:, i : i + 1], (1, 64, 3)), s[:, :1]).min()
        for i in range(40)
    ]
    found = squared_error(m, q, w, s)[0]
    assert (found <= np.asarray(least) * (1 + 1e-9) + 1e-12).mean() > 0.6
    assert found.sum() < 1.5 * np.sum(least)


# ---------------------------------------------------------------------------------------- blocks


def test_blocks(net: Graph) -> None:
    """A residual block stands alone; plain layers are gathered up to a linear one."""
    every = units(net)
    blocks = blocks_of(net, every, every)
    assert [[u.node for u in b.units] for b in blocks] == [
        [every[0].node],
        [u.node for u in every[1:3]],
        [u.node for u in every[3:]],
    ]
    assert blocks[1].result.producer is not None
    assert blocks[1].result.producer.op.name == "add"


@pytest.fixture
def tiles(
    net: Graph, samples: dict[str, Array]
) -> tuple[Tiles, _Set, dict[str, tuple[Array, Array]]]:
    ctx = prepared(net, samples)
    qdq = quantized(net, ctx.get(PrecisionPlan), ctx.get(CalibrationTable))
    every = units(net)
    block = blocks_of(net, every, every)[1]
    made = Tiles(block, qdq, 3)
    batches = list(ctx.get(CalibrationSet))[:4]
    found = _Set.of(made, Trail(net, batches), Trail(qdq, batches), 9, np.random.default_rng(0))
    # What the quantized network gives stands in for the float results: it is known exactly.
    rng, exact = np.random.default_rng(0), []
    for batch in batches:
        seen: dict[str, Array] = {}
        run(qdq, batch.inputs, observe=lambda v, a, into=seen: into.update({v.name: a}))
        places = made.positions(9, rng)
        exact += [made.cut(block.result, seen[block.result.name], at) for at in places]
    found.y = np.concatenate(exact)
    weights = {}
    for u in block.units:
        node = qdq.node(u.node)
        w, b = (
            np.zeros(node.output.shape[1], np.float32) if v is None else run_constant(qdq, v.name)
            for v in (node.optional(1), node.optional(2))
        )
        weights[u.node] = (tap_major(net.node(u.node), w), b)
    return made, found, weights


def run_constant(graph: Graph, name: str) -> Array:
    """Return a value that follows from constants alone."""
    found: dict[str, Array] = {}
    feed = {v.name: np.zeros(v.shape, np.float32) for v in graph.inputs}
    run(graph, feed, observe=lambda v, a: found.update({v.name: a}))
    return found[name]


def test_tiles_compute_the_block(
    tiles: tuple[Tiles, _Set, dict[str, tuple[Array, Array]]],
) -> None:
    """Strides, groups, borders, a sum and rounded activations: as the whole network gives them."""
    made, found, weights = tiles
    y, _ = made.forward(found.x, weights, found.masks)
    np.testing.assert_allclose(y, found.y, atol=2e-3)
    assert found.masks  # some tiles reach over the border


def test_slopes_of_tiles(tiles: tuple[Tiles, _Set, dict[str, tuple[Array, Array]]]) -> None:
    """Against differences of the loss, with rounding of activations switched off."""
    made, found, weights = tiles
    made.operands = {}
    rng = np.random.default_rng(1)
    # Off the grid, on which sums meet the clamp's corner exactly.
    exact = {
        n: (w + 0.01 * rng.standard_normal(w.shape), b + 0.01 * rng.standard_normal(b.shape))
        for n, (w, b) in weights.items()
    }
    aim = found.y + rng.standard_normal(found.y.shape)

    def loss(given: dict[str, tuple[Array, Array]]) -> float:
        y, _ = made.forward(found.x, given, found.masks)
        return float(((y - aim) ** 2).sum())

    y, tape = made.forward(found.x, exact, found.masks)
    slopes = made.backward(2 * (y - aim), tape, exact)
    assert set(slopes) == set(exact)
    for name, (w, b) in exact.items():
        for at in (0, 1):
            step = 1e-7 * rng.standard_normal((w, b)[at].shape)
            sides = []
            for sign in (1, -1):
                moved = (w + sign * step, b) if at == 0 else (w, b + sign * step)
                sides.append(loss({**exact, name: moved}))
            want = (sides[0] - sides[1]) / 2
            np.testing.assert_allclose((slopes[name][at] * step).sum(), want, rtol=1e-2)


def test_weight_orders(net: Graph) -> None:
    for node in net.nodes:
        if node.op.name == "conv":
            w = node.input(1).array()
            np.testing.assert_array_equal(channel_major(node, tap_major(node, w)), w)


def test_what_is_no_tile(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    qdq = quantized(net, ctx.get(PrecisionPlan), ctx.get(CalibrationTable))
    every = units(net)
    with pytest.raises(ValueError, match="cannot be part of a tile"):
        Tiles(blocks_of(net, every, every)[2], qdq, 4)


# ---------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize(
    "method", [Gptq(patches=2048), Brecq(iterations=60, tiles=128, patches=2048)]
)
def test_reconstruction_beats_rounding_to_nearest(
    method: Pass, net: Graph, samples: dict[str, Array]
) -> None:
    ctx = prepared(net, samples)
    after = apply(method, net, ctx)
    assert ctx.log[-1].startswith(f"{method.name}: kept")
    nearest, learned = held_out_error(net, after, ctx)
    assert learned < 0.5 * nearest
    grids = ctx.get(WeightGrids)
    assert len(grids.nodes) == 5
    qdq = PassManager([InsertQdq()], given=tuple(ctx.artifacts)).run(after, ctx)
    for name, grid in grids.nodes.items():
        held = qdq.node(name).input(1).producer
        assert held is not None
        codes = held.input(0).array()
        assert codes.min() >= -8
        assert codes.max() <= 7
        np.testing.assert_array_equal(quantize(after.node(name).input(1).array(), grid), codes)
        assert after.node(name).optional(2) is not None  # the mean is restored by a bias


@pytest.mark.parametrize("text", ["gptq", "brecq"])
def test_one_seed_gives_one_result(text: str, net: Graph, samples: dict[str, Array]) -> None:
    short = Gptq(patches=256) if text == "gptq" else Brecq(iterations=20, tiles=64, patches=256)
    first, second = (str(apply(short, net, prepared(net, samples))) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("method", [Gptq(seconds=-1.0), Brecq(seconds=-1.0)])
def test_the_time_limit(method: Pass, net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    assert str(apply(method, net, ctx)) == str(net)
    assert "5 were not reached in -1 s" in ctx.log[-1]
    assert "discarded" in ctx.log[-1]


def test_matrix_products(load_text: Callable[..., Graph], rng: np.random.Generator) -> None:
    graph = load_text(
        """(float[1,6,16] x) => (float[1,6,8] y) {
        a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }""",
        w=rng.standard_normal((16, 24)).astype(np.float32),
        v=rng.standard_normal((24, 8)).astype(np.float32),
    )
    x = rng.standard_normal((64, 6, 16)) @ rng.standard_normal((16, 16))
    ctx = prepared(graph, {"x": x.astype(np.float32)})
    after = apply(Brecq(iterations=5), graph, ctx)
    assert "0 of 0 blocks better still together" in ctx.log[-1]  # products alone: as gptq
    nearest, learned = held_out_error(graph, after, ctx)
    assert learned < 0.5 * nearest


def test_only_narrow_products_change(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    plan = uniform(net, "w8a8").overridden(net, {units(net)[1].node: "w4a8"})
    ctx.put(plan)
    walk = Reconstruction.start(net, ctx, 4)
    assert walk is not None
    assert [u.node for u in walk.units] == [units(net)[1].node]


def test_weights_in_groups_are_left_alone(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    grouped = {u.node: "w4a8-group" for u in units(net)[2:]}
    ctx.put(uniform(net, "w4a8").overridden(net, grouped))
    walk = Reconstruction.start(net, ctx, 4)
    assert walk is not None
    assert [u.node for u in walk.units] == [u.node for u in units(net)[:2]]


def test_options() -> None:
    with pytest.raises(UsageError, match="runs and patches must be at least 1"):
        Gptq(runs=0)
    with pytest.raises(UsageError, match="views must be 0 or more"):
        Gptq(views=-1)
    with pytest.raises(UsageError, match="expected a number above 0"):
        Gptq(damp=0.0)
    with pytest.raises(UsageError, match="must be at least 1"):
        Brecq(batch=0)
