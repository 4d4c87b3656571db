# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors of ONNX files: every element type both ways, against the onnx package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import ModelError, ShapeError, UnsupportedOpError
from qcompiler.onnx_import_model import stored_bytes
from qcompiler.onnx_import_tensors import (
    dtype_of,
    elem_type_of,
    element_count,
    make_tensor,
    make_type,
    read_tensor,
    read_type,
)
from qcompiler.types import Array, DType, TensorType


def values(dtype: DType, rng: np.random.Generator) -> Array:
    if dtype is DType.BOOL:
        return rng.integers(0, 2, (3, 5)).astype(bool)
    if dtype.is_float:
        data = rng.standard_normal((3, 5)).astype(dtype.numpy)
        data[0, :2] = [np.inf, 0]
        return data
    low, high = max(dtype.min, -(2**31)), min(dtype.max, 2**31)
    return rng.integers(low, high, (3, 5), endpoint=True).astype(dtype.numpy)


@pytest.mark.parametrize("dtype", list(DType))
def test_raw_data_both_ways(dtype: DType, rng: np.random.Generator) -> None:
    data = values(dtype, rng)
    proto = make_tensor(data, dtype, "t")
    theirs = numpy_helper.to_array(proto).astype(dtype.numpy)
    ours, found = read_tensor(proto, None, "t")
    assert found is dtype
    np.testing.assert_array_equal(ours, theirs)
    if dtype is DType.BFLOAT16:
        np.testing.assert_allclose(ours, data, rtol=2**-8)
    else:
        np.testing.assert_array_equal(ours, data)


@pytest.mark.parametrize("dtype", list(DType))
def test_typed_fields(dtype: DType, rng: np.random.Generator) -> None:
    data = values(dtype, rng)
    proto = helper.make_tensor("t", elem_type_of(dtype), data.shape, data.reshape(-1).tolist())
    assert not proto.HasField("raw_data")
    ours, _ = read_tensor(proto, None, "t")
    assert ours.dtype == dtype.numpy
    np.testing.assert_array_equal(ours, numpy_helper.to_array(proto).astype(dtype.numpy))
    del proto.dims[:]
    proto.dims.extend([3, 7])
    with pytest.raises(ModelError, match=r"t holds \d+ values, its shape \[3, 7\] needs"):
        read_tensor(proto, None, "t")


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan() -> None:
    data = np.float32([1.00390625, 1.01171875, np.nan, -np.inf])
    ours, _ = read_tensor(make_tensor(data, DType.BFLOAT16, "t"), None, "t")
    np.testing.assert_array_equal(ours, np.float32([1.0, 1.015625, np.nan, -np.inf]))


def test_scalars_and_empty_tensors() -> None:
    for shape in ((), (0, 3)):
        data = np.ones(shape, np.float32)
        ours, _ = read_tensor(make_tensor(data, DType.FLOAT32, "t"), None, "t")
        assert ours.shape == shape


def test_types_both_ways() -> None:
    t = TensorType((2, 3), DType.INT8)
    assert read_type(make_type(t), "t") == t
    with pytest.raises(UnsupportedOpError, match="the shape of t is not known at compile time"):
        read_type(helper.make_tensor_type_proto(TensorProto.FLOAT, ["N"]), "t")
    with pytest.raises(UnsupportedOpError, match="t is a sequence_type, not a tensor"):
        read_type(helper.make_sequence_type_proto(make_type(t)), "t")


def test_element_types_without_a_counterpart() -> None:
    with pytest.raises(UnsupportedOpError, match="element type complex64 are not supported"):
        dtype_of(TensorProto.COMPLEX64)
    with pytest.raises(UnsupportedOpError, match="element type #99 are not supported"):
        dtype_of(99)


def test_shapes_that_cannot_be() -> None:
    with pytest.raises(ShapeError, match=r"t has the negative extent -2: shape \[3, -2\]"):
        element_count((3, -2), "t")
    with pytest.raises(ShapeError, match="has 2147483648 elements; at most 2147483647"):
        element_count((1 << 16, 1 << 15), "t")


def test_the_size_of_a_model_counts_its_external_data(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64]) for n in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", io[:1], io[1:], [weights]))
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    whole = path.stat().st_size
    assert stored_bytes(path) == whole
    onnx.save(model, path, save_as_external_data=True, location="m.bin", size_threshold=0)
    assert path.stat().st_size < whole / 10
    assert stored_bytes(path) == path.stat().st_size + 64 * 64 * 4
