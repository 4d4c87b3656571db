# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures that every test may use, and a guard on which package is tested."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# The checkout holds qcompiler/ without qcompiler.passes and qcompiler.targets: until they are
# installed, these are passes/ and targets/. With the checkout on sys.path, as `python -m pytest`
# puts it there, that folder would hide the installed package.
sys.path[:] = [p for p in sys.path if Path(p or os.getcwd()).resolve() != ROOT]
sys.path.append(str(Path(__file__).parent))  # the modules beside the tests, by their names

# The same examples on every machine and run; a failing example is a fact, not luck.
settings.register_profile("qcompiler", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("qcompiler")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the files in tests/golden"
    )


def pytest_report_header() -> str:
    import qcompiler
    import qcompiler.passes

    return f"qcompiler: {qcompiler.__file__}, passes: {qcompiler.passes.__file__}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `isa(name)` where the CPU lacks that row's features."""
    for mark in item.iter_markers("isa"):
        from qcompiler.cpu import missing_features
        from qcompiler.targets.isa import ISA_TABLE

        missing = missing_features(ISA_TABLE[mark.args[0]].cpu_features)
        if missing:
            pytest.skip(f"the CPU lacks {', '.join(missing)}")


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run in a neutral folder: `python -c` in a subprocess would import from the checkout too."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(scope="module", autouse=True)
def _no_doubt_by_times(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let no region go back to float because a busy machine measured it so, in modules not `timed`.

    Programs that tests start measure as they do for a user.
    """
    import qcompiler.fallback

    marks = getattr(request.module, "pytestmark", [])
    with pytest.MonkeyPatch.context() as patch:
        if "timed" not in {m.name for m in (marks if isinstance(marks, list) else [marks])}:
            patch.setattr(qcompiler.fallback, "lost_to_float", lambda report: False)
        yield


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that the tests of one module share, and no others."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOMPILER_CACHE", str(folder))
        yield folder


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder, on a terminal of 200 columns, as the command line is tested."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("QCOMPILER_CRASH_DIR", raising=False)
    return tmp_path


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
