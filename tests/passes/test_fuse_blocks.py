# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights in any blocks become blocks that integer kernels take, with the same sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.interpreter import run
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import expanded
from qcompiler.numerics_grouped import conv_parts, grouped_result, matmul_parts
from qcompiler.ops import Stage
from qcompiler.passes.conv_3d_to_2d import Conv3dTo2d
from qcompiler.passes.fuse import Fuse
from qcompiler.passes.fuse_blocks import fit_blocks
from qcompiler.passes.fuse_parts import MOST_PARTS
from qcompiler.passmanager import PassContext
from qcompiler.types import Array, DType, PerAxis, PerGroup, QuantParams, TensorType
from qcompiler.windows import Geometry

EIGHT = QuantParams(np.float32(0.03), np.int32(100), DType.UINT8, 0, 255)
WINDOW: dict[str, Any] = {"strides": (2, 1), "pads": (1, 0, 2, 1), "dilations": (1, 2)}
KINDS = [DType.INT4, DType.UINT4, DType.INT8, DType.UINT8]


def blocks(
    rng: np.random.Generator, kind: DType, shape: tuple[int, ...], axis: int, size: int, zero: str
) -> tuple[Array, QuantParams]:
    """Codes with both ends among them, and zero points of blocks along an axis."""
    by = (*shape[:axis], -(-shape[axis] // size), *shape[axis + 1 :])
    points = {
        "any": rng.integers(kind.min, kind.max + 1, by),
        "middle": np.full(by, (kind.min + kind.max + 1) // 2),
        "low": np.full(by, kind.min),
    }[zero]
    codes = rng.integers(kind.min, kind.max + 1, shape)
    codes.reshape(-1)[:2] = kind.min, kind.max
    scale = rng.uniform(0.001, 0.01, by).astype(np.float32)
    grid = QuantParams(scale, points, kind, kind.min, kind.max, PerGroup(axis, size))
    return codes.astype(kind.numpy), grid


def product(
    op: str, shape: tuple[int, ...], codes: Array, q: QuantParams, bias: Array, **attrs: Any
) -> Graph:
    graph = Graph(stage=Stage.QDQ)
    x = graph.add_input("x", TensorType(shape, DType.UINT8, EIGHT))
    held = graph.constant(codes, "w", q)
    operands: list[Value] = [graph.add("dequantize", [v]).output for v in (x, held)]
    y = graph.add(op, [*operands, graph.constant(bias, "b")], attrs)
    graph.set_outputs([("y", y.output)])
    graph.verify()
    return graph


def fused(graph: Graph) -> tuple[Graph, Node]:
    """The graph of integers, and its one product."""
    made = graph.clone()
    Fuse().run(made, PassContext())
    made.verify()
    assert not {"conv", "matmul"} & {n.op.name for n in made.nodes}
    (node,) = [n for n in made.nodes if n.op.name in ("qconv", "qmatmul")]
    return made, node


def whole(a: Array, axis: int, size: int, value: int = 0) -> Array:
    """The array with its last block filled up."""
    width = [(0, -a.shape[i] % size if i == axis else 0) for i in range(a.ndim)]
    return np.pad(a, width, constant_values=value)


def same(got: Array, want: Array, held: QuantParams) -> None:
    """Equal, but for a bias that one scale per channel rounds to an integer of its accumulator."""
    if isinstance(held.granularity, PerGroup):
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=EIGHT.s * float(held.scale.max()))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 3, 4, 8, 12, 16, 40]),
    extent=st.sampled_from([3, 16, 24, 37]),
    zero=st.sampled_from(["any", "middle", "low"]),
    kernel=st.sampled_from([(1, 1), (3, 2)]),
    layout=st.sampled_from(["NCHW", "NHWC"]),
)
def test_convolutions(
    seed: int,
    kind: DType,
    size: int,
    extent: int,
    zero: str,
    kernel: tuple[int, int],
    layout: str,
) -> None:
    rng = np.random.default_rng(seed)
    codes, q = blocks(rng, kind, (5, extent, *kernel), 1, size, zero)
    shape = (2, extent, 7, 6) if layout == "NCHW" else (2, 7, 6, extent)
    bias = rng.standard_normal(5).astype(np.float32)
    graph = product("conv", shape, codes, q, bias, layout=layout, **WINDOW)
    x = rng.integers(0, 256, shape).astype(np.uint8)
    x.reshape(-1)[:2] = 0, 255
    made, node = fused(graph)
    held = node.input(1).qparams
    assert held is not None
    assert node.input(1).dtype is DType.INT8
    assert held.is_symmetric
    found = held.granularity
    assert not isinstance(found, PerGroup) or found.group_size % 8 == 0
    around = codes.astype(np.int32) - expanded(q, codes.shape)[1]
    four = bool(around.min() >= -8 and around.max() <= 7)
    assert not isinstance(found, PerGroup) or (held.qmax == 7) == four
    first = x if layout == "NCHW" else np.moveaxis(x, -1, 1)
    ((top, left, bottom, right), strides) = WINDOW["pads"], WINDOW["strides"]
    geometry = Geometry(
        (7, 6), kernel, strides, ((top, bottom), (left, right)), WINDOW["dilations"]
    )
    parts = conv_parts(
        whole(first, 1, size, EIGHT.z), whole(around, 1, size), EIGHT.z, q.scale, geometry
    )
    want = grouped_result(parts, EIGHT.s, None, bias=bias)
    got = run(made, {"x": x})["y"]
    same(np.moveaxis(got, 1, -1) if layout == "NCHW" else got, want, held)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 3, 4, 8, 12, 16, 40]),
    extent=st.sampled_from([3, 16, 24, 37]),
    zero=st.sampled_from(["any", "middle", "low"]),
    turned=st.booleans(),
)
def test_matrix_products(
    seed: int, kind: DType, size: int, extent: int, zero: str, turned: bool
) -> None:
    rng = np.random.default_rng(seed)
    axis = 1 if turned else 0
    codes, q = blocks(rng, kind, (5, extent) if turned else (extent, 5), axis, size, zero)
    bias = rng.standard_normal(5).astype(np.float32)
    graph = product("matmul", (2, 3, extent), codes, q, bias, transpose_b=turned)
    x = rng.integers(0, 256, (2, 3, extent)).astype(np.uint8)
    made, node = fused(graph)
    held = node.input(1).qparams
    assert held is not None
    if isinstance(held.granularity, PerGroup):
        assert held.qmax == (7 if kind.bits == 4 else 127)
    around = codes.astype(np.int32) - expanded(q, codes.shape)[1]
    scale = q.scale.T if turned else q.scale
    parts = matmul_parts(
        whole(x, 2, size), whole(around.T if turned else around, 0, size), EIGHT.z, scale
    )
    want = grouped_result(parts, EIGHT.s, None, bias=bias)
    same(run(made, {"x": x})["y"], want, held)


def test_what_kernels_take_stays(rng: np.random.Generator) -> None:
    bias = np.zeros(5, np.float32)
    codes, q = blocks(rng, DType.INT8, (5, 16, 3, 3), 1, 8, "middle")
    graph = product("conv", (2, 16, 7, 6), codes, q, bias, **WINDOW)
    assert not fit_blocks(graph)
    codes, q = blocks(rng, DType.UINT4, (16, 5), 0, 8, "any")
    graph = product("matmul", (3, 16), codes, q, bias)
    assert not fit_blocks(graph)


def test_blocks_that_come_to_one_scale_per_channel_take_that_form(
    rng: np.random.Generator,
) -> None:
    codes, q = blocks(rng, DType.INT4, (5, 16, 3, 3), 1, 4, "middle")
    factors = np.where(rng.random(q.scale.shape) < 0.5, 1, 16).astype(np.float32)
    bias = np.zeros(5, np.float32)
    graph = product("conv", (2, 16, 7, 6), codes, replace(q, scale=factors), bias, **WINDOW)
    made, node = fused(graph)
    assert [n.op.name for n in made.nodes] == ["qconv"]
    assert node.input(1).qparams.granularity == PerAxis(0)


def test_only_the_constant_changes_where_weights_fit(rng: np.random.Generator) -> None:
    codes, q = blocks(rng, DType.UINT4, (5, 16, 1, 1), 1, 8, "any")
    graph = product("conv", (2, 16, 7, 6), codes, q, np.zeros(5, np.float32), **WINDOW)
    made, node = fused(graph)
    assert [n.op.name for n in made.nodes] == ["qconv"]
    assert node.input(1).shape == codes.shape


def test_only_what_exceeds_is_read_again(rng: np.random.Generator) -> None:
    """One weight beyond int8 fills every block up by eight channels, and no more."""
    codes = rng.integers(60, 180, (5, 32, 1, 1)).astype(np.uint8)
    codes[3, 21] = 255
    q = QuantParams(
        np.ones((5, 2, 1, 1)), np.full((5, 2, 1, 1), 100), DType.UINT8, 0, 255, PerGroup(1, 16)
    )
    graph = product("conv", (2, 32, 7, 6), codes, q, np.zeros(5, np.float32), **WINDOW)
    _, node = fused(graph)
    assert node.input(1).shape == (5, 48, 1, 1)


def test_products_of_one_tensor_read_one_arrangement(rng: np.random.Generator) -> None:
    """Queries, keys and values with blocks of 12."""
    graph = Graph(stage=Stage.QDQ)
    x = graph.add_input("x", TensorType((4, 24), DType.UINT8, EIGHT))
    real = graph.add("dequantize", [x]).output
    for name in "qkv":
        codes, grid = blocks(rng, DType.INT8, (24, 5), 0, 12, "any")
        w = graph.add("dequantize", [graph.constant(codes, f"w{name}", grid)]).output
        graph.set_outputs([*graph.outputs, (name, graph.add("matmul", [real, w]).output)])
    Fuse().run(graph, PassContext())
    assert [n.op.name for n in graph.nodes] == ["gather", "qmatmul", "qmatmul", "qmatmul"]


@pytest.mark.parametrize(("group", "axis", "size"), [(1, 1, 5), (2, 1, 3), (1, 0, 3)])
def test_blocks_of_one_scale_that_end_early(
    rng: np.random.Generator, group: int, axis: int, size: int
) -> None:
    """The last of them may be shorter, also where they come to one scale per channel."""
    shape = (8, 16 // group, 3, 3)
    codes, q = blocks(rng, DType.INT8, shape, axis, size, "middle")
    q = replace(q, scale=np.full_like(q.scale, 0.01))
    graph = product("conv", (2, 16, 7, 6), codes, q, np.zeros(8, np.float32), group=group, **WINDOW)
    x = rng.integers(0, 256, (2, 16, 7, 6)).astype(np.uint8)
    want = run(graph, {"x": x})["y"]
    Fuse().run(graph, PassContext())
    assert "qconv" in [n.op.name for n in graph.nodes]
    np.testing.assert_allclose(run(graph, {"x": x})["y"], want, rtol=1e-5, atol=1e-3)


def test_what_has_no_scale_per_sum_stays_float(rng: np.random.Generator) -> None:
    """Blocks that do not lie along what is summed."""
    codes, q = blocks(rng, DType.INT8, (8, 16, 1, 1), 0, 4, "middle")
    graph = product("conv", (2, 16, 7, 6), codes, q, np.zeros(8, np.float32), group=1, **WINDOW)
    x = {"x": np.full((2, 16, 7, 6), 7, np.uint8)}
    want = run(graph, x)["y"]
    Fuse().run(graph, PassContext())
    assert "conv" in [n.op.name for n in graph.nodes]
    np.testing.assert_array_equal(run(graph, x)["y"], want)


def test_a_prime_number_of_groups(rng: np.random.Generator) -> None:
    """Two at a time, and the last one alone: no more convolutions than stand for one."""
    codes, q = blocks(rng, DType.INT8, (67, 2, 1, 1), 1, 1, "any")
    bias = rng.standard_normal(67).astype(np.float32)
    graph = product("conv", (2, 2 * 67, 7, 6), codes, q, bias, group=67, **WINDOW)
    x = {"x": rng.integers(0, 256, (2, 2 * 67, 7, 6)).astype(np.uint8)}
    want = run(graph, x)["y"]
    Fuse().run(graph, PassContext())
    products = [n for n in graph.nodes if n.op.name == "qconv"]
    assert len(products) == 34 <= MOST_PARTS
    assert products[-1].output.shape[1] == 1
    np.testing.assert_allclose(run(graph, x)["y"], want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("size", [8, 3])
def test_three_axes(rng: np.random.Generator, size: int) -> None:
    """Planes become channels, of whole blocks: the last of a plane is filled up."""
    codes, q = blocks(rng, DType.UINT8, (5, 16, 2, 3, 3), 1, size, "any")
    window = {"strides": (1,) * 3, "pads": (1,) * 6, "dilations": (1,) * 3}
    graph = product("conv", (2, 16, 4, 5, 6), codes, q, np.zeros(5, np.float32), **window)
    x = rng.integers(0, 256, (2, 16, 4, 5, 6)).astype(np.uint8)
    want = run(graph, {"x": x})["y"]
    Conv3dTo2d().run(graph, PassContext())
    graph.verify()
    Fuse().run(graph, PassContext())
    graph.verify()
    assert "qconv" in [n.op.name for n in graph.nodes]
    np.testing.assert_allclose(run(graph, {"x": x})["y"], want, atol=1e-5 * np.abs(want).max())


def test_a_bias_that_is_computed_is_added_as_floats(rng: np.random.Generator) -> None:
    codes, q = blocks(rng, DType.UINT8, (24, 5), 0, 3, "any")
    graph = product("matmul", (3, 24), codes, q, np.zeros(5, np.float32))
    node = next(n for n in graph.nodes if n.op.name == "matmul")
    bias = graph.add_input("bias", TensorType((5,), DType.FLOAT32))
    graph.set_input(node, 2, bias)
    feeds = {"x": rng.integers(0, 256, (3, 24)).astype(np.uint8)}
    feeds["bias"] = rng.standard_normal(5).astype(np.float32) * 100
    want = run(graph, feeds)["y"]
    Fuse().run(graph, PassContext())
    graph.verify()
    assert [n.op.name for n in graph.nodes] == ["gather", "qmatmul", "add"]
    np.testing.assert_allclose(run(graph, feeds)["y"], want, rtol=1e-5, atol=1e-4)


def test_a_bias_of_integers_is_added_as_floats(rng: np.random.Generator) -> None:
    """There is no one scale of the sums that it could be held at."""
    codes, q = blocks(rng, DType.UINT8, (24, 5), 0, 8, "any")
    graph = product("matmul", (3, 24), codes, q, np.zeros(5, np.float32))
    node = next(n for n in graph.nodes if n.op.name == "matmul")
    grid = QuantParams(np.float32(0.01), np.int32(0), DType.INT32, -(2**31), 2**31 - 1)
    held = graph.constant(np.arange(-2, 3).astype(np.int32) * 99, "c", grid)
    graph.set_input(node, 2, graph.add("dequantize", [held], before=node).output)
    x = rng.integers(0, 256, (3, 24)).astype(np.uint8)
    want = run(graph, {"x": x})["y"]
    made, _ = fused(graph)
    np.testing.assert_allclose(run(made, {"x": x})["y"], want, rtol=1e-5, atol=1e-4)
