# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Regions of a model with several inputs: what depends on one alone, and where they meet.

A picture, a sentence and a sensor go through networks of different kinds before they are joined,
and lose different amounts to the same number format. Every node is labelled with the inputs that
its results depend on; nodes with the same label are a region. Precisions can be asked for by
region (`input:image`, `fusion`), and the report shows size, latency and error of each.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.interpreter import run
from qcompiler.ir import Graph, Node, Value
from qcompiler.metrics import SQNR_CEILING
from qcompiler.ops import OpKind
from qcompiler.types import Precision

if TYPE_CHECKING:
    from qcompiler.driver import Quantized
    from qcompiler.plan import PrecisionPlan
    from qcompiler.targets.base import Built

FUSION = "fusion"
"""Selector of every node that depends on more than one input."""
PREFIX = "input:"
"""Selectors of one region: `input:` and the names of its inputs, joined by `+`."""
SECONDS = 4.0
"""Wall time after which no further sample is run for a region's error."""
_RUNS = 16
_PRODUCTS = (OpKind.COMPUTE, OpKind.RECURRENT)


@dataclass(frozen=True, slots=True)
class Modality:
    """A region of a model.

    Attributes:
        inputs: Names of the inputs that its results depend on, sorted.
        nodes: Its nodes, in the graph's order.
        kind: "recurrent", "attention", "convolutional" or "dense": what its products are part of.
    """

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    kind: str

    @property
    def name(self) -> str:
        """The selector that selects it."""
        return PREFIX + "+".join(self.inputs)

    @property
    def fused(self) -> bool:
        """Whether inputs meet in it."""
        return len(self.inputs) > 1


def labels(graph: Graph) -> dict[Node, frozenset[str]]:
    """Return the inputs that each node's results depend on."""
    of: dict[Value, frozenset[str]] = {v: frozenset({v.name}) for v in graph.inputs}
    found: dict[Node, frozenset[str]] = {}
    for node in graph.nodes:
        found[node] = frozenset().union(*(of.get(v, frozenset()) for v in node.operands))
        of.update(dict.fromkeys(node.outputs, found[node]))
    return found


def modalities(graph: Graph) -> tuple[Modality, ...]:
    """Return the regions that hold products, in the order of their first nodes.

    Nodes of a label without products (a state that is only reshaped, a mask) belong to the region
    that takes them in: the smallest one that depends on their inputs too.
    """
    label_of = labels(graph)
    holding = {label for node, label in label_of.items() if node.op.kind in _PRODUCTS}
    nodes: dict[frozenset[str], list[Node]] = {}
    for node, label in label_of.items():
        home = label
        if label not in holding:
            above = [h for h in holding if label < h]
            if not above:
                continue
            home = min(above, key=lambda h: (len(h), sorted(h)))
        nodes.setdefault(home, []).append(node)
    return tuple(
        Modality(tuple(sorted(label)), tuple(members), _kind(members))
        for label, members in nodes.items()
    )


def _kind(nodes: Sequence[Node]) -> str:
    if any(n.op.kind is OpKind.RECURRENT for n in nodes):
        return "recurrent"
    names = {n.op.name for n in nodes}
    if "softmax" in names and "matmul" in names:
        return "attention"
    return "convolutional" if "conv" in names or "conv_transpose" in names else "dense"


def is_regional(selector: str) -> bool:
    """Whether a selector names regions, not nodes."""
    return selector == FUSION or selector.startswith(PREFIX)


def select(graph: Graph, selector: str) -> list[Node]:
    """Return the nodes of the regions that a selector names; empty where there is none."""
    if selector == FUSION:
        return [n for m in modalities(graph) if m.fused for n in m.nodes]
    wanted = tuple(sorted(selector.removeprefix(PREFIX).split("+")))
    return [n for m in modalities(graph) if m.inputs == wanted for n in m.nodes]


# ---------------------------------------------------------------------------------- the report


def modality_report(
    result: Quantized, kernels: Sequence[Mapping[str, Any]], built: Built
) -> list[dict[str, Any]] | None:
    """Return size, latency, precisions and error of each region, as JSON.

    Args:
        result: The quantized model.
        kernels: The report's `nodes`: kernels with the names of the model's nodes and latencies.
        built: What the backend made of it.

    Returns:
        Per region `name`, `inputs`, `kind`, `nodes`, `precisions` (precision -> products),
        `weight_bytes` (as stored), `parameter_bytes` (as packed for the kernels, with their tables
        and scales), `latency_ms`, and `sqnr_alone`: the signal-to-noise ratio (dB) of the worst
        output when only this region is quantized as the plan says. None for a model of one region.
    """
    graph = result.float_graph
    if graph is None:
        return None
    found = modalities(graph)
    if len(found) < 2:
        return None
    times = latencies(found, kernels)
    sizes = parameter_bytes(found, built)
    return [
        {
            "name": m.name,
            "inputs": list(m.inputs),
            "kind": m.kind,
            "fusion": m.fused,
            "nodes": len(m.nodes),
            "precisions": dict(
                Counter(
                    result.plan.precision(n.name).value for n in m.nodes if n.op.kind in _PRODUCTS
                )
            ),
            "weight_bytes": _weight_bytes(m, result.plan),
            "parameter_bytes": sizes[m],
            "latency_ms": times[m],
            "sqnr_alone": sqnr_alone(result, m),
        }
        for m in found
    ]


def _weight_bytes(m: Modality, plan: PrecisionPlan) -> int:
    bits = 0
    for node in m.nodes:
        product = node.op.kind in _PRODUCTS
        held = plan.precision(node.name) if product else Precision.FP32
        for i, v in enumerate(node.inputs):
            if v is not None and v.is_constant:
                bits += v.type.size * (held.weight_bits if product and i == 1 else v.dtype.bits)
    return bits // 8


def _places(found: Sequence[Modality]) -> dict[str, int]:
    """Return node, or node of the imported model -> index of its region."""
    return {name: k for k, m in enumerate(found) for n in m.nodes for name in (n.name, *n.sources)}


def latencies(
    found: Sequence[Modality], kernels: Sequence[Mapping[str, Any]]
) -> dict[Modality, float | None]:
    """Return the ms of each region's kernels; one that joins regions counts for the last."""
    place = _places(found)
    sums: dict[Modality, float | None] = dict.fromkeys(found)
    for kernel in kernels:
        latency = kernel.get("latency_ms")
        homes = [place[n] for n in (kernel["name"], *kernel["nodes"]) if n in place]
        if latency is None or not homes:
            continue
        home = found[max(homes)]
        sums[home] = (sums[home] or 0.0) + float(latency)
    return sums


def parameter_bytes(found: Sequence[Modality], built: Built) -> dict[Modality, int]:
    """Return the bytes of each region's packed parameters; shared ones count where first read."""
    place = _places(found)
    homes: dict[str, list[int]] = {}
    for region in built.regions:
        homes[region.name] = [place[n] for n in (region.name, *region.nodes) if n in place]
    for node in built.graph.nodes:
        names = (node.name, *node.sources)
        here = homes.get(node.name) or [place[n] for n in names if n in place]
        homes.setdefault(node.name, here)
        for v in node.operands:
            if v.is_constant:
                homes.setdefault(v.name, here)
    sizes = dict.fromkeys(found, 0)
    for name, array in zip(built.parameter_names, built.parameters, strict=True):
        # "NODE.3": a constant packed for that node's kernel; else a constant of the graph.
        where = homes.get(name.rpartition(".")[0]) or homes.get(name)
        if where:
            sizes[found[max(where)]] += array.nbytes
    return sizes


def sqnr_alone(result: Quantized, region: Modality) -> float | None:
    """Return the SQNR (dB) of the worst output when only one region follows the plan.

    The other regions stay float. The first calibration samples run through the interpreter.

    Returns:
        None where there are no samples, where the region stays float anyway, or where methods have
        changed the weights that the calibration table was made with.
    """
    graph, table, samples = result.float_graph, result.table, result.calibration
    inside = {n.name for n in region.nodes}
    kept = {n: result.plan.precision(n) for n in inside}
    if graph is None or samples is None or table is None or result.methods:
        return None
    if all(p is Precision.FP32 for p in kept.values()):
        return None
    quantized, _ = with_plan(result, graph, inside)
    noise: dict[str, float] = {}
    signal: dict[str, float] = {}
    started = time.perf_counter()
    for done, batch in enumerate(samples):
        if done >= _RUNS or (done and time.perf_counter() - started > SECONDS):
            break
        want, got = run(graph, batch.inputs), run(quantized, batch.inputs)
        for name, array in want.items():
            if array.dtype.kind != "f":
                continue
            exact = array.astype(np.float64)
            error = got[name].astype(np.float64) - exact
            signal[name] = signal.get(name, 0.0) + float(np.sum(exact**2))
            noise[name] = noise.get(name, 0.0) + float(np.sum(error**2))
    levels = [_level(signal[name], noise[name]) for name in signal if signal[name]]
    return min(levels, default=None)


def _level(signal: float, noise: float) -> float:
    if noise == 0:
        return SQNR_CEILING
    return round(min(float(10 * np.log10(signal / noise)), SQNR_CEILING), 3)


def with_plan(
    result: Quantized, graph: Graph, inside: Collection[str]
) -> tuple[Graph, PrecisionPlan]:
    """Return the graph quantized by the plan inside a region and float outside, and that plan."""
    from qcompiler.passes.calibrate import Calibrate
    from qcompiler.passes.insert_qdq import quantize_passes
    from qcompiler.passmanager import PassContext, PassManager
    from qcompiler.plan import Decision, PrecisionPlan

    outside = Decision(Precision.FP32, "another region")
    plan = result.plan.replaced({n: outside for n in result.plan if n not in inside})
    ctx = PassContext()
    ctx.put(plan)
    if result.table is not None:
        ctx.put(result.table)
    passes = [p for p in quantize_passes(plan) if not isinstance(p, Calibrate)]
    shaped = PassManager(passes, given=tuple(ctx.artifacts)).run(graph, ctx)
    return shaped, ctx.get(PrecisionPlan)
