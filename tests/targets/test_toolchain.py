# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Versions of LLVM and the linker, as a lock names them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompiler.errors import UnsupportedByTargetError
from qcompiler.targets import toolchain as module
from qcompiler.targets.toolchain import toolchain


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    toolchain.cache_clear()
    yield
    toolchain.cache_clear()


def test_this_machine_has_both() -> None:
    found = toolchain()
    assert int(found["llvm"]) >= 15
    assert "\n" not in found["linker"]
    assert any(c.isdigit() for c in found["linker"])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("echo 'collect2 version 12'; echo 'GNU ld (Binutils) 2.40'; echo more",
         "GNU ld (Binutils) 2.40"),
        ("echo 'LLD 16.0 (compatible with GNU linkers)'", "LLD 16.0 (compatible with GNU linkers)"),
        ("exit 1", "unknown"),
    ],
)  # fmt: skip
def test_what_the_linker_says_of_itself(
    said: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linker = tmp_path / "cc"
    linker.write_text(f"#!/bin/sh\n{said}\n")
    linker.chmod(linker.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(module, "find_linker", lambda _triple: [str(linker)])
    assert toolchain()["linker"] == expected


def test_no_linker_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_triple: str) -> list[str]:
        raise UnsupportedByTargetError("no C compiler")

    monkeypatch.setattr(module, "find_linker", missing)
    assert toolchain()["linker"] == "none"
