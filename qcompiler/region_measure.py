# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What regions of a built model cost: time of their kernels, packed parameters, drop alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcompiler.driver import Quantized, assemble, build_graph
from qcompiler.measure import OrtExecutor, runnable, scored
from qcompiler.modality import modalities, select, with_plan
from qcompiler.ort import Session
from qcompiler.passmanager import ProgressFn, no_progress
from qcompiler.regional import RegionOptions
from qcompiler.runtime import CompiledModel
from qcompiler.targets.base import Backend
from qcompiler.types import Array, Precision

if TYPE_CHECKING:
    from qcompiler.data import Evaluation

__all__ = ["Replay", "measure_regions"]

Score = Callable[[CompiledModel], float]


class Replay:
    """A runner that runs once per batch and then repeats its answers in the same order."""

    def __init__(self, run: Callable[[Mapping[str, Array]], Mapping[str, Array]]) -> None:
        self._run = run
        self._kept: list[dict[str, Array]] = []
        self._at = 0

    def rewind(self) -> None:
        """Go back to the first batch."""
        self._at = 0

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return the answer to the next batch."""
        if self._at == len(self._kept):
            self._kept.append({n: a.copy() for n, a in self._run(inputs).items()})
        self._at += 1
        return self._kept[self._at - 1]


def measure_regions(
    report: dict[str, Any],
    result: Quantized,
    backend: Backend,
    compiled: CompiledModel,
    evaluate: Evaluation | Score | None,
    regions: Mapping[str, RegionOptions],
    progress: ProgressFn = no_progress,
) -> None:
    """Add to a report what each region costs.

    `modalities` gets `drop_alone`: the drop of the metric when only this region is quantized, by a
    model that is built so; None without an evaluation, and where `sqnr_alone` is None. `regions`
    gets the limits asked for, and what was found.

    Args:
        report: Of `measured_report`.
        result: The quantized model.
        backend: Builds it.
        compiled: The model.
        evaluate: What scores it.
        regions: What was asked of regions.
        progress: Called per region.
    """
    entries = report.get("modalities")
    graph = result.float_graph
    if not entries or graph is None:
        return
    alone = _Alone(result, backend, compiled, evaluate, report)
    found = modalities(graph)
    for i, (entry, m) in enumerate(zip(entries, found, strict=True)):
        progress("regions", i, len(found))
        entry["drop_alone"] = alone.drop({n.name for n in m.nodes})
    progress("regions", len(found), len(found))
    asked: dict[str, Any] = {}
    for selector, options in regions.items():
        inside = {n.name for n in select(graph, selector)}
        own = [e for e, m in zip(entries, found, strict=True) if m.nodes[0].name in inside]
        asked[selector] = {
            "observer": options.observer,
            "percentile": options.percentile,
            "limits": {n: v for n, v in vars(options.budget).items() if v is not None},
            "found": {
                "max_drop": own[0]["drop_alone"] if len(own) == 1 else alone.drop(inside),
                "max_latency_ms": _sum([e["latency_ms"] for e in own]),
                "max_size_mb": _sum([e["parameter_bytes"] for e in own], 1e-6),
            },
        }
    report["regions"] = asked or None


def _sum(figures: Sequence[float | None], factor: float = 1.0) -> float | None:
    known = [f for f in figures if f is not None]
    return sum(known) * factor if known else None


class _Alone:
    """Builds and scores the model in which one region is quantized and the others are float."""

    def __init__(
        self,
        result: Quantized,
        backend: Backend,
        compiled: CompiledModel,
        evaluate: Evaluation | Score | None,
        report: Mapping[str, Any],
    ) -> None:
        self.result = result
        self.backend = backend
        self.compiled = compiled
        self.evaluate = evaluate
        self.whole = report.get("metric") or {}
        self.known: dict[frozenset[str], float | None] = {}
        self.reference: Replay | None = None

    def drop(self, inside: Collection[str]) -> float | None:
        """Return the drop with these nodes as planned and all others float."""
        key = frozenset(inside)
        if key not in self.known:
            self.known[key] = self._drop(key)
        return self.known[key]

    def _drop(self, inside: frozenset[str]) -> float | None:
        result, graph = self.result, self.result.float_graph
        plan = result.plan
        if graph is None or self.evaluate is None or result.methods:
            return None
        if result.table is None and plan.has_integers:
            return None
        planned = {n for n in plan if plan.precision(n) is not Precision.FP32}
        if not planned & inside:
            return 0.0
        if planned <= inside:
            whole = self.whole.get("drop")
            return None if whole is None else float(whole)
        quantized, kept = with_plan(result, graph, inside)
        built = build_graph(quantized, self.backend)
        part = Quantized(graph, quantized, kept, dict(result.sources))
        model, _ = runnable(assemble(built, self.backend.spec, part), built)
        if self.reference is None:
            self.reference = Replay(self._float())
        self.reference.rewind()
        before = self.whole.get("float")
        found = scored(model, self.reference, self.evaluate, before)["drop"]
        return None if found is None else float(found)

    def _float(self) -> CompiledModel:
        from qcompiler.onnx_export import to_onnx

        assert self.result.float_graph is not None
        session = Session(to_onnx(self.result.float_graph).SerializeToString())
        names = tuple(self.compiled.inputs), tuple(self.compiled.outputs)
        return CompiledModel(self.compiled.artifact, executor=OrtExecutor(session, *names))
