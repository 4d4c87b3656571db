# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Where quantize/dequantize pairs go, with which parameters, and why the rest stays float."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompiler.errors import CalibrationError
from qcompiler.interpreter import run
from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import Stage
from qcompiler.passes.calibrate import CalibrationTable, TensorRange
from qcompiler.passes.insert_qdq import InsertQdq, quantize_passes
from qcompiler.passmanager import ModifiedInstrument, PassContext, PassManager
from qcompiler.plan import PrecisionPlan, uniform
from qcompiler.printer import digest
from qcompiler.types import DType, PerAxis, Precision, TensorType


class Net:
    """Builds small FLOAT graphs with seeded weights."""

    def __init__(self, seed: int = 0) -> None:
        self.g = Graph("net")
        self.rng = np.random.default_rng(seed)

    def input(self, *shape: int, name: str = "x") -> Value:
        return self.g.add_input(name, TensorType(shape, DType.FLOAT32), 0)

    def const(self, *shape: int, name: str = "c", scale: float = 1.0) -> Value:
        data = self.rng.normal(size=shape).astype(np.float32) * np.float32(scale)
        return self.g.constant(data, name)

    def conv(self, x: Value, out: int, k: int = 3, *, group: int = 1, name: str = "conv") -> Value:
        c = x.shape[1] // group
        w = self.const(out, c, k, k, name=f"{name}_w", scale=1 / np.sqrt(c * k * k))
        b = self.const(out, name=f"{name}_b", scale=0.1)
        attrs = {"strides": (1, 1), "pads": (k // 2,) * 4, "dilations": (1, 1), "group": group}
        return self.g.add("conv", [x, w, b], attrs, name=name).output

    def linear(self, x: Value, out: int, name: str = "fc") -> Value:
        w = self.const(x.shape[-1], out, name=f"{name}_w", scale=1 / np.sqrt(x.shape[-1]))
        b = self.const(out, name=f"{name}_b", scale=0.1)
        return self.g.add("matmul", [x, w, b], name=name).output

    def op(self, name: str, *xs: Value, **attrs: object) -> Value:
        return self.g.add(name, list(xs), attrs, name=f"{name}_0").output

    def done(self, *outputs: Value) -> Graph:
        self.g.set_outputs([(f"y{i}", v) for i, v in enumerate(outputs)])
        self.g.verify()
        return self.g

    def sample(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(7)
        return {v.name: rng.normal(size=v.shape).astype(np.float32) for v in self.g.inputs}


def observed(graph: Graph, inputs: dict[str, np.ndarray]) -> CalibrationTable:
    """Return a table with the exact bounds of every value on one input."""
    seen: dict[str, TensorRange] = {}

    def note(v: Value, a: np.ndarray) -> None:
        if a.dtype == np.float32 and a.size:
            lo, hi = float(a.min()), float(a.max())
            seen[v.name] = TensorRange((min(lo, 0.0), max(hi, 0.0)), (lo, hi))

    run(graph, inputs, observe=note)
    return CalibrationTable(seen, digest(graph))


def insert(
    graph: Graph,
    table: CalibrationTable | None,
    plan: PrecisionPlan | None = None,
    **options: bool,
) -> tuple[Graph, PrecisionPlan]:
    ctx = PassContext()
    ctx.put(plan or uniform(graph))
    if table is not None:
        ctx.put(table)
    manager = PassManager(
        [InsertQdq(**options)], [ModifiedInstrument()], given=tuple(ctx.artifacts)
    )
    return manager.run(graph, ctx), ctx.get(PrecisionPlan)


def held(node: Node, i: int) -> Value | None:
    """Return the quantized value that operand `i` is the dequantization of."""
    p = node.input(i).producer
    return p.input(0) if p is not None and p.op.name == "dequantize" else None


def small_cnn() -> Net:
    net = Net()
    x = net.input(1, 3, 8, 8)
    a = net.op("relu", net.conv(x, 8, name="conv1"))
    b = net.conv(a, 8, name="conv2")
    c = net.op("relu", net.op("add", b, a))
    p = net.op("reduce_mean", c, axes=(2, 3), keepdims=True)
    f = net.op("reshape", p, shape=(1, 8))
    net.done(net.op("softmax", net.linear(f, 4), axis=-1))
    return net


def fixed_table(graph: Graph) -> CalibrationTable:
    tensors = {v.name: TensorRange((-2.0, 3.0), (-2.0, 3.0)) for v in graph.values()}
    return CalibrationTable(tensors, digest(graph))


def test_small_cnn(golden):
    net = small_cnn()
    graph, _ = insert(net.g, fixed_table(net.g))
    assert str(graph) == golden


def test_meaning_is_close_to_float():
    net = small_cnn()
    x = net.sample()
    graph, _ = insert(net.g, observed(net.g, x))
    before, after = run(net.g, x)["y0"], run(graph, x)["y0"]
    assert np.abs(before - after).max() < 0.01


def test_nothing_between_a_convolution_its_addition_and_its_clamp():
    net = small_cnn()
    graph, _ = insert(net.g, fixed_table(net.g))
    conv2 = graph.node("conv2")
    (add,) = conv2.output.users
    assert add.op.name == "add"
    assert held(add, 0) is None
    assert held(add, 1) is not None  # the other branch is a quantized value
    (relu,) = add.output.users
    assert relu.op.name == "relu"
    assert [n.op.name for n in relu.output.users] == ["quantize"]


def test_of_two_convolutions_the_later_one_joins_the_addition():
    net = Net()
    x = net.input(1, 4, 6, 6)
    a, b = net.conv(x, 4, name="first"), net.conv(x, 4, name="second")
    s = net.op("add", a, b)
    net.done(net.conv(s, 4, name="last"))
    graph, _ = insert(net.g, fixed_table(net.g))
    add = graph.node("add_0")
    assert held(add, 0) is not None
    assert add.input(1).producer is graph.node("second")


def test_head_and_tail_stay_float_and_say_why():
    net = Net()
    x = net.input(1, 4, 6, 6)
    head = net.op("tanh", x)
    c = net.conv(head, 4)
    tail = net.op("sigmoid", c)
    net.done(tail)
    graph, plan = insert(net.g, fixed_table(net.g))
    names = [n.op.name for n in graph.nodes if n.op.name not in ("quantize", "dequantize")]
    assert names == ["tanh", "conv", "sigmoid"]
    assert graph.node("sigmoid_0").input(0) is graph.node("conv").output  # the accumulator's float
    assert plan.reason("tanh_0") == "its operand 'x' is float"
    assert plan.reason("sigmoid_0") == "no integer product comes after it"
    assert plan.precision("sigmoid_0") is Precision.FP32
    assert plan.precision("conv") is Precision.W8A8


def test_an_operator_without_integer_form_stays_float_between_products():
    net = Net()
    x = net.input(1, 4, 6, 6)
    c = net.op("instance_norm", net.conv(x, 4, name="a"), net.const(4), net.const(4))
    net.done(net.conv(c, 4, name="b"))
    _, plan = insert(net.g, fixed_table(net.g))
    assert plan.reason("instance_norm_0") == "operator has no integer form: instance_norm"


def test_concat_shares_parameters():
    net = Net()
    x = net.input(1, 4, 6, 6)
    a, b = net.op("relu", net.conv(x, 4, name="a")), net.conv(x, 4, name="b")
    cat = net.op("concat", a, net.op("sigmoid", b), axis=1)
    net.done(net.conv(cat, 4, name="c"))
    sample = net.sample()
    graph, _ = insert(net.g, observed(net.g, sample))
    concat = graph.node("concat_0")
    parts = [held(concat, 0), held(concat, 1)]
    after = held(graph.node("c"), 0)
    grids = {v.qparams for v in (*parts, after) if v is not None}
    assert len(grids) == 1
    assert grids.pop().zero_point == 0


def test_relu_range_comes_from_the_clamped_value():
    net = Net()
    x = net.input(1, 3, 8, 8)
    a = net.op("clip", net.conv(x, 8, name="conv1"), min=0.0, max=1.0)
    net.done(net.conv(a, 8, name="conv2"))
    graph, _ = insert(net.g, observed(net.g, net.sample()))
    q = held(graph.node("conv2"), 0).qparams
    assert q.z == 0
    assert q.s == pytest.approx(1 / 255)


def test_weights_are_symmetric_per_output_channel_and_bias_is_int32():
    net = Net()
    x = net.input(1, 3, 8, 8)
    net.done(net.conv(x, 8))
    graph, _ = insert(net.g, fixed_table(net.g))
    conv = graph.node("conv")
    x_q, w, b = held(conv, 0), held(conv, 1), held(conv, 2)
    assert x_q.dtype is DType.UINT8
    assert w.dtype is DType.INT8
    assert w.qparams.granularity == PerAxis(0)
    assert (w.qparams.qmin, w.qparams.qmax) == (-127, 127)
    assert np.abs(w.array()).reshape(8, -1).max(1).tolist() == [127] * 8
    assert b.dtype is DType.INT32
    np.testing.assert_allclose(b.qparams.scale, x_q.qparams.s * w.qparams.scale, rtol=1e-6)


def test_a_tiny_channel_does_not_overflow_its_bias():
    net = Net()
    x = net.input(1, 3, 8, 8)
    w = np.zeros((2, 3, 1, 1), np.float32)
    w[1] = 1e-12
    bias = np.array([5.0, -7.0], np.float32)
    attrs = {"strides": (1, 1), "pads": (0,) * 4, "dilations": (1, 1)}
    g = net.g
    y = g.add("conv", [x, g.constant(w, "w"), g.constant(bias, "b")], attrs, name="conv").output
    net.done(y)
    graph, _ = insert(g, fixed_table(g))
    assert np.abs(held(graph.node("conv"), 2).array().astype(np.int64)).max() <= 1 << 30
    out = run(graph, net.sample())["y0"]
    np.testing.assert_allclose(out[0, :, 0, 0], bias, rtol=1e-5)


@pytest.mark.parametrize(
    ("precision", "weights", "activations"),
    [
        ("w8a8", 127, 255),
        ("w8a7", 127, 127),
        ("w7a8", 63, 255),
        ("w6a8", 31, 255),
        ("w4a8", 7, 255),
    ],
)
def test_widths(precision, weights, activations):
    net = Net()
    net.done(net.conv(net.input(1, 3, 8, 8), 8))
    graph, _ = insert(net.g, fixed_table(net.g), uniform(net.g, precision))
    conv = graph.node("conv")
    assert held(conv, 0).qparams.qmax == activations
    assert held(conv, 1).qparams.qmax == weights
    assert held(conv, 1).array().max() <= weights
    # Up to 6 bits the least code is used too.
    assert held(conv, 1).array().min() >= held(conv, 1).qparams.qmin >= -weights - (weights < 63)


def test_narrow_weights_are_clipped_where_that_pays(rng):
    from qcompiler.numerics import choose_weight_qparams, fake_quantize
    from qcompiler.passes.weights import weight_qparams

    w = rng.normal(size=(4, 256)).astype(np.float32)
    w[:, 0] = 5.0  # an outlier that would take the whole range
    plain, searched = choose_weight_qparams(w, axis=0, bits=4), weight_qparams(w, 0, 4)
    errors = [((fake_quantize(w, q) - w) ** 2).mean() for q in (plain, searched)]
    assert errors[1] < 0.8 * errors[0]
    assert weight_qparams(w, 0, 8) == choose_weight_qparams(w, axis=0, bits=8)


def encoder(mask: bool = True) -> Net:
    """One post-norm encoder layer between two matrix products."""
    net = Net()
    x = net.input(1, 6, 8)
    h = net.linear(x, 8, "inp")

    def heads(v: Value, perm: tuple[int, ...]) -> Value:
        return net.op("transpose", net.op("reshape", v, shape=(1, 6, 2, 4)), perm=perm)

    q = heads(net.linear(h, 8, "q"), (0, 2, 1, 3))
    k = heads(net.linear(h, 8, "k"), (0, 2, 3, 1))
    v = heads(net.linear(h, 8, "v"), (0, 2, 1, 3))
    scores = net.g.add("matmul", [q, k], name="scores").output
    scores = net.op("div", scores, net.g.constant(np.float32(2.0), "root"))
    if mask:
        scores = net.op("add", scores, net.input(1, 1, 1, 6, name="mask"))
    p = net.op("softmax", scores, axis=-1)
    context = net.g.add("matmul", [p, v], name="context").output
    merged = net.op("reshape", net.op("transpose", context, perm=(0, 2, 1, 3)), shape=(1, 6, 8))
    s = net.op("add", net.linear(merged, 8, "o"), h)
    n = net.op("layer_norm", s, net.const(8), net.const(8), axis=-1)
    f = net.linear(net.op("gelu", net.linear(n, 16, "up")), 8, "down")
    s2 = net.op("add", f, n)
    n2 = net.op("layer_norm", s2, net.const(8), net.const(8), axis=-1)
    net.done(net.linear(n2, 3, "out"))
    return net


def test_residual_streams_into_layer_norm_are_16_bits():
    net = encoder()
    graph, _ = insert(net.g, observed(net.g, net.sample()))
    for norm in [n for n in graph.nodes if n.op.name == "layer_norm"]:
        assert held(norm, 0).dtype is DType.INT16
    up = held(graph.node("up"), 0)
    assert up.dtype is DType.UINT8
    source = up.producer.input(0).producer  # quantized once to 16 bits, from there to 8
    assert source.op.name == "dequantize"
    assert source.input(0).dtype is DType.INT16


def test_a_residual_stream_from_a_float_head_is_in_integers_from_its_first_norm_on():
    net = Net()
    x = net.op("add", net.input(1, 6, 8), net.const(8))  # like a position embedding: stays float
    n = net.op("layer_norm", x, net.const(8), net.const(8), axis=-1)
    s = net.op("add", x, net.linear(net.op("relu", net.linear(n, 8, "up")), 8, "down"))
    last = net.op("layer_norm", s, net.const(8), net.const(8), axis=-1)
    net.done(net.linear(last, 3, "out"))
    graph, plan = insert(net.g, observed(net.g, net.sample()))
    norms = [n for n in graph.nodes if n.op.name == "layer_norm"]
    assert [held(n, 0).dtype for n in norms] == [DType.INT16] * 2
    floats = [name for name in plan if not plan.precision(name).is_integer]
    assert floats == [x.producer.name]


def test_attention_operands():
    net = encoder()
    graph, plan = insert(net.g, observed(net.g, net.sample()))
    scores, context = graph.node("scores"), graph.node("context")
    assert held(scores, 0).dtype is DType.UINT8
    for node in (scores, context):
        b = held(node, 1)
        assert b.dtype is DType.INT8
        assert b.qparams.is_symmetric
    p = held(context, 0).qparams
    assert (p.s, p.z) == (pytest.approx(1 / 255), 0)  # softmax covers [0, 1]
    softmax = graph.node("softmax_0")
    assert softmax.input(0).producer.op.name == "add"  # mask added in float
    assert plan.reason("div_0") == "attention scores stay float32"


def test_scores_stay_float_unless_asked():
    net = encoder(mask=False)
    table = observed(net.g, net.sample())
    graph, _ = insert(net.g, table)
    assert held(graph.node("softmax_0"), 0) is None
    graph, _ = insert(net.g, table, integer_scores=True)
    assert held(graph.node("softmax_0"), 0).dtype is DType.UINT8


def test_a_normalization_between_products_is_a_depthwise_convolution():
    net = Net()
    x = net.input(1, 3, 8, 8)
    a = net.conv(x, 4, name="conv1")
    scaled = net.op("mul", a, net.const(4, 1, 1, name="f"))
    shifted = net.op("add", scaled, net.const(1, 4, 1, 1, name="s"))
    net.done(net.conv(net.op("relu", shifted), 4, name="conv2"), net.op("tanh", a))
    sample = net.sample()
    graph, _ = insert(net.g, observed(net.g, sample))
    norm = graph.node("mul_0")
    assert norm.op.name == "conv"
    assert norm.attr("group") == 4
    assert norm.sources == ("mul_0", "add_0")
    assert np.abs(held(norm, 1).array()).min() == 127  # the factors are exact
    assert [n.op.name for n in norm.output.users] == ["relu"]
    before, after = run(net.g, sample)["y0"], run(graph, sample)["y0"]
    assert np.abs(before - after).max() < 0.02 * np.abs(before).max()


def test_a_float_plan_quantizes_nothing():
    net = small_cnn()
    plan = uniform(net.g, "fp32")
    graph, after = insert(net.g, None, plan)
    assert graph.stage is Stage.QDQ
    assert not any(v.type.is_quantized for v in graph.values())
    assert after == plan
    assert [p.name for p in quantize_passes(plan)] == ["insert_qdq", "fuse"]
    names = [p.name for p in quantize_passes(uniform(net.g))]
    assert names == ["calibrate", "insert_qdq", "fold_factors", "fuse"]


def test_one_product_may_stay_float():
    net = small_cnn()
    plan = uniform(net.g).overridden(net.g, {"conv1": "fp32"})
    graph, after = insert(net.g, fixed_table(net.g), plan)
    assert held(graph.node("conv1"), 0) is None
    assert held(graph.node("conv2"), 0) is not None
    assert after.reason("conv1") == "asked for by 'conv1'"


def test_no_table():
    net = small_cnn()
    with pytest.raises(CalibrationError, match="there is no calibration table"):
        insert(net.g, None)


def test_table_of_another_graph():
    net = small_cnn()
    with pytest.raises(CalibrationError, match="made for another graph"):
        insert(net.g, CalibrationTable({}, "0" * 64))


def test_missing_range_names_the_tensor():
    net = small_cnn()
    with pytest.raises(CalibrationError, match=r"no range for x, relu_0\.out,") as caught:
        insert(net.g, CalibrationTable({}, digest(net.g)))
    assert caught.value.value == "x"


def test_what_is_quantized_says_how_far_it_spreads() -> None:
    """The root mean square in steps, for the kernels' choice; no part of what the grid is."""
    net = small_cnn()
    table = observed(net.g, net.sample())
    name = next(n for n in net.g.nodes if n.op.name == "relu").output.name
    seen = replace(table.tensors[name], mean=3.0, deviation=4.0, count=100)
    table = replace(table, tensors={**table.tensors, name: seen})
    graph, _ = insert(net.g, table)
    (q,) = (v.qparams for v in graph.values() if v.name == f"{name}_q")
    assert q is not None
    assert q.spread == pytest.approx(5.0 / q.s)
    assert q == replace(q, spread=None)
    assert hash(q) == hash(replace(q, spread=None))
    others = [v.qparams for v in graph.values() if v.name != f"{name}_q" and v.qparams is not None]
    assert others
    assert all(o.spread is None for o in others)  # nothing was counted there
