# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The sections of the report about `assignment`: which plans were possible, and why this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler import report_charts as charts
from qcompiler import svg
from qcompiler.report import Report, binding_lines, number, precision_of
from qcompiler.report_html import Cell, chip, folded, num, section, table, text, wide
from qcompiler.svg import escape

_SHOWN = 45
_TELLING = 3
"""Distinct drops that a chart needs: on an easy set all plans may have the same, and then the
divergence from float tells them apart."""


def pareto(report: Report) -> str:
    """Return the section with the Pareto chart; empty without a choice of plans."""
    found = report.get("assignment") or {}
    front = [p for p in found.get("front") or () if number(p.get("latency_ms")) is not None]
    if not front:
        return ""
    key, axis = _loss_axis(found, front)
    budget = found.get("budget") or {}
    points = [_front_point(p, key, found) for p in front]
    others = []
    for precision, figures in (found.get("uniform") or {}).items():
        latency, loss = number(figures.get("latency_ms")), number(figures.get(key))
        if latency is not None and loss is not None:
            hint = f"{precision} everywhere: {latency:.3g} ms, {key} {loss:.3g}"
            color = svg.color_of(precision)
            others.append(charts.Point(latency, loss, hint, label=precision, color=color))
    limit_y = number(budget.get("max_drop")) if key == "drop" else None
    chart = charts.pareto(
        points,
        others,
        ("latency of one call, ms", axis),
        (number(budget.get("max_latency_ms")), limit_y),
        logarithmic=key == "loss",
    )
    rows = [
        (
            "",
            [
                Cell("<b>chosen</b>" if p.get("chosen") else ""),
                num(number(p.get("latency_ms")), ".4g"),
                num(number(p.get("drop"))),
                num(number(p.get("loss"))),
                num(_megabytes(p.get("size_bytes"))),
                num(number(p.get("measured_latency_ms")), ".4g"),
                num(number(p.get("measured_drop"))),
                text(_counts(p.get("counts") or {})),
            ],
        )
        for p in front
    ]
    heads = [
        ("", "text"), ("latency, ms", "number"), ("drop, points", "number"),
        (f"loss, {found.get('loss_unit') or found.get('loss_kind') or ''}", "number"),
        ("size, MB", "number"), ("measured, ms", "number"), ("measured drop", "number"),
        ("products", "text"),
    ]  # fmt: skip
    listed = folded(f"The {len(front)} plans of the front", table(heads, rows, "front"))
    about = (
        "Each point is a whole plan. As predicted, nothing is both faster and closer to float than "
        "a plan on the line; squares and diamonds are measured."
    )
    return section("pareto", "What was possible, and what was chosen", about,
                   _statement(found), wide(chart), listed)  # fmt: skip


def _loss_axis(found: Report, front: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return which figure the chart shows as loss, and its label."""
    drops = {round(d, 3) for p in front if (d := number(p.get("drop"))) is not None}
    whole = all(number(p.get("drop")) is not None for p in front)
    if whole and len(drops) >= min(_TELLING, len(front)):
        return "drop", f"drop of {found.get('metric') or 'the metric'}, points"
    unit = found.get("loss_unit") or ""
    return "loss", f"divergence from float{f', {unit}' if unit else ''} (logarithmic)"


def _front_point(p: Mapping[str, Any], key: str, found: Report) -> charts.Point:
    latency, loss = number(p.get("latency_ms")) or 0.0, number(p.get(key)) or 0.0
    measured = None
    if key == "drop":
        pair = number(p.get("measured_latency_ms")), number(p.get("measured_drop"))
        if pair[0] is not None and pair[1] is not None:
            measured = (pair[0], pair[1])
    elif p.get("chosen"):
        got = found.get("measured") or {}
        pair = number(got.get("latency_ms")), number(got.get("loss"))
        if pair[0] is not None and pair[1] is not None:
            measured = (pair[0], pair[1])
    hint = f"{latency:.4g} ms, {key} {loss:.3g}; {_counts(p.get('counts') or {})}"
    chosen = bool(p.get("chosen"))
    return charts.Point(latency, loss, hint, chosen, "chosen" if chosen else "", "", measured)


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{counts[p]} {p}" for p in svg.in_order(counts) if counts[p])


def _megabytes(size: object) -> float | None:
    value = number(size)
    return None if value is None else value / 1e6


def _statement(found: Report) -> str:
    """Return what was asked for and what bound the answer, in sentences."""
    lines = []
    if found.get("statement"):
        lines.append(f"Asked for: {found['statement']}.")
    predicted, measured = found.get("predicted") or {}, found.get("measured") or {}
    pairs = [
        (what, number(predicted.get(key)), number(measured.get(key)), unit)
        for what, key, unit in (("latency", "latency_ms", " ms"), ("drop", "drop", " points"),
                                ("loss", "loss", f" {found.get('loss_unit') or ''}"))
    ]  # fmt: skip
    said = [
        f"{what} {p:.3g} predicted, {m:.3g}{unit.rstrip()} measured"
        for what, p, m, unit in pairs
        if p is not None and m is not None
    ]
    if said:
        lines.append(f"The chosen plan: {'; '.join(said)}.")
    lines += [f"{line}." for line in binding_lines(found)]
    infeasible = found.get("infeasible")
    if infeasible:
        lines.append(f"Infeasible: {infeasible.get('message')}")
    tone = "verdict bad" if infeasible else "verdict"
    return f'<div class="{tone}">{"<br>".join(map(escape, lines))}</div>' if lines else ""


def cost(report: Report) -> str:
    """Return the section with the bars of sensitivity and latency; empty without an assignment."""
    nodes = (report.get("assignment") or {}).get("nodes") or {}
    products = [(name, n) for name, n in nodes.items() if n.get("options")]
    if not products:
        return ""
    drops = [number(o.get("drop")) for _, n in products for o in n["options"].values()]
    metric = len({round(d, 4) for d in drops if d is not None and d > 0}) > _TELLING
    key = "drop" if metric else "loss"
    made = [_product(name, n, key) for name, n in products]
    shown = made
    rest = ""
    if len(made) > _SHOWN:
        weights = [max(p.latencies.values(), default=0.0) for p in made]
        kept = sorted(range(len(made)), key=lambda i: -weights[i])[:_SHOWN]
        shown = [made[i] for i in sorted(kept)]
        share = sum(weights[i] for i in kept) / (sum(weights) or 1.0)
        rest = (
            f"the {_SHOWN} products that take {100 * share:.0f} % of the time in float; the table "
            "of decisions has all"
        )
    unit = "points of drop" if metric else str((report["assignment"]).get("loss_unit") or "loss")
    about = (
        "Left: what rounding this product alone costs, per precision (logarithmic). Right: its "
        "kernel's time on the target."
    )
    chart = charts.cost_and_gain(shown, f"cost, {unit}", rest)
    return section("cost", "Sensitivity and latency of each product", about, wide(chart))


def _product(name: str, node: Mapping[str, Any], key: str) -> charts.Product:
    losses, latencies = {}, {}
    for precision, option in node["options"].items():
        loss, latency = number(option.get(key)), number(option.get("latency_us"))
        if loss is not None:
            losses[str(precision)] = max(loss, 0.0)
        if latency is not None:
            latencies[str(precision)] = latency
    return charts.Product(name, str(node.get("precision")), losses, latencies)


def decisions(report: Report) -> str:
    """Return the section with the decision of every node and its reason."""
    log = (report.get("assignment") or {}).get("nodes") or {}
    if log:
        return _log(report, log)
    plan = report.get("precision") or {}
    if not plan:
        return ""
    owners = {}
    for node in report.get("nodes") or ():
        for member in node.get("nodes") or (node.get("name"),):
            owners[str(member)] = str(node.get("name"))
    rows = []
    for name, entry in plan.items():
        precision, reason = precision_of(entry)
        region = owners.get(str(name), "–")
        rows.append(("", [text(name), Cell(chip(precision)), text(reason or "–"), text(region)]))
    heads = [("node", "text"), ("precision", "text"), ("reason", "text"), ("region", "text")]
    listed = f'<div class="scroll">{table(heads, rows, "decision-table")}</div>'
    return section("decisions", "Precision of each node, and why", "", listed)


def _log(report: Report, log: Mapping[str, Mapping[str, Any]]) -> str:
    final = {str(k): precision_of(v) for k, v in (report.get("precision") or {}).items()}
    rows = []
    for name, n in log.items():
        precision, reason = final.get(name, (str(n.get("precision")), str(n.get("reason") or "")))
        reason = reason or str(n.get("reason") or "–")
        style = "" if n.get("options") else "faint"
        cost_ = number(n.get("cost"))
        if cost_ is None:
            cost_ = number(n.get("loss"))
        rows.append(
            (
                style,
                [
                    Cell(f"{escape(name)} <small>{escape(n.get('op') or '')}</small>"),
                    Cell(chip(precision)),
                    text(reason),
                    num(number(n.get("latency_us"))),
                    num(number(n.get("measured_us"))),
                    num(number(n.get("gained_us"))),
                    num(cost_, ".2g"),
                    text(blocked_text(n)),
                    Cell(_step(n.get("next_step") or {})),
                ],
            )
        )
    heads = [
        ("node", "text"), ("precision", "text"), ("reason", "text"), ("µs", "number"),
        ("measured", "number"), ("gained", "number"), ("cost", "number"),
        ("blocked by", "text"), ("next step", "text"),
    ]  # fmt: skip
    about = (
        "Times in µs: predicted, measured in the artifact, gained over float. Cost: share of the "
        "predicted drop in points (of the loss, without a metric). Grey: nodes that follow the "
        "product of their kernel. Click a heading to sort."
    )
    listed = f'<div class="scroll">{table(heads, rows, "decision-table")}</div>'
    return section("decisions", "Decision log", about, listed, _rounds(report))


def blocked_text(node: Mapping[str, Any]) -> str:
    """Return what stops the next precision of a node, with how much it would be too much."""
    over = (node.get("next_step") or {}).get("over") or {}
    said = [f"{n} +{o['by']:.2g} {o['unit']}" for n, o in over.items() if number(o.get("by"))]
    blocked = str(node.get("blocked_by") or "–")
    return ", ".join(said) if said and blocked in over else blocked


def _step(step: Mapping[str, Any]) -> str:
    """Return the next faster precision of a node, with what it would save and cost."""
    if not step:
        return "–"
    saves, costs = number(step.get("saves_us")), number(step.get("cost"))
    if costs is None:
        costs = number(step.get("loss"))
    said = []
    if saves is not None:
        said.append(
            f"saves {svg.compact(saves)} µs" if saves >= 0 else f"{svg.compact(-saves)} µs slower"
        )
    if costs:
        said.append(f"costs {costs:.2g}")
    return f"{chip(str(step.get('precision')))} {escape(', '.join(said))}"


def _rounds(report: Report) -> str:
    rounds = (report.get("assignment") or {}).get("rounds") or ()
    if not rounds:
        return ""
    rows = []
    for r in rounds:
        p, m = r.get("predicted") or {}, r.get("measured") or {}
        cells = [num(number(r.get("round")), ".0f")]
        for key in ("latency_ms", "drop", "loss"):
            cells += [num(number(p.get(key))), num(number(m.get(key)))]
        cells += [text("yes" if r.get("kept") else "no"), text(_counts(r.get("counts") or {})),
                  text(r.get("learned") or "–")]  # fmt: skip
        rows.append(("", cells))
    heads = [("round", "number")]
    for what in ("ms", "drop", "loss"):
        heads += [(f"{what} predicted", "number"), (f"{what} measured", "number")]
    heads += [("kept", "text"), ("products", "text"), ("learned", "text")]
    listed = table(heads, rows, "rounds", sortable=False)
    return folded(f"{len(rounds)} joint models that were built and evaluated", listed)
