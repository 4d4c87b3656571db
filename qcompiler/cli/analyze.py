# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile analyze`: what quantizing each product costs, at itself and at the outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from qcompiler.cli import options, shell
from qcompiler.errors import DataError, UsageError

if TYPE_CHECKING:
    from qcompiler.passes.sensitivity_report import SensitivityReport

_SHOWN = 15


def analyze(
    model: options.ModelArgument,
    calibration: options.CalibrationOption = None,
    evaluate: options.EvaluateOption = None,
    metric: options.MetricOption = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="T", help="Compile for this target as well, and time each kernel."
        ),
    ] = None,
    bits: Annotated[
        str, typer.Option("--bits", metavar="8,6,4", help="Widths of weights to try.")
    ] = "8,6,4",
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", help="Samples to measure on, at most.")
    ] = 64,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", help="Products under way at once.")
    ] = 1,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="S.json",
            help="Keep finished products here; the same command goes on from it.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="R.html", help="Write the report as one HTML page."),
    ] = None,
    input_shape: options.InputShapeOption = None,
    freeze: options.FreezeOption = None,
    seed: options.SeedOption = 0,
    progress: options.ProgressOption = None,
    json_output: options.JsonOption = False,
) -> int:
    """Measure the error that each product of MODEL causes when it alone is quantized."""
    options.require_metric(evaluate, metric, None)
    widths = _widths(bits)
    if samples < 1 or workers < 1:
        raise UsageError("--samples and --workers: expected a number of at least 1")
    shapes = options.parse_shapes(input_shape or ())
    constants = options.parse_constants(freeze or ())
    shell.input_file(model, "model")
    for path, what in ((report, "report"), (state, "state")):
        if path is not None:
            shell.output_file(path, what)
    if calibration is None:
        raise DataError(
            "analyze needs calibration samples, got none", hint="give --calibration C.npz"
        )

    from qcompiler.artifact import atomic_write
    from qcompiler.data import Evaluation, load_samples
    from qcompiler.driver import compile as compile_model
    from qcompiler.onnx_import import load_onnx, model_digest
    from qcompiler.ops import Stage
    from qcompiler.passes.calibrate import Calibrate, CalibrationSet, CalibrationTable
    from qcompiler.passes.canonicalize import canonicalize_passes
    from qcompiler.passes.sensitivity import Settings, measure_sensitivity
    from qcompiler.passmanager import PassContext, PassManager
    from qcompiler.report_analysis import to_html

    loaded = load_samples(calibration)
    evaluation = None
    if evaluate is not None and metric is not None:
        evaluation = Evaluation(evaluate, metric)
    latency: dict[str, float] = {}
    notes: list[str] = []
    with shell.Stopwatch() as watch, shell.ProgressBars(progress) as bars:
        graph = load_onnx(
            model, input_shapes=shapes, freeze=constants, sample_shapes=loaded.shapes()
        )
        if graph.stage is Stage.QDQ:
            raise UsageError(
                f"{model} is quantized already",
                hint="analyze the float model that it was made from",
            )
        ctx = PassContext(seed=seed, progress=bars)
        graph = PassManager(canonicalize_passes()).run(graph, ctx)
        ctx.put(CalibrationSet.of(loaded, graph))
        PassManager([Calibrate()], given=tuple(ctx.artifacts)).run(graph, ctx)
        pool = ThreadPoolExecutor(workers) if workers > 1 else None
        with pool or contextlib.nullcontext():
            found = measure_sensitivity(
                graph,
                ctx.get(CalibrationTable),
                loaded,
                evaluation=evaluation,
                settings=Settings(weight_bits=widths, samples=samples, seed=seed),
                executor=pool,
                workers=workers,
                state=state,
                progress=bars,
            )
        if target is not None:
            compiled = compile_model(
                model,
                target=target,
                calibration=calibration,
                input_shapes=shapes,
                freeze=constants,
                seed=seed,
                progress=bars,
            )
            figures = compiled.report or {}
            latency = kernel_latency(found, figures.get("nodes") or ())
            notes = [str(n) for n in figures.get("notes") or ()]
    document: dict[str, Any] = {
        "model": str(model),
        "target": target,
        "sensitivity": found.to_json(),
        "latency_ms": latency if target is not None else None,
        "notes": notes,
        "digests": {"model": model_digest(model)},
        "versions": shell.versions(),
        "seconds": watch.seconds,
    }
    shell.emit(document)
    if report is not None:
        with atomic_write(report) as file:
            file.write(to_html(found, str(model), latency, target).encode())
    if not json_output:
        print_summary(found, model, report, latency)
    for note in notes:
        shell.say(note)
    return shell.DONE


def _widths(text: str) -> tuple[int, ...]:
    try:
        widths = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        widths = ()
    if not widths or not all(2 <= w <= 8 for w in widths):
        raise UsageError(f"--bits {text!r}: expected widths from 2 to 8, as in 8,6,4")
    return widths


def kernel_latency(
    found: SensitivityReport, regions: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return the measured ms of the kernel that holds each product."""
    products = {n.node for n in found.nodes}
    latency: dict[str, float] = {}
    for region in regions:
        ms = region.get("latency_ms")
        if ms is None:
            continue
        for name in (str(region.get("name")), *map(str, region.get("nodes") or ())):
            if name in products:
                latency.setdefault(name, float(ms))
    return latency


def print_summary(
    found: SensitivityReport, model: Path, page: Path | None, latency: Mapping[str, float]
) -> None:
    """Print the most sensitive products, and where the error first jumps."""
    from qcompiler.report_analysis import effects_of, ranked

    console = shell.out_console()
    order = ranked(found)
    shown = order[:_SHOWN]
    changes = list(dict.fromkeys(k for n in shown for k in effects_of(n)))
    kinds = ", ".join(dict.fromkeys("MSE" if k == "mse" else "KL" for k in found.losses.values()))
    table = Table(title=f"{model.name}: loss at the outputs ({kinds}) when one product is rounded")
    table.add_column("product", overflow="fold")
    for key in changes:
        table.add_column(key, justify="right")
    table.add_column("SQNR in w8a8, dB", justify="right")
    if latency:
        table.add_column("kernel, ms", justify="right")
    for n in shown:
        effects = effects_of(n)
        cells = [f"{effects[k].loss:.2e}" if k in effects else "–" for k in changes]
        cells.append("–" if n.along_sqnr is None else f"{n.along_sqnr:.1f}")
        if latency:
            cells.append(f"{latency[n.node]:.4f}" if n.node in latency else "–")
        table.add_row(n.node, *cells)
    console.print(table)
    if len(order) > len(shown):
        console.print(f"and {len(order) - len(shown)} less sensitive; the report has all")
    console.print(f"Everything in 8 bits: loss {found.joint_loss:.3g}")
    if found.metric is not None:
        console.print(f"{found.metric}: float {found.score:.4f}, w8a8 {found.joint_score:.4f}")
    if found.first_jump is not None:
        console.print(f"The error first jumps at {found.first_jump}", markup=False)
    if page is not None:
        console.print(f"Report: {page}", markup=False)
