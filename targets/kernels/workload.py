# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What the matrix-multiplication kernels compute, as plain data.

A *workload* fixes shapes and dtypes: it identifies a kernel.  Every number of a layer that is not
a shape (weights, bias, zero points, multipliers, clamps) is in `GemmValues` and reaches the kernel
through its packed constants, so layers of one shape share one kernel.

The meaning, with `acc` in int32 and every float32 operation rounded by itself::

    acc[m, n] = sum_k (a[m, k] - a_zero_point) * (b[k, n] - b_zero_point) + bias[n]
    8 and 16 bits:  t = f32(acc) * multiplier[n]
                    t = t + f32(residual - residual_zero_point) * residual_multiplier   (if any)
                    out = clamp(rint(t) + zero_point, qmin, qmax)
    float32 out:    out = f32(acc) * multiplier[n]
    in groups:      t = addend[n] + sum over groups of f32(acc) * multiplier[group, n], in order;
                    out = t, or as for 8 and 16 bits from there
    with row scales: out = clip(f32(acc) * (row_scale[m] * multiplier[n]) + addend[n] + residual)
    int32 out:      out = acc
    float32 a:      out = clip(sum_k a * b + bias + residual, act_min, act_max), any summation order
    float16 a:      the same, as `halves` adds up, in float32 or rounded once to float16
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qcompiler.errors import CodegenError

__all__ = [
    "FLOATS",
    "PATCHES",
    "Algorithm",
    "ConvWorkload",
    "Epilogue",
    "GemmParams",
    "GemmValues",
    "MatmulWorkload",
    "Patch",
]

Pads = tuple[int, int, int, int]
Patch = tuple[int, int]
"""Output rows and columns that a Winograd kernel computes together."""
Algorithm = Literal[
    "auto", "direct", "winograd-2x2", "winograd-2x4", "winograd-4x2", "winograd-4x4", "tiles"
]
PATCHES: Mapping[Algorithm, Patch] = {
    "winograd-2x2": (2, 2),
    "winograd-2x4": (2, 4),
    "winograd-4x2": (4, 2),
    "winograd-4x4": (4, 4),
}
FLOATS = ("float32", "float16")
"""Dtypes of the operands of a float kernel."""
_A_DTYPES = ("uint8", "int8", *FLOATS)
_OUT_DTYPES = ("uint8", "int8", "int16", "int32", *FLOATS)
_FLOAT = (None, "float32")
_RESIDUAL_DTYPES = ("uint8", "int8", "int16", *FLOATS)


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What happens to the accumulators on their way to memory."""

    out_dtype: str
    """uint8, int8, int16 (requantized), float32 (dequantized), int32 (the sums themselves), or
    float16, of float16 operands."""
    residual_dtype: str | None = None
    """Dtype of a second operand of the output's shape that is added, or None."""
    row_scale: Literal["row", "tensor", "block"] | None = None
    """Whether the scale of A is an operand: one number for each row of A, one in all, or one for
    each `group` in a row; the output is then float32."""
    group: int = 0
    """Weights along K that share a scale: their sums are scaled and added in float32; 0 for one
    scale per column."""

    def __post_init__(self) -> None:
        if self.out_dtype not in _OUT_DTYPES:
            raise CodegenError(
                f"epilogue: out_dtype {self.out_dtype!r} is not one of {_OUT_DTYPES}"
            )
        if self.residual_dtype is not None and self.residual_dtype not in _RESIDUAL_DTYPES:
            raise CodegenError(
                f"epilogue: residual_dtype {self.residual_dtype!r} is not one of {_RESIDUAL_DTYPES}"
            )


def _check_operands(what: str, a_dtype: str, epilogue: Epilogue) -> None:
    if a_dtype not in _A_DTYPES:
        raise CodegenError(f"{what}: activation dtype {a_dtype!r} is not one of {_A_DTYPES}")
    is_float = a_dtype in FLOATS
    given = FLOATS if a_dtype == "float16" else ("float32",)
    if is_float and epilogue.out_dtype not in given:
        raise CodegenError(
            f"{what}: {a_dtype} operands give {' or '.join(given)}, not {epilogue.out_dtype}"
        )
    if not is_float and epilogue.out_dtype == "float16":
        raise CodegenError(f"{what}: {a_dtype} operands never give float16")
    if epilogue.row_scale is not None and (
        is_float or epilogue.out_dtype != "float32" or epilogue.residual_dtype not in _FLOAT
    ):
        raise CodegenError(f"{what}: row scales turn 8-bit sums into float32: {epilogue}")
    if epilogue.row_scale is not None and (epilogue.row_scale == "block") != (epilogue.group > 0):
        raise CodegenError(f"{what}: weights in groups go with scales per block: {epilogue}")
    if epilogue.residual_dtype is None or epilogue.row_scale is not None:
        return
    if epilogue.residual_dtype not in given if is_float else epilogue.residual_dtype in FLOATS:
        raise CodegenError(
            f"{what}: a {epilogue.residual_dtype} residual cannot be added to {a_dtype} sums"
        )
    if not is_float and epilogue.out_dtype in ("int32", "float32"):
        raise CodegenError(f"{what}: a residual needs a requantized output")


@dataclass(frozen=True, slots=True)
class ConvWorkload:
    """A convolution, activations NHWC, weights OIHW."""

    n: int
    """Batch size."""
    h: int
    w: int
    c: int
    """Input height, width and channels."""
    co: int
    """Output channels."""
    kh: int
    kw: int
    """Kernel extents."""
    epilogue: Epilogue
    strides: tuple[int, int] = (1, 1)
    pads: Pads = (0, 0, 0, 0)
    """Top, left, bottom, right."""
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    a_dtype: str = "uint8"

    def __post_init__(self) -> None:
        _check_operands("convolution", self.a_dtype, self.epilogue)
        if self.epilogue.row_scale is not None:
            raise CodegenError("convolution: row scales are for matrix products")
        extents = (self.n, self.h, self.w, self.c, self.co, self.kh, self.kw, self.groups)
        if min(*extents, *self.strides, *self.dilations) < 1 or min(self.pads) < 0:
            raise CodegenError(f"convolution: extents, strides and dilations must be >= 1: {self}")
        if self.c % self.groups or self.co % self.groups:
            raise CodegenError(
                f"convolution: {self.groups} groups do not divide {self.c} and {self.co} channels"
            )
        if min(self.oh, self.ow) < 1:
            raise CodegenError(f"convolution: the kernel is larger than the padded input: {self}")

    @property
    def oh(self) -> int:
        """Output height."""
        span = (self.kh - 1) * self.dilations[0] + 1
        return (self.h + self.pads[0] + self.pads[2] - span) // self.strides[0] + 1

    @property
    def ow(self) -> int:
        """Output width."""
        span = (self.kw - 1) * self.dilations[1] + 1
        return (self.w + self.pads[1] + self.pads[3] - span) // self.strides[1] + 1

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Shape of the activations."""
        return (self.n, self.h, self.w, self.c)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weights before packing."""
        return (self.co, self.c // self.groups, self.kh, self.kw)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output, and of the residual."""
        return (self.n, self.oh, self.ow, self.co)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return math.prod(self.out_shape) * math.prod(self.weight_shape[1:])


@dataclass(frozen=True, slots=True)
class MatmulWorkload:
    """`A @ B` with numpy's broadcasting of the leading dimensions."""

    a_shape: tuple[int, ...]
    """[..., M, K], or [..., K, M] with `transpose_a`; rank >= 2."""
    b_shape: tuple[int, ...]
    """[..., K, N], or [..., N, K] with `transpose_b`; rank >= 2; exactly 2 for constant weights."""
    epilogue: Epilogue
    a_dtype: str = "uint8"
    b_dtype: str = "int8"
    b_constant: bool = True
    """Whether B is a constant packed at compile time (then int8 with zero point 0, or float32)."""
    transpose_a: bool = False
    transpose_b: bool = False

    def __post_init__(self) -> None:
        _check_operands("matmul", self.a_dtype, self.epilogue)
        shapes = f"A {self.a_shape}, B {self.b_shape}"
        if len(self.a_shape) < 2 or len(self.b_shape) < 2 or min(*self.a_shape, *self.b_shape) < 1:
            raise CodegenError(f"matmul: operands need rank >= 2 and no empty dimension: {shapes}")
        if self.b_constant and len(self.b_shape) != 2:
            raise CodegenError(f"matmul: constant weights must be of rank 2: {shapes}")
        if (self.a_dtype in FLOATS or self.b_dtype in FLOATS) and self.a_dtype != self.b_dtype:
            raise CodegenError(f"matmul: cannot multiply {self.a_dtype} by {self.b_dtype}")
        if self.b_constant and self.transpose_a:
            raise CodegenError("matmul: with transpose_a, pass B as an operand (b_constant=False)")
        if self.a_dtype == "float16" and not self.b_constant:
            raise CodegenError("matmul: a float16 product needs constant weights")
        if self.b_constant and self.b_dtype == "uint8":
            raise CodegenError("matmul: constant weights must be int8; shift uint8 weights by 128")
        if self.k != self.b_shape[-1 if self.transpose_b else -2]:
            raise CodegenError(f"matmul: inner dimensions differ: {shapes}")
        np.broadcast_shapes(self.a_shape[:-2], self.b_shape[:-2])  # raises where they do not fit

    @property
    def m(self) -> int:
        """Rows of one product."""
        return self.a_shape[-1 if self.transpose_a else -2]

    @property
    def k(self) -> int:
        """Inner dimension."""
        return self.a_shape[-2 if self.transpose_a else -1]

    @property
    def n(self) -> int:
        """Columns of one product."""
        return self.b_shape[-2 if self.transpose_b else -1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The broadcast leading dimensions."""
        return tuple(np.broadcast_shapes(self.a_shape[:-2], self.b_shape[:-2]))

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output, and of the residual."""
        return (*self.batch_shape, self.m, self.n)

    @property
    def row_scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales of A, where they are an operand."""
        if self.epilogue.row_scale == "tensor":
            return ()
        per_row = 1 if self.epilogue.row_scale == "row" else self.k // self.epilogue.group
        return (*self.a_shape[:-1], per_row)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return math.prod(self.out_shape) * self.k


@dataclass(frozen=True, slots=True, eq=False)
class GemmValues:
    """The numbers of one layer that its packed constants hold, beside the weights."""

    bias: npt.NDArray[np.generic] | None = None
    """[N]: int32 with scale a * b, or float32 for float32 operands."""
    multiplier: npt.NDArray[np.float32] | float | None = None
    """[N] or one number: float32(scale_a * scale_b / scale_out), without scale_out for a float32
    output.  Unused where the output is int32 or the operands are float32."""
    a_zero_point: int = 0
    a_qmin: int | None = None
    a_qmax: int | None = None
    """Tightest known range of the stored activations; None means the dtype's.  A smaller maximum
    lets more weights through the proof of no saturation."""
    a_spread: float | None = None
    """Root mean square of their distance from the zero point, where it is known."""
    b_zero_point: int = 0
    """Zero point of an activation B; constant weights have none."""
    zero_point: int = 0
    qmin: int | None = None
    qmax: int | None = None
    """Of the output; None means the dtype's limit."""
    residual_zero_point: int = 0
    residual_multiplier: float = 1.0
    """float32(scale_residual / scale_out)."""
    act_min: float | None = None
    act_max: float | None = None
    """Clip of the output of a float32 kernel, or of one with row scales."""
    addend: npt.NDArray[np.float32] | None = None
    """[N]: added to the scaled sums of a kernel with row scales, or in groups."""
    group_multiplier: npt.NDArray[np.float32] | None = None
    """Of the weights' own shape, equal within a group: float32(scale_a * scale_b / scale_out),
    without scale_a and scale_out where A has a scale per block."""
    group_zero: npt.NDArray[np.int32] | None = None
    """Zero points of weights in groups, likewise, for A with a scale per block."""


@dataclass(frozen=True, slots=True)
class GemmParams:
    """How a kernel is tiled.  Any value is correct; speed differs."""

    lanes: int
    """32-bit lanes of the vectors: the row's width, or less for few output columns."""
    mt: int
    """At most this many output pixels (matrix rows) in a register tile."""
    nv: int
    """Vectors of output columns in a register tile."""
    m_block: int
    """Register-tile rows that one task computes."""
    n_block: int
    """Register-tile columns that one task computes."""
    order: Literal["n", "m"] = "n"
    """The outer loop inside a task: over columns (weights stay near) or rows (activations do)."""
    algorithm: Algorithm = "auto"
    """How a convolution is computed; "auto" leaves it to packing, which knows the weights.
    "winograd-4x4" computes patches of 4 x 4 outputs where the weights are proved exact for that
    (else 2 x 2), `m_block` rows of patches in a task, or as many as fit the caches if that is 0;
    it ignores the other fields.  In float32 patches are 2 x 2 or 4 x 4, `mt` counts them, and no
    field is ignored.  "tiles" (AMX, matrix products too) counts `mt` in tiles of 16 pixels and
    `m_block` in output rows."""
