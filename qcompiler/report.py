# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The report of a compilation, as JSON and as one HTML page that opens offline.

The figures are those of `compile --json`: a mapping with `artifact`, `target`, `precision` (node ->
{precision, reason}), `metric` {name, float, compiled, drop}, `latency_ms` {compiled, float},
`size_bytes` {artifact, parameters, model}, `nodes` (per fused region: name, ops, precision,
latency_ms), `budget`, `versions`, `digests`, `seconds`. A figure that was not measured is absent or
None, and the page says so instead of showing a zero.
"""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qcompiler import report_charts as charts

Report = Mapping[str, Any]

_SHOWN_REGIONS = 40
_PERCENT = ("top1", "top5")
"""Metrics that are shares of 1; their drop is in percentage points."""
_LOWER_IS_BETTER = ("mse",)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row of float against compiled.

    Attributes:
        label: What is compared, with its unit.
        before: The float model's figure, None where it was not measured.
        after: The compiled model's figure, likewise.
        before_text: `before` as text, a dash without it.
        after_text: `after` as text, likewise.
        change_text: The difference or the factor, as text.
        good: Whether the change is welcome; None where that cannot be said.
    """

    label: str
    before: float | None
    after: float | None
    before_text: str
    after_text: str
    change_text: str
    good: bool | None


def comparison(report: Report) -> list[Comparison]:
    """Return accuracy, size and latency before and after; rows without any figure are left out."""
    rows = [_accuracy(report), _size(report), _latency(report)]
    return [r for r in rows if r is not None and (r.before is not None or r.after is not None)]


def _accuracy(report: Report) -> Comparison | None:
    metric = report.get("metric") or {}
    before, after, drop = (_number(metric.get(k)) for k in ("float", "compiled", "drop"))
    name = str(metric.get("name") or "metric")
    if before is None and after is None:
        return None
    percent = name in _PERCENT
    change = "–"
    good = None
    if drop is not None:
        gain = (drop if name in _LOWER_IS_BETTER else -drop) + 0.0  # no minus before a zero
        change = f"{gain:+.2f} points" if percent else f"{gain:+.4g}"
        limit = _number((report.get("budget") or {}).get("max_drop"))
        good = drop <= limit if limit is not None else (True if drop <= 0 else None)
    return Comparison(
        name, before, after, score_text(name, before), score_text(name, after), change, good
    )


def _size(report: Report) -> Comparison | None:
    size = report.get("size_bytes") or {}
    before, after = _number(size.get("model")), _number(size.get("artifact"))
    return Comparison(
        "size",
        before,
        after,
        _bytes(before),
        _bytes(after),
        _factor(before, after, "smaller", "larger"),
        None if before is None or after is None else after <= before,
    )


def _latency(report: Report) -> Comparison | None:
    latency = report.get("latency_ms") or {}
    before, after = _number(latency.get("float")), _number(latency.get("compiled"))
    return Comparison(
        "latency",
        before,
        after,
        _milliseconds(before),
        _milliseconds(after),
        _factor(before, after, "faster", "slower"),
        None if before is None or after is None else after <= before,
    )


def size_parts(report: Report) -> list[tuple[str, str]]:
    """Return (what, size as text) of the artifact's parts."""
    size = report.get("size_bytes") or {}
    parts = (
        ("parameters", _number(size.get("parameters"))),
        ("code", _number(size.get("library"))),
    )
    return [(name, _bytes(value)) for name, value in parts if value]


def latency_caption(report: Report) -> str | None:
    """Return how the latencies were measured, as one line, where the report says."""
    latency = report.get("latency_ms") or {}
    threads = latency.get("threads")
    if latency.get("compiled") is None or threads is None:
        return None
    runners = {"onnxruntime": "ONNX Runtime"}
    runner = latency.get("float_runner")
    beside = f"float in {runners.get(runner, runner)}, " if runner else ""
    noun = "thread" if threads == 1 else "threads"
    return f"latency: {beside}{threads} {noun}, medians of interleaved runs"


def worst_slice(report: Report) -> str | None:
    """Return the class or named group that lost most, as one sentence; None without groups."""
    metric = report.get("metric") or {}
    slices = list(metric.get("slices") or ())
    if not slices:
        return None
    worst, least = metric.get("worst_slice"), metric.get("slice_minimum")
    if worst is None:
        return f"none of the {len(slices)} groups has {least} samples and a drop"
    name = str(metric.get("name"))
    binding = sum(bool(s.get("binds")) for s in slices)
    return (
        f"{worst['kind']} {worst['name']}, {score_text(name, worst['float'])} to "
        f"{score_text(name, worst['compiled'])} ({worst['samples']} samples; worst of {binding})"
    )


def score_text(metric: str, value: float | None) -> str:
    """Return a score as text: shares as percentages; a dash for None."""
    if value is None:
        return "–"
    return f"{100 * value:.2f} %" if metric in _PERCENT else f"{value:.4g}"


def precision_counts(report: Report) -> dict[str, int]:
    """Return how many nodes have each precision, the most frequent first."""
    plan = report.get("precision") or {}
    counts = Counter(precision_of(entry)[0] for entry in plan.values())
    return dict(counts.most_common())


def fallbacks(report: Report) -> list[tuple[str, str]]:
    """Return (node, reason) of the nodes that stay float although integers were asked for."""
    plan = report.get("precision") or {}
    found = [(node, *precision_of(entry)) for node, entry in plan.items()]
    if not any(not _is_float(precision) for _, precision, _ in found):
        return []
    return [(node, f"{p}: {reason}") for node, p, reason in found if _is_float(p) and reason]


def precision_of(entry: object) -> tuple[str, str]:
    """Return (precision, reason) of one entry of `precision`."""
    if isinstance(entry, Mapping):
        return str(entry.get("precision", "?")), str(entry.get("reason") or "")
    if isinstance(entry, (list, tuple)) and len(entry) == 2:
        return str(entry[0]), str(entry[1])
    return str(entry), ""


def _is_float(precision: str) -> bool:
    return precision.startswith(("fp", "float", "bf"))


def to_json(report: Report) -> bytes:
    """Return the report as JSON text in UTF-8; NaN and infinity become null."""
    return (json.dumps(_plain(report), indent=2, ensure_ascii=False) + "\n").encode()


def to_html(report: Report) -> str:
    """Return the report as one HTML page, charts inside; nothing is loaded from elsewhere."""
    name = PurePath(str(report.get("model") or report.get("artifact") or "model")).name
    body = [
        f"<h1>{_e(name)} <small>on {_e(report.get('target', 'unknown target'))}</small></h1>",
        _verdict(report),
        _cards(report),
        _share(report),
        _regions(report),
        _plan(report),
        _notes(report),
        _details(report),
    ]
    return _PAGE.format(title=_e(f"qcompiler: {name}"), style=_STYLE, body="\n".join(body))


def _verdict(report: Report) -> str:
    budget = report.get("budget") or {}
    limits = {
        "max_drop": "drop at most {:g}",
        "max_latency_ms": "latency at most {:g} ms",
        "max_size_mb": "size at most {:g} MB",
    }
    asked = [
        text.format(budget[key]) for key, text in limits.items() if budget.get(key) is not None
    ]
    problems = [str(p) for p in budget.get("problems") or ()]
    if problems:
        items = "".join(f"<li>{_e(p)}</li>" for p in problems)
        return f'<div class="verdict bad"><b>Budget not kept</b><ul>{items}</ul></div>'
    if asked:
        return f'<div class="verdict good"><b>Budget kept</b>: {_e(", ".join(asked))}</div>'
    return '<div class="verdict">No budget was given.</div>'


def _cards(report: Report) -> str:
    cards = []
    for row in comparison(report):
        bars = [
            (label, value, text)
            for label, value, text in (
                ("float", row.before, row.before_text),
                ("compiled", row.after, row.after_text),
            )
            if value is not None
        ]
        tone = {True: "good", False: "bad", None: ""}[row.good]
        chart = charts.before_after(row.label, bars, row.good)
        cards.append(
            f'<div class="card"><div class="change {tone}">{_e(row.change_text)}</div>{chart}</div>'
        )
    missing = [
        f"{what} was not measured"
        for what, key in (("Accuracy", "metric"), ("Latency", "latency_ms"))
        if not any(_number(v) is not None for v in (report.get(key) or {}).values())
    ]
    notes = [f"{'; '.join(missing)}."] if missing else []
    parts = ", ".join(f"{name} {text}" for name, text in size_parts(report))
    notes += [f"Inside the artifact: {parts}."] if parts else []
    notes += [f"Measured {caption}."] if (caption := latency_caption(report)) else []
    note = "".join(f'<p class="faint">{_e(text)}</p>' for text in notes)
    return f'<div class="cards">{"".join(cards)}</div>{note}'


def _share(report: Report) -> str:
    counts = precision_counts(report)
    if not counts:
        return ""
    total = sum(counts.values())
    shares = [(name, float(n)) for name, n in counts.items()]
    return charts.precision_share(shares, f"Precision of the {total} nodes")


def _regions(report: Report) -> str:
    nodes = list(report.get("nodes") or ())
    timed = [(n, _region_ms(n)) for n in nodes]
    measured = [(n, ms) for n, ms in timed if ms is not None]
    if not nodes:
        return ""
    if not measured:
        heading = "<h2>Regions</h2><p class='faint'>Latency per region was not measured.</p>"
        return heading + _region_table([(n, None) for n in nodes], 0.0)
    total = sum(ms for _, ms in measured)
    ordered = sorted(measured, key=lambda pair: -pair[1])
    shown = ordered[:_SHOWN_REGIONS]
    unit, factor = ("µs", 1000.0) if max(ms for _, ms in measured) < 1.0 else ("ms", 1.0)
    rows = [(str(n.get("name", "?")), ms * factor, str(n.get("precision", "?"))) for n, ms in shown]
    left = len(ordered) - len(shown)
    rest = ""
    if left:
        share = sum(ms for _, ms in ordered[_SHOWN_REGIONS:]) / (total or 1.0)
        rest = f"{left} more regions take {100 * share:.0f} % of the time"
    chart = charts.region_latency(rows, unit, rest)
    return f"<h2>Where the time goes</h2>{chart}{_region_table(timed, total)}"


def _region_ms(node: Mapping[str, Any]) -> float | None:
    """Return the latency of a region in ms, in whichever unit it is given."""
    for key, factor in (("latency_ms", 1.0), ("latency", 1.0), ("latency_us", 1e-3)):
        value = _number(node.get(key))
        if value is not None:
            return value * factor
    return None


def _region_table(rows: Sequence[tuple[Mapping[str, Any], float | None]], total: float) -> str:
    cells = []
    for node, ms in rows:
        ops = node.get("ops") or ()
        share = f"{100 * ms / total:.1f} %" if ms is not None and total else "–"
        macs = _number(node.get("macs"))
        speed = f"{macs / ms / 1e6:.1f}" if macs and ms else "–"
        cells.append(
            f"<tr><td>{_e(node.get('name', '?'))}</td><td>{_e(' + '.join(map(str, ops)))}</td>"
            f"<td>{_chip(str(node.get('precision', '?')))}</td>"
            f"<td class='n'>{_milliseconds(ms)}</td><td class='n'>{share}</td>"
            f"<td class='n'>{speed}</td></tr>"
        )
    head = (
        "<tr><th>region<th>operators<th>precision<th class='n'>latency<th class='n'>share"
        "<th class='n'>GMAC/s</tr>"
    )
    return (
        f"<details><summary>All {len(rows)} regions, in the order they run</summary>"
        f"<table><thead>{head}</thead><tbody>{''.join(cells)}</tbody></table></details>"
    )


def _plan(report: Report) -> str:
    plan = report.get("precision") or {}
    if not plan:
        return ""
    latencies = {}
    for node in report.get("nodes") or ():
        for member in node.get("nodes") or (node.get("name"),):
            latencies[str(member)] = str(node.get("name"))
    rows = []
    for node, entry in plan.items():
        precision, reason = precision_of(entry)
        rows.append(
            f"<tr><td>{_e(node)}</td><td>{_chip(precision)}</td><td>{_e(reason or '–')}</td>"
            f"<td>{_e(latencies.get(str(node), '–'))}</td></tr>"
        )
    return (
        "<h2>Precision of each node, and why</h2><table><thead>"
        "<tr><th>node<th>precision<th>reason<th>region</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _details(report: Report) -> str:
    sections = []
    for title, key in (
        ("Machine", "machine"),
        ("Versions", "versions"),
        ("Digests (SHA-256)", "digests"),
        ("Seconds", "seconds"),
    ):
        value = report.get(key)
        if isinstance(value, (int, float)):
            value = {"total": value}
        if not value:
            continue
        value = _flat(value)
        rows = "".join(
            f"<tr><td>{_e(k)}</td><td><code>{_e(f'{v:.3f}' if isinstance(v, float) else v)}</code>"
            "</td></tr>"
            for k, v in value.items()
        )
        sections.append(f"<h3>{title}</h3><table>{rows}</table>")
    if not sections:
        return ""
    return f"<details><summary>How it was made</summary>{''.join(sections)}</details>"


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings as one, with the keys joined."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}: {k}": v for k, v in _flat(value).items()})
        else:
            flat[key] = value
    return flat


def _notes(report: Report) -> str:
    notes = [str(note) for note in report.get("notes") or ()]
    if not notes:
        return ""
    return f"<h2>Notes</h2><ul>{''.join(f'<li>{_e(note)}</li>' for note in notes)}</ul>"


def _chip(precision: str) -> str:
    color = charts.color_of(precision)
    return f'<span class="chip" style="background:{color}">{_e(precision)}</span>'


def _e(value: object) -> str:
    return html.escape(str(value), quote=True)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _bytes(size: float | None) -> str:
    if size is None:
        return "–"
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return (
                f"{size / factor:.3g} {unit}"
                if size < 1000 * factor
                else f"{size / factor:.0f} {unit}"
            )
    return f"{size:.0f} B"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.3g} µs" if value < 0.1 else f"{value:.3g} ms"


def _factor(before: float | None, after: float | None, better: str, worse: str) -> str:
    if not before or not after:
        return "–"
    ratio = before / after
    if 0.995 <= ratio <= 1.005:
        return "the same"
    return f"{ratio:.2f}x {better}" if ratio > 1 else f"{1 / ratio:.2f}x {worse}"


def _plain(value: Any) -> Any:
    """Return `value` with plain JSON types."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .6rem; } h1 small { color: #6b7784; font-weight: normal; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
svg { max-width: 100%; height: auto; display: block; }
.verdict { padding: .6rem .9rem; border-left: 5px solid #9aa5b1; background: #f4f6f8; }
.verdict.good { border-color: #1e8449; background: #eaf6ee; }
.verdict.bad { border-color: #c0392b; background: #fbecea; } .verdict ul { margin: .2rem 0 0; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.card { flex: 1 1 17rem; border: 1px solid #d9dee3; border-radius: 6px; padding: .7rem .8rem; }
.change { font-size: 1.35rem; font-weight: 600; }
.change.good { color: #1e8449; } .change.bad { color: #c0392b; }
.faint { color: #6b7784; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th { text-align: left; color: #6b7784; font-weight: 600; }
td, th { padding: .22rem .6rem .22rem 0; border-bottom: 1px solid #e8ebee; vertical-align: top;
  overflow-wrap: anywhere; }
.n { text-align: right; white-space: nowrap; }
.chip { color: #fff; border-radius: 3px; padding: 0 .4rem; font-size: .8rem; white-space: nowrap; }
summary { cursor: pointer; color: #1f77b4; margin: .8rem 0; }
@media print { details > * { display: block; } body { margin: 0; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
