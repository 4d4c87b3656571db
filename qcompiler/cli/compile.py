# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile compile`: a model in, an artifact, a report and a verdict out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from qcompiler.cli import options, shell
from qcompiler.errors import InfeasibleBudgetError, InterruptedCompileError, UsageError

_SHOWN_REASONS = 6


def compile_(
    model: options.ModelArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT.qcm", help="The artifact to write.")
    ],
    target: Annotated[
        str, typer.Option("--target", metavar="T", help="Target name; see `qcompile targets`.")
    ] = "host",
    calibration: options.CalibrationOption = None,
    precision: options.PrecisionOption = "w8a8",
    override: options.OverrideOption = None,
    region: options.RegionOption = None,
    methods: options.MethodsOption = "",
    evaluate: options.EvaluateOption = None,
    metric: options.MetricOption = None,
    max_drop: options.MaxDropOption = None,
    max_slice_drop: options.MaxSliceDropOption = None,
    max_latency: Annotated[
        float | None,
        typer.Option("--max-latency", metavar="MS", help="Largest latency of one call, in ms."),
    ] = None,
    max_size: Annotated[
        float | None,
        typer.Option("--max-size", metavar="MB", help="Largest artifact, in MB of 10^6 bytes."),
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(
            "--max-memory",
            metavar="MB",
            help="Most memory of the tensors between kernels during a run, in MB of 10^6 bytes.",
        ),
    ] = None,
    input_shape: options.InputShapeOption = None,
    freeze: options.FreezeOption = None,
    records: Annotated[
        Path | None,
        typer.Option(
            "--records",
            metavar="R",
            help="Tuning records that choose kernel parameters: a file, or a folder of them.",
        ),
    ] = None,
    tune_seconds: Annotated[
        float | None,
        typer.Option(
            "--tune-seconds",
            metavar="S",
            help="Tune for so long first; what is found goes to --records where given. With "
            "--precision auto: for tuning and the search for precisions together.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="R.html",
            help="Write the report as one HTML page. OUT.report.json has its figures.",
        ),
    ] = None,
    seed: options.SeedOption = 0,
    locked: Annotated[
        Path | None,
        typer.Option(
            "--locked",
            metavar="ART.qcm|LOCK.json",
            help="Make this artifact, or what this lock says, again; refuse whatever differs.",
        ),
    ] = None,
    progress: options.ProgressOption = None,
    json_output: options.JsonOption = False,
) -> int:
    """Compile MODEL to an artifact; with --evaluate, measure what it costs in accuracy."""
    options.require_metric(evaluate, metric, max_drop, max_slice_drop)
    limits = (
        ("--max-latency", max_latency),
        ("--max-size", max_size),
        ("--max-memory", max_memory),
    )
    for name, value in limits:
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{name} {value}: expected a number above 0")
    if tune_seconds is not None and not 0 < tune_seconds < float("inf"):
        raise UsageError(f"--tune-seconds {tune_seconds}: expected a number above 0")
    shapes = options.parse_shapes(input_shape or ())
    constants = options.parse_constants(freeze or ())
    overrides = options.parse_overrides(override or ())
    shell.input_file(model, "model")
    shell.output_file(output, "artifact")
    if report is not None:
        shell.output_file(report, "report")
    new = tune_seconds is not None or precision == "auto"  # those write what they measure
    if records is not None and not new and not records.is_dir():
        shell.input_file(records, "tuning records")

    if locked is not None:
        shell.input_file(locked, "lock")

    import qcompiler
    from qcompiler.cache import cache_folder
    from qcompiler.regional import parse_regions

    regions = parse_regions(region or ())
    tuning = None
    if records is not None or tune_seconds is not None:
        tuning = qcompiler.Tuning(records=records, seconds=tune_seconds)

    budget = qcompiler.Budget(
        max_drop=max_drop,
        max_latency_ms=max_latency,
        max_size_mb=max_size,
        max_slice_drop=max_slice_drop,
        max_memory_mb=max_memory,
    )
    evaluation = None
    if evaluate is not None and metric is not None:
        evaluation = qcompiler.Evaluation(evaluate, metric)
    infeasible: InfeasibleBudgetError | None = None
    with shell.ProgressBars(progress) as bars:
        try:
            compiled = qcompiler.compile(
                model,
                target=target,
                calibration=calibration,
                precision=precision,
                methods=methods or None,
                evaluate=evaluation,
                budget=budget,
                input_shapes=shapes,
                freeze=constants,
                tuning=tuning,
                seed=seed,
                locked=locked,
                overrides=overrides,
                regions=regions,
                progress=bars,
            )
        except InfeasibleBudgetError as error:
            if not isinstance(error.best, qcompiler.CompiledModel):
                raise
            infeasible = error
            compiled = error.best
        except KeyboardInterrupt as error:
            if precision != "auto":
                raise
            folder = cache_folder(records)
            if not folder.is_dir():
                raise
            raise InterruptedCompileError(
                f"what was measured is kept in {folder}",
                hint="the same command goes on from there",
            ) from error
    compiled.save(output)

    found = finish_report(compiled.report or {}, model, output)
    problems = budget_problems(found, max_drop, max_latency, max_size, max_slice_drop, max_memory)
    if infeasible is not None and not problems:
        problems = [infeasible.message]
    found["budget"] = {
        "max_drop": max_drop,
        "max_latency_ms": max_latency,
        "max_size_mb": max_size,
        "max_slice_drop": max_slice_drop,
        "max_memory_mb": max_memory,
        "kept": not problems,
        "problems": problems,
    }
    shell.emit(found)
    write_reports(found, output, report)
    if not json_output:
        print_summary(found, output, report)
    console = shell.err_console()
    for problem in problems:
        console.print(f"[bold red]budget not kept:[/] {escape(problem)}")
    if problems:
        console.print(f"The best so far is written to {escape(str(output))}.")
    return shell.NOT_MET if problems else shell.DONE


def finish_report(report: Mapping[str, Any], model: Path, output: Path) -> dict[str, Any]:
    """Return the report with what only the command line knows: paths and the artifact's size."""
    found = dict(report)
    found["artifact"] = str(output)
    found.setdefault("model", str(model))
    size = dict(found.get("size_bytes") or {})
    size["artifact"] = output.stat().st_size
    size.setdefault("model", model.stat().st_size)
    found["size_bytes"] = size
    digests = dict(found.get("digests") or {})
    digests["artifact"] = shell.sha256(output)
    found["digests"] = digests
    return found


def budget_problems(
    report: Mapping[str, Any],
    max_drop: float | None,
    max_latency: float | None,
    max_size: float | None,
    max_slice_drop: float | None = None,
    max_memory: float | None = None,
) -> list[str]:
    """Return one sentence per limit that the report exceeds, or could not be held against."""
    problems = []
    metric = report.get("metric") or {}
    latency = (report.get("latency_ms") or {}).get("compiled")
    size = report["size_bytes"]["artifact"] / 1e6
    if max_drop is not None:
        drop = metric.get("drop")
        if drop is None:
            problems.append("the drop could not be measured")
        elif not drop <= max_drop:  # a NaN drop does not pass
            problems.append(f"the metric drops by {drop:.4g}, allowed are {max_drop:g}")
    if max_latency is not None:
        if latency is None:
            problems.append("the latency could not be measured on this machine")
        elif not latency <= max_latency:
            problems.append(f"one call takes {latency:.3g} ms, allowed are {max_latency:g}")
    if max_size is not None and not size <= max_size:
        problems.append(f"the artifact has {size:.3f} MB, allowed are {max_size:g}")
    if max_memory is not None:
        memory = (report.get("memory_bytes") or {}).get("activations")
        if memory is None:
            problems.append("the memory of a run is not known for this target")
        elif not memory <= max_memory * 1e6:
            problems.append(
                f"a run takes {memory / 1e6:.4g} MB between kernels, allowed are {max_memory:g}"
            )
    if max_slice_drop is not None:
        worst = metric.get("worst_slice")
        if worst is None:
            problems.append("the drop of no slice could be measured")
        elif not worst["drop"] <= max_slice_drop:
            problems.append(
                f"the metric drops by {worst['drop']:.4g} on {worst['kind']} {worst['name']} "
                f"({worst['samples']} samples), allowed are {max_slice_drop:g}"
            )
    return problems


def write_reports(report: Mapping[str, Any], output: Path, page: Path | None) -> None:
    """Write the figures as JSON beside the artifact, and the page if there is one to write."""
    from qcompiler import report as pages
    from qcompiler.artifact import atomic_write, report_path

    with atomic_write(report_path(output)) as file:
        file.write(pages.to_json(report))
    if page is not None:
        with atomic_write(page) as file:
            file.write(pages.to_html(report).encode())


def print_summary(report: Mapping[str, Any], output: Path, page: Path | None) -> None:
    """Print the table float against compiled, and where the files are."""
    from qcompiler import report as pages

    console = shell.out_console()
    title = f"{Path(str(report['model'])).name} on {report.get('target', '?')}"
    caption = pages.latency_caption(report)
    table = Table(title=escape(title), caption=caption and escape(caption), caption_justify="left")
    table.add_column("")
    for heading in ("float", "compiled", "change"):
        table.add_column(heading, justify="right")
    for row in pages.comparison(report):
        shell.add_row(table, row.label, row.before_text, row.after_text, row.change_text)
        if row.label == "size":
            for part, text in pages.size_parts(report):
                table.add_row(f"  {part}", "", text, "")
    console.print(table)
    slices = pages.worst_slice(report)
    if slices is not None:
        console.print(f"Worst slice: {slices}", markup=False)
    counts = pages.precision_counts(report)
    if counts:
        shares = ", ".join(f"{n} {name}" for name, n in counts.items())
        console.print(f"Nodes by precision: {shares}")
    for line in pages.plan_lines(report):
        console.print(line, markup=False)
    lines = pages.fallback_lines(report)
    for line in lines[:_SHOWN_REASONS]:
        console.print(f"  {line}", markup=False)
    if len(lines) > _SHOWN_REASONS:
        console.print(f"  and {len(lines) - _SHOWN_REASONS} more reasons; the report has all")
    console.print(f"Artifact: {output}", markup=False)
    if page is not None:
        console.print(f"Report:   {page}", markup=False)
