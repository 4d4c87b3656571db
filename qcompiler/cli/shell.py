# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What every command shares: exit statuses, error messages, JSON output, progress, safe writing.

Exit status: 0 done and every budget kept; 1 a budget or a check not met; 2 bad usage or bad input;
3 a defect of qcompiler, with a reproducer folder; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, final

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from qcompiler.errors import QCompilerError, UsageError

DONE, NOT_MET, BAD_INPUT, DEFECT, INTERRUPTED = 0, 1, 2, 3, 130

PACKAGES = ("apache-tvm", "apache-tvm-ffi", "onnx", "onnxruntime", "numpy", "scipy")
_MODEL_SUFFIXES = (".onnx", ".qcm", ".npz", ".json")

P = ParamSpec("P")


def versions() -> dict[str, str]:
    """Return the versions of qcompiler, Python and the packages that decide a result."""
    installed = {package: package_version(package) for package in ("qcompiler", *PACKAGES)}
    return {
        "python": platform.python_version(),
        **{package: version or "not installed" for package, version in installed.items()},
    }


def package_version(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def err_console() -> Console:
    """Return a console on standard error (looked up now: tests and --json replace the stream)."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def out_console() -> Console:
    """Return a console on standard output."""
    return Console(highlight=False)


def add_row(table: Table, *cells: str) -> None:
    """Add a row of plain text: brackets in names and messages are no markup."""
    table.add_row(*(escape(cell) for cell in cells))


def say(message: str) -> None:
    """Print one line about progress or results to standard error."""
    err_console().print(escape(message))


# --- JSON output ---------------------------------------------------------------------------------


class JsonDocument:
    """The one document that a command with --json prints; set `value` before the command ends."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value: Any = None


_document = JsonDocument(False)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send everything written to standard output, by native libraries too, to standard error."""
    sys.stdout.flush()
    saved: int | None = None
    try:
        if sys.stdout.fileno() == 1 and sys.stderr.fileno() == 2:
            saved = os.dup(1)
            os.dup2(2, 1)
    except (OSError, ValueError):  # a stream without a descriptor, as in tests
        saved = None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def json_safe(value: Any) -> Any:
    """Return `value` with numpy scalars and paths as JSON has them, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    if hasattr(value, "tolist"):
        return json_safe(value.tolist())
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


# --- running a command ---------------------------------------------------------------------------


def command(function: Callable[P, int]) -> Callable[P, None]:
    """Make a function that returns an exit status a command body: errors become messages.

    A parameter named `json_output` switches standard output to one JSON document, which
    `emit` sets; when the command fails before, the document holds the error.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        global _document
        _document = JsonDocument(bool(kwargs.get("json_output", False)))
        with _stdout_to_stderr() if _document.enabled else contextlib.nullcontext():
            status = _guarded(function, *args, **kwargs)
        if _document.enabled:
            status = _printed(_as_text(_document.value), status)
        if status != DONE:
            raise typer.Exit(status)

    return run


def _printed(text: str, status: int) -> int:
    """Print the document and return the exit status."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        # What stays in the buffer would fail again when the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        err_console().print(f"[bold red]error:[/] cannot print the result: {error.strerror}")
        return status or BAD_INPUT
    return status


def emit(value: Any) -> None:
    """Set what a command with --json prints."""
    _document.value = value


def _guarded(function: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
    try:
        return function(*args, **kwargs)
    except QCompilerError as error:
        return _failed(error, error.exit_code, error.message, error.hint)
    except KeyboardInterrupt:
        return _failed(KeyboardInterrupt(), INTERRUPTED, "interrupted", None)
    except (OSError, MemoryError) as error:
        return _failed(error, BAD_INPUT, _environment_message(error), None)
    except Exception as error:  # the last resort: a defect gets a reproducer, never a traceback
        return _failed(error, DEFECT, f"{type(error).__name__}: {error}", None)


def _environment_message(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _failed(error: BaseException, status: int, message: str, hint: str | None) -> int:
    """Print one message for `error`, record it as the JSON document, and return the status."""
    folder: Path | None = None
    if status == DEFECT:
        folder = write_reproducer(error)
    console = err_console()
    label = "interrupted" if status == INTERRUPTED else "error"
    if status == INTERRUPTED and message == "interrupted":
        console.print("[bold red]interrupted[/]")
    else:
        console.print(f"[bold red]{label}:[/] {escape(message)}")
    if hint and not getattr(error, "reproducer", None):  # else its folder is part of ours
        console.print(f"[bold]hint:[/] {escape(hint)}")
    if status == DEFECT:
        kept = f"a reproducer is in {folder}" if folder else "no reproducer could be written"
        console.print(f"This is a defect of qcompiler, not of your input; {escape(kept)}")
    _document.value = _error_document(error, status, message, hint, folder)
    return status


def _error_document(
    error: BaseException, status: int, message: str, hint: str | None, folder: Path | None = None
) -> dict[str, Any]:
    return {
        "error": {
            "type": type(error).__name__,
            "message": message,
            "hint": hint,
            "node": getattr(error, "node", None),
            "value": getattr(error, "value", None),
            "reproducer": str(folder) if folder else None,
        },
        "exit_status": status,
    }


def print_error(error: BaseException, message: str) -> int:
    """Print the document of a command that did not begin: its options were wrong."""
    return _printed(_as_text(_error_document(error, BAD_INPUT, message, None)), BAD_INPUT)


def _as_text(value: Any) -> str:
    return json.dumps(json_safe(value), indent=2, ensure_ascii=False)


def write_reproducer(error: BaseException) -> Path | None:
    """Write what is needed to report a defect into a new folder and return it.

    The folder is made in QCOMPILER_CRASH_DIR, else in the working directory, else among the
    temporary files. It holds the command line, versions, the traceback and the digests of the
    files named on the command line, and for a pass that failed the printed graph before it.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for parent in (os.environ.get("QCOMPILER_CRASH_DIR"), os.getcwd(), tempfile.gettempdir()):
        if not parent:
            continue
        folder = Path(parent) / f"qcompile-crash-{stamp}-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "command.txt").write_text(shlex.join(["qcompile", *_argv]) + "\n")
            (folder / "traceback.txt").write_text(
                "".join(traceback.format_exception(type(error), error, error.__traceback__))
            )
            about = {
                "error": f"{type(error).__name__}: {error}",
                "versions": versions(),
                "machine": platform.machine(),
                "system": platform.platform(),
                "files": _file_digests(),
                "pass": getattr(error, "pass_spec", None),
            }
            (folder / "about.json").write_text(json.dumps(json_safe(about), indent=2) + "\n")
            graph = getattr(error, "reproducer", None)  # of a pass: the printed graph and the rest
            if graph and Path(graph).is_dir():
                shutil.copytree(graph, folder / "pass", dirs_exist_ok=True)
        except OSError:
            continue
        return folder
    return None


_argv: list[str] = []


def remember_arguments(argv: list[str]) -> None:
    """Keep the command line for a reproducer."""
    _argv[:] = argv


def _file_digests() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for argument in _argv:
        path = Path(argument)
        if path.suffix in _MODEL_SUFFIXES and path.is_file():
            found[argument] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    return found


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- files ---------------------------------------------------------------------------------------


def input_file(path: Path, what: str) -> Path:
    """Check that `path` names a readable file.

    Raises:
        UsageError: It does not exist, is a folder, is empty, or may not be read.
    """
    if not path.exists():
        raise UsageError(f"{what} {path} does not exist")
    if path.is_dir():
        raise UsageError(f"{what} {path} is a folder, expected a file")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{what} {path} cannot be read: permission denied")
    if path.stat().st_size == 0:
        raise UsageError(f"{what} {path} is empty")
    return path


def output_file(path: Path, what: str) -> Path:
    """Check, before any work is done, that a file can be written at `path`.

    Raises:
        UsageError: Its folder is missing or not writable, or the path is a folder.
    """
    if path.is_dir():
        raise UsageError(f"cannot write {what} {path}: it is a folder", hint="name a file in it")
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(
            f"cannot write {what} {path}: the folder {folder} does not exist",
            hint=f"make it first: mkdir -p {shlex.quote(str(folder))}",
        )
    try:  # the test that also sees a read-only file system, and that root cannot pass by
        handle, probe = tempfile.mkstemp(prefix=".qcompile-", dir=folder)
    except OSError as error:
        raise UsageError(f"cannot write {what} {path}: {error.strerror}") from error
    os.close(handle)
    os.unlink(probe)
    return path


@final
class Stopwatch:
    """Wall seconds of a block, in `seconds` after it."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._start


# --- progress ------------------------------------------------------------------------------------


@final
class ProgressBars:
    """Progress on standard error: bars on a terminal, lines when asked for, else nothing.

    Call it as the `progress` argument of `qcompiler.compile`: (stage, done, total).
    """

    def __init__(self, wanted: bool | None) -> None:
        console = err_console()
        self._lines = bool(wanted) and not console.is_terminal
        show = console.is_terminal if wanted is None else wanted and console.is_terminal
        self._bars: Progress | None = None
        if show:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
        self._stage = ""
        self._task: Any = None

    def __enter__(self) -> ProgressBars:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of `stage` are done.

        What follows a colon in `stage` are figures: they replace those shown before.
        """
        new = stage.partition(":")[0] != self._stage.partition(":")[0]
        if self._lines and (stage != self._stage or done == total):
            print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)
        self._stage = stage
        if self._bars is None:
            return
        if new:
            if self._task is not None:
                self._bars.update(self._task, visible=False)
            self._task = self._bars.add_task(escape(stage), total=total or None)
        self._bars.update(
            self._task, description=escape(stage), completed=done, total=total or None
        )
