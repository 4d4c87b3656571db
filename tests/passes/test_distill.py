# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Slopes as nodes of a graph, the lesson made of two networks, and the pass that learns from it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from calibrated import apply, pictures, prepared, residual_net, residual_weights

from qcompiler.data import Batch
from qcompiler.errors import UsageError
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.numerics import quantize
from qcompiler.ops import Stage
from qcompiler.passes import reconstruction, views
from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable
from qcompiler.passes.distill import Distill, Learned
from qcompiler.passes.held_out import Judge, quantized, shares
from qcompiler.passes.insert_qdq import InsertQdq, WeightGrids
from qcompiler.passes.lesson import ERRORS, Lesson, operand, resized, summed
from qcompiler.passes.methods import METHODS
from qcompiler.passes.reconstruction import Reconstruction
from qcompiler.passes.slopes import RULES, add_slopes
from qcompiler.passes.trails import most_live
from qcompiler.passmanager import PassContext, PassManager, parse_pass
from qcompiler.plan import PrecisionPlan, uniform
from qcompiler.types import Array, DType, PerTensor, QuantParams, TensorType


@pytest.fixture
def net(load_text: Callable[..., Graph], rng: np.random.Generator) -> Graph:
    return load_text(residual_net(3), **residual_weights(3, rng))


@pytest.fixture
def samples(rng: np.random.Generator) -> dict[str, Array]:
    return pictures(3, rng)


# ---------------------------------------------------------------------------------------- slopes


def checked(graph: Graph, names: dict[str, Array], rng: np.random.Generator) -> None:
    """Compare the slopes of sum(y * r) by every input with differences."""
    (y,) = graph.output_values
    r = rng.standard_normal(y.shape).astype(np.float32)
    held = {v.name: v for v in graph.inputs}
    found = add_slopes(graph, {y: graph.constant(r, "r")}, list(held.values()))
    assert {v.name for v in found} == set(names)
    graph.set_outputs([("y", y), *((f"d_{v.name}", d) for v, d in found.items())])
    graph.verify()
    got = run(graph, names)
    for name, x in names.items():
        assert got[f"d_{name}"].shape == x.shape
        direction = rng.standard_normal(x.shape).astype(np.float32)
        step = np.float32(1e-2)
        sides = [
            float((run(graph, {**names, name: x + sign * step * direction})["y"] * r).sum())
            for sign in (1, -1)
        ]
        want = (sides[0] - sides[1]) / (2 * step)
        slope = float((got[f"d_{name}"] * direction).sum())
        assert slope == pytest.approx(want, rel=0.02, abs=0.02), name


SMOOTH = {
    "sigmoid": {},
    "tanh": {},
    "silu": {},
    "hard_sigmoid": {"alpha": 0.2},
    "hard_swish": {},
    "relu": {},
    "leaky_relu": {"alpha": 0.1},
    "clip": {"min": -0.5, "max": 0.75},
    "reduce_mean": {"axes": (2, 3), "keepdims": True},
    "reduce_sum": {"axes": (-1,), "keepdims": False},
    "reshape": {"shape": (6, 4)},
    "transpose": {"perm": (0, 2, 3, 1)},
}


@pytest.mark.parametrize("op", SMOOTH)
def test_slopes_of_functions(op: str, rng: np.random.Generator) -> None:
    graph = Graph()
    x = graph.add_input("x", TensorType((1, 3, 4, 2), DType.FLOAT32))
    node = graph.add(op, [x], SMOOTH[op])
    graph.set_outputs([("y", node.output)])
    # Away from corners, where differences lie on both sides.
    given = np.linspace(-4, 4, 24) + 0.08
    checked(graph, {"x": rng.permutation(given).reshape(1, 3, 4, 2).astype(np.float32)}, rng)


@pytest.mark.parametrize("op", ["add", "sub", "mul"])
@pytest.mark.parametrize("other", [(1, 3, 4, 2), (3, 1, 1), (1, 1, 4, 2)])
def test_slopes_of_broadcasts(op: str, other: tuple[int, ...], rng: np.random.Generator) -> None:
    graph = Graph()
    shapes = {"a": (1, 3, 4, 2), "b": other}
    a, b = (graph.add_input(n, TensorType(s, DType.FLOAT32)) for n, s in shapes.items())
    graph.set_outputs([("y", graph.add(op, [a, b]).output)])
    given = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    checked(graph, given, rng)


def test_slopes_of_a_sum_of_paths(rng: np.random.Generator) -> None:
    """A value read twice, and pieces that are joined."""
    graph = Graph()
    a, b = (graph.add_input(n, TensorType((2, 3), DType.FLOAT32)) for n in "ab")
    both = graph.add("concat", [a, b, a], {"axis": 1}).output
    square = graph.add("mul", [both, both]).output
    graph.set_outputs([("y", square)])
    given = {n: rng.standard_normal((2, 3)).astype(np.float32) for n in "ab"}
    checked(graph, given, rng)


@pytest.mark.parametrize("samples_in_run", [1, 2])
@pytest.mark.parametrize(
    ("group", "kernel", "strides", "dilations", "pads"),
    [
        (1, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
        (1, (1, 1), (2, 2), (1, 1), (0, 0, 0, 0)),
        (1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
        (1, (3, 2), (2, 1), (1, 2), (0, 1, 1, 2)),
        (2, (3, 3), (2, 2), (1, 1), (0, 0, 1, 1)),
        (4, (3, 3), (1, 1), (2, 2), (1, 1, 1, 1)),
    ],
)
def test_slopes_of_convolutions(
    samples_in_run: int,
    group: int,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: tuple[int, ...],
    rng: np.random.Generator,
) -> None:
    graph = Graph()
    shapes = {"x": (samples_in_run, 4, 7, 8), "w": (8, 4 // group, *kernel), "b": (8,)}
    ins = [graph.add_input(n, TensorType(s, DType.FLOAT32)) for n, s in shapes.items()]
    attrs = {"group": group, "strides": strides, "dilations": dilations, "pads": pads}
    graph.set_outputs([("y", graph.add("conv", ins, attrs).output)])
    given = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    checked(graph, given, rng)


@pytest.mark.parametrize(
    ("a", "b"), [((5, 4), (4, 3)), ((2, 5, 4), (4, 3)), ((2, 5, 4), (2, 4, 3))]
)
def test_slopes_of_matrix_products(
    a: tuple[int, ...], b: tuple[int, ...], rng: np.random.Generator
) -> None:
    graph = Graph()
    shapes = {"a": a, "b": b, "c": (3,)}
    ins = [graph.add_input(n, TensorType(s, DType.FLOAT32)) for n, s in shapes.items()]
    graph.set_outputs([("y", graph.add("matmul", ins).output)])
    given = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    checked(graph, given, rng)


def test_slopes_stop_where_no_rule_is(rng: np.random.Generator) -> None:
    graph = Graph()
    a = graph.add_input("a", TensorType((2, 3), DType.FLOAT32))
    assert "softmax" not in RULES
    y = graph.add("softmax", [a]).output
    assert add_slopes(graph, {y: y}, [a]) == {}


def test_slopes_pass_rounding_but_not_clipping() -> None:
    graph = Graph(stage=Stage.QDQ)
    x = graph.add_input("x", TensorType((4,), DType.FLOAT32))
    q = QuantParams(
        np.asarray(0.5, np.float32), np.asarray(10, np.int32), DType.UINT8, 0, 20, PerTensor()
    )
    held = graph.add("quantize", [x], types=[TensorType((4,), DType.UINT8, q)]).output
    y = graph.add("dequantize", [held]).output
    seed = graph.constant(np.arange(1, 5, dtype=np.float32), "seed")
    found = add_slopes(graph, {y: seed}, [x])
    graph.set_outputs([("d", found[x])])
    got = run(graph, {"x": np.asarray([0.3, -5.1, 9.0, -7.0], np.float32)})["d"]
    np.testing.assert_array_equal(got, [1, 2, 0, 0])


# ---------------------------------------------------------------------------------------- lesson


def test_a_lesson(net: Graph, samples: dict[str, Array]) -> None:
    """Its errors are those of the two networks, and a step against the slopes lowers them."""
    ctx = prepared(net, samples)
    walk = Reconstruction.start(net, ctx, 8)
    assert walk is not None
    lesson = Lesson(walk)
    products = {u.node: Learned.of(walk, u.node) for u in walk.units}
    given = {k: a for n, p in products.items() for k, a in p.operands(n).items()}
    assert lesson.outputs == 1
    assert len(lesson.shares) == 3  # the output and two inner blocks
    lesson.shares[:] = 1
    x = walk.runs[0].inputs
    found = lesson.run({**x, **given})
    exact, rounded = (run(g, x) for g in (walk.exact, walk.qdq))
    (name,) = exact
    error = float(((exact[name] - rounded[name]) ** 2).sum())
    assert found[ERRORS][0] == pytest.approx(error, rel=1e-2)
    assert set(found) == {ERRORS, *given}
    step = {k: a - 2e-3 * np.sign(found[k]).astype(np.float32) for k, a in given.items()}
    assert lesson.run({**x, **step})[ERRORS].sum() < found[ERRORS].sum()
    both = summed([found, found])
    np.testing.assert_allclose(both[ERRORS], 2 * found[ERRORS])
    assert operand("c", 1) == "lesson/c/w"


def test_a_lesson_of_smaller_pictures_and_several_runs(
    net: Graph, samples: dict[str, Array], rng: np.random.Generator
) -> None:
    """Errors and slopes are sums over the runs joined; windows need not fill the picture."""
    ctx = prepared(net, samples)
    walk = Reconstruction.start(net, ctx, 8)
    assert walk is not None
    products = {u.node: Learned.of(walk, u.node) for u in walk.units}
    given = {k: a for n, p in products.items() for k, a in p.operands(n).items()}
    one, both = Lesson(walk), Lesson(walk, None, 2)
    assert (one.window, one.count, both.window, both.count) == (None, 1, None, 2)
    for lesson in (one, both):
        lesson.shares[:] = 1
    runs = [walk.runs[i].inputs["x"] for i in range(2)]
    found = summed([one.run({"x": x, **given}) for x in runs])
    joined = both.run({"x": np.concatenate(runs), **given})
    assert set(joined) == set(found)
    for name in found:
        np.testing.assert_allclose(joined[name], found[name], rtol=1e-3, atol=1e-3)
    small = Lesson(walk, 7, 3)
    assert (small.window, small.count) == (7, 3)
    small.shares[:] = 1
    got = small.run({"x": rng.standard_normal((3, 3, 7, 7)).astype(np.float32), **given})
    assert got[ERRORS].min() > 0


def test_a_lesson_where_operators_tie_the_extents_down(
    load_text: Callable[..., Graph], samples: dict[str, Array], rng: np.random.Generator
) -> None:
    """A matrix product of all positions has no smaller pictures, but reads several runs."""
    text = """(float[1,3,10,10] x) => (float[1,6] y) {
      c = Conv <pads = [1,1,1,1]> (x, w1)
      f = Flatten(c)
      y = Gemm(f, w2, b2)
    }"""
    shapes = {"w1": (4, 3, 3, 3), "w2": (400, 6), "b2": (6,)}
    net = load_text(
        text, **{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    )
    walk = Reconstruction.start(net, prepared(net, samples), 8)
    assert walk is not None
    assert resized(walk.exact, 7, 1) is None
    lesson = Lesson(walk, 7, 2)
    assert (lesson.window, lesson.count) == (None, 2)


def test_views_join_where_they_take_little_memory(
    net: Graph, samples: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = Reconstruction.start(net, prepared(net, samples), 8)
    assert walk is not None
    runs, most = len(walk.runs), most_live(walk.exact)
    assert most_live(walk.exact, len(walk.exact.nodes) - 1) < most
    first, last = walk.units[0].node, walk.units[-1].node
    monkeypatch.setattr(reconstruction, "MEMORY", 4 * 3 * runs * most - 1)
    assert not walk.widen(first, 2, 0)
    walk.advance(last)
    assert walk.widen(last, 2, 0)
    assert [len(t) for t in walk.work] == [3 * runs, 3 * runs]
    assert [len(t) for t in walk.test] == [len(walk.test[0])] * 2 != [3 * runs] * 2
    assert walk.widen(last, 0, 0)
    assert len(walk.work[0]) == 3 * runs


def test_how_many_views_join(
    net: Graph, samples: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None for small pictures, unless asked for; as many as asked for where somebody asks."""
    asked: list[int] = []

    def widen(walk: Reconstruction, name: str, number: int, seed: int) -> bool:
        asked.append(number)
        return True

    monkeypatch.setattr(Reconstruction, "widen", widen)
    ctx = prepared(net, samples)
    for text in ("", "views=2", "views=0"):
        apply(parse_pass(f"gptq{{patches=64 damp=0.1 {text}}}", METHODS), net, ctx)
    monkeypatch.setattr(views, "SMALL_SIDE", 9)
    apply(parse_pass("gptq{patches=64 damp=0.1}", METHODS), net, ctx)
    assert asked == [0, 2, 0, views.VIEWS]


# ------------------------------------------------------------------------------------------ pass

SHORT = Distill(epochs=20, batch=4, code_rate=1e-2, scale_rate=1e-3, bias_rate=2e-4)


def errors(graph: Graph, after: Graph, ctx: PassContext) -> tuple[float, float]:
    """Return the error held out of rounding to nearest, and of what a method left."""
    plan, table = ctx.get(PrecisionPlan), ctx.get(CalibrationTable)
    judge = Judge(graph, list(shares(ctx.get(CalibrationSet), 8)[1]))
    return judge.error(quantized(graph, plan, table)), judge.error(
        quantized(after, plan, table, ctx.get(WeightGrids))
    )


def test_distilling_beats_rounding_to_nearest(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    after = apply(SHORT, net, ctx)
    assert ctx.log[-1].startswith("distill: kept")
    assert "5 products learned together in 180 of 180 steps" in ctx.log[-1]
    nearest, learned = errors(net, after, ctx)
    assert learned < 0.5 * nearest
    grids = ctx.get(WeightGrids)
    qdq = PassManager([InsertQdq()], given=tuple(ctx.artifacts)).run(after, ctx)
    for name, grid in grids.nodes.items():
        held = qdq.node(name).input(1).producer
        assert held is not None
        codes = held.input(0).array()
        assert codes.min() >= -8
        assert codes.max() <= 7
        np.testing.assert_array_equal(quantize(after.node(name).input(1).array(), grid), codes)


def test_windows_of_pictures_serve_as_well(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    short = Distill(epochs=20, batch=6, code_rate=1e-2, scale_rate=1e-3, bias_rate=2e-4, window=8)
    nearest, learned = errors(net, apply(short, net, ctx), ctx)
    assert learned < 0.7 * nearest


def test_what_is_seen_of_a_run(rng: np.random.Generator) -> None:
    """A window of the picture, in both directions; other inputs as they are."""
    x = np.arange(300, dtype=np.float32).reshape(1, 3, 10, 10)
    other = np.arange(4, dtype=np.float32)
    batch = Batch({"x": x, "other": other}, 1, 1)
    corners = set()
    for _ in range(200):
        got = Distill()._seen(batch, 7, rng)
        cut = got["x"][..., ::-1] if got["x"][0, 0, 0, 0] > got["x"][0, 0, 0, 1] else got["x"]
        top, left = divmod(int(cut[0, 0, 0, 0]), 10)
        np.testing.assert_array_equal(cut, x[:, :, top : top + 7, left : left + 7])
        assert got["other"] is other
        corners.add((top, left, cut is got["x"]))
    assert len(corners) == 4 * 4 * 2
    assert Distill(mirror=False)._seen(batch, None, rng)["x"] is x


def test_it_goes_on_from_what_another_method_left(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    first = apply(parse_pass("gptq{patches=64 damp=0.1 views=0}", METHODS), net, ctx)
    _, before = errors(net, first, ctx)
    after = apply(SHORT, first, ctx)
    plan, table = ctx.get(PrecisionPlan), ctx.get(CalibrationTable)
    judge = Judge(net, list(shares(ctx.get(CalibrationSet), 8)[1]))
    assert judge.error(quantized(after, plan, table, ctx.get(WeightGrids))) < before


def test_codes_that_a_method_chose_stay(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    first = apply(parse_pass("gptq{patches=64 damp=0.1 views=0}", METHODS), net, ctx)
    held = ctx.get(WeightGrids).nodes
    after = apply(Distill(epochs=20, batch=4, scale_rate=1e-3, bias_rate=2e-4), first, ctx)
    assert ctx.log[-1].startswith("distill: kept")
    for name, grid in ctx.get(WeightGrids).nodes.items():
        one, other = (g.node(name).input(1).array() for g in (first, after))
        np.testing.assert_array_equal(quantize(one, held[name]), quantize(other, grid))
        assert (grid.scale != held[name].scale).any()


def test_one_seed_gives_one_result(net: Graph, samples: dict[str, Array]) -> None:
    first, second = (str(apply(Distill(epochs=2), net, prepared(net, samples))) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("seconds", [-1.0, 1e-9])
def test_the_time_limit(seconds: float, net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    assert str(apply(Distill(seconds=seconds), net, ctx)) == str(net)
    assert "discarded" in ctx.log[-1]
    assert "in 0 of" in ctx.log[-1]


def test_no_integer_products(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    ctx.put(uniform(net, "fp32"))
    assert str(apply(Distill(), net, ctx)) == str(net)


def test_options() -> None:
    with pytest.raises(UsageError, match="epochs, runs, batch and window must be at least 1"):
        Distill(batch=0)
    with pytest.raises(UsageError, match="must be 0 or more"):
        Distill(code_rate=-1.0)
