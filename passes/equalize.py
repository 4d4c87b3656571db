# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Cross-layer equalization: make the channels between two products alike in range.

For a product with weight rows of range r1 and the one after it with columns of range r2, both per
channel: s = sqrt(r1 / r2); W1 / s, b1 / s, s * W2. Only across operators that a positive factor
passes through (a clip at 6 does not let it).

Source: Nagel et al., arXiv 1906.04721, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.passes.calibrate import CalibrationSet
from qcompiler.passes.channel_scales import (
    divide_output,
    input_range,
    joints,
    multiply_input,
    output_range,
)
from qcompiler.passes.held_out import accept
from qcompiler.passmanager import Pass, PassContext
from qcompiler.plan import PrecisionPlan

LIMIT = 64.0
"""Greatest factor of one channel in one round: a nearly dead channel must not blow up."""


@dataclass(frozen=True)
class Equalize(Pass):
    """Equalize the ranges of channels between products."""

    name: ClassVar[str] = "equalize"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, PrecisionPlan)
    rounds: int = 20  # over all pairs, until nothing moves by more than 1 %
    runs: int = 32  # calibration runs for the comparison, at most

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Equalize, and undo it where held-out samples say that it is worse."""
        changed = graph.clone()
        pairs = [
            j for j in joints(changed) if j.producer.op.name != "layer_norm" and len(j.readers) == 1
        ]
        if not pairs:
            ctx.log.append(f"{self.name}: no two products follow each other closely enough")
            return False
        for _ in range(self.rounds):
            most = 1.0
            for pair in pairs:
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
        return accept(self.name, graph, changed, ctx, self.runs)
