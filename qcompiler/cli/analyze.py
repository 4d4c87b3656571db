# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile analyze`: what quantizing each product costs, at itself and at the outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.markup import escape
from rich.table import Table

from qcompiler.cli import options, shell
from qcompiler.cpu import allowed_cpus
from qcompiler.errors import DataError, UnsupportedByTargetError, UsageError

if TYPE_CHECKING:
    from qcompiler.latency import LatencyTable
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
            "--target",
            metavar="T",
            help="Build for this target at each of its precisions as well, and time each kernel.",
        ),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            "--records",
            metavar="R",
            help="Tuning records for --target; latencies that they hold are not measured again.",
        ),
    ] = None,
    bits: Annotated[
        str, typer.Option("--bits", metavar="8,6,4", help="Widths of weights to try.")
    ] = "8,6,4",
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", help="Samples to measure on, at most.")
    ] = 64,
    loss: Annotated[
        str,
        typer.Option(
            "--loss",
            metavar="L",
            help="At the outputs: kl, mse, or auto (KL for class scores, else MSE).",
        ),
    ] = "auto",
    workers: Annotated[
        int,
        typer.Option(
            "--workers", metavar="N", help="Products under way at once; default: one per core."
        ),
    ] = 0,
    memory: Annotated[
        float,
        typer.Option(
            "--memory", metavar="MB", help="Room for values kept between the products of a network."
        ),
    ] = 512,
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
    input_shape: options.FixedShapeOption = None,
    freeze: options.FreezeOption = None,
    seed: options.SeedOption = 0,
    progress: options.ProgressOption = None,
    json_output: options.JsonOption = False,
) -> int:
    """Measure the error that each product of MODEL causes when it alone is quantized."""
    options.require_metric(evaluate, metric, None)
    widths = _widths(bits)
    if samples < 1 or workers < 0:
        raise UsageError("--samples and --workers: expected a number of at least 1")
    if loss not in ("auto", "kl", "mse"):
        raise UsageError(f"--loss {loss!r}: expected auto, kl or mse")
    if not 0 <= memory < float("inf"):
        raise UsageError(f"--memory {memory:g}: expected megabytes, 0 or more")
    workers = workers or len(allowed_cpus())
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
    from qcompiler.auto import latency_of
    from qcompiler.data import Evaluation, load_samples
    from qcompiler.onnx_import import load_onnx, model_digest
    from qcompiler.ops import Stage
    from qcompiler.passes.calibrate import Calibrate, CalibrationSet, CalibrationTable
    from qcompiler.passes.canonicalize import canonicalize_passes
    from qcompiler.passes.sensitivity import Settings, measure_sensitivity
    from qcompiler.passmanager import PassContext, PassManager
    from qcompiler.registry import get_target
    from qcompiler.report_analysis import to_html

    loaded = load_samples(calibration)
    evaluation = None
    if evaluate is not None and metric is not None:
        evaluation = Evaluation(evaluate, metric)
    latency: dict[str, float] = {}
    table: LatencyTable | None = None
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
                settings=Settings(
                    weight_bits=widths,
                    samples=samples,
                    loss=cast(Literal["auto", "kl", "mse"], loss),
                    seed=seed,
                    memory=memory * 1e6,
                ),
                executor=pool,
                workers=workers,
                state=state,
                progress=bars,
            )
        if target is not None:
            try:
                table = latency_of(
                    model,
                    get_target(target),
                    calibration=calibration,
                    input_shapes=shapes,
                    freeze=constants,
                    records=records,
                    seed=seed,
                    progress=bars,
                )
            except UnsupportedByTargetError as error:
                notes.append(str(error))
            else:
                latency = kernel_latency(found, table.regions("w8a8"))
    document: dict[str, Any] = {
        "model": str(model),
        "target": target,
        "sensitivity": found.to_json(),
        "latency_ms": latency if target is not None else None,
        "latency": None if table is None else table.to_json(),
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
        if table is not None:
            print_latency(found, table)
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


def print_latency(found: SensitivityReport, table: LatencyTable) -> None:
    """Print what the slowest products take at each precision, and what conversions take."""
    console = shell.out_console()
    times = {p: kernel_latency(found, table.regions(p)) for p in table.models}
    products = {n.node: 0.0 for n in found.nodes}
    for name in products:
        products[name] = max((t.get(name, 0.0) for t in times.values()), default=0.0)
    order = sorted(products, key=lambda n: -products[n])
    view = Table(title=f"microseconds on {table.target}, {table.threads} threads")
    view.add_column("product", overflow="fold")
    for precision in times:
        view.add_column(precision, justify="right")
    for name in order[:_SHOWN]:
        cells = [f"{t[name] * 1e3:.2f}" if name in t else "–" for t in times.values()]
        shell.add_row(view, name, *cells)
    whole = [table.models[p].seconds for p in times]
    view.add_row("one run", *("–" if s is None else f"{s * 1e6:.2f}" for s in whole), style="bold")
    console.print(view)
    for kind in ("quantize", "dequantize"):
        found_us = [t.seconds * 1e6 for k, t in table.casts.items() if k.startswith(f"{kind} ")]
        if found_us:
            console.print(f"{kind}: {min(found_us):.2f} to {max(found_us):.2f} us by size")


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
    table = Table(
        title=escape(f"{model.name}: loss at the outputs ({kinds}) when one product is rounded")
    )
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
        shell.add_row(table, n.node, *cells)
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
