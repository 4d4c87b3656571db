# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Link TVM's object files into a small shared library whose bytes depend on the code alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qcompiler.errors import CodegenError, UnsupportedByTargetError, UsageError

# No start files: their `.comment` and constructors would carry the C compiler's version into the
# library, and generated code needs neither. No build id, no symbol table: only what is loaded.
_FLAGS = (
    "-shared",
    "-fPIC",
    "-nostartfiles",
    "-Wl,--build-id=none",
    "-Wl,--hash-style=gnu",
    "-Wl,-z,noexecstack",
    "-Wl,-s",
)
_ROOM = 16 << 20
_NATIVE = ("cc", "gcc", "clang", "c++", "g++")


def find_linker(triple: str = "") -> list[str]:
    """Return the command that links for an LLVM target triple ("": this machine).

    `CC` wins for this machine; then the system's compilers (`aarch64-linux-gnu-gcc` for a foreign
    triple); then the `ziglang` package, which the extra `qcompiler[cross]` installs.

    Raises:
        UnsupportedByTargetError: There is none.
    """
    architecture = triple.split("-")[0]
    if not architecture or architecture == os.uname().machine:
        names = (*os.environ.get("CC", "").split()[:1], *_NATIVE)
        zig_target: list[str] = []
    else:
        names = (f"{architecture}-linux-gnu-gcc", f"{architecture}-linux-gnu-clang")
        zig_target = ["-target", f"{architecture}-linux-gnu.2.28"]
    for name in names:
        command = shutil.which(name)
        if command:
            return [command]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", *zig_target]
    package = f"gcc-{architecture}-linux-gnu" if zig_target else "gcc"
    raise UnsupportedByTargetError(
        f"no C compiler to link for {triple or 'this machine'}: looked for {', '.join(names)} and "
        "the package ziglang",
        hint=f"install one (Debian: {package}), or pip install 'qcompiler[cross]'",
    )


def link_library(output: str, objects: Sequence[str], *, triple: str = "", **_: Any) -> None:
    """Link object files; a function to pass to TVM's `export_library` as `fcompile`.

    Same objects and same linker version give the same bytes: names of temporary files do not
    enter.

    Raises:
        CodegenError: The linker failed; the message ends with what it said.
        UnsupportedByTargetError: No linker for the triple.
    """
    command = [*find_linker(triple), *_FLAGS, "-o", str(output), *map(str, objects), "-lm"]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode:
        said = result.stderr.strip() or f"exit status {result.returncode}"
        raise CodegenError(f"linking failed: {' '.join(command[:1])}: {said[-2000:]}")


link_library.object_format = "o"  # type: ignore[attr-defined]  # what TVM asks an fcompile for


def export_library(executable: Any, *, triple: str = "") -> bytes:
    """Return the bytes of the shared library of what `tvm.compile` returned.

    Raises:
        CodegenError: The linker failed.
        UnsupportedByTargetError: No linker for the triple.
        UsageError: No room for temporary files.
    """
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < _ROOM:  # LLVM ends the process when it cannot write
        raise UsageError(
            f"no room for temporary files in {tempfile.gettempdir()}: {free >> 10} kB free, "
            f"at least {_ROOM >> 20} MB are needed",
            hint="make room, or name another folder in the environment variable TMPDIR",
        )
    with tempfile.TemporaryDirectory(prefix="qcompiler-link-") as folder:
        path = Path(folder) / "lib.so"
        executable.export_library(
            str(path), fcompile=link_library, workspace_dir=folder, triple=triple
        )
        return path.read_bytes()
