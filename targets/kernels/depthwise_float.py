# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution in float32, NHWC, with bias, residual and clip.

Arguments of the built PrimFunc, in order: the activations, the residual where the epilogue has one,
`weight` `[KH * KW, CO]`, `bias` `[CO]`, `scalars` (see `packing.SCALARS`), the output.

Channels are vectorised; an interior tile keeps a few neighbouring outputs in registers and loads
each weight once for them.  Sums are fused multiply-adds where the machine has them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.packing import Facts, Packed
from qcompiler.targets.kernels.simd import loop, stack, vector_spans, worth_threads
from qcompiler.targets.kernels.tir import Buffer, Expr, PrimFuncBuilder
from qcompiler.targets.kernels.window import Pixel, Window, sweep
from qcompiler.targets.kernels.workload import ConvWorkload, GemmValues

__all__ = ["build_float_depthwise", "pack_float_depthwise"]

Array = npt.NDArray[Any]


def pack_float_depthwise(workload: ConvWorkload, weight: Array, values: GemmValues) -> Packed:
    """Pack the constants of a float32 depthwise convolution.

    Args:
        workload: Shapes; `groups == c`, float32 activations.
        weight: `[CO, 1, KH, KW]` float32.
        values: `bias`, `act_min` and `act_max` are read.

    Raises:
        CodegenError: an array has another shape or dtype than the workload says.
    """
    if weight.shape != workload.weight_shape or weight.dtype != np.float32:
        raise CodegenError(
            f"depthwise weights are {weight.dtype}{weight.shape}, expected "
            f"float32{workload.weight_shape}"
        )
    bias = np.zeros(workload.co, np.float32) if values.bias is None else values.bias
    if bias.shape != (workload.co,) or bias.dtype != np.float32:
        raise CodegenError(f"bias is {bias.dtype}{bias.shape}, expected float32({workload.co},)")
    scalars = np.zeros(8, np.float32)
    scalars[2] = -np.inf if values.act_min is None else values.act_min
    scalars[3] = np.inf if values.act_max is None else values.act_max
    clip = values.act_min is not None or values.act_max is not None
    taps = np.ascontiguousarray(weight.reshape(workload.co, -1).T)
    facts = Facts("float", saturating=False, zero_point=False, clip=clip)
    return Packed((taps, bias, scalars), ("weight", "bias", "scalars"), facts)


def build_float_depthwise(
    workload: ConvWorkload, isa: Isa, packed: Packed, name: str = "depthwise"
) -> Any:
    """The PrimFunc of a float32 depthwise convolution.

    Raises:
        CodegenError: the workload is not a float32 depthwise convolution.
    """
    w = workload
    if w.groups != w.c or w.a_dtype != "float32":
        raise CodegenError(f"depthwise: expected groups == channels and float32, got {w}")
    window = Window(w.n, (w.h, w.w), (w.oh, w.ow), (w.kh, w.kw), w.strides, w.pads, w.dilations)
    multiplier = w.co // w.c
    # Two registers of channels for each of four outputs leave room for weights on 16 registers.
    lanes = isa.lanes() * 2 if multiplier == 1 else 1
    tile = 4 if isa.vector_registers < 32 else 6
    with PrimFuncBuilder(name) as builder:
        arguments = {"a": builder.argument("a", w.a_shape, "float32")}
        if w.epilogue.residual_dtype is not None:
            arguments["residual"] = builder.argument("residual", w.out_shape, "float32")
        for label, shape, dtype in packed.shapes:
            arguments[label] = builder.argument(label, shape, dtype)
        arguments["out"] = builder.argument("out", w.out_shape, "float32")
        buffers = {label: tir.flat(buffer) for label, buffer in arguments.items()}

        def emit(pixel: Pixel) -> None:
            for offset, count, width in vector_spans(w.co, lanes, overlap=True):
                with loop(count) as index:
                    channel = tir.bind(index * width + offset)
                    _outputs(pixel, buffers, w, packed.facts, channel, width)

        threads = worth_threads(w.macs / isa.lanes())
        sweep(window, emit, tile=tile, threads=threads)
    return builder.finish()


def _outputs(
    pixel: Pixel,
    buffers: dict[str, Buffer],
    w: ConvWorkload,
    facts: Facts,
    channel: Expr,
    lanes: int,
) -> None:
    source = tir.bind(T.floordiv(channel, w.co // w.c)) if w.co != w.c else channel
    bias = tir.bind(tir.load(buffers["bias"], channel, lanes))

    def product(tap: Expr, place: Expr, weight: Expr | None = None) -> Expr:
        if weight is None:
            weight = tir.load(buffers["weight"], tap * w.co + channel, lanes)
        return tir.load(buffers["a"], place * w.c + source, lanes) * weight

    if pixel.interior:
        sums = [bias] * pixel.count
        for tap, places in pixel.unrolled():
            weight = tir.bind(tir.load(buffers["weight"], channel + tap * w.co, lanes))
            for i, place in enumerate(places):
                value = product(tir.splat(tap, "int32", 1), place, weight)
                sums[i] = tir.bind(sums[i] + value)
    else:
        acc = stack(lanes, "float32")
        tir.store(acc, 0, bias)
        with pixel.looped() as (tap, place):
            tir.store(acc, 0, tir.load(acc, 0, lanes) + product(tap, place))
        sums = [tir.bind(tir.load(acc, 0, lanes))]
    for output, total in zip(pixel.outputs, sums, strict=True):
        at = tir.bind(output * w.co + channel)
        value = total
        if "residual" in buffers:
            value = value + tir.load(buffers["residual"], at, lanes)
        if facts.clip:
            low, high = (
                tir.splat(tir.load(buffers["scalars"], k, 1), "float32", lanes) for k in (2, 3)
            )
            value = T.min(T.max(value, low), high)
        tir.store(buffers["out"], at, value)
