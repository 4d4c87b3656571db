# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Versions of the tools outside Python that decide the bytes of a library: LLVM and the linker."""

from __future__ import annotations

import functools
import subprocess

from qcompiler.errors import UnsupportedByTargetError
from qcompiler.linker import find_linker


@functools.lru_cache(maxsize=4)
def toolchain(triple: str = "") -> dict[str, str]:
    """Return the version of TVM's LLVM, and of the linker for a target triple ("": this machine).

    Where there is no linker, its version is "none": the link itself says what is missing.
    """
    from tvm.target import codegen

    return {"llvm": str(codegen.llvm_version_major()), "linker": _linker_version(triple)}


def _linker_version(triple: str) -> str:
    """Return the first line that the linker says about itself."""
    try:
        command = [*find_linker(triple), "-Wl,--version"]
        said = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=60
        )
    except (OSError, subprocess.SubprocessError, UnsupportedByTargetError):
        return "none"
    lines = [line for line in said.stdout.splitlines() if "ld" in line.lower().split()[:2]]
    return (lines or said.stdout.splitlines() or ["unknown"])[0].strip()
