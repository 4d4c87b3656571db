# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile tune`: search the kernels' parameters for a model, here or on remote devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from qcompiler.cli import options, shell
from qcompiler.errors import InterruptedCompileError, TuningError, UsageError

if TYPE_CHECKING:
    from qcompiler.tuning import TuningOutcome

_DEFAULT_SECONDS = 900.0
_SHOWN = 12


def tune(
    model: options.ModelArgument,
    records: Annotated[
        Path,
        typer.Option(
            "--records",
            metavar="R",
            help="File of tuning records to add to, or a folder with one file per target.",
        ),
    ],
    target: Annotated[
        str, typer.Option("--target", metavar="T", help="Target name; see `qcompile targets`.")
    ] = "host",
    calibration: options.CalibrationOption = None,
    precision: options.FixedPrecisionOption = "w8a8",
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", metavar="S", help="Limit in seconds. Default: 900."),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option("--trials", metavar="N", help="Limit in measured kernels; those in R count."),
    ] = None,
    tracker: Annotated[
        str | None,
        typer.Option(
            "--tracker",
            metavar="HOST:PORT",
            help="Measure on the devices of a tracker of TVM's RPC instead of on this machine.",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="K", help="Which of the tracker's devices."),
    ] = None,
    input_shape: options.FixedShapeOption = None,
    freeze: options.FreezeOption = None,
    seed: options.SeedOption = 0,
    progress: options.ProgressOption = None,
    json_output: options.JsonOption = False,
) -> int:
    """Search the kernel parameters of MODEL by measuring; R holds what is found.

    A run that was interrupted or killed goes on where it was when it is started again. Kernels
    whose untuned parameters prove fastest keep them. Use the records with `qcompile compile
    --records R`.
    """
    if seconds is not None and trials is not None:
        raise UsageError("--seconds and --trials exclude each other")
    if seconds is None and trials is None:
        seconds = _DEFAULT_SECONDS
    shapes = options.parse_shapes(input_shape or ())
    constants = options.parse_constants(freeze or ())
    shell.input_file(model, "model")
    if not records.is_dir():
        shell.output_file(records, "tuning records")

    import qcompiler
    from qcompiler.tune_model import tune_model

    tuning = qcompiler.Tuning(
        records=records, seconds=seconds, trials=trials, tracker=tracker, key=key
    )
    try:
        with shell.ProgressBars(progress) as bars:
            outcome = tune_model(
                model,
                tuning,
                target=target,
                calibration=calibration,
                precision=precision,
                input_shapes=shapes,
                freeze=constants,
                seed=seed,
                progress=bars,
            )
    except KeyboardInterrupt as error:
        if not records.exists():
            raise InterruptedCompileError("nothing was measured yet") from error
        raise InterruptedCompileError(
            f"what was measured is in {records}", hint="the same command goes on from there"
        ) from error
    if not outcome.tasks:
        raise TuningError(f"no kernel of {model} has parameters to tune for {outcome.target}")
    shell.emit(outcome.to_json())
    for note in outcome.notes:
        shell.say(note)
    if calibration is None:
        shell.say("without --calibration, random inputs stood in for the calibration samples")
    if not json_output:
        print_summary(outcome)
    return shell.DONE


def print_summary(outcome: TuningOutcome) -> None:
    """Print the total latency and the kernels that gained most."""
    console = shell.out_console()
    found = outcome.to_json()
    gained = [t for t in outcome.tasks if t.ratio < 1 and t.default_ms is not None]
    if gained:
        table = Table(title=escape(f"Faster kernels, {outcome.target} on {outcome.machine}"))
        for heading in ("first node", "calls", "default ms", "tuned ms", "change"):
            table.add_column(heading, justify="left" if heading == "first node" else "right")
        gained.sort(key=lambda t: (t.default_ms or 0.0) * len(t.nodes) * (t.ratio - 1))
        for task in gained[:_SHOWN]:
            table.add_row(
                escape(task.nodes[0]),
                str(len(task.nodes)),
                f"{task.default_ms:.4f}",
                f"{task.best_ms:.4f}",
                f"{(task.ratio - 1) * 100:+.1f} %",
            )
        console.print(table)
        if len(gained) > _SHOWN:
            console.print(f"and {len(gained) - _SHOWN} more; --json has all")
    latency = found["latency_ms"]
    console.print(
        f"Kernels with parameters, one thread: {latency['default']:.3f} ms untuned, "
        f"{latency['best']:.3f} ms tuned ({len(gained)} of {len(outcome.tasks)} kernels faster, "
        f"{found['trials']} trials)"
    )
    if found["unmeasured"]:
        console.print(f"{found['unmeasured']} kernels were not measured: the limit was too short")
    console.print(f"Records: {outcome.records}", markup=False)
