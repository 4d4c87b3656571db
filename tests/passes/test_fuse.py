# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Islands between dequantize and quantize become integer operators, with the same meaning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import special

from qcompiler import numerics
from qcompiler.interpreter import evaluate, run
from qcompiler.ir import Graph, Value
from qcompiler.ops import Stage
from qcompiler.passes.fuse import Fuse
from qcompiler.passmanager import ModifiedInstrument, PassContext, PassManager
from qcompiler.types import DType, PerAxis, PerTensor, QuantParams, TensorType

PADS = {"pads": (1, 1, 1, 1), "dilations": (1, 1)}
CONV = {"strides": (1, 1), **PADS}


def u8(scale: float = 0.05, zero: int = 120, lo: int = 0, hi: int = 255) -> QuantParams:
    return QuantParams(np.float32(scale), zero, DType.UINT8, lo, hi)


def s8(scale: float = 0.05, zero: int = 0) -> QuantParams:
    return QuantParams(np.float32(scale), zero, DType.INT8, -128, 127)


def s16(scale: float = 0.001) -> QuantParams:
    return QuantParams(np.float32(scale), 0, DType.INT16, -32768, 32767)


class Qdq:
    """Builds QDQ graphs."""

    def __init__(self, seed: int = 0) -> None:
        self.g = Graph("net", Stage.QDQ)
        self.rng = np.random.default_rng(seed)

    def input(self, *shape: int, q: QuantParams | None = None, name: str = "x") -> Value:
        x = self.g.add_input(name, TensorType(shape, DType.FLOAT32), 0)
        return self.qdq(x, q or u8())

    def qdq(self, x: Value, q: QuantParams) -> Value:
        held = self.g.add("quantize", [x], types=[TensorType(x.shape, q.storage, q)])
        return self.g.add("dequantize", [held.output]).output

    def weights(self, *shape: int, axis: int | None = 0, storage: DType = DType.INT8) -> Value:
        n = 1 if axis is None else shape[axis]
        scale = self.rng.uniform(0.002, 0.02, n).astype(np.float32)
        shift = 128 if storage is DType.UINT8 else 0
        data = (self.rng.integers(-127, 128, shape) + shift).astype(storage.numpy)
        q = QuantParams(
            scale.reshape(()) if axis is None else scale,
            np.full(() if axis is None else n, shift),
            storage,
            storage.min,
            storage.max,
            PerTensor() if axis is None else PerAxis(axis),
        )
        return self.g.add("dequantize", [self.g.constant(data, "w", q)]).output

    def const(self, *shape: int, scale: float = 1.0) -> Value:
        return self.g.constant((self.rng.normal(size=shape) * scale).astype(np.float32), "c")

    def op(self, name: str, *xs: Value | None, **attrs: object) -> Value:
        return self.g.add(name, list(xs), attrs, name=name).output

    def conv(self, x: Value, out: int = 4, bias: Value | None = None, **kind: object) -> Value:
        return self.op("conv", x, self.weights(out, x.shape[1], 3, 3, **kind), bias, **CONV)

    def done(self, *outputs: Value) -> Qdq:
        self.g.set_outputs([(f"y{i}", v) for i, v in enumerate(outputs)])
        self.g.verify()
        return self

    def sample(self, seed: int = 3) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {v.name: rng.normal(0, 3, v.shape).astype(np.float32) for v in self.g.inputs}


def fuse(net: Qdq | Graph) -> Graph:
    graph = net.g if isinstance(net, Qdq) else net
    return PassManager([Fuse()], [ModifiedInstrument()]).run(graph, PassContext())


def ops(graph: Graph) -> list[str]:
    return [n.op.name for n in graph.nodes]


def agree(net: Qdq, graph: Graph, lsb: float = 0.0, *, share: float = 0.02) -> None:
    """Check that results differ by at most one step, and only where a rounding was at a tie."""
    for seed in range(3):
        x = net.sample(seed)
        before, after = run(net.g, x), run(graph, x)
        for name, a in before.items():
            d = np.abs(a.astype(np.float64) - after[name])
            tolerance = lsb * 1.001 + 1e-5 * np.abs(a).max()
            assert d.max() <= tolerance
            assert (d > 1e-5 * np.abs(a).max()).mean() <= share


# ------------------------------------------------------------------------------- products


def test_residual_block(golden):
    net = Qdq()
    x = net.input(1, 4, 6, 6)
    bias = net.const(4)
    a = net.qdq(net.op("relu", net.conv(x, 4, bias)), u8(0.04, 0))
    b = net.qdq(net.op("clip", net.op("add", net.conv(a), x), min=-1.0, max=4.0), u8(0.05, 60))
    graph = fuse(net.done(b))
    assert str(graph) == golden
    assert ops(graph) == ["quantize", "qconv", "qconv", "dequantize"]
    assert graph.node("conv_1").sources[:3] == ("conv_1", "add", "clip")
    agree(net, graph, 0.05)


@pytest.mark.parametrize("activation", [u8(0.05, 120), s8(0.05, -3), u8(0.02, 7, 0, 127)])
@pytest.mark.parametrize("bias", ["none", "float", "dequantized", "other scale"])
@pytest.mark.parametrize(
    ("axis", "storage"),
    [(0, DType.INT8), (None, DType.INT8), (0, DType.UINT8), (None, DType.UINT8), (0, DType.INT4)],
)
def test_convolutions_of_other_tools(activation, bias, axis, storage):
    net = Qdq()
    x = net.input(1, 3, 6, 6, q=activation)
    w = net.weights(
        5, 3, 3, 3, axis=axis, storage=storage if storage is DType.UINT8 else DType.INT8
    )
    if storage is DType.INT4:
        held = w.producer.input(0)
        q = QuantParams(
            held.qparams.scale, 0 * held.qparams.zero_point, DType.INT4, -8, 7, PerAxis(0)
        )
        w = net.g.add(
            "dequantize", [net.g.constant((held.array() // 16), "w4", q)]
        ).output  # fmt: skip
    b = None
    if bias == "float":
        b = net.const(5)
    elif bias != "none":
        wq = w.producer.input(0).qparams
        scale = np.broadcast_to(wq.scale * np.float32(activation.s), (5,)).copy()
        scale *= np.float32(1.0 if bias == "dequantized" else 2.5)
        q = QuantParams(scale, np.zeros(5), DType.INT32, -(2**31), 2**31 - 1, PerAxis(0))
        data = net.rng.integers(-500, 500, 5).astype(np.int32)
        b = net.g.add("dequantize", [net.g.constant(data, "b", q)]).output
    y = net.qdq(net.op("clip", net.op("conv", x, w, b, **CONV), min=0.0, max=6.0), u8(0.03, 0))
    graph = fuse(net.done(y))
    assert ops(graph) == ["quantize", "qconv", "dequantize"]
    conv = graph.nodes[1]
    assert conv.input(1).dtype is DType.INT8
    assert conv.output.qparams.qmax == 200  # 6.0 / 0.03
    agree(net, graph, 0.03)


@pytest.mark.parametrize("transpose", [False, True])
def test_matrix_product(transpose):
    net = Qdq()
    x = net.input(2, 5, 8)
    w = net.weights(6, 8, axis=0) if transpose else net.weights(8, 6, axis=1)
    y = net.op("matmul", x, w, net.const(6), transpose_b=transpose)
    graph = fuse(net.done(net.qdq(y, s8(0.1, 4))))
    assert ops(graph) == ["quantize", "qmatmul", "dequantize"]
    assert graph.nodes[1].input(1).shape == (8, 6)
    agree(net, graph, 0.1)


def test_weights_that_are_moved_first():
    net = Qdq()
    w = net.op("transpose", net.weights(6, 8, axis=0), perm=(1, 0))
    y = net.op("matmul", net.input(2, 8), w)
    graph = fuse(net.done(net.qdq(y, u8(0.1))))
    assert ops(graph) == ["quantize", "qmatmul", "dequantize"]
    assert graph.nodes[1].input(1).qparams.granularity == PerAxis(1)
    agree(net, graph, 0.1)


def test_product_of_two_activations():
    net = Qdq()
    a, b = net.input(1, 2, 4, 6), net.input(1, 2, 6, 5, q=s8(), name="b")
    graph = fuse(net.done(net.qdq(net.op("matmul", a, b), u8(0.2))))
    assert Counter(ops(graph)) == {"quantize": 2, "qmatmul": 1, "dequantize": 1}
    agree(net, graph, 0.2)


def test_result_read_as_float_is_not_rounded():
    net = Qdq()
    y = net.op("matmul", net.input(2, 8), net.weights(8, 6, axis=1), net.const(6))
    graph = fuse(net.done(net.op("softmax", y, axis=-1)))
    assert ops(graph) == ["quantize", "qmatmul", "softmax"]
    assert graph.node("matmul").output.type == TensorType((2, 6), DType.FLOAT32)
    agree(net, graph, 1e-3, share=1.0)


def test_16_bit_residual():
    net = Qdq()
    x, r = net.input(2, 8), net.input(2, 6, q=s16(), name="r")
    y = net.op("add", r, net.op("matmul", x, net.weights(8, 6, axis=1)))
    graph = fuse(net.done(net.qdq(y, s16(0.002))))
    assert Counter(ops(graph)) == {"quantize": 2, "qmatmul": 1, "dequantize": 1}
    assert graph.node("matmul").output.dtype is DType.INT16
    agree(net, graph, 0.002)


def test_two_rounded_branches_are_an_integer_addition():
    net = Qdq()
    x = net.input(1, 4, 6, 6)
    a, b = net.qdq(net.conv(x), u8(0.1)), net.qdq(net.conv(x), u8(0.07))
    graph = fuse(net.done(net.qdq(net.op("relu", net.op("add", a, b)), u8(0.1, 0))))
    assert ops(graph) == ["quantize", "qconv", "qconv", "qadd", "dequantize"]
    agree(net, graph, 0.2, share=0.1)


def test_a_convolution_read_twice_keeps_its_float():
    net = Qdq()
    c = net.conv(net.input(1, 4, 6, 6))
    graph = fuse(net.done(net.qdq(c, u8(0.1)), net.op("tanh", c)))
    assert ops(graph) == ["quantize", "qconv", "quantize", "dequantize", "tanh"]
    agree(net, graph, 0.1)


def test_what_has_no_integer_form_reads_floats():
    net = Qdq()
    x = net.input(1, 4, 6, 6)
    w = net.weights(4, 4, 3, 3, axis=1)  # scales along input channels: no integer form
    graph = fuse(net.done(net.qdq(net.op("relu", net.op("conv", x, w, **CONV)), u8(0.1, 0))))
    assert ops(graph) == ["quantize", "dequantize", "conv", "quantize", "dequantize"]
    assert graph.nodes[3].output.qparams.qmin == 0  # the relu is in the range of the quantize
    assert graph.node("conv").input(1).dtype is DType.FLOAT32
    agree(net, graph)


def test_a_bias_beyond_int32_is_added_as_floats():
    net = Qdq()
    x = net.input(1, 4)
    y = net.op("matmul", x, net.weights(4, 3, axis=1), net.const(3, scale=1e9))
    made = ops(fuse(net.done(net.qdq(y, u8(0.1)))))
    assert made == ["quantize", "qmatmul", "add", "quantize", "dequantize"]


# ------------------------------------------------------------------------- elementwise chains


def reals(q: QuantParams) -> np.ndarray:
    return numerics.dequantize(np.arange(256, dtype=np.uint8), q)


def test_a_chain_is_one_table():
    net = Qdq()
    x = net.input(2, 9)
    y = net.op("mul", net.op("gelu", net.op("tanh", x)), net.g.constant(np.float32(3.0), "c"))
    target = u8(0.01, 3)
    graph = fuse(net.done(net.qdq(y, target)))
    assert ops(graph) == ["quantize", "table", "dequantize"]
    t = np.tanh(reals(u8()))
    want = np.float32(0.5) * t * (1 + special.erf(t * np.float32(np.sqrt(0.5)))) * np.float32(3)
    table = graph.nodes[1]
    np.testing.assert_array_equal(table.input(1).array(), numerics.quantize(want, target))
    assert table.sources[:3] == ("tanh", "gelu", "mul")
    agree(net, graph)


def test_both_operands_from_one_tensor_are_one_table():
    net = Qdq()
    x = net.input(2, 9)
    y = net.op("mul", x, net.op("sigmoid", x))
    graph = fuse(net.done(net.qdq(y, u8(0.05, 6))))
    assert ops(graph) == ["quantize", "table", "dequantize"]
    agree(net, graph)


def test_a_chain_that_ends_in_floats_is_a_table_of_floats():
    net = Qdq()
    x = net.qdq(net.op("matmul", net.input(2, 8), net.weights(8, 6, axis=1)), u8(0.1))
    graph = fuse(net.done(net.op("neg", net.op("sigmoid", x))))
    assert ops(graph) == ["quantize", "qmatmul", "table"]
    assert graph.nodes[-1].input(1).dtype is DType.FLOAT32
    agree(net, graph)


def test_a_chain_on_16_bits_stays_float():
    net = Qdq()
    x = net.input(2, 9, q=s16())
    graph = fuse(net.done(net.qdq(net.op("tanh", x), u8(0.01))))
    assert ops(graph) == ["quantize", "dequantize", "tanh", "quantize", "dequantize"]


def test_a_clamp_behind_a_rounding_narrows_the_kernel():
    net = Qdq()
    c = net.qdq(net.conv(net.input(1, 4, 6, 6)), u8(0.1, 100))
    graph = fuse(net.done(net.qdq(net.op("clip", c, min=0.0, max=6.0), u8(0.1, 100))))
    assert ops(graph) == ["quantize", "qconv", "dequantize"]
    q = graph.nodes[1].output.qparams
    assert (q.qmin, q.qmax) == (100, 160)
    agree(net, graph, 0.1)


# ------------------------------------------------------------------- reductions, norms, movement


def test_pooling_and_means():
    net = Qdq()
    x = net.input(1, 4, 8, 8)
    pool = {"kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1), "dilations": (1, 1)}
    a = net.qdq(net.op("relu", net.op("average_pool", x, **pool)), u8(0.03, 0))
    b = net.qdq(net.op("reduce_mean", a, axes=(2, 3), keepdims=True), u8(0.02, 0))
    graph = fuse(net.done(b))
    assert ops(graph) == ["quantize", "qaverage_pool", "qreduce_mean", "dequantize"]
    agree(net, graph, 0.02, share=0.1)


def test_softmax_of_integers_and_of_floats():
    net = Qdq()
    x = net.input(2, 3, 7, q=u8(0.1))
    scores = net.op("matmul", x, net.weights(7, 7, axis=1))
    a = net.qdq(net.op("softmax", x, axis=-1), u8(1 / 255, 0))
    b = net.qdq(net.op("softmax", scores, axis=-1), u8(1 / 255, 0))
    graph = fuse(net.done(a, b))
    assert Counter(ops(graph)) == {"quantize": 1, "qmatmul": 1, "qsoftmax": 2, "dequantize": 2}
    agree(net, graph, 1 / 255)


def test_layer_norm():
    net = Qdq()
    x = net.input(2, 3, 8, q=s16())
    n = net.op("layer_norm", x, net.const(8), axis=-1)
    graph = fuse(net.done(net.qdq(n, s16()), net.op("tanh", net.op("layer_norm", x, axis=2))))
    assert Counter(ops(graph)) == {"quantize": 1, "qlayer_norm": 2, "dequantize": 1, "tanh": 1}
    agree(net, graph, 0.001)


def test_movement_runs_on_integers():
    net = Qdq()
    x = net.input(1, 4, 6, 6)
    y = net.op("transpose", net.op("reshape", x, shape=(1, 4, 36)), perm=(0, 2, 1))
    graph = fuse(net.done(net.qdq(y, u8())))
    assert ops(graph) == ["quantize", "reshape", "transpose", "dequantize"]
    assert graph.node("transpose").output.dtype is DType.UINT8
    agree(net, graph)


def test_movement_before_a_quantize_moves_behind_it():
    net = Qdq()
    c = net.op("relu", net.conv(net.input(1, 4, 6, 6)))
    pool = {"kernel": (2, 2), "strides": (2, 2), "pads": (0,) * 4, "dilations": (1, 1)}
    y = net.op("reshape", net.op("max_pool", c, **pool), shape=(1, 36))
    graph = fuse(net.done(net.qdq(y, u8(0.1, 0))))
    assert ops(graph) == ["quantize", "qconv", "max_pool", "reshape", "dequantize"]
    agree(net, graph, 0.1)


def test_max_pool_with_padding():
    net = Qdq()
    pool = {"kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1), "dilations": (1, 1)}
    y = net.op("max_pool", net.input(1, 2, 5, 5), **pool)
    graph = fuse(net.done(net.qdq(y, u8())))
    assert ops(graph) == ["quantize", "max_pool", "dequantize"]
    agree(net, graph)


def test_pad_adds_the_zero_point():
    net = Qdq()
    y = net.op("pad", net.input(1, 2, 3, 3), pads=(0, 0, 1, 1, 0, 0, 1, 1))
    graph = fuse(net.done(net.qdq(y, u8())))
    assert ops(graph) == ["quantize", "pad", "dequantize"]
    agree(net, graph)


def test_pad_with_another_value_stays_float():
    net = Qdq()
    y = net.op("pad", net.input(1, 2, 3, 3), pads=(0, 0, 1, 1, 0, 0, 1, 1), value=1.5)
    graph = fuse(net.done(net.qdq(y, u8())))
    assert ops(graph) == ["quantize", "dequantize", "pad", "quantize", "dequantize"]
    agree(net, graph)


def test_concat_of_one_grid_and_of_two():
    net = Qdq()
    a, b = net.input(1, 2, 4, 4), net.input(1, 3, 4, 4, name="b")
    same = net.qdq(net.op("concat", a, b, axis=1), u8())
    other = net.qdq(net.op("concat", a, net.input(1, 1, 4, 4, q=u8(0.03), name="c"), axis=1), u8())
    graph = fuse(net.done(same, other))
    assert Counter(ops(graph)) == {"quantize": 3, "concat": 2, "requantize": 1, "dequantize": 2}
    agree(net, graph, 0.05)


def test_split():
    net = Qdq()
    x = net.input(1, 6, 4)
    parts = net.g.add("split", [x], {"axis": 1, "sizes": (2, 4)}).outputs
    graph = fuse(net.done(net.qdq(parts[0], u8()), net.qdq(parts[1], u8(0.13))))
    assert Counter(ops(graph)) == {"quantize": 1, "split": 1, "requantize": 1, "dequantize": 2}
    agree(net, graph, 0.13)


def test_a_fused_clamp_reaches_the_types_behind_movement():
    net = Qdq()
    c = net.op("clip", net.conv(net.input(1, 4, 6, 6)), min=0.0, max=2.0)
    a = net.qdq(c, u8(0.1, 0))
    t = net.qdq(net.op("transpose", a, perm=(0, 1, 3, 2)), u8(0.1, 0))
    graph = fuse(net.done(net.qdq(net.conv(t), u8(0.1))))
    assert ops(graph) == ["quantize", "qconv", "transpose", "qconv", "dequantize"]
    assert graph.nodes[2].output.qparams.qmax == 20


def test_requantize_and_nothing():
    net = Qdq()
    x = net.input(2, 8, q=s16())
    graph = fuse(net.done(net.qdq(x, u8()), net.qdq(x, s16())))
    assert Counter(ops(graph)) == {"quantize": 1, "requantize": 1, "dequantize": 2}
    agree(net, graph, 0.05)


def test_gather_from_a_quantized_table():
    net = Qdq()
    ids = net.g.add_input("ids", TensorType((3,), DType.INT64))
    table = net.weights(10, 8, axis=None)
    net.done(net.op("gather", table, ids))
    graph = fuse(net)
    assert ops(graph) == ["gather", "dequantize"]
    x = {"ids": np.array([1, 5, 9])}
    np.testing.assert_array_equal(run(net.g, x)["y0"], run(graph, x)["y0"])


# ------------------------------------------------------------------------------ float graphs


def test_float_products_take_bias_residual_and_clamp():
    net = Qdq()
    x = net.g.add_input("x", TensorType((1, 4, 6, 6), DType.FLOAT32))
    w = net.const(4, 4, 3, 3)
    first = net.op("add", net.op("conv", x, w, **CONV), net.const(4, 1, 1))
    second = net.op("conv", net.op("relu", first), w, **CONV)
    y = net.op("clip", net.op("add", x, second), min=-1.0, max=6.0)
    net.done(y)
    graph = fuse(net)
    assert ops(graph) == ["conv", "conv"]
    assert graph.stage is Stage.INTEGER
    assert (graph.nodes[0].attr("act_min"), graph.nodes[0].attr("act_max")) == (0.0, None)
    assert graph.nodes[1].input(3) is graph.inputs[0]
    assert graph.nodes[1].sources == ("conv_1", "add_1", "clip")
    agree(net, graph)


def test_no_fusion_across_a_second_reader():
    net = Qdq()
    x = net.g.add_input("x", TensorType((2, 4), DType.FLOAT32))
    y = net.op("matmul", x, net.const(4, 4))
    net.done(net.op("relu", y), y)
    assert ops(fuse(net)) == ["matmul", "relu"]


def test_a_matrix_added_after_a_product_is_no_bias():
    net = Qdq()
    x = net.g.add_input("x", TensorType((2, 4), DType.FLOAT32))
    net.done(net.op("add", net.op("matmul", x, net.const(4, 4)), net.const(2, 4)))
    assert ops(fuse(net)) == ["matmul", "add"]


# ------------------------------------------------------------------- every operator at once


def random_network(seed: int) -> Qdq:
    """A chain of random islands over one image."""
    net = Qdq(seed)
    rng = net.rng
    x = net.input(1, 4, 8, 8)
    values = [x]
    for _ in range(12):
        v = values[rng.integers(len(values))]
        kind = rng.choice(["conv", "residual", "add", "mul", "table", "pool", "pad", "concat"])
        q = u8(float(rng.uniform(0.02, 0.2)), int(rng.integers(0, 200)))
        if kind == "conv":
            y = net.conv(v, 4, net.const(4) if rng.random() < 0.5 else None)
        elif kind == "residual":
            y = net.op("add", net.conv(v), values[rng.integers(len(values))])
        elif kind in ("add", "mul"):
            y = net.op(str(kind), v, values[rng.integers(len(values))])
        elif kind == "table":
            name = str(
                rng.choice(["tanh", "sigmoid", "silu", "leaky_relu", "hard_swish", "square"])
            )
            y = net.op("mul", v, net.op("tanh", v)) if name == "square" else net.op(name, v)
        elif kind == "pool":
            y = net.op("average_pool", v, kernel=(3, 3), strides=(1, 1), **PADS)
        elif kind == "pad":
            wide = net.op("pad", v, pads=(0, 0, 1, 1, 0, 0, 0, 0))
            y = net.op("slice", wide, starts=(0, 0), ends=(8, 8), axes=(2, 3), steps=(1, 1))
        else:
            c = net.op("concat", v, values[rng.integers(len(values))], axis=1)
            y = net.op("slice", c, starts=(2,), ends=(6,), axes=(1,), steps=(1,))
        if rng.random() < 0.4:
            y = net.op("clip", y, min=-2.0, max=float(rng.uniform(0, 5)))
        values.append(net.qdq(y, q))
    return net.done(*values[-3:])


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_agree_operator_by_operator(seed):
    """Each integer kernel, fed with the QDQ graph's integers, is within one step of them."""
    net = random_network(seed)
    graph = fuse(net)
    left = set(ops(graph)) & {"conv", "add", "mul", "average_pool", "tanh", "relu", "clip"}
    assert not left
    assert ops(graph).count("quantize") == 1
    known: dict[str, np.ndarray] = {}
    run(net.g, net.sample(seed), observe=lambda v, a: known.__setitem__(v.name, a))
    worst = checked = 0
    for node in graph.nodes:
        arrays: Sequence[np.ndarray | None] = [
            None if v is None else (v.array() if v.is_constant else known[v.name])
            for v in node.inputs
        ]
        for v, a in zip(node.outputs, evaluate(node, list(arrays)), strict=True):
            if v.name in known and known[v.name].dtype == a.dtype and v.type.is_quantized:
                worst = max(worst, int(np.abs(known[v.name].astype(int) - a).max()))
                checked += 1
            known.setdefault(v.name, a)
            if known[v.name].dtype != a.dtype:
                known[v.name] = a
    assert checked > 5
    assert worst <= 1
