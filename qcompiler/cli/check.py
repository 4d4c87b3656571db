# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile check`: the gate of a CI job, an artifact held against the float model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from xml.etree import ElementTree

import typer
from rich.markup import escape
from rich.table import Table

from qcompiler.cli import options, shell
from qcompiler.errors import DataError, QCompilerError, UsageError

if TYPE_CHECKING:
    from qcompiler.data import Evaluation
    from qcompiler.runtime import CompiledModel


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check.

    Attributes:
        name: "accuracy" or "latency".
        passed: Whether the limit is kept; True where there is no limit.
        found: The figure that is held against the limit.
        limit: The limit, or None.
        message: The figures as a sentence.
        seconds: How long the check took.
    """

    name: str
    passed: bool
    found: float
    limit: float | None
    message: str
    seconds: float


def check(
    artifact: options.ArtifactArgument,
    model: options.ModelArgument,
    evaluate: options.EvaluateOption = None,
    metric: options.MetricOption = None,
    max_drop: options.MaxDropOption = None,
    max_latency_ratio: Annotated[
        float | None,
        typer.Option(
            "--max-latency-ratio",
            metavar="R",
            help="Largest latency relative to the float model in ONNX Runtime; 1.0: not slower.",
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", min=1, help="Threads for the latencies.")
    ] = 1,
    junit: Annotated[
        Path | None,
        typer.Option("--junit", metavar="F", help="Write the verdicts as JUnit XML."),
    ] = None,
    progress: options.ProgressOption = None,
    json_output: options.JsonOption = False,
) -> int:
    """Check an artifact against its float model: accuracy on samples, and latency.

    Exit status 1 if a limit is not kept. Without limits the figures are printed and nothing fails.
    """
    options.require_metric(evaluate, metric, max_drop)
    if evaluate is None and max_latency_ratio is None:
        raise UsageError(
            "nothing to check", hint="give --evaluate and --metric, or --max-latency-ratio, or both"
        )
    if max_latency_ratio is not None and not 0 < max_latency_ratio < math.inf:
        raise UsageError(f"--max-latency-ratio {max_latency_ratio}: expected a number above 0")
    shell.input_file(artifact, "artifact")
    shell.input_file(model, "model")
    if junit is not None:
        shell.output_file(junit, "JUnit file")

    import qcompiler
    from qcompiler.data import Evaluation

    compiled = qcompiler.load(artifact)
    if _other_model(compiled, model):
        shell.say(f"note: {artifact} was compiled from another model than {model}")
    found: dict[str, Any] = {"artifact": str(artifact), "model": str(model), "metric": None}
    verdicts: list[Verdict] = []
    with shell.ProgressBars(progress) as bars:
        if evaluate is not None and metric is not None:
            with shell.Stopwatch() as watch:
                bars("evaluate", 0, 1)
                found["metric"] = accuracy(compiled, model, Evaluation(evaluate, metric))
                bars("evaluate", 1, 1)
            verdicts.append(_accuracy_verdict(found["metric"], max_drop, watch.seconds))
        if max_latency_ratio is not None:
            with shell.Stopwatch() as watch:
                found["latency_ms"] = latency(compiled, artifact, model, threads, bars)
            verdicts.append(_latency_verdict(found["latency_ms"], max_latency_ratio, watch.seconds))
    passed = all(v.passed for v in verdicts)
    found.update(passed=passed, checks=[asdict(v) for v in verdicts], versions=shell.versions())
    shell.emit(found)
    if junit is not None:
        from qcompiler.artifact import atomic_write

        with atomic_write(junit) as file:
            file.write(to_junit(verdicts, str(artifact)))
    if not json_output:
        table = Table(title=f"{artifact} against {model}")
        for heading in ("check", "", "figures"):
            table.add_column(heading)
        for verdict in verdicts:
            mark = "[green]passed[/]" if verdict.passed else "[red]failed[/]"
            table.add_row(verdict.name, mark, escape(verdict.message))
        shell.out_console().print(table)
    return shell.DONE if passed else shell.NOT_MET


def accuracy(compiled: CompiledModel, model: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Return {name, float, compiled, drop} of the metric on the samples."""
    from qcompiler.data import compare
    from qcompiler.measure import float_model
    from qcompiler.onnx_import import read_model

    operators = {node.op_type for node in read_model(model).proto.graph.node}
    quantized = bool(operators & {"QuantizeLinear", "DequantizeLinear"})
    reference = float_model(compiled, model, quantized=quantized)
    return dict(compare(compiled, reference, evaluation))


def latency(
    compiled: CompiledModel, artifact: Path, model: Path, threads: int, bars: shell.ProgressBars
) -> dict[str, Any]:
    """Return the medians of artifact and float model, interleaved, and their ratio."""
    from qcompiler.cli.bench import measure
    from qcompiler.peers import OURS

    outcomes = measure(compiled, artifact, model, ("onnxruntime",), threads, 50, None, bars)
    ours, theirs = outcomes[OURS].timing, outcomes["onnxruntime"].timing
    if ours is None or theirs is None:
        problem = outcomes[OURS].problem or outcomes["onnxruntime"].problem
        raise QCompilerError(f"the latency could not be measured: {problem}")
    return {
        "compiled": ours.median_ms,
        "float": theirs.median_ms,
        "ratio": ours.median_ms / theirs.median_ms,
        "float_runner": "onnxruntime",
        "threads": threads,
    }


def _accuracy_verdict(metric: dict[str, Any], max_drop: float | None, seconds: float) -> Verdict:
    drop = metric["drop"]
    if drop is None or not math.isfinite(drop):
        raise DataError(f"metric {metric['name']} gives no number on these samples: {metric}")
    before = metric.get("float")
    message = f"{metric['name']} {metric['compiled']:.4g}"
    if before is not None:
        message += f", float {before:.4g}"
    message += f", drop {drop:.4g}"
    if max_drop is not None:
        message += f", allowed {max_drop:g}"
    passed = max_drop is None or drop <= max_drop
    return Verdict("accuracy", passed, float(drop), max_drop, message, seconds)


def _latency_verdict(figures: dict[str, Any], limit: float, seconds: float) -> Verdict:
    ratio = float(figures["ratio"])
    message = (
        f"{figures['compiled']:.3g} ms, float {figures['float']:.3g} ms ({figures['threads']} "
        f"thread), ratio {ratio:.3g}, allowed {limit:g}"
    )
    return Verdict("latency", ratio <= limit, ratio, limit, message, seconds)


def _other_model(compiled: CompiledModel, model: Path) -> bool:
    source = compiled.artifact.sources.get("model")
    return source is not None and source != shell.sha256(model)


def to_junit(verdicts: Sequence[Verdict], suite: str) -> bytes:
    """Return the verdicts as a JUnit XML document in UTF-8."""
    failures = sum(not v.passed for v in verdicts)
    root = ElementTree.Element("testsuites", tests=str(len(verdicts)), failures=str(failures))
    group = ElementTree.SubElement(
        root,
        "testsuite",
        name="qcompile check",
        tests=str(len(verdicts)),
        failures=str(failures),
        errors="0",
        skipped="0",
        time=f"{sum(v.seconds for v in verdicts):.3f}",
    )
    for verdict in verdicts:
        case = ElementTree.SubElement(
            group, "testcase", classname=suite, name=verdict.name, time=f"{verdict.seconds:.3f}"
        )
        if verdict.passed:
            ElementTree.SubElement(case, "system-out").text = verdict.message
        else:
            ElementTree.SubElement(case, "failure", message=verdict.message, type="limit")
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"
