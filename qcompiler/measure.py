# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The measured part of a compilation: accuracy and latency against float, and the report."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qcompiler import benchmark, data
from qcompiler.artifact import check_runnable
from qcompiler.cpu import default_threads, host_cpu
from qcompiler.dynamic import Dynamic
from qcompiler.energy import measure_energy
from qcompiler.errors import QCompilerError, UnsupportedByTargetError
from qcompiler.measure_network import error_along, ranges, reads
from qcompiler.modality import modality_report
from qcompiler.ort import Session
from qcompiler.passmanager import ProgressFn, no_progress
from qcompiler.runtime import CompiledModel
from qcompiler.types import Array, Precision

if TYPE_CHECKING:
    from qcompiler.driver import Quantized
    from qcompiler.onnx_import import ModelSource
    from qcompiler.plan import PrecisionPlan
    from qcompiler.targets.base import Built, Region

_PROFILES = 15


class OrtExecutor:
    """Runs the float model in ONNX Runtime on arrays in the order of its inputs and outputs."""

    def __init__(self, session: Session, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.session = session
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)

    def run(self, inputs: Sequence[Array], *, threads: int = 1) -> list[Array]:
        """Return the results in order; the session's own threads count."""
        del threads
        found = self.session.run(dict(zip(self.inputs, inputs, strict=True)), self.outputs)
        return [found[name] for name in self.outputs]


def float_model(
    compiled: CompiledModel,
    model: ModelSource,
    *,
    threads: int | None = None,
    quantized: bool = False,
) -> CompiledModel:
    """Return the original model behind the interface of a compiled one, run by ONNX Runtime.

    Args:
        compiled: The compiled model, whose inputs, outputs and batching are taken over.
        model: The original model.
        threads: Threads of ONNX Runtime.
        quantized: The model holds Q/DQ nodes: only basic optimisation gives right integers on
            every CPU.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
    """
    session = Session(
        _bytes_or_path(model),
        optimization="basic" if quantized else "all",
        threads=threads or default_threads(),
    )
    executor = OrtExecutor(session, tuple(compiled.inputs), tuple(compiled.outputs))
    return CompiledModel(compiled.artifact, executor=executor, threads=threads)


def _bytes_or_path(model: ModelSource) -> bytes | str:
    """Return what ONNX Runtime loads: a path (external data lies beside it) or the bytes."""
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model)
    proto: Any = getattr(model, "proto", model)
    data: bytes = proto.SerializeToString()
    return data


def _computed_in(region: Region, plan: PrecisionPlan) -> Precision:
    """Return a region's precision: the plan knows activations of 7 bits, the graph has ranges."""
    asked = {plan.precision(name) for name in region.nodes}
    if region.precision is Precision.W8A8 and Precision.W8A7 in asked:
        return Precision.W8A7
    return region.precision


def measured_report(
    compiled: CompiledModel,
    built: Built,
    result: Quantized,
    *,
    model: ModelSource,
    evaluate: data.Evaluation | Callable[[CompiledModel], float] | None,
    frozen: bool,
    seconds: float,
    pass_seconds: Sequence[tuple[str, float]] = (),
    progress: ProgressFn = no_progress,
) -> dict[str, Any]:
    """Measure a compiled model and return its report (fields: INTERFACE, `compile --json`).

    What cannot be measured on this machine is None, and `notes` says why. A model for another CPU
    is scored by the interpreter, which returns the same integers.
    """
    notes = list(result.log)
    report: dict[str, Any] = {
        "artifact": None,
        "target": compiled.target.name,
        "precision": result.plan.to_json()["nodes"],
        "metric": None,
        "latency_ms": {"compiled": None, "float": None},
        "size_bytes": _sizes(compiled, model),
        "memory_bytes": {"activations": built.memory},
        "nodes": [
            {
                "name": r.name,
                "ops": list(r.ops),
                "nodes": list(r.nodes),
                "precision": _computed_in(r, result.plan).value,
                "kernel": " ".join(r.symbols) or "interpreter",
                "macs": r.macs,
                "latency_ms": None,
                "reads": read,
            }
            for r, read in zip(built.regions, reads(built), strict=True)
        ],
        "ranges": ranges(result),
        "error_along": error_along(result),
        "calibration_samples": result.samples,
        "versions": dict(compiled.artifact.versions),
        "machine": {"cpu": host_cpu().name, "threads": default_threads(),
                    "python": platform.python_version()},
        "digests": dict(compiled.artifact.sources),
        "lock": None if compiled.artifact.lock is None else dict(compiled.artifact.lock),
        "assignment": None,
        "notes": notes,
    }  # fmt: skip
    reference = None
    source = model
    if frozen and result.float_graph is not None:
        from qcompiler.onnx_export import to_onnx

        source = to_onnx(result.float_graph)  # the original still has the frozen inputs
    try:
        reference = float_model(compiled, source, quantized=result.float_graph is None)
    except QCompilerError as error:
        notes.append(f"the float model could not be run for comparison: {error}")
    scored, why = runnable(compiled, built)
    if why:
        notes.append(f"{why}: accuracy is the interpreter's (the same integers), no latency")
    if evaluate is not None:
        progress("evaluate", 0, 2)
        report["metric"] = _metric(scored, reference, evaluate)
        progress("evaluate", 2, 2)
    if not why:
        reference = _timed(compiled, reference, notes)
        report["latency_ms"] = _latency(compiled, reference)
        report["energy"] = _energy(compiled, reference)
        _region_times(compiled, report["nodes"])
    report["modalities"] = modality_report(result, report["nodes"], built)
    report["seconds"] = {"total": seconds, "passes": dict(pass_seconds)}
    return report


def _timed(
    compiled: CompiledModel, reference: CompiledModel | None, notes: list[str]
) -> CompiledModel | None:
    """Return the float model if it takes the inputs that both are timed with, else note why not."""
    if reference is None:
        return None
    try:
        reference(compiled.timed_inputs())
    except QCompilerError as error:
        notes.append(f"the float model was not timed: {error}")
        return None
    return reference


def runnable(compiled: CompiledModel, built: Built) -> tuple[CompiledModel, str]:
    """Return a model that runs here, and why that is not the compiled one, if it is not."""
    try:
        check_runnable(compiled.target, "the model")
    except UnsupportedByTargetError as error:
        from qcompiler.targets.reference import GraphExecutor

        # Every target returns the interpreter's integers, so its accuracy is known without it.
        executor = GraphExecutor(built.graph)
        return CompiledModel(compiled.artifact, executor=executor), error.message
    return compiled, ""


def _sizes(compiled: CompiledModel, model: ModelSource) -> dict[str, int]:
    artifact = compiled.artifact
    members = artifact.members()
    from qcompiler.onnx_import_model import stored_bytes

    source = _bytes_or_path(model)
    size = len(source) if isinstance(source, bytes) else stored_bytes(source)
    return {
        "artifact": sum(len(m) for m in members.values()),
        "parameters": len(artifact.params.data),
        "library": len(artifact.library or b""),
        "model": size,
    }


def _metric(
    compiled: CompiledModel,
    reference: CompiledModel | None,
    evaluate: data.Evaluation | Callable[[CompiledModel], float],
) -> dict[str, Any]:
    before = None
    if not isinstance(evaluate, data.Evaluation) and reference is not None:
        before = float(evaluate(reference))
    return scored(compiled, reference, evaluate, before)


def scored(
    compiled: CompiledModel,
    reference: data.Runner | None,
    evaluate: data.Evaluation | Callable[[CompiledModel], float],
    before: float | None = None,
) -> dict[str, Any]:
    """Return what a model scores, as a report's `metric`.

    Args:
        compiled: The model.
        reference: Runs the float model.
        evaluate: Samples and metric, or a callable that scores a model.
        before: What a callable gave the float model.
    """
    if not isinstance(evaluate, data.Evaluation):
        score = float(evaluate(compiled))
        drop = None if before is None else before - score
        return {"name": "custom", "float": before, "compiled": score, "drop": drop}
    specs = data.InputSpec.of(compiled.inputs)
    dynamic = compiled.artifact.dynamic
    if dynamic is not None:
        specs = _as_sampled(specs, dynamic, evaluate)
    return data.compare(compiled, reference, evaluate, inputs=specs)


def _as_sampled(
    specs: tuple[data.InputSpec, ...], dynamic: Dynamic, evaluate: data.Evaluation
) -> tuple[data.InputSpec, ...]:
    """Give inputs with dynamic extents the extents of the samples."""
    shapes = data.load_samples(evaluate.samples).shapes()
    out = []
    for spec in specs:
        shape, found = list(spec.shape), shapes.get(spec.name, spec.shape)
        for axis in dynamic.inputs.get(spec.name, {}):
            if len(found) in (len(shape), len(shape) + 1):
                shape[axis] = found[len(found) - len(shape) + axis]
        out.append(dataclasses.replace(spec, shape=tuple(shape)))
    return tuple(out)


def _latency(compiled: CompiledModel, reference: CompiledModel | None) -> dict[str, Any]:
    inputs = compiled.timed_inputs()
    runners = {"compiled": lambda: compiled(inputs)}
    if reference is not None:
        runners["float"] = lambda: reference(inputs)
    threads = default_threads()
    timed = benchmark.in_turn(runners, threads=threads)
    found: dict[str, Any] = {name: t.median_ms for name, t in timed.items()}
    found.setdefault("float", None)
    found["float_runner"] = "onnxruntime" if reference is not None else None
    found["threads"] = threads
    found["runs"] = timed["compiled"].runs
    found["min"] = {name: t.min_ms for name, t in timed.items()}
    return found


def _energy(compiled: CompiledModel, reference: CompiledModel | None) -> dict[str, Any]:
    """Return the energy of one call of both models; see `qcompiler.energy`."""
    inputs = compiled.timed_inputs()
    runners = {"compiled": lambda: compiled(inputs)}
    if reference is not None:
        runners["float"] = lambda: reference(inputs)
    return measure_energy(runners)


def _region_times(compiled: CompiledModel, nodes: list[dict[str, Any]]) -> None:
    """Fill in each region's own latency from instrumented runs: the least time of each call."""
    calls = iter(compiled.profile(runs=_PROFILES))
    for node in nodes:
        symbols = node["kernel"].split()
        # `symbols` first: zip must not take a call that belongs to the next region.
        seconds = [s for name, (called, s) in zip(symbols, calls, strict=False) if called == name]
        node["latency_ms"] = sum(seconds) * 1e3 if len(seconds) == len(symbols) else None
