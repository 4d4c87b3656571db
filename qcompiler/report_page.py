# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The page of `qcompile compile --report`: what was won, what it costs, and why, in that order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from qcompiler import report_charts as charts
from qcompiler import report_decisions, report_modalities, report_network
from qcompiler.report import (
    PERCENT,
    Comparison,
    Report,
    comparison,
    energy_text,
    latency_caption,
    limits,
    milliseconds,
    number,
    plain,
    precision_counts,
    region_ms,
    score_text,
    size_parts,
    worst_slice,
)
from qcompiler.report_html import Cell, chip, figure, folded, frame, num, section, table, text, wide
from qcompiler.svg import escape

_SHOWN_REGIONS = 25
_SHOWN_SLICES = 30
_PLACES = {"size": ("size_bytes.model", "size_bytes.artifact"),
           "latency": ("latency_ms.float", "latency_ms.compiled")}  # fmt: skip
"""Where in the JSON the two figures of a comparison are; the metric's are the default."""


def page(report: Report) -> str:
    """Return the report as one HTML page."""
    name = PurePath(str(report.get("model") or report.get("artifact") or "model")).name
    sections = [
        report_decisions.pareto(report),
        _network(report),
        report_decisions.cost(report),
        report_modalities.modalities(report),
        _regions(report),
        _error(report),
        _slices(report),
        _ranges(report),
        report_decisions.decisions(report),
        _notes(report),
        _details(report),
    ]
    body = [
        f"<h1>{escape(name)} <small>on {escape(report.get('target', 'unknown target'))}"
        "</small></h1>",
        _verdict(report),
        _cards(report),
        _summary(report),
        _share(report),
        _contents(sections),
        *sections,
    ]
    return frame(f"qcompiler: {name}", body, plain(report))


def _contents(sections: Sequence[str]) -> str:
    """Return links to the sections that there are."""
    titles = {
        "pareto": "possible plans",
        "network": "network",
        "cost": "sensitivity and latency",
        "modalities": "regions by input",
        "regions": "time per kernel",
        "error": "error along the network",
        "slices": "slices",
        "ranges": "value ranges",
        "decisions": "decisions",
        "details": "how it was made",
    }
    links = [
        f'<a href="#{name}">{title}</a>'
        for name, title in titles.items()
        if any(s.startswith(f'<section id="{name}"') for s in sections)
    ]
    return f"<nav>{''.join(links)}</nav>" if links else ""


def _verdict(report: Report) -> str:
    budget = report.get("budget") or {}
    problems = [str(p) for p in budget.get("problems") or ()]
    if problems:
        items = "".join(f"<li>{escape(p)}</li>" for p in problems)
        return f'<div class="verdict bad"><b>Budget not kept</b><ul>{items}</ul></div>'
    asked = limits(report)
    if asked:
        return f'<div class="verdict good"><b>Budget kept</b>: {escape(", ".join(asked))}</div>'
    return '<div class="verdict">No budget was given.</div>'


def _cards(report: Report) -> str:
    cards = []
    rows = sorted(comparison(report), key=lambda r: ("latency", "size").index(r.label)
                  if r.label in _PLACES else 0.5)  # fmt: skip
    for row in rows:
        bars = [
            (label, value, shown)
            for label, value, shown in (
                ("float", row.before, row.before_text),
                ("compiled", row.after, row.after_text),
            )
            if value is not None
        ]
        tone = {True: "good", False: "bad", None: ""}[row.good]
        name = row.label if row.label in _PLACES else "metric"
        chart = charts.before_after(f"before-after-{name}", row.label, bars, row.good)
        cards.append(
            f'<div class="card"><div class="change {tone}">{escape(row.change_text)}</div>'
            f"{chart}</div>"
        )
    missing = [
        f"{what} was not measured"
        for what, key in (("Accuracy", "metric"), ("Latency", "latency_ms"))
        if not any(number(v) is not None for v in (report.get(key) or {}).values())
    ]
    note = f'<p class="faint">{"; ".join(missing)}.</p>' if missing else ""
    return f'<div class="cards">{"".join(cards)}</div>{note}'


def _summary(report: Report) -> str:
    """Return the table before and after, every figure with its place in the JSON."""
    lines: list[tuple[str, str, str, str]] = []
    for row in comparison(report):
        before, after = _PLACES.get(row.label, ("metric.float", "metric.compiled"))
        left = _figure(before, row.before, row.before_text)
        right = _figure(after, row.after, row.after_text)
        lines.append((_row_title(row), left, right, escape(row.change_text)))
        if row.label == "size":
            parts = size_parts(report)
            lines += [(f"&nbsp;&nbsp;{escape(what)}", "", escape(size), "") for what, size in parts]
    body = "".join(
        f"<tr><td>{title}</td><td class=n>{before}</td><td class=n>{after}</td>"
        f"<td class=n>{change}</td></tr>"
        for title, before, after, change in lines
    )
    sentences = {"worst class or group": worst_slice(report), "energy": energy_text(report)}
    body += "".join(
        f"<tr><td>{what}</td><td colspan=3 class='n said'>{escape(said)}</td></tr>"
        for what, said in sentences.items()
        if said is not None
    )
    caption = latency_caption(report)
    note = f'<p class="faint">Measured {escape(caption)}.</p>' if caption else ""
    return (
        "<table id=summary><thead><tr><th></th><th class=n>float</th><th class=n>compiled</th>"
        f"<th class=n>change</th></tr></thead><tbody>{body}</tbody></table>{note}"
    )


def _row_title(row: Comparison) -> str:
    return escape({"latency": "latency of one call"}.get(row.label, row.label))


def _figure(path: str, value: float | None, shown: str) -> str:
    return escape(shown) if value is None else figure(path, value, shown)


def _share(report: Report) -> str:
    counts = precision_counts(report)
    if not counts:
        return ""
    total = sum(counts.values())
    shares = [(name, float(n)) for name, n in counts.items()]
    return wide(charts.precision_share(shares, f"Precision of the {total} nodes"))


def _network(report: Report) -> str:
    nodes = list(report.get("nodes") or ())
    if not nodes:
        return ""
    times = [region_ms(n) for n in nodes]
    boxes = report_network.boxes_of(
        nodes, [milliseconds(t) if t is not None else "" for t in times]
    )
    drawing = f'<div class="scroll">{report_network.network(boxes)}</div>'
    about = (
        f"{len(nodes)} kernels, from the inputs (top left) down each column to the outputs; lines "
        "show which reads which. Point at one for its full name."
    )
    return section("network", "The network", about, drawing)


def _regions(report: Report) -> str:
    nodes = list(report.get("nodes") or ())
    if not nodes:
        return ""
    timed = [(n, region_ms(n)) for n in nodes]
    measured = [(n, ms) for n, ms in timed if ms is not None]
    if not measured:
        about = "Latency per region was not measured."
        return section("regions", "Regions", about, _region_table(timed, 0.0))
    total = sum(ms for _, ms in measured)
    ordered = sorted(measured, key=lambda pair: -pair[1])
    shown = ordered[:_SHOWN_REGIONS]
    middle = sorted(ms for _, ms in measured)[len(measured) // 2]
    unit, factor = ("µs", 1000.0) if middle < 1.0 else ("ms", 1.0)
    rows = [(str(n.get("name", "?")), ms * factor, str(n.get("precision", "?"))) for n, ms in shown]
    left = len(ordered) - len(shown)
    rest = ""
    if left:
        share = sum(ms for _, ms in ordered[_SHOWN_REGIONS:]) / (total or 1.0)
        rest = f"{left} more regions take {100 * share:.0f} % of the time"
    chart = charts.region_latency(rows, unit, rest)
    about = "Each kernel of the artifact timed alone while the model runs, the slowest on top."
    listed = _region_table(timed, total)
    return section("regions", "Where the time goes", about, wide(chart), listed)


def _region_table(rows: Sequence[tuple[Mapping[str, Any], float | None]], total: float) -> str:
    cells = []
    for node, ms in rows:
        macs = number(node.get("macs"))
        speed = macs / ms / 1e6 if macs and ms else None
        share = 100 * ms / total if ms is not None and total else None
        cells.append(
            (
                "",
                [
                    text(node.get("name", "?")),
                    text(" + ".join(map(str, node.get("ops") or ()))),
                    Cell(chip(str(node.get("precision", "?")))),
                    Cell(milliseconds(ms), ms),
                    num(share, ".1f"),
                    num(speed, ".1f"),
                ],
            )
        )
    heads = [
        ("region", "text"), ("operators", "text"), ("precision", "text"), ("latency", "number"),
        ("share, %", "number"), ("GMAC/s", "number"),
    ]  # fmt: skip
    listed = table(heads, cells, "kernels")
    return folded(f"All {len(rows)} regions, in the order they run", listed)


def _error(report: Report) -> str:
    along = report.get("error_along") or {}
    rows = [
        (str(v.get("node") or v["value"]), level)
        for v in along.get("values") or ()
        if (level := number(v.get("sqnr"))) is not None
    ]
    if not rows:
        return ""
    about = (
        "Every quantized result against the same value of the float model, on "
        f"{along.get('samples')} calibration samples; the errors of everything before it are in it."
    )
    return section("error", "Error along the network", about, wide(charts.error_along(rows)))


def _slices(report: Report) -> str:
    metric = report.get("metric") or {}
    slices = list(metric.get("slices") or ())
    if not slices:
        return ""
    name = str(metric.get("name"))
    ordered = sorted(slices, key=lambda s: (not s["binds"], -(number(s["drop"]) or 0.0)))
    limit = number((report.get("budget") or {}).get("max_slice_drop"))
    unit = "points" if name in PERCENT else name
    scored = [s for s in ordered if number(s["drop"]) is not None]
    shown = [
        (f"{s['kind']} {s['name']}", int(s["samples"]), float(s["drop"]), bool(s["binds"]))
        for s in scored[:_SHOWN_SLICES]
    ]
    chart = charts.slices(shown, limit, unit) if shown else ""
    rows = [
        (
            "" if s["binds"] else "faint",
            [
                text(s["kind"]),
                text(s["name"]),
                num(float(s["samples"]), ".0f"),
                Cell(score_text(name, number(s["float"])), number(s["float"])),
                Cell(score_text(name, number(s["compiled"])), number(s["compiled"])),
                num(number(s["drop"]), "+.3g"),
            ],
        )
        for s in ordered
    ]
    heads = [
        ("kind", "text"), ("name", "text"), ("samples", "number"), ("float", "number"),
        ("compiled", "number"), (f"drop, {unit}", "number"),
    ]  # fmt: skip
    left = len(scored) - len(shown)
    about = (
        f"{escape(name)} of each class and named group alone. Grey: fewer than "
        f"{metric.get('slice_minimum')} samples, listed but held against no limit."
    )
    if limit is not None:
        about += f" The limit of each is {limit:g}."
    if left > 0:
        about += f" The chart shows the {len(shown)} that lost most."
    listed = folded(f"All {len(slices)} groups", table(heads, rows, "slice-table"))
    return section("slices", "Classes and groups", about, wide(chart), listed)


def _ranges(report: Report) -> str:
    drawn = []
    shown: set[tuple[object, ...]] = set()
    moved = 0
    for i, (name, found) in enumerate((report.get("ranges") or {}).items()):
        bounds, covered = found["bounds"], found["range"]
        if not found.get("histogram") or not bounds[0] < bounds[1]:
            continue
        same = (*bounds, *covered, *found["histogram"])
        if same in shown:
            moved += 1
            continue
        shown.add(same)
        drawn.append(
            charts.histogram(
                f"range-{i}",
                str(name),
                (float(bounds[0]), float(bounds[1])),
                (float(covered[0]), float(covered[1])),
                found["histogram"],
            )
        )
    if not drawn:
        return ""
    about = (
        "What calibration saw of each quantized value; heights are logarithmic, the light ground "
        "is the range that the integers cover."
    )
    if moved:
        about += f" Values that were only moved or reshaped are left out ({moved})."
    grid = f'<div class="scroll"><div class="multiples">{"".join(drawn)}</div></div>'
    return section("ranges", "Ranges of the values", about, grid)


def _notes(report: Report) -> str:
    notes = [str(note) for note in report.get("notes") or ()]
    if not notes:
        return ""
    return section(
        "notes", "Notes", "", f"<ul>{''.join(f'<li>{escape(n)}</li>' for n in notes)}</ul>"
    )


def _details(report: Report) -> str:
    parts = []
    for title, key in (
        ("Machine", "machine"),
        ("Versions", "versions"),
        ("Digests (SHA-256)", "digests"),
        ("Lock", "lock"),
        ("Seconds", "seconds"),
    ):
        value = report.get(key)
        if isinstance(value, (int, float)):
            value = {"total": value}
        if not value:
            continue
        rows = "".join(
            f"<tr><td>{escape(k)}</td><td><code>"
            f"{escape(f'{v:.3f}' if isinstance(v, float) else v)}</code></td></tr>"
            for k, v in _flat(value).items()
        )
        parts.append(f"<h3>{title}</h3><table>{rows}</table>")
    if not parts:
        return ""
    return section("details", "How it was made", "",
                   folded("Machine, versions, digests, seconds", *parts))  # fmt: skip


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings as one, with the keys joined."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}: {k}": v for k, v in _flat(value).items()})
        else:
            flat[key] = value
    return flat
