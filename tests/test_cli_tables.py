# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Tables of the command line show names and messages as they are."""

from __future__ import annotations

import pytest

from qcompiler.cli.bench import print_table
from qcompiler.cli.check import Verdict, print_verdicts


def test_brackets_in_messages_and_names_are_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    figures = {"problem": "not installed (pip install 'qcompiler[bench]')"}
    print_table({"artifact": "a[b].qcm", "threads": 1, "runners": {"net[0]": figures}})
    shown = capsys.readouterr().out
    for text in ("a[b].qcm, 1 thread(s)", "net[0]", "pip install 'qcompiler[bench]'"):
        assert text in shown
    verdict = Verdict("accuracy", True, 1.0, 1.0, "top1 of [x]", 0.0)
    print_verdicts([verdict], "a[b].qcm against m[c].onnx")
    shown = capsys.readouterr().out
    for text in ("a[b].qcm against m[c].onnx", "top1 of [x]", "passed"):
        assert text in shown
