# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest

from qcompiler import linker
from qcompiler.errors import CodegenError, UnsupportedByTargetError, UsageError
from qcompiler.linker import find_linker, link_library

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def obj(tmp_path):
    source, obj = tmp_path / "a.c", tmp_path / "a.o"
    source.write_text("#include <math.h>\nfloat f(float x) { return expf(x) + 1.0f; }\n")
    command = ["cc", "-O1", "-fPIC", "-fno-ident", "-c", str(source), "-o", str(obj)]
    subprocess.run(command, check=True)
    return obj


@needs_cc
def test_library_is_small_works_and_does_not_depend_on_names(tmp_path, obj):
    other = tmp_path / "another-folder" / "quite-another-name.o"
    other.parent.mkdir()
    shutil.copy(obj, other)
    first, second = tmp_path / "one.so", other.parent / "two.so"
    link_library(str(first), [str(obj)])
    link_library(str(second), [str(other)])
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 16 << 10
    for mark in (b".note.gnu.build-id", b"GCC: (", b".symtab"):
        assert mark not in first.read_bytes()
    function = ctypes.CDLL(str(first)).f
    function.argtypes, function.restype = [ctypes.c_float], ctypes.c_float
    assert function(0.0) == 2.0


@needs_cc
def test_linker_failure_says_why(tmp_path):
    with pytest.raises(CodegenError, match=r"linking failed: .*nowhere\.o"):
        link_library(str(tmp_path / "a.so"), [str(tmp_path / "nowhere.o")])


def test_a_full_temporary_folder_is_a_clear_error(monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(linker.shutil, "disk_usage", lambda _: usage._replace(free=64 << 10))
    with pytest.raises(UsageError, match=r"no room for temporary files in .*64 kB.*TMPDIR"):
        linker.export_library(object())


def test_no_compiler_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(linker.shutil, "which", lambda name: None)
    monkeypatch.setattr(linker, "find_spec", lambda name: None)
    monkeypatch.setenv("CC", "mycc")
    with pytest.raises(UnsupportedByTargetError, match=r"this machine: looked for mycc, cc.*cross"):
        find_linker()
    with pytest.raises(
        UnsupportedByTargetError, match=r"for riscv64-x: looked for riscv64-linux"
    ) as caught:
        find_linker("riscv64-x")
    assert caught.value.hint is not None
    assert "Debian: gcc-riscv64-linux-gnu" in caught.value.hint


def test_choice_of_the_linker(monkeypatch):
    monkeypatch.setattr(linker.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    assert find_linker() == ["/bin/cc"]
    monkeypatch.setenv("CC", "clang-19")
    assert find_linker() == ["/bin/clang-19"]
    assert find_linker("sparc64-linux-gnu") == ["/bin/sparc64-linux-gnu-gcc"]
    monkeypatch.setattr(linker.shutil, "which", lambda name: None)
    monkeypatch.setattr(linker, "find_spec", lambda name: object())
    assert find_linker("sparc64-linux-gnu")[1:] == [
        "-m",
        "ziglang",
        "cc",
        "-target",
        "sparc64-linux-gnu.2.28",
    ]
