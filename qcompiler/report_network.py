# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The network as a picture: a box per kernel, coloured by precision, in layers down the page.

A layer holds what can run at the same time: the length of the longest path from the inputs. Layers
run down a column and go on at the top of the next one, so that two hundred kernels fit on a screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qcompiler import svg

_WIDTH = 960.0
_ROW, _BOX = 27.0, 20.0
_GAP = 30.0
_SHORT, _ROWS = 9, 26
"""Rows of a column: few in up to three columns, more where five of them are needed."""
_COLUMNS = 5
_ABREAST = 3
"""Boxes of a layer beside each other; more of them continue in the next row."""


@dataclass(slots=True)
class Box:
    """One kernel.

    Attributes:
        name: Of the kernel's first node.
        precision: What it computes in.
        latency: Its time as text; empty where it was not measured.
        hint: What a pointer over it shows.
        reads: Indices of the boxes that it reads from.
    """

    name: str
    precision: str
    latency: str
    hint: str
    reads: tuple[int, ...]
    x: float = field(default=0.0, init=False)
    y: float = field(default=0.0, init=False)
    width: float = field(default=0.0, init=False)
    column: int = field(default=0, init=False)


def boxes_of(nodes: Sequence[Mapping[str, Any]], latencies: Sequence[str]) -> list[Box]:
    """Return the boxes of a report's regions; without `reads` each reads the one before it."""
    boxes = []
    for i, (node, latency) in enumerate(zip(nodes, latencies, strict=True)):
        reads = node.get("reads")
        if reads is None:
            reads = [i - 1] if i else []
        ops = " + ".join(map(str, node.get("ops") or ()))
        name, precision = str(node.get("name", "?")), str(node.get("precision", "?"))
        hint = "\n".join(x for x in (name, ops, precision, latency) if x)
        known = tuple(int(r) for r in reads if 0 <= int(r) < i)
        boxes.append(Box(name, precision, latency, hint, known))
    return boxes


def layers(boxes: Sequence[Box]) -> list[list[int]]:
    """Return the indices of the boxes by layer: one below everything that it reads."""
    depth: list[int] = []
    for box in boxes:
        depth.append(1 + max((depth[r] for r in box.reads), default=-1))
    rows: list[list[int]] = [[] for _ in range(max(depth, default=-1) + 1)]
    for i, d in enumerate(depth):
        rows[d].append(i)
    return rows


def network(boxes: Sequence[Box]) -> str:
    """Return the drawing."""
    rows = [
        layer[i : i + _ABREAST] for layer in layers(boxes) for i in range(0, len(layer), _ABREAST)
    ]
    columns = min(max(min(-(-len(rows) // _SHORT), 3), -(-len(rows) // _ROWS)), _COLUMNS)
    columns = max(columns, 1)
    per = -(-len(rows) // columns)
    share = (_WIDTH - 8) / max(columns, 3)  # a short network gets no wider boxes
    for r, row in enumerate(rows):
        column = r // per
        width = (share - _GAP - 6 * (len(row) - 1)) / len(row)
        for k, i in enumerate(row):
            box = boxes[i]
            box.width, box.column = width, column
            box.x = 4 + column * share + k * (width + 6)
            box.y = 30 + (r % per) * _ROW
    drawing = svg.Drawing(
        _WIDTH, 30 + per * _ROW + 4, "The network, coloured by precision", "network"
    )
    drawing.legend(4, 14, svg.legend_of(b.precision for b in boxes))
    lanes: dict[int, int] = {}
    for box in boxes:
        for r in box.reads:
            _edge(drawing, boxes[r], box, lanes)
    for box in boxes:
        _box(drawing, box)
    return str(drawing)


def _edge(drawing: svg.Drawing, a: Box, b: Box, lanes: dict[int, int]) -> None:
    """Draw a line from a box to one that reads it; one that passes others goes round them."""
    x1, y1 = a.x + a.width / 2, a.y + _BOX
    x2, y2 = b.x + b.width / 2, b.y
    n = svg._n
    if a.column == b.column and b.y - a.y <= 1.5 * _ROW:
        points = f"M{n(x1)} {n(y1)}C{n(x1)} {n(y1 + 4)} {n(x2)} {n(y2 - 4)} {n(x2)} {n(y2)}"
    elif a.column == b.column:
        lane = lanes[a.column] = (lanes.get(a.column, -1) + 1) % 3
        side = max(a.x + a.width, b.x + b.width)
        out = side + 7 + 5 * lane
        ya, yb = a.y + _BOX / 2, b.y + _BOX / 2
        points = (
            f"M{n(a.x + a.width)} {n(ya)}H{n(out - 4)}Q{n(out)} {n(ya)} {n(out)} {n(ya + 4)}"
            f"V{n(yb - 4)}Q{n(out)} {n(yb)} {n(out - 4)} {n(yb)}H{n(b.x + b.width)}"
        )
    else:  # down the gap before the reader's column
        lane = lanes[~b.column] = (lanes.get(~b.column, -1) + 1) % 3
        gap = b.x - 5 - 4 * lane
        ya, yb = a.y + _BOX / 2, b.y + _BOX / 2
        points = f"M{n(a.x + a.width)} {n(ya)}H{n(gap)}V{n(yb)}H{n(b.x)}"
    drawing.path(points, "#8794a1", 1.1)


def _box(drawing: svg.Drawing, box: Box) -> None:
    fill = svg.color_of(box.precision)
    ink = svg.ink_on(fill)
    drawing.rect(box.x, box.y, box.width, _BOX, fill, box.hint, rx=3)
    room = box.width - 10
    time_width = svg.text_width(box.latency, 10) if box.latency else 0.0
    shows_time = bool(box.latency) and room - time_width >= 60
    if shows_time:
        drawing.text(
            box.x + box.width - 5, box.y + 14, box.latency, 10, ink, "end", pointer_events="none"
        )
        room -= time_width + 6
    label = svg.fitted(svg.short_name(box.name), room, 10.5)
    drawing.text(box.x + 5, box.y + 14, label, 10.5, ink, pointer_events="none")
