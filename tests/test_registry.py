# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Targets and passes by name, built-in and from other distributions."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import qcompiler.passes
from qcompiler import registry
from qcompiler.errors import TargetError, UnknownTargetError, UsageError
from qcompiler.passmanager import Pass, parse_pass
from qcompiler.targets.base import Backend
from qcompiler.targets.isa import ISA_TABLE, runnable


def test_every_row_of_the_isa_table_is_a_target() -> None:
    names = registry.target_names()
    assert set(ISA_TABLE) <= set(names)
    assert "reference" in names
    for name in names:
        backend = registry.get_target(name)
        assert isinstance(backend, Backend)
        assert backend.spec.name == name
        assert backend.spec.description


def test_host_is_a_row_that_runs_here() -> None:
    spec = registry.get_target("host").spec
    assert runnable(ISA_TABLE[spec.name])


def test_unknown_target_lists_the_known() -> None:
    with pytest.raises(UnknownTargetError, match=r"unknown target 'x86-avx3'.*x86-avx2") as caught:
        registry.get_target("x86-avx3")
    assert "did you mean" in str(caught.value)


def test_every_pass_is_registered_under_its_name() -> None:
    table = registry.pass_table()
    assert {"calibrate", "insert_qdq", "fuse", "channels_last", "fold_constants"} <= set(table)
    for module in pkgutil.iter_modules(qcompiler.passes.__path__, "qcompiler.passes."):
        for cls in vars(importlib.import_module(module.name)).values():
            if isinstance(cls, type) and issubclass(cls, Pass) and cls.__module__ == module.name:
                assert "name" not in vars(cls) or table[cls.name] is cls
    for name, cls in table.items():
        assert issubclass(cls, Pass)
        assert cls.name == name
        assert parse_pass(cls().spec(), table) == cls()


class _Points:
    def __init__(self, *points: metadata.EntryPoint) -> None:
        self.points = points

    def __call__(self, group: str) -> tuple[metadata.EntryPoint, ...]:
        return tuple(p for p in self.points if p.group == group)


def test_duplicates_name_both_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    one = metadata.EntryPoint("npu", "first.package:make", registry.TARGETS)
    two = metadata.EntryPoint("npu", "second.package:make", registry.TARGETS)
    monkeypatch.setattr(metadata, "entry_points", _Points(one, two))
    registry._points.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"first\.package:make and second\.package:make"):
            registry.target_names()
    finally:
        registry._points.cache_clear()


def test_a_broken_plugin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("npu", "no_such_package:make", registry.TARGETS)
    monkeypatch.setattr(metadata, "entry_points", _Points(point))
    registry._points.cache_clear()
    try:
        with pytest.raises(TargetError, match=r"'npu'.*no_such_package.*cannot be loaded"):
            registry.get_target("npu")
    finally:
        registry._points.cache_clear()


def test_a_target_from_another_distribution(tmp_path: Path) -> None:
    """A folder with a module and an entry point is all that a target plug-in is."""
    (tmp_path / "npu_target.py").write_text(
        "from qcompiler.targets.base import TargetSpec\n"
        "from qcompiler.targets.reference import ReferenceBackend\n"
        "from qcompiler.types import Precision\n"
        "SPEC = TargetSpec('npu', 'an imaginary accelerator', (Precision.W8A8,))\n"
        "def make(name):\n"
        "    return ReferenceBackend(SPEC)\n"
    )
    info = tmp_path / "npu_target-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: npu-target\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qcompiler.targets]\nnpu = npu_target:make\n")
    program = (
        "from qcompiler.registry import get_target, target_names\n"
        "assert 'npu' in target_names()\n"
        "print(get_target('npu').spec.description)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "an imaginary accelerator", done.stderr
