# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Movement and resize against ONNX Runtime, and of the codes of quantized tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import close, infer, ort_node, ours, qp, u8

from qcompiler import numerics
from qcompiler.errors import DataError
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.types import DType, PerAxis, QuantParams, TensorType


def test_concat_and_split_equal_onnx_runtime(rng):
    x, y = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(2, 1, 4))
    y = y.astype(np.float32)
    close(ours("concat", [x, y], {"axis": 1}), ort_node("Concat", [x, y], {"axis": 1}))
    want = ort_node("Split", [x, np.int64([1, 3, 0])], {"axis": -1}, outputs=3)
    close(ours("split", [x], {"axis": -1, "sizes": (1, 3, 0)}), want)


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_slice_equals_onnx_runtime(data, seed):
    x = np.random.default_rng(seed).normal(size=(5, 4, 3)).astype(np.float32)
    axes = data.draw(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3, unique=True))
    n = len(axes)
    bound = st.one_of(st.integers(-8, 8), st.sampled_from([2**62, -(2**62)]))
    starts = tuple(data.draw(bound) for _ in range(n))
    ends = tuple(data.draw(bound) for _ in range(n))
    steps = tuple(data.draw(st.sampled_from([-3, -2, -1, 1, 2, 3])) for _ in range(n))
    want = ort_node("Slice", [x, *(np.int64(v) for v in (starts, ends, axes, steps))], {})
    attrs = {"starts": starts, "ends": ends, "axes": tuple(axes), "steps": steps}
    close(ours("slice", [x], attrs), want)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad_equals_onnx_runtime(mode, rng):
    x = rng.normal(size=(3, 4)).astype(np.float32)
    for pads in ((1, 2, 0, 3), (0, 0, 0, 0), (2, 0, 1, 1), (-1, 0, 0, -2)):
        if mode != "constant" and min(pads) < 0:
            continue
        value = np.float32(1.5) if mode == "constant" else None
        want = ort_node("Pad", [x, np.int64(pads), value], {"mode": mode})
        close(ours("pad", [x], {"pads": pads, "mode": mode, "value": 1.5}), want)


def test_shape_movements_equal_onnx_runtime(rng):
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    want = ort_node("Reshape", [x, np.int64([4, 6])], {})
    close(ours("reshape", [x], {"shape": (4, 6)}), want)
    want = ort_node("Transpose", [x], {"perm": (2, 0, 1)})
    close(ours("transpose", [x], {"perm": (2, 0, 1)}), want)
    y = x[:, :1]
    want = ort_node("Expand", [y, np.int64([5, 1, 3, 1])], {})
    close(ours("expand", [y], {"shape": (5, 1, 3, 1)}), want)
    want = ort_node("Tile", [x, np.int64([2, 1, 3])], {})
    close(ours("tile", [x], {"repeats": (2, 1, 3)}), want)


def test_gather_equals_onnx_runtime(rng):
    x = rng.normal(size=(4, 5, 3)).astype(np.float32)
    indices = np.int64([[0, -1], [2, 3]])
    for axis in (0, 1, -2):
        want = ort_node("Gather", [x, indices], {"axis": axis})
        close(ours("gather", [x, indices], {"axis": axis}), want)


def test_gather_refuses_indices_outside(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    with pytest.raises(DataError, match=r"indices 0\.\.4 are outside the 4 entries of axis 0"):
        ours("gather", [x, np.int64([0, 4])])


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_equals_onnx_runtime(mode, rng):
    x = rng.normal(size=(2, 12, 3, 5)).astype(np.float32)
    want = ort_node("DepthToSpace", [x], {"blocksize": 2, "mode": mode})
    close(ours("depth_to_space", [x], {"blocksize": 2, "mode": mode}), want)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    got = ours("depth_to_space", [last], {"blocksize": 2, "mode": mode, "layout": "NHWC"})[0]
    close([np.ascontiguousarray(got.transpose(0, 3, 1, 2))], want)


def test_space_to_depth_equals_onnx_runtime(rng):
    x = rng.normal(size=(2, 3, 4, 6)).astype(np.float32)
    want = ort_node("SpaceToDepth", [x], {"blocksize": 2})
    close(ours("space_to_depth", [x], {"blocksize": 2}), want)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    got = ours("space_to_depth", [last], {"blocksize": 2, "layout": "NHWC"})[0]
    close([np.ascontiguousarray(got.transpose(0, 3, 1, 2))], want)


COORDINATES = [
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
]


def resize_attrs(x: np.ndarray, mode: str, coordinate: str, scales, **extra: Any):
    shape = tuple(int(np.floor(n * s)) for n, s in zip(x.shape, scales, strict=True))
    given = {"mode": mode, "coordinate_mode": coordinate, "scales": scales, "shape": shape}
    return {**given, **extra}


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("nearest", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_resize_nearest_equals_onnx_runtime(coordinate, nearest, rng):
    x = rng.normal(size=(1, 2, 5, 6)).astype(np.float32)
    # Scales that are exact in binary: at ties the rounding of the coordinate would decide.
    for scales in ((1.0, 1.0, 2.0, 2.0), (1.0, 1.0, 0.5, 1.5), (1.0, 1.0, 3.0, 0.25)):
        attrs = resize_attrs(x, "nearest", coordinate, scales, nearest_mode=nearest)
        want = ort_node(
            "Resize",
            [x, None, np.float32(scales)],
            {
                "mode": "nearest",
                "coordinate_transformation_mode": coordinate,
                "nearest_mode": nearest,
            },
        )
        close(ours("resize", [x], attrs), want)


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("antialias", [0, 1])
def test_resize_interpolation_equals_onnx_runtime(coordinate, mode, antialias, rng):
    x = rng.normal(size=(1, 2, 7, 6)).astype(np.float32)
    for scales in ((1.0, 1.0, 2.0, 2.0), (1.0, 1.0, 0.5, 1.5), (1.0, 1.0, 2.6, 0.4)):
        attrs = resize_attrs(x, mode, coordinate, scales, antialias=bool(antialias))
        want = ort_node(
            "Resize",
            [x, None, np.float32(scales)],
            {
                "mode": mode,
                "coordinate_transformation_mode": coordinate,
                "antialias": antialias,
            },
        )
        close(ours("resize", [x], attrs), want, atol=1e-4)


def test_resize_by_sizes_and_exclude_outside_equal_onnx_runtime(rng):
    x = rng.normal(size=(1, 2, 7, 6)).astype(np.float32)
    shape = (1, 2, 10, 9)
    scales = tuple(o / n for o, n in zip(shape, x.shape, strict=True))
    for mode, exclude in (("linear", 0), ("cubic", 0), ("cubic", 1)):
        attrs = {
            "mode": mode,
            "scales": scales,
            "shape": shape,
            "exclude_outside": bool(exclude),
            "cubic_coeff_a": -0.5,
        }
        want = ort_node(
            "Resize",
            [x, None, None, np.int64(shape)],
            {"mode": mode, "exclude_outside": exclude, "cubic_coeff_a": -0.5},
        )
        close(ours("resize", [x], attrs), want, atol=1e-4)


def test_movements_move_codes_and_keep_the_quantization(rng):
    x = rng.integers(0, 256, (1, 4, 6, 6)).astype(np.uint8)
    q = qp(0.1, 37)
    window = {"kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1), "dilations": (1, 1)}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("max_pool", window),
        ("reshape", {"shape": (4, 36)}),
        ("transpose", {"perm": (0, 2, 3, 1)}),
        ("slice", {"starts": (1,), "ends": (3,), "axes": (1,), "steps": (1,)}),
        ("expand", {"shape": (2, 4, 6, 6)}),
        ("tile", {"repeats": (1, 1, 2, 1)}),
        ("depth_to_space", {"blocksize": 2}),
        ("space_to_depth", {"blocksize": 2}),
        ("split", {"axis": 1, "sizes": (1, 3)}),
        ("resize", {"scales": (1.0, 1.0, 2.0, 2.0), "shape": (1, 4, 12, 12)}),
        ("reduce_max", {"axes": (2, 3), "keepdims": True}),
    ]
    for name, attrs in cases:
        reals = numerics.dequantize(x, q)
        expected = ours(name, [reals], attrs)
        got = ours(name, [x], attrs, qparams=[q], stage=Stage.INTEGER)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == np.uint8
            np.testing.assert_array_equal(numerics.dequantize(a, q), b)


def test_quantized_pad_fills_with_the_zero_point(rng):
    x = rng.integers(0, 256, (2, 2)).astype(np.uint8)
    got = ours("pad", [x], {"pads": (1, 0, 0, 1)}, qparams=[qp(0.1, 37)], stage=Stage.QDQ)[0]
    assert got[0].tolist() == [37, 37, 37]
    assert got[:, 2].tolist() == [37, 37, 37]
    low = ours(
        "pad",
        [x],
        {"pads": (1, 0, 0, 0), "value": -np.inf},
        qparams=[qp(0.1, 37)],
        stage=Stage.QDQ,
    )
    assert low[0][0].tolist() == [0, 0]


def test_quantized_gather_and_argmax(rng):
    x = rng.integers(-128, 128, (5, 3)).astype(np.int8)
    q = qp(0.1, 3, DType.INT8)
    indices = np.int64([4, 0])
    got = ours("gather", [x, indices], qparams=[q], stage=Stage.QDQ)
    np.testing.assert_array_equal(got[0], x[[4, 0]])
    top = ours("argmax", [x], {"axis": 1}, qparams=[q], stage=Stage.INTEGER)
    np.testing.assert_array_equal(top[0][:, 0], x.argmax(axis=1))


def test_concat_unites_clamp_ranges_of_one_grid(rng):
    a, b = rng.integers(20, 60, (2, 2, 3)).astype(np.uint8)
    qa, qb = qp().clamped(10, 60), qp().clamped(20, 255)
    g = Graph("g", Stage.INTEGER)
    xs = [g.add_input("x", u8(2, 3, q=q)) for q in (qa, qb)]
    t = g.add("concat", xs, {"axis": 0}).output.type
    assert t == u8(4, 3, q=qp().clamped(10, 255))
    got = ours("concat", [a, b], {"axis": 0}, qparams=[qa, qb], stage=Stage.INTEGER)
    np.testing.assert_array_equal(got[0], np.concatenate([a, b]))


def test_transpose_moves_the_axis_of_per_axis_scales():
    q = QuantParams(np.ones(3, np.float32), np.zeros(3, int), DType.INT8, -127, 127, PerAxis(0))
    t = infer("transpose", [TensorType((3, 4, 5), DType.INT8, q)], perm=(2, 0, 1))
    assert t.shape == (5, 3, 4)
    assert t.qparams is not None
    assert t.qparams.granularity == PerAxis(1)
