# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant: move outlier channels of activations into the weights that read them.

Per channel j of what a product reads: s = max|X_j|^a / max|W_j|^(1 - a), X / s folded into the
layer normalization or product before it, s * W. The readers of one value share s.

Source: Xiao et al., arXiv 2211.10438, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.errors import UsageError
from qcompiler.ir import Graph
from qcompiler.onnx_export import to_onnx
from qcompiler.ops import Stage
from qcompiler.ort import Session
from qcompiler.passes.calibrate import CalibrationSet
from qcompiler.passes.channel_scales import divide_output, input_range, joints, multiply_input
from qcompiler.passes.held_out import accept, shares
from qcompiler.passes.method import Method
from qcompiler.passmanager import PassContext
from qcompiler.plan import PrecisionPlan
from qcompiler.types import Array

LIMIT = 100.0
"""Greatest factor of one channel, and 1 over the least."""


@dataclass(frozen=True)
class Smooth(Method):
    """Move the difficulty of outlier channels from activations to weights."""

    name: ClassVar[str] = "smooth"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, PrecisionPlan)
    alpha: float = 0.5  # share of the difficulty that moves into the weights
    runs: int = 32  # calibration runs to look at, at most
    norms_only: bool = True  # only behind layer normalizations

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise UsageError(f"smooth: alpha is {self.alpha}, expected a number from 0 to 1")

    def improve(self, graph: Graph, ctx: PassContext) -> bool:
        """Smooth, and undo it where held-out samples say that it is worse."""
        changed = graph.clone()
        found = [
            j for j in joints(changed) if j.producer.op.name == "layer_norm" or not self.norms_only
        ]
        if not found:
            ctx.log.append(f"{self.name}: no product follows a normalization closely enough")
            return False
        peaks = self._peaks(changed, {j.value.name: j.producer.op.name for j in found}, ctx)
        for j in found:
            x = peaks[j.value.name]
            w = np.max([input_range(r) for r in j.readers], axis=0).astype(np.float64)
            live = (x > 0) & (w > 0)
            s = np.where(live, x, 1.0) ** self.alpha / np.where(live, w, 1.0) ** (1 - self.alpha)
            s = np.clip(np.where(live, s, 1.0), 1 / LIMIT, LIMIT)
            divide_output(changed, j.producer, s)
            for reader in j.readers:
                multiply_input(changed, reader, s)
        return accept(self.name, graph, changed, ctx, self.runs)

    def _peaks(self, graph: Graph, values: dict[str, str], ctx: PassContext) -> dict[str, Array]:
        """Return the greatest magnitude per channel of some values on the calibration runs."""
        session = Session(to_onnx(graph, extra_outputs=list(values)).SerializeToString())
        peaks: dict[str, Array] = {}
        work, _ = shares(ctx.get(CalibrationSet), self.runs)
        for batch in work:
            found = session.run(batch.inputs, list(values))
            for name, origin in values.items():
                y = np.abs(found[name]).astype(np.float64)
                axis = 1 if origin == "conv" else y.ndim - 1
                peak = y.max(axis=tuple(i for i in range(y.ndim) if i != axis))
                peaks[name] = np.maximum(peaks.get(name, 0.0), peak)
        return peaks
