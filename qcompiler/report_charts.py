# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The charts of the compile report. Each takes plain figures and returns one `<svg>` element.

What a chart shows by place or colour is also text: a label, or a hint under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qcompiler import svg
from qcompiler.svg import BAD, BEFORE, FAINT, GOOD, GRID, INK, PAPER, color_of, decades

WIDTH = 960.0


def before_after(
    name: str, title: str, bars: Sequence[tuple[str, float, str]], good: bool | None
) -> str:
    """Return two horizontal bars, each with its value written beside it.

    Args:
        name: Id of the chart.
        title: What is compared.
        bars: (label, value, value as text), float first.
        good: Whether the change is welcome; None where that cannot be said.
    """
    drawing = svg.Drawing(300, 20 + 24 * len(bars), title, name)
    drawing.text(0, 12, title, 12, FAINT)
    top = max((value for _, value, _ in bars), default=0.0) or 1.0
    after = {True: GOOD, False: BAD, None: color_of("w8a8")}[good]
    for i, (label, value, text) in enumerate(bars):
        y = 20 + 24 * i
        drawing.text(0, y + 14, label, 12)
        width = 150 * max(value, 0.0) / top
        drawing.rect(62, y + 1, max(width, 1.0), 18, after if i else BEFORE, rx=2)
        drawing.text(68 + max(width, 1.0), y + 14, text, 12, INK, font_weight=600)
    return str(drawing)


def precision_share(shares: Sequence[tuple[str, float]], title: str) -> str:
    """Return one stacked bar: the share of each precision, as a number inside or in the legend."""
    drawing = svg.Drawing(WIDTH, 62, title, "share")
    total = sum(value for _, value in shares) or 1.0
    values = dict(shares)
    ordered = svg.in_order(values)
    drawing.text(0, 12, title, 12, FAINT)
    x = 0.0
    for precision in ordered:
        width = WIDTH * values[precision] / total
        fill = color_of(precision)
        share = f"{100 * values[precision] / total:.0f} %"
        hint = f"{precision}: {values[precision]:g}, {share}"
        drawing.rect(x, 20, width, 20, fill, hint)
        if svg.text_width(share, 11) + 6 < width:
            ink = svg.ink_on(fill)
            drawing.text(x + width / 2, 34, share, 11, ink, "middle", pointer_events="none")
        x += width
    entries = [("s", color_of(p), f"{p} {values[p]:g}") for p in ordered]
    drawing.legend(0, 56, entries)
    return str(drawing)


def region_latency(rows: Sequence[tuple[str, float, str]], unit: str, rest: str = "") -> str:
    """Return horizontal bars of the latency per fused region, coloured by precision.

    Args:
        rows: (region, latency, precision), in the order to show, the first on top.
        unit: Unit of the latencies.
        rest: What the chart leaves out, as one line under it.
    """
    left, right, step = 230.0, 70.0, 19.0
    height = 26 + step * len(rows) + (20 if rest else 4)
    drawing = svg.Drawing(WIDTH, height, "Latency per region", "latency")
    drawing.legend(left, 12, svg.legend_of(p for _, _, p in rows))
    top = max((latency for _, latency, _ in rows), default=0.0) or 1.0
    for i, (name, latency, precision) in enumerate(rows):
        y = 24 + step * i
        _row_label(drawing, name, left, y + 12)
        width = (WIDTH - left - right) * latency / top
        hint = f"{name}: {svg.compact(latency)} {unit}, {precision}"
        drawing.rect(left, y, max(width, 1.0), step - 4, color_of(precision), hint)
        drawing.text(left + width + 5, y + 12, f"{svg.compact(latency)} {unit}", 11)
    if rest:
        drawing.text(left, height - 6, rest, 12, FAINT)
    return str(drawing)


def _row_label(drawing: svg.Drawing, name: str, left: float, y: float) -> None:
    label = svg.fitted(svg.short_name(name), left - 12, 11)
    drawing.text(left - 8, y, label, 11, INK, "end", name)


# ------------------------------------------------------------------------------------ assignment


@dataclass(frozen=True, slots=True)
class Point:
    """One plan of the Pareto chart.

    Attributes:
        latency: ms.
        loss: On the other axis.
        hint: What a pointer over it shows.
        chosen: Whether it is the plan that was built.
        label: Text beside it; empty for none.
        color: Of a point that stands for one precision.
        measured: (latency, loss) as measured, where it was built.
    """

    latency: float
    loss: float
    hint: str
    chosen: bool = False
    label: str = ""
    color: str = ""
    measured: tuple[float, float] | None = None


def pareto(
    front: Sequence[Point],
    others: Sequence[Point],
    axes: tuple[str, str],
    limits: tuple[float | None, float | None] = (None, None),
    logarithmic: bool = False,
) -> str:
    """Return latency against loss: the front as a line, the chosen plan marked, limits dashed.

    Args:
        front: Points of the front, fastest first, as predicted.
        others: Points beside it, such as every product at one precision, as measured.
        axes: Labels of latency and loss.
        limits: Greatest latency and greatest loss allowed.
        logarithmic: Whether losses are spread over powers of ten; what is 0 lies on the floor.
    """
    height, left, bottom, top = 380.0, 62.0, 46.0, 44.0
    drawing = svg.Drawing(WIDTH, height, "Latency against loss of the possible plans", "pareto")
    every = [*front, *others]
    xs = [p.latency for p in every] + [p.measured[0] for p in every if p.measured]
    ys = [p.loss for p in every] + [p.measured[1] for p in every if p.measured]
    # A limit far away from all plans would squeeze them into a corner: it is then not drawn.
    max_x, max_y = limits
    if max_x is not None and max_x <= 2 * max(xs):
        xs.append(max_x)
    if max_y is not None and (max(ys) <= 0 or max_y <= 3 * max(ys)):
        ys.append(max_y)
    px = _Axis(xs, left, WIDTH - 24, 0.08)
    py = (_LogAxis if logarithmic else _Axis)(ys, height - bottom, top, 0.1)
    _grid(drawing, px, py, axes, left, height - bottom, top)
    lines: list[tuple[str, str, str]] = []
    if max_x is not None and px.holds(max_x):
        x = px(max_x)
        drawing.line(x, top, x, height - bottom, BAD, 1.4, stroke_dasharray="6 4")
        drawing.text(x - 5, top + 12, f"limit {max_x:g}", 11, BAD, "end")
    if max_y is not None and py.holds(max_y):
        y = py(max_y)
        drawing.line(left, y, WIDTH - 24, y, BAD, 1.4, stroke_dasharray="6 4")
        drawing.text(WIDTH - 28, y - 5, f"limit {max_y:g}", 11, BAD, "end")
    points = [(px(p.latency), py(p.loss)) for p in front]
    if len(points) > 1:
        steps = [points[0]]
        for x, y in points[1:]:
            steps += [(x, steps[-1][1]), (x, y)]  # between two plans there is no third
        drawing.polyline(steps, color_of("w8a8"), 1.6)
    placed = [(x - 6, y + 4, 12.0) for x, y in points]  # (left, base line, width) of what is there
    placed += [(px(p.measured[0]) - 8, py(p.measured[1]) + 4, 16.0) for p in every if p.measured]
    placed += [(px(p.latency) - 6, py(p.loss) + 4, 12.0) for p in others]
    if max_y is not None and py.holds(max_y):
        placed.append((left, py(max_y) + 2, WIDTH))
    for p in [*front, *others]:
        _point(drawing, p, px(p.latency), py(p.loss))
        if p.measured is not None:
            mx, my = px(p.measured[0]), py(p.measured[1])
            drawing.line(px(p.latency), py(p.loss), mx, my, INK, 1.2, stroke_dasharray="2 2")
            drawing.mark("d", mx, my, 5, PAPER, f"measured: {p.hint}", stroke=INK, stroke_width=1.6)
    for p in sorted([*front, *others], key=lambda p: not p.chosen):
        if p.label:
            _label(drawing, p, px(p.latency), py(p.loss), placed)
    lines.append(("o", color_of("w8a8"), "plan on the front (predicted)"))
    if any(p.chosen for p in front):
        lines.append(("o", "#111111", "chosen plan"))
    if any(p.measured for p in every):
        lines.append(("d-", INK, "the same, measured"))
    if others:
        lines.append(("s", FAINT, "one precision everywhere (measured)"))
    drawing.legend(left, 16, lines)
    return str(drawing)


def _point(drawing: svg.Drawing, p: Point, x: float, y: float) -> None:
    if p.color:
        drawing.mark("s", x, y, 5, p.color, p.hint)
    elif p.chosen:
        drawing.mark("o", x, y, 10, "none", stroke="#111111", stroke_width=1.8)
        drawing.mark("o", x, y, 6, "#111111", p.hint)
    else:
        drawing.mark("o", x, y, 4.5, color_of("w8a8"), p.hint)


def _label(
    drawing: svg.Drawing, p: Point, x: float, y: float, placed: list[tuple[float, float, float]]
) -> None:
    """Write a point's label where none is yet: right of it, left, above, below."""
    width = svg.text_width(p.label, 11, bold=True)
    choices = [(x + 13, y - 7), (x + 13, y + 16), (x - 13 - width, y - 7), (x - 13 - width, y + 16),
               (x - width / 2, y - 16), (x - width / 2, y + 26)]  # fmt: skip
    for tx, ty in choices:
        free = all(tx + width < bx or tx > bx + bw or abs(ty - by) > 13 for bx, by, bw in placed)
        if free and tx > 2 and tx + width < WIDTH - 2:
            placed.append((tx, ty, width))
            color = p.color or INK
            drawing.text(tx, ty, p.label, 11, color, font_weight=600)
            return


class _Axis:
    """Places numbers between two ends, with room around the extremes."""

    def __init__(self, values: Sequence[float], start: float, end: float, room: float) -> None:
        lo, hi = min(values, default=0.0), max(values, default=1.0)
        margin = (hi - lo) * room or abs(hi) * 0.1 or 1.0
        self.lo, self.hi = lo - margin, hi + margin
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.lo) / (self.hi - self.lo)
        return self.start + share * (self.end - self.start)

    def holds(self, value: float) -> bool:
        return self.lo <= value <= self.hi

    def ticks(self, most: int) -> list[float]:
        return svg.ticks(self.lo, self.hi, most)

    def label(self, value: float) -> str:
        return svg.number(value)


class _LogAxis(_Axis):
    """Places numbers by their logarithm, at most six powers of ten below the greatest one."""

    def __init__(self, values: Sequence[float], start: float, end: float, room: float) -> None:
        top = max((v for v in values if v > 0), default=1.0)
        self.floor = max(min((v for v in values if v > 0), default=1e-3), top * 1e-6)
        self.below = any(v < self.floor for v in values)
        logs = [math.log10(max(v, self.floor)) for v in values]
        super().__init__([math.floor(min(logs)), max(logs)], start, end, room)

    def __call__(self, value: float) -> float:
        return super().__call__(math.log10(max(value, self.floor)))

    def holds(self, value: float) -> bool:
        return value > 0 and super().holds(math.log10(value))

    def label(self, value: float) -> str:
        if self.below and value <= self.floor:
            return f"≤ {svg.number(self.floor)}"
        return super().label(value)

    def ticks(self, most: int) -> list[float]:
        del most
        return [v for v in decades(10.0**self.lo, 10.0**self.hi) if self.holds(v)]


def _grid(
    drawing: svg.Drawing,
    px: _Axis,
    py: _Axis,
    names: tuple[str, str],
    left: float,
    base: float,
    top: float,
) -> None:
    for value in px.ticks(8):
        x = px(value)
        drawing.line(x, top, x, base, GRID)
        drawing.text(x, base + 16, svg.number(value), 11, FAINT, "middle")
    for value in py.ticks(6):
        y = py(value)
        drawing.line(left, y, WIDTH - 24, y, GRID)
        drawing.text(left - 6, y + 4, py.label(value), 11, FAINT, "end")
    drawing.text((left + WIDTH - 24) / 2, base + 36, names[0], 12, INK, "middle")
    drawing.text(left, top - 8, names[1], 12, INK)


@dataclass(frozen=True, slots=True)
class Product:
    """One product of the chart of costs and gains.

    Attributes:
        name: Of the node.
        precision: What was chosen.
        losses: Precision -> loss of that precision alone.
        latencies: Precision -> µs.
    """

    name: str
    precision: str
    losses: Mapping[str, float] = field(default_factory=dict)
    latencies: Mapping[str, float] = field(default_factory=dict)


def cost_and_gain(products: Sequence[Product], loss: str, rest: str = "") -> str:
    """Return per product what each precision costs (left) and how long it takes (right).

    Args:
        products: In the order of the network.
        loss: Label of the losses' axis, with the unit.
        rest: What the chart leaves out, as one line under it.
    """
    step, name_width, gap = 20.0, 200.0, 26.0
    middle = name_width + (WIDTH - name_width) * 0.52
    base = 58 + step * len(products)
    drawing = svg.Drawing(
        WIDTH, base + (46 if rest else 28), "Sensitivity and latency of each product", "cost"
    )
    drawing.legend(0, 14, svg.legend_of(p for x in products for p in {*x.losses, *x.latencies}))
    drawing.text(name_width, 38, f"{loss}: large mark = chosen", 12, font_weight=600)
    drawing.text(middle + gap, 38, "time of the kernel, µs: outline = float", 12, font_weight=600)
    positive = [v for x in products for v in x.losses.values() if v > 0]
    lo, hi = min(positive, default=1e-6), max(positive, default=1.0)
    lo = 10.0 ** math.floor(math.log10(lo))
    hi = max(10.0 ** math.ceil(math.log10(hi)), 10 * lo)
    span = math.log10(hi) - math.log10(lo)

    def x_of(value: float) -> float:
        share = 0.0 if value <= lo else (math.log10(value) - math.log10(lo)) / span
        return name_width + 10 + share * (middle - name_width - 20)

    for value in svg.decades(lo, hi):
        drawing.line(x_of(value), 46, x_of(value), base, GRID)
        drawing.text(x_of(value), base + 15, svg.number(value), 11, FAINT, "middle")
    longest = max((v for x in products for v in x.latencies.values()), default=0.0) or 1.0
    room = WIDTH - middle - gap - 62
    for i in range(1, len(products), 2):
        drawing.rect(0, 50 + step * i, WIDTH, step, "#f4f6f8")
    for i, product in enumerate(products):
        y = 50 + step * i
        _row_label(drawing, product.name, name_width, y + 14)
        _losses(drawing, product, y + step / 2, x_of)
        _times(drawing, product, middle + gap, y, room / longest)
    if rest:
        drawing.text(name_width, base + 38, rest, 12, FAINT)
    return str(drawing)


def _losses(drawing: svg.Drawing, product: Product, y: float, x_of: object) -> None:
    assert callable(x_of)
    shown = [p for p in svg.in_order(product.losses) if p != "fp32" or p == product.precision]
    places = [x_of(product.losses[p]) for p in shown]
    if len(places) > 1:
        drawing.line(min(places), y, max(places), y, "#b8c1ca", 1.0)
    for precision, x in sorted(
        zip(shown, places, strict=True), key=lambda s: s[0] == product.precision
    ):
        chosen = precision == product.precision
        hint = f"{product.name}: {precision} alone costs {product.losses[precision]:.3g}"
        extra: dict[str, object] = {"stroke": "#111111", "stroke_width": 1.2} if chosen else {}
        drawing.mark("o", x, y, 6 if chosen else 3.4, color_of(precision), hint, **extra)


def _times(drawing: svg.Drawing, product: Product, x: float, y: float, scale: float) -> None:
    chosen = product.latencies.get(product.precision)
    floating = product.latencies.get("fp32")
    if floating is not None:
        hint = f"{product.name}: fp32 {svg.compact(floating)} µs"
        drawing.rect(
            x, y + 4, floating * scale, 12, "none", hint, stroke=BEFORE, pointer_events="all"
        )
    if chosen is not None:
        hint = f"{product.name}: {product.precision} {svg.compact(chosen)} µs"
        drawing.rect(x, y + 4, max(chosen * scale, 1.0), 12, color_of(product.precision), hint)
    ends = [v for v in (chosen, floating) if v is not None]
    if ends:
        text = svg.compact(chosen) if chosen is not None else "–"
        drawing.text(x + max(ends) * scale + 5, y + 14, text, 11)


# ----------------------------------------------------------------------------- along the network


def error_along(
    rows: Sequence[tuple[str, float]],
    marked: str = "",
    what: str = "lowest",
    own: Sequence[float | None] = (),
) -> str:
    """Return the signal-to-noise ratio of each result, in the order of the network.

    Args:
        rows: (node that makes it, SQNR in dB).
        marked: Node to point out; default: the one with the least ratio.
        what: What it is pointed out for.
        own: SQNR of each result where its product alone is rounded, drawn beside; None: unknown.
    """
    left, base, top = 62.0, 220.0, 30.0
    drawing = svg.Drawing(WIDTH, 300, "Signal over error along the network", "error")
    levels = [s for _, s in rows]
    lo = min(0.0, *levels) if min(levels) < 0 else max(0.0, min(levels) - 6)
    axis = _Axis([lo, max([*levels, *(s for s in own if s is not None)])], base, top, 0.05)
    for value in svg.ticks(axis.lo, axis.hi, 6):
        drawing.line(left, axis(value), WIDTH - 10, axis(value), GRID)
        drawing.text(left - 6, axis(value) + 4, svg.number(value), 11, FAINT, "end")
    drawing.text(0, 14, "SQNR in dB: higher is closer to float; 6 dB are one bit", 12, INK)
    pitch = (WIDTH - left - 30) / max(len(rows) - 1, 1)
    places = [(left + 10 + i * pitch, axis(s)) for i, (_, s) in enumerate(rows)]
    if len(places) > 1:
        drawing.polyline(places, color_of("w8a8"), 1.8)
    if own:
        drawing.legend(WIDTH - 330, 14, [("o", color_of("w8a8"), "everything in 8 bits"),
                                         ("d", FAINT, "this product alone")])  # fmt: skip
    for (name, _), (x, _), level in zip(rows, places, own, strict=False):
        if level is not None:
            hint = f"{name} alone: {level:.1f} dB"
            drawing.mark("d", x, axis(level), 3, FAINT, hint)
    names = [name for name, _ in rows]
    worst = names.index(marked) if marked in names else levels.index(min(levels))
    for i, ((name, level), (x, y)) in enumerate(zip(rows, places, strict=True)):
        fill = BAD if i == worst else color_of("w8a8")
        drawing.mark("o", x, y, 5 if i == worst else 3.2, fill, f"{name}: {level:.1f} dB")
    x, y = places[worst]
    side = "end" if worst > len(rows) / 2 else "start"
    text = f"{what}: {svg.shorten(svg.short_name(rows[worst][0]), 34)}, {levels[worst]:.1f} dB"
    drawing.text(x + (-9 if side == "end" else 9), y + 16, text, 11, BAD, side)
    every = max(1, math.ceil(22 / max(pitch, 0.1)))
    for i in range(0, len(rows), every):
        x, label = places[i][0], svg.shorten(svg.short_name(rows[i][0]), 15)
        drawing.text(x, base + 12, label, 10.5, FAINT, "end",
                     rows[i][0], transform=f"rotate(-40 {x:.1f} {base + 12:.1f})")  # fmt: skip
    return str(drawing)


def histogram(
    name: str, value: str, bounds: tuple[float, float], covered: tuple[float, float],
    counts: Sequence[int],
) -> str:  # fmt: skip
    """Return the elements of one value as bars; the ground is what the integers cover.

    Heights are logarithmic: what is cut off is rare.
    """
    width, height = 216.0, 76.0
    drawing = svg.Drawing(width, height, f"Histogram of {value}", name)
    drawing.text(0, 11, svg.fitted(svg.short_name(value), width, 10.5), 10.5, INK, title=value)
    base, top = 60.0, 18.0
    lo, hi = min(bounds[0], covered[0]), max(bounds[1], covered[1])
    span = hi - lo or 1.0

    def x_of(real: float) -> float:
        return (real - lo) / span * width

    hint = f"8 bits cover {covered[0]:.4g} to {covered[1]:.4g}"
    ground = x_of(covered[1]) - x_of(covered[0])
    drawing.rect(x_of(covered[0]), top, ground, base - top, "#dbe9f4", hint)
    most = math.log1p(max(counts, default=0)) or 1.0
    step = (bounds[1] - bounds[0]) / max(len(counts), 1)
    pieces = []
    for i, count in enumerate(counts):
        if count:
            x1, x2 = x_of(bounds[0] + i * step), x_of(bounds[0] + (i + 1) * step)
            y = base - (base - top) * math.log1p(count) / most
            pieces.append(f"M{x1:.1f} {base:g}V{y:.1f}H{x2:.1f}V{base:g}z")
    drawing.path("".join(pieces), "none", 0, color_of("w8a8"))
    drawing.line(0, base, width, base, FAINT, 0.8)
    drawing.text(0, height - 4, f"{bounds[0]:.3g}", 10, FAINT)
    drawing.text(width, height - 4, f"{bounds[1]:.3g}", 10, FAINT, "end")
    return str(drawing)


def slices(rows: Sequence[tuple[str, int, float, bool]], limit: float | None, unit: str) -> str:
    """Return the drop of each class or group as bars around zero.

    Args:
        rows: (label, samples, drop, whether limits bind it), worst first.
        limit: Greatest drop allowed of one group.
        unit: Of the drops.
    """
    left, right, step, top = 230.0, 150.0, 20.0, 26.0
    base = top + step * len(rows)
    drawing = svg.Drawing(WIDTH, base + 24, "Drop of each class and group", "slices")
    bounds = [0.0, *(d for _, _, d, _ in rows)]
    # As in the Pareto chart: a limit far away is written, not drawn to scale.
    near = limit is not None and limit <= 3 * max(max(bounds), 0.0) + 1e-12
    if near and limit is not None:
        bounds.append(limit)
    axis = _Axis(bounds, left, WIDTH - right, 0.02)
    drawing.text(left, 13, f"drop, {unit}: right of the line is worse than float", 12, INK)
    for value in svg.ticks(axis.lo, axis.hi, 8):
        drawing.line(axis(value), top, axis(value), base, GRID)
        drawing.text(axis(value), base + 16, svg.number(value), 11, FAINT, "middle")
    for i, (label, samples, drop, binds) in enumerate(rows):
        y = top + step * i
        over = limit is not None and binds and drop > limit
        color = BAD if over else color_of("w8a8") if binds else "#b8c1ca"
        _row_label(drawing, label, left - 4, y + 14)
        x1, x2 = sorted((axis(0.0), axis(drop)))
        note = "" if binds else ": too few to bind"
        hint = f"{label}: drop {drop:.3g} {unit}, {samples} samples{note}"
        drawing.rect(x1, y + 3, max(x2 - x1, 1.0), step - 6, color, hint)
        text = f"{drop:+.3g}  ({samples} samples)"
        drawing.text(max(x2, axis(0.0)) + 6, y + 14, text, 11, INK if binds else FAINT)
    drawing.line(axis(0.0), top, axis(0.0), base, INK, 1.0)
    if near and limit is not None:
        drawing.line(axis(limit), top, axis(limit), base, BAD, 1.4, stroke_dasharray="6 4")
        drawing.text(axis(limit), top - 4, f"limit {limit:g}", 11, BAD, "middle")
    return str(drawing)
