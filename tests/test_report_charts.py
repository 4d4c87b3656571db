# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The charts of the report: well-formed, legible, nothing outside or on top of something else."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler import report_charts, report_network, svg


@pytest.mark.parametrize("values", [(90.0, 89.0), (0.0, 0.0), (1.0, 0.001)])
def test_before_after_chart_is_well_formed(values: tuple[float, float]) -> None:
    bars = [("float", values[0], "a < b"), ("compiled", values[1], "c & d")]
    root = ElementTree.fromstring(report_charts.before_after("x", "top1 & more", bars, None))
    text = "".join(root.itertext())
    assert "a < b" in text
    assert "c & d" in text


def text_of(drawing: str) -> str:
    return " ".join(ElementTree.fromstring(drawing).itertext())


def test_region_chart_colors_by_precision_with_a_legend() -> None:
    rows = [("a", 2.0, "w8a8"), ("b", 1.0, "fp32")]
    drawing = report_charts.region_latency(rows, "ms")
    assert svg.color_of("w8a8") in drawing
    assert svg.color_of("fp32") in drawing
    assert "w8a8" in text_of(drawing)
    assert "fp32" in text_of(drawing)


def test_long_names_keep_both_ends_and_are_whole_under_the_pointer() -> None:
    name = "start_" + "x" * 100 + "_conv"
    root = ElementTree.fromstring(report_charts.region_latency([(name, 1.0, "w8a8")], "ms"))
    labels = [e.text or "" for e in root.iter("text")]
    assert not any(name in label for label in labels)
    texts = ["".join(e.itertext()) for e in root.iter("text")]
    assert any("start_" in t and "_conv" in t for t in texts)
    assert name in "".join(root.itertext())


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("/layer1/layer1.0/conv1/Conv", "layer1.0/conv1"),
        ("/layer1/layer1.0/Relu_1_output_0", "layer1.0/Relu_1"),
        ("/encoder/layer.3/attention/MatMul_2", "encoder/layer.3/attention/MatMul_2"),
        ("Conv_4", "Conv_4"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_names_without_what_exporters_repeat(name: str, short: str) -> None:
    assert svg.short_name(name) == short


def test_precisions_have_distinct_colors_with_readable_text() -> None:
    from qcompiler.types import Precision

    missing = {p.value for p in Precision} - set(svg.PALETTE)
    assert not missing, "give a new precision a colour of its own in svg.PALETTE"
    assert len(set(svg.PALETTE.values())) == len(svg.PALETTE)
    assert svg.color_of("w2a2") == svg.OTHER

    def light(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for color in svg.PALETTE.values():  # WCAG 2.1, AA for text
        dark, bright = sorted((light(color), light(svg.ink_on(color))))
        assert (bright + 0.05) / (dark + 0.05) >= 4.5


def test_legends_have_one_order() -> None:
    assert svg.in_order(["w4a8", "x", "w8a8", "fp32", "w8a8"]) == ["fp32", "w8a8", "w4a8", "x"]


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e6), st.integers(1, 12))
def test_ticks_are_round_and_inside(lo: float, span: float, most: int) -> None:
    found = svg.ticks(lo, lo + span, most)
    assert len(found) <= 2 * most + 2
    assert found == sorted(found)
    assert all(lo - 1e-6 * span <= t <= lo + span + 1e-6 * span for t in found)


def test_figures_are_never_powers_of_ten_where_people_expect_digits() -> None:
    assert [svg.compact(v) for v in (1921.4, 99.94, 0.0123, 0.0)] == ["1921", "99.9", "0.0123", "0"]
    assert [svg.number(v) for v in (0.0, 2500.0, 0.25, 1e-7)] == ["0", "2500", "0.25", "1e-7"]


# ---------------------------------------------------------------------------------- the network


def boxes(*reads: tuple[int, ...]) -> list[report_network.Box]:
    return [
        report_network.Box(f"n{i}", "w8a8", "1 µs", "hint", read) for i, read in enumerate(reads)
    ]


def test_layers_are_longest_paths() -> None:
    #      0 -> 1 -> 2 -> 4;  0 -> 3 -> 4;  0 -> 4
    assert report_network.layers(boxes((), (0,), (1,), (0,), (0, 2, 3))) == [[0], [1, 3], [2], [4]]


@pytest.mark.parametrize("count", [1, 10, 62, 200, 500])
def test_boxes_do_not_overlap_and_stay_inside(count: int) -> None:
    # A chain with shortcuts, and three parallel branches in each tenth layer.
    nodes = []
    for i in range(count):
        read = [i - 1] if i else []
        if i % 10 in (7, 8):
            read = [i - i % 10 + 5]
        if i > 3 and i % 2:
            read.append(i - 3)
        nodes.append({"name": f"/block{i}/conv/Conv", "ops": ["qconv"], "precision": "w8a8",
                      "reads": read})  # fmt: skip
    made = report_network.boxes_of(nodes, ["1.5 µs"] * count)
    root = ElementTree.fromstring(report_network.network(made))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    places = [(b.x, b.y, b.x + b.width, b.y + 20) for b in made]
    for x1, y1, x2, y2 in places:
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert x2 - x1 >= 40
    for i, a in enumerate(places):
        for b in places[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert sum(len(b.reads) for b in made) == len(root.findall("path"))
    assert "/block0/conv/Conv" in text_of(str(report_network.network(made)))


def test_regions_without_edges_are_a_chain() -> None:
    nodes = [{"name": "a"}, {"name": "b", "reads": None}, {"name": "c", "reads": [0, 7]}]
    found = report_network.boxes_of(nodes, ["", "", ""])
    assert [b.reads for b in found] == [(), (0,), (0,)]


def test_labels_of_the_front_stay_inside_and_0_is_no_power_of_ten() -> None:
    others = [
        report_charts.Point(2.0, 1e-3, "slow", label="w4a8-group", color="#8c510a"),
        report_charts.Point(1.5, 0.0, "exact", label="fp32", color="#6b7784"),
    ]
    front = [report_charts.Point(1.0, 1e-4, "p", True, "chosen")]
    drawn = report_charts.pareto(front, others, ("ms", "nat"), logarithmic=True)
    root = ElementTree.fromstring(drawn)
    label = next(e for e in root.iter("text") if e.text == "w4a8-group")
    assert float(label.get("x", 0)) + svg.text_width("w4a8-group", 11, bold=True) < 960
    assert "≤ 0.0001" in text_of(drawn)
    assert "1e-9" not in text_of(drawn)


def test_labels_of_the_front_do_not_cover_each_other() -> None:
    others = [
        report_charts.Point(1.0 + i / 100, 1.0, str(i), label=f"w{i}a8", color="#0072b2")
        for i in range(4)
    ]
    front = [report_charts.Point(1.0, 1.0, "p", True, "chosen")]
    root = ElementTree.fromstring(report_charts.pareto(front, others, ("ms", "points")))
    bold = [e for e in root.iter("text") if e.get("font-weight") == "600"]
    spans = [
        (float(e.get("x", 0)), float(e.get("y", 0)), svg.text_width(e.text or "", 11)) for e in bold
    ]
    assert len(spans) >= 2
    for i, (x, y, w) in enumerate(spans):
        for x2, y2, w2 in spans[i + 1 :]:
            assert abs(y - y2) > 10 or x + w <= x2 or x2 + w2 <= x


# ---------------------------------------------------------------------- what else is measured


def test_pareto_marks_limits_that_are_near() -> None:
    points = [report_charts.Point(1.0, 2.0, "a"), report_charts.Point(2.0, 1.0, "b", chosen=True)]
    near = report_charts.pareto(points, [], ("ms", "points"), (2.5, 1.5))
    assert "limit 2.5" in text_of(near)
    assert "limit 1.5" in text_of(near)
    far = report_charts.pareto(points, [], ("ms", "points"), (900.0, 900.0))
    assert "limit" not in text_of(far)
