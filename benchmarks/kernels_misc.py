# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Time the kernels that are not matrix products, one by one, on one thread.

    python benchmarks/kernels_misc.py [ROW ...]

Rows are instruction sets (default: all that this machine runs).  Prints milliseconds, GMAC/s where
there are products, and GB/s of input plus output.  For figures that mean something pin the process
to a core (`taskset -c 0`) of an idle machine.
"""

from __future__ import annotations

import os

os.environ.setdefault("TVM_NUM_THREADS", "1")

import sys
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from qcompiler import numerics
from qcompiler.targets.isa import ISA_TABLE, Isa, isa_named, runnable
from qcompiler.targets.kernels import depthwise, layout, norm, pointwise, pool
from qcompiler.targets.kernels.depthwise_float import build_float_depthwise, pack_float_depthwise
from qcompiler.targets.kernels.harness import build, seconds
from qcompiler.targets.kernels.window import Window
from qcompiler.targets.kernels.workload import ConvWorkload, Epilogue, GemmValues

MOBILENET_V2 = (
    (112, 32, 1), (112, 96, 2), (56, 144, 1), (56, 144, 2), (28, 192, 1), (28, 192, 2),
    (14, 384, 1), (14, 576, 1), (14, 576, 2), (7, 960, 1),
)  # fmt: skip
RNG = np.random.default_rng(0)


def codes(*shape: int) -> Any:
    """Random uint8."""
    return RNG.integers(0, 256, shape).astype(np.uint8)


def reals(*shape: int) -> Any:
    """Random float32."""
    return RNG.normal(size=shape).astype(np.float32)


def report(
    isa: Isa,
    label: str,
    function: Any,
    inputs: list[Any],
    shape: tuple[int, ...],
    dtype: str,
    macs: int = 0,
) -> float:
    """Time one kernel and print a line."""
    spent = seconds(build(function, isa), *inputs, shape=shape, dtype=dtype)
    size = sum(array.nbytes for array in inputs) + prod(shape) * np.dtype(dtype).itemsize
    rate = f"{macs / spent / 1e9:7.1f} GMAC/s" if macs else " " * 14
    print(f"  {label:40} {spent * 1e3:8.4f} ms {rate} {size / spent / 1e9:7.1f} GB/s", flush=True)
    return spent


def depthwise_layers(isa: Isa) -> None:
    """MobileNetV2's depthwise layers, 5x5, a tiny one, and float32."""
    total = 0.0
    for size, channels, stride in MOBILENET_V2:
        total += depthwise_layer(isa, (size, size), channels, stride, 3)
    print(f"  {'sum of the layers above':40} {total * 1e3:8.4f} ms")
    depthwise_layer(isa, (14, 14), 480, 1, 5)
    depthwise_layer(isa, (14, 14), 672, 2, 5)
    depthwise_layer(isa, (25, 5), 64, 1, 3)
    w = depthwise_workload((56, 56), 144, 1, 3, "float32")
    packed = pack_float_depthwise(w, reals(*w.weight_shape), GemmValues())
    function = build_float_depthwise(w, isa, packed)
    inputs = [reals(*w.a_shape), *packed.arrays]
    report(isa, "float 3x3 56x56x144 s1", function, inputs, w.out_shape, "float32", w.macs)


def depthwise_workload(
    size: tuple[int, int], channels: int, stride: int, kernel: int, dtype: str
) -> ConvWorkload:
    """A padded depthwise convolution."""
    half = kernel // 2
    begin = half if stride == 1 else half - 1
    out = "float32" if dtype == "float32" else "uint8"
    return ConvWorkload(
        1, *size, channels, channels, kernel, kernel, Epilogue(out), (stride, stride),
        (begin, begin, half, half), groups=channels, a_dtype=dtype,
    )  # fmt: skip


def depthwise_layer(
    isa: Isa, size: tuple[int, int], channels: int, stride: int, kernel: int
) -> float:
    """Time one 8-bit layer."""
    w = depthwise_workload(size, channels, stride, kernel, "uint8")
    weight = RNG.integers(-127, 128, w.weight_shape).astype(np.int8)
    values = GemmValues(multiplier=np.full(channels, 0.003, np.float32))
    params = depthwise.default_params(w, isa)
    packed = depthwise.pack_depthwise(w, isa, params, weight, values)
    function = depthwise.build_depthwise(w, isa, params, packed)
    label = f"{kernel}x{kernel} {size[0]}x{size[1]}x{channels} s{stride}"
    inputs = [codes(*w.a_shape), *packed.arrays]
    return report(isa, label, function, inputs, w.out_shape, "uint8", w.macs)


def pooling(isa: Isa) -> None:
    """ResNet-50's pools, and a 3x3 average."""
    w = pool.PoolWorkload(
        Window(1, (112, 112), (56, 56), (3, 3), (2, 2), (1, 1, 1, 1)), 64, "uint8"
    )
    report(isa, "max 3x3 s2 112x112x64", pool.max_pool(w, isa), [codes(*w.in_shape)],
           w.out_shape, "uint8")  # fmt: skip
    averaging = pool.Averaging(3, "uint8", 0.1, 0.1, 0, 0, 255)
    shape = (1, 7, 7, 2048)
    r = pool.ReduceWorkload("mean", shape, (1, 1, 1, 2048), 1, 49, 2048, "uint8", averaging)
    report(isa, "mean 7x7x2048", pool.reduce(r, isa), [codes(*shape)], r.out_shape, "uint8")
    w = pool.PoolWorkload(
        Window(1, (28, 28), (28, 28), (3, 3), (1, 1), (1, 1, 1, 1)), 192, "uint8", averaging
    )
    inputs = [codes(*w.in_shape), pool.pack_counts(w)]
    report(isa, "average 3x3 s1 28x28x192", pool.average_pool(w, isa), inputs, w.out_shape, "uint8")


def norms(isa: Isa) -> None:
    """A small transformer's softmax and layer norm."""
    shape = (1, 12, 128, 128)
    s = norm.QSoftmaxWorkload(shape, -1, "uint8", 1 / 256, "uint8", 0, 0, 255)
    table = norm.pack_softmax(numerics.softmax_table(0.05), s, isa)
    report(
        isa, "qsoftmax 12x128x128", norm.qsoftmax(s, isa), [codes(*shape), table], shape, "uint8"
    )
    f = norm.FloatSoftmaxWorkload(shape)
    report(isa, "float softmax", norm.float_softmax(f, isa), [reals(*shape)], shape, "float32")
    flat = (128, 384)
    gamma, beta = reals(384), reals(384)
    for dtype, x in (("uint8", codes(*flat)), ("int16", codes(*flat).astype(np.int16))):
        q = norm.QLayerNormWorkload(flat, dtype, 0.03, 1e-5, "uint8", 0.03, 128, 0, 255)
        label = f"qlayer_norm 128x384 {dtype}"
        report(isa, label, norm.qlayer_norm(q, isa), [x, gamma, beta], flat, "uint8")
    g = norm.FloatLayerNormWorkload(flat, 1e-5)
    inputs = [reals(*flat), gamma, beta]
    report(isa, "float layer_norm 128x384", norm.float_layer_norm(g, isa), inputs, flat, "float32")


def elementwise(isa: Isa) -> None:
    """Tables, additions, conversions."""
    size = 128 * 3072
    for dtype in ("uint8", "float32"):
        t = pointwise.TableWorkload((size,), "uint8", dtype)
        entries = pointwise.pack_table(np.arange(256).astype(dtype), t, isa)
        inputs = [codes(size), entries]
        report(isa, f"table {size} to {dtype}", pointwise.table(t, isa), inputs, (size,), dtype)
    shape = (1, 56, 56, 256)
    for label, other in (("same shape", shape), ("per channel", (1, 1, 1, 256))):
        for operation in ("add", "mul"):
            q = pointwise.QBinaryWorkload(
                operation, shape, other, "uint8", "uint8", 3, 5, 0.5, 0.4, "uint8", 0, 0, 255
            )
            inputs = [codes(*shape), codes(*other)]
            report(isa, f"q{operation} 56x56x256 {label}", pointwise.qbinary(q, isa), inputs,
                   shape, "uint8")  # fmt: skip
    w = pointwise.RequantizeWorkload(shape, "uint8", 3, 0.7, "uint8", 5, 0, 255)
    report(
        isa, "requantize 56x56x256", pointwise.requantize(w, isa), [codes(*shape)], shape, "uint8"
    )
    z = pointwise.QuantizeWorkload(shape, 0.1, 3, "uint8", 0, 255)
    report(isa, "quantize 56x56x256", pointwise.quantize(z, isa), [reals(*shape)], shape, "uint8")
    d = pointwise.DequantizeWorkload(shape, "uint8", 0.1, 3)
    report(isa, "dequantize 56x56x256", pointwise.dequantize(d, isa), [codes(*shape)], shape,
           "float32")  # fmt: skip
    for function in ("sigmoid", "tanh", "gelu", "exp"):
        u = pointwise.FloatUnaryWorkload(function, (size,))
        report(isa, f"{function} {size} float32", pointwise.float_unary(u, isa), [reals(size)],
               (size,), "float32")  # fmt: skip


def layouts(isa: Isa) -> None:
    """Changes of layout."""
    for label, shape, permutation in (
        ("NCHW to NHWC 256x56x56", (1, 256, 56, 56), (0, 2, 3, 1)),
        ("NHWC to NCHW 56x56x256", (1, 56, 56, 256), (0, 3, 1, 2)),
        ("heads 128x12x64", (1, 128, 12, 64), (0, 2, 1, 3)),
    ):
        out = tuple(shape[axis] for axis in permutation)
        for dtype in ("uint8", "float32"):
            w = layout.TransposeWorkload(shape, permutation, dtype)
            x = codes(*shape).astype(dtype)
            report(isa, f"{label} {dtype}", layout.transpose(w, isa), [x], out, dtype)
    q = layout.QuantizeToNhwcWorkload(1, 3, 224, 224, 0.02, 128, "uint8", 0, 255)
    report(isa, "quantize NCHW to NHWC 3x224x224", layout.quantize_nchw_to_nhwc(q, isa),
           [reals(1, 3, 224, 224)], (1, 224, 224, 3), "uint8")  # fmt: skip


SECTIONS: tuple[Callable[[Isa], None], ...] = (
    depthwise_layers, pooling, norms, elementwise, layouts,
)  # fmt: skip


def main(names: list[str]) -> None:
    """Run every section for every row."""
    rows = [isa_named(name) for name in names]
    for isa in rows or [row for row in ISA_TABLE.values() if runnable(row)]:
        print(isa.name)
        for section in SECTIONS:
            section(isa)


if __name__ == "__main__":
    main(sys.argv[1:])
