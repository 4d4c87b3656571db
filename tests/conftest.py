# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures that every test may use."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# The same examples on every machine and run; a failing example is a fact, not luck.
settings.register_profile("qcompiler", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("qcompiler")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the files in tests/golden"
    )


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers seeded by the test's name."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@dataclass
class Golden:
    """Text kept in a file beside the tests; compare with `==`."""

    path: Path
    update: bool

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return NotImplemented
        if self.update:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(other, encoding="utf-8")
            return True
        if not self.path.exists():
            pytest.fail(f"{self.path} does not exist: run pytest with --update-golden")
        return self.path.read_text(encoding="utf-8") == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return self.path.read_text(encoding="utf-8") if self.path.exists() else f"<{self.path}>"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden text of this test: tests/golden/<file>/<test>.txt."""
    root = Path(__file__).parent
    file = Path(request.node.path).relative_to(root).with_suffix("")
    name = request.node.name.replace("/", "_")
    path = root / "golden" / file / f"{name}.txt"
    return Golden(path, bool(request.config.getoption("--update-golden")))
