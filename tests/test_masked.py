# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The shim that lets other runtimes see an older CPU (benchmarks/masked.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qcompiler.cpu import cpu_features
from qcompiler.errors import UsageError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

LEAVES = r"""
#include <cpuid.h>
#include <pthread.h>
#include <stdio.h>
static void *look(void *unused) {
  unsigned a, b, c, d;
  __cpuid_count(7, 0, a, b, c, d);
  printf("%u %u %u %u ", b >> 5 & 1, b >> 16 & 1, c >> 11 & 1, d >> 24 & 1);
  __cpuid_count(7, 1, a, b, c, d);
  printf("%u\n", a >> 4 & 1);
  return unused;
}
int main(void) {
  pthread_t thread;
  look(0);
  pthread_create(&thread, 0, look, 0);
  pthread_join(thread, 0);
  return 0;
}
"""
FEATURES = ("avx2", "avx512f", "avx512_vnni", "amx_tile", "avx_vnni")
HIDDEN = {
    "avx2": FEATURES[1:],
    "avxvnni": ("avx512f", "avx512_vnni", "amx_tile"),
    "avx512vnni": ("amx_tile",),
}


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import masked as module  # type: ignore[import-not-found]

    found: ModuleType = module
    return found


@pytest.mark.parametrize("level", HIDDEN)
def test_a_process_and_its_threads_see_what_is_left(
    masked: ModuleType, level: str, tmp_path: Path
) -> None:
    if "cpuid_fault" not in cpu_features() or shutil.which("cc") is None:
        pytest.skip("it takes a C compiler and a CPU that traps CPUID")
    program = tmp_path / "leaves"
    (tmp_path / "leaves.c").write_text(LEAVES)
    subprocess.run(["cc", tmp_path / "leaves.c", "-o", program, "-pthread"], check=True)
    environment = {**os.environ, **masked.masked_environment(level, tmp_path)}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True)
    wanted = " ".join(str(int(f in cpu_features() and f not in HIDDEN[level])) for f in FEATURES)
    assert done.stdout.splitlines() == [wanted, wanted]


def test_a_fault_of_the_program_is_still_its_own(masked: ModuleType, tmp_path: Path) -> None:
    if "cpuid_fault" not in cpu_features() or shutil.which("cc") is None:
        pytest.skip("it takes a C compiler and a CPU that traps CPUID")
    environment = {**os.environ, **masked.masked_environment("avx2", tmp_path)}
    crash = "import ctypes; ctypes.string_at(8)"
    done = subprocess.run([sys.executable, "-c", crash], env=environment, capture_output=True)
    assert done.returncode == -11


def test_what_cannot_be_masked_is_refused(
    masked: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="unknown level 'sse': known are avx2, avxvnni"):
        masked.masked_environment("sse", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(masked.platform, "machine", lambda: "aarch64")
        with pytest.raises(UsageError, match="CPUID cannot be trapped on Linux aarch64"):
            masked.masked_environment("avx2", tmp_path)
    monkeypatch.setattr(masked.platform, "machine", lambda: "x86_64")
    with monkeypatch.context() as patch:
        patch.setattr(masked.shutil, "which", lambda name: None)
        with pytest.raises(UsageError, match="there is no C compiler to build"):
            masked.masked_environment("avx2", tmp_path)
    if shutil.which("cc") is None:
        return
    with monkeypatch.context() as patch:
        patch.setattr(masked, "_SOURCE", tmp_path / "missing.c")
        with pytest.raises(UsageError, match="cannot build mask_cpuid"):
            masked.masked_environment("avx2", tmp_path)
    monkeypatch.setattr(masked, "_PROBE", "import sys; sys.exit('no faulting')")
    with pytest.raises(UsageError, match="CPUID cannot be trapped here"):
        masked.masked_environment("avx2", tmp_path)
