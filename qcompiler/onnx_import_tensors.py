# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors of an ONNX file as numpy arrays: element types, raw and external data, with all checks.

4-bit integers are held in 8 bits and bfloat16 in float32, as `DType.numpy` says.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto

from qcompiler.errors import ModelError, ShapeError, UnsupportedOpError
from qcompiler.four_bits import packed, unpacked
from qcompiler.types import Array, DType, TensorType

MAX_ELEMENTS = 2**31 - 1
"""Greatest number of elements of one tensor: kernels index with 32 bits."""

_DTYPES: dict[int, DType] = {
    TensorProto.FLOAT: DType.FLOAT32,
    TensorProto.FLOAT16: DType.FLOAT16,
    TensorProto.DOUBLE: DType.FLOAT64,
    TensorProto.BFLOAT16: DType.BFLOAT16,
    TensorProto.INT4: DType.INT4,
    TensorProto.UINT4: DType.UINT4,
    TensorProto.INT8: DType.INT8,
    TensorProto.UINT8: DType.UINT8,
    TensorProto.INT16: DType.INT16,
    TensorProto.UINT16: DType.UINT16,
    TensorProto.INT32: DType.INT32,
    TensorProto.UINT32: DType.UINT32,
    TensorProto.INT64: DType.INT64,
    TensorProto.UINT64: DType.UINT64,
    TensorProto.BOOL: DType.BOOL,
}
_ELEM_TYPES = {dtype: elem for elem, dtype in _DTYPES.items()}

_PACKED = frozenset({DType.INT4, DType.UINT4})
_DECODED = _PACKED | {DType.BFLOAT16}


def elem_type_name(elem_type: int) -> str:
    """Return ONNX's name of an element type, `#n` for a number that it does not define."""
    if elem_type in TensorProto.DataType.values():
        return str(TensorProto.DataType.Name(elem_type)).lower()
    return f"#{elem_type}"


def dtype_of(elem_type: int) -> DType:
    """Return the DType of an ONNX element type.

    Raises:
        UnsupportedOpError: Strings, complex numbers, 8-bit floats and the like.
    """
    try:
        return _DTYPES[elem_type]
    except KeyError:
        raise UnsupportedOpError(
            f"tensors of element type {elem_type_name(elem_type)} are not supported"
        ) from None


def elem_type_of(dtype: DType) -> int:
    """Return the ONNX element type of a DType."""
    return _ELEM_TYPES[dtype]


def to_onnx_array(data: Array, dtype: DType) -> Array:
    """Return the array in the numpy dtype that the onnx package uses for the element type."""
    if dtype not in _DECODED:
        return data
    converted: Array = data.astype(onnx.helper.tensor_dtype_to_np_dtype(elem_type_of(dtype)))
    return converted


def from_onnx_array(data: Array) -> tuple[Array, DType]:
    """Return (array in the numpy dtype that holds the element type here, its DType).

    Raises:
        UnsupportedOpError: An element type without a counterpart.
    """
    if data.dtype.kind in "OUS":
        raise UnsupportedOpError("tensors of element type string are not supported")
    dtype = dtype_of(onnx.helper.np_dtype_to_tensor_dtype(data.dtype))
    return np.asarray(data, dtype.numpy), dtype


def element_count(shape: Sequence[int], what: str) -> int:
    """Return the number of elements of a shape.

    Raises:
        ShapeError: A negative extent, or more elements than the kernels can index.
    """
    if any(d < 0 for d in shape):
        raise ShapeError(f"{what} has the negative extent {min(shape)}: shape {list(shape)}")
    count = math.prod(shape)
    if count > MAX_ELEMENTS:
        raise ShapeError(
            f"{what} of shape {list(shape)} has {count} elements; at most {MAX_ELEMENTS} are"
            " supported"
        )
    return count


def read_tensor(tensor: TensorProto, folder: pathlib.Path | None, what: str) -> tuple[Array, DType]:
    """Return (elements, dtype) of a TensorProto; the array is not writeable where that is free.

    Args:
        tensor: The TensorProto.
        folder: Folder of the model's file, which external data must not leave; None for a model
            in memory, which cannot have external data.
        what: Name for messages, as in "initializer 'w'".

    Raises:
        UnsupportedOpError: Element type without a counterpart.
        ModelError: Data missing, of the wrong length, or outside the model's folder.
    """
    dtype = dtype_of(tensor.data_type)
    shape = tuple(int(d) for d in tensor.dims)
    count = element_count(shape, what)
    nbytes = (count * 4 + 7) // 8 if dtype in _PACKED else count * (dtype.bits // 8)
    if tensor.data_location == TensorProto.EXTERNAL:
        raw = _external(tensor, folder, nbytes, what)
    elif tensor.HasField("raw_data"):
        raw = tensor.raw_data
    else:
        return _typed(tensor, shape, count, dtype, what), dtype
    if len(raw) != nbytes:
        raise ModelError(
            f"{what} holds {len(raw)} bytes, its shape {list(shape)} of {dtype.value} needs"
            f" {nbytes}: the file is damaged"
        )
    if dtype in _DECODED:
        return _decoded(np.frombuffer(raw, np.uint8), dtype, count).reshape(shape), dtype
    little = np.dtype(dtype.numpy).newbyteorder("<")
    return np.frombuffer(raw, little).reshape(shape).astype(dtype.numpy, copy=False), dtype


_FIELDS = {
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.UINT32: "uint64_data",
}


def _typed(
    tensor: TensorProto, shape: tuple[int, ...], count: int, dtype: DType, what: str
) -> Array:
    """Read the elements from the typed repeated fields."""
    values = getattr(tensor, _FIELDS.get(tensor.data_type, "int32_data"))
    expected = (count + 1) // 2 if dtype in _PACKED else count
    if len(values) != expected:
        raise ModelError(
            f"{what} holds {len(values)} values, its shape {list(shape)} needs {expected}:"
            " the file is damaged"
        )
    if dtype in _DECODED:
        width = np.uint8 if dtype in _PACKED else np.uint16
        raw = np.asarray(values, np.int64).astype(width).view(np.uint8)
        return _decoded(raw, dtype, count).reshape(shape)
    if dtype is DType.FLOAT16:
        return np.asarray(values, np.int64).astype(np.uint16).view(np.float16).reshape(shape)
    return np.asarray(values).astype(dtype.numpy).reshape(shape)


def _decoded(raw: Array, dtype: DType, count: int) -> Array:
    """Unpack 4-bit integers (low half of a byte first) or widen bfloat16, from bytes."""
    if dtype is DType.BFLOAT16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return unpacked(raw, dtype, count)


def _encoded(data: Array, dtype: DType) -> bytes:
    """Do the reverse of `_decoded`; bfloat16 rounds to nearest even."""
    if dtype is DType.BFLOAT16:
        bits = np.ascontiguousarray(data, np.float32).reshape(-1).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = np.where(np.isnan(data.reshape(-1)), (bits >> 16) | 64, rounded)
        return quiet.astype("<u2").tobytes()
    return packed(data)


def file_inside(root: pathlib.Path, location: str) -> pathlib.Path | None:
    """Return the path of a file in a folder, or None where the location leads elsewhere."""
    if not location or "\0" in location or pathlib.PurePath(location).is_absolute():
        return None
    try:
        path = (root / location).resolve()
        path.is_file()
    except (OSError, RuntimeError):  # a name that is too long, links in a circle
        return None
    return path if path.is_relative_to(root) else None


def _external(tensor: TensorProto, folder: pathlib.Path | None, nbytes: int, what: str) -> bytes:
    """Read external data, confined to the model's folder (links resolved)."""
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ModelError(
            f"{what} is stored in the external file {location!r}, and a model in memory has no"
            " folder to find it in",
            hint="give the path of the .onnx file instead",
        )
    root = folder.resolve()
    path = file_inside(root, location)
    if path is None:
        raise ModelError(
            f"{what} names the external file {location!r}, which is not inside the model's folder"
        )
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(nbytes)))
    except ValueError:
        raise ModelError(f"{what}: offset or length of its external data is not a number") from None
    if not path.is_file():
        raise ModelError(
            f"{what} is stored in the external file {location!r}, which is missing",
            hint="keep the file beside the model",
        )
    if offset < 0 or length != nbytes or offset + length > path.stat().st_size:
        raise ModelError(
            f"{what}: external data at offset {offset}, length {length} does not fit the file"
            f" {location!r} of {path.stat().st_size} bytes and the {nbytes} bytes that the tensor"
            " needs"
        )
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data: bytes = file.read(length)
            return data
    except OSError as error:
        raise ModelError(f"{what}: cannot read {location!r}: {error.strerror}") from None


def make_tensor(data: Array, dtype: DType, name: str) -> TensorProto:
    """Return a TensorProto that holds the array."""
    if dtype in _DECODED:
        raw = _encoded(data, dtype)
    else:
        raw = data.astype(np.dtype(dtype.numpy).newbyteorder("<"), copy=False).tobytes()
    return TensorProto(name=name, data_type=elem_type_of(dtype), dims=data.shape, raw_data=raw)


def placeholder(type: TensorType, name: str) -> TensorProto:
    """Return an initializer without elements: whoever loads the model brings them."""
    proto = TensorProto(
        name=name, data_type=elem_type_of(type.dtype), dims=type.shape,
        data_location=TensorProto.EXTERNAL,
    )  # fmt: skip
    proto.external_data.add(key="location", value="apart")
    return proto


def make_type(type: TensorType) -> onnx.TypeProto:
    """Return the TypeProto of a tensor type (its storage dtype; quantization is not in it)."""
    return onnx.helper.make_tensor_type_proto(elem_type_of(type.dtype), type.shape)


def read_type(type: onnx.TypeProto, what: str) -> TensorType:
    """Return the tensor type of an inferred TypeProto whose shape is static.

    Raises:
        UnsupportedOpError: Not a tensor, an element type without a counterpart, or a shape that
            is not known at compile time.
    """
    kind = type.WhichOneof("value")
    if kind != "tensor_type":
        raise UnsupportedOpError(f"{what} is a {kind or 'value of unknown type'}, not a tensor")
    dtype = dtype_of(type.tensor_type.elem_type)
    if not type.tensor_type.HasField("shape") or not all(
        d.HasField("dim_value") for d in type.tensor_type.shape.dim
    ):
        raise UnsupportedOpError(f"the shape of {what} is not known at compile time")
    shape = tuple(int(d.dim_value) for d in type.tensor_type.shape.dim)
    element_count(shape, what)
    return TensorType(shape, dtype)
