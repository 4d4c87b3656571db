# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Limits of single regions in the search for a plan: what the solver keeps, what is measured.

Size and latency of a region are sums over its kernels, so the exact program keeps limits on them,
and the built model is held against them. The drop that a region causes alone is measured by the
model in which this region follows the plan and everything else is float; the limit on the region's
loss that the program keeps follows from the curve between loss and drop, and moves down where the
measured drop breaks the limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qcompiler.assign import Limits, Solution
from qcompiler.data import Budget
from qcompiler.decisions import FLOAT, Network
from qcompiler.latency import runs_here
from qcompiler.modality import latencies, modalities, parameter_bytes, select
from qcompiler.regional import RegionOptions, limits_of
from qcompiler.workshop import Figures, Judge, Trial, Workshop

if TYPE_CHECKING:
    from qcompiler.ir import Graph
    from qcompiler.search import Curve

__all__ = ["Regional"]

_PROFILES = 10
_DOWN = 0.8
"""Factor on a region's loss below which the next solution is looked for after one that broke it."""


@dataclass
class Regional:
    """The regions with limits.

    Attributes:
        limits: Selector -> its limits.
        nodes: Selector -> names of its nodes.
        losses: Selector -> limit on its loss that was learned.
    """

    limits: dict[str, Budget] = field(default_factory=dict)
    nodes: dict[str, frozenset[str]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, regions: Mapping[str, RegionOptions]) -> Regional:
        """Return the regions of a graph that have limits."""
        limits = limits_of(regions)
        return cls(limits, {s: frozenset(n.name for n in select(graph, s)) for s in limits})

    def bounds(self, curve: Curve, most: float) -> dict[str, Limits]:
        """Return what the program keeps; `most` is the greatest loss that there is."""
        found = {}
        for selector, budget in self.limits.items():
            loss = self.losses.get(selector, math.inf)
            if budget.max_drop is not None:
                loss = min(loss, curve.loss(budget.max_drop, most))
                loss = math.inf if loss >= most else loss
            found[selector] = Limits(
                latency=_scaled(budget.max_latency_ms, 1e-3),
                loss=loss,
                size=_scaled(budget.max_size_mb, 1e6),
            )
        return found

    def measure(
        self, network: Network, workshop: Workshop, judge: Judge, trial: Trial,
        choices: Mapping[str, str], *, drops: bool = True,
    ) -> dict[str, Figures]:  # fmt: skip
        """Return what the regions of a joint model cost; drops cost a build each."""
        if not self.limits:
            return {}
        kernels = _kernels(trial) if self._any("max_latency_ms") else []
        found = modalities(network.graph)
        times, sizes = latencies(found, kernels), parameter_bytes(found, trial.built)
        out = {}
        for selector, budget in self.limits.items():
            own = [m for m in found if m.nodes[0].name in self.nodes[selector]]
            known = [t for m in own if (t := times[m]) is not None]
            drop = None
            if budget.max_drop is not None and drops:
                drop = self._alone(network, workshop, judge, selector, choices).drop
            out[selector] = Figures(
                drop=drop,
                seconds=sum(known) * 1e-3 if known else None,
                size=float(sum(sizes[m] for m in own)),
            )
        return out

    def broken(self, figures: Mapping[str, Figures]) -> dict[str, float]:
        """Return the limits that are not kept: "SELECTOR max_drop" -> what was found."""
        over: dict[str, float] = {}
        for selector, found in figures.items():
            for name, value in found.broken(self.limits[selector]).items():
                over[f"{selector} {name}"] = value
        return over

    def learn(self, figures: Mapping[str, Figures], solution: Solution) -> str:
        """Move the limits on the losses of regions whose drop was too much; say so."""
        moved = []
        for selector, found in figures.items():
            if "max_drop" in found.broken(self.limits[selector]):
                self.losses[selector] = solution.groups[selector].loss * _DOWN
                moved.append(selector)
        return f"the limit on the loss of {', '.join(moved)} moves down" if moved else ""

    def to_json(
        self, network: Network, solution: Solution, figures: Mapping[str, Figures]
    ) -> dict[str, Any] | None:
        """Return the decision log's `regions`."""
        if not self.limits:
            return None
        return {
            selector: {
                "limits": {k: v for k, v in vars(budget).items() if v is not None},
                "predicted": {
                    "loss": solution.groups[selector].loss,
                    "latency_ms": solution.groups[selector].latency * 1e3,
                    "size_bytes": round(solution.groups[selector].size),
                },
                "measured": figures[selector].to_json() if selector in figures else None,
                "products": sum(
                    1 for n in network.problem.groups[selector].items if n in network.products
                ),
            }
            for selector, budget in self.limits.items()
        }

    def _any(self, name: str) -> bool:
        return any(getattr(b, name) is not None for b in self.limits.values())

    def _alone(
        self, network: Network, workshop: Workshop, judge: Judge, selector: str,
        choices: Mapping[str, str],
    ) -> Figures:  # fmt: skip
        """Return the figures of the model in which one region alone follows the choice."""
        inside = network.problem.groups[selector].items
        alone = {n: p if n in inside else FLOAT for n, p in choices.items()}
        return judge.judge(workshop.make(network.plan(alone, {})))


def _scaled(limit: float | None, factor: float) -> float:
    return math.inf if limit is None else limit * factor


def _kernels(trial: Trial) -> list[dict[str, Any]]:
    """Return the built model's kernels with their times, as reports have them."""
    if not runs_here(trial.compiled):
        return []
    calls = iter(trial.compiled.profile(runs=_PROFILES))
    found = []
    for r in trial.built.regions:
        seconds = [s for _, (_, s) in zip(r.symbols, calls, strict=False)]
        found.append({"name": r.name, "nodes": r.nodes, "latency_ms": sum(seconds) * 1e3})
    return found
