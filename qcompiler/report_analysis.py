# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The page of `qcompile analyze`: where accuracy goes, as one HTML file that opens offline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from qcompiler import report_charts as charts
from qcompiler import svg
from qcompiler.errors import UsageError
from qcompiler.metrics import metric_of
from qcompiler.passes.calibrate import TensorRange
from qcompiler.passes.sensitivity_report import Effect, NodeSensitivity, SensitivityReport
from qcompiler.report import score_text
from qcompiler.report_html import frame, wide
from qcompiler.svg import FAINT, GRID, OTHER, PALETTE
from qcompiler.svg import escape as _e

_MARKS = {
    "w8": ("weights, 8 bits", PALETTE["w8a8"], "o"),
    "w7": ("weights, 7 bits", PALETTE["w7a8"], "^"),
    "w6": ("weights, 6 bits", PALETTE["w6a8"], "^"),
    "w4": ("weights, 4 bits", PALETTE["w4a8"], "s"),
    "a8": ("activations, 8 bits", "#332288", "d"),
    "a7": ("activations, 7 bits", PALETTE["w8a7"], "d"),
}
_SHOWN = 60

BAD_DROP = 1.0
"""Points of the metric; a larger drop with everything in 8 bits is shown as bad news."""


def effects_of(node: NodeSensitivity) -> dict[str, Effect]:
    """Return the effects of a product by a short name: "w4", "a8"."""
    weights = {f"w{b}": e for b, e in node.weight.items()}
    return {**weights, **{f"a{b}": e for b, e in node.activation.items()}}


def ranked(report: SensitivityReport) -> list[NodeSensitivity]:
    """Return the products, the one whose worst change costs most first."""
    return sorted(
        report.nodes, key=lambda n: -max((e.loss for e in effects_of(n).values()), default=0.0)
    )


def to_html(
    report: SensitivityReport,
    model: str,
    latency: Mapping[str, float] | None = None,
    target: str | None = None,
) -> str:
    """Return the page.

    Args:
        report: The figures.
        model: Path of the model, for the heading.
        latency: Node -> ms of its kernel on the target, where measured.
        target: Name of the target.
    """
    name = PurePath(model).name
    body = [
        f"<h1>{_e(name)} <small>sensitivity to quantization</small></h1>",
        _summary(report),
        _cost(report),
        _along(report),
        _ranges(report),
        _table(report, latency or {}, target),
        _details(report),
    ]
    return frame(f"qcompiler: {name}", body)


def _summary(report: SensitivityReport) -> str:
    kinds = sorted({_loss_name(k) for k in report.losses.values()})
    lines = [
        f"{len(report.nodes)} products on {report.samples} samples; loss at the model's outputs: "
        f"{' and '.join(kinds)}."
    ]
    tone, joint = "verdict", f"Everything in 8 bits: loss {report.joint_loss:.3g}"
    drop = joint_drop(report)
    if drop is not None:
        joint += f", {report.metric} {score_text(str(report.metric), report.joint_score)}"
        joint += f" (float {score_text(str(report.metric), report.score)}"
        joint += f", drop {drop:+.2f})"
        tone = "verdict bad" if drop > BAD_DROP else "verdict good"
    lines.append(f"{joint}.")
    levels = {n.node: n.along_sqnr for n in report.nodes if n.along_sqnr is not None}
    if report.first_jump in levels:
        before = list(levels)[: list(levels).index(report.first_jump)]
        lines.append(
            f"There the error first jumps at {report.first_jump}: its result is at "
            f"{levels[report.first_jump]:.1f} dB, nothing before it below "
            f"{min(levels[n] for n in before):.1f} dB."
        )
    worst = next(iter(ranked(report)), None)
    if worst is not None:
        key, effect = max(effects_of(worst).items(), key=lambda item: item[1].loss)
        label = _MARKS[key][0] if key in _MARKS else key
        lines.append(f"Alone, {worst.node} costs most: {effect.loss:.3g} ({label}).")
    return f'<div class="{tone}">{"<br>".join(map(_e, lines))}</div>'


def joint_drop(report: SensitivityReport) -> float | None:
    """Return by how many points everything in 8 bits is worse than float; None without labels."""
    if report.metric is None or report.score is None or report.joint_score is None:
        return None
    try:
        return metric_of(report.metric).drop(report.score, report.joint_score)
    except UsageError:  # a function that only the analysis could import
        return None


def _loss_name(kind: str) -> str:
    return "mean squared difference" if kind == "mse" else "KL divergence (nat)"


def _cost(report: SensitivityReport) -> str:
    shown = ranked(report)[:_SHOWN]
    if not shown:
        return "<p>No product has an integer form.</p>"
    left = len(report.nodes) - len(shown)
    note = f"<p class='faint'>The {left} least sensitive are in the table.</p>" if left else ""
    return (
        "<h2>What each product alone costs at the outputs</h2>"
        f"{wide(_cost_chart([(n.node, effects_of(n)) for n in shown]))}{note}"
    )


def _cost_chart(rows: Sequence[tuple[str, Mapping[str, Effect]]]) -> str:
    left, step, top, width = 230.0, 19.0, 30.0, charts.WIDTH
    base = top + step * len(rows)
    drawing = svg.Drawing(width, base + 42, "Cost per product", "cost")
    names = list(dict.fromkeys(k for _, effects in rows for k in effects))
    marks = {n: _MARKS.get(n, (n, OTHER, "o")) for n in names}
    drawing.legend(left, 14, [(kind, color, label) for label, color, kind in marks.values()])
    losses = [e.loss for _, es in rows for e in es.values() if 0 < e.loss < math.inf]
    lo = 10.0 ** math.floor(math.log10(min(losses, default=1e-9)))
    hi = max(10.0 ** math.ceil(math.log10(max(losses, default=1.0))), 10 * lo)

    def x_of(loss: float) -> float:
        share = math.log10(max(loss, lo) / lo) / math.log10(hi / lo)
        return left + 10 + share * (width - left - 30)

    for value in svg.decades(lo, hi):
        drawing.line(x_of(value), top - 6, x_of(value), base, GRID)
        drawing.text(x_of(value), base + 16, svg.number(value), 11, FAINT, "middle")
    drawing.text((left + width) / 2, base + 36, "loss at the outputs (logarithmic)", 12, FAINT,
                 "middle")  # fmt: skip
    for i, (name, effects) in enumerate(rows):
        y = top + step * i
        if i % 2:
            drawing.rect(0, y - 3, width, step, "#f4f6f8", fill_opacity=0.6)
        label = svg.fitted(svg.short_name(name), left - 12, 11)
        drawing.text(left - 8, y + 10, label, 11, anchor="end", title=name)
        for key in names:
            if key in effects and math.isfinite(effects[key].loss):
                label, color, kind = marks[key]
                hint = f"{name}: {label}: {effects[key].loss:.3g}"
                drawing.mark(kind, x_of(effects[key].loss), y + 6, 4, color, hint)
    return str(drawing)


def _along(report: SensitivityReport) -> str:
    nodes = [n for n in report.nodes if n.along_sqnr is not None]
    measured = [(n.node, n.along_sqnr) for n in nodes if n.along_sqnr is not None]
    if not measured:
        return ""
    chart = charts.error_along(
        measured, report.first_jump or "", _marked(report), [_own(n) for n in nodes]
    )
    return (
        "<h2>Float against everything in 8 bits, along the network</h2>"
        "<p class='faint'>Each result against float. Where the line lies far below a product's own"
        f" mark, the error came in with what it reads.</p>{wide(chart)}"
    )


def _own(node: NodeSensitivity) -> float | None:
    """Return the SQNR of a product's result that its own rounding to 8 bits leaves, in dB."""
    parts = [e.get("8") for e in (node.weight, node.activation) if e]
    if not parts or any(e is None for e in parts):
        return None
    noise = sum(10 ** (-e.sqnr / 10) for e in parts if e is not None)
    return -10 * math.log10(noise)


def _marked(report: SensitivityReport) -> str:
    return "lowest" if report.first_jump is None else "first jump"


def _ranges(report: SensitivityReport) -> str:
    if not report.tensors:
        return ""
    rows = []
    for name, t in report.tensors.items():
        rows.append(
            f"<tr><td>{_e(name)}</td><td class='n'>{t.bounds[0]:.4g} … {t.bounds[1]:.4g}</td>"
            f"<td class='n'>{t.range[0]:.4g} … {t.range[1]:.4g}</td>"
            f"<td class='n'>{t.mean:.4g}</td><td class='n'>{t.deviation:.4g}</td>"
            f"<td>{_histogram(t)}</td></tr>"
        )
    head = (
        "<tr><th>value<th class='n'>seen<th class='n'>quantized<th class='n'>mean"
        "<th class='n'>deviation<th>histogram (heights logarithmic)</tr>"
    )
    return (
        "<h2>Ranges of what the products read</h2>"
        f"<details><summary>{len(rows)} values</summary>"
        + wide(f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>")
        + "</details>"
    )


def _histogram(t: TensorRange) -> str:
    """Return a small bar chart; the shaded part is the range that quantization covers."""
    if not t.histogram or t.bounds[0] >= t.bounds[1]:
        return "–"
    width, height = 192.0, 28.0
    top = math.log1p(max(t.histogram)) or 1.0
    step = width / len(t.histogram)
    path = "".join(
        f"M{i * step:.1f} {height:g}v{-height * math.log1p(c) / top:.1f}h{step:.1f}V{height:g}z"
        for i, c in enumerate(t.histogram)
        if c
    )
    span = t.bounds[1] - t.bounds[0]
    lo = max(0.0, (t.range[0] - t.bounds[0]) / span) * width
    hi = min(1.0, (t.range[1] - t.bounds[0]) / span) * width
    return (
        f'<svg role="img" aria-label="histogram" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}"><rect x="{lo:.1f}" width="{max(hi - lo, 0):.1f}" '
        f'height="{height:g}" fill="{GRID}" opacity="0.5"/><path d="{path}" '
        f'fill="{PALETTE["w8a8"]}"/></svg>'
    )


def _table(report: SensitivityReport, latency: Mapping[str, float], target: str | None) -> str:
    labelled = report.metric is not None
    columns = ["weights", "Fisher trace"]
    if latency:
        columns.append(f"kernel, µs on {target}" if target else "kernel, µs")
    changes = ["SQNR, dB", "cosine", "MSE", "loss", "expected"]
    if labelled:
        changes.append(f"{report.metric} drop, points")
    rows = []
    for n in report.nodes:
        effects = effects_of(n)
        span = f" rowspan='{len(effects)}'"
        joined = f"{n.op} + {', '.join(n.members[1:])}" if n.members[1:] else n.op
        lead = [
            f"<td{span}>{_e(n.node)}<br><span class='faint'>{_e(joined)}</span></td>",
            f"<td class='n'{span}>{n.parameters or '–'}</td>",
            f"<td class='n'{span}>{_figure(n.fisher)}</td>",
        ]
        if latency:
            ms = latency.get(n.node)
            lead.append(f"<td class='n'{span}>{_figure(None if ms is None else 1000 * ms)}</td>")
        for i, (key, e) in enumerate(effects.items()):
            cells = [f"{e.sqnr:.1f}", f"{e.cosine:.5f}", _figure(e.mse), _figure(e.loss)]
            cells.append(_figure(n.predicted(key[1:]) if key[0] == "w" else None))
            if labelled:
                cells.append("–" if e.drop is None else f"{e.drop:+.2f}")
            figures = "".join(f"<td class='n'>{c}</td>" for c in cells)
            rows.append(f"<tr>{''.join(lead) if i == 0 else ''}<td>{_e(key)}</td>{figures}</tr>")
    head = "".join(f"<th class='n'>{_e(c)}" for c in columns)
    tail = "".join(f"<th class='n'>{_e(c)}" for c in changes)
    about = (
        "w: the weights alone are rounded to so many bits; a: what the product reads. SQNR, cosine"
        " and MSE at the kernel's own result; loss at the model's outputs. Expected: the loss by"
        " the Fisher trace, half the mean trace times the squared error of the weights."
    )
    return f"<h2>Every product and change</h2><p class='faint'>{about}</p>" + wide(
        f"<table><thead><tr><th>product{head}<th>change{tail}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _details(report: SensitivityReport) -> str:
    facts: dict[str, Any] = {
        "graph digest": report.graph,
        "data digest": report.data,
        "calibration": report.table,
        "samples": report.samples,
        "seed": report.seed,
        **{f"output {name}": _loss_name(kind) for name, kind in report.losses.items()},
    }
    rows = "".join(
        f"<tr><td>{_e(k)}</td><td><code>{_e(v)}</code></td></tr>" for k, v in facts.items()
    )
    return f"<details><summary>How it was made</summary><table>{rows}</table></details>"
