# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile check`: the gate of a CI job, an artifact held against the float model."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from qcompiler.cli import options, shell
from qcompiler.cli.junit import Verdict, to_junit
from qcompiler.errors import DataError, QCompilerError, UsageError

if TYPE_CHECKING:
    from qcompiler.data import Evaluation
    from qcompiler.runtime import CompiledModel


def check(
    artifact: options.ArtifactArgument,
    model: options.ModelArgument,
    evaluate: options.EvaluateOption = None,
    metric: options.MetricOption = None,
    max_drop: options.MaxDropOption = None,
    max_slice_drop: options.MaxSliceDropOption = None,
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
    options.require_metric(evaluate, metric, max_drop, max_slice_drop)
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
    from qcompiler.data import Evaluation, load_samples
    from qcompiler.example import example_of

    compiled = qcompiler.load(artifact)
    same = not _other_model(compiled, model)
    if not same:
        shell.say(f"note: {artifact} was compiled from another model than {model}")
    found: dict[str, Any] = {
        "artifact": str(artifact),
        "model": str(model),
        "same_model": same,
        "metric": None,
        "latency_ms": None,
    }
    verdicts: list[Verdict] = []

    def measure_accuracy() -> list[Verdict]:
        if evaluate is None or metric is None:
            return []
        with shell.Stopwatch() as watch:
            bars("evaluate", 0, 1)
            figures = accuracy(compiled, model, Evaluation(evaluate, metric))
            bars("evaluate", 1, 1)
        found["metric"] = figures
        return accuracy_verdicts(figures, max_drop, max_slice_drop, watch.seconds)

    def measure_latency() -> list[Verdict]:
        if max_latency_ratio is None:
            return []
        if evaluate is not None:
            compiled.example = example_of(compiled.inputs, load_samples(evaluate))
        with shell.Stopwatch() as watch:
            found["latency_ms"] = latency(compiled, artifact, model, threads, bars)
        return [latency_verdict(found["latency_ms"], max_latency_ratio, watch.seconds)]

    def write_junit() -> None:
        if junit is None:
            return
        from qcompiler.artifact import atomic_write

        properties = {
            "model": model,
            "artifact.sha256": shell.sha256(artifact),
            "target": compiled.target.name,
            **({} if evaluate is None else {"evaluate": evaluate, "metric": metric}),
            **{f"version.{name}": version for name, version in shell.versions().items()},
        }
        with atomic_write(junit) as file:
            file.write(to_junit(verdicts, str(artifact), properties))

    with shell.ProgressBars(progress) as bars:
        for name, measure in (("accuracy", measure_accuracy), ("latency", measure_latency)):
            try:
                verdicts += measure()
            except QCompilerError as error:
                # A gate that ends without a file of results looks like one that never ran.
                verdicts.append(Verdict(name, False, None, None, "", 0.0, problem=str(error)))
                write_junit()
                raise
    passed = all(v.passed for v in verdicts)
    checks = [{**asdict(v), "details": list(v.details)} for v in verdicts]
    found.update(passed=passed, checks=checks, versions=shell.versions())
    shell.emit(found)
    write_junit()
    if not json_output:
        print_verdicts(verdicts, f"{artifact} against {model}")
    return shell.DONE if passed else shell.NOT_MET


def print_verdicts(verdicts: list[Verdict], title: str) -> None:
    """Print one row per verdict, and under the table what a failure is about."""
    table = Table(title=escape(title))
    for heading in ("check", "", "figures"):
        table.add_column(heading, overflow="fold")
    for verdict in verdicts:
        mark = "[green]passed[/]" if verdict.passed else "[red]failed[/]"
        if verdict.limit is None:
            mark = "no limit"
        table.add_row(verdict.name, mark, escape(verdict.message))
    console = shell.out_console()
    console.print(table)
    for verdict in verdicts:
        if not verdict.passed:
            for line in verdict.details:
                console.print(f"  {line}", markup=False, soft_wrap=True)


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

    outcomes, _ = measure(compiled, artifact, model, ("onnxruntime",), threads, 50, None, bars)
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


def accuracy_verdicts(
    metric: dict[str, Any], max_drop: float | None, max_slice_drop: float | None, seconds: float
) -> list[Verdict]:
    """Return the verdict on all samples, and with a limit the one on the slices."""
    drop = metric["drop"]
    if drop is None or not math.isfinite(drop):
        raise DataError(f"metric {metric['name']} gives no number on these samples: {metric}")
    name, unit = metric["name"], _unit(metric["name"])
    message = f"{name} {metric['compiled']:.4g}"
    if metric.get("float") is not None:
        message += f", float {metric['float']:.4g}"
    message += f", drop {drop:.4g}{unit}"
    if max_drop is not None:
        message += f", allowed {max_drop:g}"
    details = () if metric.get("samples") is None else (f"on {metric['samples']} samples",)
    passed = max_drop is None or drop <= max_drop
    verdicts = [Verdict("accuracy", passed, float(drop), max_drop, message, seconds, details)]
    if max_slice_drop is not None:
        verdicts.append(_slice_verdict(metric, max_slice_drop, unit))
    return verdicts


def _slice_verdict(metric: dict[str, Any], limit: float, unit: str) -> Verdict:
    slices, least = metric["slices"], metric["slice_minimum"]
    worst = metric["worst_slice"]
    if worst is None:
        what = f"none of the {len(slices)} groups has {least} samples" if slices else "no groups"
        raise DataError(
            f"--max-slice-drop: {what} in the evaluation samples",
            hint="add an array 'slice' (a name per sample) or 'label' (a class id per sample), "
            f"with at least {least} samples of a group",
        )
    binding = [s for s in slices if s["binds"]]
    message = (
        f"worst of {len(binding)}: {worst['kind']} {worst['name']} ({worst['samples']} samples), "
        f"drop {worst['drop']:.4g}{unit}, allowed {limit:g}"
    )
    over = sorted((s for s in binding if s["drop"] > limit), key=lambda s: -s["drop"])
    details = [
        f"{s['kind']} {s['name']}: {metric['name']} {s['compiled']:.4g}, float {s['float']:.4g}, "
        f"drop {s['drop']:.4g}{unit}, allowed {limit:g}, {s['samples']} samples"
        for s in over
    ]
    small = len(slices) - len(binding)
    if small:
        details.append(f"{small} groups of fewer than {least} samples do not bind")
    return Verdict("slices", not over, float(worst["drop"]), limit, message, 0.0, tuple(details))


def _unit(metric: str) -> str:
    return " points" if metric in ("top1", "top5") else ""


def latency_verdict(figures: dict[str, Any], limit: float, seconds: float) -> Verdict:
    """Return the verdict on the latency relative to float."""
    ratio = float(figures["ratio"])
    message = (
        f"{figures['compiled']:.3g} ms, float {figures['float']:.3g} ms ({figures['threads']} "
        f"thread{'s' * (figures['threads'] != 1)}), ratio {ratio:.3g}, allowed {limit:g}"
    )
    details = (f"float: {figures['float_runner']}; medians of interleaved runs",)
    return Verdict("latency", ratio <= limit, ratio, limit, message, seconds, details)


def _other_model(compiled: CompiledModel, model: Path) -> bool:
    source = compiled.artifact.sources.get("model")
    return source is not None and source != shell.sha256(model)
