# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products of activations with scales in blocks along what is summed are integer kernels."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from product_checks import FLOATS, ROWS, check, in_turn
from product_models import Net
from row_block_cases import CASES, STORAGES, WEIGHTS, blocks

from qcompiler.driver import quantize_model
from qcompiler.ir import Graph
from qcompiler.plan import Precision
from qcompiler.types import DType

NAMES = list(CASES)


def integers_of(y: str, net: Net) -> Graph:
    return quantize_model(net.model(y)).graph


@pytest.mark.parametrize("name", in_turn(NAMES, 3))
def test_every_form_is_integers(name: str) -> None:
    net = Net()
    assert not FLOATS & {n.op.name for n in integers_of(CASES[name](net), net).nodes}


@pytest.mark.parametrize("name", in_turn(NAMES, 4))
def test_forms_agree_with_onnx_runtime(name: str) -> None:
    check(CASES[name], [], rounded=len(name) % 2 == 0)


@pytest.mark.parametrize("name", NAMES[1 :: len(NAMES) // 20])
def test_kernels_give_the_same_bits(name: str) -> None:
    check(CASES[name], ["host"], seed=1)


@pytest.mark.parametrize(
    "name",
    [
        "blocks of 8 by int8 in blocks of 8, one",
        "blocks of 16 by uint4 in blocks of 8, any",
        "blocks of 3 by uint16 in blocks of 4, any",
        "uint8 by computed ones in blocks of 12, one",
        "blocks of one row by one column",
        "shared, and read as floats, far",
    ],
)
def test_every_row_gives_the_same_bits(name: str) -> None:
    check(CASES[name], ROWS)


@settings(max_examples=12, deadline=None)
@given(
    left=st.sampled_from(STORAGES),
    right=st.sampled_from(WEIGHTS),
    size=st.integers(2, 20),
    by=st.sampled_from(["tensor", "columns"]) | st.integers(2, 20),
    depth=st.integers(3, 40),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 20)),
    zero=st.sampled_from(["one", "any", "far"]),
    row=st.sampled_from(ROWS),
    seed=st.integers(0, 10**6),
)
def test_any_blocks_on_any_row(
    left: DType,
    right: DType,
    size: int,
    by: str | int,
    depth: int,
    shape: tuple[int, int],
    zero: str,
    row: str,
    seed: int,
) -> None:
    given: dict[str, Any] = {"axis": 0, "size": by} if isinstance(by, int) else {
        "axis": 1 if by == "columns" else None}  # fmt: skip

    def make(net: Net) -> str:
        a = blocks(net, shape[0], depth, size=size, storage=left, zero=zero)
        return net.node(
            "MatMul", a, net.weights(depth, shape[1], storage=right, zero=zero, **given)
        )

    check(make, [row], seed)


@pytest.mark.parametrize("kind", [(DType.UINT8, 1), (DType.INT16, 2)])
def test_a_constant_matrix_is_multiplied_by_blocks(kind: tuple[DType, int]) -> None:
    """One kernel for all blocks, and for each byte: nothing is computed by block."""
    storage, count = kind
    net = Net()
    a = blocks(net, 4, 64, size=16, storage=storage, zero="one")
    y = net.node("Relu", net.node("Gemm", a, net.weights(64, 8, axis=1), net.floats(8)))
    graph = integers_of(y, net)
    products = [n for n in graph.nodes if n.op.name == "dynamic_matmul"]
    assert len(products) == count
    assert all(n.input(2).is_constant and n.input(2).shape == (4, 4) for n in products)
    assert [n.attr("act_min") for n in products] == [None] * (count - 1) + [0.0]
    assert not {n.op.name for n in graph.nodes} & {"relu", "add", "mul", "gather"} or count == 2


def test_products_share_their_codes() -> None:
    net = Net()
    a = blocks(net, 4, 32, size=8)
    parts = [net.node("MatMul", a, net.weights(32, 8, axis=1)) for _ in range(2)]
    graph = integers_of(net.node("Add", *parts), net)
    assert [n.op.name for n in graph.nodes].count("quantize") == 1
    first, second = [n for n in graph.nodes if n.op.name == "dynamic_matmul"]
    assert first.input(0) is second.input(0)


def test_a_residual_joins_the_product() -> None:
    net = Net()
    y = net.node("MatMul", blocks(net, 4, 16, size=8, zero="one"), net.weights(16, 16, axis=1))
    graph = integers_of(net.node("Relu", net.node("Add", y, net.input(4, 16))), net)
    assert "add" not in [n.op.name for n in graph.nodes]
    (product,) = [n for n in graph.nodes if n.op.name == "dynamic_matmul"]
    assert product.optional(4) is not None
    assert product.attr("act_min") == 0.0


def test_the_plan_says_eight_bits() -> None:
    """Scales that are known are not found at run time."""
    net = Net()
    model = net.model(net.node("MatMul", blocks(net, 4, 16, size=8), net.weights(16, 8, axis=1)))
    result = quantize_model(model)
    assert result.log == []
    (name,) = [n.name for n in result.graph.nodes if n.op.name == "dynamic_matmul"]
    assert result.plan.nodes[name].precision is Precision.W8A8
