# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The interpreter: binding inputs, freeing values, observing, checking results."""

from __future__ import annotations

import time
import weakref

import numpy as np
import pytest

from qcompiler import numerics
from qcompiler.errors import DataError, VerificationError
from qcompiler.interpreter import evaluate, run
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.types import DType, PerAxis, QuantParams, TensorType

X = TensorType((2, 3), DType.FLOAT32)
U8 = QuantParams(np.float32(0.1), 10, DType.UINT8, 0, 255)


def chain() -> Graph:
    """x -> exp -> neg -> add(neg, x)."""
    g = Graph("chain")
    x = g.add_input("x", X)
    a = g.add("exp", [x], name="a").output
    b = g.add("neg", [a], name="b").output
    c = g.add("add", [b, x], name="c").output
    g.set_outputs([("y", c)])
    return g


def test_runs_nodes_in_order(rng):
    x = rng.normal(size=(2, 3)).astype(np.float32)
    assert list(run(chain(), {"x": x})) == ["y"]
    np.testing.assert_array_equal(run(chain(), {"x": x})["y"], -np.exp(x) + x)


def test_outputs_may_be_inputs_constants_and_repeated(rng):
    g = Graph("pass")
    x = g.add_input("x", X)
    c = g.constant(np.arange(3.0, dtype=np.float32))
    y = g.add("add", [x, c]).output
    g.set_outputs([("same", x), ("const", c), ("y", y), ("again", y)])
    array = rng.normal(size=(2, 3)).astype(np.float32)
    got = run(g, {"x": array})
    np.testing.assert_array_equal(got["same"], array)
    np.testing.assert_array_equal(got["const"], [0, 1, 2])
    np.testing.assert_array_equal(got["y"], got["again"])


def test_observer_sees_inputs_and_every_result_in_order(rng):
    seen = []
    x = rng.normal(size=(2, 3)).astype(np.float32)
    run(chain(), {"x": x}, observe=lambda v, a: seen.append((v.name, a.copy())))
    assert [name for name, _ in seen] == ["x", "a.out", "b.out", "c.out"]
    np.testing.assert_array_equal(seen[2][1], -np.exp(x))


def test_keep_returns_inner_values(rng):
    g = chain()
    x = rng.normal(size=(2, 3)).astype(np.float32)
    got = run(g, {"x": x}, keep=[g.node("a").output])
    assert set(got) == {"a.out", "y"}
    np.testing.assert_array_equal(got["a.out"], np.exp(x))


def test_dead_values_are_freed_while_running():
    g = Graph("long")
    v = g.add_input("x", TensorType((64, 1024), DType.FLOAT32))
    for _ in range(40):
        v = g.add("neg", [v]).output
    g.set_outputs([("y", v)])
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def observe(value, array):
        nonlocal most
        alive.append(weakref.ref(array))
        most = max(most, sum(r() is not None for r in alive))

    run(g, {"x": np.ones((64, 1024), np.float32)}, observe=observe)
    assert most <= 4


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"inputs missing x \(the graph takes x\)"),
        ({"x": np.zeros((2, 3), np.float32), "z": np.zeros(1)}, "inputs unknown z"),
        ({"x": np.zeros((2, 4), np.float32)}, r"'x' is float32\[2, 4\], expected float32\[2, 3\]"),
        ({"x": np.zeros((2, 3))}, r"'x' is float64\[2, 3\], expected float32\[2, 3\]"),
    ],
)
def test_inputs_must_fit(inputs, message):
    with pytest.raises(DataError, match=message):
        run(chain(), inputs)


def test_a_result_that_contradicts_its_type_is_refused(rng):
    g = chain()
    x = np.zeros((2, 3), np.float32)
    value = g.node("b").output
    g.set_type(value, TensorType((3, 2), DType.FLOAT32))
    with pytest.raises(VerificationError, match=r"gave float32\[2, 3\] for 'b\.out', declared"):
        run(g, {"x": x})


def test_errors_carry_the_node_name(rng):
    g = Graph("g")
    x = g.add_input("x", X)
    i = g.add_input("i", TensorType((1,), DType.INT64))
    g.set_outputs([("y", g.add("gather", [x, i], name="pick").output)])
    with pytest.raises(DataError, match="outside the 2 entries") as caught:
        run(g, {"x": np.zeros((2, 3), np.float32), "i": np.int64([7])})
    assert caught.value.node == "pick"


def test_evaluate_runs_one_node(rng):
    g = chain()
    (y,) = evaluate(g.node("b"), [np.ones((2, 3), np.float32)])
    np.testing.assert_array_equal(y, -np.ones((2, 3)))


def quantized(data: np.ndarray, axis: int) -> tuple[np.ndarray, QuantParams]:
    q = numerics.choose_weight_qparams(data, axis=axis)
    return numerics.quantize(data, q), q


def test_float_qdq_and_integer_stages_of_one_layer_agree(rng):
    x = rng.normal(size=(1, 3, 6, 6)).astype(np.float32)
    w = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    attrs = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1)}
    xq = numerics.choose_qparams(x.min(), x.max())
    wi, wq = quantized(w, 0)
    assert wq.granularity == PerAxis(0)

    qdq = Graph("qdq", Stage.QDQ)
    v = qdq.add_input("x", TensorType(x.shape, DType.FLOAT32))
    v = qdq.add("quantize", [v], types=[TensorType(x.shape, DType.UINT8, xq)]).output
    v = qdq.add("dequantize", [v]).output
    weight = qdq.add("dequantize", [qdq.constant(wi, "w", wq)]).output
    conv = qdq.add("conv", [v, weight], attrs).output
    qdq.set_outputs([("y", conv)])
    qdq.verify()
    real = run(qdq, {"x": x})["y"]
    yq = numerics.choose_qparams(real.min(), real.max())

    integer = Graph("integer", Stage.INTEGER)
    v = integer.add_input("x", TensorType(x.shape, DType.FLOAT32))
    v = integer.add("quantize", [v], types=[TensorType(x.shape, DType.UINT8, xq)]).output
    result = TensorType(real.shape, DType.UINT8, yq)
    v = integer.add("qconv", [v, integer.constant(wi, "w", wq)], attrs, types=[result]).output
    v = integer.add("dequantize", [v]).output
    integer.set_outputs([("y", v)])
    integer.verify()
    got = run(integer, {"x": x})["y"]
    assert np.abs(got - numerics.fake_quantize(real, yq)).max() <= yq.s * 1.0001


def test_a_mobile_network_block_runs_fast_enough(rng):
    # MobileNetV2's largest block; the whole network is about 20 times this.
    g = Graph("block", Stage.INTEGER)
    q = QuantParams(np.float32(0.02), 128, DType.UINT8, 0, 255)
    x = g.add_input("x", TensorType((1, 16, 112, 112), DType.UINT8, q))

    def conv(v, outs, kernel, group):
        shape = (outs, v.shape[1] // group, kernel, kernel)
        w = rng.integers(-127, 128, shape).astype(np.int8)
        wq = QuantParams(
            np.full(outs, 0.01, np.float32), np.zeros(outs, int), DType.INT8, -127, 127, PerAxis(0)
        )
        attrs = {
            "strides": (1, 1),
            "pads": (kernel // 2,) * 4,
            "dilations": (1, 1),
            "group": group,
        }
        t = TensorType((1, outs, *v.shape[2:]), DType.UINT8, q)
        return g.add("qconv", [v, g.constant(w, "w", wq)], attrs, types=[t]).output

    v = conv(conv(conv(x, 96, 1, 1), 96, 3, 96), 24, 1, 1)
    g.set_outputs([("y", v)])
    data = {"x": rng.integers(0, 256, x.shape).astype(np.uint8)}
    run(g, data)
    start = time.perf_counter()
    run(g, data)
    assert time.perf_counter() - start < 2.0
