# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser: charts that show, figures that are those of the JSON, no request.

Needs Chromium (`apt-get install chromium`); skipped, with the reason, where there is none.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import qcompiler
from qcompiler import report

MODELS = Path(__file__).resolve().parent.parent / "models" / "digits_cnn"
CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the report in"),
]

# Runs in the page after our own script: what a person would see, as JSON in an attribute.
PROBE = """
addEventListener('load', () => {
  const seen = {charts: {}, figures: [], requests: [], tables: {}, sorted: {}, overlaps: []};
  for (const chart of document.querySelectorAll('svg.chart')) {
    const box = chart.getBoundingClientRect();
    let shapes = 0;
    for (const e of chart.querySelectorAll('rect,path,circle,polygon,text')) {
      const b = e.getBoundingClientRect();
      if (b.width > 0 || b.height > 0) shapes += 1;
    }
    const texts = [...chart.querySelectorAll('text')].filter(t => !t.hasAttribute('transform'));
    const boxes = texts.map(t => [t.getBoundingClientRect(), t.textContent]);
    for (const [b, text] of boxes) {
      if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 ||
          b.bottom > box.bottom + 1) seen.overlaps.push([chart.id, text, 'leaves the chart']);
    }
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [a, s] = boxes[i], [b, t] = boxes[j];
      const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (w > 1 && h > 4) seen.overlaps.push([chart.id, s, t]);
    }
    seen.charts[chart.id] = {width: box.width, height: box.height, shapes};
  }
  for (const f of document.querySelectorAll('[data-figure]'))
    seen.figures.push([f.dataset.figure, f.dataset.value, f.textContent]);
  for (const table of document.querySelectorAll('table[id]')) {
    seen.tables[table.id] = [...table.tBodies[0].rows].map(
      r => [...r.cells].map(c => [c.textContent, c.dataset.value ?? null]));
    table.querySelectorAll('th[data-sort]').forEach((head, i) => {
      head.click();
      seen.sorted[table.id + ' ' + i] = [head.dataset.sort, head.getAttribute('aria-sort'),
        [...table.tBodies[0].rows].map(r => r.cells[i].dataset.value ?? null)];
    });
  }
  seen.requests = performance.getEntriesByType('resource').map(r => r.name);
  seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const sizes = [...document.querySelectorAll('svg text')].map(t => {
    const m = t.getScreenCTM();
    return [parseFloat(getComputedStyle(t).fontSize) * Math.hypot(m.a, m.b), t.textContent];
  });
  seen.smallest = sizes.sort((a, b) => a[0] - b[0])[0];
  seen.images = document.images.length + document.querySelectorAll('link,iframe').length;
  document.body.setAttribute('data-seen', JSON.stringify(seen));
});
"""


def browse(page: Path, profile: Path, *more: str, width: int = 1100) -> str:
    """Open a page and return what Chromium prints."""
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--disable-default-apps", "--disable-extensions", "--hide-scrollbars"),
        *(f"--user-data-dir={profile}", f"--window-size={width},1400", *more, page.as_uri()),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the bundled model on the host, with an assignment as docs/json.md says."""
    model = qcompiler.compile(
        MODELS / "model.onnx",
        calibration=MODELS / "calib.npz",
        evaluate=qcompiler.Evaluation(MODELS / "eval.npz", "top1"),
        budget=qcompiler.Budget(max_drop=50.0),
    )
    found: dict[str, Any] = json.loads(report.to_json(dict(model.report or {})))
    found["budget"] = {"max_drop": 50.0, "max_slice_drop": 60.0, "kept": True, "problems": []}
    found["model"] = "models/<digits> & more.onnx"
    found["assignment"] = found.get("assignment") or assignment(found)
    return found


def assignment(found: dict[str, Any]) -> dict[str, Any]:
    """Return an assignment with every node of a report."""
    nodes: dict[str, Any] = {}
    heads = {n["name"]: n for n in found["nodes"] if "conv" in " ".join(n["ops"])}
    for i, (name, entry) in enumerate(found["precision"].items()):
        product = name in heads
        options = {
            p: {"latency_us": 10.0 * f, "loss": 1e-4 * i * g, "drop": 0.01 * i * g,
                "size_bytes": 100}
            for p, f, g in (("fp32", 3, 0), ("w8a8", 1, 1), ("w6a8", 0.9, 4), ("w4a8", 0.8, 30))
        }  # fmt: skip
        step = {"precision": "w4a8", "saves_us": 2.0, "loss": 0.01, "cost": 0.3}
        nodes[name] = {
            **entry, "op": "conv" if product else "relu", "region": name,
            "options": options if product else {},
            "latency_us": 10.0 if product else None, "measured_us": 10.5 if product else None,
            "gained_us": 20.0 if product else None, "loss": 1e-4 if product else None,
            "cost": 0.01 * i if product else None,
            "blocked_by": "max_drop" if product else None, "next_step": step if product else None,
        }  # fmt: skip
    front = [
        {"drop": d, "loss": d / 9, "latency_ms": ms, "size_bytes": 1e5, "counts": {"w6a8": 4},
         "chosen": i == 3, "measured_drop": 0.9 if i == 3 else None,
         "measured_latency_ms": 0.065 if i == 3 else None}
        for i, (ms, d) in enumerate(
            [(0.05, 5.0), (0.052, 3.0), (0.056, 2.0), (0.06, 0.8), (0.07, 0.3), (0.09, 0.0)])
    ]  # fmt: skip
    return {
        "format": 1, "statement": "the least latency with top1 at most 1 point below float",
        "budget": {"max_drop": 1.0, "max_latency_ms": None, "max_size_mb": None},
        "metric": "top1", "loss_kind": "kl", "loss_unit": "nat", "kept": True, "infeasible": None,
        "predicted": {"latency_ms": 0.06, "drop": 0.8, "loss": 0.01},
        "measured": {"latency_ms": 0.065, "drop": 0.9, "loss": 0.02},
        "front": front,
        "uniform": {"fp32": {"latency_ms": 0.2, "loss": 0.0, "drop": 0.0},
                    "w8a8": {"latency_ms": 0.08, "loss": 0.01, "drop": 0.1}},
        "nodes": nodes, "casts": [], "rounds": [],
        "binding": {"any_of": [["max_drop"]], "step": None, "sentence": "max_drop binds"},
        "limits": {"max_drop": {"step": {}, "sentence": "0.1 points more would save 2 us"}},
    }  # fmt: skip


@pytest.fixture(scope="module", params=[1100, 520], ids=["wide", "narrow"])
def seen(
    request: pytest.FixtureRequest,
    figures: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What the browser shows of the report, on a screen and in a window as narrow as it gets."""
    folder = tmp_path_factory.mktemp("browser")
    page = folder / "report.html"
    text = report.to_html(figures)
    # The probe is no part of the page: its policy allows one more script for this test.
    assert "script-src &#x27;sha256-" in text
    probed = text.replace("script-src &#x27;sha256-", "script-src &#x27;unsafe-hashes&#x27; ")
    probed = re.sub(r"script-src [^;]*?(&#x27;unsafe-hashes&#x27; )[^;]*;",
                    "script-src &#x27;unsafe-inline&#x27;;", probed)  # fmt: skip
    probed = probed.replace("</body>", f"<script>{PROBE}</script></body>")
    page.write_text(probed)
    options = ("--virtual-time-budget=5000", "--dump-dom")
    dom = browse(page, folder / "profile", *options, width=request.param)
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found is not None, dom[:2000]
    return dict(json.loads(html.unescape(found.group(1))))


def test_every_chart_is_there_and_has_a_size(seen: dict[str, Any]) -> None:
    wanted = {"pareto", "network", "cost", "latency", "error", "slices", "share", "range-0",
              "before-after-latency", "before-after-metric", "before-after-size"}  # fmt: skip
    assert {f"chart-{name}" for name in wanted} <= set(seen["charts"])
    for name, chart in seen["charts"].items():
        assert chart["width"] > 150, name
        assert chart["height"] > 20, name
        assert chart["shapes"] >= 3, name


def test_texts_of_charts_do_not_overlap_or_leave_them(seen: dict[str, Any]) -> None:
    assert seen["overlaps"] == []


def test_texts_are_large_enough_and_the_page_fits(seen: dict[str, Any]) -> None:
    assert seen["smallest"][0] >= 9, seen["smallest"]
    assert seen["wide"] <= 0


def test_figures_are_those_of_the_json(seen: dict[str, Any], figures: dict[str, Any]) -> None:
    places = {place for place, _, _ in seen["figures"]}
    assert places == {
        *("metric.float", "metric.compiled", "latency_ms.float", "latency_ms.compiled"),
        *("size_bytes.model", "size_bytes.artifact"),
    }
    for place, value, shown in seen["figures"]:
        expected: Any = figures
        for key in place.split("."):
            expected = expected[key]
        assert float(value) == expected
        number = float(re.match(r"[\d.]+", shown).group())  # type: ignore[union-attr]
        unit = shown.split()[-1]
        scale = {"%": 0.01, "µs": 1e-3, "ms": 1.0, "MB": 1e6, "kB": 1e3, "B": 1.0}[unit]
        assert number * scale == pytest.approx(expected, rel=5e-3)


def column(seen: dict[str, Any], table: str, index: int) -> list[float | None]:
    return [
        None if row[index][1] is None else float(row[index][1]) for row in seen["tables"][table]
    ]


def test_tables_are_those_of_the_json(seen: dict[str, Any], figures: dict[str, Any]) -> None:
    nodes = figures["assignment"]["nodes"]
    named = [row[0][0].split()[0] for row in seen["tables"]["decision-table"]]
    assert named == list(nodes)
    assert column(seen, "decision-table", 3) == [n["latency_us"] for n in nodes.values()]
    assert column(seen, "decision-table", 5) == [n["gained_us"] for n in nodes.values()]
    assert column(seen, "decision-table", 6) == [n["cost"] for n in nodes.values()]
    assert column(seen, "kernels", 3) == [n["latency_ms"] for n in figures["nodes"]]
    front = figures["assignment"]["front"]
    assert column(seen, "front", 1) == [p["latency_ms"] for p in front]
    assert column(seen, "front", 2) == [p["drop"] for p in front]
    slices = {s["name"]: s for s in figures["metric"]["slices"]}
    for row in seen["tables"]["slice-table"]:
        entry = slices[row[1][0]]
        assert float(row[5][1]) == entry["drop"]
        assert float(row[2][1]) == entry["samples"]


def test_headings_sort_their_table(seen: dict[str, Any]) -> None:
    numeric = {k: v for k, v in seen["sorted"].items() if v[0] == "number"}
    assert len(numeric) >= 10
    for name, (_, direction, values) in numeric.items():
        numbers = [float(v) for v in values if v is not None]
        assert direction == "descending", name
        assert numbers == sorted(numbers, reverse=True), name
        assert all(v is None for v in values[len(numbers) :]), name  # what is absent comes last


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """A server that notes every request."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()


def test_nothing_is_requested_and_the_policy_holds(
    figures: dict[str, Any], seen: dict[str, Any], listener: tuple[str, list[str]], tmp_path: Path
) -> None:
    assert seen["requests"] == []
    assert seen["images"] == 0
    address, asked = listener
    page = report.to_html(figures)
    assert not re.search(r"(?:https?:)?//[a-z0-9]", page.replace("http-equiv", ""))
    # What somebody put into the page does not load either: the policy is in force.
    loads = (
        f'<img src="{address}/image"><link rel="stylesheet" href="{address}/style">'
        f'<script src="{address}/script"></script><iframe src="{address}/frame"></iframe>'
        f"<script>document.title = 'ran'; fetch('{address}/fetch')</script>"
    )
    path = tmp_path / "altered.html"
    path.write_text(page.replace("</body>", f"{loads}</body>"))
    dom = browse(path, tmp_path / "profile", "--virtual-time-budget=3000", "--dump-dom")
    assert "<title>ran</title>" not in dom
    assert asked == []
    # The listener does hear a page without a policy: the test can fail.
    path.write_text(f'<!DOCTYPE html><title>x</title><img src="{address}/image">')
    browse(path, tmp_path / "profile", "--virtual-time-budget=3000", "--dump-dom")
    assert asked == ["/image"]


def test_it_prints(figures: dict[str, Any], tmp_path: Path) -> None:
    page, printed = tmp_path / "report.html", tmp_path / "report.pdf"
    page.write_text(report.to_html(figures))
    browse(page, tmp_path / "profile", f"--print-to-pdf={printed}", "--no-pdf-header-footer")
    data = printed.read_bytes()
    assert data.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", data))
    assert 2 <= pages <= 12
