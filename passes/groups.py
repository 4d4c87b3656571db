# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Give 4-bit weights a factor per group where one scale per channel loses the network.

One scale per channel costs nothing, and what rounding to 4 bits loses with it the other methods win
back in most networks: rounded to nearest, these leave errors of a few percent of the outputs. Some
networks (MobileNet, whose channels have few weights each) are left with nothing of their outputs,
and what is won back then stays behind float by points. For those a factor for every eight weights
is worth half a bit of each and, where products are sums in int16, a tenth of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.errors import UsageError
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.passes.calibrate import CalibrationSet
from qcompiler.passes.held_out import Judge, calibrated, quantized, shares, verdict
from qcompiler.passes.keep_float import AskedFor
from qcompiler.passes.method import Method
from qcompiler.passmanager import PassContext
from qcompiler.plan import Decision, PrecisionPlan, integer_group
from qcompiler.types import Precision


@dataclass(frozen=True)
class Groups(Method):
    """Turn `w4a8` into `w4a8-group` where rounding to nearest loses the outputs."""

    name: ClassVar[str] = "groups"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    requires: ClassVar[tuple[type, ...]] = (CalibrationSet, PrecisionPlan)
    provides: ClassVar[tuple[type, ...]] = (PrecisionPlan,)
    beyond: float = 0.25  # squared error of the outputs over their squared magnitude
    runs: int = 32  # calibration runs for the ranges of activations, at most

    def __post_init__(self) -> None:
        if not self.beyond >= 0.0:
            raise UsageError(f"groups: beyond is {self.beyond}, expected a number from 0 on")

    def improve(self, graph: Graph, ctx: PassContext) -> bool:
        """Measure, and change the plan where too much is lost and groups lose less."""
        plan = ctx.get(PrecisionPlan)
        asked = (ctx.find(AskedFor) or AskedFor()).nodes
        names = [
            n.name
            for n in graph.nodes
            if plan.precision(n.name) is Precision.W4A8
            and n.name not in asked
            and n.op.name in ("conv", "matmul")
            and integer_group(n) is not None
        ]
        if not names:
            return False
        work, held_out = shares(ctx.get(CalibrationSet), self.runs)
        judge, table = Judge(graph, list(held_out)), calibrated(graph, work)
        before = judge.error(quantized(graph, plan, table))
        if before <= self.beyond:
            ctx.log.append(
                f"{self.name}: not needed (relative error held out {before:.3g} with weights "
                f"rounded to nearest, up to {self.beyond:g} is left to other methods)"
            )
            return False
        reason = (
            f"int4 weights by groups, int8 activations: with one scale per channel, rounded to "
            f"nearest, the outputs' relative error is {before:.3g}"
        )
        grouped = plan.replaced({name: Decision(Precision.W4A8_GROUP, reason) for name in names})
        kept, line = verdict(self.name, before, judge.error(quantized(graph, grouped, table)))
        ctx.log.append(f"{line}; {len(names)} products" if kept else line)
        if kept:
            ctx.put(grouped)
        return False
