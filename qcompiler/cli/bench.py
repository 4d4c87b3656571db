# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile bench`: an artifact beside other runtimes, interleaved, each in its own process."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from qcompiler.cli import options, shell
from qcompiler.errors import QCompilerError, UsageError

if TYPE_CHECKING:
    from qcompiler.breakdown import Breakdown
    from qcompiler.runtime import CompiledModel
    from qcompiler.side_by_side import Outcome


def bench(
    artifact: options.ArtifactArgument,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="MODEL", help="The ONNX model, for the peers to run."),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            "--peers",
            "--against",
            metavar="NAMES",
            help="Comma-separated: onnxruntime and openvino (float and int8 each), tvm (plain TVM, "
            "float); needs --model.",
        ),
    ] = "",
    calibration: options.CalibrationOption = None,
    threads: Annotated[
        int,
        typer.Option(
            "--threads", metavar="N", min=1, help="Threads, and CPUs that everyone is pinned to."
        ),
    ] = 1,
    runs: Annotated[
        int, typer.Option("--runs", metavar="N", min=1, help="Least number of measured runs.")
    ] = 50,
    layers: Annotated[
        int,
        typer.Option(
            "--layers",
            metavar="N",
            min=0,
            help="Show the N slowest layers, with their share of the CPU's measured peak.",
        ),
    ] = 0,
    chart: Annotated[
        Path | None,
        typer.Option(
            "--chart", metavar="FILE", help="Draw medians and layers: .png, .svg or .pdf."
        ),
    ] = None,
    progress: options.ProgressOption = None,
    json_output: options.JsonOption = False,
) -> int:
    """Time an artifact, and peers on its model, side by side.

    All run on a sample of --calibration, and the peers' int8 models are quantized with it; without
    it they run and are calibrated on random inputs: the same speed and no accuracy. Layers have
    names and sizes where the artifact's report lies beside it.
    """
    from qcompiler import bench_chart
    from qcompiler.peers import OURS, expand

    names = expand(peers)
    if names and model is None:
        raise UsageError("--peers needs --model with the ONNX model that they run")
    shell.input_file(artifact, "artifact")
    if model is not None:
        shell.input_file(model, "model")
        names = names or expand("onnxruntime")
    if calibration is not None and not calibration.exists():
        raise UsageError(f"calibration set {calibration} does not exist")

    if chart is not None:
        shell.output_file(chart, "chart")
        bench_chart.check(chart)

    import qcompiler

    compiled = qcompiler.load(artifact)  # refuses a bad artifact before anything is started
    with shell.ProgressBars(progress) as bars:
        outcomes, parts = measure(
            compiled, artifact, model, names, threads, runs, calibration, bars, bool(layers)
        )
    ours = outcomes[OURS]
    if ours.timing is None:
        raise QCompilerError(f"the artifact could not be measured: {ours.problem}")
    found: dict[str, Any] = {
        "artifact": str(artifact),
        "model": str(model) if model else None,
        "target": compiled.target.name,
        "threads": threads,
        "runners": to_json(outcomes),
        "breakdown": None if parts is None else parts.to_json(),
        "versions": shell.versions(),
    }
    shell.emit(found)
    if chart is not None:
        panels = [bench_chart.runners_panel("", found["runners"])]
        if found["breakdown"] is not None:
            panels.append(bench_chart.layers_panel(found["breakdown"], layers))
        title = f"{artifact.name}, {compiled.target.name}, threads: {threads}"
        bench_chart.draw(chart, title, panels)
        shell.say(f"wrote {chart}")
    if not json_output:
        print_table(found)
        if parts is not None:
            print_layers(parts, layers)
    return shell.DONE


def measure(
    compiled: CompiledModel,
    artifact: Path,
    model: Path | None,
    names: tuple[str, ...],
    threads: int,
    runs: int,
    calibration: Path | None,
    progress: shell.ProgressBars,
    with_layers: bool = False,
) -> tuple[dict[str, Outcome], Breakdown | None]:
    """Time the artifact and the named peers on one batch, then its layers.

    The batch is a calibration sample where there are any, else random.
    """
    import numpy as np

    from qcompiler import breakdown
    from qcompiler.cli.inspect import report_beside
    from qcompiler.data import load_samples
    from qcompiler.example import example_of
    from qcompiler.peers import compiled_runner, peer_runner
    from qcompiler.side_by_side import measure as run_all
    from qcompiler.side_by_side import pick_cpus

    with tempfile.TemporaryDirectory(prefix="qcompile-bench-") as text:
        folder = Path(text)
        inputs = folder / "inputs.npz"
        if calibration is not None:
            compiled.example = example_of(compiled.inputs, load_samples(calibration))
        np.savez(inputs, **compiled.timed_inputs())  # type: ignore[arg-type]
        runners = [compiled_runner(artifact.resolve(), inputs, threads)]
        if model is not None:
            runners += [
                peer_runner(
                    name,
                    model.resolve(),
                    inputs,
                    threads,
                    folder,
                    calibration.resolve() if calibration else None,
                )
                for name in names
            ]
        outcomes = run_all(runners, threads=threads, runs=runs, progress=progress)
        if not with_layers:
            return outcomes, None
        progress("layers", 0, 1)
        report = report_beside(artifact, {"sources": compiled.artifact.sources})
        parts = breakdown.of_artifact(
            artifact.resolve(), inputs, threads, pick_cpus(threads), (report or {}).get("nodes")
        )
        progress("layers", 1, 1)
        return outcomes, parts


def to_json(outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Return per runner its figures, `ratio` of its median to ours, and how or why not."""
    from qcompiler.peers import OURS

    ours = outcomes[OURS].timing
    found: dict[str, dict[str, Any]] = {}
    for name, outcome in outcomes.items():
        if outcome.timing is None or ours is None:
            found[name] = {"problem": outcome.problem}
            continue
        found[name] = {
            **outcome.timing.to_json(),
            "ratio": outcome.timing.median_ms / ours.median_ms,
            "peak_memory_mb": outcome.peak_memory_mb,
            "note": outcome.note,
        }
    return found


def print_table(found: Mapping[str, Any]) -> None:
    """Print one row per runner, and below how each of them was run."""
    table = Table(title=escape(f"{found['artifact']}, {found['threads']} thread(s)"))
    table.add_column("runner", no_wrap=True)
    for heading in ("median", "min", "spread", "ratio", "memory"):
        table.add_column(heading, justify="right")
    how: list[str] = []
    for name, figures in found["runners"].items():
        if "problem" in figures:
            shell.add_row(table, name, "–", "–", "–", "–", "–")
            how.append(f"{name}: {figures['problem']}")
            continue
        memory = figures["peak_memory_mb"]
        shell.add_row(
            table,
            name,
            f"{figures['median_ms']:.3f}",
            f"{figures['min_ms']:.3f}",
            f"{100 * figures['spread']:.1f} %",
            f"{figures['ratio']:.2f}x",
            "–" if memory is None else f"{memory:.0f} MB",
        )
        how.append(f"{name}: {figures['note']}")
    console = shell.out_console()
    console.print(table)
    for line in how:
        console.print(line, markup=False, soft_wrap=True)
    console.print(
        "Times of one call in ms; ratio: the median divided by ours, above 1 is slower than us; "
        "memory: the most that the process had resident, Python included."
    )


def print_layers(parts: Breakdown, count: int) -> None:
    """Print one row per slow layer, slowest first."""
    shown = parts.slowest(count)
    table = Table(title=f"the {len(shown)} slowest of {len(parts.layers)} layers")
    table.add_column("layer", overflow="fold")
    table.add_column("kernel", overflow="fold")
    for heading in ("us", "of the time", "GMAC/s", "of the peak"):
        table.add_column(heading, justify="right")
    for layer in shown:
        speed, share = layer.gmacs, parts.share(layer)
        shell.add_row(
            table,
            layer.name,
            " ".join(layer.kernels),
            f"{1e6 * layer.seconds:.0f}",
            f"{100 * layer.seconds / parts.seconds:.1f} %",
            "–" if speed is None else f"{speed:.1f}",
            "–" if share is None else f"{100 * share:.0f} %",
        )
    console = shell.out_console()
    console.print(table)
    whole = parts.whole_share()
    for kind, (instruction, gmacs) in parts.peaks.items():
        console.print(f"peak, {kind}: {gmacs:.0f} GMAC/s, measured with {instruction} alone")
    if whole is not None:
        console.print(f"all layers together: {100 * whole:.0f} % of the peak")
