# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from qcompiler import report, report_charts


@pytest.fixture
def figures() -> dict[str, Any]:
    nodes = [
        {
            "name": f"block{i}.conv",
            "ops": ["qconv", "relu"],
            "nodes": [f"n{i}"],
            "precision": "fp32" if i == 2 else "w8a8",
            "latency_ms": 0.1 * (i + 1),
        }
        for i in range(4)
    ]
    return {
        "model": "models/net.onnx",
        "artifact": "out/net.qcm",
        "target": "x86-avx2",
        "precision": {
            "n0": {"precision": "w8a8", "reason": "asked for"},
            "n1": {"precision": "w8a8", "reason": "asked for"},
            "n2": {"precision": "fp32", "reason": "no integer form of <Erf>"},
            "n3": {"precision": "w8a8", "reason": "asked for"},
        },
        "metric": {"name": "top1", "float": 0.9, "compiled": 0.896, "drop": 0.4},
        "latency_ms": {"compiled": 1.0, "float": 2.5},
        "size_bytes": {"artifact": 250_000, "parameters": 200_000, "model": 1_000_000},
        "nodes": nodes,
        "budget": {"max_drop": 1.0, "kept": True, "problems": []},
        "versions": {"qcompiler": "0.1.0"},
        "digests": {"model": "ab" * 32},
        "seconds": {"total": 3.5, "passes": {"calibrate": 1.25}},
    }


class Collector(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    VOID = ("meta", "br", "hr", "img", "input", "link", "path", "use", "rect", "circle", "stop")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> Collector:
    collector = Collector()
    collector.feed(page)
    collector.close()
    return collector


def test_comparison_says_what_changed_and_whether_it_is_good(figures: dict[str, Any]) -> None:
    accuracy, size, latency = report.comparison(figures)
    assert (accuracy.label, accuracy.before_text, accuracy.after_text) == (
        "top1",
        "90.00 %",
        "89.60 %",
    )
    assert accuracy.change_text == "-0.40 points"
    assert accuracy.good is True  # within the budget of one point
    assert (size.before_text, size.after_text) == ("1 MB", "250 kB")
    assert size.change_text == "4.00x smaller"
    assert (latency.change_text, latency.good) == ("2.50x faster", True)


def test_comparison_names_a_slower_and_larger_result(figures: dict[str, Any]) -> None:
    figures["latency_ms"] = {"compiled": 3.0, "float": 1.5}
    figures["size_bytes"] = {"artifact": 2000, "model": 1000}
    _, size, latency = report.comparison(figures)
    assert (size.change_text, size.good) == ("2.00x larger", False)
    assert (latency.change_text, latency.good) == ("2.00x slower", False)


def test_a_drop_over_the_budget_is_bad(figures: dict[str, Any]) -> None:
    figures["budget"] = {"max_drop": 0.1}
    assert report.comparison(figures)[0].good is False


def test_for_an_error_metric_more_is_worse(figures: dict[str, Any]) -> None:
    figures["metric"] = {"name": "mse", "float": 0.0, "compiled": 0.25, "drop": 0.25}
    row = report.comparison(figures)[0]
    assert row.change_text == "+0.25"
    assert (row.before_text, row.after_text) == ("0", "0.25")


@pytest.mark.parametrize("absent", [None, {}, {"float": None, "compiled": None}])
def test_what_was_not_measured_is_not_shown_as_zero(figures: dict[str, Any], absent: Any) -> None:
    figures["metric"] = absent
    figures["latency_ms"] = absent
    assert [row.label for row in report.comparison(figures)] == ["size"]
    page = report.to_html(figures)
    assert "Accuracy was not measured; Latency was not measured." in page


def test_half_measured_latency_has_no_factor(figures: dict[str, Any]) -> None:
    figures["latency_ms"] = {"compiled": 1.0, "float": None}
    row = report.comparison(figures)[2]
    assert (row.before_text, row.change_text, row.good) == ("–", "–", None)
    assert "1 ms" in report.to_html(figures)


def test_parts_of_the_size_and_the_way_of_measuring(figures: dict[str, Any]) -> None:
    assert report.size_parts(figures) == [("parameters", "200 kB")]
    assert report.latency_caption(figures) is None
    figures["latency_ms"].update(threads=2, float_runner="onnxruntime")
    caption = "latency: float in ONNX Runtime, 2 threads, medians of interleaved runs"
    assert report.latency_caption(figures) == caption
    page = report.to_html(figures)
    assert caption in page
    assert "Inside the artifact: parameters 200 kB." in page
    figures["latency_ms"] = {"compiled": None, "float": None, "threads": 1}
    assert report.latency_caption(figures) is None


def test_precision_counts_and_fallbacks(figures: dict[str, Any]) -> None:
    assert report.precision_counts(figures) == {"w8a8": 3, "fp32": 1}
    assert report.fallbacks(figures) == [("n2", "fp32: no integer form of <Erf>")]


def test_an_all_float_plan_has_no_fallbacks(figures: dict[str, Any]) -> None:
    figures["precision"] = {"n0": {"precision": "fp32", "reason": "asked for"}}
    assert report.fallbacks(figures) == []


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"precision": "w8a8", "reason": "r"}, ("w8a8", "r")),
        ({"precision": "w8a8"}, ("w8a8", "")),
        (("w8a8", "r"), ("w8a8", "r")),
        ("w8a8", ("w8a8", "")),
    ],
)
def test_precision_of_every_form(entry: object, expected: tuple[str, str]) -> None:
    assert report.precision_of(entry) == expected


def test_json_round_trips_and_has_no_nan(figures: dict[str, Any]) -> None:
    figures["latency_ms"] = {"compiled": np.float32(1.5), "float": math.nan}
    figures["nodes"] = ({"name": "a", "latency_ms": math.inf, "macs": np.int64(7)},)
    text = report.to_json(figures)
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    assert read["latency_ms"] == {"compiled": 1.5, "float": None}
    assert read["nodes"] == [{"name": "a", "latency_ms": None, "macs": 7}]
    assert text.endswith(b"\n")


def test_page_is_one_file_that_loads_nothing(figures: dict[str, Any]) -> None:
    page = report.to_html(figures)
    found = parse(page)
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert "img" not in found.tags
    loads = [v for name, v in found.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in loads)
    assert "@import" not in page
    assert "url(http" not in page


def test_page_shows_every_node_with_its_reason(figures: dict[str, Any]) -> None:
    text = " ".join(parse(report.to_html(figures)).text)
    for node, entry in figures["precision"].items():
        assert node in text
        assert entry["reason"] in text
    for region in figures["nodes"]:
        assert region["name"] in text
    assert "Budget kept" in text
    assert "drop at most 1" in text
    assert "passes: calibrate" in text


def test_page_shows_the_speed_of_each_region(figures: dict[str, Any]) -> None:
    figures["nodes"][0].update(macs=5_000_000, latency_ms=0.1)
    assert "50.0" in parse(report.to_html(figures)).text


def test_page_says_that_a_budget_is_not_kept(figures: dict[str, Any]) -> None:
    figures["budget"] = {"max_drop": 0.1, "kept": False, "problems": ["drops by 0.4 & more"]}
    page = report.to_html(figures)
    assert "Budget not kept" in page
    assert "drops by 0.4 &amp; more" in page


def test_names_from_the_model_are_escaped_everywhere(figures: dict[str, Any]) -> None:
    evil = "<script>alert('x')</script>$\\frac{1}$&\"'"
    figures["model"] = evil
    figures["target"] = evil
    figures["precision"][evil] = {"precision": evil, "reason": evil}
    figures["nodes"][0].update(name=evil, ops=[evil], precision=evil)
    figures["versions"] = {evil: evil}
    figures["notes"] = [evil]
    page = report.to_html(figures)
    assert "script" not in parse(page).tags
    assert "<script" not in page


def test_page_with_nothing_but_a_target() -> None:
    page = report.to_html({"target": "reference"})
    assert "reference" in page
    assert "No budget was given" in page


def test_page_is_the_same_for_the_same_figures(figures: dict[str, Any]) -> None:
    assert report.to_html(figures) == report.to_html(figures)


def test_ids_in_the_page_are_unique(figures: dict[str, Any]) -> None:
    ids = [v for name, v in parse(report.to_html(figures)).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_chart_leaves_out_the_long_tail_and_says_so(figures: dict[str, Any]) -> None:
    figures["nodes"] = [
        {"name": f"r{i}", "ops": ["qconv"], "precision": "w8a8", "latency_ms": 1.0}
        for i in range(60)
    ]
    page = report.to_html(figures)
    assert "20 more regions take 33 % of the time" in page
    assert "All 60 regions" in page


@pytest.mark.parametrize("values", [(90.0, 89.0), (0.0, 0.0), (1.0, 0.001)])
def test_before_after_chart_is_well_formed(values: tuple[float, float]) -> None:
    bars = [("float", values[0], "a < b"), ("compiled", values[1], "c & d")]
    root = ElementTree.fromstring(report_charts.before_after("top1 & more", bars, None))
    text = "".join(root.itertext())
    assert "a < b" in text
    assert "c & d" in text


def test_region_chart_colors_by_precision_with_a_legend() -> None:
    rows = [("a", 2.0, "w8a8"), ("b", 1.0, "fp32")]
    svg = report_charts.region_latency(rows, "ms")
    assert report_charts.color_of("w8a8") in svg
    assert report_charts.color_of("fp32") in svg
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert "w8a8" in text
    assert "fp32" in text


def test_long_names_keep_both_ends() -> None:
    name = "start/" + "x" * 100 + "/conv"
    text = "".join(
        ElementTree.fromstring(report_charts.region_latency([(name, 1.0, "w8a8")], "ms")).itertext()
    )
    assert "start/" in text
    assert "/conv" in text
    assert name not in text


def test_unknown_precisions_have_a_color() -> None:
    assert report_charts.color_of("w2a2") == report_charts.OTHER
