# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution of 8-bit activations where s8 products make int16: tap by tap.

A register holds one byte of 16 channels.  Products of two neighbouring taps are added in int16
(`smull`, `smlal`), which the weights are proved to allow, and widened into int32 (`saddw`): nothing
is interleaved, and neighbouring outputs of a tile share the inputs that both read.

In the interior the zero point's share is a constant, `corrected`; in the border taps that fall
outside the input are skipped and activations are centred first.

Constants: `weight` int8 `[KH * KW, CO]`, `bias` and `corrected` int32 `[CO]`, `multiplier`, and the
eight `scalars` of `packing.SCALARS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.depthwise_plan import LANES
from qcompiler.targets.kernels.epilogue import EpilogueWriter
from qcompiler.targets.kernels.neon import products
from qcompiler.targets.kernels.packing import Facts
from qcompiler.targets.kernels.simd import loop, stack, vector_spans, worth_threads
from qcompiler.targets.kernels.tir import Buffer, Expr
from qcompiler.targets.kernels.window import Pixel, Window, sweep
from qcompiler.targets.kernels.workload import ConvWorkload

__all__ = ["TapsKernel"]

_TILE = 3
"""Neighbouring outputs: four accumulators each leave room for inputs and weights."""


@dataclass(frozen=True, slots=True)
class TapsKernel:
    """One kernel under construction; buffers are one-dimensional."""

    workload: ConvWorkload
    isa: Isa
    facts: Facts
    buffers: dict[str, Buffer]

    def emit(self) -> None:
        """Loops over tiles of outputs and channels."""
        w = self.workload
        window = Window(w.n, (w.h, w.w), (w.oh, w.ow), (w.kh, w.kw), w.strides, w.pads, w.dilations)
        spans = vector_spans(w.co, LANES, overlap=True)

        def pixel(at: Pixel) -> None:
            for offset, count, width in spans:
                with loop(count) as index:
                    channel = tir.bind(index * width + offset)
                    self._outputs(at, channel)

        sweep(window, pixel, tile=_TILE, threads=worth_threads(w.macs / 4))

    def _outputs(self, pixel: Pixel, channel: Expr) -> None:
        w, buffers = self.workload, self.buffers
        writer = EpilogueWriter(
            isa=self.isa,
            epilogue=w.epilogue,
            facts=self.facts,
            out=buffers["out"],
            residual=buffers.get("residual"),
            multiplier=buffers["multiplier"],
            scalars=buffers["scalars"],
        )
        sums = self._interior(pixel, channel) if pixel.interior else [self._border(pixel, channel)]
        for output, parts in zip(pixel.outputs, sums, strict=True):
            writer.store_row(parts, channel, [tir.bind(output * w.co + channel)], LANES // 4)

    def _input(self, place: Expr, channel: Expr) -> Expr:
        """Sixteen channels of one input pixel as int8."""
        value = tir.load(self.buffers["a"], place * self.workload.c + channel, LANES)
        if self.workload.a_dtype == "uint8":
            value = T.bitwise_xor(value, tir.splat(128, "uint8", LANES))
        return tir.bind(tir.reinterpret(value, "int8", LANES))

    def _interior(self, pixel: Pixel, channel: Expr) -> list[list[Expr]]:
        """The sums of each output of a tile, as four vectors of int32."""
        co = self.workload.co
        corrected = self.buffers["corrected"]
        start = [tir.bind(tir.load(corrected, channel + h * 8, 8)) for h in range(2)]
        sums = [list(start) for _ in range(pixel.count)]
        taps = pixel.unrolled()
        (depth,) = self.facts.depths
        for first in range(0, len(taps), depth):
            chain = taps[first : first + depth]
            weights = [
                _halves(tir.load(self.buffers["weight"], channel + tap * co, LANES))
                for tap, _ in chain
            ]
            for i in range(pixel.count):
                inputs = [_halves(self._input(places[i], channel)) for _, places in chain]
                for h in range(2):
                    narrow = products(self.isa, [x[h] for x in inputs], [v[h] for v in weights])
                    sums[i][h] = tir.bind(sums[i][h] + tir.cast(tir.bind(narrow), "int32"))
        return [_quarters(halves) for halves in sums]

    def _border(self, pixel: Pixel, channel: Expr) -> list[Expr]:
        """The sums of one output with only the taps that lie in the input."""
        acc = stack(LANES, "int32")
        tir.store(acc, 0, tir.load(self.buffers["bias"], channel, LANES))
        zero = tir.cast(tir.load(self.buffers["scalars"], 0, 1), "int16")
        centre = tir.splat(zero, "int16", LANES)
        with pixel.looped() as (tap, place):
            x = tir.cast(self._input(place, channel), "int16") - centre
            weight = tir.load(self.buffers["weight"], tap * self.workload.co + channel, LANES)
            product = tir.cast(tir.bind(x), "int32") * tir.cast(weight, "int32")
            tir.store(acc, 0, tir.load(acc, 0, LANES) + product)
        whole = tir.bind(tir.load(acc, 0, LANES))
        return [tir.bind(tir.shuffle([whole], range(k * 4, k * 4 + 4))) for k in range(4)]


def _halves(value: Expr) -> list[Expr]:
    """Both halves of sixteen bytes."""
    value = tir.bind(value)
    return [tir.bind(tir.shuffle([value], range(h * 8, h * 8 + 8))) for h in range(2)]


def _quarters(halves: Sequence[Expr]) -> list[Expr]:
    """Two vectors of eight int32 as four of four."""
    return [
        tir.bind(tir.shuffle([half], range(k, k + 4)))
        for half in (tir.bind(half) for half in halves)
        for k in (0, 4)
    ]
