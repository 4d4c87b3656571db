# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The methods that keep accuracy: what they change, what they keep, what they undo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from calibrated import apply, prepared

from qcompiler.driver import Quantized, quantize_model
from qcompiler.driver import compile as compile_model
from qcompiler.errors import UsageError
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.modality import select
from qcompiler.ops import OpKind, Stage
from qcompiler.passes.adaround import AdaRound
from qcompiler.passes.calibrate import CalibrationSet, CalibrationTable
from qcompiler.passes.channel_scales import input_range, joints, output_range
from qcompiler.passes.correct_bias import CorrectBias
from qcompiler.passes.equalize import Equalize, growth
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.groups import Groups
from qcompiler.passes.held_out import Judge, Share, quantized, shares, verdict, weighted_products
from qcompiler.passes.insert_qdq import InsertQdq, WeightGrids, quantize_passes
from qcompiler.passes.methods import METHODS, default_methods, parse_methods
from qcompiler.passes.patches import collect, matrix_of
from qcompiler.passes.single_node import units
from qcompiler.passes.smooth import Smooth
from qcompiler.passes.trails import Trail
from qcompiler.passmanager import PassManager
from qcompiler.plan import PrecisionPlan, edges_in_eight_bits, uniform
from qcompiler.types import Array, Precision

MODELS = Path(__file__).resolve().parents[2] / "models" / "digits_cnn"

NET = """(float[1,4,8,8] x) => (float[1,6] y) {
  a = Conv <pads = [1,1,1,1]> (x, w1, b1)
  r = Relu(a)
  c = Conv <pads = [1,1,1,1], group = 2> (r, w2)
  s = Add(c, r)
  t = Relu(s)
  d = Conv <pads = [1,0,2,1], strides = [2,1], dilations = [1,2]> (t, w3, b3)
  q = Relu(d)
  p = GlobalAveragePool(q)
  f = Flatten(p)
  y = Gemm(f, w4, b4)
}"""


@pytest.fixture
def net(load_text: Callable[..., Graph], rng: np.random.Generator) -> Graph:
    def w(*shape: int) -> Array:
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    return load_text(
        NET,
        w1=w(8, 4, 3, 3),
        b1=w(8),
        w2=w(8, 4, 3, 3),
        w3=w(8, 8, 3, 3),
        b3=w(8),
        w4=w(8, 6),
        b4=w(6),
    )


@pytest.fixture
def samples(rng: np.random.Generator) -> dict[str, Array]:
    return {"x": rng.standard_normal((32, 4, 8, 8)).astype(np.float32)}


# ------------------------------------------------------------------------------------ adaround


SHORT = AdaRound(iterations=300, runs=16, patches=1024)


def test_patches_are_the_rows_of_the_product(net: Graph, samples: dict[str, Array]) -> None:
    """Groups, strides, pads and dilations: x @ w + b is the convolution."""
    ctx = prepared(net, samples, "w8a8")
    qdq = quantized(net, ctx.get(PrecisionPlan), ctx.get(CalibrationTable))
    batches = list(ctx.get(CalibrationSet))[:3]
    for unit in units(net):
        node = net.node(unit.node)
        got = collect(Trail(net, batches), Trail(qdq, batches), unit, 10, np.random.default_rng(0))
        w = matrix_of(node, node.input(1).array())
        assert got.x.shape[0] == got.y.shape[0] == w.shape[0]
        z = got.x @ w
        bias = node.optional(2)
        if bias is not None:
            z = z + bias.array().reshape(w.shape[0], 1, -1)
        z = np.clip(got.residual(z), *got.clamp)
        aim = got.target()
        # The operands are rounded, the aim is not.
        assert np.abs(z - aim).max() < 0.05 * np.abs(aim).max()
        assert (got.add is not None) == (len(unit.members) == 3)


def test_adaround_beats_rounding_to_nearest(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    after = apply(SHORT, net, ctx)
    assert ctx.log[-1].startswith("adaround: kept")
    plan, table = ctx.get(PrecisionPlan), ctx.get(CalibrationTable)
    grids = ctx.get(WeightGrids)
    assert set(grids.nodes) == set(weighted_products(net, plan))
    judge = Judge(net, list(shares(ctx.get(CalibrationSet), 8)[1]))
    nearest = judge.error(quantized(net, plan, table))
    learned = judge.error(quantized(after, plan, table, grids))
    assert learned < 0.7 * nearest
    qdq = PassManager([InsertQdq()], given=tuple(ctx.artifacts)).run(after, ctx)
    for name in grids.nodes:
        held = qdq.node(name).input(1).producer
        assert held is not None
        q = held.input(0).qparams
        assert q is not None
        assert (q.qmin, q.qmax) == (-8, 7)
        node = after.node(name)
        w, old = node.input(1).array(), net.node(name).input(1).array()
        shape = [-1 if i == q.granularity.axis else 1 for i in range(w.ndim)]  # type: ignore[union-attr]
        s = q.scale.reshape(shape)
        np.testing.assert_array_equal(held.input(0).array() * s, w)  # on the grid, unchanged
        inside = np.abs(old / s) < 7
        assert np.abs(w - old)[inside].max() <= s.max() * 1.001


def test_adaround_is_reproducible(net: Graph, samples: dict[str, Array]) -> None:
    short = AdaRound(iterations=20, runs=4, patches=64)
    first, second = (str(apply(short, net, prepared(net, samples))) for _ in range(2))
    assert first == second


def test_adaround_stops_in_time(net: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(net, samples)
    assert apply(AdaRound(seconds=-1.0), net, ctx).nodes
    assert "4 were not reached" in ctx.log[-1]
    with pytest.raises(UsageError, match="at least 1"):
        AdaRound(iterations=0)


# -------------------------------------------------------------------------------- correct_bias


def test_correct_bias_restores_the_means(
    load_text: Callable[..., Graph], rng: np.random.Generator
) -> None:
    w = rng.uniform(0.2, 1.0, (8, 4, 3, 3)).astype(np.float32)
    v = rng.standard_normal((8, 5)).astype(np.float32)
    graph = load_text(
        """(float[1,4,6,6] x) => (float[1,5] y) {
        a = Conv (x, w) r = Relu(a) p = GlobalAveragePool(r) f = Flatten(p) y = Gemm(f, v) }""",
        w=w,
        v=v,
    )
    x = rng.uniform(0, 1, (32, 4, 6, 6)).astype(np.float32)
    ctx = prepared(graph, {"x": x})
    after = apply(CorrectBias(), graph, ctx)
    assert ctx.log[-1].startswith("correct_bias: kept")
    assert all(after.node(n).optional(2) is not None for n in weighted_products(graph, ctx.get(
        PrecisionPlan)))  # fmt: skip
    plan, table = ctx.get(PrecisionPlan), ctx.get(CalibrationTable)
    want = np.mean([run(graph, {"x": x[i : i + 1]})["y"] for i in range(32)], 0)
    means = [
        np.mean([run(q, {"x": x[i : i + 1]})["y"] for i in range(32)], 0)
        for q in (quantized(graph, plan, table), quantized(after, plan, table))
    ]
    assert np.abs(means[1] - want).max() < 0.3 * np.abs(means[0] - want).max()


def test_analytic_bias_correction_restores_the_mean_of_one_product(
    load_text: Callable[..., Graph], rng: np.random.Generator
) -> None:
    """Where operands are exact and nothing is padded, it is what the data say."""
    w = rng.uniform(0.1, 1.0, (6, 2, 3, 3)).astype(np.float32)
    graph = load_text(
        "(float[1,4,7,7] x) => (float[1,6,5,5] y) { y = Conv <group = 2> (x, w) }", w=w
    )
    x = (rng.integers(0, 256, (16, 4, 7, 7)) / 255).astype(np.float32)
    biases = []
    for form in ("analytic", "empirical"):
        ctx = prepared(graph, {"x": x})
        after = apply(CorrectBias(form=form), graph, ctx)
        assert ctx.log[-1].startswith("correct_bias: kept")
        biases.append(after.nodes[0].input(2).array())
    assert np.abs(biases[1]).max() > 0.01
    np.testing.assert_allclose(biases[0], biases[1], rtol=0.2, atol=0.01)


# --------------------------------------------------------------------------- equalize, smooth


@pytest.fixture
def uneven(load_text: Callable[..., Graph], rng: np.random.Generator) -> Graph:
    """Two convolutions whose channels between them differ by up to 100."""
    factor = (10.0 ** rng.uniform(-1, 1, 8)).astype(np.float32)
    w1 = 0.3 * rng.standard_normal((8, 4, 3, 3)) * factor[:, None, None, None]
    w2 = 0.3 * rng.standard_normal((6, 8, 3, 3)) / factor[:, None, None]
    b1 = 0.1 * rng.standard_normal(8) * factor
    return load_text(
        """(float[1,4,8,8] x) => (float[1,6,1,1] y) {
        a = Conv (x, w1, b1) r = Relu(a) c = Conv (r, w2) y = GlobalAveragePool(c) }""",
        w1=w1.astype(np.float32),
        b1=b1.astype(np.float32),
        w2=w2.astype(np.float32),
    )


def test_equalize(uneven: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(uneven, samples, "w8a8")
    after = apply(Equalize(), uneven, ctx)
    assert ctx.log == [ctx.log[0]]
    assert ctx.log[0].startswith("equalize: kept")
    first, second = (n for n in after.nodes if n.op.name == "conv")
    np.testing.assert_allclose(output_range(first), input_range(second), rtol=0.02)
    feed = {"x": samples["x"][:1]}
    np.testing.assert_allclose(run(after, feed)["y"], run(uneven, feed)["y"], rtol=1e-4, atol=1e-5)


def test_equalize_across_a_clip(
    load_text: Callable[..., Graph], rng: np.random.Generator, samples: dict[str, Array]
) -> None:
    """Channels that stay below the bound grow up to it where their reader gains; others stay."""
    w = 0.3 * rng.standard_normal((6, 4, 1, 1))
    w[0] *= 20  # reaches 6
    v = rng.standard_normal((4, 6, 1, 1))
    v[:, 3] *= 30  # wants a larger channel 3
    graph = load_text(
        """(float[1,4,8,8] x) => (float[1,4,8,8] y) {
        lo = Constant <value = float {0.0}> () hi = Constant <value = float {6.0}> ()
        a = Conv (x, w) r = Clip(a, lo, hi) y = Conv (r, v) }""",
        w=w.astype(np.float32),
        v=v.astype(np.float32),
    )
    ctx = prepared(graph, samples)
    after = apply(Equalize(), graph, ctx)
    assert ctx.log[0].startswith("equalize: kept")
    first = next(n for n in after.nodes if n.op.name == "conv")
    factor = (first.input(1).array() / w).reshape(6, 4).mean(1)
    assert factor[0] == pytest.approx(1)
    assert factor[3] > 1.5
    assert (factor > 0.999).all()
    for i in range(8):
        feed = {"x": samples["x"][i : i + 1]}
        got, want = (run(g, feed)["y"] for g in (after, graph))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_equalize_looks_at_more_runs_than_it_compares_on(
    load_text: Callable[..., Graph], rng: np.random.Generator
) -> None:
    """A channel that nears the bound in one late run stays below it there, with room to spare."""
    w = 0.3 * rng.standard_normal((4, 4, 1, 1))
    w[0] *= 40  # reaches the bound in every run
    graph = load_text(
        """(float[1,4,8,8] x) => (float[1,4,6,6] y) {
        lo = Constant <value = float {0.0}> () hi = Constant <value = float {6.0}> ()
        a = Conv (x, w) r = Clip(a, lo, hi) y = Conv <group = 4> (r, v) }""",
        w=w.astype(np.float32),
        v=rng.standard_normal((4, 1, 3, 3)).astype(np.float32),
    )
    x = (0.1 * rng.standard_normal((60, 4, 8, 8))).astype(np.float32)
    x[52] *= 30  # neither held out nor among the first 32 runs of the others
    ctx = prepared(graph, {"x": x})
    work, held_out = shares(ctx.get(CalibrationSet), 1 << 30)
    loud = x[52:53].tobytes()
    assert [b.inputs["x"].tobytes() for b in work].index(loud) >= Equalize().runs
    assert loud not in [b.inputs["x"].tobytes() for b in held_out]
    after = apply(Equalize(), graph, ctx)
    first = next(n for n in after.nodes if n.op.name == "conv")
    factor = (first.input(1).array() / w).reshape(4, 4).mean(1)
    assert (factor > 1.1).any()
    louder = {"x": x[52:53] * np.float32(1.15)}
    got, want = (run(g, louder)["y"] for g in (after, graph))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    short = apply(Equalize(peak_runs=32), graph, prepared(graph, {"x": x}))
    assert np.abs(run(short, louder)["y"] - want).max() > 0.1


def test_a_reader_of_one_channel_takes_all_the_room(
    load_text: Callable[..., Graph], rng: np.random.Generator
) -> None:
    graph = load_text(
        "(float[1,4,8,8] x) => (float[1,4,6,6] y) { y = Conv <group = 4> (x, w) }",
        w=rng.standard_normal((4, 1, 3, 3)).astype(np.float32),
    )
    room = np.array([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(growth(graph.nodes[0], room, np.ones(4)), room)


def test_smooth(load_text: Callable[..., Graph], rng: np.random.Generator) -> None:
    gamma = np.ones(16, np.float32)
    gamma[[3, 11]] = 40.0
    graph = load_text(
        """(float[1,5,16] x) => (float[1,5,8] y, float[1,5,4] z) {
        n = LayerNormalization <axis = -1> (x, gamma, beta)
        y = MatMul(n, w) z = MatMul(n, v) }""",
        gamma=gamma,
        beta=rng.standard_normal(16).astype(np.float32),
        w=(rng.standard_normal((16, 8)) / gamma[:, None]).astype(np.float32),
        v=(rng.standard_normal((16, 4)) / gamma[:, None]).astype(np.float32),
    )
    x = rng.standard_normal((24, 5, 16)).astype(np.float32)
    ctx = prepared(graph, {"x": x}, "w8a8")
    (joint,) = joints(graph)
    assert [n.op.name for n in (joint.producer, *joint.readers)] == [
        "layer_norm",
        "matmul",
        "matmul",
    ]
    after = apply(Smooth(), graph, ctx)
    assert ctx.log[0].startswith("smooth: kept")
    norm = next(n for n in after.nodes if n.op.name == "layer_norm")
    scale = np.abs(norm.input(1).array())
    assert scale.max() / scale.min() < 15
    for name in ("y", "z"):
        got, want = (run(g, {"x": x[:1]})[name] for g in (after, graph))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_what_is_not_better_is_undone(
    uneven: Graph, samples: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([0.1, 0.2])
    monkeypatch.setattr(Judge, "error", lambda self, qdq: next(errors))
    ctx = prepared(uneven, samples, "w8a8")
    assert str(apply(Equalize(), uneven, ctx)) == str(uneven)
    assert ctx.log == [verdict("equalize", 0.1, 0.2)[1]]
    assert "discarded: not better" in ctx.log[0]


# ------------------------------------------------------------------------------------ together


def test_shares_are_disjoint(net: Graph, samples: dict[str, Array]) -> None:
    work, held_out = shares(prepared(net, samples).get(CalibrationSet), 1000)
    assert isinstance(work, Share)
    parts = [{b.inputs["x"].tobytes() for b in share} for share in (work, held_out)]
    assert [len(p) for p in parts] == [24, 8]
    assert not parts[0] & parts[1]
    few, same = shares(prepared(net, {"x": samples["x"][:2]}).get(CalibrationSet), 1000)
    assert len(list(few)) == len(list(same)) == 2


def test_methods_by_text() -> None:
    found = parse_methods("equalize, adaround{iterations=5 runs=2},correct_bias")
    assert found == (Equalize(), AdaRound(iterations=5, runs=2), CorrectBias())
    assert parse_methods("") == ()
    with pytest.raises(UsageError, match="unknown pass 'magic': known are adaround"):
        parse_methods("magic")
    with pytest.raises(UsageError, match="named once"):
        parse_methods("smooth,smooth")
    known = ["adaround", "brecq", "correct_bias", "distill", "equalize", "gptq", "groups", "smooth"]
    assert sorted(METHODS) == known


def test_methods_of_a_precision(net: Graph, tmp_path: Path) -> None:
    plan = uniform(net, "w4a8")
    plan.save(tmp_path / "plan.json")
    assert default_methods("w4a8") == "groups,equalize,gptq"
    for narrow in ("w4a8-group", plan, str(tmp_path / "plan.json"), tmp_path / "plan.json"):
        assert default_methods(narrow) == "equalize,gptq"  # groups: the plan says where
    for wide in ("w8a8", "fp32", "auto", "w4", uniform(net)):
        assert default_methods(wide) == ""
    for ran in ("", "adaround{iterations=5 runs=2},equalize"):  # as the plan was made
        assert default_methods(dataclasses.replace(plan, methods=ran)) == ran
    floats = dataclasses.replace(uniform(net, "fp32"), methods="gptq")
    assert default_methods(floats) == ""
    assert parse_methods(default_methods("w4a8")) == (Groups(), Equalize(), Gptq())
    assert parse_methods("none") == ()
    with pytest.raises(UsageError, match="unknown precision"):
        default_methods("w5a5")


def test_pipeline_order(net: Graph) -> None:
    methods = parse_methods("correct_bias,equalize")
    names = [p.name for p in quantize_passes(uniform(net), methods)]
    assert names == [
        "equalize", "calibrate", "correct_bias", "insert_qdq", "fold_factors", "fuse",
    ]  # fmt: skip
    assert [p.name for p in quantize_passes(uniform(net, "fp32"), methods)] == [
        "insert_qdq",
        "fuse",
    ]


def test_first_and_last_products_keep_eight_bits(net: Graph) -> None:
    plan = edges_in_eight_bits(net, uniform(net, "w4a8"))
    bits = [plan.precision(u.node).weight_bits for u in units(net)]
    assert bits == [8, 4, 4, 8]
    assert plan.reason(units(net)[0].node) == "first product: 8-bit weights"
    assert edges_in_eight_bits(net, uniform(net)).nodes == uniform(net).nodes


def test_the_bundled_model_in_four_bits() -> None:
    """Compile, with methods, for the reference target; the same seed gives the same bytes."""
    calib = dict(np.load(MODELS / "calib.npz"))
    few = {k: v[:12] for k, v in calib.items()}
    text = "equalize,adaround{iterations=10 runs=4 patches=64},correct_bias{runs=4}"
    graphs = []
    for _ in range(2):
        found = quantize_model(
            str(MODELS / "model.onnx"), calibration=few, precision="w4a8", methods=text
        )
        graphs.append(str(found.graph))
        assert [line.split(":")[0] for line in found.log] == [
            "equalize",
            "adaround",
            "correct_bias",
        ]
    assert graphs[0] == graphs[1]
    four = [d for d in found.plan.nodes.values() if d.precision is Precision.W4A8]
    assert len(four) >= 6


def test_one_seed_gives_the_same_artifact_bytes(tmp_path: Path) -> None:
    """Plan, parameters and the file, with the methods that draw samples and codes at random."""
    few = {k: v[:12] for k, v in np.load(MODELS / "calib.npz").items()}
    text = "equalize,brecq{iterations=6 tiles=48 patches=256},correct_bias{runs=4}"
    found = []
    for i in range(2):
        compiled = compile_model(
            str(MODELS / "model.onnx"),
            target="reference",
            calibration=few,
            precision="w4a8",
            methods=text,
            seed=3,
        )
        compiled.save(tmp_path / f"{i}.qcm")
        found.append((tmp_path / f"{i}.qcm").read_bytes())
    assert found[0] == found[1]


def test_methods_need_integers() -> None:
    model = str(MODELS / "model.onnx")
    with pytest.raises(UsageError, match="the plan has none"):
        quantize_model(model, precision="fp32", methods="equalize", stage=Stage.QDQ)


# ---------------------------------------------------------------------------- parts of a network


def hybrid(methods: str) -> Quantized:
    """The small two-input model of the project at four-bit weights."""
    folder = Path(__file__).parents[2] / "models" / "digits_hybrid"
    with np.load(folder / "calib.npz") as z:
        samples = {k: z[k][:48] for k in z.files}
    return quantize_model(
        folder / "model.onnx", calibration=samples, precision="w4a8", methods=methods
    )


def codes(result: Quantized) -> dict[str, bytes]:
    """Product -> its weights as stored, and their scales."""
    found = {}
    for n in result.graph.nodes:
        if n.op.kind is OpKind.COMPUTE and n.input(1).is_constant:
            q = n.input(1).qparams
            held = b"" if q is None else q.scale.tobytes()
            found[n.name] = n.input(1).array().tobytes() + held
    return found


def test_a_method_works_on_the_region_that_it_is_given() -> None:
    plain = hybrid("none")
    assert plain.float_graph is not None
    regions = {
        s: {n.name for n in select(plain.float_graph, s)} for s in ("input:image", "input:rows")
    }
    before = codes(plain)
    image = codes(hybrid("gptq{only=input:image patches=256}"))
    both = hybrid("gptq{only=input:image patches=256},gptq{only=input:rows patches=256}")
    assert both.methods == ("gptq", "gptq")
    changed = {n for n in before if image[n] != before[n]}
    assert changed
    assert changed <= regions["input:image"]
    after = codes(both)
    now = {n for n in before if after[n] != before[n]}
    assert now - changed
    assert now <= regions["input:image"] | regions["input:rows"]
    # What the first method found stays, and the plan is again that of the whole network.
    assert all(after[n] == image[n] for n in changed)
    assert all(d.precision.is_integer for n, d in both.plan.nodes.items() if n in before)


def test_methods_for_parts_are_named_once_each() -> None:
    found = parse_methods("gptq{only=input:image},gptq{only=fusion runs=4}")
    assert [m.only for m in found] == ["input:image", "fusion"]
    assert [m.spec() for m in found] == ["gptq{only=input:image}", "gptq{only=fusion runs=4}"]
    with pytest.raises(UsageError, match="named once for the same nodes"):
        parse_methods("gptq{only=fusion},gptq{only=fusion runs=4}")


def test_a_part_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"no node is selected by 'input:sound'") as caught:
        hybrid("gptq{only=input:sound}")
    assert "input:image" in (caught.value.hint or "")
    with pytest.raises(UsageError, match=r"no node is selected by 'layer9\.\*'"):
        hybrid("gptq{only=layer9.*}")
