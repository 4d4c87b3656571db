# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Let other programs see an older CPU than this one: `benchmarks/isa/mask_cpuid.c`, preloaded.

Runtimes choose their kernels by what CPUID says. Compiling our own kernels for an older instruction
set is an option of ours; to compare them, the others must be made to choose as they would on that
CPU. Hiding features in /proc/cpuinfo or by settings of each runtime would miss some of their
libraries; trapping the instruction reaches all of them.

    python benchmarks/masked.py avx2 -- COMMAND ...
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qcompiler.errors import UsageError

LEVELS: Mapping[str, tuple[str, str]] = {
    "avx2": ("x86-avx2", "x86-64-v3"),
    "avxvnni": ("x86-avxvnni", "alderlake"),
    "avx512vnni": ("x86-avx512vnni", "cascadelake"),
}
"""What is left of the CPU: our target for it, and LLVM's name of a processor like it."""

_SOURCE = Path(__file__).parent / "isa" / "mask_cpuid.c"
_PROBE = "import sys; sys.exit(0)"


def masked_environment(level: str, folder: Path) -> dict[str, str]:
    """Compile the shim into `folder` and return the variables that a masked process needs.

    Raises:
        UsageError: An unknown level, no C compiler, or a machine that cannot trap CPUID.
    """
    if level not in LEVELS:
        raise UsageError(f"unknown level {level!r}: known are {', '.join(LEVELS)}")
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise UsageError(
            f"CPUID cannot be trapped on {platform.system()} {platform.machine()}",
            hint="it takes Linux on x86-64",
        )
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise UsageError(
            "there is no C compiler to build mask_cpuid.c with", hint="install cc, gcc or clang"
        )
    library = folder.resolve() / "mask_cpuid.so"
    command = [compiler, "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(library), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        raise UsageError(f"{compiler} cannot build mask_cpuid.c: {built.stderr.strip()[:300]}")
    before = os.environ.get("LD_PRELOAD", "")
    found = {
        "LD_PRELOAD": f"{library}:{before}" if before else str(library),
        "MASK_CPUID": level,
    }
    tried = subprocess.run(
        [sys.executable, "-c", _PROBE], env={**os.environ, **found}, capture_output=True, text=True
    )
    if tried.returncode != 0:
        raise UsageError(
            f"CPUID cannot be trapped here: {tried.stderr.strip() or tried.returncode}",
            hint="it takes Linux 4.12 and `cpuid_fault` among the flags of /proc/cpuinfo",
        )
    return found


def main() -> int:
    """Run a command on a CPU that seems older; return its exit status."""
    arguments = sys.argv[1:]
    if len(arguments) < 3 or arguments[1] != "--":
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            environment = {**os.environ, **masked_environment(arguments[0], Path(folder))}
        except UsageError as error:
            print(f"masked.py: {error}", file=sys.stderr)
            return error.exit_code
        return subprocess.run(arguments[2:], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
