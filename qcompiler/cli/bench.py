# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile bench`: an artifact beside other runtimes, interleaved, each in its own process."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from qcompiler.cli import options, shell
from qcompiler.errors import QCompilerError, UsageError

if TYPE_CHECKING:
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
            metavar="NAMES",
            help="Comma-separated: onnxruntime and openvino (float and int8 each), tvm; needs "
            "--model.",
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
    progress: options.ProgressOption = None,
    json_output: options.JsonOption = False,
) -> int:
    """Time an artifact, and peers on its model, side by side.

    The peers' int8 models are quantized with --calibration; without it they are calibrated on
    random inputs, which gives the same speed and no accuracy.
    """
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

    import qcompiler

    compiled = qcompiler.load(artifact)  # refuses a bad artifact before anything is started
    with shell.ProgressBars(progress) as bars:
        outcomes = measure(compiled, artifact, model, names, threads, runs, calibration, bars)
    ours = outcomes[OURS]
    if ours.timing is None:
        raise QCompilerError(f"the artifact could not be measured: {ours.problem}")
    found = {
        "artifact": str(artifact),
        "model": str(model) if model else None,
        "target": compiled.target.name,
        "threads": threads,
        "runners": to_json(outcomes),
        "versions": shell.versions(),
    }
    shell.emit(found)
    if not json_output:
        print_table(found)
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
) -> dict[str, Outcome]:
    """Time the artifact and the named peers on one seeded random batch."""
    import numpy as np

    from qcompiler.peers import compiled_runner, peer_runner
    from qcompiler.side_by_side import measure as run_all

    with tempfile.TemporaryDirectory(prefix="qcompile-bench-") as text:
        folder = Path(text)
        inputs = folder / "inputs.npz"
        np.savez(inputs, **compiled.random_inputs())  # type: ignore[arg-type]
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
        return run_all(runners, threads=threads, runs=runs, progress=progress)


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
            "note": outcome.note,
        }
    return found


def print_table(found: Mapping[str, Any]) -> None:
    """Print one row per runner."""
    table = Table(title=f"{found['artifact']}, {found['threads']} thread(s)")
    table.add_column("runner", no_wrap=True)
    for heading in ("median", "min", "spread", "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("how", overflow="fold")
    for name, figures in found["runners"].items():
        if "problem" in figures:
            table.add_row(name, "–", "–", "–", "–", figures["problem"])
            continue
        table.add_row(
            name,
            f"{figures['median_ms']:.3f}",
            f"{figures['min_ms']:.3f}",
            f"{100 * figures['spread']:.1f} %",
            f"{figures['ratio']:.2f}x",
            figures["note"],
        )
    console = shell.out_console()
    console.print(table)
    console.print(
        "Times of one call in ms; ratio: the median divided by ours, above 1 is slower than us."
    )
