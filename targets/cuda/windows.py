# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Launches of depthwise convolutions and of pooling."""

from __future__ import annotations

import math

import numpy as np

from qcompiler.targets.cuda.products import MAX_FLOAT, Epilogue, Window
from qcompiler.targets.cuda.program import Argument, Buffer, Launch
from qcompiler.targets.cuda.source import NAME, KernelText, c_type, entry, literal, struct
from qcompiler.types import Array, DType

_THREADS = 128


def _vector(channels: int, *dtypes: DType) -> int:
    """Return how many channels a thread computes: 4, or less where they do not divide."""
    widest = max(d.numpy.itemsize for d in dtypes)
    return math.gcd(channels, 4 if widest <= 4 else 2)


def _blocks(window: Window, channels: int, v: int, tx: int) -> int:
    total = window.batch * window.oh * -(-window.ow // tx) * (channels // v)
    return -(-total // _THREADS)


def quantized_text(out: DType, value: str, low: float, high: float, zero: int) -> str:
    """Return C++ that clamps and rounds a float32 to a result element."""
    ctype = c_type(out)
    return f"qc_as<{ctype}>::of(qc_quantized({value}, {literal(low)}, {literal(high)}, {zero}))"


def depthwise_launch(
    x: Argument,
    result: Buffer,
    window: Window,
    weights: Array,
    x_dtype: DType,
    epilogue: Epilogue,
    *,
    a_zero: int = 0,
    residual: Argument | None = None,
) -> Launch:
    """Return the launch of a convolution with one input channel per group.

    Args:
        x: The image.
        result: Receives the result.
        window: Geometry.
        weights: [result channels, kernel rows, kernel columns], zero points taken off (int8 or
            int16), or floats.
        x_dtype: Element type of the image.
        epilogue: As for products; one multiplier per channel or one in all.
        a_zero: Zero point of the image.
        residual: Argument, if the epilogue has one.
    """
    channels = weights.shape[0]
    multiply = channels // window.channels
    real = x_dtype.is_float
    ep = epilogue
    v = _vector(channels, x_dtype, ep.out) if multiply == 1 else 1
    tx = 4 if window.ow >= 4 and window.kw <= 5 and max(window.dilations) == 1 else 1
    w = np.ascontiguousarray(weights.transpose(1, 2, 0))
    constants: dict[str, object] = {
        "BATCH": window.batch, "OC": channels, "V": v, "TX": tx, "MULTIPLY": multiply,
        "BIAS": ep.bias is not None, "RESIDUAL": residual is not None, "SCALED": not real,
    }  # fmt: skip
    constants |= window.constants()
    res = c_type(ep.residual) if ep.residual is not None else c_type(ep.out)
    out = c_type(ep.out)
    types = {
        "IN": c_type(x_dtype), "ACC": "float" if real else "int", "OUT": out, "RES": res,
        "W": c_type(DType.of(w.dtype)), "BIAS_TYPE": "float" if real else "int",
    }  # fmt: skip
    if real:
        lines = ["float t = acc;"]
        if residual is not None:
            lines.append("t = __fadd_rn(t, qc_real(r));")
        if ep.low > -MAX_FLOAT:
            lines.append(f"t = qc_max()(t, {literal(ep.low)});")
        if ep.high < MAX_FLOAT:
            lines.append(f"t = qc_min()(t, {literal(ep.high)});")
        lines.append(f"return qc_as<{out}>::of(t);")
        step = "return fmaf(qc_real(x), qc_real(w), acc);"
    else:
        lines = ["float t = __fmul_rn(__int2float_rn(acc), scale);"]
        if residual is not None:
            centred = f"__int2float_rn(static_cast<int>(r) - ({ep.residual_zero}))"
            lines.append(f"t = __fadd_rn(t, __fmul_rn({centred}, {literal(ep.residual_scale)}));")
        if ep.out is DType.FLOAT32:
            lines.append("return t;")
        else:
            lines.append(f"return {quantized_text(ep.out, 't', ep.low, ep.high, ep.zero)};")
        step = f"return qc_wrap_add(acc, (static_cast<int>(x) - ({a_zero})) * static_cast<int>(w));"
    acc = types["ACC"]
    functions = [
        f"{out} finish({acc} acc, float scale, {res} r) {{ {' '.join(lines)} }}",
        f"{acc} accumulate({acc} acc, {types['IN']} x, {types['W']} w) {{ {step} }}",
    ]
    text = struct("", types, constants, functions) + "\n"
    text += entry(
        f"const {types['IN']}* in, const {types['W']}* w, const {res}* r, "
        f"const {types['BIAS_TYPE']}* bias, const float* multiplier, {out}* out",
        _THREADS, f"  qc_depthwise<{NAME}_p>(in, w, r, bias, multiplier, out);",
    )  # fmt: skip
    none = np.zeros(1, np.float32)
    bias: Argument = none
    if ep.bias is not None:
        bias = ep.bias.astype(np.float32 if real else np.int32)
    multiplier: Argument = none
    if ep.scale is not None:
        wide = np.broadcast_to(ep.scale.reshape(-1), (channels,))
        multiplier = np.ascontiguousarray(wide, np.float32)
    arguments: tuple[Argument, ...] = (
        x, w, none if residual is None else residual, bias, multiplier
    )  # fmt: skip
    grid = (_blocks(window, channels, v, tx), 1, 1)
    kind = "depthwise" + ({DType.FLOAT32: "_f32", DType.FLOAT16: "_f16"}.get(x_dtype, ""))
    kernel = KernelText(kind, text, ("window.cuh",))
    macs = window.batch * window.oh * window.ow * channels * window.kh * window.kw
    return Launch(kernel, grid, _THREADS, arguments, result, 0, macs)


def pool_launch(
    kind: str,
    x: Argument,
    result: Buffer,
    window: Window,
    x_dtype: DType,
    out_dtype: DType,
    *,
    accumulator: str,
    first: str,
    fold: str,
    finish: str,
    multiplier: Array | None = None,
) -> Launch:
    """Return the launch of a pooling.

    Args:
        kind: Name of the operator.
        x: The image.
        result: Receives the result.
        window: Geometry.
        x_dtype: Element type of the image.
        out_dtype: Element type of the result.
        accumulator: C++ type of the accumulator.
        first: C++ value that it starts with.
        fold: C++ expression of `acc` and `x`.
        finish: C++ expression of `acc` and `scale`.
        multiplier: float32 [oh * ow], one per position, or None.
    """
    v = _vector(window.channels, x_dtype, out_dtype)
    constants: dict[str, object] = {
        "BATCH": window.batch, "OC": window.channels, "V": v, "TX": 1,
        "PER_POSITION": multiplier is not None,
    }  # fmt: skip
    constants |= window.constants()
    source, out = c_type(x_dtype), c_type(out_dtype)
    functions = [
        f"{accumulator} first() {{ return {first}; }}",
        f"{accumulator} fold({accumulator} acc, {source} x) {{ return {fold}; }}",
        f"{out} finish({accumulator} acc, float scale) {{ return {finish}; }}",
    ]
    types = {"IN": source, "OUT": out, "ACC": accumulator}
    text = struct("", types, constants, functions) + "\n"
    text += entry(
        f"const {source}* in, const float* multiplier, {out}* out",
        _THREADS, f"  qc_pool<{NAME}_p>(in, multiplier, out);",
    )  # fmt: skip
    positions: Argument = np.zeros(1, np.float32) if multiplier is None else multiplier
    grid = (_blocks(window, window.channels, v, 1), 1, 1)
    kernel = KernelText(kind, text, ("window.cuh",))
    return Launch(kernel, grid, _THREADS, (x, positions), result)
