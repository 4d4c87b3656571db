# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Matrix products and convolutions, int8 and float32: the entry points.

`workload` says what is computed, `params` how it is tiled, `packing` makes the constants, `macro`
emits the code (and `batched`, for products of two activations).  The steps for one layer::

    params = default_params(workload, isa)                   # or one of space(workload, isa)
    packed = pack_conv(workload, isa, params, weight, values)
    function = build_conv(workload, isa, params, packed, "conv_0")

Layers with equal `kernel_key` can share one function.  Arguments of the function, in order:

1. the activations, of the workload's `a_shape` (convolution: NHWC);
2. B, of `b_shape`, where it is an activation (`b_constant` False);
3. the residual, of `out_shape`, where the epilogue has one;
4. the scales of A, of `row_scale_shape`, where the epilogue has some;
5. the packed constants, `Packed.arrays` in order;
6. the output, of `out_shape`.
"""

from __future__ import annotations

import math
from typing import Any

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.amx import TilesKernel
from qcompiler.targets.kernels.amx_plan import tiles_plan
from qcompiler.targets.kernels.batched import emit_batched
from qcompiler.targets.kernels.epilogue import EpilogueWriter
from qcompiler.targets.kernels.macro import MacroKernel
from qcompiler.targets.kernels.packing import Packed, pack_conv, pack_matmul
from qcompiler.targets.kernels.params import default_params, fitted, plain_weights, space
from qcompiler.targets.kernels.plan import geometry_of, tile_plan
from qcompiler.targets.kernels.tir import PrimFuncBuilder, flat
from qcompiler.targets.kernels.winograd import WinogradKernel
from qcompiler.targets.kernels.winograd_float import FloatWinogradKernel
from qcompiler.targets.kernels.winograd_float_plan import float_winograd_plan, is_float_winograd
from qcompiler.targets.kernels.winograd_plan import winograd_plan
from qcompiler.targets.kernels.workload import (
    PATCHES,
    ConvWorkload,
    Epilogue,
    GemmParams,
    GemmValues,
    MatmulWorkload,
)

__all__ = [
    "ConvWorkload",
    "Epilogue",
    "GemmParams",
    "GemmValues",
    "MatmulWorkload",
    "Packed",
    "build_conv",
    "build_matmul",
    "default_params",
    "kernel_key",
    "pack_conv",
    "pack_matmul",
    "space",
]


def build_conv(
    workload: ConvWorkload, isa: Isa, params: GemmParams, packed: Packed, name: str = "conv"
) -> Any:
    """The PrimFunc of a convolution whose constants are `packed` (by `pack_conv`)."""
    return _build(workload, isa, params, packed, name)


def build_matmul(
    workload: MatmulWorkload, isa: Isa, params: GemmParams, packed: Packed, name: str = "matmul"
) -> Any:
    """The PrimFunc of a matrix product whose constants are `packed` (by `pack_matmul`)."""
    return _build(workload, isa, params, packed, name)


def kernel_key(
    workload: ConvWorkload | MatmulWorkload, isa: Isa, params: GemmParams, packed: Packed
) -> tuple[object, ...]:
    """A hashable key: layers with equal keys can share one PrimFunc."""
    return (workload, isa.name, params, packed.facts, packed.shapes)


def _build(
    workload: ConvWorkload | MatmulWorkload,
    isa: Isa,
    params: GemmParams,
    packed: Packed,
    name: str,
) -> Any:
    geometry = geometry_of(workload, isa)
    params = fitted(workload, isa, params, packed.facts.depths, packed.facts.factor > 0)
    params = plain_weights(workload, isa, params, packed.facts.storage == "plain")
    plan = tile_plan(geometry, params)
    epilogue, is_float = workload.epilogue, workload.a_dtype == "float32"
    images = geometry.batch
    if isinstance(workload, MatmulWorkload) and not workload.b_constant:
        images = math.prod(workload.batch_shape)
    with PrimFuncBuilder(name) as builder:
        a = builder.argument("a", workload.a_shape, workload.a_dtype)
        b = residual = None
        if isinstance(workload, MatmulWorkload) and not workload.b_constant:
            b = builder.argument("b", workload.b_shape, workload.b_dtype)
        if epilogue.residual_dtype is not None:
            residual = builder.argument("residual", workload.out_shape, epilogue.residual_dtype)
        row_scale = None
        if isinstance(workload, MatmulWorkload) and epilogue.row_scale is not None:
            row_scale = builder.argument("row_scale", workload.row_scale_shape, "float32")
        constants = {
            label: builder.argument(label, shape, dtype) for label, shape, dtype in packed.shapes
        }
        out = builder.argument("out", workload.out_shape, epilogue.out_dtype)

        flats = {label: flat(buffer) for label, buffer in constants.items()}
        writer = EpilogueWriter(
            isa=isa,
            epilogue=epilogue,
            facts=packed.facts,
            out=flat(out),
            residual=None if residual is None else flat(residual),
            multiplier=flats.get("multiplier"),
            scalars=flats["scalars"],
            row_scale=None if row_scale is None else flat(row_scale),
            addend=flats.get("addend"),
            columns=workload.out_shape[-1],
        )
        kernel = MacroKernel(
            isa=isa,
            geometry=geometry,
            plan=plan,
            params=params,
            facts=packed.facts,
            a=flat(a),
            constants=flats,
            writer=writer,
            name=name,
            tasks=images * plan.row_blocks * plan.col_blocks,
        )
        if is_float_winograd(params) and isinstance(workload, ConvWorkload) and is_float:
            FloatWinogradKernel(workload, float_winograd_plan(workload, params), kernel).emit()
        elif packed.facts.dot == "winograd" and isinstance(workload, ConvWorkload):
            rows = params.m_block if params.algorithm in PATCHES else 0
            sizes = winograd_plan(workload, isa, packed.facts.patch, rows)
            WinogradKernel(isa, workload, sizes, flat(a), flats, writer, name).emit()
        elif packed.facts.dot == "tiles":
            tiles = tiles_plan(geometry, params)
            TilesKernel(
                isa, geometry, tiles, kernel, params, packed.facts, flat(a), flats, writer, name
            ).emit()
        elif b is None:
            kernel.emit()
        elif isinstance(workload, MatmulWorkload):
            emit_batched(kernel, workload, flat(b))
    return builder.finish()
