# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What README shows runs, and what it names exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the bundled models, as README's commands expect, and nothing else."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_it_starts_with_the_two_commands() -> None:
    first = re.search(r"^```\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert first is not None
    assert README.index(first.group(0)) < 40
    assert [line.split()[:2] for line in first.group(1).splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]


@pytest.mark.e2e
def test_the_python_block_runs(checkout: Path) -> None:
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=checkout, check=False
    )
    assert done.returncode == 0, done.stderr
    model, metric, shape = done.stdout.splitlines()
    (shown,) = blocks("text")
    assert re.sub(r"x86-\w+", "", model) == re.sub(r"x86-\w+", "", shown.splitlines()[0])
    assert metric.startswith("{'name': 'top1', 'float': 0.99")
    assert shape.startswith("(600, 10) 0.99")


@pytest.mark.e2e
def test_the_shell_commands_run(checkout: Path) -> None:
    from qcompiler.cli import main

    text = "".join(blocks("console")).replace("\\\n", " ")
    commands = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    assert {shlex.split(c)[1] for c in commands} == {
        *("compile", "run", "check", "bench", "export", "inspect", "targets", "doctor"),
    }
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[0] == "qcompile"
        assert main(words[1:]) == 0, command


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
