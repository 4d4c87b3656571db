# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The regions of a model with several inputs, as a section of the report's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.report import Report, number
from qcompiler.report_html import Cell, chip, num, section, table, text
from qcompiler.svg import escape

_ABOUT = (
    "What depends on one input alone, and where inputs meet. The last column is the signal-to-noise"
    " ratio of the worst output when this region alone is quantized: the lowest one costs most, and"
    " its selector asks for another precision (<code>--override SELECTOR=fp32</code>)."
)


def modalities(report: Report) -> str:
    """Return the section; empty for a model of one region."""
    found = report.get("modalities")
    if not isinstance(found, list) or len(found) < 2:
        return ""
    levels = [number(m.get("sqnr_alone")) for m in found]
    lowest = min((level for level in levels if level is not None), default=None)
    rows = []
    for m, level in zip(found, levels, strict=True):
        worst = level is not None and level == lowest
        weights = number(m.get("weight_bytes"))
        cells = [
            Cell(f"<code>{escape(m.get('name', ''))}</code>"),
            text(m.get("kind", "")),
            Cell(_precisions(m)),
            num(None if weights is None else weights / 1000, ".1f"),
            num(number(m.get("latency_ms")), ".4f"),
            num(level, ".1f"),
        ]
        rows.append(("bad" if worst else "", cells))
    heads = [
        *((title, "text") for title in ("selector", "made of", "products")),
        *((title, "number") for title in ("weights, kB", "time, ms", "SQNR alone, dB")),
    ]
    return section("modalities", "Regions by input", _ABOUT, table(heads, rows, "by-input"))


def _precisions(m: Mapping[str, Any]) -> str:
    counts = m.get("precisions") or {}
    return " ".join(f"{count} {chip(str(name))}" for name, count in sorted(counts.items()))
