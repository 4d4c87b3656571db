# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Small transformers, MLPs and unusual graphs: exact, accurate, and in integers where they can be.

Each is written the way some exporter writes it. What each may leave in float is listed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from built_models import executor, show_integers
from onnx import TensorProto, helper, numpy_helper

from qcompiler.driver import build_graph, quantize_model
from qcompiler.interpreter import run
from qcompiler.ort import Session
from qcompiler.registry import get_target
from qcompiler.targets.base import Built
from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.types import Array

D, HEADS, S, WORDS = 32, 2, 12, 40
SAMPLES, SEEN = 18, 16
ROWS = sorted({"host", *(n for n in ("x86-avx2",) if runnable(ISA_TABLE[n]))})


class Net:
    """Writes a model node by node, with seeded weights and seeded samples for its inputs."""

    def __init__(self, seed: int, opset: int = 17) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.samples: dict[str, Array] = {}

    def input(self, name: str, *shape: int, data: Array | None = None) -> str:
        """Declare an input of one sample; `data` holds samples if not uniform floats."""
        if data is None:
            data = self.rng.uniform(-2, 2, (SAMPLES, *shape)).astype(np.float32)
        dtype = helper.np_dtype_to_tensor_dtype(data.dtype)
        self.inputs.append(helper.make_tensor_value_info(name, dtype, [1, *shape]))
        self.samples[name] = data
        return name

    def ids(self, name: str, count: int, *shape: int) -> str:
        return self.input(name, *shape, data=self.rng.integers(0, count, (SAMPLES, *shape)))

    def const(self, data: npt.ArrayLike) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(data), name))
        return name

    def weight(self, *shape: int, std: float = 0.0) -> str:
        std = std or shape[-2 if len(shape) > 1 else -1] ** -0.5
        return self.const((self.rng.standard_normal(shape) * std).astype(np.float32))

    def op(self, kind: str, *inputs: str, count: int = 1, **attrs: object) -> str:
        base = f"{kind}_{len(self.nodes)}"
        outputs = [base, *(f"{base}:{i}" for i in range(1, count))]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, base, **attrs))
        return base

    def linear(self, x: str, k: int, n: int) -> str:
        return self.op("Add", self.weight(n, std=0.1), self.op("MatMul", x, self.weight(k, n)))

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.const(np.int64(shape)))

    def turn(self, x: str, *perm: int) -> str:
        return self.op("Transpose", x, perm=perm)

    def norm(self, x: str) -> str:
        gamma = self.const((1 + 0.1 * self.rng.standard_normal(D)).astype(np.float32))
        return self.op("LayerNormalization", x, gamma, self.weight(D, std=0.1), axis=-1)

    def heads(self, x: str, length: int) -> str:
        return self.turn(self.reshape(x, 1, length, HEADS, D // HEADS), 0, 2, 1, 3)

    def attend(self, q: str, k: str, v: str, mask: Callable[[str], str] | None = None) -> str:
        """Softmax(q k' / sqrt(d)) v, merged and projected; operands [1, heads, length, d]."""
        scores = self.op("MatMul", q, self.turn(k, 0, 1, 3, 2))
        scores = self.op("Div", scores, self.const(np.float32(4)))
        p = self.op("Softmax", mask(scores) if mask else scores, axis=-1)
        merged = self.turn(self.op("MatMul", p, v), 0, 2, 1, 3)
        return self.linear(self.reshape(merged, 1, -1, D), D, D)

    def gelu(self, x: str) -> str:
        half = self.op("Erf", self.op("Div", x, self.const(np.float32(2**0.5))))
        half = self.op("Add", half, self.const(np.float32(1)))
        return self.op("Mul", self.op("Mul", x, half), self.const(np.float32(0.5)))

    def mlp(self, x: str) -> str:
        return self.linear(self.gelu(self.linear(x, D, 2 * D)), 2 * D, D)

    def done(self, *outputs: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
        graph = helper.make_graph(
            self.nodes,
            "net",
            self.inputs,
            [helper.make_empty_tensor_value_info(o) for o in outputs],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8), self.samples


Model = tuple[onnx.ModelProto, dict[str, Array]]


def bert() -> Model:
    net = Net(1)
    words, kinds = net.ids("ids", WORDS, S), net.ids("kinds", 2, S)
    lengths = net.rng.integers(4, S, (SAMPLES, 1))
    mask = net.input("mask", S, data=(np.arange(S) < lengths).astype(np.int64))
    x = net.op("Gather", net.weight(WORDS, D), words, axis=0)
    x = net.op("Add", x, net.op("Gather", net.weight(2, D), kinds, axis=0))
    x = net.norm(net.op("Add", x, net.weight(1, S, D)))
    m = net.op("Cast", net.reshape(mask, 1, 1, 1, S), to=TensorProto.FLOAT)
    m = net.op("Mul", net.op("Sub", net.const(np.float32(1)), m), net.const(np.float32(-1e4)))
    q, k, v = (net.heads(net.linear(x, D, D), S) for _ in range(3))
    x = net.norm(net.op("Add", x, net.attend(q, k, v, lambda s: net.op("Add", s, m))))
    x = net.norm(net.op("Add", net.mlp(x), x))
    first = net.op("Gather", x, net.const(np.int64(0)), axis=1)
    return net.done(net.linear(net.op("Tanh", net.linear(first, D, D)), D, 3), x)


def gpt() -> Model:
    net = Net(2)
    table = net.weight(WORDS, D)
    x = net.op("Add", net.op("Gather", table, net.ids("ids", WORDS, S)), net.weight(S, D))
    qkv = net.linear(net.norm(x), D, 3 * D)
    split = net.op("Split", qkv, net.const(np.int64([D] * 3)), axis=-1, count=3)
    q, k, v = (net.heads(o, S) for o in (split, f"{split}:1", f"{split}:2"))
    allowed = net.const(np.tri(S, dtype=bool)[None, None])
    low = net.const(np.float32(-np.inf))
    x = net.op("Add", x, net.attend(q, k, v, lambda s: net.op("Where", allowed, s, low)))
    x = net.op("Add", x, net.mlp(net.norm(x)))
    return net.done(net.op("MatMul", net.norm(x), net.turn(table, 1, 0)))


def llama() -> Model:
    """RMS norm written out, rotary positions, one key head for all queries, a gated MLP."""
    net = Net(3)
    half = D // HEADS // 2
    angle = np.outer(np.arange(S), 10.0 ** -np.arange(half))
    cos, sin = (net.const(np.tile(f(angle), 2).astype(np.float32)) for f in (np.cos, np.sin))

    def rms(x: str) -> str:
        square = net.op("ReduceMean", net.op("Pow", x, net.const(np.float32(2))), axes=[-1])
        root = net.op("Sqrt", net.op("Add", square, net.const(np.float32(1e-5))))
        return net.op("Mul", net.op("Div", x, root), net.weight(D))

    def rotary(x: str) -> str:
        axis, mid, end = (net.const(np.int64([i])) for i in (3, half, 2 * half))
        low = net.op("Slice", x, net.const(np.int64([0])), mid, axis)
        high = net.op("Neg", net.op("Slice", x, mid, end, axis))
        turned = net.op("Concat", high, low, axis=-1)
        return net.op("Add", net.op("Mul", x, cos), net.op("Mul", turned, sin))

    x = net.op("Gather", net.weight(WORDS, D), net.ids("ids", WORDS, S))
    h = rms(x)
    q = rotary(net.heads(net.linear(h, D, D), S))
    shape = net.const(np.int64([1, HEADS, S, D // HEADS]))
    k, v = (net.reshape(net.linear(h, D, D // HEADS), 1, 1, S, -1) for _ in range(2))
    k, v = net.op("Expand", rotary(k), shape), net.op("Expand", v, shape)
    causal = net.const(np.triu(np.full((S, S), -np.inf, np.float32), 1))
    x = net.op("Add", x, net.attend(q, k, v, lambda s: net.op("Add", s, causal)))
    h = rms(x)
    gate = net.linear(h, D, D)
    gate = net.op("Mul", gate, net.op("Sigmoid", gate))
    x = net.op("Add", x, net.linear(net.op("Mul", gate, net.linear(h, D, D)), D, D))
    return net.done(net.linear(rms(x), D, WORDS))


def vit() -> Model:
    net = Net(4)
    image = net.input("image", 3, 16, 16)
    x = net.op("Conv", image, net.weight(D, 3, 4, 4, std=0.1), strides=[4, 4])
    x = net.turn(net.reshape(x, 1, D, 16), 0, 2, 1)
    x = net.op("Add", net.op("Concat", net.weight(1, 1, D), x, axis=1), net.weight(17, D))
    h = net.norm(x)
    q, k, v = (net.heads(net.linear(h, D, D), 17) for _ in range(3))
    x = net.op("Add", x, net.attend(q, k, v))
    x = net.op("Add", x, net.mlp(net.norm(x)))
    return net.done(net.linear(net.op("Gather", net.norm(x), net.const(0), axis=1), D, 10))


def mixer() -> Model:
    net = Net(5)
    x = net.input("x", 16, D)
    h = net.turn(net.norm(x), 0, 2, 1)
    h = net.linear(net.gelu(net.linear(h, 16, 24)), 24, 16)
    x = net.op("Add", x, net.turn(h, 0, 2, 1))
    x = net.op("Add", x, net.mlp(net.norm(x)))
    return net.done(net.linear(net.op("ReduceMean", x, axes=[1], keepdims=0), D, 10))


def cross() -> Model:
    net = Net(6)
    x, memory = net.input("x", 7, D), net.input("memory", S, D)
    q = net.heads(net.linear(x, D, D), 7)
    k, v = (net.heads(net.linear(memory, D, D), S) for _ in range(2))
    return net.done(net.mlp(net.norm(net.op("Add", x, net.attend(q, k, v)))))


def einsum() -> Model:
    net = Net(7)
    x = net.input("x", S, D)
    q, k, v = (
        net.op("Einsum", x, net.weight(HEADS, D, 16), equation="btd,hde->bhte") for _ in range(3)
    )
    p = net.op("Softmax", net.op("Einsum", q, k, equation="bhte,bhse->bhts"), axis=-1)
    out = net.weight(HEADS, 16, D)
    return net.done(net.op("Einsum", p, v, out, equation="bhts,bhse,hed->btd"))


def products() -> Model:
    """Gemm in all its forms, constants on the left, vectors, stacks of weights."""
    net = Net(8)
    x = net.input("x", D)
    a = net.op("Gemm", x, net.weight(D, D), net.weight(D), transB=1, alpha=0.5, beta=2.0)
    a = net.op("Gemm", net.turn(net.op("Relu", a), 1, 0), net.weight(24, D), transA=1, transB=1)
    a = net.op("Gemm", net.weight(16, 24), net.op("Relu", a), transB=1)
    a = net.op("MatMul", net.reshape(net.op("Tanh", a), 1, 4, 4), net.weight(3, 4, 8))
    a = net.op("MatMul", net.weight(5, 4), net.op("Relu", a))
    return net.done(net.op("MatMul", a, net.weight(8)), net.op("MatMul", net.weight(5), a))


def wide_and_deep() -> Model:
    net = Net(9)
    kinds, numbers = net.ids("kinds", 6, 3), net.input("numbers", 13)
    embedded = net.reshape(net.op("Gather", net.weight(6, 8, std=1.0), kinds), 1, 24)
    h = net.op("Concat", embedded, numbers, axis=1)
    h = net.op("Relu", net.linear(net.op("Relu", net.linear(h, 37, 48)), 48, 16))
    wide = net.op("OneHot", kinds, net.const(np.int64(6)), net.const(np.float32([0, 1])))
    h = net.op("Concat", h, net.reshape(wide, 1, 18), axis=1)
    return net.done(net.op("Sigmoid", net.linear(h, 34, 2)))


def recurrent() -> Model:
    """A GRU cell in four unrolled steps."""
    net = Net(10)
    x = net.input("x", 4, 8)
    wi, wh = net.weight(8, 48), net.weight(16, 48)
    h = net.const(np.zeros((1, 16), np.float32))
    one = net.const(np.float32(1))
    for t in range(4):
        xt = net.op("Gather", x, net.const(np.int64(t)), axis=1)
        gi = net.op("Split", net.op("MatMul", xt, wi), axis=-1, count=3)
        gh = net.op("Split", net.op("MatMul", h, wh), axis=-1, count=3)
        r, z = (net.op("Sigmoid", net.op("Add", gi + s, gh + s)) for s in ("", ":1"))
        n = net.op("Tanh", net.op("Add", f"{gi}:2", net.op("Mul", r, f"{gh}:2")))
        kept = net.op("Mul", net.op("Sub", one, z), n)
        h = net.op("Add", kept, net.op("Mul", z, h))
    return net.done(net.linear(h, 16, 3))


def odd_outputs() -> Model:
    """An input, a constant and one value twice as results; an unused input; an empty tensor."""
    net = Net(11)
    x = net.input("x", 5, D)
    net.input("unused", 3)
    y = net.op("MatMul", x, net.weight(D, 8))
    zero = net.const(np.int64([0]))
    empty = net.op("Slice", x, zero, zero, net.const(np.int64([1])))
    joined = net.op("Concat", net.op("MatMul", empty, net.weight(D, 8)), y, axis=1)
    outputs = (y, net.op("Identity", y), net.op("Identity", x), empty, joined)
    return net.done(*outputs, net.op("Identity", net.weight(3)))


MODELS: Mapping[Callable[[], Model], frozenset[str]] = {
    bert: frozenset({"gather", "add", "cast", "sub", "mul"}),  # the embedding and the mask
    gpt: frozenset({"gather", "add", "where", "mul"}),
    llama: frozenset({"gather", "add", "mul", "div", "sqrt", "reduce_mean"}),
    vit: frozenset(),
    mixer: frozenset(),
    cross: frozenset(),
    einsum: frozenset(),
    products: frozenset(),
    wide_and_deep: frozenset({"gather", "sigmoid", "less", "add", "where", "equal"}),
    recurrent: frozenset({"gather"}),
    odd_outputs: frozenset(),
}
"""Model -> operators that may stay in float."""


def decibels(want: Sequence[Array], got: Sequence[Array]) -> float:
    w, g = (np.concatenate([np.asarray(a, np.float64).ravel() for a in s]) for s in (want, got))
    return float(10 * np.log10((w**2).sum() / max(((w - g) ** 2).sum(), 1e-30)))


def sample(net: Model, built: Built, i: int) -> dict[str, Array]:
    return {v.name: net[1][v.name][i : i + 1] for v in built.graph.inputs}


@pytest.mark.parametrize("build", MODELS, ids=lambda f: f.__name__)
def test_model(build: Callable[[], Model]) -> None:
    proto, samples = net = build()
    reference = Session(proto.SerializeToString(), optimization="disabled")
    calibration = {name: data[:SEEN] for name, data in samples.items()}
    for row in ROWS:
        graph = quantize_model(proto, calibration=calibration).graph
        returned = len(graph.outputs)
        show_integers(graph)
        built = build_graph(graph, get_target(row))
        _check_floats(built, MODELS[build])
        vm = executor(built)
        want, got = [], []
        for i in range(SEEN, SAMPLES):
            feeds = sample(net, built, i)
            expected = run(built.graph, feeds)
            found = vm.run([feeds[v.name] for v in built.graph.inputs], threads=1 + i % 2)
            for (name, v), array in zip(built.graph.outputs, found, strict=True):
                if v.type.is_quantized:
                    np.testing.assert_array_equal(array, expected[name], err_msg=name)
                else:
                    np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-4)
            given = {name: samples[name][i : i + 1] for name in samples}
            want += list(reference.run(given).values())
            got += found[:returned]
        assert decibels(want, got) > 20


def _check_floats(built: Built, allowed: frozenset[str]) -> None:
    """Require that products, and all but the allowed operators, run in integers."""
    moves = {"dequantize", "quantize", "reshape", "transpose", "slice", "identity"}
    for node in built.graph.nodes:
        touches = any(v.type.is_quantized for v in (*node.operands, *node.outputs))
        assert touches or node.op.name in allowed | moves, f"{node.name} is {node.op.name}"


@pytest.mark.parametrize("build", [llama, products], ids=lambda f: f.__name__)
def test_float32(build: Callable[[], Model]) -> None:
    proto, _ = net = build()
    built = build_graph(quantize_model(proto, precision="fp32").graph, get_target("host"))
    vm, reference = executor(built), Session(proto.SerializeToString(), optimization="disabled")
    feeds = sample(net, built, 0)
    want = reference.run(feeds).values()
    got = vm.run([feeds[v.name] for v in built.graph.inputs], threads=1)
    for w, g in zip(want, got, strict=True):
        assert np.abs(w - g).max() <= 1e-4 * np.abs(w).max()
