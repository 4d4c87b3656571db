# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors of int4 and uint4 that are no constants: inputs, results, casts, movement, products.

Every model runs as ONNX's reference says, and in the interpreter before and after all passes, and
as compiled: integers and floats bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from block_models import integers, tensor
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.driver import quantize_model
from qcompiler.errors import CalibrationError, DataError, ShapeError, UsageError
from qcompiler.interpreter import run
from qcompiler.onnx_export import to_onnx
from qcompiler.onnx_import import load_onnx
from qcompiler.onnx_import_tensors import elem_type_of, from_onnx_array, to_onnx_array
from qcompiler.ops import EvalContext, Stage, op_def
from qcompiler.ort import Session
from qcompiler.types import DType, PerAxis, PerTensor, QuantParams, TensorType

Array = np.ndarray[Any, np.dtype[Any]]
FOUR = pytest.mark.parametrize("four", [DType.INT4, DType.UINT4], ids=["int4", "uint4"])
CONTAINERS = {DType.INT4: np.int8, DType.UINT4: np.uint8}
node = helper.make_node


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[DType, Sequence[int | str]]],
    outputs: Mapping[str, DType],
    constants: Mapping[str, Any] | None = None,
    opset: int = 25,
) -> onnx.ModelProto:
    tensors = [
        a if isinstance(a, onnx.TensorProto) else numpy_helper.from_array(np.asarray(a), n)
        for n, a in (constants or {}).items()
    ]
    graph = helper.make_graph(
        nodes,
        "four",
        [helper.make_tensor_value_info(n, elem_type_of(d), s) for n, (d, s) in inputs.items()],
        [helper.make_tensor_value_info(n, elem_type_of(d), None) for n, d in outputs.items()],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def by_reference(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """What ONNX's reference computes, 4-bit integers in bytes."""
    kinds = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
    dtypes = {elem_type_of(d): d for d in DType}
    given = {n: to_onnx_array(a, dtypes[kinds[n]]) for n, a in feeds.items()}
    found = onnx.reference.ReferenceEvaluator(model).run(None, given)
    return [from_onnx_array(np.asarray(a))[0] for a in found]


def check(
    model: onnx.ModelProto,
    feeds: Mapping[str, Array],
    *,
    reference: bool = True,
    targets: Sequence[str] = ("host",),
    imported: bool = True,
) -> list[str]:
    """Run a model everywhere, and return the operators that it is compiled to.

    Args:
        model: The model.
        feeds: Its inputs.
        reference: Whether ONNX's reference runs it.
        targets: Compiled for these besides the interpreter.
        imported: Whether the graph before all passes computes the same bits: integer products
            sum exactly what floats round.
    """
    want = qcompiler.compile(model, target="reference", precision="fp32")(feeds)
    names = [o.name for o in model.graph.output]
    if reference:
        for name, expected in zip(names, by_reference(model, feeds), strict=True):
            assert want[name].dtype == expected.dtype
            np.testing.assert_array_equal(want[name], expected, name)
    if imported:
        graph = load_onnx(model)
        before = run(graph, {v.name: feeds[v.name] for v in graph.inputs})
        for name in names:
            np.testing.assert_array_equal(want[name], before[name], name)
    for target in targets:
        compiled = qcompiler.compile(model, target=target, precision="fp32")
        got = compiled(feeds)
        for name in names:
            spec = compiled.outputs[name]
            assert got[name].dtype == spec.dtype.numpy
            np.testing.assert_array_equal(got[name], want[name], f"{name} on {target}")
    return [n.op.name for n in quantize_model(model, precision="fp32").graph.nodes]


def codes(rng: np.random.Generator, four: DType, *shape: int) -> Array:
    return integers(rng, four, shape).astype(CONTAINERS[four])


@FOUR
@pytest.mark.parametrize(
    "other",
    ["float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool"],
)
def test_casts(rng: np.random.Generator, four: DType, other: str) -> None:
    """Values out of range too: higher bits are dropped, also of the integral parts of floats."""
    dtype = DType(other)
    if dtype.is_float:
        x = (rng.standard_normal((5, 13)) * 30).astype(dtype.numpy)
    elif dtype is DType.BOOL:
        x = rng.integers(0, 2, (5, 13)).astype(bool)
    else:
        x = rng.integers(dtype.min, dtype.max, (5, 13), dtype.numpy, endpoint=True)
    like = tensor("like", four, np.zeros(1, np.int64))
    nodes = [node("Cast", ["x"], ["y"], to=elem_type_of(four)),
             node("CastLike", ["x", "like"], ["z"])]  # fmt: skip
    inputs = {"x": (dtype, x.shape)}
    check(model_of(nodes, inputs, {"y": four, "z": four}, {"like": like}), {"x": x})
    back = model_of([node("Cast", ["x"], ["y"], to=elem_type_of(dtype))],
                    {"x": (four, (5, 13))}, {"y": dtype})  # fmt: skip
    operators = check(back, {"x": codes(rng, four, 5, 13)})
    assert len(operators) == (1 if np.dtype(other) == CONTAINERS[four] else 2)


@FOUR
def test_what_onnx_does_not_define(four: DType) -> None:
    """NaN and infinities become 0, whatever a processor makes of them."""
    x = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 2.0**31, -(2.0**31), 2.0**28 + 32], "f4")
    compiled = qcompiler.compile(
        model_of([node("Cast", ["x"], ["y"], to=elem_type_of(four))],
                 {"x": (DType.FLOAT32, [8])}, {"y": four}),
        precision="fp32",
    )  # fmt: skip
    executor = compiled._ready()  # a call refuses NaN
    np.testing.assert_array_equal(executor.run([x])[0], np.zeros(8, CONTAINERS[four]))


def int64s(**values: Sequence[int]) -> dict[str, Array]:
    return {n: np.asarray(v, np.int64) for n, v in values.items()}


MOVES: dict[str, tuple[list[onnx.NodeProto], dict[str, Array]]] = {
    "identity": ([node("Identity", ["x"], ["y"])], {}),
    "transpose": ([node("Transpose", ["x"], ["y"], perm=[1, 0, 2])], {}),
    "reshape": ([node("Reshape", ["x", "s"], ["y"])], int64s(s=[4, 6])),
    "slice": (
        [node("Slice", ["x", "b", "e", "a", "t"], ["y"])],
        int64s(b=[-1], e=[-100], a=[1], t=[-1]),
    ),
    "concat": ([node("Concat", ["x", "c", "x"], ["y"], axis=1)], {}),
    "gather": ([node("Gather", ["x", "i"], ["y"], axis=1)], int64s(i=[2, 0, 0])),
    "pad": ([node("Pad", ["x", "p"], ["y"])], int64s(p=[0, 1, 0, 1, 0, 2])),
    "expand": (
        [node("Unsqueeze", ["x", "a"], ["u"]), node("Expand", ["u", "s"], ["y"])],
        int64s(a=[0], s=[3, 2, 3, 4]),
    ),
    "tile": ([node("Tile", ["x", "r"], ["y"])], int64s(r=[1, 2, 1])),
    "flatten": ([node("Flatten", ["x"], ["y"])], {}),
    "where": (
        [node("Cast", ["x"], ["b"], to=TensorProto.BOOL), node("Where", ["b", "c", "x"], ["y"])],
        {},
    ),
}


@FOUR
@pytest.mark.parametrize("move", MOVES)
def test_movement(rng: np.random.Generator, four: DType, move: str) -> None:
    nodes, constants = MOVES[move]
    given: dict[str, Any] = dict(constants)
    if any("c" in n.input for n in nodes):
        given["c"] = tensor("c", four, integers(rng, four, (2, 3, 4)))
    model = model_of(nodes, {"x": (four, [2, 3, 4])}, {"y": four}, given)
    check(model, {"x": codes(rng, four, 2, 3, 4)})


def grid_of(
    rng: np.random.Generator, four: DType, kind: str, shape: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants s and z, and the attributes that go with them."""
    attributes: dict[str, Any] = {
        "one": {},
        "columns": {"axis": 1},
        "blocks": {"axis": 1, "block_size": 2},
        "uneven blocks": {"axis": 1, "block_size": 4},
    }[kind]
    size = attributes.get("block_size", 0)
    scales = {
        "one": (),
        "columns": shape[1:2],
    }.get(kind, (shape[0], -(-shape[1] // (size or 1)), *shape[2:]))
    scale = rng.uniform(0.3, 1, scales).astype(np.float32)
    zero = rng.integers(four.min, four.max + 1, scales)
    return {"s": scale, "z": tensor("z", four, np.asarray(zero))}, attributes


KINDS = pytest.mark.parametrize("kind", ["one", "columns", "blocks", "uneven blocks"])


@FOUR
@KINDS
def test_quantize_saturates(rng: np.random.Generator, four: DType, kind: str) -> None:
    shape = (4, 6, 5)
    x = (rng.standard_normal(shape) * 6).astype(np.float32)
    x.flat[:4] = [1e8, -1e8, 1e4, -1e4]
    constants, attributes = grid_of(rng, four, kind, shape)
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["y"], **attributes),
             node("DequantizeLinear", ["y", "s", "z"], ["f"], **attributes)]  # fmt: skip
    model = model_of(
        nodes, {"x": (DType.FLOAT32, shape)}, {"y": four, "f": DType.FLOAT32}, constants
    )
    operators = check(model, {"x": x})
    assert sorted(operators) == ["dequantize", "quantize", "requantize"]


@FOUR
def test_the_dtype_may_be_an_attribute(rng: np.random.Generator, four: DType) -> None:
    x = (rng.standard_normal((3, 7)) * 20).astype(np.float32)
    nodes = [node("QuantizeLinear", ["x", "s"], ["y"], output_dtype=elem_type_of(four))]
    model = model_of(nodes, {"x": (DType.FLOAT32, [3, 7])}, {"y": four}, {"s": np.float32(1.5)})
    check(model, {"x": x})


@FOUR
@KINDS
@pytest.mark.parametrize("moved", ["", "first", "in between"])
def test_dequantize(rng: np.random.Generator, four: DType, kind: str, moved: str) -> None:
    shape = (4, 6, 5)
    constants, attributes = grid_of(rng, four, kind, shape)
    nodes = [node("DequantizeLinear", ["m" if moved else "x", "s", "z"], ["y"], **attributes)]
    if moved == "first":
        nodes.insert(0, node("Transpose", ["x"], ["m"], perm=[2, 1, 0]))
    elif moved:
        nodes = [node("Concat", ["x", "x"], ["c"], axis=0), *nodes]
        nodes.insert(1, node("Gather", ["c", "i"], ["m"], axis=0))
        constants["i"] = np.array([7, 0, 1, 5])
    held = shape[::-1] if moved == "first" else shape
    model = model_of(nodes, {"x": (four, held)}, {"y": DType.FLOAT32}, constants)
    check(model, {"x": codes(rng, four, *held)})


@FOUR
def test_scales_known_at_run_time(rng: np.random.Generator, four: DType) -> None:
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]),
             node("DequantizeLinear", ["q", "s", "z"], ["y"])]  # fmt: skip
    inputs = {"x": (DType.FLOAT32, [3, 8]), "s": (DType.FLOAT32, []), "z": (four, [])}
    x = (rng.standard_normal((3, 8)) * 9).astype(np.float32)
    zero = np.asarray(3, CONTAINERS[four])
    model = model_of(nodes, inputs, {"y": DType.FLOAT32, "q": four})
    check(model, {"x": x, "s": np.asarray(0.7, np.float32), "z": zero})


@FOUR
@pytest.mark.parametrize("scales", ["columns", "blocks"])
def test_rows_of_a_table(rng: np.random.Generator, four: DType, scales: str) -> None:
    """Embeddings of 4 bits: the table is a constant, the rows of it are not."""
    shape, attributes = {"columns": ((8,), {"axis": 2}),
                         "blocks": ((3, 2, 2), {"axis": 2, "block_size": 4})}[scales]  # fmt: skip
    constants = {
        "t": tensor("t", four, integers(rng, four, (20, 8))),
        "s": rng.uniform(0.1, 1, shape).astype(np.float32),
        "z": tensor("z", four, integers(rng, four, shape)),
    }
    nodes = [node("Gather", ["t", "i"], ["g"]),
             node("DequantizeLinear", ["g", "s", "z"], ["y"], **attributes)]  # fmt: skip
    model = model_of(nodes, {"i": (DType.INT64, [3, 2])}, {"y": DType.FLOAT32}, constants)
    check(model, {"i": rng.integers(0, 20, (3, 2))})


TARGETS = ("host", "x86-avx2")


@FOUR
@pytest.mark.parametrize("weights", [DType.INT8, DType.UINT4])
@pytest.mark.parametrize("result", [None, DType.INT4, DType.UINT8])
@pytest.mark.parametrize("op", ["MatMul", "Conv"])
def test_products_are_integers(
    rng: np.random.Generator, four: DType, weights: DType, result: DType | None, op: str
) -> None:
    shape, kernel = ((5, 64), (64, 24)) if op == "MatMul" else ((2, 6, 7, 7), (9, 6, 3, 3))
    columns = 1 if op == "MatMul" else 0
    constants: dict[str, Any] = {
        "s": np.float32(0.1),
        "z": tensor("z", four, np.asarray(3)),
        "w": tensor("w", weights, integers(rng, weights, kernel)),
        "ws": rng.uniform(0.01, 0.1, kernel[columns]).astype(np.float32),
        "wz": tensor("wz", weights, np.full(kernel[columns], weights is DType.UINT4) * 8),
    }
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["a"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["b"], axis=columns),
        node(op, ["a", "b"], ["y" if result is None else "m"]),
    ]
    if result is not None:
        constants |= {"r": np.float32(0.4), "o": tensor("o", result, np.asarray(2))}
        nodes.append(node("QuantizeLinear", ["m", "r", "o"], ["y"]))
    model = model_of(nodes, {"x": (four, shape)}, {"y": result or DType.FLOAT32}, constants)
    feeds = {"x": codes(rng, four, *shape)}
    operators = check(model, feeds, reference=False, targets=TARGETS, imported=False)
    product = {"MatMul": "qmatmul", "Conv": "qconv"}[op]
    assert [o for o in operators if o != "requantize"] == [product]
    (want,), got = by_reference(model, feeds), qcompiler.compile(model)(feeds)["y"]
    if result is None:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    else:
        assert np.abs(got.astype(int) - want).max() <= 1  # the sum of floats is rounded
        assert (got != want).mean() < 0.01


@FOUR
def test_a_chain_between_two_interfaces_of_4_bits(rng: np.random.Generator, four: DType) -> None:
    """Nothing but integers: convolutions, a sum, a pool, and 4 bits at both ends."""
    constants: dict[str, Any] = {
        "s": np.float32(0.13), "t": np.float32(0.6), "z": tensor("z", four, np.asarray(4)),
        "w": tensor("w", DType.INT4, integers(rng, DType.INT4, (6, 6, 3, 3))),
        "ws": rng.uniform(0.01, 0.1, 6).astype(np.float32),
    }  # fmt: skip
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["a"]),
        node("DequantizeLinear", ["w", "ws"], ["b"], axis=0),
        node("Conv", ["a", "b"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("QuantizeLinear", ["r", "t", "z"], ["q"]),
        node("DequantizeLinear", ["q", "t", "z"], ["d"]),
        node("Add", ["d", "a"], ["e"]),
        node("QuantizeLinear", ["e", "t", "z"], ["f"]),
        node("DequantizeLinear", ["f", "t", "z"], ["g"]),
        node("MaxPool", ["g"], ["h"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Transpose", ["h"], ["k"], perm=[0, 2, 3, 1]),
        node("QuantizeLinear", ["k", "t", "z"], ["y"]),
    ]
    model = model_of(nodes, {"x": (four, [2, 6, 8, 8])}, {"y": four}, constants)
    feeds = {"x": codes(rng, four, 2, 6, 8, 8)}
    operators = check(model, feeds, reference=False, targets=TARGETS, imported=False)
    assert not {"quantize", "dequantize", "conv", "add"} & set(operators)
    (want,), got = by_reference(model, feeds), qcompiler.compile(model)(feeds)["y"]
    assert np.abs(got.astype(int) - want).max() <= 1
    assert (got != want).mean() < 0.01


def product_of(
    moves: list[onnx.NodeProto],
    inputs: dict[str, tuple[DType, Sequence[int | str]]],
    outputs: dict[str, DType],
    **constants: Any,
) -> onnx.ModelProto:
    """What moves integers to t, their dequantization, and a product of it to y."""
    four = inputs["x"][0]
    rng = np.random.default_rng(11)
    constants |= {
        "s": np.float32(0.2), "z": tensor("z", four, np.asarray(1)),
        "w": tensor("w", DType.INT4, integers(rng, DType.INT4, (16, 8))),
        "ws": rng.uniform(0.1, 1, 8).astype(np.float32),
    }  # fmt: skip
    nodes = [*moves, node("DequantizeLinear", ["t", "s", "z"], ["f"]),
             node("DequantizeLinear", ["w", "ws"], ["wf"], axis=1),
             node("MatMul", ["f", "wf"], ["y"])]  # fmt: skip
    return model_of(nodes, inputs, outputs, constants)


MOVED = {
    "gather": ([node("Gather", ["x", "i"], ["t"], axis=0)], {"i": np.array([2, 1, 1])}),
    "concat": ([node("Concat", ["x", "c", "x"], ["t"], axis=0)], {}),
    "several": (
        [node("Unsqueeze", ["x", "a"], ["u"]), node("Expand", ["u", "e"], ["v"]),
         node("Transpose", ["v"], ["t"], perm=[1, 0, 2])],
        int64s(a=[0], e=[3, 4, 16]),
    ),
}  # fmt: skip
STORED = pytest.mark.parametrize("stored", [DType.INT4, DType.UINT4, DType.INT8])


@STORED
@pytest.mark.parametrize("move", MOVED)
def test_products_of_moved_inputs_are_integers(
    rng: np.random.Generator, stored: DType, move: str
) -> None:
    moves, constants = MOVED[move]
    given: dict[str, Any] = dict(constants)
    if move == "concat":
        given["c"] = tensor("c", stored, integers(rng, stored, (1, 16)))
    model = product_of(moves, {"x": (stored, [4, 16])}, {"y": DType.FLOAT32}, **given)
    feeds = {"x": integers(rng, stored, (4, 16)).astype(stored.numpy)}
    operators = check(model, feeds, reference=False, imported=False)
    assert "qmatmul" in operators
    assert not {"matmul", "dequantize", "mul"} & set(operators)
    (want,) = by_reference(model, feeds)
    np.testing.assert_allclose(qcompiler.compile(model)(feeds)["y"], want, rtol=1e-5, atol=1e-3)


@STORED
def test_a_cache_that_grows(rng: np.random.Generator, stored: DType) -> None:
    """What the model quantizes joins what it was given, and both go into an integer product."""
    moves = [node("QuantizeLinear", ["n", "s", "z"], ["q"]),
             node("Concat", ["x", "q"], ["t"], axis=0)]  # fmt: skip
    inputs = {"x": (stored, [5, 16]), "n": (DType.FLOAT32, [1, 16])}
    model = product_of(moves, inputs, {"y": DType.FLOAT32, "t": stored})
    feeds = {"x": integers(rng, stored, (5, 16)).astype(stored.numpy),
             "n": rng.standard_normal((1, 16)).astype(np.float32)}  # fmt: skip
    operators = check(model, feeds, reference=False, imported=False)
    assert "qmatmul" in operators
    assert "matmul" not in operators
    want, cache = by_reference(model, feeds)
    got = qcompiler.compile(model)(feeds)
    np.testing.assert_array_equal(got["t"], cache)
    np.testing.assert_allclose(got["y"], want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("stored", [DType.INT4, DType.UINT4, DType.INT8, DType.UINT16])
def test_casts_of_what_the_model_quantizes(rng: np.random.Generator, stored: DType) -> None:
    """They read the integers, not what these stand for."""
    x = (rng.standard_normal((5, 40)) * stored.max * 0.2).astype(np.float32)
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]),
             node("Cast", ["q"], ["i"], to=TensorProto.INT32),
             node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)]  # fmt: skip
    constants = {"s": np.float32(0.37), "z": tensor("z", stored, np.asarray(3))}
    inputs, outputs = {"x": (DType.FLOAT32, x.shape)}, {"i": DType.INT32, "y": DType.FLOAT32}
    check(model_of(nodes, inputs, outputs, constants), {"x": x})


@STORED
def test_integers_that_something_reads_as_they_are(rng: np.random.Generator, stored: DType) -> None:
    """Then their scale is that of one reader only: the product stays in floats."""
    moves = [node("Gather", ["x", "i"], ["t"], axis=0),
             node("Cast", ["x"], ["r"], to=TensorProto.INT32)]  # fmt: skip
    model = product_of(
        moves, {"x": (stored, [4, 16])}, {"y": DType.FLOAT32, "r": DType.INT32}, i=np.array([3, 0])
    )
    feeds = {"x": integers(rng, stored, (4, 16)).astype(stored.numpy)}
    operators = check(model, feeds, reference=False, imported=False)
    assert "matmul" in operators
    want, plain = by_reference(model, feeds)
    got = qcompiler.compile(model)(feeds)
    np.testing.assert_array_equal(got["r"], plain)
    np.testing.assert_allclose(got["y"], want, rtol=1e-5, atol=1e-3)


# ------------------------------------------------------------------------------- the interface


def square(four: DType = DType.INT4) -> onnx.ModelProto:
    """4 bits in and out, and a batch."""
    constants = {"s": np.float32(0.5), "z": tensor("z", four, np.asarray(1))}
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["a"]),
        node("Mul", ["a", "a"], ["m"]),
        node("QuantizeLinear", ["m", "s", "z"], ["y"]),
    ]
    return model_of(nodes, {"x": (four, ["N", 6])}, {"y": four}, constants)


@FOUR
def test_arrays_hold_a_value_in_a_byte(
    rng: np.random.Generator, four: DType, tmp_path: Path
) -> None:
    compiled = qcompiler.compile(square(four))
    compiled.save(tmp_path / "a.qcm")
    loaded = qcompiler.load(tmp_path / "a.qcm")
    assert loaded.inputs["x"].dtype is four is loaded.outputs["y"].dtype
    assert str(loaded.inputs["x"]).startswith(four.value)
    x = codes(rng, four, 7, 6)
    got = loaded({"x": x})["y"]
    assert got.dtype == CONTAINERS[four]
    assert got.shape == (7, 6)
    ours = to_onnx_array(x, four)
    assert ours.dtype.name == four.value  # as onnx holds them, in numpy's dtypes of another package
    for given in (x.astype(np.int64), ours):
        np.testing.assert_array_equal(loaded({"x": given})["y"], got)
    random = loaded.random_inputs()["x"]
    assert random.min() >= four.min
    assert random.max() <= four.max
    assert np.unique(random).size > 2


@FOUR
@pytest.mark.parametrize("target", ["host", "reference"])
@pytest.mark.parametrize("rows", [1, 3])
def test_values_outside_are_refused(four: DType, target: str, rows: int) -> None:
    compiled = qcompiler.compile(square(four), target=target)
    bad = np.zeros((rows, 6), CONTAINERS[four])
    bad[-1, 4] = four.max + 1
    text = rf"'x' is {four.value} and holds {four.max + 1} at index \[{rows - 1}, 4\]: expected"
    with pytest.raises(DataError, match=text):
        compiled({"x": bad})
    with pytest.raises(DataError, match="one value to a byte"):
        compiled({"x": bad.astype(np.int32)})
    if four is DType.INT4:
        with pytest.raises(DataError, match="holds -9 at"):
            compiled({"x": np.full((rows, 6), -9, np.int8)})
    with pytest.raises(DataError, match="cannot hold"):
        compiled({"x": np.full((rows, 6), 1000)})
    with pytest.raises(DataError, match="has dtype float32"):
        compiled({"x": bad.astype(np.float32)})


def floats(four: DType) -> onnx.ModelProto:
    """A float network that reads 4-bit integers, and returns some."""
    rng = np.random.default_rng(3)
    constants = {
        "w": rng.standard_normal((64, 48)).astype(np.float32),
        "v": rng.standard_normal((48, 32)).astype(np.float32),
    }
    nodes = [
        node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
        node("MatMul", ["a", "w"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("MatMul", ["c", "v"], ["y"]),
        node("Cast", ["a"], ["q"], to=elem_type_of(four)),
    ]
    outputs = {"y": DType.FLOAT32, "q": four}
    return model_of(nodes, {"x": (four, ["N", 64])}, outputs, constants)


@FOUR
def test_calibration_and_evaluation(rng: np.random.Generator, four: DType) -> None:
    x = codes(rng, four, 32, 64)
    model = floats(four)
    result = quantize_model(model, calibration={"x": x})
    assert [n.op.name for n in result.graph.nodes].count("qmatmul") == 2
    same = quantize_model(model, calibration={"x": to_onnx_array(x, four)})
    assert same.plan.digest() == result.plan.digest()
    assert same.sources["calibration"] == result.sources["calibration"]
    compiled = qcompiler.compile(
        model, calibration={"x": x}, evaluate=qcompiler.Evaluation({"x": x}, "cosine")
    )
    assert compiled.report is not None
    assert compiled.report["metric"]["float"] == 1
    np.testing.assert_array_equal(compiled({"x": x})["q"], x)
    x[2, 1] = four.max + 1
    with pytest.raises(CalibrationError, match=rf"'x' is {four.value} and holds {four.max + 1} at"):
        quantize_model(model, calibration={"x": x})


@FOUR
def test_frozen_inputs(rng: np.random.Generator, four: DType) -> None:
    x = codes(rng, four, 1, 6)
    want = qcompiler.compile(square(four))({"x": x})["y"]
    for value in (x, to_onnx_array(x, four), x.astype(np.int64)):
        frozen = qcompiler.compile(square(four), freeze={"x": value})
        np.testing.assert_array_equal(frozen({})["y"], want)
    with pytest.raises(UsageError, match=f"input 'x' is {four.value}; .* does not fit"):
        qcompiler.compile(square(four), freeze={"x": np.full((1, 6), four.max + 1)})


@FOUR
def test_ranges_of_sizes(rng: np.random.Generator, four: DType) -> None:
    shapes = {"x": ((1, 8), 64)}
    compiled = qcompiler.compile(floats(four), input_shapes=shapes, precision="fp32")
    fixed = qcompiler.compile(floats(four), precision="fp32")
    for rows in (1, 3, 8):
        x = codes(rng, four, rows, 64)
        got, want = compiled({"x": x}), fixed({"x": x})
        np.testing.assert_array_equal(got["q"], x)
        np.testing.assert_allclose(got["y"], want["y"], rtol=1e-4, atol=1e-3)


@FOUR
def test_exports_keep_the_dtypes(rng: np.random.Generator, four: DType) -> None:
    """A model that was quantized already is written as it came, and ONNX Runtime runs it."""
    model = square(four)
    graph = quantize_model(model, stage=Stage.QDQ).graph
    written = to_onnx(graph)
    assert [n.op_type for n in written.graph.node] == [n.op_type for n in model.graph.node]
    kinds = {v.type.tensor_type.elem_type for v in (*written.graph.input, *written.graph.output)}
    assert kinds == {elem_type_of(four)}
    x = codes(rng, four, 1, 6)
    want = qcompiler.compile(model)({"x": x})["y"]
    np.testing.assert_array_equal(qcompiler.compile(written)({"x": x})["y"], want)
    found = Session(written.SerializeToString()).run({"x": x})["y"]
    assert found.dtype == want.dtype
    np.testing.assert_array_equal(found, want)


def test_requantize_between_other_scales_is_refused() -> None:
    def typed(scale: Any, storage: DType) -> TensorType:
        scales = np.asarray(scale, np.float32)
        g = PerAxis(0) if scales.ndim else PerTensor()
        q = QuantParams(scales, np.zeros(scales.shape), storage, -8, 7, g)
        return TensorType((2, 3), storage, q)

    row, x = op_def("requantize"), np.array([[-8, 0, 7], [1, 2, 3]], np.int8)
    four, eight = typed([1, 2], DType.INT4), typed([1, 2], DType.INT8)
    (same,) = row.evaluate([x], {}, EvalContext((four,), (eight,)))
    np.testing.assert_array_equal(same, x)
    for target in (typed([1, 3], DType.INT8), typed(1, DType.INT8)):
        with pytest.raises(ShapeError, match=r"has per_axis\(0\) scales, the result"):
            row.evaluate([x], {}, EvalContext((four,), (target,)))
