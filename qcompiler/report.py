# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The report of a compilation, as JSON and as one HTML page that opens offline.

The figures are those of `compile --json`: a mapping with `artifact`, `target`, `precision` (node ->
{precision, reason}), `metric` {name, float, compiled, drop}, `latency_ms` {compiled, float},
`size_bytes` {artifact, parameters, model}, `nodes` (per fused region: name, ops, precision,
latency_ms, reads), `assignment` (see docs/json.md), `ranges`, `error_along`, `energy`, `budget`,
`versions`, `digests`, `seconds`. A figure that was not measured is absent or
None, and the page says so instead of showing a zero.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qcompiler.plan import FLOAT_THERE, NO_WEIGHTS

Report = Mapping[str, Any]

PERCENT = ("top1", "top5")
"""Metrics that are shares of 1; their drop is in percentage points."""
_LOWER_IS_BETTER = ("mse", "kl")


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
    before, after, drop = (number(metric.get(k)) for k in ("float", "compiled", "drop"))
    name = str(metric.get("name") or "metric")
    if before is None and after is None:
        return None
    percent = name in PERCENT
    change = "–"
    good = None
    if drop is not None:
        gain = (drop if name in _LOWER_IS_BETTER else -drop) + 0.0  # no minus before a zero
        change = f"{gain:+.2f} points" if percent else f"{gain:+.4g}"
        limit = number((report.get("budget") or {}).get("max_drop"))
        good = drop <= limit if limit is not None else (True if drop <= 0 else None)
    return Comparison(
        name, before, after, score_text(name, before), score_text(name, after), change, good
    )


def _size(report: Report) -> Comparison | None:
    size = report.get("size_bytes") or {}
    before, after = number(size.get("model")), number(size.get("artifact"))
    return _less_is_better("size", before, after, _bytes, ("smaller", "larger"))


def _latency(report: Report) -> Comparison | None:
    latency = report.get("latency_ms") or {}
    before, after = number(latency.get("float")), number(latency.get("compiled"))
    return _less_is_better("latency", before, after, milliseconds, ("faster", "slower"))


def _less_is_better(
    label: str,
    before: float | None,
    after: float | None,
    text: Callable[[float | None], str],
    words: tuple[str, str],
) -> Comparison:
    good = None if before is None or after is None else after <= before
    factor = _factor(before, after, *words)
    return Comparison(label, before, after, text(before), text(after), factor, good)


def size_parts(report: Report) -> list[tuple[str, str]]:
    """Return (what, size as text) of the artifact's parts."""
    size = report.get("size_bytes") or {}
    parts = (
        ("parameters", number(size.get("parameters"))),
        ("code", number(size.get("library"))),
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


def plan_lines(report: Report) -> list[str]:
    """Return how an automatic plan was chosen, one sentence each; empty for any other."""
    found = report.get("assignment") or {}
    lines = [f"Plan: {found['statement']}"] if found.get("statement") else []
    return lines + binding_lines(found)


def binding_lines(assignment: Report) -> list[str]:
    """Return which limits bind an automatic plan and what one step of each buys, as sentences."""
    binding = assignment.get("binding") or {}
    lines = [str(binding["sentence"])] if binding.get("sentence") else []
    together = binding.get("step") or {}
    if together.get("sentence"):
        lines.append(str(together["sentence"]))
    limits = (assignment.get("limits") or {}).values()
    lines += [str(limit["sentence"]) for limit in limits if limit.get("step")]
    return [x if x.startswith("max_") else f"{x[:1].upper()}{x[1:]}" for x in lines]


def measured_facts(report: Report) -> dict[str, str]:
    """Return what a report measured, by name, in a line each."""
    found = {
        row.label: f"{row.before_text} float, {row.after_text} compiled ({row.change_text})"
        for row in comparison(report)
        if row.label != "size"
    }
    slices = worst_slice(report)
    return {**found, **({} if slices is None else {"worst slice": slices})}


def energy_text(report: Report) -> str:
    """Return the energy of one call as a sentence; says so where it was not measured."""
    energy = report.get("energy") or {}
    note = str(energy.get("note") or "not measured")
    ours, theirs = number(energy.get("compiled")), number(energy.get("float"))
    if ours is None:
        return note
    beside = f", float {theirs:.3g} mJ" if theirs is not None else ""
    return f"{ours:.3g} mJ{beside} ({note})"


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
    if worst["drop"] <= 0:
        return f"none of {binding} lost anything"
    unit = " points" if name in PERCENT else ""
    return (
        f"{worst['kind']} {worst['name']}, {score_text(name, worst['float'])} to "
        f"{score_text(name, worst['compiled'])}, drop {worst['drop']:.3g}{unit} "
        f"({worst['samples']} samples; worst of {binding})"
    )


def score_text(metric: str, value: float | None) -> str:
    """Return a score as text: shares as percentages; a dash for None."""
    if value is None:
        return "–"
    return f"{100 * value:.2f} %" if metric in PERCENT else f"{value:.4g}"


def precision_counts(report: Report) -> dict[str, int]:
    """Return how many nodes have each precision, the most frequent first."""
    plan = report.get("precision") or {}
    counts = Counter(precision_of(entry)[0] for entry in plan.values())
    return dict(counts.most_common())


def fallbacks(report: Report) -> list[tuple[str, str]]:
    """Return (node, reason) of the nodes that stay float although integers were asked for.

    Not those that are float by what was asked for: operators without weights where only weights
    have fewer bits, and what is float in a model that was quantized before.
    """
    plan = report.get("precision") or {}
    found = [(node, *precision_of(entry)) for node, entry in plan.items()]
    if not any(not _is_float(precision) for _, precision, _ in found):
        return []
    return [
        (node, f"{p}: {reason}")
        for node, p, reason in found
        if p == "fp32" and reason and not reason.startswith((NO_WEIGHTS, FLOAT_THERE))
    ]


def fallback_lines(report: Report, nodes: int = 3) -> list[str]:
    """Return `fallbacks` by reason, those of most nodes first, with a few of the nodes each."""
    groups: dict[str, list[str]] = {}
    for node, reason in fallbacks(report):
        groups.setdefault(reason, []).append(node)
    lines = []
    for reason, found in sorted(groups.items(), key=lambda g: -len(g[1])):
        named = ", ".join(found[:nodes])
        more = f" and {len(found) - nodes} more" if len(found) > nodes else ""
        lines.append(f"{reason} ({named}{more})")
    return lines


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
    return (json.dumps(plain(report), indent=2, ensure_ascii=False) + "\n").encode()


def to_html(report: Report) -> str:
    """Return the report as one HTML page, charts inside; nothing is loaded from elsewhere."""
    from qcompiler.report_page import page

    return page(report)


def region_ms(node: Mapping[str, Any]) -> float | None:
    """Return the latency of a region in ms, in whichever unit it is given."""
    for key, factor in (("latency_ms", 1.0), ("latency", 1.0), ("latency_us", 1e-3)):
        value = number(node.get(key))
        if value is not None:
            return value * factor
    return None


def limits(report: Report) -> list[str]:
    """Return the limits that were asked for, as text."""
    budget = report.get("budget") or {}
    texts = {
        "max_drop": "drop at most {:g}",
        "max_slice_drop": "drop of each slice at most {:g}",
        "max_latency_ms": "latency at most {:g} ms",
        "max_size_mb": "size at most {:g} MB",
        "max_memory_mb": "memory between kernels at most {:g} MB",
    }
    return [text.format(budget[key]) for key, text in texts.items() if budget.get(key) is not None]


def number(value: object) -> float | None:
    """Return a finite number as float; None for anything else."""
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


def milliseconds(value: float | None) -> str:
    """Return a time given in ms as text; a dash for None."""
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


def plain(value: Any) -> Any:
    """Return `value` with plain JSON types."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
