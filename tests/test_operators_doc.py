# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""docs/operators.md is what tools/operators.py writes from the registry."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from by_path import imported

from qcompiler.onnx_import_context import CONVERTERS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    return imported("operators_doc", ROOT / "tools" / "operators.py")


def test_the_page_is_current(writer: ModuleType) -> None:
    text = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    assert text == writer.page(), "write it again: python tools/operators.py"


def test_every_converter_is_listed(writer: ModuleType) -> None:
    text = writer.page()
    assert all(f"`{op}`" in text for _, op in CONVERTERS)


def test_a_new_converter_makes_the_page_stale(
    writer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = writer.page()
    monkeypatch.setitem(CONVERTERS, ("", "BrandNew"), lambda ctx: None)
    assert writer.page() != before
