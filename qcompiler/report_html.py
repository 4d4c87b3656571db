# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The frame of a report's page: style, script, tables. One file, readable on paper, loads nothing.

The page forbids itself to load anything (Content-Security-Policy); the only script that may run is
the one below, by its digest. It sorts tables and opens what is folded before printing; without it
everything is still there.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler import svg
from qcompiler.svg import escape

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
  color: #1f2933; background: #fff; margin: 1.5rem auto; max-width: 64rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h1 small { color: #5f6b78; font-weight: normal; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; border-top: 1px solid #e8ebee; padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
h2 + p { margin-top: 0; }
svg { max-width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
nav { margin: .6rem 0; font-size: .87rem; } nav a { margin-right: .9rem; color: #0072b2; }
.verdict { padding: .6rem .9rem; border-left: 5px solid #9aa5b1; background: #f4f6f8; }
.verdict.good { border-color: #1e8449; background: #eaf6ee; }
.verdict.bad { border-color: #c0392b; background: #fbecea; } .verdict ul { margin: .2rem 0 0; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.card { flex: 1 1 15rem; border: 1px solid #d9dee3; border-radius: 6px; padding: .7rem .8rem; }
.change { font-size: 1.45rem; font-weight: 600; }
.change.good, .good-text { color: #1e8449; } .change.bad, .bad-text { color: #c0392b; }
.faint, tr.faint td { color: #5f6b78; }
.scroll { max-height: 46rem; overflow: auto; border: 1px solid #e8ebee; border-radius: 6px;
  padding: .5rem; }
.multiples { display: flex; flex-wrap: wrap; gap: .5rem 1.4rem; }
table { border-collapse: collapse; width: 100%; font-size: .82rem; }
#summary { max-width: 46rem; }
th { text-align: left; color: #5f6b78; font-weight: 600; position: sticky; top: 0;
  background: #fff; white-space: nowrap; }
th[data-sort] { cursor: pointer; } th[data-sort]::after { content: " \\2195"; color: #b8c1ca; }
th[aria-sort=ascending]::after { content: " \\25b2"; color: #1f2933; }
th[aria-sort=descending]::after { content: " \\25bc"; color: #1f2933; }
td, th { padding: .22rem .6rem .22rem 0; border-bottom: 1px solid #e8ebee; vertical-align: top;
  overflow-wrap: break-word; }
td:first-child { overflow-wrap: anywhere; min-width: 8rem; }
#decisions td:nth-child(3) { min-width: 11rem; } #decisions td:last-child { min-width: 7rem; }
small { color: #5f6b78; }
code { overflow-wrap: anywhere; }
.n { text-align: right; white-space: nowrap; overflow-wrap: normal; }
.n.said { white-space: normal; }
.chip { border-radius: 3px; padding: 0 .4rem; font-size: .8rem; white-space: nowrap; }
summary { cursor: pointer; color: #0072b2; margin: .8rem 0; }
.verdict + .wide { margin-top: .8rem; }
@media screen and (max-width: 57rem) {
  .wide { overflow-x: auto; }
  .wide > svg, .scroll > svg { min-width: 55rem; }
}
@media print {
  body { margin: 0; max-width: none; font-size: 11px; } nav, summary { display: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  table { font-size: 8.5px; } th { white-space: normal; }
  td:first-child, #decisions td { min-width: 0; }
  .card { flex-basis: 9rem; } .multiples svg { width: 8.6rem; } .chip { font-size: inherit; }
  .scroll { max-height: none; overflow: visible; border: 0; padding: 0; }
  details::details-content { content-visibility: visible; display: block; }
  svg, tr, .card, .verdict { break-inside: avoid; } h2 { break-after: avoid; }
  th { position: static; } th[data-sort]::after { content: ""; }
}
"""

SCRIPT = """
for (const head of document.querySelectorAll('th[data-sort]')) {
  head.tabIndex = 0;
  const sort = () => {
    const table = head.closest('table'), body = table.tBodies[0];
    const up = head.getAttribute('aria-sort') === 'descending' ? 1 : -1;
    const order = head.dataset.sort === 'text' ? -up : up;
    const key = row => {
      const cell = row.cells[head.cellIndex];
      if (head.dataset.sort === 'text') return cell.textContent;
      return 'value' in cell.dataset ? parseFloat(cell.dataset.value) : NaN;
    };
    const rows = [...body.rows].map(row => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (typeof a === 'string') return order * a.localeCompare(b, 'en', {numeric: true});
      if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b);
      return order * (a - b);
    });
    for (const other of table.querySelectorAll('th')) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', order > 0 ? 'ascending' : 'descending');
    body.append(...rows.map(([, row]) => row));
  };
  head.addEventListener('click', sort);
  head.addEventListener('keydown', e => { if (e.key === 'Enter') sort(); });
}
addEventListener('beforeprint', () => {
  for (const fold of document.querySelectorAll('details')) fold.open = true;
});
"""

_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_DIGEST}'; "
    "base-uri 'none'; form-action 'none'"
)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
{figures}<script>{script}</script>
</body>
</html>
"""


def frame(title: str, body: Sequence[str], figures: Any = None) -> str:
    """Return a page.

    Args:
        title: Title of the window.
        body: Sections; empty ones are left out.
        figures: What the page shows, as JSON values, to be found in it again; None for none.
    """
    data = ""
    if figures is not None:
        # "</script" must not occur in the data; < occurs in JSON inside of strings only.
        text = json.dumps(figures, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
        data = f'<script type="application/json" id="figures">{text}</script>\n'
    return _PAGE.format(
        policy=escape(POLICY),
        title=escape(title),
        style=STYLE,
        body="\n".join(part for part in body if part),
        figures=data,
        script=SCRIPT,
    )


def section(name: str, title: str, about: str, *parts: str) -> str:
    """Return a section with its heading and one line that says how to read it."""
    line = f'<p class="faint">{about}</p>' if about else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{line}{"".join(parts)}</section>'


def figure(path: str, value: float, text: str) -> str:
    """Return a number with the place in the JSON that it comes from."""
    return f'<span data-figure="{escape(path)}" data-value="{value!r}">{escape(text)}</span>'


def chip(precision: str) -> str:
    """Return a precision on its colour."""
    color = svg.color_of(precision)
    style = f"background:{color};color:{svg.ink_on(color)}"
    return f'<span class="chip" style="{style}">{escape(precision)}</span>'


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        html: What it shows.
        value: The number it stands for, for sorting; None for none.
    """

    html: str
    value: float | None = None


def text(value: object) -> Cell:
    """Return a cell of text."""
    return Cell(escape(value))


def num(value: float | None, form: str = "", absent: str = "–") -> Cell:
    """Return a cell of a number; without a format with three digits."""
    if value is None:
        return Cell(absent)
    return Cell(escape(format(value, form) if form else svg.compact(value)), value)


def table(
    heads: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, Sequence[Cell]]],
    name: str = "",
    sortable: bool = True,
) -> str:
    """Return a table that a click on a heading sorts.

    Args:
        heads: (heading, "text" or "number") per column.
        rows: (class of the row, its cells).
        name: Id of the table.
        sortable: Whether it is worth sorting.
    """
    head = "".join(
        f"<th{' class=n' if kind == 'number' else ''}"
        f"{f' data-sort={kind}' if sortable else ''}>{escape(title)}</th>"
        for title, kind in heads
    )
    body = []
    for style, cells in rows:
        made = []
        for (_, kind), cell in zip(heads, cells, strict=True):
            value = "" if cell.value is None else f' data-value="{cell.value!r}"'
            made.append(f"<td{' class=n' if kind == 'number' else ''}{value}>{cell.html}</td>")
        body.append(f"<tr{f' class={style}' if style else ''}>{''.join(made)}</tr>")
    identity = f' id="{name}"' if name else ""
    return wide(
        f"<table{identity}><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def wide(part: str) -> str:
    """Return a chart or table that keeps a readable size on narrow screens, and scrolls there."""
    return f'<div class="wide">{part}</div>' if part else ""


def folded(summary: str, *parts: str, opened: bool = False) -> str:
    """Return something to unfold; it is printed in full."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{escape(summary)}</summary>{''.join(parts)}</details>"
