# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.onnx_import import load_onnx
from qcompiler.ops import Stage
from qcompiler.passes.widen_integers import WidenIntegers
from qcompiler.passmanager import ModifiedInstrument, PassContext, PassManager
from qcompiler.targets.base import is_view
from qcompiler.types import DType, PerAxis, PerTensor, QuantParams, TensorType

PASS = WidenIntegers()
FOUR = (DType.INT4, DType.UINT4)


def loaded(text: str, **constants: Any) -> Graph:
    """Import `inputs => outputs { nodes }` of ONNX text, with constants of int4."""
    head = '<ir_version: 10, opset_import: ["" : 21]> net '
    model = onnx.parser.parse_model(head + text)
    for name, data in constants.items():
        held = np.asarray(data)
        if held.dtype.kind == "f":
            tensor = onnx.numpy_helper.from_array(held.astype(np.float32), name)
        else:
            flat = held.reshape(-1).tolist()
            tensor = onnx.helper.make_tensor(name, onnx.TensorProto.INT4, held.shape, flat)
        model.graph.initializer.append(tensor)
    return load_onnx(model)


def widened(graph: Graph) -> Graph:
    after = PassManager([PASS], [ModifiedInstrument()]).run(graph, PassContext())
    assert PASS.run(after, PassContext()) is False
    return after


def computing(graph: Graph) -> list[Any]:
    return [n for n in graph.nodes if n.op.name not in ("cast", "requantize")]


def test_four_bits_live_at_the_interface_only(rng: np.random.Generator, golden: Any) -> None:
    graph = loaded(
        """(int4[N,4] x, float[N,4] r) => (int4[4,N] y, float[N,4] f, int8[N,8] e, uint4[N,4] u) {
            t = Transpose(x)
            y = Identity(t)
            c = Concat<axis: int = 1>(x, k)
            e = Cast<to: int = 3>(c)
            f = Cast<to: int = 1>(x)
            s = Add(f, r)
            u = Cast<to: int = 21>(s)
        }""",
        k=np.arange(-8, -4)[None],
    )
    after = widened(graph)
    for node in computing(after):
        assert not {v.dtype for v in (*node.operands, *node.outputs)} & set(FOUR)
    wanted = [DType.INT4, DType.FLOAT32, DType.INT8, DType.UINT4]
    assert [v.dtype for v in after.output_values] == wanted
    assert [n for n, _ in after.outputs] == ["y", "f", "e", "u"]
    assert [v.batch_axis for v in after.output_values] == [None, 0, 0, 0]
    assert {n.name for n in computing(after)} == {"Transpose_0", "Concat_0", "Add_0"}
    assert len([n for n in after.nodes if is_view(n)]) == 1
    x = rng.integers(-8, 8, (1, 4)).astype(np.int8)
    feeds = {"x": x, "r": (rng.standard_normal((1, 4)) * 20).astype(np.float32)}
    want, got = run(graph, feeds), run(after, feeds)
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)
    assert str(after) == golden


def test_quantized_values_keep_their_grid_and_range(rng: np.random.Generator) -> None:
    graph = loaded(
        """(int4[3,4] x) => (int4[4,3] y, float[4,3] z) {
            a = DequantizeLinear(x, s, p)
            b = Relu(a)
            t = Transpose(b)
            y = QuantizeLinear(t, s, p)
            z = DequantizeLinear(y, s, p)
        }""",
        s=np.float32(0.3), p=np.int8(2),
    )  # fmt: skip
    assert graph.stage is Stage.QDQ
    assert WidenIntegers(only_float=True).run(graph, PassContext()) is False
    after = widened(graph)
    narrow = [v for n in computing(after) for v in n.outputs if v.dtype is DType.INT8]
    assert [(v.qparams.qmin, v.qparams.qmax) for v in narrow if v.qparams] == [(-8, 7)]
    ends = [n for n in after.nodes if n.op.name == "requantize"]
    assert len(ends) == 2
    assert all(map(is_view, ends))
    x = rng.integers(-8, 8, (3, 4)).astype(np.int8)
    want, got = run(graph, {"x": x}), run(after, {"x": x})
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)


def test_packed_weights_stay(rng: np.random.Generator) -> None:
    graph = loaded(
        "(float[3,4] x) => (float[3,5] y) { f = DequantizeLinear(w, s)  y = MatMul(x, f) }",
        w=rng.integers(-8, 8, (4, 5)), s=np.float32(0.3),
    )  # fmt: skip
    assert PASS.run(graph, PassContext()) is False
    assert [v.dtype for v in graph.constants()] == [DType.INT4]


def typed(dtype: DType, *, scale: Any = 1, lo: int = -8, hi: int = 7) -> TensorType:
    scales = np.asarray(scale, np.float32)
    g = PerAxis(0) if scales.ndim else PerTensor()
    return TensorType((2, 3), dtype, QuantParams(scales, np.zeros(scales.shape), dtype, lo, hi, g))


I4, I8, U4, U8 = DType.INT4, DType.INT8, DType.UINT4, DType.UINT8
VIEWS = [
    (typed(I4), typed(I8), True),
    (typed(I8), typed(I4), True),
    (typed(I4, scale=[1, 2]), typed(I8, scale=[1, 2]), True),
    (typed(I8, lo=-128, hi=127), typed(I4), False),  # it clamps
    (typed(I4), typed(I8, hi=6), False),
    (typed(I4), typed(I8, scale=2), False),
    (typed(U4, lo=0), typed(I8, lo=0), False),
    (TensorType((2, 3), I4), TensorType((2, 3), I8), True),
    (TensorType((2, 3), I8), TensorType((2, 3), I4), False),  # it drops bits
    (TensorType((2, 3), U4), TensorType((2, 3), U8), True),
    (TensorType((2, 3), U4), TensorType((2, 3), I8), False),
    (TensorType((2, 3), I8), TensorType((2, 3), I8), True),
    (TensorType((2, 3), DType.FLOAT32), TensorType((2, 3), DType.BFLOAT16), False),
]


@pytest.mark.parametrize(("x", "y", "expected"), VIEWS, ids=str)
def test_what_moves_nothing(x: TensorType, y: TensorType, expected: bool) -> None:
    graph = Graph("g", Stage.INTEGER)
    v = graph.add_input("x", x)
    if x.is_quantized:
        node = graph.add("requantize", [v], types=[y])
    else:
        node = graph.add("cast", [v], {"to": y.dtype.value})
    assert is_view(node) is expected
