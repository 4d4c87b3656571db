# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ -> fatbin with nvcc; a machine that compiles needs no GPU and no driver."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qcompiler.cuda_driver import FLAGS
from qcompiler.errors import CodegenError

_OLDEST = (11, 0)  # cp.async and sm_80
_SINCE = {86: (11, 1), 89: (11, 8), 90: (11, 8)}


@dataclass(frozen=True, slots=True)
class Nvcc:
    """A CUDA compiler."""

    path: str
    version: tuple[int, int]

    def problem(self, sm: int) -> str | None:
        """Return why it cannot compile for a compute capability, or None."""
        needed = max(_OLDEST, _SINCE.get(sm, _OLDEST))
        if self.version < needed:
            found, least = (".".join(map(str, v)) for v in (self.version, needed))
            return (
                f"nvcc {found} at {self.path} does not know sm_{sm}, which needs {least} or later"
            )
        return None


def find_nvcc() -> Nvcc | None:
    """Return nvcc: what NVCC names, else on the PATH, else under CUDA_HOME or /usr/local/cuda."""
    places = [
        os.environ.get("NVCC", ""),
        shutil.which("nvcc") or "",
        *(os.path.join(root, "bin", "nvcc")
          for root in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda") if root),
    ]  # fmt: skip
    for place in places:
        if place and os.access(place, os.X_OK) and os.path.isfile(place):
            version = _version(place)
            if version is not None:
                return Nvcc(place, version)
    return None


def nvcc_version() -> str:
    """Return the version of nvcc, or "none": it decides an artifact's bytes."""
    found = find_nvcc()
    return "none" if found is None else ".".join(map(str, found.version))


@functools.cache
def _version(path: str) -> tuple[int, int] | None:
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else None


def compile_fatbin(nvcc: Nvcc, source: str, sm: int, *, verbose: bool = False) -> tuple[bytes, str]:
    """Return (fatbin, what ptxas said) of a source: machine code, and PTX for later GPUs.

    The same source and the same nvcc give the same bytes.

    Raises:
        CodegenError: nvcc failed; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="qcompiler-nvcc-") as folder:
        file = Path(folder) / "kernels.cu"
        file.write_text(source, encoding="utf-8")
        command = [
            nvcc.path, "-fatbin", *FLAGS,
            "-gencode", f"arch=compute_{sm},code=[sm_{sm},compute_{sm}]",
            *(["-Xptxas", "-v"] if verbose else []),
            "-o", "kernels.fatbin", "kernels.cu",
        ]  # fmt: skip
        # Relative names: the folder's own must not enter the bytes.
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
            raise CodegenError(
                f"nvcc refused the kernels for sm_{sm}: {said[-2000:]}",
                hint="this is a defect of qcompiler; please report it with the model",
            )
        return (Path(folder) / "kernels.fatbin").read_bytes(), done.stderr
