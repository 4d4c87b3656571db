# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Immutable leaves of the IR: dtypes, granularity, quantization parameters, tensor types.

Quantization lives in the tensor type: a tensor of storage dtype `uint8` whose type carries
`QuantParams` stands for the reals `scale * (q - zero_point)`.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import UsageError

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


class DType(enum.Enum):
    """Element type of a tensor; the value is numpy's name where numpy has the type."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"
    INT4 = "int4"
    UINT4 = "uint4"
    INT8 = "int8"
    UINT8 = "uint8"
    INT16 = "int16"
    UINT16 = "uint16"
    INT32 = "int32"
    UINT32 = "uint32"
    INT64 = "int64"
    UINT64 = "uint64"
    BOOL = "bool"

    @property
    def numpy(self) -> np.dtype[Any]:
        """Dtype that holds the elements in numpy (4-bit types are held in 8 bits)."""
        held = {DType.INT4: "int8", DType.UINT4: "uint8", DType.BFLOAT16: "float32"}
        return np.dtype(held.get(self, self.value))

    @property
    def bits(self) -> int:
        """Width of one element in bits."""
        if self is DType.BOOL:
            return 8
        return int("".join(c for c in self.value if c.isdigit()))

    @property
    def is_float(self) -> bool:
        """Whether the dtype is a floating-point one."""
        return "float" in self.value

    @property
    def is_integer(self) -> bool:
        """Whether the dtype is an integer one (bool is not)."""
        return "int" in self.value

    @property
    def min(self) -> int:
        """Smallest integer of an integer dtype."""
        return 0 if self.value.startswith("u") else -(1 << (self.bits - 1))

    @property
    def max(self) -> int:
        """Largest integer of an integer dtype."""
        return (1 << self.bits) - 1 if self.value.startswith("u") else (1 << (self.bits - 1)) - 1

    @classmethod
    def of(cls, dtype: npt.DTypeLike) -> DType:
        """Return the DType of a numpy dtype.

        Raises:
            UsageError: numpy dtype without a counterpart (strings, complex, objects).
        """
        name = np.dtype(dtype).name
        try:
            return cls(name)
        except ValueError:
            raise UsageError(f"tensors of dtype {name!r} are not supported") from None


WIDENED = {DType.INT4: DType.INT8, DType.UINT4: DType.UINT8}
"""4-bit dtype -> the dtype of the bytes that hold its elements, one to a byte."""


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "per_tensor"


@dataclass(frozen=True, slots=True)
class PerAxis:
    """One scale per index of `axis` (per output channel for weights)."""

    axis: int

    def __str__(self) -> str:
        return f"per_axis({self.axis})"


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale per `group_size` consecutive elements along `axis` (ONNX calls it blocked)."""

    axis: int
    group_size: int

    def __str__(self) -> str:
        return f"per_group({self.axis},{self.group_size})"


Granularity = PerTensor | PerAxis | PerGroup


def _frozen(a: Array) -> Array:
    a = np.array(a)  # a copy: the caller's array must not change under us
    a.flags.writeable = False
    return a


@dataclass(frozen=True, slots=True, eq=False)
class QuantParams:
    """Map between stored integers and reals: real = scale * (q - zero_point).

    Attributes:
        scale: float32 > 0; shape [] for PerTensor, [C] for PerAxis; for PerGroup the tensor's
            shape with `axis` divided by the group size.
        zero_point: int32 of the same shape as `scale`, inside [qmin, qmax] of the storage dtype.
        storage: Integer dtype of the stored values.
        qmin: Least stored value that a quantizer may produce (inclusive).
        qmax: Greatest stored value that a quantizer may produce (inclusive).
        granularity: How `scale` maps to the elements.
        spread: Root mean square of the distance of stored values from the zero point, where
            calibration measured it. A hint about speed: no part of the map, nor of equality.
    """

    scale: Array
    zero_point: Array
    storage: DType
    qmin: int
    qmax: int
    granularity: Granularity = field(default_factory=PerTensor)
    spread: float | None = None

    def __post_init__(self) -> None:
        scale = _frozen(np.asarray(self.scale, np.float32))
        zero_point = _frozen(np.asarray(self.zero_point, np.int32))
        if zero_point.shape != scale.shape:
            zero_point = _frozen(np.broadcast_to(zero_point, scale.shape))
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero_point)
        if not self.storage.is_integer:
            raise UsageError(f"quantized storage must be an integer dtype, got {self.storage}")
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise UsageError("scales must be finite and greater than zero")
        if not self.storage.min <= self.qmin <= self.qmax <= self.storage.max:
            raise UsageError(
                f"clamp range [{self.qmin}, {self.qmax}] does not fit {self.storage.value}"
            )
        if isinstance(self.granularity, PerTensor) != (scale.ndim == 0):
            raise UsageError(f"scale of shape {scale.shape} does not fit {self.granularity}")
        if isinstance(self.granularity, PerGroup) and self.granularity.group_size < 1:
            raise UsageError(f"a group has at least one element: {self.granularity}")

    def _key(self) -> tuple[Any, ...]:
        return (
            self.storage,
            self.qmin,
            self.qmax,
            self.granularity,
            self.scale.shape,
            self.scale.tobytes(),
            self.zero_point.tobytes(),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantParams) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def s(self) -> float:
        """The scale of a per-tensor quantization (a float32 value as a Python float)."""
        return float(self.scale.reshape(()))

    @property
    def z(self) -> int:
        """The zero point of a per-tensor quantization."""
        return int(self.zero_point.reshape(()))

    @property
    def is_per_tensor(self) -> bool:
        """Whether one scale serves the whole tensor."""
        return isinstance(self.granularity, PerTensor)

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is 0."""
        return not self.zero_point.any()

    def clamped(self, lo: int, hi: int) -> QuantParams:
        """Return the same grid with the clamp range narrowed to [lo, hi]."""
        qmin, qmax = max(self.qmin, lo), min(self.qmax, hi)
        return QuantParams(
            self.scale, self.zero_point, self.storage, qmin, max(qmin, qmax), self.granularity
        )

    def same_grid(self, other: QuantParams) -> bool:
        """Whether the integers of both mean the same reals (the clamp range may differ)."""
        return self.storage == other.storage and self.same_map(other)

    def same_map(self, other: QuantParams) -> bool:
        """Whether equal integers of both mean the same reals, whatever storage holds them."""
        return (
            self.granularity == other.granularity
            and self.scale.tobytes() == other.scale.tobytes()
            and self.zero_point.tobytes() == other.zero_point.tobytes()
        )

    def __str__(self) -> str:
        if self.is_per_tensor:
            where = f"scale={self.s:.9g} zero_point={self.z}"
        else:
            where = f"{self.granularity} scale=[{self.scale.size}] zero_point="
            where += "0" if self.is_symmetric else f"[{self.zero_point.size}]"
        return f"{where} range=[{self.qmin},{self.qmax}]"


@dataclass(frozen=True, slots=True)
class TensorType:
    """Shape, storage dtype and, for a quantized tensor, its quantization parameters.

    Attributes:
        shape: Static extents, physical order (the layout is an attribute of the operators).
        dtype: Storage dtype.
        qparams: None for a plain tensor.
    """

    shape: Shape
    dtype: DType
    qparams: QuantParams | None = None

    def __post_init__(self) -> None:
        if self.qparams is not None and self.qparams.storage != self.dtype:
            raise UsageError(
                f"dtype {self.dtype.value} differs from the storage "
                f"{self.qparams.storage.value} of its quantization"
            )

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_quantized(self) -> bool:
        """Whether the tensor carries quantization parameters."""
        return self.qparams is not None

    def with_shape(self, shape: Shape) -> TensorType:
        """Return the type with another shape."""
        return TensorType(tuple(int(d) for d in shape), self.dtype, self.qparams)

    def __str__(self) -> str:
        base = f"{self.dtype.value}[{','.join(map(str, self.shape))}]"
        return f"{base}<{self.qparams}>" if self.qparams is not None else base


class Precision(enum.Enum):
    """What a node computes in: weight bits and activation bits, or a float width.

    `wNaM`: integers, with scales of activations from calibration; `w4a8-group`: with a factor of
    the weights for each group along K, on the scale of their column. The others need no
    calibration: `fp16`: weights held in half precision; `w8`, `w4`: weights held in integers, one
    scale per group along K, both computing in float32; `w8a8-dynamic`: integer products of
    activations that are quantized at run time, one scale per row (token), or one per tensor.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    W8A8 = "w8a8"
    W8A7 = "w8a7"
    W7A8 = "w7a8"
    W6A8 = "w6a8"
    W4A8 = "w4a8"
    W4A8_GROUP = "w4a8-group"
    W8A8_DYNAMIC = "w8a8-dynamic"
    W8A8_DYNAMIC_TENSOR = "w8a8-dynamic-tensor"
    W8 = "w8"
    W4 = "w4"

    @property
    def is_integer(self) -> bool:
        """Whether the node computes in integers with calibrated scales."""
        return self.value.startswith("w") and "a" in self.value and not self.is_dynamic

    @property
    def is_dynamic(self) -> bool:
        """Whether the node quantizes its activations at run time."""
        return "-dynamic" in self.value

    @property
    def is_weight_only(self) -> bool:
        """Whether the node computes in float32 with weights held in fewer bits."""
        return self.value in ("fp16", "w8", "w4")

    @property
    def weight_bits(self) -> int:
        """Width of the weights in bits."""
        return int(self.value[1]) if self.value.startswith("w") else int(self.value[2:])

    @property
    def activation_bits(self) -> int:
        """Width of the activations in bits."""
        if self.is_weight_only:
            return 32
        return int(self.value[3]) if self.value.startswith("w") else int(self.value[2:])

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Return the precision of that name.

        Raises:
            UsageError: Unknown name; the message lists the known ones.
        """
        try:
            return cls(text.lower())
        except ValueError:
            known = ", ".join(p.value for p in cls)
            raise UsageError(f"unknown precision {text!r}: expected one of {known}") from None


UNCALIBRATED = (
    Precision.FP16,
    Precision.W8A8_DYNAMIC,
    Precision.W8A8_DYNAMIC_TENSOR,
    Precision.W8,
    Precision.W4,
)
"""The precisions of fewer bits that need no calibration data, as `narrow_products` makes them."""
