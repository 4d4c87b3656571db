# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`gptq` and `distill` on weights that share scales in groups along K."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from calibrated import prepared

from qcompiler.ir import Graph
from qcompiler.numerics import fake_quantize, quantize
from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable
from qcompiler.passes.distill import Distill, Learned
from qcompiler.passes.gptq import Gptq, grouped_columns
from qcompiler.passes.held_out import Judge, quantized, shares
from qcompiler.passes.insert_qdq import WeightGrids
from qcompiler.passes.least_squares import (
    Columns,
    best_scales,
    damped,
    descend,
    group_scales,
    moments,
    round_columns,
    squared_error,
)
from qcompiler.passes.patches import matrix_of
from qcompiler.passes.single_node import units
from qcompiler.passmanager import PassManager
from qcompiler.plan import PrecisionPlan
from qcompiler.types import Array, DType, PerGroup, QuantParams

NET = """(float[1,3,12,12] x) => (float[1,5] y) {
  a = Conv <pads = [1,1,1,1]> (x, w1, b1)
  r = Relu(a)
  c = Conv <pads = [1,1,1,1]> (r, w2, b2)
  s = Relu(c)
  d = Conv(s, w3)
  t = Relu(d)
  p = GlobalAveragePool(t)
  f = Flatten(p)
  g = Gemm(f, w4, b4)
  h = Relu(g)
  y = Gemm(h, w5, b5)
}"""


@pytest.fixture
def net(load_text: Callable[..., Graph], rng: np.random.Generator) -> Graph:
    def w(*shape: int) -> Array:
        # Input channels of unlike range: one scale per output channel suits few of them.
        scale = np.exp(rng.standard_normal((1, shape[1], *[1] * (len(shape) - 2))))
        return (0.3 * scale * rng.standard_normal(shape)).astype(np.float32)

    return load_text(
        NET,
        w1=w(32, 3, 3, 3),
        b1=w(32, 1)[:, 0],
        w2=w(80, 32, 3, 3),
        b2=w(80, 1)[:, 0],
        w3=w(48, 80, 1, 1),
        w4=w(48, 144),
        b4=w(144, 1)[:, 0],
        w5=w(144, 5),
        b5=w(5, 1)[:, 0],
    )


@pytest.fixture
def samples(rng: np.random.Generator) -> dict[str, Array]:
    coarse = rng.standard_normal((48, 3, 4, 4)).repeat(3, 2).repeat(3, 3)
    return {"x": (coarse + 0.1 * rng.standard_normal(coarse.shape)).astype(np.float32)}


def test_columns_of_a_group_share_its_scale(net: Graph, samples: dict[str, Array]) -> None:
    """Which column has which scale is what the numerics make of the grid, kernels and matrices."""
    ctx = prepared(net, samples, "w4a8-group")
    qdq = quantized(net, ctx.get(PrecisionPlan), ctx.get(CalibrationTable))
    seen = []
    for unit in units(net):
        node, producer = net.node(unit.node), qdq.node(unit.node).input(1).producer
        assert producer is not None
        grid = producer.input(0).qparams
        assert grid is not None
        groups = grouped_columns(node, grid)
        if groups is None:
            continue
        assert isinstance(grid.granularity, PerGroup)
        shape = node.input(1).shape
        axis = 1 if node.op.name == "conv" else 0
        scale = np.asarray(grid.scale)
        parts = (scale if axis else scale.T).reshape(scale.shape[0 if axis else 1], -1)
        units_of = matrix_of(node, fake_quantize(np.full(shape, 1e9, np.float32), grid))
        np.testing.assert_array_equal(units_of[0].T, parts[:, groups] * np.float32(grid.qmax))
        seen.append((node.op.name, shape))
    assert ("conv", (80, 32, 3, 3)) in seen
    assert any(op == "matmul" for op, _ in seen)


def test_scales_in_groups_lose_less(rng: np.random.Generator) -> None:
    """Columns of unlike range want scales of their own, and make up for each other all the same."""
    mix = rng.standard_normal((48, 48)) * np.linspace(0.1, 1.5, 48)
    m = damped(moments((rng.standard_normal((1, 900, 48)) @ mix).astype(np.float32)), 0.01)
    w = rng.standard_normal((1, 10, 48)) * np.repeat([1.0, 0.3, 0.1], 16)
    groups = np.arange(48) // 16
    limits = (-8, 7)
    codes, scale = group_scales(m, w, groups, np.linspace(1.15, 0.7, 10), limits, np.ones(1), rng)
    assert scale.shape == (1, 10, 3)
    assert (codes == np.rint(codes)).all()
    assert codes.min() >= -8
    assert codes.max() <= 7
    every = scale[:, :, groups]
    found = squared_error(m, codes, w, every)
    nearest = squared_error(m, np.clip(np.rint(w / every), *limits), w, every)
    assert (found < nearest).all()
    assert found.sum() < 0.6 * nearest.sum()
    s = np.abs(w).max(2) / 8
    q, one = best_scales(m, w, s, np.linspace(1, 0.4, 13), limits, np.zeros_like(s), rng)
    assert found.sum() < 0.7 * squared_error(m, q, w, one).sum()
    unit = scale.max(2, keepdims=True) / 16
    np.testing.assert_allclose(scale / unit, np.rint(scale / unit), rtol=1e-6)


def test_equal_scales_round_as_one(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 300, 20)) @ rng.standard_normal((20, 20))
    m = damped(moments(x.astype(np.float32)), 0.01)
    w = rng.standard_normal((2, 6, 20))
    s = np.abs(w).max(2) / 8
    every = np.repeat(s[:, :, None], 20, 2)
    one, many = (round_columns(Columns.of(m), w, t, (-8, 7)) for t in (s, every))
    np.testing.assert_array_equal(one, many)
    np.testing.assert_array_equal(
        descend(m, one, w, s, (-8, 7)), descend(m, many, w, every, (-8, 7))
    )


def test_grouped_products_are_rounded_with_what_they_read(
    net: Graph, samples: dict[str, Array]
) -> None:
    """The result is better held out than nearest, stays on its grids, and one seed gives one."""
    ctx = prepared(net, samples, "w4a8-group")
    plan, table = ctx.get(PrecisionPlan), ctx.get(CalibrationTable)
    judge = Judge(net, list(shares(ctx.get(CalibrationSet), 8)[1]))
    nearest = judge.error(quantized(net, plan, table))
    results = []
    for _ in range(2):
        ctx = prepared(net, samples, "w4a8-group")
        after = PassManager([Gptq()], given=tuple(ctx.artifacts)).run(net, ctx)
        grids = ctx.get(WeightGrids)
        assert judge.error(quantized(after, plan, table, grids)) < 0.5 * nearest
        grouped = [n for n, g in grids.nodes.items() if isinstance(g.granularity, PerGroup)]
        assert len(grouped) >= 3
        for name in grouped:
            w, grid = after.node(name).input(1).array(), grids.nodes[name]
            np.testing.assert_allclose(fake_quantize(w, grid), w, rtol=1e-6, atol=1e-9)
        results.append([quantize(after.node(n).input(1).array(), grids.nodes[n]) for n in grouped])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("axis", "shape"), [(1, (6, 48, 3, 3)), (0, (48, 6))])
def test_slopes_by_scales_of_groups(
    axis: int, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    """The scales of a column move together, against the slope that differences show."""
    held = list(shape)
    held[axis] //= 16
    scale = np.exp(rng.standard_normal(held)).astype(np.float32)
    zero = np.zeros(held, np.int32)
    grid = QuantParams(scale, zero, DType.INT8, -8, 7, PerGroup(axis, 16))
    codes = rng.integers(-8, 8, shape)
    bias = np.zeros(6, np.float32)
    p = Learned(codes, grid, bias, np.zeros(1, np.float32), 0.1, 1 - axis)
    before = p.rounded()
    np.testing.assert_allclose(before.weights, fake_quantize(before.weights, grid), rtol=1e-6)
    slope = rng.standard_normal(shape).astype(np.float32)
    p.update("p", {"lesson/p/w": slope, "lesson/p/b": bias}, (0.0, 1e-2, 0.0))
    columns = [np.moveaxis(a, 1 - axis, 0).reshape(6, -1) for a in (p.rounded().grid.scale, scale)]
    ratio = columns[0] / columns[1]
    np.testing.assert_allclose(ratio, ratio[:, :1].repeat(ratio.shape[1], 1), rtol=1e-6)
    change = np.moveaxis(slope * codes * np.repeat(scale, 16, axis), 1 - axis, 0).reshape(6, -1)
    np.testing.assert_array_equal(ratio[:, 0] > 1, change.sum(1) < 0)


def test_grouped_products_are_learned_together(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples, "w4a8-group")
    plan, table = ctx.get(PrecisionPlan), ctx.get(CalibrationTable)
    judge = Judge(net, list(shares(ctx.get(CalibrationSet), 8)[1]))
    nearest = judge.error(quantized(net, plan, table))
    p = Distill(epochs=8, batch=8, scale_rate=4e-3, bias_rate=4e-4)
    after = PassManager([p], given=tuple(ctx.artifacts)).run(net, ctx)
    grids = ctx.get(WeightGrids)
    assert "kept" in ctx.log[-1]
    assert judge.error(quantized(after, plan, table, grids)) < 0.7 * nearest
    assert sum(isinstance(g.granularity, PerGroup) for g in grids.nodes.values()) >= 3
