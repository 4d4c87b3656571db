# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Arrays of 4-bit integers, one to a byte as everything here holds them, and as others do."""

from __future__ import annotations

import numpy as np

from qcompiler.types import WIDENED, Array, DType


def in_bytes(a: Array) -> Array:
    """Return an array with 4-bit integers as int8 or uint8; any other array as it is.

    onnx gives tensors of 4-bit integers with numpy dtypes of `ml_dtypes`, named int4 and uint4.
    """
    held = {"int4": np.int8, "uint4": np.uint8}.get(a.dtype.name)
    return a if held is None else np.asarray(a.astype(held))


def outside(a: Array, dtype: DType) -> tuple[int, tuple[int, ...]] | None:
    """Return the first value that a 4-bit dtype cannot hold, and its index, or None.

    Args:
        a: Elements in the numpy dtype that holds them.
        dtype: Any dtype; those of other widths hold whatever their numpy dtype holds.
    """
    if dtype not in WIDENED or not a.size or (dtype.min <= a.min() and a.max() <= dtype.max):
        return None
    at = np.argwhere((a < dtype.min) | (a > dtype.max))[0]
    index = tuple(int(i) for i in at)
    return int(a[index]), index


def packed(a: Array) -> bytes:
    """Return the elements two to a byte, the first of them in the low half."""
    low = a.reshape(-1).astype(np.uint8) & 15
    low = np.append(low, np.zeros(low.size % 2, np.uint8))
    return (low[0::2] | (low[1::2] << 4)).tobytes()


def unpacked(raw: Array, dtype: DType, count: int) -> Array:
    """Return the first `count` elements of bytes that hold two each (uint8) as int8 or uint8."""
    low = np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1)[:count]
    if dtype is DType.UINT4:
        return low
    return ((low ^ 8).astype(np.int16) - 8).astype(np.int8)
