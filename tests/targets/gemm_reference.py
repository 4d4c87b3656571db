# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What the matrix kernels must compute, in int64 and float32 numpy, and a way to run them."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm

from qcompiler.targets.isa import Isa, tvm_target
from qcompiler.targets.kernels.gemm import (
    ConvWorkload,
    GemmParams,
    GemmValues,
    MatmulWorkload,
    build_conv,
    build_matmul,
    pack_conv,
    pack_matmul,
)

Array = np.ndarray[Any, np.dtype[Any]]
LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-32768, 32767)}


def conv_sums(workload: ConvWorkload, x: Array, weight: Array, zero_point: int) -> Array:
    """Sums of products of a convolution (no bias), int64 or float64, NHWC."""
    wide = np.float64 if x.dtype == np.float32 else np.int64
    top, left, bottom, right = workload.pads
    padded = np.pad(x.astype(wide) - zero_point, ((0, 0), (top, bottom), (left, right), (0, 0)))
    out = np.zeros(workload.out_shape, wide)
    (sh, sw), (dh, dw) = workload.strides, workload.dilations
    channels, columns = workload.weight_shape[1], workload.co // workload.groups
    for i in range(workload.kh):
        for j in range(workload.kw):
            rows = slice(i * dh, i * dh + (workload.oh - 1) * sh + 1, sh)
            cols = slice(j * dw, j * dw + (workload.ow - 1) * sw + 1, sw)
            seen = padded[:, rows, cols]
            for g in range(workload.groups):
                own = slice(g * columns, (g + 1) * columns)
                a = seen[..., g * channels : (g + 1) * channels]
                out[..., own] += a @ weight[own, :, i, j].T.astype(wide)
    return out


def requantize(sums: Array, out_dtype: str, values: GemmValues, residual: Array | None) -> Array:
    """The epilogue: every float32 operation rounded by itself."""
    acc = ((sums + 2**31) % 2**32 - 2**31).astype(np.int32)
    if out_dtype == "int32":
        return acc
    scaled = acc.astype(np.float32) * np.asarray(values.multiplier, np.float32)
    if out_dtype == "float32":
        return scaled
    if residual is not None:
        other = (residual.astype(np.int32) - values.residual_zero_point).astype(np.float32)
        scaled = scaled + other * np.float32(values.residual_multiplier)
    low, high = LIMITS[out_dtype]
    low = low if values.qmin is None else values.qmin
    high = high if values.qmax is None else values.qmax
    shifted = np.rint(scaled).astype(np.float64) + values.zero_point
    return np.clip(shifted, low, high).astype(out_dtype)


def build(
    workload: ConvWorkload | MatmulWorkload,
    isa: Isa,
    params: GemmParams,
    weight: Array | None,
    values: GemmValues,
) -> tuple[Any, tuple[Array, ...]]:
    """The compiled module of one kernel, called "kernel", and its packed constants."""
    if isinstance(workload, ConvWorkload):
        assert weight is not None
        packed = pack_conv(workload, isa, params, weight, values)
        function = build_conv(workload, isa, params, packed, "kernel")
    else:
        packed = pack_matmul(workload, isa, params, weight, values)
        function = build_matmul(workload, isa, params, packed, "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa))
    return module, packed.arrays


def run(
    workload: ConvWorkload | MatmulWorkload,
    isa: Isa,
    params: GemmParams,
    operands: list[Array],
    weight: Array | None,
    values: GemmValues,
) -> Array:
    """The kernel's output."""
    module, constants = build(workload, isa, params, weight, values)
    out = np.full(workload.out_shape, 77, workload.epilogue.out_dtype)
    tensors = [tvm.runtime.tensor(array) for array in (*operands, *constants, out)]
    module["kernel"](*tensors)
    result: Array = tensors[-1].numpy()
    return result
