# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile run`: inputs from a file through an artifact into a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompiler.cli import options, shell
from qcompiler.errors import DataError

if TYPE_CHECKING:
    from qcompiler.types import Array


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
    json_output: options.JsonOption = False,
) -> int:
    """Run an artifact on the arrays of a file; N samples give N results, in order."""
    shell.input_file(artifact, "artifact")
    arrays = read_arrays(inputs)
    shell.output_file(output, "results")

    import numpy as np

    import qcompiler
    from qcompiler.artifact import atomic_write
    from qcompiler.cpu import default_threads

    with shell.Stopwatch() as loading:
        compiled = qcompiler.load(artifact, threads=threads)
    wanted = {name: arrays[name] for name in compiled.inputs if name in arrays}
    ignored = sorted(set(arrays) - set(wanted))
    if ignored:
        shell.say(f"note: {inputs} also holds {', '.join(ignored)}; these are not inputs")
    with shell.Stopwatch() as running:
        results = compiled(wanted)
    with atomic_write(output) as file:
        np.savez(file, **results)  # type: ignore[arg-type]
    shapes = ", ".join(
        f"{name} {value.dtype}{list(value.shape)}" for name, value in results.items()
    )
    shell.say(f"wrote {output}: {shapes}")
    if json_output:
        shell.emit(
            {
                "artifact": artifact,
                "inputs": inputs,
                "output": output,
                "target": compiled.target.name,
                "threads": threads or default_threads(),
                "given": {name: about_type(value) for name, value in wanted.items()},
                "ignored": ignored,
                "outputs": {name: about(value) for name, value in results.items()},
                "size_bytes": output.stat().st_size,
                "seconds": {"load": loading.seconds, "run": running.seconds},
                "versions": shell.versions(),
            }
        )
    return shell.DONE


def about_type(array: Array) -> dict[str, Any]:
    """Return dtype and shape of an array, for JSON."""
    return {"dtype": array.dtype.name, "shape": list(array.shape)}


def about(array: Array) -> dict[str, Any]:
    """Return what an array holds, for JSON.

    `sha256` is of its elements in C order, little-endian: equal results have equal digests,
    whatever the file around them.
    """
    import numpy as np

    data = np.ascontiguousarray(array)
    if data.dtype.byteorder == ">":
        data = data.astype(data.dtype.newbyteorder("<"))
    found = {**about_type(array), "sha256": hashlib.sha256(data.tobytes()).hexdigest()}
    wide = data.astype(np.float64) if data.size else np.zeros(0)
    finite = wide[np.isfinite(wide)]
    return {
        **found,
        "finite": int(finite.size),
        "min": float(finite.min()) if finite.size else None,
        "max": float(finite.max()) if finite.size else None,
        "mean": float(finite.mean()) if finite.size else None,
    }


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
        what = error if zipfile.is_zipfile(path) else "it is no archive of arrays"
        raise DataError(f"{path} is not a readable .npz file: {what}") from error
