# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The application: the table of commands, and the entry point that returns an exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich.markup import escape

from qcompiler.cli import shell
from qcompiler.cli.analyze import analyze
from qcompiler.cli.bench import bench
from qcompiler.cli.check import check
from qcompiler.cli.compile import compile_
from qcompiler.cli.export import export
from qcompiler.cli.inspect import inspect
from qcompiler.cli.machine import doctor, targets
from qcompiler.cli.run import run
from qcompiler.cli.tune import tune

app = typer.Typer(
    name="qcompile",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qcompile {shell.versions()['qcompiler']}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_print_version
    ),
) -> None:
    """Compile trained ONNX models to exact, fast integer kernels.

    Exit status: 0 done and every budget kept, 1 a budget or check not met,
    2 bad usage or bad input, 3 a defect of qcompiler (a reproducer folder is
    named), 130 interrupted.
    """


app.command("compile")(shell.command(compile_))
app.command("analyze")(shell.command(analyze))
app.command("run")(shell.command(run))
app.command("check")(shell.command(check))
app.command("bench")(shell.command(bench))
app.command("tune")(shell.command(tune))
app.command("export")(shell.command(export))
app.command("inspect")(shell.command(inspect))
app.command("targets")(shell.command(targets))
app.command("doctor")(shell.command(doctor))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    shell.remember_arguments(arguments)
    wants_json = "--json" in arguments
    try:
        code = app(args=arguments, prog_name="qcompile", standalone_mode=not wants_json)
        return _status(code)
    except SystemExit as ending:
        return _status(ending.code)
    except Exception as error:
        if not wants_json or not hasattr(error, "format_message"):
            raise
        return _misused(error)
    except KeyboardInterrupt:  # outside of a command: while the interpreter imports, for one
        shell.err_console().print(escape("interrupted"))
        return shell.INTERRUPTED


def _misused(error: Any) -> int:
    """Print a mistake on the command line, and the document that --json asked for."""
    from typer import rich_utils

    rich_utils.rich_format_error(error)
    return shell.print_error(error, error.format_message())


def _status(code: object) -> int:
    if code is None:
        return shell.DONE
    if isinstance(code, int):
        return code
    shell.say(str(code))
    return shell.BAD_INPUT
