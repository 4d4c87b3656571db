# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What tests of post-training methods start from: networks, samples, a plan and a calibration."""

from __future__ import annotations

import numpy as np

from qcompiler.data import load_samples
from qcompiler.ir import Graph
from qcompiler.passes.calibrate import Calibrate, CalibrationSet
from qcompiler.passmanager import ModifiedInstrument, Pass, PassContext, PassManager
from qcompiler.plan import uniform
from qcompiler.types import Array


def prepared(graph: Graph, arrays: dict[str, Array], precision: str = "w4a8") -> PassContext:
    """Return a context with samples, plan and table."""
    ctx = PassContext()
    ctx.put(uniform(graph, precision))
    ctx.put(CalibrationSet.of(load_samples(arrays), graph))
    PassManager([Calibrate()], given=tuple(ctx.artifacts)).run(graph, ctx)
    return ctx


def apply(p: Pass, graph: Graph, ctx: PassContext) -> Graph:
    """Run a pass on a copy of a graph; it must say truthfully whether it modified it."""
    return PassManager([p], [ModifiedInstrument()], given=tuple(ctx.artifacts)).run(graph, ctx)


def residual_net(channels: int) -> str:
    """ONNX text: strides, depthwise and grouped convolutions, a residual, clips, pooling, Gemm."""
    return (
        f"(float[1,{channels},10,10] x) => (float[1,6] y) "
        """{
  lo = Constant <value = float {0.0}> () hi = Constant <value = float {6.0}> ()
  a = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w1, b1)
  r = Clip(a, lo, hi)
  c = Conv <pads = [1,1,1,1], group = 8> (r, w2, b2)
  d = Clip(c, lo, hi)
  e = Conv <pads = [1,1,1,1]> (d, w3)
  s = Add(e, r)
  t = Conv <pads = [1,1,1,1], group = 2> (s, w4, b4)
  q = Relu(t)
  p = GlobalAveragePool(q)
  f = Flatten(p)
  y = Gemm(f, w5, b5)
}"""
    )


def residual_weights(channels: int, rng: np.random.Generator) -> dict[str, Array]:
    """Constants of `residual_net`."""

    def w(*shape: int) -> Array:
        return (0.4 * rng.standard_normal(shape)).astype(np.float32)

    return {
        "w1": w(8, channels, 3, 3),
        "b1": w(8),
        "w2": w(8, 1, 3, 3),
        "b2": w(8),
        "w3": w(8, 8, 3, 3),
        "w4": w(6, 4, 3, 3),
        "b4": w(6),
        "w5": w(6, 6),
        "b5": w(6),
    }


def pictures(channels: int, rng: np.random.Generator) -> dict[str, Array]:
    """Samples of `residual_net`: neighbours and channels are alike, as in pictures.

    Without that, reconstruction and distillation have nothing to gain.
    """
    coarse = rng.standard_normal((48, 2, 5, 5)).repeat(2, 2).repeat(2, 3)
    x = np.einsum("nchw,cd->ndhw", coarse, rng.standard_normal((2, channels)))
    return {"x": (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)}
