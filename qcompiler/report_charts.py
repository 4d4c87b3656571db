# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The report's charts: matplotlib figures as SVG text to stand inside an HTML page.

Only the object interface of matplotlib is used (no pyplot): no global state, no display, no window.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

P = ParamSpec("P")

INK, FAINT, GRID = "#1f2933", "#6b7784", "#d9dee3"
BEFORE, AFTER, BAD = "#7b8794", "#1f77b4", "#c0392b"
PALETTE = {
    "w8a8": "#1f77b4",
    "w4a8": "#17a589",
    "fp16": "#e59866",
    "fp32": "#7b8794",
}
"""Colours by precision: blue and green for integers, greys and orange for floats; told apart also
in greyscale and by the common colour-vision deficiencies."""
OTHER = "#8e6bbf"


def color_of(precision: str) -> str:
    """Return the colour of a precision; every integer precision without its own shares one."""
    return PALETTE.get(precision, OTHER)


def _plain_text(chart: Callable[P, str]) -> Callable[P, str]:
    """Make the texts of a chart plain: a name with two dollar signs is a name, not a formula."""

    @functools.wraps(chart)
    def draw(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # a user's matplotlibrc must not change the report
            matplotlib.rcParams["text.parse_math"] = False
            return chart(*args, **kwargs)

    return draw


@_plain_text
def before_after(title: str, bars: Sequence[tuple[str, float, str]], good: bool | None) -> str:
    """Return a chart of two horizontal bars, each with its value written at its end.

    Args:
        title: Heading, with the unit.
        bars: (label, value, value as text), float first.
        good: Whether the change is welcome; None where that cannot be said.
    """
    figure, axes = _figure(4.1, 1.35)
    colors = [BEFORE, BAD if good is False else AFTER]
    values = [max(value, 0.0) for _, value, _ in bars]
    top = max(values, default=0.0) or 1.0
    positions = list(range(len(bars)))[::-1]
    axes.barh(positions, values, color=colors[: len(bars)], height=0.62)
    for position, (_, _, text), value in zip(positions, bars, values, strict=True):
        inside = value > 0.72 * top
        axes.text(
            value - 0.02 * top if inside else value + 0.02 * top,
            position,
            text,
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else INK,
            fontsize=9.5,
            fontweight="bold",
        )
    axes.set_yticks(positions, [label for label, _, _ in bars], fontsize=9.5)
    axes.set_xlim(0, top * 1.02)
    axes.set_xticks([])
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    _clean(axes)
    return _svg(figure, title)


@_plain_text
def region_latency(rows: Sequence[tuple[str, float, str]], unit: str, rest: str = "") -> str:
    """Return horizontal bars of the latency per fused region, coloured by precision.

    Args:
        rows: (region, latency, precision), in the order to show, the first on top.
        unit: Unit of the latencies.
        rest: What the chart leaves out, as one line under it.
    """
    figure, axes = _figure(9.2, max(1.4, 0.24 * len(rows) + 0.9))
    positions = list(range(len(rows)))[::-1]
    values = [latency for _, latency, _ in rows]
    top = max(values, default=0.0) or 1.0
    axes.barh(positions, values, color=[color_of(p) for _, _, p in rows], height=0.72)
    for position, value in zip(positions, values, strict=True):
        axes.text(value + 0.008 * top, position, f"{value:.3g}", va="center", fontsize=8, color=INK)
    axes.set_yticks(positions, [_shorten(name) for name, _, _ in rows], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, top * 1.1)
    axes.set_xlabel(f"latency, {unit}" + (f"   ({rest})" if rest else ""), fontsize=8.5)
    axes.tick_params(axis="x", labelsize=8, colors=FAINT)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    _legend(axes, list(dict.fromkeys(p for _, _, p in rows)))
    _clean(axes)
    return _svg(figure, "Latency per region")


@_plain_text
def precision_share(shares: Sequence[tuple[str, float]], title: str) -> str:
    """Return one stacked bar: the share of each precision, with its percentage inside."""
    figure, axes = _figure(9.2, 0.95)
    total = sum(value for _, value in shares) or 1.0
    left = 0.0
    for precision, value in shares:
        width = 100.0 * value / total
        axes.barh([0], [width], left=[left], color=color_of(precision), height=0.6)
        if width >= 6:
            axes.text(
                left + width / 2,
                0,
                f"{precision} {width:.0f}%",
                ha="center",
                va="center",
                color="white",
                fontsize=9,
                fontweight="bold",
            )
        left += width
    axes.set_xlim(0, 100)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    _clean(axes)
    return _svg(figure, title)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(axes: Any, precisions: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    if len(precisions) > 1:
        handles = [Patch(color=color_of(p), label=p) for p in precisions]
        axes.legend(handles=handles, fontsize=8.5, frameon=False, loc="lower right")


def _clean(axes: Any) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _shorten(name: str, limit: int = 44) -> str:
    """Keep both ends of a long name: the start says the block, the end says the operator."""
    if len(name) <= limit:
        return name
    half = (limit - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def _svg(figure: Any, label: str) -> str:
    """Return the figure as an <svg> element with text as text, the same bytes for the same data."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"qcompiler {label}", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids must be unique in the page, and each figure numbers its own from one.
    prefix = re.sub(r"\W+", "-", label.lower())
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg ", '<svg role="img" ', 1).strip()
