# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Cross-layer equalization: make the channels between two products alike in range.

For a product with weight rows of range r1 and the one after it with columns of range r2, both per
channel: s = sqrt(r1 / r2); W1 / s, b1 / s, s * W2. Only across operators that a positive factor
passes through. A clamp from 0 to a bound lets it through as long as the channel stays below: such
channels are made larger, up to the bound on the calibration samples.

Source: Nagel et al., arXiv 1906.04721, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Node
from qcompiler.onnx_export import to_onnx
from qcompiler.ops import Stage
from qcompiler.ort import Session
from qcompiler.passes.calibrate import CalibrationSet
from qcompiler.passes.channel_scales import (
    Joint,
    divide_output,
    input_range,
    joints,
    multiply_input,
    output_range,
)
from qcompiler.passes.held_out import accept, shares
from qcompiler.passes.method import Method
from qcompiler.passmanager import PassContext
from qcompiler.plan import PrecisionPlan
from qcompiler.types import Array

LIMIT = 64.0
"""Greatest factor of one channel in one round: a nearly dead channel must not blow up."""


MARGIN = 1.2
"""Room left below a clamp, over what the calibration samples reach: other samples reach further."""


@dataclass(frozen=True)
class Equalize(Method):
    """Equalize the ranges of channels between products."""

    name: ClassVar[str] = "equalize"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, PrecisionPlan)
    rounds: int = 20  # over all pairs, until nothing moves by more than 1 %
    runs: int = 32  # calibration runs for the comparison, at most
    peak_runs: int = 192  # calibration runs that channels below a clamp are looked at on, at most

    def improve(self, graph: Graph, ctx: PassContext) -> bool:
        """Equalize, and undo it where held-out samples say that it is worse."""
        changed = graph.clone()
        pairs = [
            j
            for j in joints(changed, clamped=True)
            if j.producer.op.name != "layer_norm" and len(j.readers) == 1
        ]
        if not pairs:
            ctx.log.append(f"{self.name}: no two products follow each other closely enough")
            return False
        free = [p for p in pairs if p.ceiling is None]
        for _ in range(self.rounds):
            most = 1.0
            for pair in free:
                (reader,) = pair.readers
                r1, r2 = (
                    r.astype(np.float64) for r in (output_range(pair.producer), input_range(reader))
                )
                live = (r1 > 0) & (r2 > 0)
                s = np.sqrt(np.where(live, r1, 1.0) / np.where(live, r2, 1.0))
                s = np.clip(s, 1 / LIMIT, LIMIT)
                divide_output(changed, pair.producer, s)
                multiply_input(changed, reader, s)
                most = max(most, float(s.max()), float(1 / s.min()))
            if most < 1.01:
                break
        self._fill(changed, [p for p in pairs if p.ceiling is not None], ctx)
        return accept(self.name, graph, changed, ctx, self.runs)

    def _fill(self, graph: Graph, pairs: list[Joint], ctx: PassContext) -> None:
        """Make channels larger that stay below their clamp, as far as their readers gain by it."""
        values = {p.value.name: 1 if p.producer.op.name == "conv" else -1 for p in pairs}
        if not values:
            return
        work, _ = shares(ctx.get(CalibrationSet), self.peak_runs)
        session = Session(to_onnx(graph, extra_outputs=list(values)).SerializeToString())
        peaks: dict[str, Array] = {}
        energy: dict[str, Array] = {}
        for batch in work:
            found = session.run(batch.inputs, list(values))
            for name, axis in values.items():
                y = np.moveaxis(found[name], axis, -1).reshape(-1, found[name].shape[axis])
                peaks[name] = np.maximum(peaks.get(name, 0.0), y.max(0))
                energy[name] = energy.get(name, 0.0) + (y * y).mean(0, dtype=np.float64)
        for pair in pairs:
            (reader,) = pair.readers
            name = pair.value.name
            assert pair.ceiling is not None
            room = np.clip(pair.ceiling / np.maximum(peaks[name] * MARGIN, 1e-9), 1.0, LIMIT)
            s = 1 / growth(reader, room, energy[name])
            divide_output(graph, pair.producer, s)
            multiply_input(graph, reader, s)


def growth(reader: Node, room: Array, energy: Array) -> Array:
    """Return the factor of each channel, from 1 to its room, that the reader's weights want.

    Weights of one scale per output channel lose least where all input channels have the same
    range. Where each output channel reads one input channel they do not mind, and the channel
    takes all the room: the activations are rounded more finely.
    """
    w = np.abs(reader.input(1).array()).astype(np.float64)
    if reader.op.name == "conv":
        if int(reader.attr("group")) > 1:
            return room
        w = w.max(tuple(range(2, w.ndim))).T
    ranges = w.max(1)
    best, chosen = np.inf, np.ones_like(room)
    for level in np.quantile(ranges[ranges > 0], np.linspace(0, 1, 33)) if ranges.any() else ():
        f = np.clip(ranges / level, 1.0, room)
        loss = float(((w / f[:, None]).max(0) ** 2).sum() * (f * f * energy).sum())
        if loss < best:
            best, chosen = loss, f
    return chosen
