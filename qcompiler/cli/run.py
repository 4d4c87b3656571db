# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile run`: inputs from a file through an artifact into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qcompiler.cli import options, shell
from qcompiler.errors import DataError


def run(
    artifact: options.ArtifactArgument,
    inputs: Annotated[
        Path,
        typer.Option("--inputs", metavar="IN.npz", help="One array per input, by name."),
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="OUT.npz", help="One array per output, by name."),
    ],
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", min=1, help="Threads to run with.")
    ] = None,
) -> int:
    """Run an artifact on the arrays of a file; N samples give N results, in order."""
    shell.input_file(artifact, "artifact")
    arrays = read_arrays(inputs)
    shell.output_file(output, "results")

    import numpy as np

    import qcompiler
    from qcompiler.artifact import atomic_write

    compiled = qcompiler.load(artifact, threads=threads)
    wanted = {name: arrays[name] for name in compiled.inputs if name in arrays}
    ignored = sorted(set(arrays) - set(wanted))
    if ignored:
        shell.say(f"note: {inputs} also holds {', '.join(ignored)}; these are not inputs")
    results = compiled(wanted)
    with atomic_write(output) as file:
        np.savez(file, **results)  # type: ignore[arg-type]
    shapes = ", ".join(
        f"{name} {value.dtype}{list(value.shape)}" for name, value in results.items()
    )
    shell.say(f"wrote {output}: {shapes}")
    return shell.DONE


def read_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of an .npz file.

    Raises:
        DataError: Not an .npz file, damaged, or holding Python objects.
    """
    import zipfile
    import zlib

    import numpy as np

    shell.input_file(path, "input file")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise DataError(f"{path} is a single .npy array, expected .npz with names")
        with file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise DataError(f"{path} is not a readable .npz file: {error}") from error
