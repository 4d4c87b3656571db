# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.fold_batch_norm import FoldBatchNorm

BN = "BatchNormalization(c, s, b, m, v)"


def statistics(uniform: Any, n: int) -> dict[str, Any]:
    return {"s": uniform(n), "b": uniform(n), "m": uniform(n), "v": np.abs(uniform(n)) + 0.1}


@pytest.mark.parametrize(
    ("first", "weights", "channels"),
    [
        ("Conv(x, w)", {"w": (6, 4, 3, 3)}, 6),
        ("Conv<group: int = 4>(x, w, k)", {"w": (8, 1, 3, 3), "k": (8,)}, 8),
        ("ConvTranspose(x, w, k)", {"w": (4, 6, 2, 2), "k": (6,)}, 6),
        ("ConvTranspose<group: int = 2>(x, w)", {"w": (4, 3, 2, 2)}, 6),
    ],
)
def test_into_convolutions(
    load_text: Any, rewrite: Any, uniform: Any, first: str, weights: dict[str, Any], channels: int
) -> None:
    text = f"(float[2,4,5,5] x) => (y) {{ c = {first} y = {BN} }}"
    constants = {k: uniform(*shape) for k, shape in weights.items()}
    graph = rewrite(FoldBatchNorm(), load_text(text, **constants, **statistics(uniform, channels)))
    assert len(graph) == 1
    node = graph.nodes[0]
    assert (node.output.name, node.sources[1]) == ("y", "BatchNormalization_0")


def test_into_a_matrix_product(load_text: Any, rewrite: Any, uniform: Any) -> None:
    text = f"(float[2,4] x) => (y) {{ c = Gemm<transB: int = 1>(x, w) y = {BN} }}"
    graph = load_text(text, w=uniform(3, 4), **statistics(uniform, 3))
    assert [n.op.name for n in rewrite(FoldBatchNorm(), graph).nodes] == ["matmul"]


@pytest.mark.parametrize("first", ["Relu(x)", "Conv(x, x)"], ids=["relu", "conv"])
def test_what_cannot_take_it_becomes_mul_and_add(
    load_text: Any, rewrite: Any, uniform: Any, first: str, golden: Any
) -> None:
    text = f"(float[4,4,5,5] x) => (y) {{ c = {first} y = {BN} }}"
    graph = rewrite(FoldBatchNorm(), load_text(text, **statistics(uniform, 4)))
    assert [n.op.name for n in graph.nodes][1:] == ["mul", "add"]
    assert graph.nodes[2].name == "BatchNormalization_0"
    assert str(graph) == golden


def test_a_result_that_others_read_stays(load_text: Any, rewrite: Any, uniform: Any) -> None:
    text = f"(float[2,4,5,5] x) => (y, z) {{ c = Conv(x, w) y = {BN} z = Relu(c) }}"
    graph = load_text(text, w=uniform(4, 4, 1, 1), **statistics(uniform, 4))
    names = [n.op.name for n in rewrite(FoldBatchNorm(), graph).nodes]
    assert sorted(names) == ["add", "conv", "mul", "relu"]


@pytest.mark.filterwarnings("ignore:invalid value encountered in sqrt")
def test_computed_or_broken_statistics_stay(load_text: Any, rewrite: Any, uniform: Any) -> None:
    text = f"(float[2,4,5,5] c, float[4] m) => (y) {{ y = {BN} }}"
    known = statistics(uniform, 4)
    del known["m"]
    rewrite(FoldBatchNorm(), load_text(text, **known), modified=False)
    text = f"(float[2,4,5,5] c) => (y) {{ y = {BN} }}"
    broken = {**statistics(uniform, 4), "v": np.float32([1, -1, 1, 1])}
    rewrite(FoldBatchNorm(), load_text(text, **broken), modified=False)
