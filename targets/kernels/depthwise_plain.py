# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The plain form of the 8-bit depthwise convolution: any shape, one output pixel at a time.

Taps that fall outside the input are skipped, and activations are centred before they are
multiplied, so padding needs no correction.  Used for what `depthwise` has no vector form for: few
channels, odd channel multipliers, very large kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.packing import Facts
from qcompiler.targets.kernels.simd import (
    exact_mul,
    loop,
    lrint,
    stack,
    unravel,
    vector_spans,
    worth_threads,
)
from qcompiler.targets.kernels.tir import Buffer, Expr
from qcompiler.targets.kernels.workload import ConvWorkload

__all__ = ["PlainKernel", "tap_range"]


def tap_range(
    output: Expr, size: int, kernel: int, stride: int, dilation: int, pad: int
) -> tuple[Expr, Expr, Expr]:
    """Position of the first tap, and the taps [begin, end) of an output that lie in the input."""
    first = tir.bind(output * stride - pad)
    begin = T.max(T.floordiv(dilation - 1 - first, dilation), 0) if pad else 0
    end = T.min(T.floordiv(size - first + dilation - 1, dilation), kernel)
    begin = tir.bind(begin + tir.splat(0, "int32", 1))
    return first, begin, tir.bind(T.max(end, begin))


@dataclass(frozen=True, slots=True)
class PlainKernel:
    """One kernel under construction; buffers are one-dimensional."""

    workload: ConvWorkload
    isa: Isa
    facts: Facts
    buffers: dict[str, Buffer]

    def emit(self) -> None:
        """Loops over output pixels and channels."""
        w = self.workload
        lanes = self.isa.vector_bits // 16 if w.co == w.c else 1
        threads = worth_threads(2.0 * w.macs / min(lanes, w.co))
        with loop(w.n * w.oh, threads=threads) as row, loop(w.ow) as ox:
            image, oy = unravel(row, [w.n, w.oh])
            spans = vector_spans(w.co, lanes, overlap=True)
            for offset, count, width in spans:
                with loop(count) as index:
                    channel = tir.bind(index * width + offset)
                    self._pixel(image, oy, ox, channel, width)

    def _pixel(self, image: Expr, oy: Expr, ox: Expr, channel: Expr, lanes: int) -> None:
        w = self.workload
        top, y_begin, y_end = tap_range(oy, w.h, w.kh, w.strides[0], w.dilations[0], w.pads[0])
        left, x_begin, x_end = tap_range(ox, w.w, w.kw, w.strides[1], w.dilations[1], w.pads[1])
        source = T.floordiv(channel, w.co // w.c)
        acc = stack(lanes, "int32")
        tir.store(acc, 0, tir.load(self.buffers["bias"], channel, lanes))
        zero = tir.cast(tir.load(self.buffers["scalars"], 0, 1), "int32")
        with tir.serial(y_begin, y_end) as ky, tir.serial(x_begin, x_end) as kx:
            y, x = top + ky * w.dilations[0], left + kx * w.dilations[1]
            at = ((image * w.h + y) * w.w + x) * w.c + source
            value = tir.load(self.buffers["a"], at, lanes)
            if w.a_dtype == "int8":
                value = T.bitwise_xor(value, tir.splat(128, "uint8", lanes))
            value = tir.cast(value, "int32") - tir.splat(zero, "int32", lanes)
            weight = tir.load(self.buffers["weight"], (ky * w.kw + kx) * w.co + channel, lanes)
            total = tir.load(acc, 0, lanes) + value * tir.cast(weight, "int32")
            tir.store(acc, 0, total)
        at = ((image * w.oh + oy) * w.ow + ox) * w.co + channel
        self._store(tir.bind(tir.load(acc, 0, lanes)), tir.bind(at), channel)

    def _scalar(self, position: int, lanes: int) -> Expr:
        return tir.splat(tir.load(self.buffers["scalars"], position, 1), "float32", lanes)

    def _store(self, acc: Expr, at: Expr, channel: Expr) -> None:
        lanes = tir.lanes_of(acc)
        dtype = self.workload.epilogue.out_dtype
        out = self.buffers["out"]
        if dtype == "int32":
            tir.store(out, at, acc)
            return
        multiplier = tir.load(self.buffers["multiplier"], channel, lanes)
        value = exact_mul(tir.cast(acc, "float32"), multiplier)
        residual = self.buffers.get("residual")
        if residual is not None:
            other = tir.cast(tir.load(residual, at, lanes), "float32") - self._scalar(5, lanes)
            value = value + exact_mul(other, self._scalar(4, lanes))
        if dtype == "float32":
            tir.store(out, at, value)
            return
        value = T.min(T.max(value, self._scalar(2, lanes)), self._scalar(3, lanes))
        whole = lrint(value) + tir.cast(self._scalar(1, lanes), "int32")
        tir.store(out, at, tir.cast(whole, dtype))
