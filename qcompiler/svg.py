# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""A little SVG: what the report's charts are drawn with, and the colours that they share.

Drawings are text to stand inside an HTML page: no file, no font and no script is loaded, text stays
text (it can be searched and copied), and the same figures give the same bytes.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

INK, FAINT, GRID, PAPER = "#1f2933", "#5f6b78", "#d9dee3", "#ffffff"
BEFORE, GOOD, BAD = "#7b8794", "#1e8449", "#c0392b"

PALETTE = {
    "fp32": "#6b7784",
    "fp16": "#9fa9b3",
    "w8": "#88419d",
    "w4": "#c994c7",
    "w8a8-dynamic": "#332288",
    "w8a8-dynamic-tensor": "#6a5acd",
    "w8a8": "#0072b2",
    "w8a7": "#56b4e9",
    "w7a8": "#009e73",
    "w6a8": "#e69f00",
    "w4a8": "#d55e00",
    "w4a8-group": "#8c510a",
}
"""Colour of each precision, in the order of legends: floats grey, weights only purple, integers
from blue (8 bits) to red (4 bits). The integer colours are Okabe and Ito's, told apart with the
common colour-vision deficiencies and in greyscale."""
OTHER = "#444444"

_WIDE = 0.6
"""Mean width of a character over the font size: that of the widest common sans-serif."""
_BOLD = 0.7


def color_of(precision: str) -> str:
    """Return the colour of a precision."""
    return PALETTE.get(precision, OTHER)


def ink_on(color: str) -> str:
    """Return black or white, whichever reads better on a colour."""
    r, g, b = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b)]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # The contrast ratio of WCAG 2.1 against white and against black.
    return "#ffffff" if 1.05 / (light + 0.05) >= (light + 0.05) / 0.05 else "#000000"


def in_order(precisions: Iterable[str]) -> list[str]:
    """Return distinct precisions in the order of legends."""
    known = list(PALETTE)
    found = dict.fromkeys(precisions)
    return sorted(found, key=lambda p: known.index(p) if p in known else len(known))


def escape(value: object) -> str:
    """Return text that can stand in HTML and SVG, in attributes too."""
    # Control characters are not allowed in either; names come from users' models.
    text = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]", "\ufffd", str(value))
    return html.escape(text, quote=True)


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Return about how wide a text is."""
    return (_BOLD if bold else _WIDE) * size * len(text)


def fitted(text: str, width: float, size: float) -> str:
    """Return the text, its middle left out where it is wider than `width`."""
    most = max(int(width / (_WIDE * size)), 1)
    return shorten(text, most)


def shorten(text: str, limit: int) -> str:
    """Keep both ends of a long name: the start says the block, the end says the operator."""
    if len(text) <= limit:
        return text
    if limit < 5:
        return text[:limit]
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def short_name(name: str) -> str:
    """Return a name without what its exporter repeats: `/a/a.0/conv1/Conv` -> `a.0/conv1`."""
    plain = re.sub(r"_output_\d+$", "", name)  # a value: its operator tells it from others
    parts = [p for p in plain.split("/") if p]
    parts = [p for i, p in enumerate(parts) if i + 1 == len(parts) or not _repeats(p, parts[i + 1])]
    if plain == name and len(parts) > 1 and re.fullmatch(r"[A-Z][A-Za-z]+", parts[-1]):
        parts = parts[:-1]
    return "/".join(parts) or name


def _repeats(part: str, following: str) -> bool:
    return following.startswith((f"{part}.", f"{part}_"))


class Drawing:
    """An SVG element under construction; lengths are CSS pixels, y grows downwards."""

    def __init__(self, width: float, height: float, label: str, name: str) -> None:
        """Start a drawing.

        Args:
            width: Natural width; the drawing shrinks with the page.
            height: Natural height.
            label: What it shows, for who cannot see it.
            name: Its id in the page, after "chart-".
        """
        self.width, self.height = width, height
        self.label = label
        self.name = name
        self.parts: list[str] = []

    def __str__(self) -> str:
        """Return the element."""
        return (
            f'<svg class="chart" id="chart-{escape(self.name)}" role="img" '
            f'aria-label="{escape(self.label)}" viewBox="0 0 {_n(self.width)} {_n(self.height)}" '
            f'width="{_n(self.width)}" height="{_n(self.height)}">{"".join(self.parts)}</svg>'
        )

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, title: str = "",
        **attributes: object,
    ) -> None:  # fmt: skip
        """Draw a rectangle; a negative extent draws nothing."""
        self._add(
            "rect", title, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), fill=fill,
            **attributes,
        )  # fmt: skip

    def line(self, x1: float, y1: float, x2: float, y2: float, color: str, width: float = 1.0,
             **attributes: object) -> None:  # fmt: skip
        """Draw a line."""
        self._add("line", "", x1=x1, y1=y1, x2=x2, y2=y2, stroke=color, stroke_width=width,
                  **attributes)  # fmt: skip

    def path(
        self, points: str, color: str, width: float = 1.0, fill: str = "none", title: str = "",
        **attributes: object,
    ) -> None:  # fmt: skip
        """Draw a path, given in SVG's own letters."""
        self._add("path", title, d=points, stroke=color, stroke_width=width, fill=fill,
                  **attributes)  # fmt: skip

    def polyline(self, points: Sequence[tuple[float, float]], color: str, width: float) -> None:
        """Draw a line through points."""
        self.path("M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points), color, width)

    def mark(
        self, kind: str, x: float, y: float, r: float, fill: str, title: str = "",
        **attributes: object,
    ) -> None:  # fmt: skip
        """Draw a point: "o" circle, "s" square, "d" diamond, "^" triangle."""
        if kind == "o":
            self._add("circle", title, cx=x, cy=y, r=r, fill=fill, **attributes)
            return
        corners = {
            "s": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
            "d": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
            "^": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
        }[kind]
        points = " ".join(f"{_n(x + r * dx)},{_n(y + r * dy)}" for dx, dy in corners)
        self._add("polygon", title, points=points, fill=fill, **attributes)

    def text(
        self, x: float, y: float, text: object, size: float = 12, color: str = INK,
        anchor: str = "start", title: str = "", **attributes: object,
    ) -> None:  # fmt: skip
        """Write text with its base line at y."""
        given = {"x": x, "y": y, "font_size": size, "fill": color, **attributes}
        if anchor != "start":
            given["text_anchor"] = anchor
        tip = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(f"<text{_attributes(given)}>{tip}{escape(text)}</text>")

    def _add(self, tag: str, title: str, **attributes: object) -> None:
        if title:
            self.parts.append(
                f"<{tag}{_attributes(attributes)}><title>{escape(title)}</title></{tag}>"
            )
        else:
            self.parts.append(f"<{tag}{_attributes(attributes)}/>")

    def legend(
        self, x: float, y: float, entries: Sequence[tuple[str, str, str]], size: float = 12
    ) -> float:
        """Write marks with their meaning in a row; return where it ends.

        Args:
            x: Left edge.
            y: Base line.
            entries: (kind of mark, with a minus sign after it a hollow one; colour; meaning).
            size: Font size.
        """
        for kind, color, meaning in entries:
            hollow = kind.endswith("-")
            self.mark(
                kind.rstrip("-"), x + 5, y - 0.35 * size, 4.5, PAPER if hollow else color,
                stroke=color if hollow else None, stroke_width=1.6 if hollow else None,
            )  # fmt: skip
            self.text(x + 14, y, meaning, size, FAINT)
            x += 14 + text_width(meaning, size) + 16
        return x


def legend_of(precisions: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return the legend of precisions, always in the same order."""
    return [("s", color_of(p), p) for p in in_order(precisions)]


def ticks(lo: float, hi: float, most: int = 6) -> list[float]:
    """Return round numbers that divide a range into steps of 1, 2 or 5 times a power of ten."""
    if not hi > lo:
        return [lo]
    raw = (hi - lo) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * (1 - 1e-9))
    first = math.ceil(lo / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(hi / step + 1e-9) + 1)]


def decades(lo: float, hi: float) -> list[float]:
    """Return the powers of ten within a range of positive numbers, at most eight of them."""
    first, last = math.floor(math.log10(lo)), math.ceil(math.log10(hi))
    step = max(1, -(-(last - first) // 8))
    return [10.0**k for k in range(first, last + 1, step)]


def number(value: float) -> str:
    """Return a number as a label of an axis: no noise of binary fractions, no long exponents."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e5 or size < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.10g}" if size >= 1e4 or value == round(value, 6) else f"{value:.4g}"


def compact(value: float) -> str:
    """Return a measured figure with three digits, and never as a power of ten up to a million."""
    if abs(value) >= 1e6 or (value and abs(value) < 1e-4):
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _attributes(given: dict[str, object]) -> str:
    return "".join(
        f' {k.replace("_", "-")}="{_n(v) if isinstance(v, float) else escape(v)}"'
        for k, v in given.items()
        if v is not None
    )


def _n(value: float) -> str:
    """Return a length with two digits after the point, at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
