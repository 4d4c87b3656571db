# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Imported weights in blocks, and 16-bit codes with any zero point, become integer kernels.

Their results agree with ONNX Runtime's float products, and every target gives the same bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from block_models import Case, integers, runtime, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.driver import quantize_model
from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.types import DType

Array = np.ndarray[Any, np.dtype[Any]]
ROWS = [isa.name for isa in ISA_TABLE.values() if runnable(isa)]
WEIGHTS = [DType.INT4, DType.UINT4, DType.INT8, DType.UINT8, DType.INT16, DType.UINT16]
ACTIVATIONS = [DType.INT8, DType.UINT8, DType.INT16, DType.UINT16]


def compiled(model: onnx.ModelProto, x: Array, target: str) -> Array:
    return np.asarray(qcompiler.compile(model, target=target)({"x": x})["y"])


def check(case: Case, targets: list[str]) -> None:
    """Integers everywhere, the same bits on every target, and ONNX Runtime's numbers."""
    model, x = case.made()
    names = [n.op.name for n in quantize_model(model).graph.nodes]
    assert not {"conv", "matmul"} & set(names)
    products = names.count("qconv") + names.count("qmatmul")
    # Groups of so few columns make one convolution.
    assert products == (case.stored.bits // 8) * max(1, case.kind.bits // 8)
    want = compiled(model, x, "reference")
    for target in targets:
        np.testing.assert_array_equal(compiled(model, x, target), want, target)
    theirs = runtime(model, x)
    # A float product rounds its sums; rounded to codes, a sum near a tie may be a code off.
    least = 0.0 if case.result is None else 1.001 * case.step
    atol = max(3e-6 * float(np.abs(theirs).max()), least)
    np.testing.assert_allclose(want, theirs, rtol=0, atol=atol)


CASES = [
    Case(op, stored, kind, size, 24, zero, seed=number)
    for number, (op, stored, kind, size, zero) in enumerate(
        (op, ACTIVATIONS[(i + j) % 4], kind, (3, 4, 8, 12, 24)[(i + 2 * j) % 5], zero)
        for i, kind in enumerate(WEIGHTS)
        for j, zero in enumerate(("middle", "low", "any"))
        for op in ("Conv", "MatMul")
    )
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.kind.value}-{c.size}-{c.zero}")
def test_every_kind_of_weights_and_zero_points(case: Case) -> None:
    check(case, ["host"] if case.seed % 3 == 0 else [])


@pytest.mark.parametrize(
    ("groups", "kind", "stored", "size"),
    [
        (2, DType.INT4, DType.UINT8, 8),
        (3, DType.UINT8, DType.INT8, 12),
        (6, DType.INT8, DType.UINT8, 3),
        (2, DType.INT16, DType.INT8, 4),
        (2, DType.UINT4, DType.INT16, 5),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_groups_of_convolutions_have_blocks_of_their_own(
    groups: int, kind: DType, stored: DType, size: int, bias: bool
) -> None:
    case = Case("Conv", stored, kind, size, 12, kernel=3, bias=bias, groups=groups)
    check(case, ["host"])
    check(replace(case, result=DType.UINT8, seed=1), ["host"])


@settings(max_examples=10, deadline=None)
@given(
    case=st.builds(
        Case,
        op=st.sampled_from(["Conv", "MatMul"]),
        stored=st.sampled_from(ACTIVATIONS),
        kind=st.sampled_from(WEIGHTS),
        size=st.sampled_from([0, 1, 3, 4, 8, 12, 16, 32]),
        extent=st.sampled_from([3, 24, 32, 50]),
        zero=st.sampled_from(["middle", "low", "any"]),
        kernel=st.sampled_from([1, 3]),
        result=st.sampled_from([None, *ACTIVATIONS]),
        bias=st.booleans(),
        seed=st.integers(0, 10**6),
    ),
    row=st.sampled_from(ROWS),
)
def test_any_blocks_on_any_row(case: Case, row: str) -> None:
    check(case, [row])


@pytest.mark.parametrize(
    "case",
    [
        Case("Conv", DType.UINT8, DType.UINT8, 12, 50, kernel=3, result=DType.UINT8, bias=True),
        Case("MatMul", DType.INT16, DType.INT16, 12, 50, bias=True),
    ],
    ids=lambda c: c.op,
)
def test_every_row_gives_the_same_bits(case: Case) -> None:
    check(case, ROWS)


@pytest.mark.parametrize("storage", [DType.INT16, DType.UINT16])
def test_integers_in_and_out(rng: np.random.Generator, storage: DType) -> None:
    """A model whose input and result are 16-bit codes, with no float at either end."""
    w = integers(rng, DType.INT8, (40, 9))
    tensors = [
        tensor("w", DType.INT8, w), numpy_helper.from_array(np.float32(0.01), "s"),
        tensor("z", DType.INT8, np.asarray(0)), numpy_helper.from_array(np.float32(1e-4), "t"),
        tensor("p", storage, np.asarray(storage.min + 20011)),
        numpy_helper.from_array(np.float32(2e-3), "ys"),
        tensor("yz", storage, np.asarray(storage.max - 30000)),
    ]  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "t", "p"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"]),
        helper.make_node("MatMul", ["a", "f"], ["m"]),
        helper.make_node("QuantizeLinear", ["m", "ys", "yz"], ["y"]),
    ]
    kind = TensorProto.DataType.Value(storage.value.upper())
    graph = helper.make_graph(
        nodes,
        "codes",
        [helper.make_tensor_value_info("x", kind, [3, 40])],
        [helper.make_tensor_value_info("y", kind, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = integers(rng, storage, (3, 40)).astype(storage.numpy)
    assert [n.op.name for n in quantize_model(model).graph.nodes].count("qmatmul") == 2
    found = compiled(model, x, "host")
    assert found.dtype == storage.numpy
    np.testing.assert_array_equal(found, compiled(model, x, "reference"))
    assert np.abs(found.astype(np.int32) - runtime(model, x).astype(np.int32)).max() <= 1


def test_one_dimension(rng: np.random.Generator) -> None:
    """Weights of a convolution along one axis keep their blocks when it gets another axis."""
    tensors = [
        tensor("w", DType.UINT4, integers(rng, DType.UINT4, (6, 24, 5))),
        numpy_helper.from_array(rng.uniform(0.01, 0.1, (6, 2, 5)).astype(np.float32), "s"),
        tensor("z", DType.UINT4, rng.integers(0, 16, (6, 2, 5))),
        numpy_helper.from_array(np.float32(0.02), "t"),
        tensor("p", DType.UINT8, np.asarray(99)),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "t", "p"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "t", "p"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], axis=1, block_size=12),
        helper.make_node("Conv", ["a", "f"], ["y"], pads=[2, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "line",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 24, 30])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = rng.standard_normal((2, 24, 30)).astype(np.float32)
    assert "qconv" in [n.op.name for n in quantize_model(model).graph.nodes]
    found = compiled(model, x, "host")
    np.testing.assert_array_equal(found, compiled(model, x, "reference"))
    theirs = runtime(model, x)
    np.testing.assert_allclose(found, theirs, atol=3e-6 * np.abs(theirs).max())
