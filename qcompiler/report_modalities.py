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
    "What depends on one input alone, and where inputs meet. The last columns are what this region"
    " costs when it alone is quantized: the signal-to-noise ratio of the worst output, and the drop"
    " of the metric. The lowest ratio costs most, and its selector asks for something else"
    " (<code>--region SELECTOR=fp32</code>)."
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
        weights = number(m.get("parameter_bytes") or m.get("weight_bytes"))
        cells = [
            Cell(f"<code>{escape(m.get('name', ''))}</code>"),
            text(m.get("kind", "")),
            Cell(_precisions(m)),
            num(None if weights is None else weights / 1000, ".1f"),
            num(number(m.get("latency_ms")), ".4f"),
            num(level, ".1f"),
            num(number(m.get("drop_alone")), ".3g"),
        ]
        rows.append(("bad" if worst else "", cells))
    figures = ("parameters, kB", "time, ms", "SQNR alone, dB", "drop alone")
    heads = [
        *((title, "text") for title in ("selector", "made of", "products")),
        *((title, "number") for title in figures),
    ]
    return section(
        "modalities", "Regions by input", _ABOUT,
        table(heads, rows, "by-input") + _asked(report),
    )  # fmt: skip


_LIMITS = {"max_drop": "drop alone", "max_latency_ms": "time, ms", "max_size_mb": "parameters, MB"}


def _asked(report: Report) -> str:
    """Return the table of what was asked of regions; empty where nothing was."""
    asked = report.get("regions")
    if not isinstance(asked, Mapping):
        return ""
    rows = []
    for selector, entry in asked.items():
        observer = entry.get("observer")
        if observer and entry.get("percentile"):
            observer = f"{observer} {entry['percentile']:g}"
        limits = entry.get("limits") or {}
        for name, limit in limits.items() or [("", None)]:
            found = number((entry.get("found") or {}).get(name))
            over = found is not None and limit is not None and found > limit
            cells = [
                Cell(f"<code>{escape(selector)}</code>"), text(observer or "as the model"),
                text(_LIMITS.get(name, "")), num(limit, ".3g"), num(found, ".3g"),
            ]  # fmt: skip
            rows.append(("bad" if over else "", cells))
    heads = [("selector", "text"), ("observer", "text"), ("limit on", "text"),
             ("at most", "number"), ("found", "number")]  # fmt: skip
    return table(heads, rows, "by-region") if rows else ""


def _precisions(m: Mapping[str, Any]) -> str:
    counts = m.get("precisions") or {}
    return " ".join(f"{count} {chip(str(name))}" for name, count in sorted(counts.items()))
