# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""A picture of a comparison: bars of medians per runner, and the slowest layers beside the peak.

Needs matplotlib, which nothing else here does; the picture's kind is that of the file's ending.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompiler.errors import UsageError
from qcompiler.svg import FAINT, GRID, INK, PALETTE, color_of

__all__ = ["FORMATS", "Panel", "check", "draw", "layers_panel", "runners_panel"]

FORMATS = (".png", ".svg", ".pdf")

_ROW = 0.3
"""Inches per bar."""
_BEYOND = 3.0
"""A bar longer than this many times the next one is cut, so that the others can be seen."""
_PEERS_INT8 = PALETTE["w6a8"]
_PEERS_FLOAT = PALETTE["fp16"]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: what it is, how long, what is written at its end, and its colour."""

    label: str
    value: float
    text: str
    color: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars with one axis."""

    title: str
    axis: str
    bars: tuple[Bar, ...] = field(default=())


def check(path: Path) -> None:
    """Refuse a chart that could not be drawn, before anything is measured.

    Raises:
        UsageError: matplotlib is not installed, or the ending is of no known format.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"chart {path}: the file must end in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "a chart needs matplotlib, which is not installed",
            hint="pip install 'qcompiler[bench]'",
        )


def runners_panel(title: str, runners: Mapping[str, Mapping[str, Any]]) -> Panel:
    """Return bars of the medians of runners; those without a timing are left out.

    Args:
        title: Over the bars.
        runners: Figures by runner as `bench --json` has them: "median_ms", "min_ms", "spread".
    """
    bars = []
    for name, figures in runners.items():
        if "median_ms" not in figures:
            continue
        median = float(figures["median_ms"])
        memory = figures.get("peak_memory_mb")
        text = f"{median:#.3g} ms" + (f", {memory:.0f} MB" if memory else "")
        bars.append(Bar(name, median, text, _runner_color(name)))
    return Panel(title, "median of one call, ms (less is faster); peak memory", tuple(bars))


def layers_panel(breakdown: Mapping[str, Any], count: int = 12) -> Panel:
    """Return bars of the slowest layers, from `Breakdown.to_json`."""
    slowest = sorted(breakdown["layers"], key=lambda layer: -layer["ms"])[:count]
    bars = []
    for layer in slowest:
        text = f"{layer['share_of_time']:.0%} of the time"
        if layer["gmacs"] is not None:
            text += f", {layer['gmacs']:.0f} GMAC/s"
        if layer["share_of_peak"] is not None:
            text += f" ({layer['share_of_peak']:.0%} of peak)"
        bars.append(Bar(layer["name"], layer["ms"], text, color_of(layer["precision"])))
    peak = breakdown["peaks"].get("int8")
    said = f"; int8 peak {peak['gmacs']:.0f} GMAC/s ({peak['instruction']})" if peak else ""
    return Panel(f"slowest layers{said}", "ms", tuple(bars))


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw panels one under another.

    Args:
        path: Where to; the ending says the format.
        title: Over everything.
        panels: What to draw; those without bars are left out.

    Raises:
        UsageError: As `check`, or the file cannot be written.
    """
    check(path)
    from matplotlib.figure import Figure

    shown = [panel for panel in panels if panel.bars]
    heights = [len(panel.bars) + 2.6 for panel in shown] or [1.0]
    figure = Figure(figsize=(9, 0.7 + _ROW * sum(heights)), layout="constrained", dpi=120)
    figure.suptitle(title, fontsize=11, color=INK)
    if shown:
        grid = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)
        for axes, panel in zip(grid[:, 0], shown, strict=True):
            _panel(axes, panel)
    try:
        # Without a date and with fixed ids, the same figures give the same bytes.
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise UsageError(f"chart {path} cannot be written: {error}") from error


def _panel(axes: Any, panel: Panel) -> None:
    values = sorted(bar.value for bar in panel.bars)
    limit = values[-1]
    for short, long in itertools.pairwise(values):
        if long > _BEYOND * short and long > _BEYOND * values[len(values) // 2]:
            limit = 1.1 * short
            break
    positions = range(len(panel.bars))
    lengths = [min(bar.value, limit) for bar in panel.bars]
    axes.barh(positions, lengths, color=[bar.color for bar in panel.bars], height=0.72)
    axes.set_yticks(positions, [bar.label for bar in panel.bars], fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * limit)
    for at, (bar, length) in enumerate(zip(panel.bars, lengths, strict=True)):
        cut = "→ " if bar.value > limit else ""
        axes.annotate(
            cut + bar.text,
            (length, at),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_title(panel.title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(panel.axis, fontsize=8, color=FAINT)
    axes.tick_params(axis="x", labelsize=8, colors=FAINT)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _runner_color(name: str) -> str:
    """Ours in the precision's colour; peers' int8 orange, their float grey."""
    first, _, precision = name.partition(" ")
    if first == "qcompiler":
        return color_of(precision) if precision else PALETTE["w8a8"]
    return _PEERS_INT8 if name.endswith("int8") else _PEERS_FLOAT
