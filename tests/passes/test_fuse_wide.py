# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights beyond int8 become a longer integer product with the same sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.interpreter import run
from qcompiler.ir import Graph, Value
from qcompiler.ops import Stage
from qcompiler.passes.fuse import Fuse
from qcompiler.passes.fuse_wide import split_wide_weights
from qcompiler.passmanager import PassContext
from qcompiler.types import Array, DType, PerAxis, PerTensor, QuantParams, TensorType


def grid(zero: int | Array, storage: DType, axis: int | None = None) -> QuantParams:
    z = np.asarray(zero, np.int32)
    granularity = PerTensor() if axis is None else PerAxis(axis)
    return QuantParams(
        np.full(z.shape, 0.25, np.float32), z, storage, storage.min, storage.max, granularity
    )


def product(op: str, shape: tuple[int, ...], w: Array, q: QuantParams, **attrs: Any) -> Graph:
    """quantized input x -> op with dequantized w -> float y."""
    graph = Graph(stage=Stage.QDQ)
    x = graph.add_input("x", TensorType(shape, DType.UINT8, grid(100, DType.UINT8)))
    held = graph.constant(w, "w", q)
    operands: list[Value] = [graph.add("dequantize", [v]).output for v in (x, held)]
    y = graph.add(op, operands, attrs)
    graph.set_outputs([("y", y.output)])
    graph.verify()
    return graph


def same(graph: Graph, feeds: Array) -> Graph:
    """The rewritten and the fused graph compute the same; return the fused one."""
    want = run(graph, {"x": feeds})["y"]
    rewritten = graph.clone()
    assert split_wide_weights(rewritten)
    rewritten.sort()
    rewritten.verify()
    np.testing.assert_array_equal(run(rewritten, {"x": feeds})["y"], want)
    fused = graph.clone()
    Fuse().run(fused, PassContext())
    fused.verify()
    np.testing.assert_array_equal(run(fused, {"x": feeds})["y"], want)
    return fused


CONVS = [(1, (5, 4, 3, 3)), (4, (4, 1, 3, 3)), (2, (6, 2, 1, 1))]


@pytest.mark.parametrize("zero", [0, 7, 90, 255])
@pytest.mark.parametrize(("group", "shape"), CONVS)
def test_convolutions(
    rng: np.random.Generator, zero: int, group: int, shape: tuple[int, ...]
) -> None:
    w = rng.integers(0, 256, shape).astype(np.uint8)
    w.reshape(-1)[:2] = 0, 255
    window = {"strides": (1, 1), "pads": (1, 0, 2, 1), "dilations": (1, 1)}
    graph = product("conv", (2, 4, 6, 6), w, grid(zero, DType.UINT8), group=group, **window)
    fused = same(graph, rng.integers(0, 256, (2, 4, 6, 6)).astype(np.uint8))
    assert [n.op.name for n in fused.nodes][-1] == "qconv"


def test_only_what_exceeds_is_repeated(rng: np.random.Generator) -> None:
    """One row with one weight beyond int8 costs one row more."""
    w = rng.integers(60, 180, (16, 5)).astype(np.uint8)
    w[11, 3] = 255
    graph = product("matmul", (3, 16), w, grid(100, DType.UINT8))
    fused = same(graph, rng.integers(0, 256, (3, 16)).astype(np.uint8))
    node = next(n for n in fused.nodes if n.op.name == "qmatmul")
    assert node.input(1).shape == (17, 5)


@pytest.mark.parametrize("turned", [False, True])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), per_column=st.booleans(), signed=st.booleans())
def test_matrix_products(turned: bool, seed: int, per_column: bool, signed: bool) -> None:
    rng = np.random.default_rng(seed)
    storage = DType.INT8 if signed else DType.UINT8
    w = rng.integers(storage.min, storage.max + 1, (9, 6)).astype(storage.numpy)
    zero = rng.integers(storage.min, storage.max + 1, 6 if per_column else ())
    w.reshape(-1)[:2] = storage.min, storage.max
    zero.reshape(-1)[0] = storage.min
    q = grid(zero, storage, (0 if turned else 1) if per_column else None)
    graph = product(
        "matmul", (2, 4, 9), np.ascontiguousarray(w.T) if turned else w, q, transpose_b=turned
    )
    fused = same(graph, rng.integers(0, 256, (2, 4, 9)).astype(np.uint8))
    assert "qmatmul" in [n.op.name for n in fused.nodes]


def test_weights_that_fit_stay(rng: np.random.Generator) -> None:
    w = rng.integers(0, 256, (9, 6)).astype(np.uint8)
    graph = product("matmul", (2, 9), w, grid(128, DType.UINT8))
    assert not split_wide_weights(graph)
