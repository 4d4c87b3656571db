# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution in float32 or float16, NHWC, with bias, residual and clip.

Arguments of the built PrimFunc, in order: the activations, the residual where the epilogue has one,
`weight` `[KH * KW, CO]`, `bias` `[CO]`, `scalars` (see `packing.SCALARS`), of float16 `multiplier`
`[CO]`, the output.

Channels are vectorised; an interior tile keeps a few neighbouring outputs in registers and loads
each weight once for them.  Sums are fused multiply-adds where the machine has them.  In float16 all
taps are one block in the sense of `halves`: multiplied and added in float16, then scaled by the
channel's power of two, with the bias and all that follows in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.halves import needs_halves, powers_of
from qcompiler.targets.kernels.packing import Facts, Packed
from qcompiler.targets.kernels.simd import (
    ITEM_BYTES,
    loop,
    stack,
    vector_spans,
    worth_threads,
)
from qcompiler.targets.kernels.tir import Buffer, Expr, PrimFuncBuilder
from qcompiler.targets.kernels.window import Pixel, Window, sweep
from qcompiler.targets.kernels.workload import FLOATS, ConvWorkload, GemmValues

__all__ = ["build_float_depthwise", "pack_float_depthwise"]

Array = npt.NDArray[Any]


def pack_float_depthwise(workload: ConvWorkload, weight: Array, values: GemmValues) -> Packed:
    """Pack the constants of a float depthwise convolution.

    Args:
        workload: Shapes; `groups == c`, float32 or float16 activations.
        weight: `[CO, 1, KH, KW]` of the activations' dtype.
        values: `bias`, `act_min` and `act_max` are read.

    Raises:
        CodegenError: an array has another shape or dtype than the workload says.
    """
    if weight.shape != workload.weight_shape or weight.dtype.name != workload.a_dtype:
        raise CodegenError(
            f"depthwise weights are {weight.dtype}{weight.shape}, expected "
            f"{workload.a_dtype}{workload.weight_shape}"
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
    packed = Packed((taps, bias, scalars), ("weight", "bias", "scalars"), facts)
    if workload.a_dtype == "float32":
        return packed
    # No sum of the taps may overflow (`halves`).
    powers = powers_of(np.abs(taps.astype(np.float64)).sum(0))
    bits = (taps.astype(np.float32) / powers).astype(np.float16).view(np.uint16)
    names = ("weight", "bias", "scalars", "multiplier")
    return Packed((bits, bias, scalars, powers), names, replace(facts, dot="half"))


def build_float_depthwise(
    workload: ConvWorkload, isa: Isa, packed: Packed, name: str = "depthwise"
) -> Any:
    """The PrimFunc of a float32 or float16 depthwise convolution.

    Raises:
        CodegenError: the workload is not a float depthwise convolution, or the row does not
            multiply its dtype.
    """
    w = workload
    if w.groups != w.c or w.a_dtype not in FLOATS:
        raise CodegenError(f"depthwise: expected groups == channels and floats, got {w}")
    if w.a_dtype == "float16":
        needs_halves(isa, "depthwise")
    window = Window(w.n, (w.h, w.w), (w.oh, w.ow), (w.kh, w.kw), w.strides, w.pads, w.dilations)
    multiplier = w.co // w.c
    # Two registers of channels for each of four outputs leave room for weights on 16 registers.
    lanes = isa.vector_bits * 2 // (8 * ITEM_BYTES[w.a_dtype]) if multiplier == 1 else 1
    tile = 4 if isa.vector_registers < 32 else 6
    with PrimFuncBuilder(name) as builder:
        arguments = {"a": builder.argument("a", w.a_shape, w.a_dtype)}
        residual = w.epilogue.residual_dtype
        if residual is not None:
            arguments["residual"] = builder.argument("residual", w.out_shape, residual)
        for label, shape, dtype in packed.shapes:
            arguments[label] = builder.argument(label, shape, dtype)
        arguments["out"] = builder.argument("out", w.out_shape, w.epilogue.out_dtype)
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
    half = facts.dot == "half"  # then the sums start from nothing, and the bias comes last
    start = tir.splat(0.0, w.a_dtype, lanes) if half else bias

    def weights(tap: Expr) -> Expr:
        found = tir.load(buffers["weight"], tap * w.co + channel, lanes)
        return tir.reinterpret(found, "float16", lanes) if half else found

    def product(tap: Expr, place: Expr, weight: Expr | None = None) -> Expr:
        if weight is None:
            weight = weights(tap)
        return tir.load(buffers["a"], place * w.c + source, lanes) * weight

    if pixel.interior:
        sums = [start] * pixel.count
        for tap, places in pixel.unrolled():
            weight = tir.bind(weights(tir.splat(tap, "int32", 1)))
            for i, place in enumerate(places):
                value = product(tir.splat(tap, "int32", 1), place, weight)
                sums[i] = tir.bind(sums[i] + value)
    else:
        acc = stack(lanes, w.a_dtype)
        tir.store(acc, 0, start)
        with pixel.looped() as (tap, place):
            tir.store(acc, 0, tir.load(acc, 0, lanes) + product(tap, place))
        sums = [tir.bind(tir.load(acc, 0, lanes))]
    for output, total in zip(pixel.outputs, sums, strict=True):
        at = tir.bind(output * w.co + channel)
        value = total
        if half:
            power = tir.load(buffers["multiplier"], channel, lanes)
            value = tir.cast(total, "float32") * power + bias
        if "residual" in buffers:
            value = value + tir.cast(tir.load(buffers["residual"], at, lanes), "float32")
        if facts.clip:
            low, high = (
                tir.splat(tir.load(buffers["scalars"], k, 1), "float32", lanes) for k in (2, 3)
            )
            value = T.min(T.max(value, low), high)
        tir.store(buffers["out"], at, tir.cast(value, w.epilogue.out_dtype))
